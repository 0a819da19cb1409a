"""The inverted bottleneck in stages: its 1x1 convolutions as products of matrices, with the batch norms around them.

A norm enters where the tensor behind it is read anyway: as a scale, a shift and ReLU6 of an operand, and what it needs
of the tensor before it is added up where that is written. No tensor of E channels is written but y1, y2 and their
gradients. The depthwise stages between are CUDA, ``torch.ops.fusekern_cuda``: a tile is activated once there, not once
for each tap.

A sum over all pixels has parts, a program each, which are added in a fixed order. Of statistics and of the sums of a
norm's backward ``batch_norm`` makes what the norm applies. Where parts are few it does so within the kernel that leaves
them: the last program to arrive, by a counter that an earlier kernel of the pass has set to zero, goes on; or, where
there is no earlier kernel, one program has all pixels, or the next kernel joins what it needs. Else it is a launch.

The gradients of a product's two operands have nothing to do with each other: they are one launch, whose first programs
have the weight's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fusekern.kernels import batch_norm
from fusekern.kernels.batch_norm import Summed
from fusekern.kernels.inverted_bottleneck_bwd import (
    inverted_bottleneck_bwd_expand_kernel,
    inverted_bottleneck_bwd_image_kernel,
    inverted_bottleneck_bwd_project_kernel,
    inverted_bottleneck_bwd_weight_kernel,
    inverted_bottleneck_reduce_kernel,
    inverted_bottleneck_sum_kernel,
)
from fusekern.kernels.inverted_bottleneck_cases import compile_cases as compile_cases
from fusekern.kernels.inverted_bottleneck_fwd import inverted_bottleneck_apply_kernel, inverted_bottleneck_fwd_kernel
from fusekern.kernels.inverted_bottleneck_places import (
    AT_ONCE,
    COUNTERS,
    FEW,
    FLAT,
    MANY,
    WHOLE,
    Places,
    Rows,
    as_rows,
    by_gram,
    finishes_depthwise,
    fwd_places,
    group_of,
    is_whole,
    joined_behind,
    kind_of,
    options_of,
    rows_of,
    run_length,
    setting_of,
    weight_places,
)
from fusekern.kernels.inverted_bottleneck_plan import launches as launches
from fusekern.kernels.launching import cdiv, on_device_of, precision_of
from torch import Tensor


class Seen(NamedTuple):
    """What a stage makes of the mean and M2 of what it writes: ``stats``, or the ``vectors`` of the norm behind it."""

    stats: Tensor | None
    vectors: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _seen(*arguments: Tensor | float | None) -> Seen | None:
    seen = Seen(*arguments)
    return None if seen.stats is None and seen.vectors is None else seen


class Parts(NamedTuple):
    """Moments of tiles of ``pixels``, so many of them for each ``size``, ``[parts, 2, c]``, and what is to be made of
    them."""

    partial: Tensor
    size: int
    pixels: int
    seen: Seen

    def join(self) -> None:
        batch_norm.join(self.partial, self.size, cdiv(self.size, self.pixels), self.pixels, *self.seen)


class Left(NamedTuple):
    """What a stage leaves to those that follow in its pass.

    ``counters``, ``[2, COUNTERS]``, are zero: two of the stages that follow have one for the programs of each of their
    blocks of channels. ``parts`` the depthwise forward joins; ``grad`` is the gradient of what a norm was applied to.
    """

    counters: Tensor
    parts: Parts | None = None
    grad: Tensor | None = None


def _new_counters(like: Tensor) -> Tensor:
    return torch.empty(2, COUNTERS, dtype=torch.int32, device=like.device)


def _arrived(places: Places, left: Left | None, row: int) -> Tensor | None:
    """The counters by which the last program of each block is known, if that one adds the parts."""
    return left.counters[row] if left is not None and places.finish() else None


def _fwd(
    image: Tensor,
    before: Tensor | Sequence | None,
    weight: Tensor,
    out: Tensor,
    seen: Seen | None,
    norm: str = "none",
    behind: Sequence | None = None,
    residual: Tensor | None = None,
    fresh: Tensor | None = None,
    left: Left | None = None,
) -> Parts | None:
    """``before`` and ``behind``: a norm as its affine ``[2, c]`` or, by running statistics, as weight, bias, mean, var
    and eps. What is to be made of the result's moments but has not been is returned."""
    rows = rows_of(out) if before is None else rows_of(image, out)
    channels, channels_out = weight.shape[1], weight.shape[0]
    image, s_x = as_rows(rows, image)
    other, s_r = (out, (0, 0, 0)) if residual is None else as_rows(rows, residual)
    _, s_o = as_rows(rows, out)
    tile, places = fwd_places(rows, kind_of(rows, image, out, other), channels_out)
    nothing = (None,) * 4 + (0.0,)
    affine, running = (before, nothing) if before is None or isinstance(before, Tensor) else (None, before)
    gamma, beta, mean, var, eps = running
    gamma_out, beta_out, mean_out, var_out, eps_out = nothing if behind is None else behind
    partial = stats = vectors = arrived = None
    if seen is not None:
        partial = torch.empty((places.parts, 2, channels_out), dtype=torch.float32, device=out.device)
        arrived = _arrived(places, left, 1)
    if arrived is not None:
        stats, vectors, gamma_out, beta_out, eps_out = seen
    inverted_bottleneck_fwd_kernel[(places.parts * places.blocks,)](
        *(image, affine, mean, var, gamma, beta, weight, mean_out, var_out, gamma_out, beta_out),
        *(residual if residual is None else other, out, partial, stats, vectors, fresh, arrived, eps, eps_out),
        *(rows.size, rows.tiles(tile.BP), *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        BT=AT_ONCE,
        COUNTERS=2 * COUNTERS,
        LAST=rows.last,
        NORM=norm,
        PRECISION=precision_of(image.dtype),
        **options_of(tile),
    )
    return None if partial is None or arrived is not None else Parts(partial, rows.size, tile.BP, seen)


def _apply(mode: str, image: Tensor, other: Tensor | None, vectors: Tensor, out: Tensor) -> None:
    rows = rows_of(out)
    image, s_x = as_rows(rows, image)
    other, s_r = (out, (0, 0, 0)) if other is None else as_rows(rows, other)
    _, s_o = as_rows(rows, out)
    pixels, channels = FLAT[:2]
    tiles = rows.tiles(pixels)
    inverted_bottleneck_apply_kernel[(rows.images * tiles * cdiv(out.shape[1], channels),)](
        *(image, other, vectors, out, rows.size, tiles, *s_x, *s_r, *s_o),
        C=out.shape[1],
        BP=pixels,
        BC=channels,
        LAST=rows.last,
        MODE=mode,
        **options_of(FLAT),
    )


def _sum(partial: Tensor, total: Tensor, finish: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """``finish``: the product, vectors and mean that the kernel has for it."""
    product, vectors, mean = finish or (partial, partial, partial)
    count, width = FEW if partial.shape[0] <= 4 * FEW[0] else MANY
    inverted_bottleneck_sum_kernel[(cdiv(total.numel(), width),)](
        *(partial, product, vectors, mean, total, total.numel(), partial.shape[0]),
        C=total.shape[-1],
        BT=count,
        BS=width,
        FINISH=finish is not None,
        num_warps=4 if count == FEW[0] else 8,
    )


def _bwd_weight(
    grad: Tensor,
    image: Tensor,
    rows: Rows,
    total: Tensor | None = None,
    centre: str = "none",
    mean: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Into ``total``, ``[O, C]``, sum_p g a; without it its parts, ``[parts, O, C]``, and those of sum_p g."""
    channels, channels_out = image.shape[1], grad.shape[1]
    (grad, s_g), (image, s_x) = as_rows(rows, grad), as_rows(rows, image)
    tile = setting_of(kind_of(rows, grad, image), channels_out, channels).weight
    programs, run, parts = weight_places(rows, tile, channels_out, channels)
    tiles = rows.tiles(tile.BP)
    partial = total[None] if total is not None and parts == 1 else _new_parts(parts, channels_out, channels, grad)
    apart = partial.new_empty(parts, channels_out) if sums else None
    inverted_bottleneck_bwd_weight_kernel[(programs * parts,)](
        *(grad, image, None if centre == "none" else mean, partial, apart),
        *(rows.size, tiles, rows.images * tiles, run, *s_g, *s_x),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        CENTRE=centre,
        PRECISION=precision_of(image.dtype),
        **options_of(tile),
    )
    if total is not None and parts > 1:
        _sum(partial, total)
    return partial, apart


def _new_parts(parts: int, channels_out: int, channels: int, like: Tensor) -> Tensor:
    return torch.empty((parts, channels_out, channels), dtype=torch.float32, device=like.device)


def _bwd_image(
    grad: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, gram: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """``gram``: the image, its mean, the matrix and the vectors that the kernel has for it."""
    rows = rows_of(grad, out)
    channels, channels_out = weight.shape
    grad, s_g = as_rows(rows, grad)
    other, s_r = (out, (0, 0, 0)) if residual is None else as_rows(rows, residual)
    image, mean, matrix, vectors = gram
    image, s_x = as_rows(rows, image)
    _, s_o = as_rows(rows, out)
    tile = setting_of(kind_of(rows, grad, out, image, other), rows.images * rows.size, channels_out).image
    tiles = rows.tiles(tile.BP)
    inverted_bottleneck_bwd_image_kernel[(rows.images * tiles * cdiv(channels_out, tile.BO),)](
        *(grad, weight, image, mean, matrix, vectors, residual if residual is None else other, out),
        *(rows.size, tiles, *s_g, *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        CENTRE=grad.dtype == torch.float32,
        PRECISION=precision_of(grad.dtype),
        **options_of(tile),
    )


# ---- stages: each fills its outputs, which come last -------------------------------------------------------------


def inverted_bottleneck_expand_fwd(
    x: Tensor,
    w1: Tensor,
    y1: Tensor,
    stats1: Tensor | None,
    vectors1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps1: float = 0.0,
) -> Left:
    """``y1`` ``[B, E, H, W]`` = W1 x with W1 ``[E, C]``; its mean and sum of squared distances, ``[2, E]``, or BN1's
    vectors, ``[5, E]``, unless their parts are left to the depthwise stage."""
    counters = _new_counters(x)
    with on_device_of(x):
        parts = _fwd(x, None, w1, y1, _seen(stats1, vectors1, weight1, bias1, eps1), fresh=counters)
        if parts is not None and (stats1 is not None or not joined_behind(len(parts.partial))):
            parts.join()
            parts = None
    return Left(counters, parts)


def inverted_bottleneck_depthwise_fwd(
    y1: Tensor,
    affine1: Tensor,
    wd: Tensor,
    stride: int,
    y2: Tensor,
    stats2: Tensor | None,
    vectors2: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    eps2: float = 0.0,
    left: Left | None = None,
) -> Left | None:
    """``y2`` ``[B, E, h, w]`` = Wd * relu6(v1) with Wd ``[E, k, k]``, and its moments or BN2's vectors."""
    arrived, before = None, ()
    if left is not None:
        arrived = left.counters[0] if finishes_depthwise(y2) else None
        if left.parts is not None:
            partial, size, pixels, seen = left.parts
            before = partial, size, pixels, *seen[1:]
    seen = stats2, vectors2, weight2, bias2, eps2, arrived
    torch.ops.fusekern_cuda.bn_relu6_dw_fwd(y1, None if before else affine1, wd, stride, y2, *seen, *before)
    return left


def inverted_bottleneck_project_fwd(
    y2: Tensor,
    affine2: Tensor,
    w3: Tensor,
    y3: Tensor,
    stats3: Tensor | None,
    vectors3: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    eps3: float = 0.0,
    left: Left | None = None,
) -> None:
    """``y3`` ``[B, O, h, w]`` = W3 relu6(v2) with W3 ``[O, E]``, and its moments or BN3's vectors."""
    with on_device_of(y2):
        parts = _fwd(y2, affine2, w3, y3, _seen(stats3, vectors3, weight3, bias3, eps3), left=left)
        if parts is not None:
            parts.join()


def inverted_bottleneck_residual_fwd(y3: Tensor, affine3: Tensor, x: Tensor | None, out: Tensor) -> None:
    """``out`` = v3, plus ``x`` if there is one."""
    with on_device_of(y3):
        _apply("affine" if x is None else "residual", y3, x, affine3, out)


def inverted_bottleneck_infer(x: Tensor, w1: Tensor, wd: Tensor, w3: Tensor, *rest: Tensor | float | None) -> None:
    """All of it, no gradients wanted.

    ``rest``: three norms by running statistics, of each weight, bias, mean, var and eps; stride, whether to add ``x``,
    and ``out`` ``[B, O, h, w]``.
    """
    *norms, stride, residual, out = rest
    norm1, norm2, norm3 = norms[:5], norms[5:10], norms[10:]
    layout = torch.channels_last if out.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    wide = {"dtype": x.dtype, "device": x.device, "memory_format": layout}
    with on_device_of(x):
        a1 = torch.empty((x.shape[0], w1.shape[0], *x.shape[2:]), **wide)
        y2 = torch.empty((x.shape[0], w1.shape[0], *out.shape[2:]), **wide)
        _fwd(x, None, w1, a1, None, "relu6", norm1)
        torch.ops.fusekern_cuda.bn_relu6_dw_fwd(a1, None, wd, stride, y2, None)
        _fwd(y2, norm2, w3, out, None, "residual" if residual else "affine", norm3, x if residual else None)


def inverted_bottleneck_output_bwd(g: Tensor, y3: Tensor, mean3: Tensor, *summed: Tensor | float | None) -> Left:
    """``sums3`` ``[2, O]``: sum g and sum g (y3 - mean3); of them what ``Summed`` has, and of few pixels dy3, the
    gradient of y3."""
    summed, rows = Summed(*summed), rows_of(y3)
    whole = is_whole(rows)
    tile = WHOLE if whole else FLAT
    tiles, count = rows.tiles(tile.BP), rows.images * rows.size
    steps, programs = rows.images * tiles, cdiv(y3.shape[1], tile.BO)
    run = steps if whole else run_length(programs, steps)
    parts, counters = cdiv(steps, run), _new_counters(y3)
    with on_device_of(y3):
        (g, s_g), (y3, s_y) = as_rows(rows, g), as_rows(rows, y3)
        partial = dy3 = None
        if not whole:
            partial = torch.empty((parts, 2, y3.shape[1]), dtype=torch.float32, device=y3.device)
        elif summed.coef is not None:
            dy3 = torch.empty_like(y3)
        at_once = summed if whole else Summed(None)
        inverted_bottleneck_reduce_kernel[(programs * parts,)](
            *(g, y3, mean3, partial, at_once.vectors, at_once.weight, at_once.sums, at_once.coef, at_once.dweight),
            *(at_once.dbias, counters, dy3, rows.size, tiles, steps, run, float(count), at_once.eps, *s_g, *s_y, *s_y),
            C=y3.shape[1],
            BP=tile.BP,
            BC=tile.BO,
            COUNTERS=2 * COUNTERS,
            LAST=rows.last,
            BATCH=at_once.batch,
            **options_of(tile),
        )
        if not whole:
            batch_norm.add(partial, count, summed)
    return Left(counters, grad=dy3)


def inverted_bottleneck_project_bwd(
    g: Tensor,
    y3: Tensor,
    coef3: Tensor,
    y2: Tensor,
    affine2: Tensor,
    mean2: Tensor,
    w3: Tensor,
    dz: Tensor,
    dw3: Tensor,
    *summed: Tensor | float | None,
    left: Left | None = None,
) -> Left | None:
    """``dz`` = mask(v2) W3^T dy3, ``dw3`` = dy3 relu6(v2)^T, and ``sums2`` of dz with what ``Summed`` has; dy3 is that
    of BN3's backward."""
    rows, summed = rows_of(y2, y3, dz), Summed(*summed)
    with on_device_of(y2):
        # Written once: as the operand of two products each of its tiles is read some dozens of times.
        dy3 = None if left is None else left.grad
        if dy3 is None:
            dy3 = torch.empty_like(y3)
            _apply("gradient", g, y3, coef3, dy3)
        (_, s_g), (_, s_y), (_, s_z) = (as_rows(rows, image) for image in (dy3, y2, dz))
        channels, channels_out = w3.shape
        group = group_of(rows, kind_of(rows, dy3, y2, dz), "hidden", channels, channels_out)
        parts, count = group.places.parts, rows.images * rows.size
        partial = torch.empty((parts, 2, channels_out), dtype=torch.float32, device=y2.device)
        dw = dw3[None] if group.parts == 1 else _new_parts(group.parts, *w3.shape, y2)
        arrived = _arrived(group.places, left, 0)
        at_once = Summed(None) if arrived is None else summed
        first, tiles_w = group.programs * group.parts, rows.tiles(group.weight.BP)
        inverted_bottleneck_bwd_project_kernel[(first + parts * group.places.blocks,)](
            *(dy3, w3, y2, affine2, mean2, dz, partial, dw, at_once.vectors, at_once.weight, at_once.sums),
            *(at_once.coef, at_once.dweight, at_once.dbias, arrived),
            *(first, rows.size, rows.tiles(group.tile.BP), tiles_w),
            *(rows.images * tiles_w, group.run, float(count), at_once.eps, *s_g, *s_y, *s_z),
            C=channels,
            O=channels_out,
            BT=AT_ONCE,
            LAST=rows.last,
            BATCH=at_once.batch,
            PRECISION=precision_of(y2.dtype),
            **group.constexprs(),
        )
        if arrived is None:
            batch_norm.add(partial, count, summed)
        if group.parts > 1:
            _sum(dw, dw3)
    return None if left is None else Left(left.counters)


def inverted_bottleneck_depthwise_bwd(
    dz: Tensor,
    y2: Tensor,
    coef2: Tensor,
    y1: Tensor,
    affine1: Tensor,
    mean1: Tensor,
    wd: Tensor,
    stride: int,
    d: Tensor,
    dwd: Tensor,
    *summed: Tensor | float | None,
    left: Left | None = None,
) -> None:
    """``d`` = mask(v1) (Wd^T * dy2), the gradient ``dwd`` of Wd, and ``sums1`` of d with what ``Summed`` has; dy2 is
    that of BN2's backward."""
    arrived = left.counters[1] if left is not None and finishes_depthwise(d) else None
    maps = dz, y2, coef2, y1, affine1, mean1, wd, stride, d, dwd
    torch.ops.fusekern_cuda.bn_relu6_dw_bwd(*maps, *Summed(*summed), arrived)


def inverted_bottleneck_expand_bwd(
    d: Tensor,
    y1: Tensor,
    coef1: Tensor,
    x: Tensor,
    w1: Tensor,
    g: Tensor | None,
    dx: Tensor,
    dw1: Tensor,
) -> None:
    """``dx`` = W1^T dy1 (+ ``g``) and ``dw1`` = dy1 x^T for dy1 = p d + q (y1 - mean) + r, BN1's backward.

    With many pixels neither reads y1. It is W1 x, so that with m the mean of x, G the sum of (x - m) (x - m)^T over N
    pixels and u = q (W1 m - mean) + r:

        dx  = (diag(p) W1)^T d + (W1^T diag(q) W1) (x - m) + W1^T u
        dw1 = diag(p) sum_p d x^T + diag(q) W1 G + N u m^T
    """
    with on_device_of(d):
        if by_gram(x, w1.shape[0]):
            _expand_bwd_by_gram(d, coef1, x, w1, g, dx, dw1)
            return
        rows = rows_of(d, dx)
        dy1 = torch.empty_like(d)
        _apply("gradient", d, y1, coef1, dy1)
        (_, s_g), (x, s_x), (_, s_o) = (as_rows(rows, image) for image in (dy1, x, dx))
        residual, s_r = (dx, (0, 0, 0)) if g is None else as_rows(rows, g)
        channels, channels_out = w1.shape
        group = group_of(rows, kind_of(rows, dy1, x, dx, residual), "image", channels, channels_out)
        dw = dw1[None] if group.parts == 1 else _new_parts(group.parts, *w1.shape, d)
        first, tiles_w = group.programs * group.parts, rows.tiles(group.weight.BP)
        inverted_bottleneck_bwd_expand_kernel[(first + group.places.parts * group.places.blocks,)](
            *(dy1, w1, x, None if g is None else residual, dx, dw),
            *(first, rows.size, rows.tiles(group.tile.BP), tiles_w, rows.images * tiles_w, group.run),
            *(*s_g, *s_x, *s_r, *s_o),
            C=channels,
            O=channels_out,
            LAST=rows.last,
            PRECISION=precision_of(x.dtype),
            **group.constexprs(),
        )
        if group.parts > 1:
            _sum(dw, dw1)


def _expand_bwd_by_gram(
    d: Tensor, coef1: Tensor, x: Tensor, w1: Tensor, g: Tensor | None, dx: Tensor, dw1: Tensor
) -> None:
    pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]
    rows = rows_of(d, dx)
    x = as_rows(rows, x)[0]
    p, q, r, mean = coef1
    # The two means may cancel, and what is left is multiplied by the number of pixels.
    middle = x.mean((0, 2, 3), dtype=torch.float64)
    wide = w1.float()
    u = q * (w1.double() @ middle - mean).float() + r
    middle = middle.float()
    # Of 16 bits the products are exact, and the mean is taken away from their sums; of 32 from the operands.
    centred = x.dtype == torch.float32
    matrix = middle.new_empty(channels, channels)
    _bwd_weight(x, x, rows, matrix, centre="both" if centred else "none", mean=middle)
    if not centred:
        matrix.addr_(middle, middle, alpha=-pixels)
    partial, sums = _bwd_weight(d, x, rows, centre="image" if centred else "none", mean=middle, sums=centred)
    outer = pixels * u
    if centred:
        outer += p * sums.sum(0)
    # cuBLAS for what has no pixels in it.
    _sum(partial, dw1, (wide @ matrix, torch.stack((p, q, outer)), middle))
    # q is small where pixels are many: apart, it would be lost in 16 bits.
    scale = torch.linalg.vector_norm(q, torch.inf).clamp_min(torch.finfo(q.dtype).tiny)
    matrix = ((q / scale)[:, None] * wide).to(w1.dtype).t() @ w1
    vector = u @ wide
    if not centred:
        vector -= scale * (middle @ matrix.float())
    vectors = torch.stack((vector, scale.expand_as(vector)))
    _bwd_image(d, (p[:, None] * wide).to(w1.dtype), g, dx, (x, middle, matrix, vectors))
