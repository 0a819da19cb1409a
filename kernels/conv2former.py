"""Conv2Former: ``out = softmax(scale Q X^T) X`` per head, forward and backward.

X are the tokens of the image, keys and values at once: a tile of them is loaded once for both products. The forward
walks over the tiles with a running maximum. Few queries and many tokens are too few programs for a GPU: then several
share a block of queries, and a second kernel joins what they found. The backward has two kernels, one with a block of
queries and a loop over the tokens for dQ, one with a tile of tokens and a loop over the queries, which adds the
gradients as key and as value in one accumulator. Up to one tile of tokens the latter does both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusekern.kernels.aot import Case

CHANNELS_LAST, NCHW, STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
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

    ``s_w`` is the stride between tokens, except in STRIDED, where rows may lie anywhere.
    """
    i_n = i_t.to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD).to(tl.int64)
    if LAYOUT == CHANNELS_LAST:
        return (i_n + o_n)[:, None] * s_w + o_d[None, :]
    elif LAYOUT == NCHW:
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
    out += (i_s.to(tl.int64) * B + i_b) * s_ob + i_h * D
    lse += ((i_s.to(tl.int64) * B + i_b) * heads + i_h) * K
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
        tl.store(peak + ((i_s.to(tl.int64) * B + i_b) * heads + i_h) * K + o_k, b_m, mask=m_k)
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
        i_row = i_s.to(tl.int64) * B * heads * K
        b_m = tl.maximum(b_m, tl.load(peak + i_row + o_k, mask=m_k, other=float("-inf")))
    b_shift = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_l = tl.zeros([BQ], tl.float32)
    b_o = tl.zeros([BQ, BD], tl.float32)
    for i_s in range(0, splits):
        i_row = i_s.to(tl.int64) * B * heads * K
        b_r = tl.exp2(tl.load(peak + i_row + o_k, mask=m_k, other=float("-inf")) - b_shift)
        b_l += tl.load(mass + i_row + o_k, mask=m_k, other=0.0) * b_r
        b_o += tl.load(partial + i_s.to(tl.int64) * B * s_pb + o_p, mask=m_q, other=0.0) * b_r[:, None]  # [BQ, BD]

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
    dquery += (i_s.to(tl.int64) * B + i_b) * s_db + i_h * D
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
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_g, tl.trans(b_x), input_precision=PRECISION)  # [BQ, BN]
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
        b_sum += tl.load(partial + i_s.to(tl.int64) * size + o_s, mask=o_s < size, other=0.0)
    tl.store(dquery + o_s, b_sum.to(dquery.dtype.element_ty), mask=o_s < size)
