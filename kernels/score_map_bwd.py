"""Score map's backward kernels: the image's gradient, the text's, and the sum of what several programs add up for that.
What they compute stands in ``score_map.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fusekern.kernels.score_map_fwd import FLOOR, floored, load_text, load_tile, square_sum, store_tile


@triton.jit(do_not_specialize=["W", "K", "tiles", "programs"])
def score_map_bwd_image_kernel(
    grad,
    image,
    text,
    dimage,
    inverse,
    N,
    W,
    K,
    C,
    tiles,
    programs,
    s_gb,
    s_gc,
    s_gh,
    s_gw,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_tb,
    s_tk,
    s_ob,
    s_oc,
    s_oh,
    s_ow,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BK2: tl.constexpr,
    ONE: tl.constexpr,
    LAYOUT_GRAD: tl.constexpr,
    LAYOUT: tl.constexpr,
    LAYOUT_OUT: tl.constexpr,
    VEC_GRAD: tl.constexpr,
    VEC: tl.constexpr,
    VEC_OUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CONCAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx_n = sum_k g_nk t_k;  NORMALIZE, t being of unit length:  dx_n = (d - (d x_n') x_n') / |x_n|  with d that sum
    and x_n' = x_n / |x_n|; also 1 / |x_n| in ``inverse``, [B, N].  CONCAT: plus the gradient of the image part.

    ONE: all tokens at once, BK + BK2 at most; else blocks of BK. Of a tile's channels, ``programs`` write a part each.
    """
    i = tl.program_id(0)
    i_p = i % programs
    i_t = i // programs % tiles
    i_b = (i // programs // tiles).to(tl.int64)
    K = K * VEC_GRAD
    grad += i_b * s_gb * VEC_GRAD
    image += i_b * s_xb * VEC
    text += i_b * s_tb
    dimage += i_b * s_ob * VEC_OUT
    s_gw = s_gw * VEC_GRAD
    s_xw = s_xw * VEC
    s_ow = s_ow * VEC_OUT
    # The scores' gradient lies behind the image part's.
    i_g = C if CONCAT else 0

    if ONE:
        b_g = load_tile(grad, i_t, i_g, N, W, i_g + K, s_gc, s_gh, s_gw, BN, BK, LAYOUT_GRAD)  # [BN, BK]
        if BK2 > 0:
            b_g2 = load_tile(grad, i_t, i_g + BK, N, W, i_g + K, s_gc, s_gh, s_gw, BN, BK2, LAYOUT_GRAD)  # [BN, BK2]

    if NORMALIZE:
        b_xx = tl.zeros([BN], tl.float32)
        b_r = tl.zeros([BN], tl.float32)
        for i_k in range(0, 1 if ONE else K, BK):
            b_xx = tl.zeros([BN], tl.float32)
            b_s = tl.zeros([BN, BK], tl.float32)
            if BK2 > 0:
                b_s2 = tl.zeros([BN, BK2], tl.float32)
            for i_c in range(0, C, BC):
                b_x = load_tile(image, i_t, i_c, N, W, C, s_xc, s_xh, s_xw, BN, BC, LAYOUT)  # [BN, BC]
                b_t = load_text(text, i_k, i_c, K, C, s_tk, BK, BC)  # [BK, BC]
                b_s = tl.dot(b_x, tl.trans(b_t), b_s, input_precision=PRECISION)
                if BK2 > 0:
                    b_t2 = load_text(text, BK, i_c, K, C, s_tk, BK2, BC)  # [BK2, BC]
                    b_s2 = tl.dot(b_x, tl.trans(b_t2), b_s2, input_precision=PRECISION)
                b_xx += square_sum(b_x)
            if not ONE:
                b_g = load_tile(grad, i_t, i_g + i_k, N, W, i_g + K, s_gc, s_gh, s_gw, BN, BK, LAYOUT_GRAD)
            b_r += tl.sum(b_s * b_g, 1)
            if BK2 > 0:
                b_r += tl.sum(b_s2 * b_g2, 1)
        b_norm = tl.sqrt_rn(b_xx)
        b_inv = tl.div_rn(1.0, floored(b_norm))  # [BN]
        o_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN)
        tl.store(inverse + i_b * N + o_n, b_inv, mask=(o_n < N) & (tl.full([1], i_p, tl.int32) == 0))
        # Below the floor the divisor is a constant.
        b_r = tl.where(b_norm < FLOOR, 0.0, b_r * b_inv * b_inv)

    for i_c in range(i_p * BC, C, programs * BC):
        b_d = tl.zeros([BN, BC], tl.float32)
        for i_k in range(0, 1 if ONE else K, BK):
            if not ONE:
                b_g = load_tile(grad, i_t, i_g + i_k, N, W, i_g + K, s_gc, s_gh, s_gw, BN, BK, LAYOUT_GRAD)
            b_t = load_text(text, i_k, i_c, K, C, s_tk, BK, BC)
            b_d = tl.dot(b_g, b_t, b_d, input_precision=PRECISION)
        if BK2 > 0:
            b_t2 = load_text(text, BK, i_c, K, C, s_tk, BK2, BC)
            b_d = tl.dot(b_g2, b_t2, b_d, input_precision=PRECISION)
        if NORMALIZE:
            b_x = load_tile(image, i_t, i_c, N, W, C, s_xc, s_xh, s_xw, BN, BC, LAYOUT)
            b_d = (b_d - b_x * b_r[:, None]) * b_inv[:, None]
        if CONCAT:
            b_d += load_tile(grad, i_t, i_c, N, W, C, s_gc, s_gh, s_gw, BN, BC, LAYOUT_GRAD)
        store_tile(dimage, b_d, i_t, i_c, N, W, C, s_oc, s_oh, s_ow, BN, BC, LAYOUT_OUT)


@triton.jit(do_not_specialize=["B", "W", "K", "tiles", "programs", "blocks", "columns"])
def score_map_bwd_text_kernel(
    grad,
    image,
    inverse,
    dtext,
    B,
    N,
    W,
    K,
    C,
    tiles,
    programs,
    blocks,
    columns,
    s_gb,
    s_gc,
    s_gh,
    s_gw,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BK2: tl.constexpr,
    LAYOUT_GRAD: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC_GRAD: tl.constexpr,
    VEC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CONCAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k = sum_n g_nk x_n, x_n over its norm if NORMALIZE, over the program's tiles of pixels, [programs, B, K, C].

    A program has one of ``columns`` blocks of channels, and one of ``blocks`` blocks of tokens or all.
    """
    i = tl.program_id(0)
    i_c = i % columns * BC
    i_k = i // columns % blocks * BK
    i_p = i // columns // blocks % programs
    i_b = (i // columns // blocks // programs).to(tl.int64)
    K = K * VEC_GRAD
    grad += i_b * s_gb * VEC_GRAD
    image += i_b * s_xb * VEC
    s_gw = s_gw * VEC_GRAD
    i_g = C if CONCAT else 0

    # Transposed: the channels are a better M for the tensor cores than the tokens.
    b_d = tl.zeros([BC, BK], tl.float32)
    if BK2 > 0:
        b_d2 = tl.zeros([BC, BK2], tl.float32)
    for i_t in range(i_p, tiles, programs):
        b_x = load_tile(image, i_t, i_c, N, W, C, s_xc, s_xh, s_xw * VEC, BN, BC, LAYOUT)  # [BN, BC]
        b_g = load_tile(grad, i_t, i_g + i_k, N, W, i_g + K, s_gc, s_gh, s_gw, BN, BK, LAYOUT_GRAD)  # [BN, BK]
        if NORMALIZE:
            o_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN)
            b_inv = tl.load(inverse + i_b * N + o_n, mask=o_n < N, other=0.0)  # [BN]
            b_x = (b_x * b_inv[:, None]).to(b_g.dtype)
        b_d = tl.dot(tl.trans(b_x), b_g, b_d, input_precision=PRECISION)
        if BK2 > 0:
            b_g2 = load_tile(grad, i_t, i_g + BK, N, W, i_g + K, s_gc, s_gh, s_gw, BN, BK2, LAYOUT_GRAD)  # [BN, BK2]
            b_d2 = tl.dot(tl.trans(b_x), b_g2, b_d2, input_precision=PRECISION)
    dtext += (i_p * B + i_b) * K * C
    o_c = i_c + tl.arange(0, BC)
    o_k = i_k + tl.arange(0, BK)
    m_d = (o_c < C)[:, None] & (o_k < K)[None, :]
    tl.store(dtext + o_c[:, None] + o_k.to(tl.int64)[None, :] * C, b_d.to(dtext.dtype.element_ty), mask=m_d)
    if BK2 > 0:
        o_k2 = BK + tl.arange(0, BK2)
        m_d2 = (o_c < C)[:, None] & (o_k2 < K)[None, :]
        tl.store(dtext + o_c[:, None] + o_k2.to(tl.int64)[None, :] * C, b_d2.to(dtext.dtype.element_ty), mask=m_d2)


@triton.jit
def sum_partials(partials, i_c, rows, C, programs, BP: tl.constexpr, BC: tl.constexpr):
    """Channels from ``i_c`` on of a row's sum, always in the same order. [BC]"""
    o_c = i_c + tl.arange(0, BC)
    b_d = tl.zeros([BC], tl.float32)
    for i_p in range(0, programs, BP):
        o_p = i_p + tl.arange(0, BP)
        o_d = o_p.to(tl.int64)[:, None] * rows * C + o_c[None, :]
        m_d = (o_p < programs)[:, None] & (o_c < C)[None, :]
        b_d += tl.sum(tl.load(partials + o_d, mask=m_d, other=0.0), 0)
    return b_d


@triton.jit(do_not_specialize=["rows", "K", "programs"])
def score_map_bwd_sum_kernel(
    partials,
    text,
    dtext,
    rows,
    K,
    C,
    programs,
    s_tb,
    s_tk,
    BP: tl.constexpr,
    BC: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """d_k summed over the programs;  NORMALIZE:  dt_k = (d_k - (d_k t_k') t_k') / |t_k|  with t_k' = t_k / |t_k|.

    [programs, rows, C] to [rows, C], rows = B K.
    """
    i = tl.program_id(0).to(tl.int64)
    text += i // K * s_tb + i % K * s_tk
    partials += i * C
    dtext += i * C
    b_r = tl.zeros([BC], tl.float32)
    b_tt = tl.zeros([BC], tl.float32)
    if NORMALIZE:
        for i_c in range(0, C, BC):
            o_c = i_c + tl.arange(0, BC)
            b_t = tl.load(text + o_c, mask=o_c < C, other=0.0).to(tl.float32)  # [BC]
            b_r += b_t * sum_partials(partials, i_c, rows, C, programs, BP, BC)
            b_tt += b_t * b_t
        b_norm = tl.sqrt_rn(tl.sum(b_tt, 0))
        b_inv = tl.div_rn(1.0, floored(b_norm))
        b_a = tl.where(b_norm < FLOOR, 0.0, tl.sum(b_r, 0) * b_inv * b_inv)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        b_d = sum_partials(partials, i_c, rows, C, programs, BP, BC)  # [BC]
        if NORMALIZE:
            b_t = tl.load(text + o_c, mask=o_c < C, other=0.0).to(tl.float32)
            b_d = (b_d - b_t * b_a) * b_inv
        tl.store(dtext + o_c, b_d.to(dtext.dtype.element_ty), mask=o_c < C)
