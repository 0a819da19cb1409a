"""The inverted bottleneck's backward kernels; what they compute stands in ``inverted_bottleneck.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from fusekern.kernels.batch_norm import add_parts, finish_sums, last_to_arrive, store_sums
from fusekern.kernels.inverted_bottleneck_fwd import (
    load_matrix,
    load_pixels,
    load_vector,
    relu6,
    set_to_zero,
    store_pixels,
)


@triton.jit(do_not_specialize=["size", "tiles", "steps", "run", "count", "eps"])
def inverted_bottleneck_reduce_kernel(
    grad,
    image,
    mean,
    partial,
    vectors,
    gamma,
    sums,
    coef,
    dweight,
    dbias,
    fresh,
    out,
    size,
    tiles,
    steps,
    run,
    count,
    eps,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    COUNTERS: tl.constexpr,
    LAST: tl.constexpr,
    BATCH: tl.constexpr,
):
    """sum g and sum g (y - mean) over ``run`` of the tiles of pixels, into partial, [parts, 2, C].

    Where that is none a program has all pixels of its channels: it stores the sums and what the norm makes of them and,
    with out, the gradient of y, p g + q (y - mean) + r.
    """
    i = tl.program_id(0)
    if fresh is not None:
        set_to_zero(fresh, i, COUNTERS)
    i_c = i % tl.cdiv(C, BC) * BC
    i_part = i // tl.cdiv(C, BC)
    b_mean = load_vector(mean, 0, i_c, C, BC)[None, :]
    b_first = tl.zeros([BP, BC], tl.float32)
    b_second = tl.zeros([BP, BC], tl.float32)
    for i_t in range(i_part * run, tl.minimum((i_part + 1) * run, steps)):
        i_b = (i_t // tiles).to(tl.int64)
        i_p = i_t % tiles * BP
        b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_c, s_gp, s_gc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
        b_y = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BC, LAST).to(tl.float32)  # [BP, BC]
        # Outside g is zero: so is what it adds.
        b_first += b_g
        b_second += b_g * (b_y - b_mean)
    b_sum = tl.sum(b_first, 0)
    b_product = tl.sum(b_second, 0)
    if partial is not None:
        store_sums(partial, i_part.to(tl.int64), b_sum, b_product, i_c, C, BC)
    else:
        o_c = i_c + tl.arange(0, BC)
        b_p, b_q, b_r = finish_sums(
            b_sum, b_product, None, vectors, gamma, sums, coef, dweight, dbias, count, eps, o_c, C, BATCH
        )
        if out is not None:
            for i_t in range(0, steps):
                i_b = (i_t // tiles).to(tl.int64)
                i_p = i_t % tiles * BP
                b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_c, s_gp, s_gc, C, BP, BC, LAST).to(tl.float32)
                b_y = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BC, LAST).to(tl.float32)
                b_dy = b_p[None, :] * b_g + (b_q[None, :] * (b_y - b_mean) + b_r[None, :])
                store_pixels(out + i_b * s_ob, b_dy, i_p, size, i_c, s_op, s_oc, C, BP, BC, LAST)


@triton.jit(do_not_specialize=["parts"])
def inverted_bottleneck_sum_kernel(
    partial,
    product,
    vectors,
    mean,
    total,
    size,
    parts,
    C: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    FINISH: tl.constexpr,
):
    """The sum S of [parts, size] over the parts, in a fixed order.

    With FINISH what becomes of it in the gradient of a weight [., C]:  p S + q product + u mean^T,  (p, q, u) being
    the vectors, [3, .].
    """
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_s = o_s < size
    b_sum = tl.zeros([BT, BS], tl.float32)
    for i_t in range(0, parts, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = (o_t < parts)[:, None] & m_s[None, :]
        b_sum += tl.load(partial + o_t.to(tl.int64)[:, None] * size + o_s[None, :], mask=m_t, other=0.0)
    b_total = tl.sum(b_sum, 0)
    if FINISH:
        o_e = o_s // C
        o_v = tl.cast(size // C, tl.int64)
        b_p = tl.load(vectors + o_e, mask=m_s, other=0.0)
        b_q = tl.load(vectors + o_v + o_e, mask=m_s, other=0.0)
        b_u = tl.load(vectors + 2 * o_v + o_e, mask=m_s, other=0.0)
        b_mean = tl.load(mean + o_s % C, mask=m_s, other=0.0)
        b_total = b_p * b_total + (b_q * tl.load(product + o_s, mask=m_s, other=0.0) + b_u * b_mean)
    tl.store(total + o_s, b_total.to(total.dtype.element_ty), mask=m_s)


@triton.jit
def weight_tile(
    i,
    grad,
    image,
    mean,
    affine,
    out,
    sums,
    size,
    tiles,
    steps,
    run,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[o, c] = sum_p g[p, o] a[p, c] over ``run`` of the tiles of pixels, [parts, O, C]; BK of the C channels.

    a is x, or x - mean with CENTRE "image" or "both", or relu6(scale x + shift) with affine; with "both" g is g - mean
    too. With sums  sum_p g  goes there, [parts, O].
    """
    i_c = i % tl.cdiv(C, BK) * BK
    i_o = i // tl.cdiv(C, BK) % tl.cdiv(O, BO) * BO
    i_part = i // tl.cdiv(C, BK) // tl.cdiv(O, BO)
    if affine is not None:
        b_scale = load_vector(affine, 0, i_c, C, BK)[None, :]
        b_shift = load_vector(affine, 1, i_c, C, BK)[None, :]
    if CENTRE != "none":
        b_mean = load_vector(mean, 0, i_c, C, BK)[None, :]
    if CENTRE == "both":
        b_mean_g = load_vector(mean, 0, i_o, O, BO)[None, :]

    b_dw = tl.zeros([BO, BK], tl.float32)
    b_sum = tl.zeros([BO], tl.float32)
    for i_t in range(i_part * run, tl.minimum((i_part + 1) * run, steps)):
        i_b = (i_t // tiles).to(tl.int64)
        i_p = i_t % tiles * BP
        m_p = (i_p + tl.arange(0, BP) < size)[:, None]
        b_g = load_pixels(grad + i_b * s_gb, i_p, size, i_o, s_gp, s_gc, O, BP, BO, LAST)  # [BP, BO]
        b_x = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, C, BP, BK, LAST)  # [BP, BK]
        if sums is not None:
            b_sum += tl.sum(b_g.to(tl.float32), 0)
        if CENTRE == "both":
            b_g = tl.where(m_p, b_g.to(tl.float32) - b_mean_g, 0.0).to(b_g.dtype)
        if CENTRE != "none":
            b_x = (b_x.to(tl.float32) - b_mean).to(b_x.dtype)
        if affine is not None:
            b_x = relu6(b_x.to(tl.float32) * b_scale + b_shift).to(b_x.dtype)
        b_dw = tl.dot(tl.trans(b_g), b_x, b_dw, input_precision=PRECISION)

    o_o = i_o + tl.arange(0, BO)
    o_c = i_c + tl.arange(0, BK)
    i_part = i_part.to(tl.int64)
    o_w = (i_part * O + o_o)[:, None] * C + o_c[None, :]
    tl.store(out + o_w, b_dw.to(out.dtype.element_ty), mask=(o_o < O)[:, None] & (o_c < C)[None, :])
    if sums is not None:
        tl.store(sums + i_part * O + o_o, b_sum, mask=o_o < tl.where(i_c == 0, O, 0))


@triton.jit(do_not_specialize=["size", "tiles", "steps", "run"])
def inverted_bottleneck_bwd_weight_kernel(
    grad,
    image,
    mean,
    out,
    sums,
    size,
    tiles,
    steps,
    run,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a weight, ``weight_tile``, of which this is a launch of its own."""
    weight_tile(
        *(tl.program_id(0), grad, image, mean, None, out, sums, size, tiles, steps, run),
        *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, C, O, BP, BO, BK, LAST, CENTRE, PRECISION),
    )


@triton.jit
def hidden_tile(
    i,
    grad,
    weight,
    image,
    affine,
    mean,
    out,
    partial,
    size,
    tiles,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz[p, e] = mask(v2[p, e]) sum_o dy3[p, o] weight[o, e],  v2 = scale y2 + shift,  1 for 0 < v2 < 6 being the mask.

    C are the channels o, O the channels e. sum dz and sum dz (y2 - mean) go into partial, [parts, 2, O].
    """
    i_e = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    grad += i_b * s_gb

    b_dz = tl.zeros([BP, BO], tl.float32)
    for i_c in range(0, C, BK):
        b_g = load_pixels(grad, i_p, size, i_c, s_gp, s_gc, C, BP, BK, LAST)  # [BP, BK]
        b_w = load_matrix(weight, i_c, i_e, C, O, BK, BO)  # [BK, BO]
        b_dz = tl.dot(b_g, b_w, b_dz, input_precision=PRECISION)

    b_y = load_pixels(image + i_b * s_xb, i_p, size, i_e, s_xp, s_xc, O, BP, BO, LAST).to(tl.float32)  # [BP, BO]
    b_v = b_y * load_vector(affine, 0, i_e, O, BO)[None, :] + load_vector(affine, 1, i_e, O, BO)[None, :]
    b_dz = tl.where((b_v > 0.0) & (b_v < 6.0), b_dz, 0.0)
    store_pixels(out + i_b * s_ob, b_dz, i_p, size, i_e, s_op, s_oc, O, BP, BO, LAST)
    m_p = (i_p + tl.arange(0, BP) < size)[:, None]
    b_d = tl.where(m_p, b_dz * (b_y - load_vector(mean, 0, i_e, O, BO)[None, :]), 0.0)
    store_sums(partial, i_part, tl.sum(tl.where(m_p, b_dz, 0.0), 0), tl.sum(b_d, 0), i_e, O, BO)


@triton.jit(do_not_specialize=["first", "size", "tiles", "tiles_w", "steps", "run", "count", "eps"])
def inverted_bottleneck_bwd_project_kernel(
    grad,
    weight,
    image,
    affine,
    mean,
    out,
    partial,
    out_w,
    vectors,
    gamma,
    sums,
    coef,
    dweight,
    dbias,
    arrived,
    first,
    size,
    tiles,
    tiles_w,
    steps,
    run,
    count,
    eps,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    WO: tl.constexpr,
    WK: tl.constexpr,
    BT: tl.constexpr,
    LAST: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw3 = dy3^T relu6(v2), the ``first`` programs, and dz of the hidden map, the others: see what they call.

    With arrived the sums of dz become what the norm before makes of them.
    """
    i = tl.program_id(0)
    if i < first:
        weight_tile(
            *(i, grad, image, None, affine, out_w, None, size, tiles_w, steps, run),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, O, C, WP, WO, WK, LAST, "none", PRECISION),
        )
    else:
        i_h = i - first
        hidden_tile(
            *(i_h, grad, weight, image, affine, mean, out, partial, size, tiles),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, s_ob, s_op, s_oc, C, O, BP, BO, BK, LAST, PRECISION),
        )
        if arrived is not None:
            i_e = i_h % tl.cdiv(O, BO)
            parts = (tl.num_programs(0) - first) // tl.cdiv(O, BO)
            if last_to_arrive(arrived + i_e, parts):
                add_parts(
                    *(partial, None, vectors, gamma, sums, coef, dweight, dbias, parts, count, eps),
                    *(i_e * BO, O, BATCH, BO, BT),
                )


@triton.jit
def image_tile(
    i,
    grad,
    weight,
    image,
    mean,
    matrix,
    vectors,
    residual,
    out,
    size,
    tiles,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_rb,
    s_rp,
    s_rc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx[p, c] = sum_e d[p, e] weight[e, c] and the residual, if any; C are the channels e, O the channels c.

    With a matrix also  k sum_c' x[p, c'] matrix[c', c] + u[c],  u and k being the rows of vectors, [2, O]; with CENTRE
    x - mean stands in the place of x.
    """
    i_o = i % tl.cdiv(O, BO) * BO
    i_part = (i // tl.cdiv(O, BO)).to(tl.int64)
    i_b = i_part // tiles
    i_p = (i_part % tiles).to(tl.int32) * BP
    grad += i_b * s_gb

    b_dx = tl.zeros([BP, BO], tl.float32)
    if matrix is not None:
        # The smaller part first, since it is scaled.
        for i_c in range(0, O, BK):
            b_x = load_pixels(image + i_b * s_xb, i_p, size, i_c, s_xp, s_xc, O, BP, BK, LAST)  # [BP, BK]
            if CENTRE:
                b_x = b_x - load_vector(mean, 0, i_c, O, BK)[None, :]
            b_k = load_matrix(matrix, i_c, i_o, O, O, BK, BO)  # [BK, BO]
            b_dx = tl.dot(b_x, b_k, b_dx, input_precision=PRECISION)
        b_dx = b_dx * load_vector(vectors, 1, i_o, O, BO)[None, :] + load_vector(vectors, 0, i_o, O, BO)[None, :]
    for i_c in range(0, C, BK):
        b_g = load_pixels(grad, i_p, size, i_c, s_gp, s_gc, C, BP, BK, LAST)  # [BP, BK]
        b_w = load_matrix(weight, i_c, i_o, C, O, BK, BO)  # [BK, BO]
        b_dx = tl.dot(b_g, b_w, b_dx, input_precision=PRECISION)
    if residual is not None:
        b_dx += load_pixels(residual + i_b * s_rb, i_p, size, i_o, s_rp, s_rc, O, BP, BO, LAST).to(tl.float32)
    store_pixels(out + i_b * s_ob, b_dx, i_p, size, i_o, s_op, s_oc, O, BP, BO, LAST)


@triton.jit(do_not_specialize=["first", "size", "tiles", "tiles_w", "steps", "run"])
def inverted_bottleneck_bwd_expand_kernel(
    grad,
    weight,
    image,
    residual,
    out,
    out_w,
    first,
    size,
    tiles,
    tiles_w,
    steps,
    run,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_rb,
    s_rp,
    s_rc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    WO: tl.constexpr,
    WK: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw1 = dy1^T x, the ``first`` programs, and dx, the others: see what they call."""
    i = tl.program_id(0)
    if i < first:
        weight_tile(
            *(i, grad, image, None, None, out_w, None, size, tiles_w, steps, run),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, O, C, WP, WO, WK, LAST, "none", PRECISION),
        )
    else:
        image_tile(
            *(i - first, grad, weight, None, None, None, None, residual, out, size, tiles),
            *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, s_rb, s_rp, s_rc, s_ob, s_op, s_oc),
            *(C, O, BP, BO, BK, LAST, False, PRECISION),
        )


@triton.jit(do_not_specialize=["size", "tiles"])
def inverted_bottleneck_bwd_image_kernel(
    grad,
    weight,
    image,
    mean,
    matrix,
    vectors,
    residual,
    out,
    size,
    tiles,
    s_gb,
    s_gp,
    s_gc,
    s_xb,
    s_xp,
    s_xc,
    s_rb,
    s_rp,
    s_rc,
    s_ob,
    s_op,
    s_oc,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the image with a matrix, ``image_tile``, of which this is a launch of its own."""
    image_tile(
        *(tl.program_id(0), grad, weight, image, mean, matrix, vectors, residual, out, size, tiles),
        *(s_gb, s_gp, s_gc, s_xb, s_xp, s_xc, s_rb, s_rp, s_rc, s_ob, s_op, s_oc),
        *(C, O, BP, BO, BK, LAST, CENTRE, PRECISION),
    )
