"""Conv2Former: ``out = softmax(scale Q X^T) X`` per head, forward and backward.

X are the tokens of the image, keys and values at once: a tile of them is loaded once for both products. The forward
walks over the tiles with a running maximum. Few queries and many tokens are too few programs for a GPU: then several
share a block of queries, and a second kernel joins what they found. The backward has two kernels, one with a block of
queries and a loop over the tokens for dQ, one with a tile of tokens and a loop over the queries, which adds the
gradients as key and as value in one accumulator. Where one tile has all tokens the latter does it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from torch import Tensor
from triton.runtime.jit import JITFunction

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def program(heads, blocks, splits):
    """Neighbouring programs take the heads of the same tokens. Returns batch, split, block and head."""
    i = tl.program_id(0)
    i_b = (i // heads // blocks // splits).to(tl.int64)
    return i_b, i // heads // blocks % splits, i // heads % blocks, (i % heads).to(tl.int64)


@triton.jit
def query_offsets(i_q, s_k, BQ: tl.constexpr, BD: tl.constexpr):
    """Offsets of block ``i_q`` of the queries within a head, int64. [BQ, BD]"""
    return (i_q * BQ + tl.arange(0, BQ)).to(tl.int64)[:, None] * s_k + tl.arange(0, BD)[None, :]


@triton.jit
def token_offsets(i_t, W, s_c, s_h, s_w, BN: tl.constexpr, BD: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of tile ``i_t`` of the tokens within a head, int64. [BN, BD]

    ``s_w`` is the stride between tokens, unless they are "strided": then rows may lie anywhere.
    """
    i_n = tl.cast(i_t, tl.int64) * BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD).to(tl.int64)
    if LAYOUT == "channels_last":
        return (i_n + o_n)[:, None] * s_w + o_d[None, :]
    elif LAYOUT == "nchw":
        return (i_n + o_n)[:, None] + o_d[None, :] * s_c
    else:
        o_w = (i_n % W).to(tl.int32) + o_n
        o_n = (i_n // W + o_w // W) * s_h + (o_w % W).to(tl.int64) * s_w
        return o_n[:, None] + o_d[None, :] * s_c


@triton.jit(do_not_specialize=["B", "W", "K", "heads", "blocks", "splits", "run"])
def conv2former_fwd_kernel(
    query,
    tokens,
    out,
    lse,
    peak,
    scale,
    B,
    N,
    W,
    K,
    heads,
    blocks,
    splits,
    run,
    s_qb,
    s_qk,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_ob,
    s_ok,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = P X with P = softmax(scale Q X^T), and lse = log2 sum_n exp(scale q x_n), [B, heads, K].

    With SPLIT of the program's ``run`` tiles only: the maximum m of scale log2(e) q x_n into peak, l = sum_n 2^(. - m)
    into lse, both [splits, B, heads, K], and sum_n 2^(. - m) x_n into out, [splits, B, K, C].
    """
    i_b, i_s, i_q, i_h = program(heads, blocks, splits)
    query += i_b * s_qb + i_h * D
    tokens += i_b * s_xb + i_h * D * s_xc
    out += (tl.cast(i_s, tl.int64) * B + i_b) * s_ob + i_h * D
    lse += ((tl.cast(i_s, tl.int64) * B + i_b) * heads + i_h) * K
    b_c = tl.cast(scale, tl.float32) * LOG2_E

    m_d = tl.arange(0, BD) < D
    o_k = i_q * BQ + tl.arange(0, BQ)
    m_k = o_k < K
    m_q = m_k[:, None] & m_d[None, :]
    b_q = tl.load(query + query_offsets(i_q, s_qk, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
    b_m = tl.full([BQ], float("-inf"), tl.float32)
    b_l = tl.zeros([BQ], tl.float32)
    b_o = tl.zeros([BQ, BD], tl.float32)
    for i_t in range(i_s * run, tl.minimum((i_s + 1) * run, tl.cdiv(N, BN))):
        m_n = i_t * BN + tl.arange(0, BN) < N
        o_x = token_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
        b_x = tl.load(tokens + o_x, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_x), input_precision=PRECISION) * b_c  # [BQ, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row may be -inf so far, and finite in a later tile.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_r = tl.exp2(b_m - b_shift)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_x.dtype), b_x, b_o * b_r[:, None], input_precision=PRECISION)
        b_m = b_new

    o_o = query_offsets(i_q, s_ok, BQ, BD)
    if SPLIT:
        tl.store(out + o_o, b_o, mask=m_q)
        tl.store(lse + o_k, b_l, mask=m_k)
        tl.store(peak + ((tl.cast(i_s, tl.int64) * B + i_b) * heads + i_h) * K + o_k, b_m, mask=m_k)
    else:
        tl.store(out + o_o, (b_o / b_l[:, None]).to(out.dtype.element_ty), mask=m_q)
        tl.store(lse + o_k, b_m + tl.log2(b_l), mask=m_k)


@triton.jit(do_not_specialize=["B", "K", "heads", "blocks", "splits"])
def conv2former_fwd_join_kernel(
    partial,
    mass,
    peak,
    out,
    lse,
    B,
    K,
    heads,
    blocks,
    splits,
    s_pb,
    s_pk,
    s_ob,
    s_ok,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BD: tl.constexpr,
):
    """out and lse from what the splits left, in a fixed order."""
    i_b, _, i_q, i_h = program(heads, blocks, 1)
    partial += i_b * s_pb + i_h * D
    mass += (i_b * heads + i_h) * K
    peak += (i_b * heads + i_h) * K
    o_k = i_q * BQ + tl.arange(0, BQ)
    m_k = o_k < K
    m_q = m_k[:, None] & (tl.arange(0, BD) < D)[None, :]
    o_p = query_offsets(i_q, s_pk, BQ, BD)

    b_m = tl.full([BQ], float("-inf"), tl.float32)
    for i_s in range(0, splits):
        i_row = tl.cast(i_s, tl.int64) * B * heads * K
        b_m = tl.maximum(b_m, tl.load(peak + i_row + o_k, mask=m_k, other=float("-inf")))
    b_shift = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_l = tl.zeros([BQ], tl.float32)
    b_o = tl.zeros([BQ, BD], tl.float32)
    for i_s in range(0, splits):
        i_row = tl.cast(i_s, tl.int64) * B * heads * K
        b_r = tl.exp2(tl.load(peak + i_row + o_k, mask=m_k, other=float("-inf")) - b_shift)
        b_l += tl.load(mass + i_row + o_k, mask=m_k, other=0.0) * b_r
        b_o += (
            tl.load(partial + tl.cast(i_s, tl.int64) * B * s_pb + o_p, mask=m_q, other=0.0) * b_r[:, None]
        )  # [BQ, BD]

    o_o = i_b * s_ob + i_h * D + query_offsets(i_q, s_ok, BQ, BD)
    tl.store(out + o_o, (b_o / b_l[:, None]).to(out.dtype.element_ty), mask=m_q)
    tl.store(lse + (i_b * heads + i_h) * K + o_k, b_m + tl.log2(b_l), mask=m_k)


@triton.jit(do_not_specialize=["B", "W", "K", "heads", "blocks", "splits", "run"])
def conv2former_bwd_dq_kernel(
    grad,
    query,
    tokens,
    out,
    lse,
    delta,
    dquery,
    scale,
    B,
    N,
    W,
    K,
    heads,
    blocks,
    splits,
    run,
    s_gb,
    s_gk,
    s_qb,
    s_qk,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_ob,
    s_ok,
    s_db,
    s_dk,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P = exp(scale Q X^T - lse),  dP = g X^T,  delta = sum_c g out,  dS = P (dP - delta)  and  dQ = scale dS X.

    dQ is that of the program's ``run`` tiles, [splits, B, K, C]; delta is [B, heads, K].
    """
    i_b, i_s, i_q, i_h = program(heads, blocks, splits)
    grad += i_b * s_gb + i_h * D
    query += i_b * s_qb + i_h * D
    tokens += i_b * s_xb + i_h * D * s_xc
    out += i_b * s_ob + i_h * D
    dquery += (tl.cast(i_s, tl.int64) * B + i_b) * s_db + i_h * D
    b_scale = tl.cast(scale, tl.float32)
    b_c = b_scale * LOG2_E

    m_d = tl.arange(0, BD) < D
    o_k = i_q * BQ + tl.arange(0, BQ)
    m_k = o_k < K
    m_q = m_k[:, None] & m_d[None, :]
    b_g = tl.load(grad + query_offsets(i_q, s_gk, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
    b_o = tl.load(out + query_offsets(i_q, s_ok, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)  # [BQ]
    b_q = tl.load(query + query_offsets(i_q, s_qk, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
    o_row = (i_b * heads + i_h) * K + o_k
    b_lse = tl.load(lse + o_row, mask=m_k, other=0.0)  # [BQ]
    b_dq = tl.zeros([BQ, BD], tl.float32)
    for i_t in range(i_s * run, tl.minimum((i_s + 1) * run, tl.cdiv(N, BN))):
        m_n = i_t * BN + tl.arange(0, BN) < N
        o_x = token_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
        b_x = tl.load(tokens + o_x, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_x), input_precision=PRECISION) * b_c  # [BQ, BN]
        b_dp = tl.dot(b_g, tl.trans(b_x), input_precision=PRECISION)  # [BQ, BN]
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_x.dtype), b_x, b_dq, input_precision=PRECISION)

    o_d = query_offsets(i_q, s_dk, BQ, BD)
    tl.store(dquery + o_d, (b_dq * b_scale).to(dquery.dtype.element_ty), mask=m_q)
    if i_s == 0:
        tl.store(delta + o_row, b_delta, mask=m_k)


@triton.jit(do_not_specialize=["W", "K", "heads", "tiles"])
def conv2former_bwd_dx_kernel(
    grad,
    query,
    tokens,
    out,
    lse,
    delta,
    dquery,
    dtokens,
    scale,
    N,
    W,
    K,
    heads,
    tiles,
    s_gb,
    s_gk,
    s_qb,
    s_qk,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_ob,
    s_ok,
    s_db,
    s_dk,
    s_yb,
    s_yc,
    s_yw,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    LAYOUT: tl.constexpr,
    LAYOUT_OUT: tl.constexpr,
    ALONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX = scale dS^T Q + P^T g  of one tile of tokens, with P and dS as above and delta from there.

    With ALONE the tile has all tokens, and so delta and dQ are computed here too.
    """
    i_b, _, i_t, i_h = program(heads, tiles, 1)
    grad += i_b * s_gb + i_h * D
    query += i_b * s_qb + i_h * D
    tokens += i_b * s_xb + i_h * D * s_xc
    out += i_b * s_ob + i_h * D
    lse += (i_b * heads + i_h) * K
    delta += (i_b * heads + i_h) * K
    dquery += i_b * s_db + i_h * D
    dtokens += i_b * s_yb + i_h * D * s_yc
    b_scale = tl.cast(scale, tl.float32)
    b_c = b_scale * LOG2_E

    m_d = tl.arange(0, BD) < D
    m_n = i_t * BN + tl.arange(0, BN) < N
    m_x = m_n[:, None] & m_d[None, :]
    o_x = token_offsets(i_t, W, s_xc, s_xh, s_xw, BN, BD, LAYOUT)
    b_x = tl.load(tokens + o_x, mask=m_x, other=0.0)  # [BN, BD]
    b_dx = tl.zeros([BN, BD], tl.float32)
    for i_q in range(0, tl.cdiv(K, BQ)):
        o_k = i_q * BQ + tl.arange(0, BQ)
        m_k = o_k < K
        m_q = m_k[:, None] & m_d[None, :]
        b_g = tl.load(grad + query_offsets(i_q, s_gk, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
        b_q = tl.load(query + query_offsets(i_q, s_qk, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
        b_lse = tl.load(lse + o_k, mask=m_k, other=0.0)  # [BQ]
        if ALONE:
            b_o = tl.load(out + query_offsets(i_q, s_ok, BQ, BD), mask=m_q, other=0.0)  # [BQ, BD]
            b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)  # [BQ]
        else:
            b_delta = tl.load(delta + o_k, mask=m_k, other=0.0)  # [BQ]
        # Rows of Q and g beyond the queries are zero: so is what they add.
        b_s = tl.dot(b_x, tl.trans(b_q), input_precision=PRECISION) * b_c  # [BN, BQ]
        b_dp = tl.dot(b_x, tl.trans(b_g), input_precision=PRECISION)  # [BN, BQ]
        b_p = tl.exp2(b_s - b_lse[None, :])
        if ALONE:
            b_p = tl.where(m_n[:, None], b_p, 0.0)
        b_dx = tl.dot(b_p.to(b_g.dtype), b_g, b_dx, input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :]) * b_scale).to(b_x.dtype)
        b_dx = tl.dot(b_ds, b_q, b_dx, input_precision=PRECISION)
        if ALONE:
            b_dq = tl.dot(tl.trans(b_ds), b_x, input_precision=PRECISION)  # [BQ, BD]
            o_d = query_offsets(i_q, s_dk, BQ, BD)
            tl.store(dquery + o_d, b_dq.to(dquery.dtype.element_ty), mask=m_q)
    o_y = token_offsets(i_t, W, s_yc, 0, s_yw, BN, BD, LAYOUT_OUT)
    tl.store(dtokens + o_y, b_dx.to(dtokens.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["splits"])
def conv2former_bwd_sum_kernel(partial, dquery, size, splits, BS: tl.constexpr):
    """Sum over the splits, in a fixed order: [splits, size] to [size]."""
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    b_sum = tl.zeros([BS], tl.float32)
    for i_s in range(0, splits):
        b_sum += tl.load(partial + tl.cast(i_s, tl.int64) * size + o_s, mask=o_s < size, other=0.0)
    tl.store(dquery + o_s, b_sum.to(dquery.dtype.element_ty), mask=o_s < size)


class Tile(NamedTuple):
    """Launch setting: queries and tokens of a tile, warps of a program, stages of the loop's pipeline."""

    queries: int
    tokens: int
    warps: int
    stages: int


class Setting(NamedTuple):
    """Of the three kernels with products in them."""

    fwd: Tile
    dq: Tile
    dx: Tile


# By the products' kind and the padded width of a head. The first side of a product fills the tensor cores of sm_90 from
# 64 on: queries in fwd and dq, tokens in dx. "ieee" is fp32 without tf32, which has no tensor cores and its operands in
# registers; "odd" are tokens without accesses of 16 bytes, of which every element has an address in a register.
SETTINGS = {
    ("half", 16): Setting(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    ("half", 32): Setting(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    ("half", 64): Setting(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    ("half", 128): Setting(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)),
    ("half", 256): Setting(Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("tf32", 16): Setting(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    ("tf32", 32): Setting(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    ("tf32", 64): Setting(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    ("tf32", 128): Setting(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("tf32", 256): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2)),
    ("ieee", 16): Setting(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ieee", 32): Setting(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ieee", 64): Setting(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ieee", 128): Setting(Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)),
    ("ieee", 256): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2)),
    ("odd half", 16): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 32): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 64): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 128): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 256): Setting(Tile(32, 16, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd fp32", 16): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 32): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 64): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 128): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 256): Setting(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# A split costs another kernel, which takes as long as a few tiles.
MIN_RUN = 4
# Queries of a program that joins splits, elements of one that adds them.
JOIN_QUERIES, SUM_ELEMENTS = 16, 512


def padded_width(width: int) -> int:
    """Of a head, as a tile has it."""
    return max(16, triton.next_power_of_2(width))


def run_length(programs: int, tiles: int) -> int:
    """How many of its tiles a program walks over: all, if there are programs enough."""
    splits = max(1, min(PROGRAMS // programs, tiles // MIN_RUN))
    return triton.cdiv(tiles, splits)


def _layout(tokens: Tensor) -> tuple[str, tuple[int, int, int, int]]:
    """The layout's name and the strides as ``token_offsets`` has them."""
    _, _, h, w = tokens.shape
    s_b, s_c, s_h, s_w = tokens.stride()
    s_n = s_h if w == 1 else s_w
    if h == 1 or s_h == w * s_n:
        if s_c == 1:
            return "channels_last", (s_b, s_c, s_h, s_n)
        if s_n == 1:
            return "nchw", (s_b, s_c, s_h, s_n)
    return "strided", (s_b, s_c, s_h, s_w)


def kind_of(tokens: Tensor, width: int) -> str:
    """Which products the launch settings are for, with heads of ``width`` channels."""
    layout, (_, s_c, _, s_w) = _layout(tokens)
    odd = {"channels_last": s_w, "nchw": s_c, "strided": 1}[layout] % 16 > 0 or width % 16 > 0
    if tokens.dtype == torch.float32:
        return "odd fp32" if odd else _precision(tokens)
    return "odd half" if odd else "half"


def _precision(tokens: Tensor) -> str:
    """Of fp32 products."""
    return "tf32" if tokens.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _copied(tensor: Tensor) -> bool:
    return tensor.stride(2) != 1 and not tensor.is_contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """``[B, K, C]`` with the channels of a token side by side; what is as small as text may be copied."""
    return tensor.contiguous() if _copied(tensor) else tensor


def _shares(query: Tensor, tokens: Tensor, heads: int, tile: Tile) -> tuple[int, int, int]:
    """Blocks of queries, tiles that a program walks over, and programs that share a block."""
    blocks = triton.cdiv(query.shape[1], tile.queries)
    tiles = triton.cdiv(tokens.shape[2] * tokens.shape[3], tile.tokens)
    run = run_length(query.shape[0] * heads * blocks, tiles)
    return blocks, run, triton.cdiv(tiles, run)


def _alone(tiles: int, kind: str) -> bool:
    """Does one kernel do the whole backward? For the other kinds a fifth product is too much for the registers."""
    return tiles == 1 and kind == "half"


def launches(query: Tensor, tokens: Tensor, heads: int, grad: Tensor) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and a ``"copy"`` where PyTorch makes one.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result.
    """
    width = tokens.shape[1] // heads
    kind = kind_of(tokens, width)
    setting = SETTINGS[kind, padded_width(width)]
    tiles = triton.cdiv(tokens.shape[2] * tokens.shape[3], setting.dx.tokens)
    fwd = [*["copy"] * _copied(query), "conv2former_fwd_kernel"]
    if _shares(query, tokens, heads, setting.fwd)[2] > 1:
        fwd.append("conv2former_fwd_join_kernel")
    bwd = ["copy"] * (_copied(grad) + _copied(query))
    if not _alone(tiles, kind):
        bwd.append("conv2former_bwd_dq_kernel")
        if _shares(query, tokens, heads, setting.dq)[2] > 1:
            bwd.append("conv2former_bwd_sum_kernel")
    return {"fwd": tuple(fwd), "bwd": (*bwd, "conv2former_bwd_dx_kernel")}


def _device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def conv2former_fwd(query: Tensor, tokens: Tensor, heads: int, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` ``[B, K, C]`` and ``lse`` ``[B, heads, K]`` fp32, which the backward needs."""
    batch, count, channels = query.shape
    size, width = tokens.shape[2] * tokens.shape[3], channels // heads
    layout, strides = _layout(tokens)
    kind = kind_of(tokens, width)
    tile = SETTINGS[kind, padded_width(width)].fwd
    blocks, run, splits = _shares(query, tokens, heads, tile)
    head = {"D": width, "BD": padded_width(width)}
    with _device_of(tokens):
        query = _rows(query)
        result, mass, peak = out, lse, lse
        if splits > 1:
            result = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
            mass, peak = torch.empty((2, splits, *lse.shape), dtype=torch.float32, device=out.device)
        conv2former_fwd_kernel[(batch * splits * blocks * heads,)](
            *(query, tokens, result, mass, peak, scale),
            *(batch, size, tokens.shape[3], count, heads, blocks, splits, run),
            *(*query.stride()[:2], *strides, *result.stride()[-3:-1]),
            **head,
            BQ=tile.queries,
            BN=tile.tokens,
            LAYOUT=layout,
            SPLIT=splits > 1,
            PRECISION=_precision(tokens),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if splits > 1:
            blocks = triton.cdiv(count, JOIN_QUERIES)
            conv2former_fwd_join_kernel[(batch * blocks * heads,)](
                *(result, mass, peak, out, lse, batch, count, heads, blocks, splits),
                *(*result.stride()[-3:-1], *out.stride()[:2]),
                **head,
                BQ=JOIN_QUERIES,
                num_warps=4,
            )


def conv2former_bwd(
    grad: Tensor,
    query: Tensor,
    tokens: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    dquery: Tensor,
    dtokens: Tensor,
) -> None:
    """Fills ``dquery`` ``[B, K, C]`` and ``dtokens`` ``[B, C, h, w]``."""
    batch, count, channels = query.shape
    size, width = tokens.shape[2] * tokens.shape[3], channels // heads
    layout, strides = _layout(tokens)
    layout_out, (s_yb, s_yc, _, s_yw) = _layout(dtokens)
    kind = kind_of(tokens, width)
    setting = SETTINGS[kind, padded_width(width)]
    tiles = triton.cdiv(size, setting.dx.tokens)
    shared = {
        "D": width,
        "BD": padded_width(width),
        "LAYOUT": layout,
        "PRECISION": _precision(tokens),
    }
    with _device_of(tokens):
        grad, query, out = _rows(grad), _rows(query), _rows(out)
        alone = _alone(tiles, kind)
        delta = lse if alone else torch.empty_like(lse)
        inputs = (*grad.stride()[:2], *query.stride()[:2], *strides, *out.stride()[:2])
        if not alone:
            _bwd_dq(grad, query, tokens, out, lse, delta, heads, scale, dquery, inputs, setting.dq, shared)
        conv2former_bwd_dx_kernel[(batch * tiles * heads,)](
            *(grad, query, tokens, out, lse, delta, dquery, dtokens, scale),
            *(size, tokens.shape[3], count, heads, tiles),
            *(*inputs, *dquery.stride()[:2], s_yb, s_yc, s_yw),
            **shared,
            BQ=setting.dx.queries,
            BN=setting.dx.tokens,
            LAYOUT_OUT=layout_out,
            ALONE=alone,
            num_warps=setting.dx.warps,
            num_stages=setting.dx.stages,
        )


def _bwd_dq(grad, query, tokens, out, lse, delta, heads, scale, dquery, strides, tile, shared) -> None:
    batch, count, _ = query.shape
    size = tokens.shape[2] * tokens.shape[3]
    blocks, run, splits = _shares(query, tokens, heads, tile)
    result = dquery
    if splits > 1:
        result = torch.empty((splits, *dquery.shape), dtype=torch.float32, device=dquery.device)
    conv2former_bwd_dq_kernel[(batch * splits * blocks * heads,)](
        *(grad, query, tokens, out, lse, delta, result, scale),
        *(batch, size, tokens.shape[3], count, heads, blocks, splits, run),
        *(*strides, *result.stride()[-3:-1]),
        **shared,
        BQ=tile.queries,
        BN=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        grid = (triton.cdiv(dquery.numel(), SUM_ELEMENTS),)
        conv2former_bwd_sum_kernel[grid](result, dquery, dquery.numel(), splits, BS=SUM_ELEMENTS, num_warps=4)


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, width), setting in SETTINGS.items():
        if kind in ("tf32", "ieee"):
            yield from _cases(kind, "fp32", width, setting, PRECISION=kind)
        elif kind == "half":
            join, alone = Tile(JOIN_QUERIES, 0, 4, 3), {"ALONE": True}
            yield from _cases(kind, "bf16", width, setting)
            yield _case("fwd split", conv2former_fwd_kernel, kind, "bf16", width, setting.fwd, SPLIT=True, out="*fp32")
            yield _case("fwd join", conv2former_fwd_join_kernel, kind, "bf16", width, join)
            yield _case("bwd alone", conv2former_bwd_dx_kernel, kind, "bf16", width, setting.dx, **alone)
    setting = SETTINGS["half", 64]
    yield from _cases("half", "fp16", 64, setting)
    yield from _cases("half", "bf16", 64, setting, "nchw")
    yield _case("bwd alone", conv2former_bwd_dx_kernel, "half", "bf16", 64, setting.dx, "nchw", **alone)
    yield _case("bwd dq split", conv2former_bwd_dq_kernel, "half", "bf16", 64, setting.dq, dquery="*fp32")
    yield _case("bwd sum", conv2former_bwd_sum_kernel, "half", "bf16", 64, Tile(0, 0, 4, 3))
    for kind, dtype, precision in (
        ("odd half", "bf16", "ieee"),
        ("odd fp32", "fp32", "ieee"),
        ("odd fp32", "fp32", "tf32"),
    ):
        yield from _cases(kind, dtype, 64, SETTINGS[kind, 64], "nchw", PRECISION=precision)
        for width in (64, 128, 256):
            setting = SETTINGS[kind, width]
            yield from _cases(kind, dtype, width - width // 8 + 1, setting, "strided", PRECISION=precision)


def _cases(
    kind: str, dtype: str, width: int, setting: Setting, layout: str = "channels_last", **more: object
) -> Iterator[Case]:
    yield _case("fwd", conv2former_fwd_kernel, kind, dtype, width, setting.fwd, layout, **more)
    yield _case("bwd dq", conv2former_bwd_dq_kernel, kind, dtype, width, setting.dq, layout, **more)
    yield _case("bwd dx", conv2former_bwd_dx_kernel, kind, dtype, width, setting.dx, layout, **more)


def _case(
    name: str,
    kernel: JITFunction,
    kind: str,
    dtype: str,
    width: int,
    tile: Tile,
    layout: str = "channels_last",
    **more: object,
) -> Case:
    """``more`` are constexprs, and types of pointers that are not the usual ones."""
    units = {"channels_last": ("s_xc", "s_yc"), "nchw": ("s_xw", "s_yw"), "strided": ("s_yw",)}[layout]
    constexprs = {
        "D": width,
        "BD": padded_width(width),
        "BQ": tile.queries,
        "BN": tile.tokens,
        "BS": SUM_ELEMENTS,
        "LAYOUT": layout,
        "LAYOUT_OUT": "nchw" if layout == "strided" else layout,
        "SPLIT": False,
        "ALONE": False,
        "PRECISION": "ieee",
        **dict.fromkeys(units, 1),
    }
    types = dict.fromkeys(("query", "tokens", "out", "grad", "dquery", "dtokens"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "delta", "peak", "mass", "partial"), "*fp32") | {"scale": "fp32"}
    for key, value in more.items():
        (types if key in types else constexprs)[key] = value
    params = [param for param in kernel.params if param.name not in constexprs]
    number = ("odd " if kind.startswith("odd") else "") + (constexprs["PRECISION"] if dtype == "fp32" else dtype)
    # The number of tokens matters where they lie side by side.
    odd = ("N", "s_") if kind.startswith("odd") else () if layout == "nchw" else ("N",)
    divisible = [p.name for p in params if not p.do_not_specialize and p.name != "scale" and not p.name.startswith(odd)]
    return Case(
        kernel,
        f"{name} {number} {width} {layout}",
        {param.name: types.get(param.name, "i32") for param in params},
        {key: value for key, value in constexprs.items() if key in kernel.arg_names},
        tuple(divisible),
        tile.warps,
        tile.stages,
    )
