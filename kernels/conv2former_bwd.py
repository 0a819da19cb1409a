"""Conv2Former's backward kernels: the queries' gradient, the tokens', and the sum of what several programs add up.
What they compute stands in ``conv2former.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fusekern.kernels.conv2former_fwd import LOG2_E, program, query_offsets, token_offsets


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
