"""Score map: ``S = I T^T``, rows of unit length if asked, beside the image in one tensor if asked.

The forward divides by the norms behind the product: they come from the tiles that the product loads, and the image part
of the concatenation is what has been loaded too. The backward has a kernel for dI, which computes S again because a
pixel's gradient along itself drops out, and one for dT, whose sums over parts of the pixels a third one adds in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from torch import Tensor

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


class Setting(NamedTuple):
    """Pixels, channels and tokens of a tile; BK2 more tokens where one block is a bit too small."""

    BN: int
    BC: int
    BK: int
    BK2: int
    num_warps: int
    num_stages: int
    maxnreg: int


TILE = Setting._fields[:4]
# For each kernel and arithmetic: what serves everywhere, then what serves up to BK + BK2 tokens, few tokens first.
SETTINGS = {
    ("fwd", "half"): (
        Setting(64, 64, 64, 0, 8, 3, 255),
        Setting(64, 64, 32, 0, 4, 3, 255),
        Setting(128, 64, 64, 0, 8, 3, 255),
        Setting(128, 64, 128, 0, 8, 3, 255),
        Setting(128, 64, 128, 32, 8, 3, 255),
    ),
    ("fwd", "tf32"): (
        Setting(64, 32, 64, 0, 8, 3, 255),
        Setting(64, 32, 32, 0, 4, 3, 255),
        Setting(128, 32, 128, 32, 8, 3, 255),
    ),
    ("fwd", "ieee"): (Setting(64, 16, 64, 0, 8, 2, 255), Setting(64, 16, 32, 0, 4, 2, 255)),
    ("image", "half"): (
        Setting(64, 64, 64, 0, 8, 3, 255),
        Setting(64, 64, 32, 0, 4, 3, 255),
        Setting(64, 64, 64, 0, 8, 3, 128),
        Setting(64, 64, 128, 32, 8, 3, 128),
    ),
    ("image", "tf32"): (
        Setting(64, 32, 32, 0, 8, 3, 255),
        Setting(64, 32, 32, 0, 8, 3, 128),
        Setting(64, 32, 128, 32, 8, 3, 255),
    ),
    ("image", "ieee"): (Setting(32, 32, 32, 0, 8, 2, 255),),
    ("text", "half"): (
        Setting(64, 64, 64, 0, 8, 3, 255),
        Setting(64, 128, 32, 0, 8, 3, 128),
        Setting(64, 128, 64, 0, 8, 3, 255),
        Setting(64, 128, 128, 0, 8, 3, 255),
        Setting(64, 128, 128, 32, 8, 3, 255),
    ),
    ("text", "tf32"): (
        Setting(64, 32, 64, 0, 8, 3, 255),
        Setting(64, 32, 32, 0, 8, 3, 255),
        Setting(64, 64, 128, 32, 8, 2, 255),
    ),
    ("text", "ieee"): (Setting(16, 64, 64, 0, 8, 2, 255), Setting(16, 64, 32, 0, 4, 2, 255)),
}
# Channels that a program of the kernels over rows takes at a time, and partial sums.
ROW = {"BC": 512, "num_warps": 4, "maxnreg": 255}
SUMS = 8


class View(NamedTuple):
    """How an image lies in memory, ``strides`` being those of batch, channels, rows and pixels.

    In CHANNELS_LAST the first and the last are in units of ``vec`` elements, of which 16 bytes hold a multiple.
    """

    layout: int
    vec: int
    strides: tuple[int, int, int, int]


def view(image: Tensor, *multiples: int) -> View:
    """``multiples`` are other numbers that ``vec`` has to divide."""
    s_b, s_c, s_h, s_w = (0 if size == 1 else stride for size, stride in zip(image.shape, image.stride(), strict=True))
    channels, height, width = image.shape[1:]
    s_n = s_h if width == 1 else s_w
    if height == 1 or width == 1 or s_h == width * s_w:
        if s_c == 1 or channels == 1:
            vec = gcd(16 // image.element_size(), s_b, s_n, *multiples)
            return View(CHANNELS_LAST.value, vec, (s_b // vec, 1, 0, s_n // vec))
        if s_n == 1 or height * width == 1:
            return View(NCHW.value, 1, (s_b, s_c, 0, 1))
    return View(STRIDED.value, 1, (s_b, s_c, s_h, s_w))


def setting_of(kernel: str, kind: str, tokens: int, arch: int, access: str, idle: bool) -> Setting:
    """The launch setting.

    Args:
        kernel: ``"fwd"``, ``"image"`` or ``"text"``.
        kind: ``"half"``, ``"tf32"`` or ``"ieee"``.
        tokens: K.
        arch: 10 times the compute capability.
        access: ``"wide"``; ``"narrow"`` where an access takes one element, so that a thread needs many addresses;
            ``"strided"`` where each pixel's has to be computed.
        idle: large tiles would leave processors idle.
    """
    general, *fitted = SETTINGS[kernel, kind]
    if arch < 90 or access == "strided" or not fitted:
        return general
    if tokens <= fitted[0].BK or (idle and kernel != "image"):
        return fitted[0]
    if access == "narrow":
        return general
    enough = [setting for setting in fitted if tokens <= setting.BK + setting.BK2]
    # Else blocks of tokens, the largest there are.
    return enough[0] if enough else max((general, *(s for s in fitted if not s.BK2)), key=lambda s: s.BK)


def _access(*views: View) -> str:
    if any(v.layout == STRIDED.value for v in views):
        return "strided"
    return "narrow" if any(v.layout == CHANNELS_LAST.value and v.vec == 1 for v in views) else "wide"


def _blocks(tokens: int, setting: Setting) -> int:
    """Of tokens, a program each."""
    return 1 if tokens <= setting.BK + setting.BK2 else triton.cdiv(tokens, setting.BK)


def _precision(image: Tensor) -> str:
    tf32 = image.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _kind(image: Tensor) -> str:
    return _precision(image) if image.dtype == torch.float32 else "half"


@cache
def _processor(index: int | None) -> tuple[int, int]:
    """Of the device: architecture, 10 times the compute capability, and the number of multiprocessors."""
    if index is None:  # the interpreter's CPU
        return 90, 132
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


def _on_device(image: Tensor) -> AbstractContextManager:
    return torch.cuda.device(image.device) if image.is_cuda else nullcontext()


def _copied(text: Tensor) -> bool:
    return text.stride(2) != 1 and not text.is_contiguous()


def _rows(text: Tensor) -> Tensor:
    return text.contiguous() if _copied(text) else text


class Shares(NamedTuple):
    """How the gradient of the text is shared out: tiles of pixels, columns of channels, blocks of tokens, and the
    programs that each have a part of the tiles."""

    setting: Setting
    tiles: int
    columns: int
    blocks: int
    programs: int


def _text_shares(image: Tensor, tokens: int, g: View, arch: int, processors: int) -> Shares:
    batch, channels, height, width = image.shape

    def setting(idle: bool) -> Setting:
        return setting_of("text", _kind(image), tokens, arch, _access(g, view(image)), idle)

    # More than 8 partial sums are not worth the large tiles.
    s = setting(False)
    s = setting(8 * batch * triton.cdiv(channels, s.BC) * _blocks(tokens, s) < processors)
    tiles, columns, blocks = triton.cdiv(height * width, s.BN), triton.cdiv(channels, s.BC), _blocks(tokens, s)
    return Shares(s, tiles, columns, blocks, max(1, min(tiles, processors // (batch * columns * blocks))))


def _direct(programs: int, normalize: bool) -> bool:
    """Is what a single program adds up the gradient of the text already?"""
    return programs == 1 and not normalize


def launches(
    image: Tensor,
    text: Tensor,
    normalize: bool,
    concat: bool,
    grad: Tensor,
    processor: tuple[int, int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and a ``"copy"`` where PyTorch makes one.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result; ``processor`` is what
    ``_processor`` says, by default of the image's device.
    """
    copies = ["copy"] * _copied(text)
    g = view(grad, text.shape[1], image.shape[1] if concat else 0)
    programs = _text_shares(image, text.shape[1], g, *(processor or _processor(image.device.index))).programs
    unit = ["score_map_unit_kernel"] * normalize
    total = ["score_map_bwd_sum_kernel"] * (not _direct(programs, normalize))
    bwd = *copies, *unit, "score_map_bwd_image_kernel", "score_map_bwd_text_kernel", *total
    return {"fwd": (*copies, "score_map_fwd_kernel"), "bwd": bwd}


def score_map_fwd(image: Tensor, text: Tensor, normalize: bool, concat: bool, out: Tensor) -> None:
    """Fills ``out``, ``[B, K, H, W]`` or ``[B, C + K, H, W]``, from ``[B, C, H, W]`` and ``[B, K, C]``."""
    text = _rows(text)
    batch, channels, height, width = image.shape
    tokens, pixels = text.shape[1], height * width
    x, o = view(image), view(out, tokens, channels if concat else 0)
    arch, processors = _processor(image.device.index)

    def setting(idle: bool) -> Setting:
        return setting_of("fwd", _kind(image), tokens, arch, _access(x, o), idle)

    s = setting(False)
    s = setting(batch * triton.cdiv(pixels, s.BN) * _blocks(tokens, s) < processors)
    tiles, blocks = triton.cdiv(pixels, s.BN), _blocks(tokens, s)
    with _on_device(image):
        score_map_fwd_kernel[(batch * tiles * blocks,)](
            image,
            text,
            out,
            pixels,
            width,
            tokens // o.vec,
            channels,
            tiles,
            blocks,
            *x.strides,
            *text.stride()[:2],
            *o.strides,
            LAYOUT=x.layout,
            LAYOUT_OUT=o.layout,
            VEC=x.vec,
            VEC_OUT=o.vec,
            NORMALIZE=normalize,
            CONCAT=concat,
            PRECISION=_precision(image),
            **s._asdict(),
        )


def score_map_bwd(
    grad: Tensor, image: Tensor, text: Tensor, normalize: bool, concat: bool, dimage: Tensor, dtext: Tensor
) -> None:
    """Fills ``dimage`` and ``dtext``, of the shapes of ``image`` and ``text``; ``grad`` is that of ``out``."""
    text = _rows(text)
    g = view(grad, text.shape[1], image.shape[1] if concat else 0)
    modes = {"NORMALIZE": normalize, "CONCAT": concat, "PRECISION": _precision(image)}
    with _on_device(image):
        inverse = _bwd_image(grad, image, text, dimage, g, modes)
        _bwd_text(grad, image, text, inverse, dtext, g, modes)


def _bwd_image(grad: Tensor, image: Tensor, text: Tensor, dimage: Tensor, g: View, modes: dict) -> Tensor | None:
    """Fills ``dimage``; returns 1 / |x| of the pixels, if they are to be normalised."""
    batch, channels, height, width = image.shape
    tokens, pixels = text.shape[1], height * width
    x, o = view(image), view(dimage)
    arch, processors = _processor(image.device.index)
    unit, inverse = text, None
    if modes["NORMALIZE"]:
        unit = torch.empty(text.shape, dtype=text.dtype, device=text.device)
        inverse = torch.empty(batch, pixels, dtype=torch.float32, device=text.device)
        score_map_unit_kernel[(batch * tokens,)](text, unit, tokens, channels, *text.stride()[:2], **ROW)
    s = setting_of("image", _kind(image), tokens, arch, _access(g, x, o), False)
    tiles = triton.cdiv(pixels, s.BN)
    programs = max(1, min(triton.cdiv(channels, s.BC), processors // (batch * tiles)))
    score_map_bwd_image_kernel[(batch * tiles * programs,)](
        grad,
        image,
        unit,
        dimage,
        inverse,
        pixels,
        width,
        tokens // g.vec,
        channels,
        tiles,
        programs,
        *g.strides,
        *x.strides,
        *unit.stride()[:2],
        *o.strides,
        ONE=tokens <= s.BK + s.BK2,
        LAYOUT_GRAD=g.layout,
        LAYOUT=x.layout,
        LAYOUT_OUT=o.layout,
        VEC_GRAD=g.vec,
        VEC=x.vec,
        VEC_OUT=o.vec,
        **modes,
        **s._asdict(),
    )
    return inverse


def _bwd_text(
    grad: Tensor, image: Tensor, text: Tensor, inverse: Tensor | None, dtext: Tensor, g: View, modes: dict
) -> None:
    """Fills ``dtext``."""
    batch, channels, height, width = image.shape
    tokens, pixels = text.shape[1], height * width
    x = view(image)
    s, tiles, columns, blocks, programs = _text_shares(image, tokens, g, *_processor(image.device.index))
    direct = _direct(programs, modes["NORMALIZE"])
    sums = dtext if direct else torch.empty(programs, *dtext.shape, dtype=torch.float32, device=dtext.device)
    score_map_bwd_text_kernel[(batch * programs * blocks * columns,)](
        grad,
        image,
        inverse,
        sums,
        batch,
        pixels,
        width,
        tokens // g.vec,
        channels,
        tiles,
        programs,
        blocks,
        columns,
        *g.strides,
        *x.strides,
        LAYOUT_GRAD=g.layout,
        LAYOUT=x.layout,
        VEC_GRAD=g.vec,
        VEC=x.vec,
        **modes,
        **s._asdict(),
    )
    if not direct:
        score_map_bwd_sum_kernel[(batch * tokens,)](
            sums,
            text,
            dtext,
            batch * tokens,
            tokens,
            channels,
            programs,
            *text.stride()[:2],
            BP=SUMS,
            NORMALIZE=modes["NORMALIZE"],
            **ROW,
        )


def compile_cases() -> Iterator[Case]:
    """Every setting in each layout for which ``setting_of`` takes it; normalised and concatenated, which is most."""
    for (kernel, kind), (general, *fitted) in SETTINGS.items():
        for dtype in {"half": ("bf16", "fp16")}.get(kind, ("fp32",)):
            precision = "tf32" if kind == "tf32" else "ieee"
            for access in ("narrow", "nchw", "strided"):
                for one in (True, False) if kernel == "image" else (True,):
                    if dtype != "fp16" or access == "narrow":
                        yield _case(kernel, dtype, precision, general, access, one)
            for i, setting in enumerate(fitted):
                for access in ("narrow" if i == 0 else "wide", "nchw", "aligned"):
                    if dtype != "fp16" or access in ("narrow", "wide"):
                        yield replace(_case(kernel, dtype, precision, setting, access), archs=(90, 100))
    for dtype in ("bf16", "fp16", "fp32"):
        for kernel in (score_map_unit_kernel, score_map_bwd_sum_kernel):
            names = {"text": f"*{dtype}", "unit": f"*{dtype}", "dtext": f"*{dtype}", "partials": "*fp32"}
            constexprs = {"BC": ROW["BC"], "BP": SUMS, "NORMALIZE": True}
            constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
            signature = {name: names.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
            divisible = tuple(name for name in signature if name in (*names, "C", "s_tb", "s_tk"))
            name = f"{kernel.__name__.removeprefix('score_map_').removesuffix('_kernel')} {dtype}"
            yield Case(kernel, name, signature, constexprs, divisible, ROW["num_warps"], 3, ROW["maxnreg"])


def _case(kernel: str, dtype: str, precision: str, setting: Setting, access: str, one: bool = True) -> Case:
    """``access`` is that of out or grad: ``"narrow"``, ``"wide"`` and ``"aligned"`` are channels_last."""
    function = {"fwd": score_map_fwd_kernel, "image": score_map_bwd_image_kernel, "text": score_map_bwd_text_kernel}
    function = function[kernel]
    layout = {"nchw": NCHW, "strided": STRIDED}.get(access, CHANNELS_LAST).value
    most = 4 if dtype == "fp32" else 8
    vec = {"wide": 2, "aligned": most}.get(access, 1)
    most = most if layout == CHANNELS_LAST.value else 1
    *tile, num_warps, num_stages, maxnreg = setting
    constexprs = {
        **dict(zip(TILE, tile, strict=True)),
        **{"LAYOUT": layout, "LAYOUT_GRAD": layout, "LAYOUT_OUT": min(layout, NCHW.value)},
        **{"VEC": most, "VEC_GRAD": vec, "VEC_OUT": vec if kernel == "fwd" else most},
        **{"ONE": one, "NORMALIZE": True, "CONCAT": True, "PRECISION": precision},
    }
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    pointers = dict.fromkeys(("image", "text", "out", "grad", "dimage"), f"*{dtype}")
    pointers.update(inverse="*fp32", dtext="*fp32")
    signature = {name: pointers.get(name, "i32") for name in function.arg_names if name not in constexprs}
    divisible = [*pointers, "C", "s_tb", "s_tk"]
    if access == "nchw":
        divisible += ["N", "s_xb", "s_xc", "s_ob", "s_oc", "s_gb", "s_gc"]
    size = "x".join(map(str, tile[:3])) + (f"+{setting.BK2}" if setting.BK2 else "")
    limit = "" if maxnreg == 255 else f" {maxnreg} registers"
    return Case(
        function,
        f"{kernel} {dtype} {precision} {size} {access}" + ("" if one else " in blocks") + limit,
        signature,
        constexprs,
        tuple(name for name in signature if name in divisible),
        num_warps,
        num_stages,
        maxnreg,
    )
