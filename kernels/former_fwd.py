"""Former's forward kernels; what they compute stands in ``former.py``.

A chain of products, each with all of the one before, in one launch: a program takes a number, in the order in which
programs begin, and does the task of that number. The tasks of a product come after those of the one before, and wait
until all of these are done. Whom a program waits for has begun before it, and so goes on: no program waits for one that
has no place on the device. A kernel before the chain sets its counters to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def next_task(counters):
    """The number of this program's task."""
    return tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_for(counters, tasks):
    """Until the first ``tasks`` tasks are done; what they stored can be read then."""
    while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < tasks:
        pass


@triton.jit
def task_done(counters):
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")


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
def chosen(i, some):
    """One of up to three."""
    if len(some) == 1:
        return some[0]
    elif len(some) == 2:
        return tl.where(i == 0, some[0], some[1])
    else:
        return tl.where(i == 0, some[0], tl.where(i == 1, some[1], some[2]))


@triton.jit
def product(
    i,
    image,  # [B K, D]
    weights,  # one, two or three [N, D]
    biases,  # as many [N]
    residual,  # [B K, N]
    norm,  # gain and shift, [C] each
    partial,  # [parts, 2, B K]
    moments,  # [2, B K]: means and 1 / standard deviations
    results,  # as many as weights, [B K, N]
    other,  # [B K, N]
    rows,
    count,
    eps,
    strides,
    N: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    IMAGE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile ``i`` of out = W a + b of one weight, or of two or three with a result each.

    IMAGE "dense": a is the image. "tokens": so it is, with these strides. "normed": a = norm(image) by the moments in
    partial, BP parts of BN columns, which go into moments; with several weights a goes into other.
    RESIDUAL "tokens": with these strides. "normed": norm of the residual by moments.
    EPILOGUE "partial": each row's mean and sum of squared distances from it over the BN columns go into partial.
    "gelu": other = gelu(out).
    """
    s_b, s_k = strides
    gain, shift = norm
    WEIGHTS: tl.constexpr = len(weights)
    blocks: tl.constexpr = (N + BN - 1) // BN
    i_m = i // (blocks * WEIGHTS) * BM
    i_e = i % (blocks * WEIGHTS) // blocks
    i_n = i % blocks * BN
    o_r = i_m + tl.arange(0, BM)
    m_m = o_r < rows
    o_m = o_r.to(tl.int64)
    o_a = text_rows(i_m, count, s_b, s_k, BM) if IMAGE == "tokens" else o_m * D
    o_y = o_m * N
    weight, bias, out = chosen(i_e, weights), chosen(i_e, biases), chosen(i_e, results)
    m_once = o_r < tl.where(i % (blocks * WEIGHTS) == 0, rows, 0)  # of all that have these rows, one program

    if IMAGE == "normed":
        o_p = tl.arange(0, BP)
        b_n = tl.where(o_p * BN < D, tl.minimum(D - o_p * BN, BN), 0).to(tl.float32)[None, :]
        o_part = (2 * o_p * rows)[None, :] + o_r[:, None]
        m_part = m_m[:, None] & (o_p * BN < D)[None, :]
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
    if EPILOGUE == "partial":
        # Columns beyond N are zero so far.
        b_n = tl.minimum(N - i_n, BN).to(tl.float32)
        b_mean = tl.sum(b_y, 1) / b_n
        b_d = tl.where((i_n + tl.arange(0, BN) < N)[None, :], b_y - b_mean[:, None], 0.0)
        partial += (2 * (i_n // BN)) * rows
        tl.store(partial + o_r, b_mean, mask=m_m)
        tl.store(partial + rows + o_r, tl.sum(b_d * b_d, 1), mask=m_m)


@triton.jit
def load_head(matrix, o_t, m_t, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The tokens ``o_t`` of a head in a matrix with rows of S numbers, zero outside. [BT, BD]"""
    return load_rows(matrix, o_t.to(tl.int64) * S, m_t, 0, D, BD)


@triton.jit
def attention(
    i,
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
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Block ``i`` of out = P V with P = softmax(scale Q K^T), and lse = log2 sum_n exp(scale q k_n)."""
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
    for i_t in tl.range(0, count, BT, num_stages=STAGES):
        o_n = i_t + tl.arange(0, BT)
        m_n = o_n < count
        b_k = load_head(qkv + C, o_n, m_n, 3 * C, D, BD)  # [BT, BD]
        b_v = load_head(qkv + 2 * C, o_n, m_n, 3 * C, D, BD)  # [BT, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_c  # [BQ, BT]
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


@triton.jit
def norm_rows(i, sums, norm, moments, out, rows, eps, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """``BR`` rows of out = norm(sums), and their moments."""
    gain, shift = norm
    o_r = i * BR + tl.arange(0, BR)
    m_m = o_r < rows
    o_m = o_r.to(tl.int64) * C
    b_x = load_rows(sums, o_m, m_m, 0, C, BC).to(tl.float32)  # [BR, BC]
    b_mean = tl.sum(b_x, 1) / C
    b_d = tl.where((tl.arange(0, BC) < C)[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_d * b_d, 1) / C + tl.cast(eps, tl.float32))
    tl.store(moments + o_r, b_mean, mask=m_m)
    tl.store(moments + rows + o_r, b_rstd, mask=m_m)
    store_rows(out, normalised(b_x, b_mean, b_rstd, gain, shift, 0, C, BC), o_m, m_m, 0, C, BC)


@triton.jit(do_not_specialize=["rows", "count", "eps"])
def former_fwd_first_kernel(
    image,  # [B K, C]
    weight,  # [N, C]
    bias,  # [N]
    residual,  # [B K, N]
    partial,  # [parts, 2, B K]
    out,  # [B K, N]
    counters,  # [2]
    rows,
    count,
    eps,
    s_b,
    s_k,
    N: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ENTRY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product before the chain: Q, K and V of the tokens, or with ENTRY S0 = residual + W image + b."""
    IMAGE: tl.constexpr = "dense" if ENTRY else "tokens"
    RESIDUAL: tl.constexpr = "tokens" if ENTRY else "none"
    EPILOGUE: tl.constexpr = "partial" if ENTRY else ""
    i, none = tl.program_id(0), (bias, bias)
    product(
        *(i, image, (weight,), (bias,), residual, none, partial, partial, (out,), out),
        *(rows, count, eps, (s_b, s_k), N, C, BM, BN, BK, 1, IMAGE, RESIDUAL, EPILOGUE, PRECISION),
    )
    if i == 0:
        tl.store(counters + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit(do_not_specialize=["rows", "count", "heads", "blocks", "eps"])
def former_fwd_chain_kernel(
    tokens,  # [B K, C], with the strides s_b and s_k, or S0
    gain0,  # [C]
    shift0,
    gain1,
    shift1,
    gain2,
    shift2,
    partial,  # [2 or 3, parts, 2, B K]
    moments,  # [4 or 6, B K]
    qkv_weight,  # [3 C, C]
    qkv_bias,
    qkv,  # [B K, 3 C]
    mixed,  # [B K, C]
    lse,  # [B, heads, K]
    out_weight,  # [C, C]
    out_bias,
    sums1,  # [B K, C]
    up_weight,  # [F, C]
    up_bias,
    hidden,  # [B K, F]
    activated,  # [B K, F]
    down_weight,  # [C, F]
    down_bias,
    sums2,  # [B K, C]
    out,  # [B K, C]
    exit0_weight,  # [C, C]
    exit0_bias,
    exit0,  # [B K, C]
    exit1_weight,
    exit1_bias,
    exit1,
    exit2_weight,
    exit2_bias,
    exit2,
    counters,  # [2]
    scale,
    rows,
    count,
    heads,
    blocks,
    eps,
    s_b,
    s_k,
    C: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    EXITS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From Q, K and V, which are there, to T'; with exits from S0 to their results, T' besides."""
    BRIDGED: tl.constexpr = EXITS > 0
    FIRST: tl.constexpr = "normed" if BRIDGED else "tokens"
    LAST: tl.constexpr = "partial" if BRIDGED else ""
    heights = tl.cdiv(rows, BM)
    square = heights * tl.cdiv(C, BN)
    mixes = heights * tl.cdiv(3 * C, BN) if BRIDGED else 0
    outs = mixes + rows // count * blocks * heads
    ups = outs + square
    downs = ups + heights * tl.cdiv(F, BN)
    last = downs + square
    partial1, moments1 = partial, moments
    if BRIDGED:
        partial1 += tl.cast(rows, tl.int64) * ((C + BN - 1) // BN * 2)
        moments1 += 2 * rows
    partial2 = partial1 + tl.cast(rows, tl.int64) * ((C + BN - 1) // BN * 2)
    where = (rows, count, eps, (s_b, s_k))
    norm0, norm1, norm2 = (gain0, shift0), (gain1, shift1), (gain2, shift2)
    if EXITS == 3:
        weights = (exit0_weight, exit1_weight, exit2_weight)
        biases, exits = (exit0_bias, exit1_bias, exit2_bias), (exit0, exit1, exit2)
    else:
        weights, biases, exits = (exit0_weight, exit1_weight), (exit0_bias, exit1_bias), (exit0, exit1)

    i = next_task(counters)
    if i < mixes:
        if BRIDGED:
            product(
                *(i, tokens, (qkv_weight,), (qkv_bias,), tokens, norm0, partial, moments, (qkv,), qkv),
                *where,
                *(3 * C, C, BM, BN, BK, BP, "normed", "none", "", PRECISION),
            )
        task_done(counters)
    elif i < outs:
        wait_for(counters, mixes)
        attention(i - mixes, qkv, mixed, lse, scale, count, heads, blocks, C, D, BQ, BT, BD, STAGES, PRECISION)
        task_done(counters)
    elif i < ups:
        wait_for(counters, outs)
        product(
            *(i - outs, mixed, (out_weight,), (out_bias,), tokens, norm0, partial1, moments, (sums1,), sums1),
            *where,
            *(C, C, BM, BN, BK, BP, "dense", FIRST, "partial", PRECISION),
        )
        task_done(counters)
    elif i < downs:
        wait_for(counters, ups)
        product(
            *(i - ups, sums1, (up_weight,), (up_bias,), sums1, norm1, partial1, moments1, (hidden,), activated),
            *where,
            *(F, C, BM, BN, BK, BP, "normed", "none", "gelu", PRECISION),
        )
        task_done(counters)
    elif i < last:
        wait_for(counters, downs)
        product(
            *(i - downs, activated, (down_weight,), (down_bias,), sums1, norm1, partial2, moments1, (sums2,), sums2),
            *where,
            *(C, F, BM, BN, BK, BP, "dense", "normed", LAST, PRECISION),
        )
        task_done(counters)
    else:
        wait_for(counters, last)
        moments2 = moments1 + 2 * rows
        if BRIDGED:
            product(
                *(i - last, sums2, weights, biases, sums2, norm2, partial2, moments2, exits, out),
                *where,
                *(C, C, BM, BN, BK, BP, "normed", "none", "", PRECISION),
            )
        else:
            norm_rows(i - last, sums2, norm2, moments2, out, rows, eps, C, BR, BC)
