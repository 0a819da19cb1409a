"""The inverted bottleneck in stages: its 1x1 convolutions as products of matrices, with the batch norms around them.

A norm enters where the tensor behind it is read anyway: as a scale, a shift and ReLU6 of an operand, and what it needs
of the tensor before it is added up where that is written. No tensor of E channels is written but y1, y2 and their
gradients. The depthwise stages between are CUDA, ``torch.ops.fusekern_cuda``: a tile is activated once there, not once
for each tap.

A sum over all pixels has parts, a program each, which a second kernel adds in a fixed order. Of statistics and of the
sums of a norm's backward it is that of ``batch_norm``, which makes of them what the norm applies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fusekern.kernels import batch_norm
from fusekern.kernels.aot import Case
from torch import Tensor
from triton.runtime.jit import JITFunction


@triton.jit
def relu6(b_v):
    """A NaN stays one."""
    return tl.where(b_v < 0.0, 0.0, tl.where(b_v > 6.0, 6.0, b_v))


@triton.jit
def load_vector(vectors, i_v, i_c, C: tl.constexpr, BC: tl.constexpr):
    """``BC`` numbers from channel ``i_c`` on, of row ``i_v`` of [., C]."""
    o_c = i_c + tl.arange(0, BC)
    return tl.load(vectors + i_v * C + o_c, mask=o_c < C, other=0.0)


@triton.jit
def load_pixels(
    image, i_p, size, i_c, s_p, s_c, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr
):
    """``BC`` channels of ``BP`` pixels, zero outside; with LAST channels lie side by side, else pixels. [BP, BC]"""
    o_p = i_p + tl.arange(0, BP)
    o_c = i_c + tl.arange(0, BC)
    if LAST:
        o_x = o_p.to(tl.int64)[:, None] * s_p + o_c[None, :]
        if C % BC == 0:
            return tl.load(image + o_x, mask=(o_p < size)[:, None], other=0.0)
        return tl.load(image + o_x, mask=(o_p < size)[:, None] & (o_c < C)[None, :], other=0.0)
    # Transposed, so that neighbouring threads read neighbouring pixels.
    o_x = o_p.to(tl.int64)[None, :] + o_c.to(tl.int64)[:, None] * s_c
    return tl.trans(tl.load(image + o_x, mask=(o_p < size)[None, :] & (o_c < C)[:, None], other=0.0))


@triton.jit
def store_pixels(
    image, b_y, i_p, size, i_c, s_p, s_c, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr
):
    """The other way; ``b_y`` is [BP, BC]."""
    o_p = i_p + tl.arange(0, BP)
    o_c = i_c + tl.arange(0, BC)
    b_y = b_y.to(image.dtype.element_ty)
    if LAST:
        o_x = o_p.to(tl.int64)[:, None] * s_p + o_c[None, :]
        tl.store(image + o_x, b_y, mask=(o_p < size)[:, None] & (o_c < C)[None, :])
    else:
        o_x = o_p.to(tl.int64)[None, :] + o_c.to(tl.int64)[:, None] * s_c
        tl.store(image + o_x, tl.trans(b_y), mask=(o_p < size)[None, :] & (o_c < C)[:, None])


@triton.jit
def load_matrix(matrix, i_r, i_c, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A block of a dense [R, C], zero outside. [BR, BC]"""
    o_r = i_r + tl.arange(0, BR)
    o_c = i_c + tl.arange(0, BC)
    o_m = o_r.to(tl.int64)[:, None] * C + o_c[None, :]
    return tl.load(matrix + o_m, mask=(o_r < R)[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def store_sums(partial, i_part, b_first, b_second, i_c, C: tl.constexpr, BC: tl.constexpr):
    """Into part ``i_part`` of [parts, 2, C]."""
    o_c = i_c + tl.arange(0, BC)
    partial += i_part * (2 * C)
    tl.store(partial + o_c, b_first, mask=o_c < C)
    tl.store(partial + C + o_c, b_second, mask=o_c < C)


@triton.jit(do_not_specialize=["size", "tiles"])
def inverted_bottleneck_fwd_kernel(
    image,
    affine,
    weight,
    affine_out,
    residual,
    out,
    partial,
    size,
    tiles,
    s_xb,
    s_xp,
    s_xc,
    s_rb,
    s_rp,
    s_rc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741, the paper's letter for the channels that come out
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    ACTIVATE: tl.constexpr,
    STATS: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[p, o] = sum_c weight[o, c] a[p, c]  with a = x, or relu6(scale x + shift) with ACTIVATE.

    With STATS the mean of the tile's y and the sum of their squared distances from it go into partial, [parts, 2, O].
    NORM "relu6" writes relu6(scale' y + shift'), "affine" scale' y + shift', "residual" that and the residual.
    """
    i = tl.program_id(0)
    i_o = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    image += i_b * s_xb
    residual += i_b * s_rb
    out += i_b * s_ob

    b_y = tl.zeros([BP, BO], tl.float32)
    for i_c in range(0, C, BK):
        b_x = load_pixels(image, i_p, size, i_c, s_xp, s_xc, C, BP, BK, LAST)  # [BP, BK]
        if ACTIVATE:
            b_scale = load_vector(affine, 0, i_c, C, BK)
            b_shift = load_vector(affine, 1, i_c, C, BK)
            b_x = relu6(b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]).to(b_x.dtype)
        b_w = load_matrix(weight, i_o, i_c, O, C, BO, BK)  # [BO, BK]
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)

    if STATS:
        m_p = (i_p + tl.arange(0, BP) < size)[:, None]
        b_mean = tl.sum(tl.where(m_p, b_y, 0.0), 0) / tl.minimum(size - i_p, BP).to(tl.float32)
        b_d = tl.where(m_p, b_y - b_mean[None, :], 0.0)
        store_sums(partial, i_part, b_mean, tl.sum(b_d * b_d, 0), i_o, O, BO)
    if NORM != "none":
        b_scale = load_vector(affine_out, 0, i_o, O, BO)
        b_shift = load_vector(affine_out, 1, i_o, O, BO)
        b_y = b_y * b_scale[None, :] + b_shift[None, :]
    if NORM == "relu6":
        b_y = relu6(b_y)
    if NORM == "residual":
        b_y += load_pixels(residual, i_p, size, i_o, s_rp, s_rc, O, BP, BO, LAST).to(tl.float32)
    store_pixels(out, b_y, i_p, size, i_o, s_op, s_oc, O, BP, BO, LAST)


@triton.jit(do_not_specialize=["size", "tiles"])
def inverted_bottleneck_apply_kernel(
    image,
    other,
    vectors,
    out,
    size,
    tiles,
    s_xb,
    s_xp,
    s_xc,
    s_rb,
    s_rp,
    s_rc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
):
    """MODE "affine": scale x + shift. "residual": that and the other.

    "gradient", of a norm: p x + q (other - mean) + r, the other being what the norm was applied to.
    """
    i = tl.program_id(0)
    i_c = i % tl.cdiv(C, BC) * BC
    i_part = (i // tl.cdiv(C, BC)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    b_x = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
    b_first = load_vector(vectors, 0, i_c, C, BC)[None, :]
    b_second = load_vector(vectors, 1, i_c, C, BC)[None, :]
    if MODE != "affine":
        b_r = load_pixels(other + i_b * s_rb, i_p, size, i_c, s_rp, s_rc, C, BP, BC, LAST).to(tl.float32)
    if MODE == "gradient":
        b_third = load_vector(vectors, 2, i_c, C, BC)[None, :]
        b_mean = load_vector(vectors, 3, i_c, C, BC)[None, :]
        b_y = b_first * b_x + (b_second * (b_r - b_mean) + b_third)
    else:
        b_y = b_first * b_x + b_second
        if MODE == "residual":
            b_y += b_r
    store_pixels(out + i_b * s_ob, b_y, i_p, size, i_c, s_op, s_oc, C, BP, BC, LAST)


@triton.jit(do_not_specialize=["size", "tiles", "steps", "run"])
def inverted_bottleneck_reduce_kernel(
    grad,
    image,
    mean,
    partial,
    size,
    tiles,
    steps,
    run,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    LAST: tl.constexpr,
):
    """sum g and sum g (y - mean) over ``run`` of the tiles of pixels, into partial, [parts, 2, C]."""
    i = tl.program_id(0)
    i_c = i % tl.cdiv(C, BC) * BC
    i_part = i // tl.cdiv(C, BC)
    b_mean = load_vector(mean, 0, i_c, C, BC)[None, :]
    b_first = tl.zeros([BP, BC], tl.float32)
    b_second = tl.zeros([BP, BC], tl.float32)
    for i in range(i_part * run, tl.minimum((i_part + 1) * run, steps)):
        i_b = (i // tiles).to(tl.int64)
        i_p = i % tiles * BP
        b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_c, s_gp, s_gc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
        b_y = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
        # Outside g is zero: so is what it adds.
        b_first += b_g
        b_second += b_g * (b_y - b_mean)
    store_sums(partial, i_part.to(tl.int64), tl.sum(b_first, 0), tl.sum(b_second, 0), i_c, C, BC)


@triton.jit(do_not_specialize=["parts"])
def inverted_bottleneck_sum_kernel(
    partial,
    product,
    vectors,
    mean,
    total,
    size,
    parts,
    C: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    FINISH: tl.constexpr,
):
    """The sum S of [parts, size] over the parts, in a fixed order.

    With FINISH what becomes of it in the gradient of a weight [., C]:  p S + q product + u mean^T,  (p, q, u) being
    the vectors, [3, .].
    """
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_s = o_s < size
    b_sum = tl.zeros([BT, BS], tl.float32)
    for i_t in range(0, parts, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = (o_t < parts)[:, None] & m_s[None, :]
        b_sum += tl.load(partial + o_t.to(tl.int64)[:, None] * size + o_s[None, :], mask=m_t, other=0.0)
    b_total = tl.sum(b_sum, 0)
    if FINISH:
        o_e = o_s // C
        o_v = tl.cast(size // C, tl.int64)
        b_p = tl.load(vectors + o_e, mask=m_s, other=0.0)
        b_q = tl.load(vectors + o_v + o_e, mask=m_s, other=0.0)
        b_u = tl.load(vectors + 2 * o_v + o_e, mask=m_s, other=0.0)
        b_mean = tl.load(mean + o_s % C, mask=m_s, other=0.0)
        b_total = b_p * b_total + (b_q * tl.load(product + o_s, mask=m_s, other=0.0) + b_u * b_mean)
    tl.store(total + o_s, b_total.to(total.dtype.element_ty), mask=m_s)


@triton.jit(do_not_specialize=["size", "tiles"])
def inverted_bottleneck_bwd_hidden_kernel(
    grad,
    weight,
    image,
    affine,
    mean,
    out,
    partial,
    size,
    tiles,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz[p, e] = mask(v2[p, e]) sum_o dy3[p, o] weight[o, e],  v2 = scale y2 + shift,  1 for 0 < v2 < 6 being the mask.

    C are the channels o, O the channels e. sum dz and sum dz (y2 - mean) go into partial, [parts, 2, O].
    """
    i = tl.program_id(0)
    i_e = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    grad += i_b * s_gb

    b_dz = tl.zeros([BP, BO], tl.float32)
    for i_c in range(0, C, BK):
        b_g = load_pixels(grad, i_p, size, i_c, s_gp, s_gc, C, BP, BK, LAST)  # [BP, BK]
        b_w = load_matrix(weight, i_c, i_e, C, O, BK, BO)  # [BK, BO]
        b_dz = tl.dot(b_g, b_w, b_dz, input_precision=PRECISION)

    b_y = load_pixels(image + i_b * s_xb, i_p, size, i_e, s_xp, s_xc, O, BP, BO, LAST).to(tl.float32)  # [BP, BO]
    b_v = b_y * load_vector(affine, 0, i_e, O, BO)[None, :] + load_vector(affine, 1, i_e, O, BO)[None, :]
    b_dz = tl.where((b_v > 0.0) & (b_v < 6.0), b_dz, 0.0)
    store_pixels(out + i_b * s_ob, b_dz, i_p, size, i_e, s_op, s_oc, O, BP, BO, LAST)
    m_p = (i_p + tl.arange(0, BP) < size)[:, None]
    b_d = tl.where(m_p, b_dz * (b_y - load_vector(mean, 0, i_e, O, BO)[None, :]), 0.0)
    store_sums(partial, i_part, tl.sum(tl.where(m_p, b_dz, 0.0), 0), tl.sum(b_d, 0), i_e, O, BO)


@triton.jit(do_not_specialize=["size", "tiles"])
def inverted_bottleneck_bwd_image_kernel(
    grad,
    weight,
    image,
    mean,
    matrix,
    vectors,
    residual,
    out,
    size,
    tiles,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_rb,
    s_rp,
    s_rc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    GRAM: tl.constexpr,
    CENTRE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx[p, c] = sum_e d[p, e] weight[e, c] and, with RESIDUAL, the residual; C are the channels e, O the channels c.

    With GRAM also  k sum_c' x[p, c'] matrix[c', c] + u[c],  u and k being the rows of vectors, [2, O]; with CENTRE
    x - mean stands in the place of x.
    """
    i = tl.program_id(0)
    i_o = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    grad += i_b * s_gb
    image += i_b * s_xb

    b_dx = tl.zeros([BP, BO], tl.float32)
    if GRAM:
        # The smaller part first, since it is scaled.
        for i_c in range(0, O, BK):
            b_x = load_pixels(image, i_p, size, i_c, s_xp, s_xc, O, BP, BK, LAST)  # [BP, BK]
            if CENTRE:
                b_x = b_x - load_vector(mean, 0, i_c, O, BK)[None, :]
            b_k = load_matrix(matrix, i_c, i_o, O, O, BK, BO)  # [BK, BO]
            b_dx = tl.dot(b_x, b_k, b_dx, input_precision=PRECISION)
        b_dx = b_dx * load_vector(vectors, 1, i_o, O, BO)[None, :] + load_vector(vectors, 0, i_o, O, BO)[None, :]
    for i_c in range(0, C, BK):
        b_g = load_pixels(grad, i_p, size, i_c, s_gp, s_gc, C, BP, BK, LAST)  # [BP, BK]
        b_w = load_matrix(weight, i_c, i_o, C, O, BK, BO)  # [BK, BO]
        b_dx = tl.dot(b_g, b_w, b_dx, input_precision=PRECISION)
    if RESIDUAL:
        b_dx += load_pixels(residual + i_b * s_rb, i_p, size, i_o, s_rp, s_rc, O, BP, BO, LAST).to(tl.float32)
    store_pixels(out + i_b * s_ob, b_dx, i_p, size, i_o, s_op, s_oc, O, BP, BO, LAST)


@triton.jit(do_not_specialize=["size", "tiles", "steps", "run"])
def inverted_bottleneck_bwd_weight_kernel(
    grad,
    image,
    mean,
    affine,
    out,
    sums,
    size,
    tiles,
    steps,
    run,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[o, c] = sum_p g[p, o] a[p, c] over ``run`` of the tiles of pixels, [parts, O, C]; BK of the C channels.

    a is x, or x - mean with CENTRE "image" or "both", or relu6(scale x + shift) with ACTIVATE; with "both" g is
    g - mean too. With SUMS  sum_p g  goes into sums, [parts, O].
    """
    i = tl.program_id(0)
    i_c = i % tl.cdiv(C, BK) * BK
    i_o = i // tl.cdiv(C, BK) % tl.cdiv(O, BO) * BO
    i_part = i // tl.cdiv(C, BK) // tl.cdiv(O, BO)
    if ACTIVATE:
        b_scale = load_vector(affine, 0, i_c, C, BK)[None, :]
        b_shift = load_vector(affine, 1, i_c, C, BK)[None, :]
    if CENTRE != "none":
        b_mean = load_vector(mean, 0, i_c, C, BK)[None, :]
    if CENTRE == "both":
        b_mean_g = load_vector(mean, 0, i_o, O, BO)[None, :]

    b_dw = tl.zeros([BO, BK], tl.float32)
    b_sum = tl.zeros([BO], tl.float32)
    for i in range(i_part * run, tl.minimum((i_part + 1) * run, steps)):
        i_b = (i // tiles).to(tl.int64)
        i_p = i % tiles * BP
        m_p = (i_p + tl.arange(0, BP) < size)[:, None]
        b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_o, s_gp, s_gc, O, BP, BO, LAST)  # [BP, BO]
        b_x = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BK, LAST)  # [BP, BK]
        if SUMS:
            b_sum += tl.sum(b_g.to(tl.float32), 0)
        if CENTRE == "both":
            b_g = tl.where(m_p, b_g.to(tl.float32) - b_mean_g, 0.0).to(b_g.dtype)
        if CENTRE != "none":
            b_x = (b_x.to(tl.float32) - b_mean).to(b_x.dtype)
        if ACTIVATE:
            b_x = relu6(b_x.to(tl.float32) * b_scale + b_shift).to(b_x.dtype)
        b_dw = tl.dot(tl.trans(b_g), b_x, b_dw, input_precision=PRECISION)

    o_o = i_o + tl.arange(0, BO)
    o_c = i_c + tl.arange(0, BK)
    i_part = i_part.to(tl.int64)
    o_w = (i_part * O + o_o)[:, None] * C + o_c[None, :]
    tl.store(out + o_w, b_dw.to(out.dtype.element_ty), mask=(o_o < O)[:, None] & (o_c < C)[None, :])
    if SUMS:
        tl.store(sums + i_part * O + o_o, b_sum, mask=o_o < tl.where(i_c == 0, O, 0))


class Tile(NamedTuple):
    """Launch setting.

    Pixels, channels that come out, and channels of a step, or of a weight's gradient the other ones. Registers of a
    thread at most: where it is not stated, ptxas may spill some so that another program fits on a multiprocessor.
    """

    BP: int
    BO: int
    BK: int
    warps: int
    stages: int
    registers: int | None = None


class Setting(NamedTuple):
    """Of the forward products and of the gradients of the hidden map, the image and the weights."""

    fwd: Tile
    hidden: Tile
    image: Tile
    weight: Tile


# By the products' kind and whether large tiles are enough for all multiprocessors. "ieee" is fp32 without tf32, which
# has no tensor cores and its operands in registers; "odd" is whatever has no accesses of 16 bytes, NCHW above all.
SETTINGS = {
    ("half", "medium"): Setting(*[Tile(64, 64, 64, 4, 4)] * 4),
    ("half", "large"): Setting(*[Tile(128, 128, 64, 8, 3)] * 3, Tile(64, 128, 128, 8, 3)),
    ("tf32", "medium"): Setting(*[Tile(64, 64, 32, 4, 3)] * 3, Tile(32, 64, 64, 4, 3)),
    ("tf32", "large"): Setting(
        Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(32, 128, 64, 8, 3)
    ),
    ("ieee", "medium"): Setting(*[Tile(64, 64, 16, 8, 2, 255)] * 3, Tile(16, 64, 64, 8, 2, 255)),
    ("ieee", "large"): Setting(*[Tile(128, 64, 16, 8, 2, 255)] * 3, Tile(16, 128, 64, 8, 2, 255)),
    ("odd half", "any"): Setting(*[Tile(64, 64, 32, 8, 2)] * 3, Tile(16, 64, 64, 8, 2)),
    ("odd fp32", "any"): Setting(*[Tile(64, 64, 16, 8, 2, 255)] * 3, Tile(16, 64, 64, 8, 2, 255)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# What it takes to start a program and to write and read its part, in tiles of it.
START = 4
# What has no product: as the tiles above.
FLAT = Tile(32, 64, 64, 4, 2, 255)
# Parts and elements at a time of the kernel that adds: few parts of many elements, as of a weight, or the other way.
FEW, MANY = (16, 128), (256, 16)
# Pixels by channels from which on a Gram matrix is less work than a pass over the hidden map, and numbers of that map
# from which on the pass takes longer than the two dozen small operations to start that come with the matrix. Modelled.
GRAM_PIXELS, GRAM_NUMBERS = 8, 2**26


class Rows(NamedTuple):
    """Maps as matrices: ``images`` of them with ``size`` pixels each, the channels side by side (``last``) or not."""

    images: int
    size: int
    last: bool

    def tiles(self, pixels: int) -> int:
        return triton.cdiv(self.size, pixels)


def _strides(image: Tensor, last: bool) -> tuple[int, int, int] | None:
    """Between images, pixels and channels; none if a map is not a matrix in this layout."""
    _, c, h, w = image.shape
    s_b, s_c, s_h, s_w = image.stride()
    s_p = s_w if w > 1 else s_h
    if h > 1 and w > 1 and s_h != w * s_w:
        return None
    unit = c == 1 or s_c == 1 if last else h * w == 1 or s_p == 1
    return (s_b, 0 if h * w == 1 else s_p, 1 if last else s_c) if unit else None


def _tidy(image: Tensor, last: bool) -> Tensor:
    """A copy if the image is not a matrix; one that is as large as the op's own input or output, not as E channels."""
    if _strides(image, last):
        return image
    return image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _rows(*dense: Tensor) -> Rows:
    """Of dense maps, which lie alike. Channels_last maps are one matrix."""
    batch, _, h, w = dense[0].shape
    last = all(image.is_contiguous(memory_format=torch.channels_last) for image in dense)
    return Rows(1, batch * h * w, True) if last else Rows(batch, h * w, False)


def _as_rows(rows: Rows, image: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The image, or a tidy copy, and its strides between images, pixels and channels."""
    image = _tidy(image, rows.last)
    s_b, s_p, s_c = _strides(image, rows.last)
    batch, c, h, w = image.shape
    if rows.last:
        # Images of one pixel lie as far apart as pixels do.
        if h * w == 1:
            s_p = s_b
        if batch > 1 and s_b != h * w * s_p:
            return _as_rows(rows, image.contiguous(memory_format=torch.channels_last))
        s_b = 0
    return image, (s_b, s_p, s_c)


def _precision(image: Tensor) -> str:
    """Of fp32 products."""
    return "tf32" if image.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def kind_of(rows: Rows, *images: Tensor) -> str:
    """Which products the launch settings are for."""
    odd = any(not rows.last or image.shape[1] % 16 or _strides(image, True)[1] % 16 for image in images)
    if images[0].dtype == torch.float32:
        return "odd fp32" if odd else _precision(images[0])
    return "odd half" if odd else "half"


def setting_of(kind: str, pixels: int, channels: int) -> Setting:
    """The launch settings for a product that has so many pixels and channels."""
    if kind.startswith("odd"):
        return SETTINGS[kind, "any"]
    tiles = triton.cdiv(pixels, 128) * triton.cdiv(channels, 128)
    return SETTINGS[kind, "medium" if tiles < PROGRAMS else "large"]


def run_length(programs: int, steps: int) -> int:
    """How many of its tiles a program adds up, such that the slowest multiprocessor is done first."""

    def cost(parts: int) -> int:
        return triton.cdiv(programs * parts, PROGRAMS) * (START + triton.cdiv(steps, parts))

    most = max(1, min(steps, 4 * PROGRAMS // programs))
    return triton.cdiv(steps, min(range(1, most + 1), key=cost))


def launches(
    image: Tensor,
    hidden: int,
    channels_out: int,
    *,
    stride: int = 1,
    batch: tuple[bool, bool, bool] = (True, True, True),
    low: bool = False,
) -> dict[str, tuple[str, ...]]:
    """What the op launches on a GPU, in order: ``fwd`` in training, ``bwd`` after it, and ``infer``.

    Kernels have the names that a profiler shows, torch's operations theirs, ``aten::...``. This is for one process and
    a dense image and gradient; what lies otherwise is copied first.

    Args:
        image: ``[B, C, H, W]``; a meta tensor will do.
        hidden: E.
        channels_out: O.
        stride: of the depthwise convolution.
        batch: which norms take the statistics of the batch. With none of them the forward is ``infer`` where nothing
            is to be learned.
        low: the expansion is computed again in the backward.
    """
    size = [triton.cdiv(side, stride) for side in image.shape[2:]]
    layout = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format

    def map_of(channels: int, size: list[int] | torch.Size) -> Tensor:
        shape = image.shape[0], channels, *size
        return torch.empty(shape, dtype=image.dtype, device="meta", memory_format=layout)

    def add_up(grad: Tensor, image: Tensor) -> tuple[str, ...]:
        """The gradient of a weight, in one part or more."""
        rows = _rows(grad, image)
        parts = _weight_setting(rows, kind_of(rows, grad, image), grad.shape[1], image.shape[1])[3]
        return (weight, add) if parts > 1 else (weight,)

    kernel = "inverted_bottleneck_{}_kernel".format
    weight, add = kernel("bwd_weight"), kernel("sum")
    x, y1 = map_of(image.shape[1], image.shape[2:]), map_of(hidden, image.shape[2:])
    y2, y3 = map_of(hidden, size), map_of(channels_out, size)
    products = kernel("fwd"), "bn_relu6_dw_fwd_kernel", kernel("fwd")
    joins = "batch_norm_join_kernel", "bn_relu6_dw_moments_kernel", "batch_norm_join_kernel"
    forward = [] if all(batch) else ["batch_norm_fwd_kernel"]
    for product, join, on in zip(products, joins, batch, strict=True):
        forward += [product, join] if on else [product]
    gram = _gram(x, hidden)
    return {
        "fwd": (*forward, kernel("apply")),
        "bwd": (
            *([kernel("fwd")] if low else []),
            *(kernel("reduce"), "batch_norm_bwd_kernel"),
            *(kernel("apply"), kernel("bwd_hidden"), "batch_norm_bwd_kernel", *add_up(y3, y2)),
            *("bn_relu6_dw_bwd_kernel", "bn_relu6_dw_sums_kernel"),
            *(_gram_launches(x, add_up(x, x)) if gram else (kernel("apply"), kernel("bwd_image"), *add_up(y1, x))),
        ),
        "infer": ("batch_norm_fwd_kernel", *products),
    }


def _gram(image: Tensor, hidden: int) -> bool:
    """There are so many pixels that a Gram matrix is the shorter way."""
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    return pixels >= GRAM_PIXELS * image.shape[1] and pixels * hidden >= GRAM_NUMBERS


def _gram_launches(image: Tensor, gram: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the last stage; ``gram`` are those of the matrix."""
    weight, add, last = (f"inverted_bottleneck_{name}_kernel" for name in ("bwd_weight", "sum", "bwd_image"))
    centred = image.dtype == torch.float32
    cast = () if centred else ("aten::_to_copy",)
    of_matrix, of_sums = (), ("aten::sum", "aten::mul", "aten::add_")
    of_vector = ()
    if not centred:
        of_matrix, of_sums = ("aten::addr_",), ()
        of_vector = "aten::_to_copy", "aten::mm", "aten::mul", "aten::sub_"
    middle = "aten::_to_copy", "aten::mv", "aten::sub", "aten::_to_copy", "aten::mul", "aten::add", "aten::_to_copy"
    scale = "aten::linalg_vector_norm", "aten::clamp_min", "aten::div", "aten::mul"
    return (
        *("aten::mean", *cast, *middle, *gram, *of_matrix),
        *(weight, "aten::mul", *of_sums, "aten::mm", "aten::stack", add),
        *(*scale, *cast, "aten::mm", "aten::mm", *of_vector, "aten::stack", "aten::mul", *cast, last),
    )


def _device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Seen(NamedTuple):
    """What a stage makes of the mean and M2 of what it writes: ``stats``, or the ``vectors`` of the norm behind it."""

    stats: Tensor | None
    vectors: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _seen(*arguments: Tensor | float | None) -> Seen | None:
    seen = Seen(*arguments)
    return None if seen.stats is None and seen.vectors is None else seen


def _fwd(
    image: Tensor,
    affine: Tensor | None,
    weight: Tensor,
    out: Tensor,
    seen: Seen | None,
    norm: str = "none",
    affine_out: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    rows = _rows(out) if affine is None else _rows(image, out)
    channels, channels_out = weight.shape[1], weight.shape[0]
    image, s_x = _as_rows(rows, image)
    residual, s_r = (out, (0, 0, 0)) if residual is None else _as_rows(rows, residual)
    _, s_o = _as_rows(rows, out)
    tile = setting_of(kind_of(rows, image, out, residual), rows.images * rows.size, channels_out).fwd
    tiles = rows.tiles(tile.BP)
    parts = rows.images * tiles
    partial = None
    if seen is not None:
        partial = torch.empty((parts, 2, channels_out), dtype=torch.float32, device=out.device)
    inverted_bottleneck_fwd_kernel[(parts * triton.cdiv(channels_out, tile.BO),)](
        *(image, _given(affine, out), weight, _given(affine_out, out), residual, out, _given(partial, out)),
        *(rows.size, tiles, *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        ACTIVATE=affine is not None,
        STATS=seen is not None,
        NORM=norm,
        PRECISION=_precision(image),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    if seen is not None:
        batch_norm.join(partial, rows.size, tiles, tile.BP, *seen)


def _given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is told instead of a tensor that it does not touch."""
    return other if tensor is None else tensor


def _apply(mode: str, image: Tensor, other: Tensor | None, vectors: Tensor, out: Tensor) -> None:
    rows = _rows(out)
    image, s_x = _as_rows(rows, image)
    other, s_r = (out, (0, 0, 0)) if other is None else _as_rows(rows, other)
    _, s_o = _as_rows(rows, out)
    pixels, channels = FLAT[:2]
    tiles = rows.tiles(pixels)
    inverted_bottleneck_apply_kernel[(rows.images * tiles * triton.cdiv(out.shape[1], channels),)](
        *(image, other, vectors, out, rows.size, tiles, *s_x, *s_r, *s_o),
        C=out.shape[1],
        BP=pixels,
        BC=channels,
        LAST=rows.last,
        MODE=mode,
        num_warps=FLAT.warps,
        num_stages=FLAT.stages,
        maxnreg=FLAT.registers,
    )


def _sum(partial: Tensor, total: Tensor, finish: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """``finish``: the product, vectors and mean that the kernel has for it."""
    product, vectors, mean = finish or (partial, partial, partial)
    count, width = FEW if partial.shape[0] <= 4 * FEW[0] else MANY
    inverted_bottleneck_sum_kernel[(triton.cdiv(total.numel(), width),)](
        *(partial, product, vectors, mean, total, total.numel(), partial.shape[0]),
        C=total.shape[-1],
        BT=count,
        BS=width,
        FINISH=finish is not None,
        num_warps=4 if count == FEW[0] else 8,
    )


def _weight_setting(rows: Rows, kind: str, channels_out: int, channels: int) -> tuple[Tile, int, int, int]:
    """The tile of a weight's gradient, the programs of a part, the tiles that one adds up, and the parts."""
    tile = setting_of(kind, channels_out, channels).weight
    programs = triton.cdiv(channels, tile.BK) * triton.cdiv(channels_out, tile.BO)
    steps = rows.images * rows.tiles(tile.BP)
    run = run_length(programs, steps)
    return tile, programs, run, triton.cdiv(steps, run)


def _bwd_weight(
    grad: Tensor,
    image: Tensor,
    rows: Rows,
    total: Tensor | None = None,
    affine: Tensor | None = None,
    centre: str = "none",
    mean: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Into ``total``, ``[O, C]``, sum_p g a; without it its parts, ``[parts, O, C]``, and those of sum_p g."""
    channels, channels_out = image.shape[1], grad.shape[1]
    (grad, s_g), (image, s_x) = _as_rows(rows, grad), _as_rows(rows, image)
    tile, programs, run, parts = _weight_setting(rows, kind_of(rows, grad, image), channels_out, channels)
    tiles = rows.tiles(tile.BP)
    if total is not None and parts == 1:
        partial = total[None]
    else:
        partial = torch.empty((parts, channels_out, channels), dtype=torch.float32, device=grad.device)
    apart = partial.new_empty(parts, channels_out) if sums else None
    inverted_bottleneck_bwd_weight_kernel[(programs * parts,)](
        *(grad, image, _given(mean, grad), _given(affine, grad), partial, _given(apart, grad)),
        *(rows.size, tiles, rows.images * tiles, run, *s_g, *s_x),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        CENTRE=centre,
        ACTIVATE=affine is not None,
        SUMS=sums,
        PRECISION=_precision(image),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    if total is not None and parts > 1:
        _sum(partial, total)
    return partial, apart


def _bwd_image(
    grad: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor,
    gram: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """``gram``: the image, its mean, the matrix and the vectors that the kernel has for it."""
    rows = _rows(grad, out)
    channels, channels_out = weight.shape
    grad, s_g = _as_rows(rows, grad)
    residual, s_r = (out, (0, 0, 0)) if residual is None else _as_rows(rows, residual)
    image, mean, matrix, vectors = gram or (out, out, out, out)
    image, s_x = _as_rows(rows, image)
    _, s_o = _as_rows(rows, out)
    tile = setting_of(kind_of(rows, grad, out, image, residual), rows.images * rows.size, channels_out).image
    tiles = rows.tiles(tile.BP)
    inverted_bottleneck_bwd_image_kernel[(rows.images * tiles * triton.cdiv(channels_out, tile.BO),)](
        *(grad, weight, image, mean, matrix, vectors, residual, out),
        *(rows.size, tiles, *s_g, *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        GRAM=gram is not None,
        CENTRE=grad.dtype == torch.float32,
        RESIDUAL=residual is not out,
        PRECISION=_precision(grad),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )


# ---- stages: each fills its outputs, which come last -------------------------------------------------------------


def inverted_bottleneck_expand_fwd(
    x: Tensor,
    w1: Tensor,
    y1: Tensor,
    stats1: Tensor | None,
    vectors1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps1: float = 0.0,
) -> None:
    """``y1`` ``[B, E, H, W]`` = W1 x with W1 ``[E, C]``; its mean and sum of squared distances, ``[2, E]``, or BN1's
    vectors, ``[5, E]``."""
    with _device_of(x):
        _fwd(x, None, w1, y1, _seen(stats1, vectors1, weight1, bias1, eps1))


def inverted_bottleneck_depthwise_fwd(
    y1: Tensor,
    affine1: Tensor,
    wd: Tensor,
    stride: int,
    y2: Tensor,
    stats2: Tensor | None,
    vectors2: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    eps2: float = 0.0,
) -> None:
    """``y2`` ``[B, E, h, w]`` = Wd * relu6(v1) with Wd ``[E, k, k]``, and its moments or BN2's vectors."""
    torch.ops.fusekern_cuda.bn_relu6_dw_fwd(y1, affine1, wd, stride, y2, stats2, vectors2, weight2, bias2, eps2)


def inverted_bottleneck_project_fwd(
    y2: Tensor,
    affine2: Tensor,
    w3: Tensor,
    y3: Tensor,
    stats3: Tensor | None,
    vectors3: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    eps3: float = 0.0,
) -> None:
    """``y3`` ``[B, O, h, w]`` = W3 relu6(v2) with W3 ``[O, E]``, and its moments or BN3's vectors."""
    with _device_of(y2):
        _fwd(y2, affine2, w3, y3, _seen(stats3, vectors3, weight3, bias3, eps3))


def inverted_bottleneck_residual_fwd(y3: Tensor, affine3: Tensor, x: Tensor | None, out: Tensor) -> None:
    """``out`` = v3, plus ``x`` if there is one."""
    with _device_of(y3):
        _apply("affine" if x is None else "residual", y3, x, affine3, out)


def inverted_bottleneck_infer(
    x: Tensor,
    w1: Tensor,
    affine1: Tensor,
    wd: Tensor,
    affine2: Tensor,
    w3: Tensor,
    affine3: Tensor,
    stride: int,
    residual: bool,
    out: Tensor,
) -> None:
    """All of it, no gradients wanted."""
    layout = torch.channels_last if out.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    wide = {"dtype": x.dtype, "device": x.device, "memory_format": layout}
    with _device_of(x):
        a1 = torch.empty((x.shape[0], w1.shape[0], *x.shape[2:]), **wide)
        y2 = torch.empty((x.shape[0], w1.shape[0], *out.shape[2:]), **wide)
        _fwd(x, None, w1, a1, None, "relu6", affine1)
        torch.ops.fusekern_cuda.bn_relu6_dw_fwd(a1, None, wd, stride, y2, None)
        _fwd(y2, affine2, w3, out, None, "residual" if residual else "affine", affine3, x if residual else None)


def inverted_bottleneck_output_bwd(
    g: Tensor,
    y3: Tensor,
    mean3: Tensor,
    sums3: Tensor,
    coef3: Tensor | None = None,
    dweight3: Tensor | None = None,
    vectors3: Tensor | None = None,
    weight3: Tensor | None = None,
    eps3: float = 0.0,
    batch3: bool = True,
) -> None:
    """``sums3`` ``[2, O]``: sum g and sum g (y3 - mean3); of them BN3's ``coef3`` and ``dweight3``."""
    rows = _rows(y3)
    pixels, channels = FLAT[:2]
    tiles = rows.tiles(pixels)
    with _device_of(y3):
        (g, s_g), (y3, s_y) = _as_rows(rows, g), _as_rows(rows, y3)
        steps, programs = rows.images * tiles, triton.cdiv(y3.shape[1], channels)
        run = run_length(programs, steps)
        parts = triton.cdiv(steps, run)
        partial = torch.empty((parts, 2, y3.shape[1]), dtype=torch.float32, device=y3.device)
        inverted_bottleneck_reduce_kernel[(programs * parts,)](
            *(g, y3, mean3, partial, rows.size, tiles, steps, run, *s_g, *s_y),
            C=y3.shape[1],
            BP=pixels,
            BC=channels,
            LAST=rows.last,
            num_warps=FLAT.warps,
            num_stages=FLAT.stages,
            maxnreg=FLAT.registers,
        )
        count = rows.images * rows.size
        batch_norm.add(partial, count, sums3, coef3, dweight3, vectors3, weight3, eps3, batch3)


def inverted_bottleneck_project_bwd(
    g: Tensor,
    y3: Tensor,
    coef3: Tensor,
    y2: Tensor,
    affine2: Tensor,
    mean2: Tensor,
    w3: Tensor,
    dz: Tensor,
    dw3: Tensor,
    sums2: Tensor,
    coef2: Tensor | None = None,
    dweight2: Tensor | None = None,
    vectors2: Tensor | None = None,
    weight2: Tensor | None = None,
    eps2: float = 0.0,
    batch2: bool = True,
) -> None:
    """``dz`` = mask(v2) W3^T dy3, ``dw3`` = dy3 relu6(v2)^T, and ``sums2`` of dz with BN2's coef; dy3 is that of BN3's
    backward."""
    rows = _rows(y2, y3, dz)
    with _device_of(y2):
        # Written once: as the operand of two products each of its tiles is read some dozens of times.
        dy3 = torch.empty_like(y3)
        _apply("gradient", g, y3, coef3, dy3)
        (_, s_g), (_, s_y), (_, s_z) = (_as_rows(rows, image) for image in (dy3, y2, dz))
        channels, channels_out = w3.shape
        tile = setting_of(kind_of(rows, dy3, y2, dz), rows.images * rows.size, channels_out).hidden
        tiles = rows.tiles(tile.BP)
        parts = rows.images * tiles
        partial = torch.empty((parts, 2, channels_out), dtype=torch.float32, device=y2.device)
        inverted_bottleneck_bwd_hidden_kernel[(parts * triton.cdiv(channels_out, tile.BO),)](
            *(dy3, w3, y2, affine2, mean2, dz, partial, rows.size, tiles, *s_g, *s_y, *s_z),
            C=channels,
            O=channels_out,
            BP=tile.BP,
            BO=tile.BO,
            BK=tile.BK,
            LAST=rows.last,
            PRECISION=_precision(y2),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
        count = rows.images * rows.size
        batch_norm.add(partial, count, sums2, coef2, dweight2, vectors2, weight2, eps2, batch2)
        _bwd_weight(dy3, y2, rows, dw3, affine=affine2)


def inverted_bottleneck_depthwise_bwd(
    dz: Tensor,
    y2: Tensor,
    coef2: Tensor,
    y1: Tensor,
    affine1: Tensor,
    mean1: Tensor,
    wd: Tensor,
    stride: int,
    d: Tensor,
    dwd: Tensor,
    sums1: Tensor,
    coef1: Tensor | None = None,
    dweight1: Tensor | None = None,
    vectors1: Tensor | None = None,
    weight1: Tensor | None = None,
    eps1: float = 0.0,
    batch1: bool = True,
) -> None:
    """``d`` = mask(v1) (Wd^T * dy2), the gradient ``dwd`` of Wd, and ``sums1`` of d with BN1's coef; dy2 is that of
    BN2's backward."""
    maps = dz, y2, coef2, y1, affine1, mean1, wd, stride, d, dwd, sums1
    torch.ops.fusekern_cuda.bn_relu6_dw_bwd(*maps, coef1, dweight1, vectors1, weight1, eps1, batch1)


def inverted_bottleneck_expand_bwd(
    d: Tensor,
    y1: Tensor,
    coef1: Tensor,
    x: Tensor,
    w1: Tensor,
    g: Tensor | None,
    dx: Tensor,
    dw1: Tensor,
) -> None:
    """``dx`` = W1^T dy1 (+ ``g``) and ``dw1`` = dy1 x^T for dy1 = p d + q (y1 - mean) + r, BN1's backward.

    With many pixels neither reads y1. It is W1 x, so that with m the mean of x, G the sum of (x - m) (x - m)^T over N
    pixels and u = q (W1 m - mean) + r:

        dx  = (diag(p) W1)^T d + (W1^T diag(q) W1) (x - m) + W1^T u
        dw1 = diag(p) sum_p d x^T + diag(q) W1 G + N u m^T
    """
    pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]
    rows = _rows(d, dx)
    with _device_of(d):
        if not _gram(x, w1.shape[0]):
            dy1 = torch.empty_like(d)
            _apply("gradient", d, y1, coef1, dy1)
            _bwd_image(dy1, w1, g, dx)
            _bwd_weight(dy1, x, rows, dw1)
            return
        x = _as_rows(rows, x)[0]
        p, q, r, mean = coef1
        # The two means may cancel, and what is left is multiplied by the number of pixels.
        middle = x.mean((0, 2, 3), dtype=torch.float64)
        wide = w1.float()
        u = q * (w1.double() @ middle - mean).float() + r
        middle = middle.float()
        # Of 16 bits the products are exact, and the mean is taken away from their sums; of 32 from the operands.
        centred = x.dtype == torch.float32
        matrix = middle.new_empty(channels, channels)
        _bwd_weight(x, x, rows, matrix, centre="both" if centred else "none", mean=middle)
        if not centred:
            matrix.addr_(middle, middle, alpha=-pixels)
        partial, sums = _bwd_weight(d, x, rows, centre="image" if centred else "none", mean=middle, sums=centred)
        outer = pixels * u
        if centred:
            outer += p * sums.sum(0)
        # cuBLAS for what has no pixels in it.
        _sum(partial, dw1, (wide @ matrix, torch.stack((p, q, outer)), middle))
        # q is small where pixels are many: apart, it would be lost in 16 bits.
        scale = torch.linalg.vector_norm(q, torch.inf).clamp_min(torch.finfo(q.dtype).tiny)
        matrix = ((q / scale)[:, None] * wide).to(w1.dtype).t() @ w1
        vector = u @ wide
        if not centred:
            vector -= scale * (middle @ matrix.float())
        vectors = torch.stack((vector, scale.expand_as(vector)))
        _bwd_image(d, (p[:, None] * wide).to(w1.dtype), g, dx, (x, middle, matrix, vectors))


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, load), setting in SETTINGS.items():
        dtypes = {"half": ("bf16", "fp16") if load == "medium" else ("bf16",), "odd half": ("bf16",)}
        for dtype in ("ieee", "tf32") if kind == "odd fp32" else dtypes.get(kind, (kind,)):
            shapes = ((200, "channels_last"), (512, "nchw")) if kind.startswith("odd") else ((512, "channels_last"),)
            for C, layout in shapes:
                yield from _cases(kind if kind.startswith("odd") else load, dtype, setting, C, layout)
    for dtype, C, layout in (("bf16", 512, "channels_last"), ("ieee", 512, "channels_last"), ("bf16", 200, "nchw")):
        for mode in ("affine", "residual", "gradient"):
            yield _case(f"apply {mode}", inverted_bottleneck_apply_kernel, dtype, FLAT, C, layout, MODE=mode)
        yield _case("reduce", inverted_bottleneck_reduce_kernel, dtype, FLAT, C, layout)
    for C in (512, 200):
        few, many = Tile(0, 0, 0, 4, 3), Tile(128, 0, 0, 8, 3)
        widths = {"BT": MANY[0], "BS": MANY[1]}
        for finish in (False, True):
            name = "sum finish" if finish else "sum"
            yield _case(f"{name} few", inverted_bottleneck_sum_kernel, "bf16", few, C, FINISH=finish)
            yield _case(f"{name} many", inverted_bottleneck_sum_kernel, "bf16", many, C, FINISH=finish, **widths)


def _cases(name: str, dtype: str, setting: Setting, C: int, layout: str) -> Iterator[Case]:
    def case(what: str, kernel: JITFunction, tile: Tile, **more: object) -> Case:
        return _case(f"{what} {name}", kernel, dtype, tile, C, layout, **more)

    yield case("fwd expand", inverted_bottleneck_fwd_kernel, setting.fwd, STATS=True)
    yield case("fwd project", inverted_bottleneck_fwd_kernel, setting.fwd, STATS=True, ACTIVATE=True)
    yield case("infer expand", inverted_bottleneck_fwd_kernel, setting.fwd, NORM="relu6")
    yield case("infer project", inverted_bottleneck_fwd_kernel, setting.fwd, NORM="residual", ACTIVATE=True)
    yield case("bwd hidden", inverted_bottleneck_bwd_hidden_kernel, setting.hidden)
    yield case("bwd image", inverted_bottleneck_bwd_image_kernel, setting.image)
    yield case("bwd image gram", inverted_bottleneck_bwd_image_kernel, setting.image, GRAM=True)
    yield case("bwd weight project", inverted_bottleneck_bwd_weight_kernel, setting.weight, ACTIVATE=True)
    # Of few pixels: in one part, which has the weight's dtype.
    kernel = inverted_bottleneck_bwd_weight_kernel
    yield _case(f"bwd weight direct {name}", kernel, dtype, setting.weight, C, layout, out=dtype)
    centred = dtype in ("ieee", "tf32")
    if not centred:
        yield _case(f"bwd weight whole {name}", kernel, dtype, setting.weight, C, layout, out=dtype, ACTIVATE=True)
    centre = {"CENTRE": "image" if centred else "none", "SUMS": centred}
    yield case("bwd weight expand", inverted_bottleneck_bwd_weight_kernel, setting.weight, **centre)
    if centred:
        yield case("bwd weight gram", inverted_bottleneck_bwd_weight_kernel, setting.weight, CENTRE="both")


def _case(
    name: str,
    kernel: JITFunction,
    dtype: str,
    tile: Tile,
    C: int = 512,
    layout: str = "channels_last",
    out: str = "",
    **more: object,
) -> Case:
    """``out`` and ``more``: a dtype and constexprs that are not the usual ones."""
    last = layout == "channels_last"
    fp32 = dtype in ("ieee", "tf32")
    unit = ("s_xc", "s_gc", "s_rc", "s_oc") if last else ("s_xp", "s_gp", "s_rp", "s_op")
    constexprs = {
        **dict(zip(("BP", "BO", "BK"), tile[:3], strict=True)),
        **dict.fromkeys(("ACTIVATE", "STATS", "GRAM", "SUMS", "FINISH"), False),
        "BC": tile.BK,
        "BT": FEW[0],
        "BS": FEW[1],
        "C": C,
        "O": C,
        "LAST": last,
        "NORM": "none",
        "MODE": "affine",
        "CENTRE": fp32 if kernel is inverted_bottleneck_bwd_image_kernel else "none",
        "RESIDUAL": True,
        "PRECISION": dtype if fp32 else "ieee",
        **dict.fromkeys(unit, 1),
        **more,
    }
    types = dict.fromkeys(("image", "weight", "residual", "out", "grad", "other", "matrix", "total"), "bf16")
    if kernel is inverted_bottleneck_bwd_weight_kernel and not out:
        types["out"] = "fp32"
    types = {key: "*fp32" if fp32 or value == "fp32" else f"*{dtype}" for key, value in types.items()}
    numbers = ("affine", "affine_out", "partial", "mean", "vectors", "sums", "product")
    types |= dict.fromkeys(numbers, "*fp32")
    params = [param for param in kernel.params if param.name not in constexprs]
    odd = "s_" if not last or C % 16 else "none"
    divisible = [param.name for param in params if not (param.do_not_specialize or param.name.startswith(odd))]
    return Case(
        kernel,
        f"{name} {dtype} {C} {layout}",
        {param.name: types.get(param.name, "i32") for param in params},
        {key: value for key, value in constexprs.items() if key in kernel.arg_names},
        tuple(divisible),
        tile.warps,
        tile.stages,
        tile.registers,
    )
