"""Score map's forward kernels, and what the backward has too: tiles of the image, rows of the text, norms.
What they compute stands in ``score_map.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANNELS_LAST, NCHW, STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Norms below count as this much.
FLOOR = tl.constexpr(1e-12)


@triton.jit
def tile_offsets(i_t, i_c, W, s_c, s_h, s_w, BN: tl.constexpr, BC: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of the channels from ``i_c`` on of tile ``i_t`` of the pixels, int64. [BN, BC]

    ``s_w`` is the stride between pixels, except in STRIDED, where rows may lie anywhere.
    """
    i_n = tl.cast(i_t, tl.int64) * BN
    o_n = tl.arange(0, BN)
    o_c = i_c + tl.arange(0, BC).to(tl.int64)
    if LAYOUT == CHANNELS_LAST:
        return (i_n + o_n)[:, None] * s_w + o_c[None, :]
    elif LAYOUT == NCHW:
        return (i_n + o_n)[:, None] + o_c[None, :] * s_c
    else:
        o_w = (i_n % W).to(tl.int32) + o_n
        o_n = (i_n // W + o_w // W) * s_h + (o_w % W).to(tl.int64) * s_w
        return o_n[:, None] + o_c[None, :] * s_c


@triton.jit
def tile_mask(i_t, i_c, N, C, BN: tl.constexpr, BC: tl.constexpr):
    m_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN) < N
    return m_n[:, None] & (i_c + tl.arange(0, BC) < C)[None, :]


@triton.jit
def load_tile(image, i_t, i_c, N, W, C, s_c, s_h, s_w, BN: tl.constexpr, BC: tl.constexpr, LAYOUT: tl.constexpr):
    """Channels from ``i_c`` on of tile ``i_t`` of the pixels, 0 beyond pixel N and channel C. [BN, BC]"""
    o_x = tile_offsets(i_t, i_c, W, s_c, s_h, s_w, BN, BC, LAYOUT)
    return tl.load(image + o_x, mask=tile_mask(i_t, i_c, N, C, BN, BC), other=0.0)


@triton.jit
def store_tile(out, b_x, i_t, i_c, N, W, C, s_c, s_h, s_w, BN: tl.constexpr, BC: tl.constexpr, LAYOUT: tl.constexpr):
    o_x = tile_offsets(i_t, i_c, W, s_c, s_h, s_w, BN, BC, LAYOUT)
    tl.store(out + o_x, b_x.to(out.dtype.element_ty), mask=tile_mask(i_t, i_c, N, C, BN, BC))


@triton.jit
def load_text(text, i_k, i_c, K, C, s_k, BK: tl.constexpr, BC: tl.constexpr):
    """Rows from ``i_k`` on, channels from ``i_c`` on. [BK, BC]"""
    o_k = i_k + tl.arange(0, BK)
    o_c = i_c + tl.arange(0, BC)
    o_t = o_k.to(tl.int64)[:, None] * s_k + o_c[None, :]
    return tl.load(text + o_t, mask=(o_k < K)[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def floored(b_norm):
    # A NaN stays one.
    return tl.where(b_norm < FLOOR, FLOOR, b_norm)


@triton.jit
def square_sum(b_x):
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, 1)


@triton.jit(do_not_specialize=["W", "K", "tiles", "blocks"])
def score_map_fwd_kernel(
    image,
    text,
    out,
    N,
    W,
    K,
    C,
    tiles,
    blocks,
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
    LAYOUT: tl.constexpr,
    LAYOUT_OUT: tl.constexpr,
    VEC: tl.constexpr,
    VEC_OUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CONCAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s_nk = x_n t_k, over |x_n| |t_k| if NORMALIZE; with CONCAT behind the channels of x, which are copied.

    A program has a tile of pixels and one of ``blocks`` blocks of BK tokens, or all tokens, BK + BK2 at most. Strides
    and K come as multiples of VEC and VEC_OUT, so that the compiler knows how many elements one access can take.
    """
    i = tl.program_id(0)
    i_k = i % blocks
    i_t = i // blocks % tiles
    i_b = (i // blocks // tiles).to(tl.int64)
    K = K * VEC_OUT
    image += i_b * s_xb * VEC
    text += i_b * s_tb
    out += i_b * s_ob * VEC_OUT

    b_s = tl.zeros([BN, BK], tl.float32)
    b_xx = tl.zeros([BN], tl.float32)
    b_tt = tl.zeros([BK], tl.float32)
    if BK2 > 0:
        b_s2 = tl.zeros([BN, BK2], tl.float32)
        b_tt2 = tl.zeros([BK2], tl.float32)
    for i_c in range(0, C, BC):
        b_x = load_tile(image, i_t, i_c, N, W, C, s_xc, s_xh, s_xw * VEC, BN, BC, LAYOUT)  # [BN, BC]
        b_t = load_text(text, i_k * BK, i_c, K, C, s_tk, BK, BC)  # [BK, BC]
        b_s = tl.dot(b_x, tl.trans(b_t), b_s, input_precision=PRECISION)
        if NORMALIZE:
            b_xx += square_sum(b_x)
            b_tt += square_sum(b_t)
        if BK2 > 0:
            b_t2 = load_text(text, BK, i_c, K, C, s_tk, BK2, BC)  # [BK2, BC]
            b_s2 = tl.dot(b_x, tl.trans(b_t2), b_s2, input_precision=PRECISION)
            if NORMALIZE:
                b_tt2 += square_sum(b_t2)
        if CONCAT:
            # The blocks of tokens share the copy.
            o_o = tile_offsets(i_t, i_c, W, s_oc, s_oh, s_ow * VEC_OUT, BN, BC, LAYOUT_OUT)
            m_o = tile_mask(i_t, i_c, N, C, BN, BC) & (tl.full([1, 1], i_c // BC % blocks, tl.int32) == i_k)
            tl.store(out + o_o, b_x, mask=m_o)
    i_o = C if CONCAT else 0
    if NORMALIZE:
        b_inv = tl.div_rn(1.0, floored(tl.sqrt_rn(b_xx)))  # [BN]
        b_s = b_s * b_inv[:, None] * tl.div_rn(1.0, floored(tl.sqrt_rn(b_tt)))[None, :]
    store_tile(out, b_s, i_t, i_o + i_k * BK, N, W, i_o + K, s_oc, s_oh, s_ow * VEC_OUT, BN, BK, LAYOUT_OUT)
    if BK2 > 0:
        if NORMALIZE:
            b_s2 = b_s2 * b_inv[:, None] * tl.div_rn(1.0, floored(tl.sqrt_rn(b_tt2)))[None, :]
        store_tile(out, b_s2, i_t, i_o + BK, N, W, i_o + K, s_oc, s_oh, s_ow * VEC_OUT, BN, BK2, LAYOUT_OUT)


@triton.jit(do_not_specialize=["K"])
def score_map_unit_kernel(text, unit, K, C, s_tb, s_tk, BC: tl.constexpr):
    """The rows of the text over their norms, packed."""
    i = tl.program_id(0).to(tl.int64)
    text += i // K * s_tb + i % K * s_tk
    b_tt = tl.zeros([BC], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        b_t = tl.load(text + o_c, mask=o_c < C, other=0.0).to(tl.float32)  # [BC]
        b_tt += b_t * b_t
    b_inv = tl.div_rn(1.0, floored(tl.sqrt_rn(tl.sum(b_tt, 0))))
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        b_t = tl.load(text + o_c, mask=o_c < C, other=0.0)
        tl.store(unit + i * C + o_c, (b_t * b_inv).to(unit.dtype.element_ty), mask=o_c < C)
