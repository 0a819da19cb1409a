"""Former2Conv's forward kernels, and what the backward has too: offsets, products over channels, running softmax.
What they compute stands in ``former2conv.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def program(heads, programs):
    """Neighbouring programs take the heads of the same pixels. Returns batch, head and first tile."""
    i = tl.program_id(0)
    return (i // heads // programs).to(tl.int64), (i % heads).to(tl.int64), i // heads % programs


@triton.jit
def pixel_offsets(i_t, W, s_c, s_h, s_w, BN: tl.constexpr, BD: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of tile ``i_t`` within a head of an image, int64. [BN, BD]

    ``s_w`` is the stride between pixels, unless they are "strided": then rows may lie anywhere.
    """
    i_n = tl.cast(i_t, tl.int64) * BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    if LAYOUT == "channels_last":
        return (i_n + o_n)[:, None] * s_w + o_d[None, :]
    elif LAYOUT == "nchw":
        return i_n + (o_n[:, None] + o_d[None, :] * s_c)
    else:
        o_w = (i_n % W).to(tl.int32) + o_n
        o_n = (i_n // W + o_w // W) * s_h + (o_w % W).to(tl.int64) * s_w
        return o_n[:, None] + o_d[None, :].to(tl.int64) * s_c


@triton.jit
def token_offsets(i_k, K, s_k, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """Offsets and mask of the tokens from ``i_k`` on. [BK, BD], [BK, BD]"""
    o_k = i_k + tl.arange(0, BK)
    o_d = tl.arange(0, BD)
    return o_k.to(tl.int64)[:, None] * s_k + o_d[None, :], (o_k < K)[:, None] & (o_d < D)[None, :]


@triton.jit
def dot_channels(b_x, b_kt, BC: tl.constexpr, PRECISION: tl.constexpr):
    """x K^T over the head dimension, [BN, BD] and [BD, BK] to [BN, BK], in chunks of BC channels.

    Without tensor cores a thread holds whole rows of a product's operands in registers; chunks make them short.
    """
    if b_x.shape[1] <= BC:
        return tl.dot(b_x, b_kt, input_precision=PRECISION)
    else:
        b_x = tl.permute(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // BC, BC]), [1, 0, 2])
        b_kt = tl.reshape(b_kt, [b_kt.shape[0] // BC, BC, b_kt.shape[1]])
        return tl.sum(tl.dot(b_x, b_kt, input_precision=PRECISION), 0)


@triton.jit(do_not_specialize=["K", "heads", "tiles", "programs"])
def former2conv_fwd_kernel(
    image,
    key,
    value,
    out,
    scale,
    N,
    W,
    K,
    heads,
    tiles,
    programs,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_kb,
    s_kk,
    s_vb,
    s_vk,
    s_ob,
    s_oc,
    s_oh,
    s_ow,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BK2: tl.constexpr,
    LAYOUT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """out = x + P V with P = softmax(scale x K^T), for K <= BK + BK2; with BK2, K >= BK."""
    i_b, i_h, i_p = program(heads, programs)
    image += i_b * s_xb + i_h * D * s_xc
    out += i_b * s_ob + i_h * D * s_oc
    key += i_b * s_kb + i_h * D
    value += i_b * s_vb + i_h * D
    b_c = tl.cast(scale, tl.float32) * LOG2_E

    o_k, m_k = token_offsets(0, K, s_kk, D, BK, BD)
    o_v, m_v = token_offsets(0, K, s_vk, D, BK, BD)
    b_kt = tl.load(key + tl.trans(o_k), mask=tl.trans(m_k), other=0.0)  # [BD, BK]
    b_v = tl.load(value + o_v, mask=m_v, other=0.0)  # [BK, BD]
    if BK2 > 0:
        o_k, m_k = token_offsets(BK, K, s_kk, D, BK2, BD)
        o_v, m_v = token_offsets(BK, K, s_vk, D, BK2, BD)
        b_kt2 = tl.load(key + tl.trans(o_k), mask=tl.trans(m_k), other=0.0)  # [BD, BK2]
        b_v2 = tl.load(value + o_v, mask=m_v, other=0.0)  # [BK2, BD]

    for i_t in range(i_p, tiles, programs):
        m_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN) < N
        m_x = m_n[:, None] & (tl.arange(0, BD) < D)[None, :]
        o_x = pixel_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
        b_x = tl.load(image + o_x, mask=m_x, other=0.0)  # [BN, BD]
        b_s = dot_channels(b_x, b_kt, BC, PRECISION) * b_c  # [BN, BK]
        if BK2 == 0:
            b_s = tl.where((tl.arange(0, BK) < K)[None, :], b_s, float("-inf"))
            b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
            b_l = tl.sum(b_p, 1)  # [BN]
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)  # [BN, BD]
        else:
            b_s2 = dot_channels(b_x, b_kt2, BC, PRECISION) * b_c  # [BN, BK2]
            b_s2 = tl.where((BK + tl.arange(0, BK2) < K)[None, :], b_s2, float("-inf"))
            b_m = tl.maximum(tl.max(b_s, 1), tl.max(b_s2, 1))  # [BN]
            b_p = tl.exp2(b_s - b_m[:, None])
            b_p2 = tl.exp2(b_s2 - b_m[:, None])
            b_l = tl.sum(b_p, 1) + tl.sum(b_p2, 1)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
            b_o = tl.dot(b_p2.to(b_v.dtype), b_v2, b_o, input_precision=PRECISION)
        if RELOAD:
            b_x = tl.load(image + o_x, mask=m_x, other=0.0, eviction_policy="evict_first")
        b_o = b_x.to(tl.float32) + b_o / b_l[:, None]
        o_o = pixel_offsets(i_t, W, s_oc, s_oh, s_ow, BN, BD, LAYOUT)
        tl.store(out + o_o, b_o.to(out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["K", "heads", "tiles"])
def former2conv_fwd_online_kernel(
    image,
    key,
    value,
    out,
    scale,
    N,
    W,
    K,
    heads,
    tiles,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_kb,
    s_kk,
    s_vb,
    s_vk,
    s_ob,
    s_oc,
    s_oh,
    s_ow,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    LAYOUT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """As above for any K: one tile of pixels, a loop over blocks of tokens."""
    i_b, i_h, i_t = program(heads, tiles)
    image += i_b * s_xb + i_h * D * s_xc
    out += i_b * s_ob + i_h * D * s_oc
    key += i_b * s_kb + i_h * D
    value += i_b * s_vb + i_h * D
    b_c = tl.cast(scale, tl.float32) * LOG2_E

    m_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN) < N
    m_x = m_n[:, None] & (tl.arange(0, BD) < D)[None, :]
    o_x = pixel_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
    b_x = tl.load(image + o_x, mask=m_x, other=0.0)  # [BN, BD]
    b_m = tl.full([BN], float("-inf"), tl.float32)
    b_l = tl.zeros([BN], tl.float32)
    b_o = tl.zeros([BN, BD], tl.float32)
    for i_k in range(0, K, BK):
        o_k, m_k = token_offsets(i_k, K, s_kk, D, BK, BD)
        o_v, m_v = token_offsets(i_k, K, s_vk, D, BK, BD)
        b_k = tl.load(key + o_k, mask=m_k, other=0.0)  # [BK, BD]
        b_v = tl.load(value + o_v, mask=m_v, other=0.0)  # [BK, BD]
        b_s = dot_channels(b_x, tl.trans(b_k), BC, PRECISION) * b_c  # [BN, BK]
        b_s = tl.where((i_k + tl.arange(0, BK) < K)[None, :], b_s, float("-inf"))
        b_m, b_r, b_p = online_softmax(b_s, b_m)
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_r[:, None], input_precision=PRECISION)
    if RELOAD:
        b_x = tl.load(image + o_x, mask=m_x, other=0.0, eviction_policy="evict_first")
    b_o = b_x.to(tl.float32) + b_o / b_l[:, None]
    o_o = pixel_offsets(i_t, W, s_oc, s_oh, s_ow, BN, BD, LAYOUT)
    tl.store(out + o_o, b_o.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def online_softmax(b_s, b_m):
    """The new maximum, the factor for what was summed under the old one, and the block's exponentials."""
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    # A row may be -inf so far, and finite in a later block.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, tl.exp2(b_m - b_shift), tl.exp2(b_s - b_shift[:, None])
