"""Former2Conv's backward kernels; what they compute stands in ``former2conv.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from fusekern.kernels.former2conv_fwd import (
    LOG2_E,
    dot_channels,
    online_softmax,
    pixel_offsets,
    program,
    token_offsets,
)


@triton.jit(do_not_specialize=["B", "K", "heads", "tiles", "programs"])
def former2conv_bwd_kernel(
    grad,
    image,
    key,
    value,
    dimage,
    dkey,
    dvalue,
    scale,
    B,
    N,
    W,
    K,
    heads,
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
    """P = softmax(scale x K^T),  dP = g V^T,  delta = sum_k P dP,  dS = P (dP - delta),  dx = g + scale dS K,
    dK = scale dS^T x  and  dV = P^T g,  for K <= BK. dK and dV are those of the program's tiles, [programs, B, K, C].
    """
    i_b, i_h, i_p = program(heads, programs)
    grad += i_b * s_gb + i_h * D * s_gc
    image += i_b * s_xb + i_h * D * s_xc
    dimage += i_b * s_ob + i_h * D * s_oc
    key += i_b * s_kb + i_h * D
    value += i_b * s_vb + i_h * D
    b_scale = tl.cast(scale, tl.float32)

    o_k, m_k = token_offsets(0, K, s_kk, D, BK, BD)
    o_v, m_v = token_offsets(0, K, s_vk, D, BK, BD)
    b_k = tl.load(key + o_k, mask=m_k, other=0.0)  # [BK, BD]
    b_vt = tl.load(value + tl.trans(o_v), mask=tl.trans(m_v), other=0.0)  # [BD, BK]
    # Transposed: the head dimension is a better M for the tensor cores than the tokens.
    b_dkt = tl.zeros([BD, BK], tl.float32)
    b_dvt = tl.zeros([BD, BK], tl.float32)
    for i_t in range(i_p, tiles, programs):
        m_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN) < N
        m_x = m_n[:, None] & (tl.arange(0, BD) < D)[None, :]
        o_x = pixel_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
        o_g = pixel_offsets(i_t, W, s_gc, s_gh, s_gw, BN, BD, LAYOUT)
        b_x = tl.load(image + o_x, mask=m_x, other=0.0)  # [BN, BD]
        b_g = tl.load(grad + o_g, mask=m_x, other=0.0)  # [BN, BD]
        b_s = dot_channels(b_x, tl.trans(b_k), BC, PRECISION) * (b_scale * LOG2_E)  # [BN, BK]
        b_s = tl.where((tl.arange(0, BK) < K)[None, :], b_s, float("-inf"))
        b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
        b_p = b_p * (1 / tl.sum(b_p, 1))[:, None]
        # Rows beyond the image are zero in x and g, but 0 times a token's inf is not.
        b_p = tl.where(m_n[:, None], b_p, 0.0)
        b_dvt = tl.dot(tl.trans(b_g), b_p.to(b_g.dtype), b_dvt, input_precision=PRECISION)
        b_dp = dot_channels(b_g, b_vt, BC, PRECISION)  # [BN, BK]
        b_delta = tl.sum(b_p * b_dp, 1)  # [BN]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_x.dtype)
        b_dx = tl.dot(b_ds, b_k, input_precision=PRECISION)  # [BN, BD]
        b_dkt = tl.dot(tl.trans(b_x), b_ds, b_dkt, input_precision=PRECISION)
        if RELOAD:
            b_g = tl.load(grad + o_g, mask=m_x, other=0.0, eviction_policy="evict_first")
        b_dx = b_g.to(tl.float32) + b_dx * b_scale
        o_o = pixel_offsets(i_t, W, s_oc, s_oh, s_ow, BN, BD, LAYOUT)
        tl.store(dimage + o_o, b_dx.to(dimage.dtype.element_ty), mask=m_x)

    o_k, m_k = token_offsets(0, K, heads * D, D, BK, BD)
    o_k = tl.trans((i_p * B + i_b) * K * heads * D + i_h * D + o_k)  # [BD, BK]
    tl.store(dkey + o_k, (b_dkt * b_scale).to(dkey.dtype.element_ty), mask=tl.trans(m_k))
    tl.store(dvalue + o_k, b_dvt.to(dvalue.dtype.element_ty), mask=tl.trans(m_k))


@triton.jit(do_not_specialize=["K", "heads", "tiles", "programs"])
def former2conv_bwd_dx_kernel(
    grad,
    image,
    key,
    value,
    dimage,
    lse,
    delta,
    scale,
    N,
    W,
    K,
    heads,
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
    """dx as above for K <= BK + BK2 (with BK2, K >= BK), and per pixel what dK and dV need of it, [B, heads, N]:
    lse = log2 sum_k exp(scale x k) and delta.
    """
    i_b, i_h, i_p = program(heads, programs)
    grad += i_b * s_gb + i_h * D * s_gc
    image += i_b * s_xb + i_h * D * s_xc
    dimage += i_b * s_ob + i_h * D * s_oc
    key += i_b * s_kb + i_h * D
    value += i_b * s_vb + i_h * D
    lse += (i_b * heads + i_h) * N
    delta += (i_b * heads + i_h) * N
    b_scale = tl.cast(scale, tl.float32)
    b_c = b_scale * LOG2_E

    o_k, m_k = token_offsets(0, K, s_kk, D, BK, BD)
    o_v, m_v = token_offsets(0, K, s_vk, D, BK, BD)
    b_k = tl.load(key + o_k, mask=m_k, other=0.0)  # [BK, BD]
    b_vt = tl.load(value + tl.trans(o_v), mask=tl.trans(m_v), other=0.0)  # [BD, BK]
    if BK2 > 0:
        o_k, m_k = token_offsets(BK, K, s_kk, D, BK2, BD)
        o_v, m_v = token_offsets(BK, K, s_vk, D, BK2, BD)
        b_k2 = tl.load(key + o_k, mask=m_k, other=0.0)  # [BK2, BD]
        b_vt2 = tl.load(value + tl.trans(o_v), mask=tl.trans(m_v), other=0.0)  # [BD, BK2]
    for i_t in range(i_p, tiles, programs):
        o_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        m_x = m_n[:, None] & (tl.arange(0, BD) < D)[None, :]
        o_x = pixel_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
        o_g = pixel_offsets(i_t, W, s_gc, s_gh, s_gw, BN, BD, LAYOUT)
        b_x = tl.load(image + o_x, mask=m_x, other=0.0)  # [BN, BD]
        b_g = tl.load(grad + o_g, mask=m_x, other=0.0)  # [BN, BD]
        b_s = dot_channels(b_x, tl.trans(b_k), BC, PRECISION) * b_c  # [BN, BK]
        if BK2 == 0:
            b_s = tl.where((tl.arange(0, BK) < K)[None, :], b_s, float("-inf"))
            b_m = tl.max(b_s, 1)  # [BN]
            b_p = tl.exp2(b_s - b_m[:, None])
            b_l = tl.sum(b_p, 1)  # [BN]
            b_dp = dot_channels(b_g, b_vt, BC, PRECISION)  # [BN, BK]
            b_delta = tl.sum(b_p * b_dp, 1) / b_l  # [BN]
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dx = tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)  # [BN, BD]
        else:
            b_s2 = dot_channels(b_x, tl.trans(b_k2), BC, PRECISION) * b_c  # [BN, BK2]
            b_s2 = tl.where((BK + tl.arange(0, BK2) < K)[None, :], b_s2, float("-inf"))
            b_m = tl.maximum(tl.max(b_s, 1), tl.max(b_s2, 1))
            b_p = tl.exp2(b_s - b_m[:, None])
            b_p2 = tl.exp2(b_s2 - b_m[:, None])
            b_l = tl.sum(b_p, 1) + tl.sum(b_p2, 1)
            b_dp = dot_channels(b_g, b_vt, BC, PRECISION)
            b_dp2 = dot_channels(b_g, b_vt2, BC, PRECISION)
            b_delta = (tl.sum(b_p * b_dp, 1) + tl.sum(b_p2 * b_dp2, 1)) / b_l
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_ds2 = b_p2 * (b_dp2 - b_delta[:, None])
            b_dx = tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
            b_dx = tl.dot(b_ds2.to(b_k.dtype), b_k2, b_dx, input_precision=PRECISION)
        if RELOAD:
            b_g = tl.load(grad + o_g, mask=m_x, other=0.0, eviction_policy="evict_first")
        b_dx = b_g.to(tl.float32) + b_dx * (b_scale / b_l)[:, None]
        o_o = pixel_offsets(i_t, W, s_oc, s_oh, s_ow, BN, BD, LAYOUT)
        tl.store(dimage + o_o, b_dx.to(dimage.dtype.element_ty), mask=m_x)
        tl.store(lse + o_n, b_m + tl.log2(b_l), mask=m_n)
        tl.store(delta + o_n, b_delta, mask=m_n)


@triton.jit(do_not_specialize=["K", "heads", "tiles"])
def former2conv_bwd_dx_online_kernel(
    grad,
    image,
    key,
    value,
    dimage,
    lse,
    delta,
    scale,
    N,
    W,
    K,
    heads,
    tiles,
    s_gb,
    s_gc,
    s_gh,
    s_gw,
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
    """dx, lse and delta as above for any K: one pass over the tokens for lse and delta, a second one for dx."""
    i_b, i_h, i_t = program(heads, tiles)
    grad += i_b * s_gb + i_h * D * s_gc
    image += i_b * s_xb + i_h * D * s_xc
    dimage += i_b * s_ob + i_h * D * s_oc
    key += i_b * s_kb + i_h * D
    value += i_b * s_vb + i_h * D
    b_scale = tl.cast(scale, tl.float32)
    b_c = b_scale * LOG2_E

    o_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    m_x = m_n[:, None] & (tl.arange(0, BD) < D)[None, :]
    o_x = pixel_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
    o_g = pixel_offsets(i_t, W, s_gc, s_gh, s_gw, BN, BD, LAYOUT)
    b_x = tl.load(image + o_x, mask=m_x, other=0.0)  # [BN, BD]
    b_g = tl.load(grad + o_g, mask=m_x, other=0.0)  # [BN, BD]
    b_m = tl.full([BN], float("-inf"), tl.float32)
    b_l = tl.zeros([BN], tl.float32)
    b_delta = tl.zeros([BN], tl.float32)
    for i_k in range(0, K, BK):
        o_k, m_k = token_offsets(i_k, K, s_kk, D, BK, BD)
        o_v, m_v = token_offsets(i_k, K, s_vk, D, BK, BD)
        b_k = tl.load(key + o_k, mask=m_k, other=0.0)  # [BK, BD]
        b_v = tl.load(value + o_v, mask=m_v, other=0.0)  # [BK, BD]
        b_s = dot_channels(b_x, tl.trans(b_k), BC, PRECISION) * b_c  # [BN, BK]
        b_s = tl.where((i_k + tl.arange(0, BK) < K)[None, :], b_s, float("-inf"))
        b_dp = dot_channels(b_g, tl.trans(b_v), BC, PRECISION)  # [BN, BK]
        b_m, b_r, b_p = online_softmax(b_s, b_m)
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_delta = b_delta * b_r + tl.sum(b_p * b_dp, 1)
    b_lse = b_m + tl.log2(b_l)
    b_delta /= b_l

    b_dx = tl.zeros([BN, BD], tl.float32)
    for i_k in range(0, K, BK):
        o_k, m_k = token_offsets(i_k, K, s_kk, D, BK, BD)
        o_v, m_v = token_offsets(i_k, K, s_vk, D, BK, BD)
        b_k = tl.load(key + o_k, mask=m_k, other=0.0)
        b_v = tl.load(value + o_v, mask=m_v, other=0.0)
        b_s = dot_channels(b_x, tl.trans(b_k), BC, PRECISION) * b_c
        b_dp = dot_channels(b_g, tl.trans(b_v), BC, PRECISION)
        # Rows of K and V beyond the tokens are zero: so is what they add.
        b_ds = tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None])
        b_dx = tl.dot(b_ds.to(b_k.dtype), b_k, b_dx, input_precision=PRECISION)
    if RELOAD:
        b_g = tl.load(grad + o_g, mask=m_x, other=0.0, eviction_policy="evict_first")
    b_dx = b_g.to(tl.float32) + b_dx * b_scale
    o_o = pixel_offsets(i_t, W, s_oc, s_oh, s_ow, BN, BD, LAYOUT)
    tl.store(dimage + o_o, b_dx.to(dimage.dtype.element_ty), mask=m_x)
    tl.store(lse + (i_b * heads + i_h) * N + o_n, b_lse, mask=m_n)
    tl.store(delta + (i_b * heads + i_h) * N + o_n, b_delta, mask=m_n)


@triton.jit(do_not_specialize=["B", "K", "heads", "tiles", "programs", "blocks"])
def former2conv_bwd_dkv_kernel(
    grad,
    image,
    key,
    value,
    lse,
    delta,
    dkey,
    dvalue,
    scale,
    B,
    N,
    W,
    K,
    heads,
    tiles,
    programs,
    blocks,
    s_gb,
    s_gc,
    s_gh,
    s_gw,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_kb,
    s_kk,
    s_vb,
    s_vk,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    LAYOUT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK = scale dS^T x and dV = P^T g of one block of tokens over the program's tiles, [programs, B, K, C]."""
    i = tl.program_id(0)
    i_k = i % blocks * BK
    i_h = (i // blocks % heads).to(tl.int64)
    i_p = i // blocks // heads % programs
    i_b = (i // blocks // heads // programs).to(tl.int64)
    grad += i_b * s_gb + i_h * D * s_gc
    image += i_b * s_xb + i_h * D * s_xc
    key += i_b * s_kb + i_h * D
    value += i_b * s_vb + i_h * D
    lse += (i_b * heads + i_h) * N
    delta += (i_b * heads + i_h) * N
    b_scale = tl.cast(scale, tl.float32)
    b_c = b_scale * LOG2_E

    o_k, m_k = token_offsets(i_k, K, s_kk, D, BK, BD)
    o_v, m_v = token_offsets(i_k, K, s_vk, D, BK, BD)
    b_k = tl.load(key + o_k, mask=m_k, other=0.0)  # [BK, BD]
    b_v = tl.load(value + o_v, mask=m_v, other=0.0)  # [BK, BD]
    b_dk = tl.zeros([BK, BD], tl.float32)
    b_dv = tl.zeros([BK, BD], tl.float32)
    for i_t in range(i_p, tiles, programs):
        o_n = tl.cast(i_t, tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        m_x = m_n[:, None] & (tl.arange(0, BD) < D)[None, :]
        o_x = pixel_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
        o_g = pixel_offsets(i_t, W, s_gc, s_gh, s_gw, BN, BD, LAYOUT)
        b_x = tl.load(image + o_x, mask=m_x, other=0.0)  # [BN, BD]
        b_g = tl.load(grad + o_g, mask=m_x, other=0.0)  # [BN, BD]
        b_lse = tl.load(lse + o_n, mask=m_n, other=0.0)  # [BN]
        b_delta = tl.load(delta + o_n, mask=m_n, other=0.0)  # [BN]
        b_s = dot_channels(b_k, tl.trans(b_x), BC, PRECISION) * b_c  # [BK, BN]
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
        b_dp = dot_channels(b_v, tl.trans(b_g), BC, PRECISION)  # [BK, BN]
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_x.dtype), b_x, b_dk, input_precision=PRECISION)
    o_s, m_s = token_offsets(i_k, K, heads * D, D, BK, BD)
    o_s += (i_p * B + i_b) * K * heads * D + i_h * D
    tl.store(dkey + o_s, (b_dk * b_scale).to(dkey.dtype.element_ty), mask=m_s)
    tl.store(dvalue + o_s, b_dv.to(dvalue.dtype.element_ty), mask=m_s)


@triton.jit(do_not_specialize=["programs"])
def former2conv_bwd_sum_kernel(sums, dkey, dvalue, size, programs, BP: tl.constexpr, BS: tl.constexpr):
    """The sums over the programs of dK and dV, in a fixed order: [2, programs, size] to [size] each."""
    i_s = tl.program_id(1)
    sums += tl.cast(i_s, tl.int64) * programs * size
    o_s = tl.cast(tl.program_id(0), tl.int64) * BS + tl.arange(0, BS)
    m_s = o_s < size
    b_sum = tl.zeros([BS], tl.float32)
    for i_p in range(0, programs, BP):
        o_p = i_p + tl.arange(0, BP)
        m_p = (o_p < programs)[:, None] & m_s[None, :]
        b_sum += tl.sum(tl.load(sums + tl.cast(o_p, tl.int64)[:, None] * size + o_s[None, :], mask=m_p, other=0.0), 0)
    total = dkey if i_s == 0 else dvalue
    tl.store(total + o_s, b_sum.to(dkey.dtype.element_ty), mask=m_s)
