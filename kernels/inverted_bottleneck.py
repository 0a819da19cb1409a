"""The inverted bottleneck in stages: its 1x1 convolutions as products of matrices, with the batch norms around them.

A norm enters where the tensor behind it is read anyway: as a scale, a shift and ReLU6 of an operand, and what it needs
of the tensor before it is added up where that is written. No tensor of E channels is written but y1, y2 and their
gradients. The depthwise stages between are CUDA, ``torch.ops.fusekern_cuda``: a tile is activated once there, not once
for each tap.

A sum over all pixels has parts, a program each, which are added in a fixed order. Of statistics and of the sums of a
norm's backward ``batch_norm`` makes what the norm applies. Where parts are few it does so within the kernel that leaves
them: the last program to arrive, by a counter that an earlier kernel of the pass has set to zero, goes on; or, where
there is no earlier kernel, one program has all pixels, or the next kernel joins what it needs. Else it is a launch.

The gradients of a product's two operands have nothing to do with each other: they are one launch, whose first programs
have the weight's.
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
from fusekern.kernels.batch_norm import (
    Summed,
    add_parts,
    affine_of,
    finish_sums,
    join_parts,
    last_to_arrive,
    store_sums,
)
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
def scale_and_shift(affine, mean, var, weight, bias, eps, i_c, C: tl.constexpr, BC: tl.constexpr):
    """Of ``BC`` channels of a norm: rows of [2, C] or, where that is none, from running statistics."""
    if affine is not None:
        b_scale = load_vector(affine, 0, i_c, C, BC)
        b_shift = load_vector(affine, 1, i_c, C, BC)
    else:
        o_c = i_c + tl.arange(0, BC)
        b_mean = tl.load(mean + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_var = tl.load(var + o_c, mask=o_c < C, other=1.0).to(tl.float32)
        b_scale, b_shift = affine_of(b_mean, b_var, weight, bias, eps, o_c, o_c < C)
    return b_scale, b_shift


@triton.jit
def set_to_zero(counters, i, COUNTERS: tl.constexpr):
    """Program 0 does so, for the kernels that follow."""
    if i == 0:
        tl.store(counters + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))


@triton.jit(do_not_specialize=["eps", "eps_out", "size", "tiles"])
def inverted_bottleneck_fwd_kernel(
    image,
    affine,
    mean,
    var,
    gamma,
    beta,
    weight,
    mean_out,
    var_out,
    gamma_out,
    beta_out,
    residual,
    out,
    partial,
    stats,
    vectors,
    fresh,
    arrived,
    eps,
    eps_out,
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
    BT: tl.constexpr,
    COUNTERS: tl.constexpr,
    LAST: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[p, o] = sum_c weight[o, c] a[p, c]  with a = x, or relu6(scale x + shift) where there is a norm before.

    Scale and shift are affine, [2, C], or those of running statistics. NORM "relu6" writes relu6(scale' y + shift') of
    the norm behind, "affine" scale' y + shift', "residual" that and the residual, these two of running statistics.

    With partial, [parts, 2, O], the mean of the tile's y and the sum of their squared distances from it go there; and
    with arrived these become stats or the vectors of the norm behind. fresh are counters for the kernels that follow.
    """
    i = tl.program_id(0)
    if fresh is not None:
        set_to_zero(fresh, i, COUNTERS)
    i_o = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    image += i_b * s_xb
    out += i_b * s_ob

    b_y = tl.zeros([BP, BO], tl.float32)
    for i_c in range(0, C, BK):
        b_x = load_pixels(image, i_p, size, i_c, s_xp, s_xc, C, BP, BK, LAST)  # [BP, BK]
        if affine is not None or mean is not None:
            b_scale, b_shift = scale_and_shift(affine, mean, var, gamma, beta, eps, i_c, C, BK)
            b_x = relu6(b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]).to(b_x.dtype)
        b_w = load_matrix(weight, i_o, i_c, O, C, BO, BK)  # [BO, BK]
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)

    if partial is not None:
        m_p = (i_p + tl.arange(0, BP) < size)[:, None]
        b_mean = tl.sum(tl.where(m_p, b_y, 0.0), 0) / tl.minimum(size - i_p, BP).to(tl.float32)
        b_d = tl.where(m_p, b_y - b_mean[None, :], 0.0)
        store_sums(partial, i_part, b_mean, tl.sum(b_d * b_d, 0), i_o, O, BO)
    if NORM != "none":
        b_scale, b_shift = scale_and_shift(None, mean_out, var_out, gamma_out, beta_out, eps_out, i_o, O, BO)
        b_y = b_y * b_scale[None, :] + b_shift[None, :]
    if NORM == "relu6":
        b_y = relu6(b_y)
    if NORM == "residual":
        b_y += load_pixels(residual + i_b * s_rb, i_p, size, i_o, s_rp, s_rc, O, BP, BO, LAST).to(tl.float32)
    store_pixels(out, b_y, i_p, size, i_o, s_op, s_oc, O, BP, BO, LAST)
    if arrived is not None:
        parts = tl.num_programs(0) // tl.cdiv(O, BO)
        if last_to_arrive(arrived + i_o // BO, parts):
            join_parts(partial, stats, vectors, gamma_out, beta_out, parts, size, tiles, eps_out, i_o, O, BP, BO, BT)


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


@triton.jit(do_not_specialize=["size", "tiles", "steps", "run", "count", "eps"])
def inverted_bottleneck_reduce_kernel(
    grad,
    image,
    mean,
    partial,
    vectors,
    gamma,
    sums,
    coef,
    dweight,
    dbias,
    fresh,
    out,
    size,
    tiles,
    steps,
    run,
    count,
    eps,
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
    BP: tl.constexpr,
    BC: tl.constexpr,
    COUNTERS: tl.constexpr,
    LAST: tl.constexpr,
    BATCH: tl.constexpr,
):
    """sum g and sum g (y - mean) over ``run`` of the tiles of pixels, into partial, [parts, 2, C].

    Where that is none a program has all pixels of its channels: it stores the sums and what the norm makes of them and,
    with out, the gradient of y, p g + q (y - mean) + r.
    """
    i = tl.program_id(0)
    if fresh is not None:
        set_to_zero(fresh, i, COUNTERS)
    i_c = i % tl.cdiv(C, BC) * BC
    i_part = i // tl.cdiv(C, BC)
    b_mean = load_vector(mean, 0, i_c, C, BC)[None, :]
    b_first = tl.zeros([BP, BC], tl.float32)
    b_second = tl.zeros([BP, BC], tl.float32)
    for i_t in range(i_part * run, tl.minimum((i_part + 1) * run, steps)):
        i_b = (i_t // tiles).to(tl.int64)
        i_p = i_t % tiles * BP
        b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_c, s_gp, s_gc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
        b_y = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
        # Outside g is zero: so is what it adds.
        b_first += b_g
        b_second += b_g * (b_y - b_mean)
    b_sum = tl.sum(b_first, 0)
    b_product = tl.sum(b_second, 0)
    if partial is not None:
        store_sums(partial, i_part.to(tl.int64), b_sum, b_product, i_c, C, BC)
    else:
        o_c = i_c + tl.arange(0, BC)
        b_p, b_q, b_r = finish_sums(
            b_sum, b_product, None, vectors, gamma, sums, coef, dweight, dbias, count, eps, o_c, C, BATCH
        )
        if out is not None:
            for i_t in range(0, steps):
                i_b = (i_t // tiles).to(tl.int64)
                i_p = i_t % tiles * BP
                b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_c, s_gp, s_gc, C, BP, BC, LAST).to(tl.float32)
                b_y = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BC, LAST).to(tl.float32)
                b_dy = b_p[None, :] * b_g + (b_q[None, :] * (b_y - b_mean) + b_r[None, :])
                store_pixels(out + i_b * s_ob, b_dy, i_p, size, i_c, s_op, s_oc, C, BP, BC, LAST)


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


@triton.jit
def weight_tile(
    i,
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
    PRECISION: tl.constexpr,
):
    """dw[o, c] = sum_p g[p, o] a[p, c] over ``run`` of the tiles of pixels, [parts, O, C]; BK of the C channels.

    a is x, or x - mean with CENTRE "image" or "both", or relu6(scale x + shift) with affine; with "both" g is g - mean
    too. With sums  sum_p g  goes there, [parts, O].
    """
    i_c = i % tl.cdiv(C, BK) * BK
    i_o = i // tl.cdiv(C, BK) % tl.cdiv(O, BO) * BO
    i_part = i // tl.cdiv(C, BK) // tl.cdiv(O, BO)
    if affine is not None:
        b_scale = load_vector(affine, 0, i_c, C, BK)[None, :]
        b_shift = load_vector(affine, 1, i_c, C, BK)[None, :]
    if CENTRE != "none":
        b_mean = load_vector(mean, 0, i_c, C, BK)[None, :]
    if CENTRE == "both":
        b_mean_g = load_vector(mean, 0, i_o, O, BO)[None, :]

    b_dw = tl.zeros([BO, BK], tl.float32)
    b_sum = tl.zeros([BO], tl.float32)
    for i_t in range(i_part * run, tl.minimum((i_part + 1) * run, steps)):
        i_b = (i_t // tiles).to(tl.int64)
        i_p = i_t % tiles * BP
        m_p = (i_p + tl.arange(0, BP) < size)[:, None]
        b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_o, s_gp, s_gc, O, BP, BO, LAST)  # [BP, BO]
        b_x = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BK, LAST)  # [BP, BK]
        if sums is not None:
            b_sum += tl.sum(b_g.to(tl.float32), 0)
        if CENTRE == "both":
            b_g = tl.where(m_p, b_g.to(tl.float32) - b_mean_g, 0.0).to(b_g.dtype)
        if CENTRE != "none":
            b_x = (b_x.to(tl.float32) - b_mean).to(b_x.dtype)
        if affine is not None:
            b_x = relu6(b_x.to(tl.float32) * b_scale + b_shift).to(b_x.dtype)
        b_dw = tl.dot(tl.trans(b_g), b_x, b_dw, input_precision=PRECISION)

    o_o = i_o + tl.arange(0, BO)
    o_c = i_c + tl.arange(0, BK)
    i_part = i_part.to(tl.int64)
    o_w = (i_part * O + o_o)[:, None] * C + o_c[None, :]
    tl.store(out + o_w, b_dw.to(out.dtype.element_ty), mask=(o_o < O)[:, None] & (o_c < C)[None, :])
    if sums is not None:
        tl.store(sums + i_part * O + o_o, b_sum, mask=o_o < tl.where(i_c == 0, O, 0))


@triton.jit(do_not_specialize=["size", "tiles", "steps", "run"])
def inverted_bottleneck_bwd_weight_kernel(
    grad,
    image,
    mean,
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
    PRECISION: tl.constexpr,
):
    """The gradient of a weight, ``weight_tile``, of which this is a launch of its own."""
    weight_tile(
        *(tl.program_id(0), grad, image, mean, None, out, sums, size, tiles, steps, run),
        *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, C, O, BP, BO, BK, LAST, CENTRE, PRECISION),
    )


@triton.jit
def hidden_tile(
    i,
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


@triton.jit(do_not_specialize=["first", "size", "tiles", "tiles_w", "steps", "run", "count", "eps"])
def inverted_bottleneck_bwd_project_kernel(
    grad,
    weight,
    image,
    affine,
    mean,
    out,
    partial,
    out_w,
    vectors,
    gamma,
    sums,
    coef,
    dweight,
    dbias,
    arrived,
    first,
    size,
    tiles,
    tiles_w,
    steps,
    run,
    count,
    eps,
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
    WP: tl.constexpr,
    WO: tl.constexpr,
    WK: tl.constexpr,
    BT: tl.constexpr,
    LAST: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw3 = dy3^T relu6(v2), the ``first`` programs, and dz of the hidden map, the others: see what they call.

    With arrived the sums of dz become what the norm before makes of them.
    """
    i = tl.program_id(0)
    if i < first:
        weight_tile(
            *(i, grad, image, None, affine, out_w, None, size, tiles_w, steps, run),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, O, C, WP, WO, WK, LAST, "none", PRECISION),
        )
    else:
        i_h = i - first
        hidden_tile(
            *(i_h, grad, weight, image, affine, mean, out, partial, size, tiles),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, s_ob, s_op, s_oc, C, O, BP, BO, BK, LAST, PRECISION),
        )
        if arrived is not None:
            i_e = i_h % tl.cdiv(O, BO)
            parts = (tl.num_programs(0) - first) // tl.cdiv(O, BO)
            if last_to_arrive(arrived + i_e, parts):
                add_parts(
                    *(partial, None, vectors, gamma, sums, coef, dweight, dbias, parts, count, eps),
                    *(i_e * BO, O, BATCH, BO, BT),
                )


@triton.jit
def image_tile(
    i,
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
    CENTRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx[p, c] = sum_e d[p, e] weight[e, c] and the residual, if any; C are the channels e, O the channels c.

    With a matrix also  k sum_c' x[p, c'] matrix[c', c] + u[c],  u and k being the rows of vectors, [2, O]; with CENTRE
    x - mean stands in the place of x.
    """
    i_o = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    grad += i_b * s_gb

    b_dx = tl.zeros([BP, BO], tl.float32)
    if matrix is not None:
        # The smaller part first, since it is scaled.
        for i_c in range(0, O, BK):
            b_x = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, O, BP, BK, LAST)  # [BP, BK]
            if CENTRE:
                b_x = b_x - load_vector(mean, 0, i_c, O, BK)[None, :]
            b_k = load_matrix(matrix, i_c, i_o, O, O, BK, BO)  # [BK, BO]
            b_dx = tl.dot(b_x, b_k, b_dx, input_precision=PRECISION)
        b_dx = b_dx * load_vector(vectors, 1, i_o, O, BO)[None, :] + load_vector(vectors, 0, i_o, O, BO)[None, :]
    for i_c in range(0, C, BK):
        b_g = load_pixels(grad, i_p, size, i_c, s_gp, s_gc, C, BP, BK, LAST)  # [BP, BK]
        b_w = load_matrix(weight, i_c, i_o, C, O, BK, BO)  # [BK, BO]
        b_dx = tl.dot(b_g, b_w, b_dx, input_precision=PRECISION)
    if residual is not None:
        b_dx += load_pixels(residual + i_b * s_rb, i_p, size, i_o, s_rp, s_rc, O, BP, BO, LAST).to(tl.float32)
    store_pixels(out + i_b * s_ob, b_dx, i_p, size, i_o, s_op, s_oc, O, BP, BO, LAST)


@triton.jit(do_not_specialize=["first", "size", "tiles", "tiles_w", "steps", "run"])
def inverted_bottleneck_bwd_expand_kernel(
    grad,
    weight,
    image,
    residual,
    out,
    out_w,
    first,
    size,
    tiles,
    tiles_w,
    steps,
    run,
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
    WP: tl.constexpr,
    WO: tl.constexpr,
    WK: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw1 = dy1^T x, the ``first`` programs, and dx, the others: see what they call."""
    i = tl.program_id(0)
    if i < first:
        weight_tile(
            *(i, grad, image, None, None, out_w, None, size, tiles_w, steps, run),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, O, C, WP, WO, WK, LAST, "none", PRECISION),
        )
    else:
        image_tile(
            *(i - first, grad, weight, None, None, None, None, residual, out, size, tiles),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, s_rb, s_rp, s_rc, s_ob, s_op, s_oc),
            *(C, O, BP, BO, BK, LAST, False, PRECISION),
        )


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
    CENTRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the image with a matrix, ``image_tile``, of which this is a launch of its own."""
    image_tile(
        *(tl.program_id(0), grad, weight, image, mean, matrix, vectors, residual, out, size, tiles),
        *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, s_rb, s_rp, s_rc, s_ob, s_op, s_oc),
        *(C, O, BP, BO, BK, LAST, CENTRE, PRECISION),
    )


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
    """Of the forward products and of the gradients of the hidden map, the image and the weights. A weight's gradient
    shares its launch with that of a map, and so its warps and stages; the registers are stated with the map."""

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
    ("odd half", "any"): Setting(
        Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2, 255), Tile(64, 64, 32, 8, 2), Tile(16, 64, 64, 8, 2)
    ),
    ("odd fp32", "any"): Setting(*[Tile(64, 64, 16, 8, 2, 255)] * 3, Tile(16, 64, 64, 8, 2, 255)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# What it takes to start a program and to write and read its part, in tiles of it.
START = 4
# What has no product: as the tiles above.
FLAT = Tile(32, 64, 64, 4, 2, 255)
# Of a program that has all pixels of its channels, and pixels up to which that is shorter than parts and a launch.
WHOLE, WHOLE_PIXELS = Tile(512, 16, 16, 8, 2, 255), 4096
# Parts up to which the last program to arrive adds them, so many at a time; and up to which depthwise blocks do so,
# the last with their own and each of them with those of the statistics before.
FINISHED, AT_ONCE, JOINED = 64, 32, 32
# Of each of two kernels, one for the programs that share their channels.
COUNTERS = 1024
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


def run_length(programs: int, steps: int, others: int = 0) -> int:
    """How many of its tiles a program adds up, such that the slowest multiprocessor is done first.

    ``others``: what else the launch has to do, in tiles.
    """

    def cost(parts: int) -> float:
        length = START + triton.cdiv(steps, parts)
        return max(triton.cdiv(programs * parts, PROGRAMS) * length, (programs * parts * length + others) / PROGRAMS)

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

    def places(*images: Tensor) -> tuple[Rows, str]:
        rows = _rows(*images)
        return rows, kind_of(rows, *images)

    def gradients(name: str, which: str, inner: Tensor, outer: Tensor) -> list[str]:
        """Of the two operands of a product."""
        of = _group(*places(inner, outer), which, inner.shape[1], outer.shape[1])
        apart = which == "hidden" and not of.places.finish()
        return [kernel(name), *[of_sums] * apart, *[add] * (of.parts > 1)]

    kernel = "inverted_bottleneck_{}_kernel".format
    add, of_sums = kernel("sum"), "batch_norm_bwd_kernel"
    x, y1 = map_of(image.shape[1], image.shape[2:]), map_of(hidden, image.shape[2:])
    y2, y3 = map_of(hidden, size), map_of(channels_out, size)
    products = kernel("fwd"), "bn_relu6_dw_fwd_kernel", kernel("fwd")
    joined = (
        _fwd_places(*places(y1, x), hidden)[1].parts > JOINED,
        not _finishes_depthwise(y2),
        not _fwd_places(*places(y2, y3), channels_out)[1].finish(),
    )
    names = "batch_norm_join_kernel", "bn_relu6_dw_moments_kernel", "batch_norm_join_kernel"
    forward = [] if all(batch) else ["batch_norm_fwd_kernel"]
    for product, on, apart, name in zip(products, batch, joined, names, strict=True):
        forward += [product, name] if on and apart else [product]
    rows, kind = places(x)
    parts = _weight_places(rows, setting_of(kind, *[x.shape[1]] * 2).weight, *[x.shape[1]] * 2)[2]
    of_matrix = kernel("bwd_weight"), *[add] * (parts > 1)
    return {
        "fwd": (*forward, kernel("apply")),
        "bwd": (
            *([kernel("fwd")] if low else []),
            *([kernel("reduce")] if _is_whole(_rows(y3)) else [kernel("reduce"), of_sums, kernel("apply")]),
            *gradients("bwd_project", "hidden", y3, y2),
            *("bn_relu6_dw_bwd_kernel", *["bn_relu6_dw_sums_kernel"] * (not _finishes_depthwise(y1))),
            *(
                _gram_launches(x, of_matrix)
                if _gram(x, hidden)
                else (kernel("apply"), *gradients("bwd_expand", "image", y1, x))
            ),
        ),
        "infer": products,
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


class Parts(NamedTuple):
    """Moments of tiles of ``pixels``, so many of them for each ``size``, ``[parts, 2, c]``, and what is to be made of
    them."""

    partial: Tensor
    size: int
    pixels: int
    seen: Seen

    def join(self) -> None:
        batch_norm.join(self.partial, self.size, triton.cdiv(self.size, self.pixels), self.pixels, *self.seen)


class Left(NamedTuple):
    """What a stage leaves to those that follow in its pass.

    ``counters``, ``[2, COUNTERS]``, are zero: two of the stages that follow have one for the programs of each of their
    blocks of channels. ``parts`` the depthwise forward joins; ``grad`` is the gradient of what a norm was applied to.
    """

    counters: Tensor
    parts: Parts | None = None
    grad: Tensor | None = None


def _new_counters(like: Tensor) -> Tensor:
    return torch.empty(2, COUNTERS, dtype=torch.int32, device=like.device)


class Places(NamedTuple):
    """Programs of a launch: so many parts of the pixels by so many blocks of channels."""

    parts: int
    blocks: int

    def finish(self) -> bool:
        """Does the last program to arrive add the parts of its block?"""
        return self.parts <= FINISHED and self.blocks <= COUNTERS

    def counters(self, left: Left | None, row: int) -> Tensor | None:
        """By which that program is known, if it does."""
        return left.counters[row] if left is not None and self.finish() else None


def _fwd_places(rows: Rows, kind: str, channels_out: int) -> tuple[Tile, Places]:
    tile = setting_of(kind, rows.images * rows.size, channels_out).fwd
    return tile, Places(rows.images * rows.tiles(tile.BP), triton.cdiv(channels_out, tile.BO))


def _finishes_depthwise(y: Tensor) -> bool:
    """Does the last block add up the parts of a depthwise stage that writes ``y``? They are about its tiles."""
    batch, channels, height, width = y.shape
    tiles = batch * triton.cdiv(height, 8) * triton.cdiv(width, 16)
    return tiles <= JOINED and channels <= 8 * COUNTERS


def _is_whole(rows: Rows) -> bool:
    """Are pixels so few that a program has all of them?"""
    return rows.images * rows.size <= WHOLE_PIXELS


def _options(tile: Tile) -> dict[str, int | None]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}


def _fwd(
    image: Tensor,
    before: Tensor | tuple | None,
    weight: Tensor,
    out: Tensor,
    seen: Seen | None,
    norm: str = "none",
    behind: tuple | None = None,
    residual: Tensor | None = None,
    fresh: Tensor | None = None,
    left: Left | None = None,
) -> Parts | None:
    """``before`` and ``behind``: a norm as its affine ``[2, c]`` or, by running statistics, as weight, bias, mean, var
    and eps. What is to be made of the result's moments but has not been is returned."""
    rows = _rows(out) if before is None else _rows(image, out)
    channels, channels_out = weight.shape[1], weight.shape[0]
    image, s_x = _as_rows(rows, image)
    other, s_r = (out, (0, 0, 0)) if residual is None else _as_rows(rows, residual)
    _, s_o = _as_rows(rows, out)
    tile, places = _fwd_places(rows, kind_of(rows, image, out, other), channels_out)
    nothing = (None,) * 4 + (0.0,)
    affine, running = (None, before[:5]) if isinstance(before, tuple) else (before, nothing)
    gamma, beta, mean, var, eps = running
    gamma_out, beta_out, mean_out, var_out, eps_out = nothing if behind is None else behind[:5]
    partial = stats = vectors = arrived = None
    if seen is not None:
        partial = torch.empty((places.parts, 2, channels_out), dtype=torch.float32, device=out.device)
        arrived = places.counters(left, 1)
    if arrived is not None:
        stats, vectors, gamma_out, beta_out, eps_out = seen
    inverted_bottleneck_fwd_kernel[(places.parts * places.blocks,)](
        *(image, affine, mean, var, gamma, beta, weight, mean_out, var_out, gamma_out, beta_out),
        *(residual if residual is None else other, out, partial, stats, vectors, fresh, arrived, eps, eps_out),
        *(rows.size, rows.tiles(tile.BP), *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        BT=AT_ONCE,
        COUNTERS=2 * COUNTERS,
        LAST=rows.last,
        NORM=norm,
        PRECISION=_precision(image),
        **_options(tile),
    )
    return None if partial is None or arrived is not None else Parts(partial, rows.size, tile.BP, seen)


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
        **_options(FLAT),
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


def _weight_places(rows: Rows, tile: Tile, channels_out: int, channels: int, others: int = 0) -> tuple[int, int, int]:
    """The programs of a part of a weight's gradient, the tiles that one adds up, and the parts."""
    programs = triton.cdiv(channels, tile.BK) * triton.cdiv(channels_out, tile.BO)
    steps = rows.images * rows.tiles(tile.BP)
    run = run_length(programs, steps, others)
    return programs, run, triton.cdiv(steps, run)


def _bwd_weight(
    grad: Tensor,
    image: Tensor,
    rows: Rows,
    total: Tensor | None = None,
    centre: str = "none",
    mean: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Into ``total``, ``[O, C]``, sum_p g a; without it its parts, ``[parts, O, C]``, and those of sum_p g."""
    channels, channels_out = image.shape[1], grad.shape[1]
    (grad, s_g), (image, s_x) = _as_rows(rows, grad), _as_rows(rows, image)
    tile = setting_of(kind_of(rows, grad, image), channels_out, channels).weight
    programs, run, parts = _weight_places(rows, tile, channels_out, channels)
    tiles = rows.tiles(tile.BP)
    partial = total[None] if total is not None and parts == 1 else _new_parts(parts, channels_out, channels, grad)
    apart = partial.new_empty(parts, channels_out) if sums else None
    inverted_bottleneck_bwd_weight_kernel[(programs * parts,)](
        *(grad, image, None if centre == "none" else mean, partial, apart),
        *(rows.size, tiles, rows.images * tiles, run, *s_g, *s_x),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        CENTRE=centre,
        PRECISION=_precision(image),
        **_options(tile),
    )
    if total is not None and parts > 1:
        _sum(partial, total)
    return partial, apart


def _new_parts(parts: int, channels_out: int, channels: int, like: Tensor) -> Tensor:
    return torch.empty((parts, channels_out, channels), dtype=torch.float32, device=like.device)


def _bwd_image(
    grad: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, gram: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """``gram``: the image, its mean, the matrix and the vectors that the kernel has for it."""
    rows = _rows(grad, out)
    channels, channels_out = weight.shape
    grad, s_g = _as_rows(rows, grad)
    other, s_r = (out, (0, 0, 0)) if residual is None else _as_rows(rows, residual)
    image, mean, matrix, vectors = gram
    image, s_x = _as_rows(rows, image)
    _, s_o = _as_rows(rows, out)
    tile = setting_of(kind_of(rows, grad, out, image, other), rows.images * rows.size, channels_out).image
    tiles = rows.tiles(tile.BP)
    inverted_bottleneck_bwd_image_kernel[(rows.images * tiles * triton.cdiv(channels_out, tile.BO),)](
        *(grad, weight, image, mean, matrix, vectors, residual if residual is None else other, out),
        *(rows.size, tiles, *s_g, *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        CENTRE=grad.dtype == torch.float32,
        PRECISION=_precision(grad),
        **_options(tile),
    )


class Group(NamedTuple):
    """A launch for the gradients of both operands of a product: the tile and places of the map's, and of the weight's
    the tile, the programs of a part, the tiles that one adds up, and the parts."""

    tile: Tile
    places: Places
    weight: Tile
    programs: int
    run: int
    parts: int

    def constexprs(self) -> dict[str, int]:
        tiles = zip(("BP", "BO", "BK", "WP", "WO", "WK"), (*self.tile[:3], *self.weight[:3]), strict=True)
        return {**dict(tiles), **_options(self.tile)}


def _group(rows: Rows, kind: str, which: str, inner: int, outer: int) -> Group:
    """``which``: the gradient of a map of ``outer`` channels from one of ``inner``, by a weight ``[inner, outer]``."""
    setting = setting_of(kind, rows.images * rows.size, outer)
    tile = getattr(setting, which)
    places = Places(rows.images * rows.tiles(tile.BP), triton.cdiv(outer, tile.BO))
    others = places.parts * places.blocks * (START + triton.cdiv(inner, tile.BK))
    return Group(tile, places, setting.weight, *_weight_places(rows, setting.weight, inner, outer, others))


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
) -> Left:
    """``y1`` ``[B, E, H, W]`` = W1 x with W1 ``[E, C]``; its mean and sum of squared distances, ``[2, E]``, or BN1's
    vectors, ``[5, E]``, unless their parts are left to the depthwise stage."""
    counters = _new_counters(x)
    with _device_of(x):
        parts = _fwd(x, None, w1, y1, _seen(stats1, vectors1, weight1, bias1, eps1), fresh=counters)
        if parts is not None and (stats1 is not None or len(parts.partial) > JOINED):
            parts.join()
            parts = None
    return Left(counters, parts)


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
    left: Left | None = None,
) -> Left | None:
    """``y2`` ``[B, E, h, w]`` = Wd * relu6(v1) with Wd ``[E, k, k]``, and its moments or BN2's vectors."""
    arrived, before = None, ()
    if left is not None:
        arrived = left.counters[0] if _finishes_depthwise(y2) else None
        if left.parts is not None:
            partial, size, pixels, seen = left.parts
            before = partial, size, pixels, *seen[1:]
    seen = stats2, vectors2, weight2, bias2, eps2, arrived
    torch.ops.fusekern_cuda.bn_relu6_dw_fwd(y1, None if before else affine1, wd, stride, y2, *seen, *before)
    return left


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
    left: Left | None = None,
) -> None:
    """``y3`` ``[B, O, h, w]`` = W3 relu6(v2) with W3 ``[O, E]``, and its moments or BN3's vectors."""
    with _device_of(y2):
        parts = _fwd(y2, affine2, w3, y3, _seen(stats3, vectors3, weight3, bias3, eps3), left=left)
        if parts is not None:
            parts.join()


def inverted_bottleneck_residual_fwd(y3: Tensor, affine3: Tensor, x: Tensor | None, out: Tensor) -> None:
    """``out`` = v3, plus ``x`` if there is one."""
    with _device_of(y3):
        _apply("affine" if x is None else "residual", y3, x, affine3, out)


def inverted_bottleneck_infer(
    x: Tensor,
    w1: Tensor,
    norm1: tuple,
    wd: Tensor,
    norm2: tuple,
    w3: Tensor,
    norm3: tuple,
    stride: int,
    residual: bool,
    out: Tensor,
) -> None:
    """All of it, no gradients wanted. The norms, by running statistics: weight, bias, mean, var and eps."""
    layout = torch.channels_last if out.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    wide = {"dtype": x.dtype, "device": x.device, "memory_format": layout}
    with _device_of(x):
        a1 = torch.empty((x.shape[0], w1.shape[0], *x.shape[2:]), **wide)
        y2 = torch.empty((x.shape[0], w1.shape[0], *out.shape[2:]), **wide)
        _fwd(x, None, w1, a1, None, "relu6", norm1)
        torch.ops.fusekern_cuda.bn_relu6_dw_fwd(a1, None, wd, stride, y2, None)
        _fwd(y2, norm2, w3, out, None, "residual" if residual else "affine", norm3, x if residual else None)


def inverted_bottleneck_output_bwd(g: Tensor, y3: Tensor, mean3: Tensor, *summed: Tensor | float | None) -> Left:
    """``sums3`` ``[2, O]``: sum g and sum g (y3 - mean3); of them what ``Summed`` has, and of few pixels dy3, the
    gradient of y3."""
    summed, rows = Summed(*summed), _rows(y3)
    whole = _is_whole(rows)
    tile = WHOLE if whole else FLAT
    tiles, count = rows.tiles(tile.BP), rows.images * rows.size
    steps, programs = rows.images * tiles, triton.cdiv(y3.shape[1], tile.BO)
    run = steps if whole else run_length(programs, steps)
    parts, counters = triton.cdiv(steps, run), _new_counters(y3)
    with _device_of(y3):
        (g, s_g), (y3, s_y) = _as_rows(rows, g), _as_rows(rows, y3)
        partial = dy3 = None
        if not whole:
            partial = torch.empty((parts, 2, y3.shape[1]), dtype=torch.float32, device=y3.device)
        elif summed.coef is not None:
            dy3 = torch.empty_like(y3)
        at_once = summed if whole else Summed(None)
        inverted_bottleneck_reduce_kernel[(programs * parts,)](
            *(g, y3, mean3, partial, at_once.vectors, at_once.weight, at_once.sums, at_once.coef, at_once.dweight),
            *(at_once.dbias, counters, dy3, rows.size, tiles, steps, run, float(count), at_once.eps, *s_g, *s_y, *s_y),
            C=y3.shape[1],
            BP=tile.BP,
            BC=tile.BO,
            COUNTERS=2 * COUNTERS,
            LAST=rows.last,
            BATCH=at_once.batch,
            **_options(tile),
        )
        if not whole:
            batch_norm.add(partial, count, summed)
    return Left(counters, grad=dy3)


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
    *summed: Tensor | float | None,
    left: Left | None = None,
) -> Left | None:
    """``dz`` = mask(v2) W3^T dy3, ``dw3`` = dy3 relu6(v2)^T, and ``sums2`` of dz with what ``Summed`` has; dy3 is that
    of BN3's backward."""
    rows, summed = _rows(y2, y3, dz), Summed(*summed)
    with _device_of(y2):
        # Written once: as the operand of two products each of its tiles is read some dozens of times.
        dy3 = None if left is None else left.grad
        if dy3 is None:
            dy3 = torch.empty_like(y3)
            _apply("gradient", g, y3, coef3, dy3)
        (_, s_g), (_, s_y), (_, s_z) = (_as_rows(rows, image) for image in (dy3, y2, dz))
        channels, channels_out = w3.shape
        group = _group(rows, kind_of(rows, dy3, y2, dz), "hidden", channels, channels_out)
        parts, count = group.places.parts, rows.images * rows.size
        partial = torch.empty((parts, 2, channels_out), dtype=torch.float32, device=y2.device)
        dw = dw3[None] if group.parts == 1 else _new_parts(group.parts, *w3.shape, y2)
        arrived = group.places.counters(left, 0)
        at_once = Summed(None) if arrived is None else summed
        first, tiles_w = group.programs * group.parts, rows.tiles(group.weight.BP)
        inverted_bottleneck_bwd_project_kernel[(first + parts * group.places.blocks,)](
            *(dy3, w3, y2, affine2, mean2, dz, partial, dw, at_once.vectors, at_once.weight, at_once.sums),
            *(at_once.coef, at_once.dweight, at_once.dbias, arrived),
            *(first, rows.size, rows.tiles(group.tile.BP), tiles_w),
            *(rows.images * tiles_w, group.run, float(count), at_once.eps, *s_g, *s_y, *s_z),
            C=channels,
            O=channels_out,
            BT=AT_ONCE,
            LAST=rows.last,
            BATCH=at_once.batch,
            PRECISION=_precision(y2),
            **group.constexprs(),
        )
        if arrived is None:
            batch_norm.add(partial, count, summed)
        if group.parts > 1:
            _sum(dw, dw3)
    return None if left is None else Left(left.counters)


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
    *summed: Tensor | float | None,
    left: Left | None = None,
) -> None:
    """``d`` = mask(v1) (Wd^T * dy2), the gradient ``dwd`` of Wd, and ``sums1`` of d with what ``Summed`` has; dy2 is
    that of BN2's backward."""
    arrived = left.counters[1] if left is not None and _finishes_depthwise(d) else None
    maps = dz, y2, coef2, y1, affine1, mean1, wd, stride, d, dwd
    torch.ops.fusekern_cuda.bn_relu6_dw_bwd(*maps, *Summed(*summed), arrived)


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
    with _device_of(d):
        if _gram(x, w1.shape[0]):
            _expand_bwd_by_gram(d, coef1, x, w1, g, dx, dw1)
            return
        rows = _rows(d, dx)
        dy1 = torch.empty_like(d)
        _apply("gradient", d, y1, coef1, dy1)
        (_, s_g), (x, s_x), (_, s_o) = (_as_rows(rows, image) for image in (dy1, x, dx))
        residual, s_r = (dx, (0, 0, 0)) if g is None else _as_rows(rows, g)
        channels, channels_out = w1.shape
        group = _group(rows, kind_of(rows, dy1, x, dx, residual), "image", channels, channels_out)
        dw = dw1[None] if group.parts == 1 else _new_parts(group.parts, *w1.shape, d)
        first, tiles_w = group.programs * group.parts, rows.tiles(group.weight.BP)
        inverted_bottleneck_bwd_expand_kernel[(first + group.places.parts * group.places.blocks,)](
            *(dy1, w1, x, None if g is None else residual, dx, dw),
            *(first, rows.size, rows.tiles(group.tile.BP), tiles_w, rows.images * tiles_w, group.run),
            *(*s_g, *s_x, *s_r, *s_o),
            C=channels,
            O=channels_out,
            LAST=rows.last,
            PRECISION=_precision(x),
            **group.constexprs(),
        )
        if group.parts > 1:
            _sum(dw, dw1)


def _expand_bwd_by_gram(
    d: Tensor, coef1: Tensor, x: Tensor, w1: Tensor, g: Tensor | None, dx: Tensor, dw1: Tensor
) -> None:
    pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]
    rows = _rows(d, dx)
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
        kernel = inverted_bottleneck_reduce_kernel
        yield _case("reduce", kernel, dtype, FLAT, C, layout, (*SUMMED, "out"), BC=FLAT.BO)
        yield _case("reduce whole", kernel, dtype, WHOLE, C, layout, ("partial",), BC=WHOLE.BO)
    for C in (512, 200):
        few, many = Tile(0, 0, 0, 4, 3), Tile(128, 0, 0, 8, 3)
        widths = {"BT": MANY[0], "BS": MANY[1]}
        for finish in (False, True):
            name = "sum finish" if finish else "sum"
            yield _case(f"{name} few", inverted_bottleneck_sum_kernel, "bf16", few, C, FINISH=finish)
            yield _case(f"{name} many", inverted_bottleneck_sum_kernel, "bf16", many, C, FINISH=finish, **widths)


def _cases(name: str, dtype: str, setting: Setting, C: int, layout: str) -> Iterator[Case]:
    def case(what: str, kernel: JITFunction, tile: Tile, **more: object) -> Case:
        # As in a model of 16 bits and under autocast.
        norms = dtype if name == "medium" else "fp32"
        return _case(f"{what} {name}", kernel, dtype, tile, C, layout, norms=norms, **more)

    before, running = ("affine",), ("mean", "var", "gamma", "beta")
    behind = "mean_out", "var_out", "gamma_out", "beta_out"
    seen = "partial", "stats", "vectors", "arrived"
    kernel, tile = inverted_bottleneck_fwd_kernel, setting.fwd
    none = *before, *running, *behind, *seen[1:], "residual"
    yield case("fwd expand", kernel, tile, none=none)
    none = *running, *behind[:2], "stats", "residual", "fresh"
    yield case("fwd project", kernel, tile, none=none)
    yield case("fwd project apart", kernel, tile, none=(*none, *behind[2:], "vectors", "arrived"))
    none = *seen, "fresh"
    yield case("infer expand", kernel, tile, none=(*before, *running, "residual", *none), NORM="relu6")
    yield case("infer project", kernel, tile, none=(*before, *none), NORM="residual")
    weight = dict(zip(("WP", "WO", "WK"), setting.weight[:3], strict=True))
    kernel = inverted_bottleneck_bwd_project_kernel
    yield case("bwd project", kernel, setting.hidden, out=dtype, **weight)
    yield case("bwd project parts", kernel, setting.hidden, none=(*SUMMED, "arrived"), **weight)
    yield case("bwd expand", inverted_bottleneck_bwd_expand_kernel, setting.image, out=dtype, **weight)
    yield case("bwd expand parts", inverted_bottleneck_bwd_expand_kernel, setting.image, **weight)
    yield case("bwd image", inverted_bottleneck_bwd_image_kernel, setting.image)
    kernel, centred = inverted_bottleneck_bwd_weight_kernel, dtype in ("ieee", "tf32")
    if centred:
        yield case("bwd weight", kernel, setting.weight, CENTRE="image")
        yield case("bwd weight gram", kernel, setting.weight, none=("sums",), CENTRE="both")
    else:
        yield case("bwd weight", kernel, setting.weight, none=("mean", "sums"))


# What the sums of a norm's backward become, and what that takes.
SUMMED = "vectors", "gamma", "sums", "coef", "dweight", "dbias"


def _case(
    name: str,
    kernel: JITFunction,
    dtype: str,
    tile: Tile,
    C: int = 512,
    layout: str = "channels_last",
    none: tuple[str, ...] = (),
    out: str = "fp32",
    norms: str = "fp32",
    **more: object,
) -> Case:
    """``none``: what is not given; ``out`` and ``norms``: dtypes of a weight's gradient and of the norms' parameters;
    ``more``: constexprs that differ."""
    last = layout == "channels_last"
    fp32 = dtype in ("ieee", "tf32")
    unit = ("s_xc", "s_gc", "s_rc", "s_oc") if last else ("s_xp", "s_gp", "s_rp", "s_op")
    constexprs = {
        **dict(zip(("BP", "BO", "BK"), tile[:3], strict=True)),
        "FINISH": False,
        "BC": tile.BK,
        "BT": FEW[0] if kernel is inverted_bottleneck_sum_kernel else AT_ONCE,
        "BS": FEW[1],
        "COUNTERS": 2 * COUNTERS,
        "C": C,
        "O": C,
        "LAST": last,
        "BATCH": True,
        "NORM": "none",
        "MODE": "affine",
        "CENTRE": fp32 if kernel is inverted_bottleneck_bwd_image_kernel else "none",
        "PRECISION": dtype if fp32 else "ieee",
        **dict.fromkeys(unit, 1),
        **dict.fromkeys(none),
        **more,
    }
    weight = "out" if kernel is inverted_bottleneck_bwd_weight_kernel else "out_w"
    maps = "image", "weight", "residual", "out", "grad", "other", "matrix", "total"
    types = {key: "*fp32" if fp32 else f"*{dtype}" for key in maps}
    types[weight] = "*fp32" if fp32 else f"*{out}"
    types |= dict.fromkeys(("affine", "mean", "partial", "product", "stats", *SUMMED), "*fp32")
    parameters = {f"{name}{place}" for name in ("mean", "var", "gamma", "beta") for place in ("", "_out")}
    if kernel is not inverted_bottleneck_fwd_kernel:  # there "mean" is of no parameter
        parameters = "gamma", "dweight", "dbias"
    types |= dict.fromkeys(parameters, "*fp32" if fp32 else f"*{norms}")
    types |= dict.fromkeys(("fresh", "arrived"), "*i32") | dict.fromkeys(("eps", "eps_out", "count"), "fp32")
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
