"""The inverted bottleneck's forward kernels, and what the backward has too: loads, stores, and how a norm is applied.
What they compute stands in ``inverted_bottleneck.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fusekern.kernels.batch_norm import affine_of, join_parts, last_to_arrive, store_sums


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
