"""Former2Conv: ``out = image + softmax(scale image K^T) V`` per head, forward and backward.

A program owns one head of one image and walks over tiles of pixels, while the tokens' keys and values stay on chip. Few
tokens are one or two blocks, and the softmax is exact in one pass; many are a loop with a running maximum. The backward
saves nothing, it computes the probabilities again: in one kernel for few tokens; for many, one kernel has a tile of
pixels for dx and leaves behind lse and delta, with which another has a block of tokens for dK and dV. What several
programs add up for dK and dV is summed by a kernel of its own, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from torch import Tensor

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


class Setting(NamedTuple):
    """How a kernel is launched for up to ``tokens`` tokens.

    Args:
        tokens: the most that it takes.
        BN: pixels of a tile.
        BK: tokens of a block; BK2, of a second one.
        warps: of a program.
        stages: of the loop's pipeline.
        resident: programs that a multiprocessor holds, at 255 registers a thread two of 4 warps or one of 8.
        RELOAD: the residual is loaded again, from L2, instead of being held in registers.
        BC: channels of a chunk in ``dot_channels``.
        archs: where it does not spill.
    """

    tokens: float
    BN: int
    BK: int
    BK2: int = 0
    warps: int = 4
    stages: int = 2
    resident: int = 2
    RELOAD: bool = False
    BC: int = 256
    archs: tuple[int, ...] = (80, 90, 100)


ANY = float("inf")
HOPPER_ON, HOPPER, AMPERE, BLACKWELL = (90, 100), (90,), (80,), (100,)
# By kernel, then by kind of product, which is 16 bits ("half") or either precision of fp32, and head dimension, of
# which 64 stands for all below. None spills (docs/aot.md); sm_80's fit into sm_86's 99 KiB of shared memory.
SETTINGS: dict[str, dict[tuple[str, int], tuple[Setting, ...]]] = {
    "fwd": {
        ("half", 64): (
            Setting(32, 64, 32, stages=3, resident=4),
            Setting(64, 64, 64, stages=3, resident=3),
            Setting(128, 64, 128, resident=3),
            Setting(160, 64, 128, 32),
            Setting(192, 64, 128, 64, archs=HOPPER_ON),
        ),
        ("half", 128): (Setting(32, 64, 32), Setting(64, 64, 64), Setting(128, 64, 128)),
        ("half", 256): (
            Setting(32, 64, 32, warps=8, resident=1),
            Setting(64, 64, 64, warps=8, resident=1, archs=HOPPER_ON),
        ),
        ("tf32", 64): (Setting(32, 64, 32), Setting(64, 64, 64)),
        ("tf32", 128): (Setting(32, 64, 32, warps=8, resident=1, RELOAD=True),),
    },
    "fwd online": {
        ("half", 64): (Setting(ANY, 128, 64, warps=8, archs=(80, 90)), Setting(ANY, 64, 64, archs=BLACKWELL)),
        ("half", 128): (
            Setting(ANY, 128, 64, warps=8, archs=HOPPER_ON),
            Setting(ANY, 64, 32, RELOAD=True, archs=AMPERE),
        ),
        ("half", 256): (
            Setting(ANY, 128, 32, warps=8, RELOAD=True, archs=HOPPER),
            Setting(ANY, 64, 64, warps=8, RELOAD=True, archs=BLACKWELL),
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=AMPERE),
        ),
        ("tf32", 64): (Setting(ANY, 128, 32, warps=8),),
        ("tf32", 128): (Setting(ANY, 64, 32, warps=8),),
        ("tf32", 256): (
            Setting(ANY, 64, 16, warps=8, RELOAD=True, archs=HOPPER),
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=BLACKWELL),
            Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True, archs=AMPERE),
        ),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 32, warps=8, stages=1, BC=32),),
        ("ieee", 256): (Setting(ANY, 32, 16, warps=8, stages=1, BC=16),),
    },
    "fwd strided": {
        ("half", 64): (Setting(ANY, 32, 32, warps=8, stages=1),),
        ("half", 128): (Setting(ANY, 32, 32, warps=8, stages=1),),
        ("half", 256): (Setting(ANY, 16, 16, warps=8, stages=1),),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 16, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 16, warps=8, stages=1, RELOAD=True, BC=16),),
    },
    "bwd": {
        ("half", 64): (
            Setting(32, 64, 32, stages=3, resident=3),
            Setting(64, 64, 64, archs=HOPPER_ON),
        ),
        ("half", 128): (Setting(32, 64, 32, warps=8, resident=1, archs=HOPPER_ON),),
        ("tf32", 64): (
            Setting(32, 64, 32, archs=HOPPER),
            Setting(32, 64, 32, warps=8, resident=1, archs=(80, 100)),
        ),
        ("ieee", 64): (Setting(32, 16, 32, warps=8, stages=1, RELOAD=True, BC=16),),
    },
    "bwd dx": {
        ("half", 64): (
            Setting(128, 64, 128),
            Setting(160, 128, 128, 32, warps=8, resident=1, RELOAD=True, archs=HOPPER),
        ),
        ("half", 128): (
            Setting(64, 64, 64, warps=8, resident=1, RELOAD=True),
            Setting(128, 64, 128, warps=8, resident=1, RELOAD=True, archs=HOPPER_ON),
        ),
    },
    "bwd dx online": {
        ("half", 64): (Setting(ANY, 128, 64, warps=8, archs=(80, 90)), Setting(ANY, 64, 64, archs=BLACKWELL)),
        ("half", 128): (
            Setting(ANY, 128, 64, warps=8, archs=HOPPER_ON),
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=AMPERE),
        ),
        ("half", 256): (
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=HOPPER),
            Setting(ANY, 64, 64, warps=8, RELOAD=True, archs=BLACKWELL),
            Setting(ANY, 32, 32, RELOAD=True, archs=AMPERE),
        ),
        ("tf32", 64): (Setting(ANY, 64, 32, archs=HOPPER_ON), Setting(ANY, 64, 32, warps=8, archs=AMPERE)),
        ("tf32", 128): (
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=HOPPER_ON),
            Setting(ANY, 32, 32, warps=8, RELOAD=True, archs=AMPERE),
        ),
        ("tf32", 256): (Setting(ANY, 16, 32, warps=8, stages=1, RELOAD=True),),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 16, warps=8, stages=1, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 16, warps=8, stages=1, BC=16),),
    },
    "bwd dx strided": {
        ("half", 64): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True),),
        ("half", 128): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True),),
        ("half", 256): (Setting(ANY, 16, 16, warps=8, stages=1, RELOAD=True),),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 16, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 16, warps=8, stages=1, RELOAD=True, BC=16),),
    },
    "bwd dkv": {
        ("half", 64): (
            Setting(128, 64, 128, warps=8, stages=3, resident=1, archs=HOPPER_ON),
            Setting(192, 64, 64, stages=3, archs=HOPPER_ON),
            Setting(ANY, 64, 128, warps=8, stages=3, resident=1, archs=HOPPER_ON),
            Setting(ANY, 32, 64, archs=AMPERE),
        ),
        ("half", 128): (Setting(ANY, 64, 64, warps=8, resident=1),),
        ("half", 256): (
            Setting(ANY, 64, 32, warps=8, resident=1, archs=HOPPER),
            Setting(ANY, 32, 64, warps=8, resident=1, archs=BLACKWELL),
            Setting(ANY, 32, 32, warps=8, resident=1, archs=AMPERE),
        ),
        ("tf32", 64): (Setting(ANY, 32, 64, archs=HOPPER_ON), Setting(ANY, 32, 32, archs=AMPERE)),
        ("tf32", 128): (Setting(ANY, 32, 32, warps=8, resident=1),),
        ("tf32", 256): (
            Setting(ANY, 16, 32, warps=8, stages=1, resident=1, archs=HOPPER_ON),
            Setting(ANY, 16, 16, warps=8, stages=1, resident=1, archs=AMPERE),
        ),
        ("ieee", 64): (Setting(ANY, 16, 32, warps=8, stages=1, resident=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 16, 16, warps=8, stages=1, resident=1, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 8, warps=8, stages=1, resident=1, BC=16),),
    },
    "bwd dkv strided": {
        ("half", 64): (Setting(ANY, 32, 32, warps=8, stages=1, resident=1),),
        ("half", 128): (Setting(ANY, 16, 32, warps=8, stages=1, resident=1),),
        ("half", 256): (Setting(ANY, 16, 16, warps=8, stages=1, resident=1),),
        ("ieee", 64): (Setting(ANY, 16, 16, warps=8, stages=1, resident=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 16, 8, warps=8, stages=1, resident=1, BC=32),),
        ("ieee", 256): (Setting(ANY, 16, 4, warps=8, stages=1, resident=1, BC=16),),
    },
}
# How often the programs fill the GPU: more even out its multiprocessors, and fewer load the tokens less often. What
# the backward's programs add up is written and summed once more for each of them.
WAVES, WAVES_OF_SUMS = 4, 2
SUM_PROGRAMS, SUM_ELEMENTS = 16, 128


def padded_width(width: int) -> int:
    """The head dimension as the products need it."""
    return max(16, triton.next_power_of_2(width))


def setting_of(kernel: str, kind: str, width: int, tokens: int, arch: int) -> Setting | None:
    """The first setting that takes so many tokens; ``None`` if a kernel with a loop over them must."""
    for setting in SETTINGS[kernel].get((kind, max(64, padded_width(width))), ()):
        if tokens <= setting.tokens and arch in setting.archs:
            return setting
    return None


def programs_of(tiles: int, rows: int, slots: int) -> int:
    """Among how many programs the tiles of each row, a head of an image, are shared out, to fill so many slots."""
    return min(tiles, max(1, slots // rows))


def strides_of(image: Tensor) -> tuple[int, int, int, int]:
    """Strides of ``[B, C, H, W]`` as ``pixel_offsets`` has them; those that nothing depends on are 0."""
    batch, _, height, width = image.shape
    s_b, s_c, s_h, s_w = image.stride()
    s_w = s_w if width > 1 else s_h
    return s_b if batch > 1 else 0, s_c, s_h, s_w if height * width > 1 else 0


def layout_of(image: Tensor, heads: int) -> str:
    """ "channels_last" or "nchw" where 16 bytes can be loaded at once, else "strided", which takes any strides."""
    _, channels, height, width = image.shape
    s_b, s_c, s_h, s_w = strides_of(image)
    rows_apart = height > 1 and width > 1 and s_h != width * s_w
    if rows_apart or image.data_ptr() % 16 or s_b % 16 or channels % 16 or channels // heads % 8:
        return "strided"
    if s_c == 1 and s_w % 16 == 0:
        return "channels_last"
    # Offsets within a tile have 32 bits.
    if s_w == 1 and s_c % 16 == 0 and height * width % 16 == 0 and channels // heads * s_c < 2**31:
        return "nchw"
    return "strided"


def _layout(heads: int, *images: Tensor) -> str:
    """The layout that they share; what a kernel has to know of two takes registers that it needs for the tokens."""
    layouts = {layout_of(image, heads) for image in images}
    return layouts.pop() if len(layouts) == 1 else "strided"


def _row_strides(tokens: Tensor) -> tuple[int, int]:
    return tokens.stride(0) if tokens.shape[0] > 1 else 0, tokens.stride(1) if tokens.shape[1] > 1 else 0


def _copied(tokens: Tensor) -> bool:
    """Are its channels not side by side, or not aligned?"""
    unit = 1 if tokens.shape[2] % 16 else 16
    return tokens.stride(2) != 1 or any(number % unit for number in (*_row_strides(tokens), tokens.data_ptr()))


def _rows(tokens: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """``[B, K, C]``, its channels side by side and aligned, copied if need be: it is small; and its first strides."""
    if not _copied(tokens):
        return tokens, _row_strides(tokens)
    _, count, channels = tokens.shape
    return tokens.clone(memory_format=torch.contiguous_format), (count * channels, channels)


def _kind(dtype: torch.dtype, layout: str) -> str:
    if dtype != torch.float32:
        return "half"
    # Not ``allow_tf32``: reading that raises where the newer setting is in use.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and layout != "strided" else "ieee"


@lru_cache
def _device(device: torch.device) -> tuple[int, int]:
    """The architecture whose settings hold, and the number of multiprocessors."""
    if device.type != "cuda":
        return 90, 1
    properties = torch.cuda.get_device_properties(device)
    return {9: 90, 10: 100}.get(properties.major, 80), properties.multi_processor_count


def _on(image: Tensor) -> AbstractContextManager:
    return torch.cuda.device(image.device) if image.is_cuda else nullcontext()


def _options(setting: Setting, kind: str, width: int, **more: object) -> dict[str, object]:
    """The constexprs that all kernels have, and what Triton takes besides."""
    return {
        "D": width,
        "BN": setting.BN,
        "BD": padded_width(width),
        "BK": setting.BK,
        "BC": setting.BC,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "num_warps": setting.warps,
        "num_stages": setting.stages,
        **more,
    }


class Choice(NamedTuple):
    """A kernel by its name in ``SETTINGS``, and among how many programs the tiles of a row are shared out."""

    name: str
    setting: Setting
    tiles: int
    programs: int


def _choose_fwd(image: Tensor, count: int, heads: int, layout: str, arch: int, processors: int) -> Choice:
    batch, channels, height, width = image.shape
    kind, head, size = _kind(image.dtype, layout), channels // heads, height * width
    fast = layout != "strided"
    setting = setting_of("fwd", kind, head, count, arch) if fast else None
    if setting:
        tiles = triton.cdiv(size, setting.BN)
        programs = programs_of(tiles, batch * heads, WAVES * processors * setting.resident)
        return Choice("fwd", setting, tiles, programs)
    name = "fwd online" if fast else "fwd strided"
    setting = setting_of(name, kind, head, count, arch)
    tiles = triton.cdiv(size, setting.BN)
    return Choice(name, setting, tiles, tiles)


def _choose_bwd(image: Tensor, count: int, heads: int, layout: str, arch: int, processors: int) -> list[Choice]:
    """One kernel for few tokens; for many two, of which the last adds up the tokens' gradients."""
    batch, channels, height, width = image.shape
    kind, head, size, rows = _kind(image.dtype, layout), channels // heads, height * width, batch * heads
    fast = layout != "strided"
    setting = setting_of("bwd", kind, head, count, arch) if fast else None
    if setting:
        tiles = triton.cdiv(size, setting.BN)
        return [Choice("bwd", setting, tiles, programs_of(tiles, rows, WAVES_OF_SUMS * processors * setting.resident))]
    setting = setting_of("bwd dx", kind, head, count, arch) if fast else None
    if setting:
        tiles = triton.cdiv(size, setting.BN)
        dx = Choice("bwd dx", setting, tiles, programs_of(tiles, rows, WAVES * processors * setting.resident))
    else:
        name = "bwd dx online" if fast else "bwd dx strided"
        setting = setting_of(name, kind, head, count, arch)
        tiles = triton.cdiv(size, setting.BN)
        dx = Choice(name, setting, tiles, tiles)
    name = "bwd dkv" if fast else "bwd dkv strided"
    setting = setting_of(name, kind, head, count, arch)
    tiles, blocks = triton.cdiv(size, setting.BN), triton.cdiv(count, setting.BK)
    programs = programs_of(tiles, rows * blocks, WAVES_OF_SUMS * processors * setting.resident)
    return [dx, Choice(name, setting, tiles, programs)]


def launches(
    image: Tensor, key: Tensor, value: Tensor, heads: int, grad: Tensor, device: tuple[int, int] | None = None
) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and a ``"copy"`` where PyTorch makes one.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result, which is taken to lie as
    densely as it can, in channels_last if the channels of the image are side by side, and ``dimage`` so too.
    ``device`` is what ``_device`` says, by default of the image's.
    """
    last = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format
    dense = torch.empty(image.shape, dtype=image.dtype, device="meta", memory_format=last)
    given = key.shape[1], heads
    device = device or _device(image.device)
    copies = ["copy"] * (_copied(key) + _copied(value))
    fwd = _choose_fwd(image, *given, _layout(heads, image, dense), *device)
    bwd = _choose_bwd(image, *given, _layout(heads, grad, image, dense), *device)
    total = ["former2conv_bwd_sum_kernel"] * (bwd[-1].programs > 1)
    return {
        "fwd": (*copies, KERNELS[fwd.name].__name__),
        "bwd": (*copies, *(KERNELS[choice.name].__name__ for choice in bwd), *total),
    }


def former2conv_fwd(image: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, out: Tensor) -> None:
    """Fills ``out`` ``[B, C, H, W]``."""
    batch, channels, height, width = image.shape
    size, count, head = height * width, key.shape[1], channels // heads
    layout = _layout(heads, image, out)
    kind = _kind(image.dtype, layout)
    name, setting, tiles, programs = _choose_fwd(image, count, heads, layout, *_device(image.device))
    with _on(image):
        (key, key_strides), (value, value_strides) = _rows(key), _rows(value)
        strides = *strides_of(image), *key_strides, *value_strides, *strides_of(out)
        if name == "fwd":
            options = _options(setting, kind, head, LAYOUT=layout, RELOAD=setting.RELOAD, BK2=setting.BK2)
            former2conv_fwd_kernel[(batch * heads * programs,)](
                *(image, key, value, out, scale, size, width, count, heads, tiles, programs), *strides, **options
            )
        else:
            options = _options(setting, kind, head, LAYOUT=layout, RELOAD=setting.RELOAD)
            former2conv_fwd_online_kernel[(batch * heads * tiles,)](
                *(image, key, value, out, scale, size, width, count, heads, tiles), *strides, **options
            )


def former2conv_bwd(
    grad: Tensor,
    image: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    dimage: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """Fills ``dimage`` ``[B, C, H, W]``, ``dkey`` and ``dvalue`` ``[B, K, C]``, which are contiguous."""
    batch, channels, height, width = image.shape
    size, count, head = height * width, key.shape[1], channels // heads
    layout = _layout(heads, grad, image, dimage)
    kind, rows = _kind(image.dtype, layout), batch * heads
    *first, (name, setting, tiles, programs) = _choose_bwd(image, count, heads, layout, *_device(image.device))
    with _on(image):
        (key, key_strides), (value, value_strides) = _rows(key), _rows(value)
        strides = *strides_of(grad), *strides_of(image), *key_strides, *value_strides
        sums = _sums(dkey, dvalue, programs)
        if name == "bwd":
            former2conv_bwd_kernel[(rows * programs,)](
                *(grad, image, key, value, dimage, *sums, scale),
                *(batch, size, width, count, heads, tiles, programs, *strides, *strides_of(dimage)),
                **_options(setting, kind, head, LAYOUT=layout, RELOAD=setting.RELOAD),
            )
        else:
            lse, delta = torch.empty((2, batch, heads, size), dtype=torch.float32, device=image.device)
            inputs = grad, image, key, value
            dx = first[0]
            if dx.name == "bwd dx":
                former2conv_bwd_dx_kernel[(rows * dx.programs,)](
                    *(*inputs, dimage, lse, delta, scale, size, width, count, heads, dx.tiles, dx.programs),
                    *(*strides, *strides_of(dimage)),
                    **_options(dx.setting, kind, head, LAYOUT=layout, RELOAD=dx.setting.RELOAD, BK2=dx.setting.BK2),
                )
            else:
                former2conv_bwd_dx_online_kernel[(rows * dx.tiles,)](
                    *(*inputs, dimage, lse, delta, scale, size, width, count, heads, dx.tiles),
                    *(*strides, *strides_of(dimage)),
                    **_options(dx.setting, kind, head, LAYOUT=layout, RELOAD=dx.setting.RELOAD),
                )
            blocks = triton.cdiv(count, setting.BK)
            former2conv_bwd_dkv_kernel[(rows * blocks * programs,)](
                *(*inputs, lse, delta, *sums, scale),
                *(batch, size, width, count, heads, tiles, programs, blocks, *strides),
                **_options(setting, kind, head, LAYOUT=layout),
            )
        if programs > 1:
            grid = triton.cdiv(dkey.numel(), SUM_ELEMENTS), 2
            former2conv_bwd_sum_kernel[grid](
                *(sums, dkey, dvalue, dkey.numel(), programs), BP=SUM_PROGRAMS, BS=SUM_ELEMENTS, num_warps=4
            )


def _sums(dkey: Tensor, dvalue: Tensor, programs: int) -> Tensor | tuple[Tensor, Tensor]:
    """What the programs write their sums to, ``[2, programs, B, K, C]``; a single program writes the result."""
    if programs == 1:
        return dkey, dvalue
    return torch.empty((2, programs, *dkey.shape), dtype=torch.float32, device=dkey.device)


KERNELS = {
    "fwd": former2conv_fwd_kernel,
    "fwd online": former2conv_fwd_online_kernel,
    "fwd strided": former2conv_fwd_online_kernel,
    "bwd": former2conv_bwd_kernel,
    "bwd dx": former2conv_bwd_dx_kernel,
    "bwd dx online": former2conv_bwd_dx_online_kernel,
    "bwd dx strided": former2conv_bwd_dx_online_kernel,
    "bwd dkv": former2conv_bwd_dkv_kernel,
    "bwd dkv strided": former2conv_bwd_dkv_kernel,
}


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for kernel, table in SETTINGS.items():
        for (kind, width), settings in table.items():
            for setting in settings:
                if kernel.endswith("strided"):
                    yield _case(kernel, kind, "bf16" if kind == "half" else "fp32", width - 1, setting, "strided")
                    continue
                for layout in ("channels_last", "nchw"):
                    yield _case(kernel, kind, "bf16" if kind == "half" else "fp32", width, setting, layout)
                if (kind, width) == ("half", 64):
                    yield _case(kernel, kind, "fp16", 64, setting, "channels_last")
                    yield _case(kernel, kind, "bf16", 32, setting, "channels_last")
                    yield _case(kernel, kind, "bf16", 16, setting, "channels_last")
    for dtype in ("bf16", "fp32"):
        types = {"sums": "*fp32", "dkey": f"*{dtype}", "dvalue": f"*{dtype}", "size": "i32", "programs": "i32"}
        blocks = {"BP": SUM_PROGRAMS, "BS": SUM_ELEMENTS}
        divisible = "sums", "dkey", "dvalue", "size"
        yield Case(former2conv_bwd_sum_kernel, f"bwd sum {dtype}", types, blocks, divisible, num_warps=4)


def _case(name: str, kind: str, dtype: str, width: int, setting: Setting, layout: str) -> Case:
    kernel = KERNELS[name]
    options = _options(setting, kind, width, LAYOUT=layout, RELOAD=setting.RELOAD, BK2=setting.BK2)
    unit = {"channels_last": ("s_xc", "s_gc", "s_oc"), "nchw": ("s_xw", "s_gw", "s_ow"), "strided": ()}[layout]
    constexprs = {key: value for key, value in {**options, **dict.fromkeys(unit, 1)}.items() if key in kernel.arg_names}
    pointers = dict.fromkeys(("image", "key", "value", "out", "grad", "dimage"), f"*{dtype}")
    # Sums, but for fp16, which stands for a single program.
    pointers |= dict.fromkeys(("dkey", "dvalue"), "*fp16" if dtype == "fp16" else "*fp32")
    pointers |= {"lse": "*fp32", "delta": "*fp32"}
    types = {param.name: "i32" for param in kernel.params} | pointers | {"scale": "fp32"}
    odd = {"channels_last": {"N", "W"}, "nchw": {"W"}, "strided": set(types) - {"lse", "delta"}}[layout] | {"scale"}
    free = {param.name for param in kernel.params if param.do_not_specialize}
    return Case(
        kernel,
        f"{name} {kind if kind != 'half' else dtype} {width} K<={setting.tokens} {layout} {setting.archs[0]}",
        {key: types[key] for key in kernel.arg_names if key not in constexprs},
        constexprs,
        tuple(key for key in kernel.arg_names if key not in constexprs and key not in odd and key not in free),
        num_warps=setting.warps,
        num_stages=setting.stages,
        archs=setting.archs,
    )
