"""Former: a post-norm transformer block over B K rows of text, forward and backward.

    Q, K, V = W_qkv T + b,   M = softmax(Q K^T / sqrt(d)) V per head,   S1 = T + W_out M + b,   U = norm1(S1)
    Z = W_up U + b,          G = gelu(Z),                               S2 = U + W_down G + b,  T' = norm2(S2)

A block of text is little work, and what costs is to start kernels: everything between two products is done as the one
ends or the next begins. A norm needs whole rows of S1, of which a program of the product has a part of the columns:
each part leaves its moments, and whoever reads S1 joins them. So no tensor is written but the ones named above, and U
not at all. Where a program can hold whole rows, the last product applies norm2 itself.

The gradients of all weights are one launch, those of all vectors another; sums over the rows have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from torch import Tensor
from triton.runtime.jit import JITFunction

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution


@triton.jit
def text_rows(i_m, count, s_b, s_k, BM: tl.constexpr):
    """Offsets of ``BM`` rows from row ``i_m`` of [B K, C] on, int64; ``count`` is K. [BM]"""
    o_m = i_m + tl.arange(0, BM)
    return (o_m // count).to(tl.int64) * s_b + (o_m % count).to(tl.int64) * s_k


@triton.jit
def load_vector(vector, i_c, C: tl.constexpr, BC: tl.constexpr):
    """``BC`` numbers of [C] from ``i_c`` on, in fp32."""
    o_c = i_c + tl.arange(0, BC)
    return tl.load(vector + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit
def load_rows(matrix, o_m, m_m, i_c, C: tl.constexpr, BC: tl.constexpr):
    """``BC`` columns from ``i_c`` on of the rows at ``o_m``, zero outside. [BM, BC]"""
    o_c = i_c + tl.arange(0, BC)
    o_x = o_m[:, None] + o_c[None, :]
    if C % BC == 0:
        return tl.load(matrix + o_x, mask=m_m[:, None], other=0.0)
    return tl.load(matrix + o_x, mask=m_m[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def store_rows(matrix, b_x, o_m, m_m, i_c, C: tl.constexpr, BC: tl.constexpr):
    """The other way; ``b_x`` is [BM, BC]."""
    o_c = i_c + tl.arange(0, BC)
    o_x = o_m[:, None] + o_c[None, :]
    tl.store(matrix + o_x, b_x.to(matrix.dtype.element_ty), mask=m_m[:, None] & (o_c < C)[None, :])


@triton.jit
def load_weight(weight, i_r, i_c, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A block of a dense [R, C], zero outside. [BR, BC]"""
    o_r = i_r + tl.arange(0, BR)
    return load_rows(weight, o_r.to(tl.int64) * C, o_r < R, i_c, C, BC)


@triton.jit
def normalised(b_x, b_mean, b_rstd, gain, shift, i_c, C: tl.constexpr, BC: tl.constexpr):
    """Columns from ``i_c`` on of a layer norm's result, in fp32. [BM, BC]"""
    b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
    return b_x * load_vector(gain, i_c, C, BC)[None, :] + load_vector(shift, i_c, C, BC)[None, :]


@triton.jit
def gelu(b_z):
    return 0.5 * b_z * (1.0 + tl.erf(b_z * SQRT_HALF))


@triton.jit
def gelu_slope(b_z):
    """Its derivative: distribution function plus z times density."""
    return 0.5 * (1.0 + tl.erf(b_z * SQRT_HALF)) + b_z * tl.exp(-0.5 * b_z * b_z) * DENSITY_AT_0


@triton.jit
def choose3(i, a, b, c):
    return tl.where(i == 0, a, tl.where(i == 1, b, c))


@triton.jit(do_not_specialize=["rows", "count", "eps"])
def former_fwd_product_kernel(
    image,  # [B K, D]
    weight,  # [N, D]
    weight1,  # [N, D]
    weight2,  # [N, D]
    bias,  # [N]
    bias1,  # [N]
    bias2,  # [N]
    residual,  # [B K, N]
    gain,
    shift,
    gain_out,
    shift_out,
    partial,  # [parts, 2, B K]
    moments,  # [2 or 4, B K]: means and 1 / standard deviations, of a norm and of the one after it
    out,  # [B K, N]
    out1,  # [B K, N]
    out2,  # [B K, N]
    other,  # [B K, N]
    rows,
    count,
    eps,
    s_b,
    s_k,
    N: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    IMAGE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = W a + b of one weight, or of two or three with a result each.

    IMAGE "dense": a is the image. "tokens": so it is, with the strides s_b and s_k. "normed": a = norm(image) by the
    moments in partial, BP parts of BS columns, which go into moments; with WEIGHTS > 1 a goes into other.
    RESIDUAL "tokens": with those strides. "normed": norm of the residual by moments.
    EPILOGUE "partial": each row's mean and sum of squared distances from it over the BN columns go into partial.
    "gelu": other = gelu(out). "norm": a program has whole rows, and other = the next norm of out, whose moments follow.
    """
    blocks: tl.constexpr = (N + BN - 1) // BN
    i = tl.program_id(0)
    i_m = i // (blocks * WEIGHTS) * BM
    i_e = i % (blocks * WEIGHTS) // blocks
    i_n = i % blocks * BN
    o_r = i_m + tl.arange(0, BM)
    m_m = o_r < rows
    o_m = o_r.to(tl.int64)
    o_a = text_rows(i_m, count, s_b, s_k, BM) if IMAGE == "tokens" else o_m * D
    o_y = o_m * N
    if WEIGHTS > 1:
        weight = choose3(i_e, weight, weight1, weight2)
        bias = choose3(i_e, bias, bias1, bias2)
        out = choose3(i_e, out, out1, out2)
    m_once = o_r < tl.where(i % (blocks * WEIGHTS) == 0, rows, 0)  # of all that have these rows, one program

    if IMAGE == "normed":
        o_p = tl.arange(0, BP)
        b_n = tl.where(o_p * BS < D, tl.minimum(D - o_p * BS, BS), 0).to(tl.float32)[None, :]
        o_part = (2 * o_p * rows)[None, :] + o_r[:, None]
        m_part = m_m[:, None] & (o_p * BS < D)[None, :]
        b_part = tl.load(partial + o_part, mask=m_part, other=0.0)  # [BM, BP]
        b_mean = tl.sum(b_part * (b_n / D), 1)
        b_part -= b_mean[:, None]
        b_var = tl.sum(tl.load(partial + rows + o_part, mask=m_part, other=0.0) + b_part * b_part * b_n, 1)
        b_rstd = tl.rsqrt(b_var / D + tl.cast(eps, tl.float32))
        tl.store(moments + o_r, b_mean, mask=m_once)
        tl.store(moments + rows + o_r, b_rstd, mask=m_once)

    b_y = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, D, BK):
        b_a = load_rows(image, o_a, m_m, i_k, D, BK)  # [BM, BK]
        if IMAGE == "normed":
            b_a = normalised(b_a, b_mean, b_rstd, gain, shift, i_k, D, BK).to(b_a.dtype)
            if WEIGHTS > 1:
                store_rows(other, b_a, o_a, m_once, i_k, D, BK)
        b_w = load_weight(weight, i_n, i_k, N, D, BN, BK)  # [BN, BK]
        b_y = tl.dot(b_a, tl.trans(b_w), b_y, input_precision=PRECISION)
    b_y += load_vector(bias, i_n, N, BN)[None, :]

    if RESIDUAL == "tokens":
        b_y += load_rows(residual, text_rows(i_m, count, s_b, s_k, BM), m_m, i_n, N, BN).to(tl.float32)
    if RESIDUAL == "normed":
        b_mean = tl.load(moments + o_r, mask=m_m, other=0.0)
        b_rstd = tl.load(moments + rows + o_r, mask=m_m, other=0.0)
        b_y += normalised(load_rows(residual, o_y, m_m, i_n, N, BN), b_mean, b_rstd, gain, shift, i_n, N, BN)
    store_rows(out, b_y, o_y, m_m, i_n, N, BN)
    if EPILOGUE == "gelu":
        store_rows(other, gelu(b_y), o_y, m_m, i_n, N, BN)
    if EPILOGUE == "partial" or EPILOGUE == "norm":
        # Columns beyond N are zero so far.
        b_n = tl.minimum(N - i_n, BN).to(tl.float32)
        b_mean = tl.sum(b_y, 1) / b_n
        b_d = tl.where((i_n + tl.arange(0, BN) < N)[None, :], b_y - b_mean[:, None], 0.0)
        b_m2 = tl.sum(b_d * b_d, 1)
        if EPILOGUE == "norm":
            b_rstd = tl.rsqrt(b_m2 / N + tl.cast(eps, tl.float32))
            tl.store(moments + 2 * rows + o_r, b_mean, mask=m_m)
            tl.store(moments + 3 * rows + o_r, b_rstd, mask=m_m)
            store_rows(other, normalised(b_y, b_mean, b_rstd, gain_out, shift_out, 0, N, BN), o_y, m_m, 0, N, BN)
        else:
            partial += (2 * (i_n // BN)) * rows
            tl.store(partial + o_r, b_mean, mask=m_m)
            tl.store(partial + rows + o_r, b_m2, mask=m_m)


@triton.jit(do_not_specialize=["rows", "eps"])
def former_fwd_norm_kernel(
    sums, gain, shift, moments, out, rows, eps, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """out = norm2(S2), and the moments."""
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_r < rows
    o_m = o_r.to(tl.int64) * C
    b_x = load_rows(sums, o_m, m_m, 0, C, BC).to(tl.float32)  # [BM, BC]
    b_mean = tl.sum(b_x, 1) / C
    b_d = tl.where((tl.arange(0, BC) < C)[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_d * b_d, 1) / C + tl.cast(eps, tl.float32))
    tl.store(moments + 2 * rows + o_r, b_mean, mask=m_m)
    tl.store(moments + 3 * rows + o_r, b_rstd, mask=m_m)
    store_rows(out, normalised(b_x, b_mean, b_rstd, gain, shift, 0, C, BC), o_m, m_m, 0, C, BC)


@triton.jit
def load_head(matrix, o_t, m_t, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The tokens ``o_t`` of a head in a matrix with rows of S numbers, zero outside. [BT, BD]"""
    return load_rows(matrix, o_t.to(tl.int64) * S, m_t, 0, D, BD)


@triton.jit(do_not_specialize=["count", "heads", "blocks"])
def former_fwd_attention_kernel(
    qkv,  # [B, K, 3, heads, D]
    out,  # [B, K, heads, D]
    lse,  # [B, heads, K]
    scale,
    count,
    heads,
    blocks,
    C: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = P V with P = softmax(scale Q K^T), and lse = log2 sum_n exp(scale q k_n)."""
    i = tl.program_id(0)
    i_h = (i % heads).to(tl.int64)
    i_b = (i // heads // blocks).to(tl.int64)
    qkv += i_b * count * (3 * C) + i_h * D
    b_c = tl.cast(scale, tl.float32) * LOG2_E

    o_q = i // heads % blocks * BQ + tl.arange(0, BQ)
    m_q = o_q < count
    b_q = load_head(qkv, o_q, m_q, 3 * C, D, BD)  # [BQ, BD]
    b_m = tl.full([BQ], float("-inf"), tl.float32)
    b_l = tl.zeros([BQ], tl.float32)
    b_o = tl.zeros([BQ, BD], tl.float32)
    for i_t in range(0, count, BN):
        o_n = i_t + tl.arange(0, BN)
        m_n = o_n < count
        b_k = load_head(qkv + C, o_n, m_n, 3 * C, D, BD)  # [BN, BD]
        b_v = load_head(qkv + 2 * C, o_n, m_n, 3 * C, D, BD)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_c  # [BQ, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row may be -inf so far, and finite in a later tile.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_r = tl.exp2(b_m - b_shift)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_r[:, None], input_precision=PRECISION)
        b_m = b_new
    o_o = (i_b * count + o_q) * C + i_h * D
    store_rows(out, b_o / b_l[:, None], o_o, m_q, 0, D, BD)
    tl.store(lse + (i_b * heads + i_h) * count + o_q, b_m + tl.log2(b_l), mask=m_q)


@triton.jit(do_not_specialize=["count", "heads", "blocks", "tiles"])
def former_bwd_attention_kernel(
    grad,  # [B, K, heads, D]
    qkv,  # [B, K, 3, heads, D]
    mixed,  # [B, K, heads, D]
    lse,  # [B, heads, K]
    dqkv,  # [B, K, 3, heads, D]
    scale,
    count,
    heads,
    blocks,
    tiles,
    C: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = P (g V^T - delta) with delta = sum_c g M; dQ = scale dS K, dK = scale dS^T Q and dV = P^T g.

    The first ``blocks`` programs of a head have a block of queries each, the other ``tiles`` a tile of keys and values.
    """
    i = tl.program_id(0)
    i_h = (i % heads).to(tl.int64)
    i_t = i // heads % (blocks + tiles)
    i_b = (i // heads // (blocks + tiles)).to(tl.int64)
    grad += i_b * count * C + i_h * D
    mixed += i_b * count * C + i_h * D
    qkv += i_b * count * (3 * C) + i_h * D
    dqkv += i_b * count * (3 * C) + i_h * D
    lse += (i_b * heads + i_h) * count
    b_scale = tl.cast(scale, tl.float32)
    b_c = b_scale * LOG2_E

    if i_t < blocks:
        o_q = i_t * BQ + tl.arange(0, BQ)
        m_q = o_q < count
        b_g = load_head(grad, o_q, m_q, C, D, BD)  # [BQ, BD]
        b_o = load_head(mixed, o_q, m_q, C, D, BD)  # [BQ, BD]
        b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
        b_q = load_head(qkv, o_q, m_q, 3 * C, D, BD)  # [BQ, BD]
        b_lse = tl.load(lse + o_q, mask=m_q, other=0.0)
        b_dq = tl.zeros([BQ, BD], tl.float32)
        for i_n in range(0, count, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < count
            b_k = load_head(qkv + C, o_n, m_n, 3 * C, D, BD)  # [BN, BD]
            b_v = load_head(qkv + 2 * C, o_n, m_n, 3 * C, D, BD)  # [BN, BD]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_c  # [BQ, BN]
            b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)  # [BQ, BN]
            b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        store_rows(dqkv, b_dq * b_scale, o_q.to(tl.int64) * (3 * C), m_q, 0, D, BD)
    else:
        o_n = (i_t - blocks) * BN + tl.arange(0, BN)
        m_n = o_n < count
        b_k = load_head(qkv + C, o_n, m_n, 3 * C, D, BD)  # [BN, BD]
        b_v = load_head(qkv + 2 * C, o_n, m_n, 3 * C, D, BD)  # [BN, BD]
        b_dk = tl.zeros([BN, BD], tl.float32)
        b_dv = tl.zeros([BN, BD], tl.float32)
        for i_q in range(0, count, BQ):
            o_q = i_q + tl.arange(0, BQ)
            m_q = o_q < count
            b_g = load_head(grad, o_q, m_q, C, D, BD)  # [BQ, BD]
            b_o = load_head(mixed, o_q, m_q, C, D, BD)  # [BQ, BD]
            b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
            b_q = load_head(qkv, o_q, m_q, 3 * C, D, BD)  # [BQ, BD]
            b_lse = tl.load(lse + o_q, mask=m_q, other=0.0)
            # Rows of Q and g beyond the queries are zero: so is what they add.
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_c  # [BN, BQ]
            b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)  # [BN, BQ]
            b_p = tl.exp2(b_s - b_lse[None, :])
            b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        o_o = o_n.to(tl.int64) * (3 * C)
        store_rows(dqkv + C, b_dk * b_scale, o_o, m_n, 0, D, BD)
        store_rows(dqkv + 2 * C, b_dv, o_o, m_n, 0, D, BD)


@triton.jit(do_not_specialize=["rows"])
def former_bwd_product_kernel(
    grad,  # [B K, D]
    grad1,  # [B K, D]
    grad2,  # [B K, D]
    weight,  # [D, N]
    weight1,  # [D, N]
    weight2,  # [D, N]
    residual,  # [B K, N]
    out,  # [B K, N]
    other,  # [B K, N]
    rows,
    N: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = W^T grad, or the sum of two or three of these.

    EPILOGUE "residual": plus the residual. "gelu": times its slope at the residual, Z; other = G.
    """
    steps: tl.constexpr = (D + BK - 1) // BK
    i = tl.program_id(0)
    i_n = i % tl.cdiv(N, BN) * BN
    o_r = i // tl.cdiv(N, BN) * BM + tl.arange(0, BM)
    m_m = o_r < rows
    o_m = o_r.to(tl.int64)
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_s in range(0, steps * WEIGHTS):
        i_k = i_s % steps * BK
        from_grad, from_weight = grad, weight
        if WEIGHTS > 1:
            from_grad = choose3(i_s // steps, grad, grad1, grad2)
            from_weight = choose3(i_s // steps, weight, weight1, weight2)
        b_g = load_rows(from_grad, o_m * D, m_m, i_k, D, BK)  # [BM, BK]
        b_w = load_weight(from_weight, i_k, i_n, D, N, BK, BN)  # [BK, BN]
        b_y = tl.dot(b_g, b_w, b_y, input_precision=PRECISION)
    if EPILOGUE != "none":
        b_r = load_rows(residual, o_m * N, m_m, i_n, N, BN).to(tl.float32)  # [BM, BN]
    if EPILOGUE == "residual":
        b_y += b_r
    if EPILOGUE == "gelu":
        b_y *= gelu_slope(b_r)
        store_rows(other, gelu(b_r), o_m * N, m_m, i_n, N, BN)
    store_rows(out, b_y, o_m * N, m_m, i_n, N, BN)


@triton.jit(do_not_specialize=["rows", "count", "run"])
def former_bwd_norm_kernel(
    grad,  # [B K, C], with the strides s_b and s_k
    sums,  # [B K, C]
    gain,  # [C]
    shift,  # [C]
    moments,  # [2, B K]
    dsums,  # [B K, C]
    normed,  # [B K, C]
    partial,  # [parts, 2, C]
    rows,
    count,
    run,
    s_b,
    s_k,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    NORMED: tl.constexpr,
):
    """dS = (g' - mean g' - x mean g' x) / sd  with x = (S - mean) / sd and g' = gain g.

    ``run`` blocks of rows; sum g x and sum g over them, the gradients of gain and shift, go into partial. With NORMED
    the norm's result is written again, as an operand.
    """
    i_part = tl.program_id(0)
    b_gain = load_vector(gain, 0, C, BC)[None, :]
    b_first = tl.zeros([BM, BC], tl.float32)
    b_second = tl.zeros([BM, BC], tl.float32)
    for i in range(i_part * run, tl.minimum((i_part + 1) * run, tl.cdiv(rows, BM))):
        o_r = i * BM + tl.arange(0, BM)
        m_m = o_r < rows
        o_m = o_r.to(tl.int64) * C
        b_g = load_rows(grad, text_rows(i * BM, count, s_b, s_k, BM), m_m, 0, C, BC).to(tl.float32)  # [BM, BC]
        b_x = load_rows(sums, o_m, m_m, 0, C, BC).to(tl.float32)  # [BM, BC]
        b_mean = tl.load(moments + o_r, mask=m_m, other=0.0)
        b_rstd = tl.load(moments + rows + o_r, mask=m_m, other=0.0)
        if NORMED:
            store_rows(normed, normalised(b_x, b_mean, b_rstd, gain, shift, 0, C, BC), o_m, m_m, 0, C, BC)
        b_x = (b_x - b_mean[:, None]) * b_rstd[:, None]
        b_first += b_g * b_x
        b_second += b_g
        b_g *= b_gain  # zero beyond C, so what x has there does not count
        b_along = tl.sum(b_g * b_x, 1) / C
        b_ds = (b_g - (tl.sum(b_g, 1) / C)[:, None] - b_x * b_along[:, None]) * b_rstd[:, None]
        store_rows(dsums, b_ds, o_m, m_m, 0, C, BC)
    o_c = tl.arange(0, BC)
    partial += i_part.to(tl.int64) * (2 * C)
    tl.store(partial + o_c, tl.sum(b_first, 0), mask=o_c < C)
    tl.store(partial + C + o_c, tl.sum(b_second, 0), mask=o_c < C)


@triton.jit
def choose(i, first, second, third, a, b, c, d):
    """The one of four to whose programs ``i`` belongs."""
    return tl.where(i < first, a, tl.where(i < second, b, tl.where(i < third, c, d)))


@triton.jit(do_not_specialize=["rows", "count"])
def former_bwd_weight_kernel(
    dqkv,  # [B K, 3 C]
    tokens,  # [B K, C], with the strides s_b and s_k
    dqkv_weight,  # [3 C, C]
    dsums1,  # [B K, C]
    mixed,  # [B K, C]
    dout_weight,  # [C, C]
    dhidden,  # [B K, F]
    normed,  # [B K, C]
    dup_weight,  # [F, C]
    dsums2,  # [B K, C]
    activated,  # [B K, F]
    ddown_weight,  # [C, F]
    dsums0,  # [B K, C]
    gathered,  # [B K, C]
    dentry_weight,  # [C, C]
    grad0,  # [B K, C]
    grad1,  # [B K, C]
    grad2,  # [B K, C]
    normed2,  # [B K, C]
    dexit0_weight,  # [C, C]
    dexit1_weight,  # [C, C]
    dexit2_weight,  # [C, C]
    rows,
    count,
    s_b,
    s_k,
    C: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BRIDGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW[n, d] = sum_m g[m, n] a[m, d] of the four weights; a program has a block of one of them and all rows.

    BRIDGED: behind them come the weight before and two or three after them, all [C, C].
    """
    i = tl.program_id(0)
    square = tl.cdiv(C, BN) * tl.cdiv(C, BK)
    first = tl.cdiv(3 * C, BN) * tl.cdiv(C, BK)
    second = first + square
    third = second + tl.cdiv(F, BN) * tl.cdiv(C, BK)
    fourth = third + tl.cdiv(C, BN) * tl.cdiv(F, BK)
    # Chosen before one loop: four loops would have four times the shared memory.
    grad = choose(i, first, second, third, dqkv, dsums1, dhidden, dsums2)
    image = choose(i, first, second, third, tokens, mixed, normed, activated)
    out = choose(i, first, second, third, dqkv_weight, dout_weight, dup_weight, ddown_weight)
    N = choose(i, first, second, third, 3 * C, C, F, C)
    D = choose(i, first, second, third, C, C, C, F)
    s_b = choose(i, first, second, third, s_b, count * C, count * C, count * F)
    s_k = choose(i, first, second, third, s_k, C, C, F)
    start = choose(i, first, second, third, 0, first, second, third)
    if BRIDGED:
        beyond = i >= fourth
        i_w = (i - fourth) // square
        grad = tl.where(beyond, choose(i_w, 1, 2, 3, dsums0, grad0, grad1, grad2), grad)
        image = tl.where(beyond, tl.where(i_w == 0, gathered, normed2), image)
        weights = choose(i_w, 1, 2, 3, dentry_weight, dexit0_weight, dexit1_weight, dexit2_weight)
        out = tl.where(beyond, weights, out)
        N, D = tl.where(beyond, C, N), tl.where(beyond, C, D)
        s_b, s_k = tl.where(beyond, count * C, s_b), tl.where(beyond, C, s_k)
        start = tl.where(beyond, fourth + i_w * square, start)
    i -= start

    o_n = i // tl.cdiv(D, BK) * BN + tl.arange(0, BN)
    o_d = i % tl.cdiv(D, BK) * BK + tl.arange(0, BK)
    b_dw = tl.zeros([BN, BK], tl.float32)
    for i_m in range(0, rows, BM):
        o_r = i_m + tl.arange(0, BM)
        m_m = (o_r < rows)[:, None]
        o_g = o_r.to(tl.int64)[:, None] * N + o_n[None, :]
        o_a = text_rows(i_m, count, s_b, s_k, BM)[:, None] + o_d[None, :]
        b_g = tl.load(grad + o_g, mask=m_m & (o_n < N)[None, :], other=0.0)  # [BM, BN]
        b_a = tl.load(image + o_a, mask=m_m & (o_d < D)[None, :], other=0.0)  # [BM, BK]
        b_dw = tl.dot(tl.trans(b_g), b_a, b_dw, input_precision=PRECISION)
    o_w = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(out + o_w, b_dw.to(out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_d < D)[None, :])


@triton.jit
def sum_rows(matrix, out, i, rows, s_r, N: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """Block ``i`` of the sum of [rows, N] over the rows, which lie ``s_r`` apart."""
    i_n = i * BN
    b_sum = tl.zeros([BT, BN], tl.float32)
    for i_t in range(0, rows, BT):
        o_t = i_t + tl.arange(0, BT)
        b_sum += load_rows(matrix, o_t.to(tl.int64) * s_r, o_t < rows, i_n, N, BN).to(tl.float32)
    o_n = i_n + tl.arange(0, BN)
    tl.store(out + o_n, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=o_n < N)


@triton.jit(do_not_specialize=["rows", "parts"])
def former_bwd_vector_kernel(
    dqkv,  # [B K, 3 C]
    dsums1,  # [B K, C]
    dhidden,  # [B K, F]
    dsums2,  # [B K, C]
    dsums0,  # [B K, C]
    grad0,  # [B K, C]
    grad1,  # [B K, C]
    grad2,  # [B K, C]
    partial,  # [2 or 3, parts, 2, C]
    dqkv_bias,  # [3 C]
    dout_bias,  # [C]
    dgain1,  # [C]
    dshift1,  # [C]
    dup_bias,  # [F]
    ddown_bias,  # [C]
    dgain2,  # [C]
    dshift2,  # [C]
    dentry_bias,  # [C]
    dgain0,  # [C]
    dshift0,  # [C]
    dexit0_bias,  # [C]
    dexit1_bias,  # [C]
    dexit2_bias,  # [C]
    rows,
    parts,
    C: tl.constexpr,
    F: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BRIDGED: tl.constexpr,
):
    """The gradients of the biases, sums over all rows, and of the norms' vectors, sums over the parts.

    BRIDGED: behind them come the vectors of the linear layer and norm before, and the biases of those after.
    """
    i = tl.program_id(0)
    wide = tl.cdiv(C, BN)
    first = tl.cdiv(3 * C, BN)
    first_c = first + tl.cdiv(F, BN)
    norm_sums = tl.cast(parts, tl.int64) * (2 * C)
    if i < first:
        sum_rows(dqkv, dqkv_bias, i, rows, 3 * C, 3 * C, BT, BN)
    elif i < first_c:
        sum_rows(dhidden, dup_bias, i - first, rows, F, F, BT, BN)
    elif i < first_c + wide:
        sum_rows(dsums1, dout_bias, i - first_c, rows, C, C, BT, BN)
    elif i < first_c + 2 * wide:
        sum_rows(dsums2, ddown_bias, i - first_c - wide, rows, C, C, BT, BN)
    elif i < first_c + 3 * wide:
        sum_rows(partial, dgain1, i - first_c - 2 * wide, parts, 2 * C, C, BT, BN)
    elif i < first_c + 4 * wide:
        sum_rows(partial + C, dshift1, i - first_c - 3 * wide, parts, 2 * C, C, BT, BN)
    elif i < first_c + 5 * wide:
        sum_rows(partial + norm_sums, dgain2, i - first_c - 4 * wide, parts, 2 * C, C, BT, BN)
    elif i < first_c + 6 * wide:
        sum_rows(partial + norm_sums + C, dshift2, i - first_c - 5 * wide, parts, 2 * C, C, BT, BN)
    if BRIDGED:
        i -= first_c + 6 * wide
        partial += 2 * norm_sums
        if i >= 0:
            if i < wide:
                sum_rows(dsums0, dentry_bias, i, rows, C, C, BT, BN)
            elif i < 2 * wide:
                sum_rows(partial, dgain0, i - wide, parts, 2 * C, C, BT, BN)
            elif i < 3 * wide:
                sum_rows(partial + C, dshift0, i - 2 * wide, parts, 2 * C, C, BT, BN)
            elif i < 4 * wide:
                sum_rows(grad0, dexit0_bias, i - 3 * wide, rows, C, C, BT, BN)
            elif i < 5 * wide:
                sum_rows(grad1, dexit1_bias, i - 4 * wide, rows, C, C, BT, BN)
            else:
                sum_rows(grad2, dexit2_bias, i - 5 * wide, rows, C, C, BT, BN)


class Tile(NamedTuple):
    """Launch setting of a product.

    Rows, columns that come out, and terms of a step; of a weight's gradient the terms are rows, and the last its
    columns. Registers of a thread at most: where it is not stated, ptxas may spill some so that another program fits on
    a multiprocessor.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    registers: int | None = None


class Setting(NamedTuple):
    """Of the forward products, their backward, and the gradients of the weights."""

    fwd: Tile
    bwd: Tile
    weight: Tile


class Heads(NamedTuple):
    """Launch setting of the attention: queries and keys of a tile."""

    BQ: int
    BN: int
    warps: int
    stages: int
    registers: int | None = None


# By the products' kind and how many tiles there are for the multiprocessors. "ieee" is fp32 without tf32, which has no
# tensor cores and its operands in registers; "odd" are channels without accesses of 16 bytes.
SETTINGS = {
    ("half", "small"): Setting(Tile(32, 64, 64, 4, 4, 255), Tile(32, 64, 64, 4, 4, 255), Tile(64, 64, 64, 4, 3)),
    ("half", "medium"): Setting(Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4, 255), Tile(64, 64, 64, 4, 3)),
    ("half", "large"): Setting(Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 128, 128, 8, 3)),
    ("tf32", "small"): Setting(Tile(32, 64, 32, 4, 3, 255), Tile(32, 64, 32, 4, 3), Tile(32, 64, 64, 4, 3)),
    ("tf32", "medium"): Setting(Tile(64, 64, 32, 4, 3, 255), Tile(64, 64, 32, 4, 3), Tile(32, 64, 64, 4, 3)),
    ("tf32", "large"): Setting(Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(32, 128, 64, 8, 3)),
    ("ieee", "small"): Setting(Tile(32, 64, 16, 4, 2, 255), Tile(32, 64, 16, 4, 2, 255), Tile(16, 64, 64, 8, 2, 255)),
    ("ieee", "medium"): Setting(Tile(64, 64, 16, 8, 2, 255), Tile(64, 64, 16, 8, 2, 255), Tile(16, 64, 64, 8, 2, 255)),
    ("ieee", "large"): Setting(Tile(128, 64, 16, 8, 2, 255), Tile(128, 64, 16, 8, 2, 255), Tile(16, 128, 64, 8, 2)),
    ("odd half", "any"): Setting(Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(16, 64, 64, 8, 2)),
    ("odd fp32", "any"): Setting(Tile(64, 64, 16, 8, 2, 255), Tile(64, 64, 16, 8, 2, 255), Tile(16, 64, 64, 8, 2, 255)),
}
# By kind and padded channels: the product before norm2 where a program has whole rows. Beyond 256 channels it would
# read too much of the weight to be faster than two launches.
WHOLE = {
    ("half", 64): Tile(32, 64, 64, 4, 4),
    ("half", 128): Tile(32, 128, 64, 4, 4),
    ("half", 256): Tile(32, 256, 64, 8, 3),
    ("tf32", 64): Tile(32, 64, 32, 4, 3),
    ("tf32", 128): Tile(32, 128, 32, 4, 3),
    ("tf32", 256): Tile(32, 256, 32, 8, 3),
    ("ieee", 64): Tile(32, 64, 16, 8, 2, 255),
}
# By kind and padded width of a head; forward and backward.
ATTENTION = {
    ("half", 16): (Heads(64, 64, 4, 3), Heads(64, 64, 4, 2)),
    ("half", 32): (Heads(64, 64, 4, 3), Heads(64, 64, 4, 2)),
    ("half", 64): (Heads(64, 64, 4, 3), Heads(32, 64, 4, 2)),
    ("half", 128): (Heads(64, 64, 4, 2), Heads(64, 64, 8, 2)),
    ("half", 256): (Heads(64, 64, 8, 2), Heads(32, 32, 8, 2)),
    ("tf32", 16): (Heads(64, 32, 4, 2), Heads(32, 32, 4, 2)),
    ("tf32", 32): (Heads(64, 32, 4, 2), Heads(32, 32, 4, 2)),
    ("tf32", 64): (Heads(64, 32, 4, 2), Heads(32, 32, 4, 2)),
    ("tf32", 128): (Heads(64, 32, 4, 2, 255), Heads(32, 32, 8, 2)),
    ("tf32", 256): (Heads(32, 32, 8, 2), Heads(16, 16, 8, 2)),
    ("ieee", 16): (Heads(32, 32, 4, 2), Heads(32, 32, 8, 2)),
    ("ieee", 32): (Heads(32, 32, 4, 2), Heads(32, 32, 8, 2)),
    ("ieee", 64): (Heads(32, 32, 4, 2), Heads(16, 16, 8, 2)),
    ("ieee", 128): (Heads(32, 32, 8, 2, 255), Heads(16, 16, 8, 2)),
    ("ieee", 256): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 2)),
    ("odd half", 16): (Heads(32, 32, 8, 2), Heads(32, 32, 8, 2)),
    ("odd half", 32): (Heads(32, 32, 8, 2), Heads(32, 32, 8, 2, 255)),
    ("odd half", 64): (Heads(32, 32, 8, 2), Heads(32, 32, 8, 2, 255)),
    ("odd half", 128): (Heads(32, 32, 8, 2), Heads(16, 16, 8, 2)),
    ("odd half", 256): (Heads(32, 16, 8, 2, 255), Heads(16, 16, 8, 2)),
    ("odd fp32", 16): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1)),
    ("odd fp32", 32): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1)),
    ("odd fp32", 64): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1, 255)),
    ("odd fp32", 128): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1)),
    ("odd fp32", 256): (Heads(16, 16, 8, 2), Heads(16, 16, 8, 2)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# Numbers of a tile of whole rows, and the most channels of one.
NORM_TILE, MAX_CHANNELS = 2048, 2048
# Rows and columns at a time of the kernel that adds rows, and from which number of them on there are many.
FEW, MANY, MANY_ROWS = (64, 32), (256, 16), 512


def kind_of(dtype: torch.dtype, *widths: int) -> str:
    """Which products the launch settings are for."""
    odd = any(width % 16 for width in widths)
    if dtype == torch.float32:
        return "odd fp32" if odd else _precision(dtype)
    return "odd half" if odd else "half"


def _precision(dtype: torch.dtype) -> str:
    """Of fp32 products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def setting_of(kind: str, rows: int, columns: int) -> Setting:
    """The launch settings of a product with so many results."""
    if kind.startswith("odd"):
        return SETTINGS[kind, "any"]
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= PROGRAMS:
        return SETTINGS[kind, "large"]
    # One multiprocessor in two: smaller tiles read the operands more often.
    return SETTINGS[kind, "medium" if 2 * triton.cdiv(rows, 64) * triton.cdiv(columns, 64) >= PROGRAMS else "small"]


def tile_of_exits(kind: str, rows: int, columns: int) -> Tile:
    """Of a product with several weights: where there are no tensor cores, their pointers cost it the large tile."""
    setting = setting_of(kind, rows, columns)
    return (SETTINGS["ieee", "medium"] if setting is SETTINGS["ieee", "large"] else setting).fwd


def padded(width: int, least: int) -> int:
    """Channels of a head or of a row, as a tile has them."""
    return max(least, triton.next_power_of_2(width))


def launches(channels: int, hidden: int, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
    """The kernels that forward and backward launch, in their order."""
    whole = (kind_of(dtype, channels, hidden), padded(channels, 64)) in WHOLE
    product, norm = "former_bwd_product_kernel", "former_bwd_norm_kernel"
    return {
        "fwd": (
            *("former_fwd_product_kernel", "former_fwd_attention_kernel", *["former_fwd_product_kernel"] * 3),
            *([] if whole else ["former_fwd_norm_kernel"]),
        ),
        "bwd": (
            *(norm, product, product, norm, product, "former_bwd_attention_kernel", product),
            *("former_bwd_weight_kernel", "former_bwd_vector_kernel"),
        ),
    }


def _device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _rows(text: Tensor) -> tuple[Tensor, int, int]:
    """``[B, K, C]`` and its strides; what is as small as text is copied where it has no accesses of 16 bytes."""
    batch, count, channels = text.shape
    s_b, s_k, s_c = text.stride()
    s_b, s_k = s_b if batch > 1 else 0, s_k if count > 1 else 0
    odd = channels % 16 == 0 and (s_b % 16 or s_k % 16)
    if (s_c != 1 and channels > 1) or odd:
        return text.contiguous(), count * channels, channels
    return text, s_b, s_k


def _launch(kernel: JITFunction, programs: int, tile: Tile | Heads, *arguments: object, **constexprs: object) -> None:
    sizes = {key: value for key, value in tile._asdict().items() if key.startswith("B")}
    kernel[(programs,)](
        *arguments, **sizes, **constexprs, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers
    )


class Entry(NamedTuple):
    """What comes before the tokens are in the block: tokens' = norm(sums), sums = tokens + W gathered + b."""

    gathered: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor
    shift: Tensor
    sums: Tensor


class Exit(NamedTuple):
    """A linear layer of the result; in the backward ``image`` is its result's gradient."""

    weight: Tensor
    bias: Tensor | None
    image: Tensor


def forward(
    tokens: Tensor,
    entry: Entry | None,
    parts: Sequence[Tensor],
    exits: Sequence[Exit],
    heads: int,
    eps: float,
    out: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
) -> None:
    """``former_fwd`` and ``text_path_fwd``; entry and exits come together or not at all."""
    qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1, *rest = parts
    up_weight, up_bias, down_weight, down_bias, gain2, shift2 = rest
    batch, count, channels = tokens.shape
    rows, wide = batch * count, up_weight.shape[0]
    kind = kind_of(tokens.dtype, channels, wide)
    whole = None if exits else WHOLE.get((kind, padded(channels, 64)))
    stats = setting_of(kind, rows, channels).fwd.BN
    with _device_of(tokens):
        tokens, *strides = _rows(tokens)
        norm1, norm2 = ((gain.contiguous(), shift.contiguous()) for gain, shift in ((gain1, shift1), (gain2, shift2)))
        activated = torch.empty_like(hidden)
        partial = moments.new_empty(triton.cdiv(channels, stats), 2, rows)
        moments0, moments1, moments2 = moments[:2], moments[-4:], moments[-2:]

        def product(
            image, weights, biases, results, other, moments, *, read, norm=norm1, plus=None, then="", tile=None
        ):
            weights, biases = ([part.contiguous() for part in some] for some in (weights, biases))
            residual, residual_is = plus or (image, "none")
            n, d = weights[0].shape
            tile = tile or setting_of(kind, rows, n).fwd
            _launch(
                *(former_fwd_product_kernel, triton.cdiv(rows, tile.BM) * triton.cdiv(n, tile.BN) * len(weights), tile),
                *(image, *_three(weights), *_three(biases), residual, *norm, *norm2, partial, moments),
                *(*_three(results), results[0] if other is None else other, rows, count, eps, *strides),
                N=n,
                D=d,
                BS=stats,
                BP=triton.next_power_of_2(triton.cdiv(channels, stats)),
                IMAGE=read,
                RESIDUAL=residual_is,
                EPILOGUE=then,
                WEIGHTS=len(weights),
                PRECISION=_precision(tokens.dtype),
            )

        def linear(image, weight, bias, result, moments, other=None, **how) -> None:
            product(image, (weight,), (bias,), (result,), other, moments, **how)

        first = tokens, "tokens"
        if entry:
            norm0 = entry.gain.contiguous(), entry.shift.contiguous()
            gathered = entry.gathered.contiguous()
            linear(gathered, entry.weight, entry.bias, entry.sums, moments0, read="dense", plus=first, then="partial")
            linear(entry.sums, qkv_weight, qkv_bias, qkv, moments0, read="normed", norm=norm0)
            first = entry.sums, "normed"
        else:
            norm0 = norm1
            linear(tokens, qkv_weight, qkv_bias, qkv, moments1, read="tokens")
        _attention(qkv, heads, mixed, lse)
        linear(mixed, out_weight, out_bias, sums1, moments0, read="dense", norm=norm0, plus=first, then="partial")
        linear(sums1, up_weight, up_bias, hidden, moments1, activated, read="normed", then="gelu")
        then = "partial" if exits else "norm" if whole else ""
        how = {"read": "dense", "plus": (sums1, "normed"), "then": then, "tile": whole}
        linear(activated, down_weight, down_bias, sums2, moments1, out, **how)
        if exits:
            weights, biases, results = zip(*exits, strict=True)
            tile = tile_of_exits(kind, rows, len(exits) * channels)
            product(sums2, weights, biases, results, out, moments2, read="normed", norm=norm2, tile=tile)
        elif whole is None:
            block = padded(channels, 64)
            former_fwd_norm_kernel[(triton.cdiv(rows, NORM_TILE // block),)](
                *(sums2, *norm2, moments1, out, rows, eps),
                C=channels,
                BM=NORM_TILE // block,
                BC=block,
                num_warps=4,
            )


def _three(some: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Up to three tensors, and the first for those that are not there."""
    return (*some, *[some[0]] * (3 - len(some)))


def _attention(qkv: Tensor, heads: int, mixed: Tensor, lse: Tensor) -> None:
    batch, count, channels = mixed.shape
    width = channels // heads
    tile = ATTENTION[kind_of(qkv.dtype, width), padded(width, 16)][0]
    blocks = triton.cdiv(count, tile.BQ)
    _launch(
        *(former_fwd_attention_kernel, batch * blocks * heads, tile),
        *(qkv, mixed, lse, width**-0.5, count, heads, blocks),
        C=channels,
        D=width,
        BD=padded(width, 16),
        PRECISION=_precision(qkv.dtype),
    )


def backward(
    grad: Tensor,
    tokens: Tensor,
    entry: Entry | None,
    weights: Sequence[Tensor],
    exits: Sequence[Exit],
    out: Tensor | None,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
    heads: int,
    dtokens: Tensor,
    dentry: Sequence[Tensor],
    dparts: Sequence[Tensor],
    dexits: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """``former_bwd`` and ``text_path_bwd``.

    ``out`` is the forward's, which only exits need. ``dentry``: the gradients of gathered, weight, bias, gain and
    shift; ``dparts``: of the twelve parts; ``dexits``: of weight and bias of each.
    """
    qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2 = weights
    dqkv_weight, dqkv_bias, dout_weight, dout_bias, dgain1, dshift1, *rest = dparts
    dup_weight, dup_bias, ddown_weight, ddown_bias, dgain2, dshift2 = rest
    batch, count, channels = sums1.shape
    rows, wide = batch * count, up_weight.shape[0]
    kind, precision = kind_of(sums1.dtype, channels, wide), _precision(sums1.dtype)
    block = padded(channels, 64)
    blocks = triton.cdiv(rows, NORM_TILE // block)
    run = triton.cdiv(blocks, 2 * PROGRAMS)
    parts = triton.cdiv(blocks, run)
    dense = (count * channels, channels)

    def norm(grad, strides, sums, vectors, moments, dsums, normed, partial) -> None:
        former_bwd_norm_kernel[(parts,)](
            *(grad, sums, *vectors, moments, dsums, dsums if normed is None else normed, partial),
            *(rows, count, run, *strides),
            C=channels,
            BM=NORM_TILE // block,
            BC=block,
            NORMED=normed is not None,
            num_warps=4,
        )

    def product(grads, weights, epilogue, residual, result, other=None) -> None:
        weights = [weight.contiguous() for weight in weights]
        d, n = weights[0].shape
        tile = setting_of(kind, rows, n).bwd
        _launch(
            *(former_bwd_product_kernel, triton.cdiv(rows, tile.BM) * triton.cdiv(n, tile.BN), tile),
            *(*_three(grads), *_three(weights), residual, result, result if other is None else other, rows),
            N=n,
            D=d,
            EPILOGUE=epilogue,
            WEIGHTS=len(weights),
            PRECISION=precision,
        )

    with _device_of(sums1):
        gain1, shift1, gain2 = (vector.contiguous() for vector in (gain1, shift1, gain2))
        partial = moments.new_empty(3 if entry else 2, parts, 2, channels)
        dsums1, dsums2, du, normed = (torch.empty_like(sums1) for _ in range(4))
        dhidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
        grads = [each.image.contiguous() for each in exits]
        if exits:
            product(grads, [each.weight for each in exits], "residual", grad.contiguous(), du)
            grad, *grad_strides = du, *dense
        else:
            grad, *grad_strides = _rows(grad)
        norm(grad, grad_strides, sums2, (gain2, gain2), moments[-2:], dsums2, None, partial[1])
        product((dsums2,), (down_weight,), "gelu", hidden, dhidden, activated)
        product((dhidden,), (up_weight,), "residual", dsums2, du)
        norm(du, dense, sums1, (gain1, shift1), moments[-4:], dsums1, normed, partial[0])
        dmixed = du  # its gradient has served
        product((dsums1,), (out_weight,), "none", dmixed, dmixed)
        dqkv = torch.empty_like(qkv)
        _attention_bwd(dmixed, qkv, mixed, lse, heads, dqkv)
        if entry:
            dgathered, dentry_weight, dentry_bias, dgain0, dshift0 = dentry
            norm0, gathered = (entry.gain.contiguous(), entry.shift.contiguous()), entry.gathered.contiguous()
            product((dqkv,), (qkv_weight,), "residual", dsums1, du)
            image, strides = torch.empty_like(sums1), dense
            norm(du, dense, entry.sums, norm0, moments[:2], dtokens, image, partial[2])
            product((dtokens,), (entry.weight,), "none", dgathered, dgathered)
            bridged = (dtokens, gathered, dentry_weight, *_three(grads), out, *_three([dw for dw, _ in dexits]))
            vectors = (dentry_bias, dgain0, dshift0, *_three([db for _, db in dexits]))
        else:
            product((dqkv,), (qkv_weight,), "residual", dsums1, dtokens)
            image, *strides = _rows(tokens)
            bridged, vectors = (dqkv,) * 10, (dqkv_bias,) * 6  # not touched

        tile = setting_of(kind, 4 * channels + 2 * wide, channels).weight
        squares = 1 + len(exits) if entry else 0
        programs = sum(
            triton.cdiv(weight.shape[0], tile.BN) * triton.cdiv(weight.shape[1], tile.BK)
            for weight in (qkv_weight, out_weight, up_weight, down_weight, *[out_weight] * squares)
        )
        _launch(
            *(former_bwd_weight_kernel, programs, tile),
            *(dqkv, image, dqkv_weight, dsums1, mixed, dout_weight),
            *(dhidden, normed, dup_weight, dsums2, activated, ddown_weight),
            *(*bridged, rows, count, *strides),
            C=channels,
            F=wide,
            BRIDGED=entry is not None,
            PRECISION=precision,
        )
        height, across = FEW if rows < MANY_ROWS else MANY
        of_channels = 6 + (3 + len(exits) if entry else 0)
        programs = of_channels * triton.cdiv(channels, across)
        programs += sum(triton.cdiv(n, across) for n in (3 * channels, wide))
        former_bwd_vector_kernel[(programs,)](
            *(dqkv, dsums1, dhidden, dsums2, bridged[0], *bridged[3:6], partial),
            *(dqkv_bias, dout_bias, dgain1, dshift1, dup_bias, ddown_bias, dgain2, dshift2, *vectors, rows, parts),
            C=channels,
            F=wide,
            BT=height,
            BN=across,
            BRIDGED=entry is not None,
            num_warps=4 if rows < MANY_ROWS else 8,
        )


def former_fwd(
    tokens: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    heads: int,
    eps: float,
    out: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
) -> None:
    """Fills ``out`` ``[B, K, C]`` and what the backward needs.

    That is in the dtype of the tokens ``qkv`` ``[B, K, 3 C]``, ``mixed``, ``sums1`` and ``sums2`` ``[B, K, C]`` and
    ``hidden`` ``[B, K, F]``, in fp32 ``lse`` ``[B, heads, K]`` and ``moments`` ``[4, B K]``. The weights have the
    dtype of the tokens, the vectors any.
    """
    parts = (qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1)
    parts += (up_weight, up_bias, down_weight, down_bias, gain2, shift2)
    forward(tokens, None, parts, (), heads, eps, out, qkv, mixed, lse, sums1, hidden, sums2, moments)


def former_bwd(
    grad: Tensor,
    tokens: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gain2: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
    heads: int,
    dtokens: Tensor,
    *dparts: Tensor,
) -> None:
    """Fills the gradients of the tokens and of the twelve parts, contiguous, of the shapes that the forward has."""
    weights = (qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2)
    saved = (qkv, mixed, lse, sums1, hidden, sums2, moments)
    backward(grad, tokens, None, weights, (), None, *saved, heads, dtokens, (), dparts, ())


def _attention_bwd(grad: Tensor, qkv: Tensor, mixed: Tensor, lse: Tensor, heads: int, dqkv: Tensor) -> None:
    batch, count, channels = mixed.shape
    width = channels // heads
    tile = ATTENTION[kind_of(qkv.dtype, width), padded(width, 16)][1]
    blocks, tiles = triton.cdiv(count, tile.BQ), triton.cdiv(count, tile.BN)
    _launch(
        *(former_bwd_attention_kernel, batch * (blocks + tiles) * heads, tile),
        *(grad, qkv, mixed, lse, dqkv, width**-0.5, count, heads, blocks, tiles),
        C=channels,
        D=width,
        BD=padded(width, 16),
        PRECISION=_precision(qkv.dtype),
    )


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, load), setting in SETTINGS.items():
        for dtype in _dtypes(kind, load == "medium"):
            channels = 200 if kind.startswith("odd") else 512
            name = f"{'odd' if kind.startswith('odd') else load} {dtype} {channels}"
            for product in PRODUCTS:
                if (product, kind, load) != ("exits", "ieee", "large"):  # tile_of_exits
                    yield _product(f"fwd {product} {name}", product, dtype, channels, setting.fwd)
            for product, more in (
                ("none", {"EPILOGUE": "none"}),
                ("residual", {"EPILOGUE": "residual"}),
                ("gelu", {"EPILOGUE": "gelu", "N": 2 * channels}),
                ("exits", {"EPILOGUE": "residual", "WEIGHTS": 3}),
            ):
                yield _case(f"bwd {product} {name}", former_bwd_product_kernel, dtype, channels, setting.bwd, **more)
            for bridged in (False, True):
                yield _case(
                    f"bwd weight{' bridged' * bridged} {name}",
                    *(former_bwd_weight_kernel, dtype, channels, setting.weight),
                    BRIDGED=bridged,
                )
    yield _product("fwd up large bf16 2048", "up", "bf16", 2048, SETTINGS["half", "large"].fwd)
    for (kind, channels), tile in WHOLE.items():
        for dtype in _dtypes(kind, False):
            for true in (channels - 16, channels):
                yield _product(f"fwd whole {dtype} {true}", "down", dtype, true, tile, EPILOGUE="norm")
    for (kind, width), tiles in ATTENTION.items():
        for dtype in _dtypes(kind, width == 64):
            odd = kind.startswith("odd")
            true = width - width // 8 + 1 if odd else width
            name = f"{'odd ' * odd}{dtype} {true}"
            for direction, kernel, tile in zip(
                ("fwd", "bwd"), (former_fwd_attention_kernel, former_bwd_attention_kernel), tiles, strict=True
            ):
                more = {"D": true, "BD": width}
                yield _case(f"{direction} attention {name}", kernel, dtype, 4 * true if odd else 512, tile, **more)
    for dtype in ("bf16", "ieee"):
        for channels in (16, 512, 2048, 200):
            name, block = f"{dtype} {channels}", padded(channels, 64)
            tile = Tile(NORM_TILE // block, 0, 0, 4, 3)
            yield _case(f"fwd norm {name}", former_fwd_norm_kernel, dtype, channels, tile, BC=block)
            for normed in (False, True):
                more = {"BC": block, "NORMED": normed}
                yield _case(
                    f"bwd norm{' again' * normed} {name}", former_bwd_norm_kernel, dtype, channels, tile, **more
                )
            for load, (height, across), warps in (("few", FEW, 4), ("many", MANY, 8)):
                tile = Tile(0, across, 0, warps, 3)
                more = {"BT": height, "BRIDGED": True}
                yield _case(f"bwd vector {load} {name}", former_bwd_vector_kernel, dtype, channels, tile, **more)


# The forward's products, those of a text path among them, by what they add to a plain one; widths over C.
PRODUCTS = {
    "qkv": {"N": 3, "IMAGE": "tokens"},
    "qkv of sums": {"N": 3, "IMAGE": "normed"},
    "out": {"RESIDUAL": "tokens", "EPILOGUE": "partial"},
    "out onto sums": {"RESIDUAL": "normed", "EPILOGUE": "partial"},
    "up": {"N": 2, "IMAGE": "normed", "EPILOGUE": "gelu"},
    "down": {"D": 2, "RESIDUAL": "normed"},
    "down to sums": {"D": 2, "RESIDUAL": "normed", "EPILOGUE": "partial"},
    "exits": {"IMAGE": "normed", "WEIGHTS": 3},
}


def _product(name: str, product: str, dtype: str, channels: int, tile: Tile, **more: object) -> Case:
    """Of the forward."""
    flags = {"IMAGE": "dense", "RESIDUAL": "none", "EPILOGUE": "", **PRODUCTS[product], **more}
    flags |= {side: channels * flags.get(side, 1) for side in ("N", "D")}
    return _case(name, former_fwd_product_kernel, dtype, channels, tile, **flags)


def _dtypes(kind: str, both: bool) -> tuple[str, ...]:
    """Types of numbers, fp32 by the precision of its products."""
    if kind.endswith("half"):
        return ("bf16", "fp16") if both else ("bf16",)
    return ("ieee", "tf32") if kind == "odd fp32" else (kind,)


def _case(name: str, kernel: JITFunction, dtype: str, channels: int, tile: Tile | Heads, **more: object) -> Case:
    """``more`` are constexprs that are not the usual ones."""
    fp32 = dtype in ("ieee", "tf32")
    constexprs = {
        **tile._asdict(),
        "C": channels,
        "F": 2 * channels,
        "N": channels,
        "D": channels,
        "BS": tile.BN,
        "BP": triton.next_power_of_2(triton.cdiv(channels, max(tile.BN, 1))),
        "WEIGHTS": 1,
        "PRECISION": dtype if fp32 else "ieee",
        **more,
    }
    params = [param for param in kernel.params if param.name not in constexprs]
    integers = ("rows", "count", "heads", "blocks", "tiles", "run", "parts", "s_b", "s_k")
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(("eps", "scale"), "fp32")
    types |= dict.fromkeys(("partial", "moments", "lse"), "*fp32")
    usual = "*fp32" if fp32 else f"*{dtype}"
    divisible = [param.name for param in params if not param.do_not_specialize and param.name != "scale"]
    return Case(
        kernel,
        name,
        {param.name: types.get(param.name, usual) for param in params},
        {key: value for key, value in constexprs.items() if key in kernel.arg_names},
        tuple(name for name in divisible if channels % 16 == 0 or not name.startswith("s_")),
        tile.warps,
        tile.stages,
        tile.registers,
    )
