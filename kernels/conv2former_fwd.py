"""Conv2Former's forward kernels, and what the backward has too: which block a program takes, and offsets.
What they compute stands in ``conv2former.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
