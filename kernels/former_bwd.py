"""Former's backward kernels; what they compute stands in ``former.py``, what a chain is in ``former_fwd.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from fusekern.kernels.former_fwd import (
    LOG2_E,
    SQRT_HALF,
    chosen,
    gelu,
    load_head,
    load_rows,
    load_vector,
    load_weight,
    next_task,
    normalised,
    store_rows,
    task_done,
    text_rows,
    wait_for,
)

DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution


@triton.jit
def gelu_slope(b_z):
    """Its derivative: distribution function plus z times density."""
    return 0.5 * (1.0 + tl.erf(b_z * SQRT_HALF)) + b_z * tl.exp(-0.5 * b_z * b_z) * DENSITY_AT_0


@triton.jit
def product_bwd(
    i,
    grads,  # one, two or three [B K, D]
    weights,  # as many [D, N]
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
    PRECISION: tl.constexpr,
):
    """Tile ``i`` of out = W^T grad, or of the sum of two or three of these.

    EPILOGUE "residual": plus the residual. "gelu": times its slope at the residual, Z; other = G.
    """
    steps: tl.constexpr = (D + BK - 1) // BK
    i_n = i % tl.cdiv(N, BN) * BN
    o_r = i // tl.cdiv(N, BN) * BM + tl.arange(0, BM)
    m_m = o_r < rows
    o_m = o_r.to(tl.int64)
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_s in range(0, steps * len(weights)):
        i_k = i_s % steps * BK
        b_g = load_rows(chosen(i_s // steps, grads), o_m * D, m_m, i_k, D, BK)  # [BM, BK]
        b_w = load_weight(chosen(i_s // steps, weights), i_k, i_n, D, N, BK, BN)  # [BK, BN]
        b_y = tl.dot(b_g, b_w, b_y, input_precision=PRECISION)
    if EPILOGUE != "none":
        b_r = load_rows(residual, o_m * N, m_m, i_n, N, BN).to(tl.float32)  # [BM, BN]
    if EPILOGUE == "residual":
        b_y += b_r
    if EPILOGUE == "gelu":
        b_y *= gelu_slope(b_r)
        store_rows(other, gelu(b_r), o_m * N, m_m, i_n, N, BN)
    store_rows(out, b_y, o_m * N, m_m, i_n, N, BN)


@triton.jit
def norm_bwd(
    i_part,
    grad,  # [B K, C], with these strides
    sums,  # [B K, C]
    norm,  # gain and shift, [C] each
    moments,  # [2, B K]
    dsums,  # [B K, C]
    normed,  # [B K, C]
    partial,  # [parts, 2, C]
    rows,
    count,
    run,
    strides,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    NORMED: tl.constexpr,
):
    """dS = (g' - mean g' - x mean g' x) / sd  with x = (S - mean) / sd and g' = gain g.

    ``run`` blocks of rows; sum g x and sum g over them, the gradients of gain and shift, go into partial. With NORMED
    the norm's result is written again, as an operand.
    """
    gain, shift = norm
    s_b, s_k = strides
    b_gain = load_vector(gain, 0, C, BC)[None, :]
    b_first = tl.zeros([BR, BC], tl.float32)
    b_second = tl.zeros([BR, BC], tl.float32)
    for i in range(i_part * run, tl.minimum((i_part + 1) * run, tl.cdiv(rows, BR))):
        o_r = i * BR + tl.arange(0, BR)
        m_m = o_r < rows
        o_m = o_r.to(tl.int64) * C
        b_g = load_rows(grad, text_rows(i * BR, count, s_b, s_k, BR), m_m, 0, C, BC).to(tl.float32)  # [BR, BC]
        b_x = load_rows(sums, o_m, m_m, 0, C, BC).to(tl.float32)  # [BR, BC]
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


@triton.jit(do_not_specialize=["rows", "count", "run"])
def former_bwd_norm_kernel(
    grad,  # [B K, C], with the strides s_b and s_k
    sums,  # [B K, C]
    gain,  # [C]
    moments,  # [4, B K]: of norm1 and norm2
    dsums,  # [B K, C]
    partial,  # [2, parts, 2, C]: of norm1 and norm2
    counters,  # [4]
    rows,
    count,
    run,
    s_b,
    s_k,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient of S2, before the chain."""
    i, strides = tl.program_id(0), (s_b, s_k)
    partial += tl.num_programs(0).to(tl.int64) * (2 * C)
    moments += 2 * rows
    norm_bwd(i, grad, sums, (gain, gain), moments, dsums, dsums, partial, rows, count, run, strides, C, BR, BC, False)
    if i == 0:
        tl.store(counters + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit(do_not_specialize=["rows"])
def former_bwd_exits_kernel(
    exit0,  # [B K, C], gradients
    exit0_weight,  # [C, C]
    exit1,
    exit1_weight,
    exit2,
    exit2_weight,
    grad,  # [B K, C]
    out,  # [B K, C]
    counters,  # [4]
    rows,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EXITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of T', its own and what comes through the exits, before the chain."""
    i = tl.program_id(0)
    if EXITS == 3:
        exits, weights = (exit0, exit1, exit2), (exit0_weight, exit1_weight, exit2_weight)
    else:
        exits, weights = (exit0, exit1), (exit0_weight, exit1_weight)
    product_bwd(i, exits, weights, grad, out, out, rows, C, C, BM, BN, BK, "residual", PRECISION)
    if i == 0:
        tl.store(counters + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit(do_not_specialize=["rows", "count", "run", "parts"])
def former_bwd_chain_kernel(
    grad,  # [B K, C]
    sums2,  # [B K, C]
    gain2,  # [C]
    moments,  # [4 or 6, B K]: of the norms, from norm1 or norm0 on
    dsums2,  # [B K, C]
    partial,  # [2 or 3, parts, 2, C]: of norm1, norm2 and norm0
    down_weight,  # [C, F]
    hidden,  # [B K, F]
    dhidden,  # [B K, F]
    activated,  # [B K, F]
    up_weight,  # [F, C]
    dnormed,  # [B K, C]
    sums1,  # [B K, C]
    gain1,  # [C]
    shift1,  # [C]
    dsums1,  # [B K, C]
    normed,  # [B K, C]
    out_weight,  # [C, C]
    dmixed,  # [B K, C]
    counters,  # [4], of which these are the first two
    rows,
    count,
    run,
    parts,
    C: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BRIDGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradient of S2 to that of M, or BRIDGED from that of T'. G and U, which weights' gradients need, too."""
    heights = tl.cdiv(rows, BM)
    square = heights * tl.cdiv(C, BN)
    downs = parts if BRIDGED else 0
    ups = downs + heights * tl.cdiv(F, BN)
    norms = ups + square
    outs = norms + parts
    dense = (tl.cast(count, tl.int64) * C, C)
    if BRIDGED:
        moments += 2 * rows

    i = next_task(counters)
    if i < downs:
        if BRIDGED:
            of_norm2 = partial + tl.cast(parts, tl.int64) * (2 * C)
            moments2 = moments + 2 * rows
            norm_bwd(
                *(i, grad, sums2, (gain2, gain2), moments2, dsums2, dsums2, of_norm2),
                *(rows, count, run, dense, C, BR, BC, False),
            )
        task_done(counters)
    elif i < ups:
        wait_for(counters, downs)
        product_bwd(
            *(i - downs, (dsums2,), (down_weight,), hidden, dhidden, activated),
            *(rows, F, C, BM, BN, BK, "gelu", PRECISION),
        )
        task_done(counters)
    elif i < norms:
        wait_for(counters, ups)
        product_bwd(
            *(i - ups, (dhidden,), (up_weight,), dsums2, dnormed, dnormed),
            *(rows, C, F, BM, BN, BK, "residual", PRECISION),
        )
        task_done(counters)
    elif i < outs:
        wait_for(counters, norms)
        norm_bwd(
            *(i - norms, dnormed, sums1, (gain1, shift1), moments, dsums1, normed, partial),
            *(rows, count, run, dense, C, BR, BC, True),
        )
        task_done(counters)
    else:
        wait_for(counters, outs)
        product_bwd(
            *(i - outs, (dsums1,), (out_weight,), dmixed, dmixed, dmixed),
            *(rows, C, C, BM, BN, BK, "none", PRECISION),
        )


@triton.jit(do_not_specialize=["rows", "count", "run", "parts"])
def former_bwd_entry_kernel(
    dqkv,  # [B K, 3 C]
    qkv_weight,  # [3 C, C]
    dsums1,  # [B K, C]
    dnormed,  # [B K, C]
    sums0,  # [B K, C]
    gain0,  # [C]
    shift0,  # [C]
    moments,  # [4 or 6, B K]
    dtokens,  # [B K, C]
    normed,  # [B K, C]
    partial,  # [2 or 3, parts, 2, C]: of norm1, norm2 and norm0
    entry_weight,  # [C, C]
    dgathered,  # [B K, C]
    counters,  # [4], of which these are the last two
    rows,
    count,
    run,
    parts,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BRIDGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradient of Q, K and V to that of the tokens; BRIDGED, through norm0 and W^O, a chain."""
    square = tl.cdiv(rows, BM) * tl.cdiv(C, BN)
    counters += 2
    i = next_task(counters) if BRIDGED else tl.program_id(0)
    if i < square:
        product_bwd(
            *(i, (dqkv,), (qkv_weight,), dsums1, dnormed, dnormed),
            *(rows, C, 3 * C, BM, BN, BK, "residual", PRECISION),
        )
        if BRIDGED:
            task_done(counters)
    if BRIDGED:
        if (i >= square) & (i < square + parts):
            wait_for(counters, square)
            dense = (tl.cast(count, tl.int64) * C, C)
            partial += tl.cast(parts, tl.int64) * (4 * C)
            norm_bwd(
                *(i - square, dnormed, sums0, (gain0, shift0), moments, dtokens, normed, partial),
                *(rows, count, run, dense, C, BR, BC, True),
            )
            task_done(counters)
        elif i >= square:
            wait_for(counters, square + parts)
            product_bwd(
                *(i - square - parts, (dtokens,), (entry_weight,), dgathered, dgathered, dgathered),
                *(rows, C, C, BM, BN, BK, "none", PRECISION),
            )


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


@triton.jit
def choose(i, first, second, third, a, b, c, d):
    """The one of four to whose programs ``i`` belongs."""
    return tl.where(i < first, a, tl.where(i < second, b, tl.where(i < third, c, d)))


@triton.jit
def weight_bwd(
    i,
    grad,  # [B K, N]
    image,  # [B K, D], with these strides
    out,  # [N, D]
    rows,
    count,
    strides,
    N,
    D,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Block ``i`` of a weight's gradient."""
    s_b, s_k = strides
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


@triton.jit(do_not_specialize=["rows", "count", "parts"])
def former_bwd_parameters_kernel(
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
    count,
    parts,
    s_b,
    s_k,
    C: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    EXITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW[n, d] = sum_m g[m, n] a[m, d] of the four weights; a program has a block of one of them and all rows.

    With EXITS then come the weight before and two or three after them, all [C, C]. Behind the weights come the vectors:
    the biases, whose gradients are sums over all rows, and those of the norms, sums over the parts.
    """
    i = tl.program_id(0)
    square = tl.cdiv(C, BN) * tl.cdiv(C, BK)
    first = tl.cdiv(3 * C, BN) * tl.cdiv(C, BK)
    second = first + square
    third = second + tl.cdiv(F, BN) * tl.cdiv(C, BK)
    fourth = third + tl.cdiv(C, BN) * tl.cdiv(F, BK)
    weights = fourth
    if EXITS > 0:
        weights += (1 + EXITS) * square
    if i < weights:
        # Chosen before one loop: many loops would be many times the code.
        grad = choose(i, first, second, third, dqkv, dsums1, dhidden, dsums2)
        image = choose(i, first, second, third, tokens, mixed, normed, activated)
        out = choose(i, first, second, third, dqkv_weight, dout_weight, dup_weight, ddown_weight)
        N = choose(i, first, second, third, 3 * C, C, F, C)
        D = choose(i, first, second, third, C, C, C, F)
        s_b = choose(i, first, second, third, s_b, count * C, count * C, count * F)
        s_k = choose(i, first, second, third, s_k, C, C, F)
        start = choose(i, first, second, third, 0, first, second, third)
        if EXITS > 0:
            beyond = i >= fourth
            i_w = (i - fourth) // square
            grad = tl.where(beyond, choose(i_w, 1, 2, 3, dsums0, grad0, grad1, grad2), grad)
            image = tl.where(beyond, tl.where(i_w == 0, gathered, normed2), image)
            others = choose(i_w, 1, 2, 3, dentry_weight, dexit0_weight, dexit1_weight, dexit2_weight)
            out = tl.where(beyond, others, out)
            N, D = tl.where(beyond, C, N), tl.where(beyond, C, D)
            s_b, s_k = tl.where(beyond, count * C, s_b), tl.where(beyond, C, s_k)
            start = tl.where(beyond, fourth + i_w * square, start)
        weight_bwd(i - start, grad, image, out, rows, count, (s_b, s_k), N, D, BM, BN, BK, PRECISION)
    else:
        i -= weights
        wide = tl.cdiv(C, BV)
        first = tl.cdiv(3 * C, BV)
        first_c = first + tl.cdiv(F, BV)
        norm_sums = tl.cast(parts, tl.int64) * (2 * C)
        if i < first:
            sum_rows(dqkv, dqkv_bias, i, rows, 3 * C, 3 * C, BT, BV)
        elif i < first_c:
            sum_rows(dhidden, dup_bias, i - first, rows, F, F, BT, BV)
        else:
            i -= first_c
            i_c = i % wide
            if i < wide:
                sum_rows(dsums1, dout_bias, i_c, rows, C, C, BT, BV)
            elif i < 2 * wide:
                sum_rows(dsums2, ddown_bias, i_c, rows, C, C, BT, BV)
            elif i < 3 * wide:
                sum_rows(partial, dgain1, i_c, parts, 2 * C, C, BT, BV)
            elif i < 4 * wide:
                sum_rows(partial + C, dshift1, i_c, parts, 2 * C, C, BT, BV)
            elif i < 5 * wide:
                sum_rows(partial + norm_sums, dgain2, i_c, parts, 2 * C, C, BT, BV)
            elif i < 6 * wide:
                sum_rows(partial + norm_sums + C, dshift2, i_c, parts, 2 * C, C, BT, BV)
            elif EXITS > 0:
                if i < 7 * wide:
                    sum_rows(partial + 2 * norm_sums, dgain0, i_c, parts, 2 * C, C, BT, BV)
                elif i < 8 * wide:
                    sum_rows(partial + 2 * norm_sums + C, dshift0, i_c, parts, 2 * C, C, BT, BV)
                elif i < 9 * wide:
                    sum_rows(dsums0, dentry_bias, i_c, rows, C, C, BT, BV)
                elif i < 10 * wide:
                    sum_rows(grad0, dexit0_bias, i_c, rows, C, C, BT, BV)
                elif i < 11 * wide:
                    sum_rows(grad1, dexit1_bias, i_c, rows, C, C, BT, BV)
                elif EXITS > 2:
                    sum_rows(grad2, dexit2_bias, i_c, rows, C, C, BT, BV)
