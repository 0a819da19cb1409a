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

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from fusekern.kernels import batch_norm
from fusekern.kernels.aot import Case
from fusekern.kernels.batch_norm import Summed
from fusekern.kernels.inverted_bottleneck_bwd import (
    inverted_bottleneck_bwd_expand_kernel,
    inverted_bottleneck_bwd_image_kernel,
    inverted_bottleneck_bwd_project_kernel,
    inverted_bottleneck_bwd_weight_kernel,
    inverted_bottleneck_reduce_kernel,
    inverted_bottleneck_sum_kernel,
)
from fusekern.kernels.inverted_bottleneck_fwd import inverted_bottleneck_apply_kernel, inverted_bottleneck_fwd_kernel
from torch import Tensor
from triton.runtime.jit import JITFunction


class Tile(NamedTuple):
    """Launch setting.

    Pixels, channels that come out, and channels of a step, or of a weight's gradient the other ones. Registers of a
    thread at most: where it is not stated, ptxas may spill some so that another program fits on a multiprocessor.
    """

    BP: int
    BO: int
    BK: int
    warps: int
    stages: int
    registers: int | None = None


class Setting(NamedTuple):
    """Of the forward products and of the gradients of the hidden map, the image and the weights. A weight's gradient
    shares its launch with that of a map, and so its warps and stages; the registers are stated with the map."""

    fwd: Tile
    hidden: Tile
    image: Tile
    weight: Tile


# By the products' kind and whether large tiles are enough for all multiprocessors. "ieee" is fp32 without tf32, which
# has no tensor cores and its operands in registers; "odd" is whatever has no accesses of 16 bytes, NCHW above all.
SETTINGS = {
    ("half", "medium"): Setting(*[Tile(64, 64, 64, 4, 4)] * 4),
    ("half", "large"): Setting(*[Tile(128, 128, 64, 8, 3)] * 3, Tile(64, 128, 128, 8, 3)),
    ("tf32", "medium"): Setting(*[Tile(64, 64, 32, 4, 3)] * 3, Tile(32, 64, 64, 4, 3)),
    ("tf32", "large"): Setting(
        Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(32, 128, 64, 8, 3)
    ),
    ("ieee", "medium"): Setting(*[Tile(64, 64, 16, 8, 2, 255)] * 3, Tile(16, 64, 64, 8, 2, 255)),
    ("ieee", "large"): Setting(*[Tile(128, 64, 16, 8, 2, 255)] * 3, Tile(16, 128, 64, 8, 2, 255)),
    ("odd half", "any"): Setting(
        Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2, 255), Tile(64, 64, 32, 8, 2), Tile(16, 64, 64, 8, 2)
    ),
    ("odd fp32", "any"): Setting(*[Tile(64, 64, 16, 8, 2, 255)] * 3, Tile(16, 64, 64, 8, 2, 255)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# What it takes to start a program and to write and read its part, in tiles of it.
START = 4
# What has no product: as the tiles above.
FLAT = Tile(32, 64, 64, 4, 2, 255)
# Of a program that has all pixels of its channels, and pixels up to which that is shorter than parts and a launch.
WHOLE, WHOLE_PIXELS = Tile(512, 16, 16, 8, 2, 255), 4096
# Parts up to which the last program to arrive adds them, so many at a time; and up to which depthwise blocks do so,
# the last with their own and each of them with those of the statistics before.
FINISHED, AT_ONCE, JOINED = 64, 32, 32
# Of each of two kernels, one for the programs that share their channels.
COUNTERS = 1024
# Parts and elements at a time of the kernel that adds: few parts of many elements, as of a weight, or the other way.
FEW, MANY = (16, 128), (256, 16)
# Pixels by channels from which on a Gram matrix is less work than a pass over the hidden map, and numbers of that map
# from which on the pass takes longer than the two dozen small operations to start that come with the matrix. Modelled.
GRAM_PIXELS, GRAM_NUMBERS = 8, 2**26


class Rows(NamedTuple):
    """Maps as matrices: ``images`` of them with ``size`` pixels each, the channels side by side (``last``) or not."""

    images: int
    size: int
    last: bool

    def tiles(self, pixels: int) -> int:
        return triton.cdiv(self.size, pixels)


def _strides(image: Tensor, last: bool) -> tuple[int, int, int] | None:
    """Between images, pixels and channels; none if a map is not a matrix in this layout."""
    _, c, h, w = image.shape
    s_b, s_c, s_h, s_w = image.stride()
    s_p = s_w if w > 1 else s_h
    if h > 1 and w > 1 and s_h != w * s_w:
        return None
    unit = c == 1 or s_c == 1 if last else h * w == 1 or s_p == 1
    return (s_b, 0 if h * w == 1 else s_p, 1 if last else s_c) if unit else None


def _tidy(image: Tensor, last: bool) -> Tensor:
    """A copy if the image is not a matrix; one that is as large as the op's own input or output, not as E channels."""
    if _strides(image, last):
        return image
    return image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _rows(*dense: Tensor) -> Rows:
    """Of dense maps, which lie alike. Channels_last maps are one matrix."""
    batch, _, h, w = dense[0].shape
    last = all(image.is_contiguous(memory_format=torch.channels_last) for image in dense)
    return Rows(1, batch * h * w, True) if last else Rows(batch, h * w, False)


def _as_rows(rows: Rows, image: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The image, or a tidy copy, and its strides between images, pixels and channels."""
    image = _tidy(image, rows.last)
    s_b, s_p, s_c = _strides(image, rows.last)
    batch, c, h, w = image.shape
    if rows.last:
        # Images of one pixel lie as far apart as pixels do.
        if h * w == 1:
            s_p = s_b
        if batch > 1 and s_b != h * w * s_p:
            return _as_rows(rows, image.contiguous(memory_format=torch.channels_last))
        s_b = 0
    return image, (s_b, s_p, s_c)


def _precision(image: Tensor) -> str:
    """Of fp32 products."""
    # Not ``allow_tf32``: reading that raises where the newer setting is in use.
    tf32 = image.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def kind_of(rows: Rows, *images: Tensor) -> str:
    """Which products the launch settings are for."""
    odd = any(not rows.last or image.shape[1] % 16 or _strides(image, True)[1] % 16 for image in images)
    if images[0].dtype == torch.float32:
        return "odd fp32" if odd else _precision(images[0])
    return "odd half" if odd else "half"


def setting_of(kind: str, pixels: int, channels: int) -> Setting:
    """The launch settings for a product that has so many pixels and channels."""
    if kind.startswith("odd"):
        return SETTINGS[kind, "any"]
    tiles = triton.cdiv(pixels, 128) * triton.cdiv(channels, 128)
    return SETTINGS[kind, "medium" if tiles < PROGRAMS else "large"]


def run_length(programs: int, steps: int, others: int = 0) -> int:
    """How many of its tiles a program adds up, such that the slowest multiprocessor is done first.

    ``others``: what else the launch has to do, in tiles.
    """

    def cost(parts: int) -> float:
        length = START + triton.cdiv(steps, parts)
        return max(triton.cdiv(programs * parts, PROGRAMS) * length, (programs * parts * length + others) / PROGRAMS)

    most = max(1, min(steps, 4 * PROGRAMS // programs))
    return triton.cdiv(steps, min(range(1, most + 1), key=cost))


def launches(
    image: Tensor,
    hidden: int,
    channels_out: int,
    *,
    stride: int = 1,
    batch: tuple[bool, bool, bool] = (True, True, True),
    low: bool = False,
) -> dict[str, tuple[str, ...]]:
    """What the op launches on a GPU, in order: ``fwd`` in training, ``bwd`` after it, and ``infer``.

    Kernels have the names that a profiler shows, torch's operations theirs, ``aten::...``. This is for one process and
    a dense image and gradient; what lies otherwise is copied first.

    Args:
        image: ``[B, C, H, W]``; a meta tensor will do.
        hidden: E.
        channels_out: O.
        stride: of the depthwise convolution.
        batch: which norms take the statistics of the batch. With none of them the forward is ``infer`` where nothing
            is to be learned.
        low: the expansion is computed again in the backward.
    """
    size = [triton.cdiv(side, stride) for side in image.shape[2:]]
    layout = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format

    def map_of(channels: int, size: list[int] | torch.Size) -> Tensor:
        shape = image.shape[0], channels, *size
        return torch.empty(shape, dtype=image.dtype, device="meta", memory_format=layout)

    def places(*images: Tensor) -> tuple[Rows, str]:
        rows = _rows(*images)
        return rows, kind_of(rows, *images)

    def gradients(name: str, which: str, inner: Tensor, outer: Tensor) -> list[str]:
        """Of the two operands of a product."""
        of = _group(*places(inner, outer), which, inner.shape[1], outer.shape[1])
        apart = which == "hidden" and not of.places.finish()
        return [kernel(name), *[of_sums] * apart, *[add] * (of.parts > 1)]

    kernel = "inverted_bottleneck_{}_kernel".format
    add, of_sums = kernel("sum"), "batch_norm_bwd_kernel"
    x, y1 = map_of(image.shape[1], image.shape[2:]), map_of(hidden, image.shape[2:])
    y2, y3 = map_of(hidden, size), map_of(channels_out, size)
    products = kernel("fwd"), "bn_relu6_dw_fwd_kernel", kernel("fwd")
    joined = (
        _fwd_places(*places(y1, x), hidden)[1].parts > JOINED,
        not _finishes_depthwise(y2),
        not _fwd_places(*places(y2, y3), channels_out)[1].finish(),
    )
    names = "batch_norm_join_kernel", "bn_relu6_dw_moments_kernel", "batch_norm_join_kernel"
    forward = [] if all(batch) else ["batch_norm_fwd_kernel"]
    for product, on, apart, name in zip(products, batch, joined, names, strict=True):
        forward += [product, name] if on and apart else [product]
    rows, kind = places(x)
    parts = _weight_places(rows, setting_of(kind, *[x.shape[1]] * 2).weight, *[x.shape[1]] * 2)[2]
    of_matrix = kernel("bwd_weight"), *[add] * (parts > 1)
    return {
        "fwd": (*forward, kernel("apply")),
        "bwd": (
            *([kernel("fwd")] if low else []),
            *([kernel("reduce")] if _is_whole(_rows(y3)) else [kernel("reduce"), of_sums, kernel("apply")]),
            *gradients("bwd_project", "hidden", y3, y2),
            *("bn_relu6_dw_bwd_kernel", *["bn_relu6_dw_sums_kernel"] * (not _finishes_depthwise(y1))),
            *(
                _gram_launches(x, of_matrix)
                if _gram(x, hidden)
                else (kernel("apply"), *gradients("bwd_expand", "image", y1, x))
            ),
        ),
        "infer": products,
    }


def _gram(image: Tensor, hidden: int) -> bool:
    """There are so many pixels that a Gram matrix is the shorter way."""
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    return pixels >= GRAM_PIXELS * image.shape[1] and pixels * hidden >= GRAM_NUMBERS


def _gram_launches(image: Tensor, gram: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the last stage; ``gram`` are those of the matrix."""
    weight, add, last = (f"inverted_bottleneck_{name}_kernel" for name in ("bwd_weight", "sum", "bwd_image"))
    centred = image.dtype == torch.float32
    cast = () if centred else ("aten::_to_copy",)
    of_matrix, of_sums = (), ("aten::sum", "aten::mul", "aten::add_")
    of_vector = ()
    if not centred:
        of_matrix, of_sums = ("aten::addr_",), ()
        of_vector = "aten::_to_copy", "aten::mm", "aten::mul", "aten::sub_"
    middle = "aten::_to_copy", "aten::mv", "aten::sub", "aten::_to_copy", "aten::mul", "aten::add", "aten::_to_copy"
    scale = "aten::linalg_vector_norm", "aten::clamp_min", "aten::div", "aten::mul"
    return (
        *("aten::mean", *cast, *middle, *gram, *of_matrix),
        *(weight, "aten::mul", *of_sums, "aten::mm", "aten::stack", add),
        *(*scale, *cast, "aten::mm", "aten::mm", *of_vector, "aten::stack", "aten::mul", *cast, last),
    )


def _device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
        batch_norm.join(self.partial, self.size, triton.cdiv(self.size, self.pixels), self.pixels, *self.seen)


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


class Places(NamedTuple):
    """Programs of a launch: so many parts of the pixels by so many blocks of channels."""

    parts: int
    blocks: int

    def finish(self) -> bool:
        """Does the last program to arrive add the parts of its block?"""
        return self.parts <= FINISHED and self.blocks <= COUNTERS

    def counters(self, left: Left | None, row: int) -> Tensor | None:
        """By which that program is known, if it does."""
        return left.counters[row] if left is not None and self.finish() else None


def _fwd_places(rows: Rows, kind: str, channels_out: int) -> tuple[Tile, Places]:
    tile = setting_of(kind, rows.images * rows.size, channels_out).fwd
    return tile, Places(rows.images * rows.tiles(tile.BP), triton.cdiv(channels_out, tile.BO))


def _finishes_depthwise(y: Tensor) -> bool:
    """Does the last block add up the parts of a depthwise stage that writes ``y``? They are about its tiles."""
    batch, channels, height, width = y.shape
    tiles = batch * triton.cdiv(height, 8) * triton.cdiv(width, 16)
    return tiles <= JOINED and channels <= 8 * COUNTERS


def _is_whole(rows: Rows) -> bool:
    """Are pixels so few that a program has all of them?"""
    return rows.images * rows.size <= WHOLE_PIXELS


def _options(tile: Tile) -> dict[str, int | None]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}


def _fwd(
    image: Tensor,
    before: Tensor | tuple | None,
    weight: Tensor,
    out: Tensor,
    seen: Seen | None,
    norm: str = "none",
    behind: tuple | None = None,
    residual: Tensor | None = None,
    fresh: Tensor | None = None,
    left: Left | None = None,
) -> Parts | None:
    """``before`` and ``behind``: a norm as its affine ``[2, c]`` or, by running statistics, as weight, bias, mean, var
    and eps. What is to be made of the result's moments but has not been is returned."""
    rows = _rows(out) if before is None else _rows(image, out)
    channels, channels_out = weight.shape[1], weight.shape[0]
    image, s_x = _as_rows(rows, image)
    other, s_r = (out, (0, 0, 0)) if residual is None else _as_rows(rows, residual)
    _, s_o = _as_rows(rows, out)
    tile, places = _fwd_places(rows, kind_of(rows, image, out, other), channels_out)
    nothing = (None,) * 4 + (0.0,)
    affine, running = (None, before[:5]) if isinstance(before, tuple) else (before, nothing)
    gamma, beta, mean, var, eps = running
    gamma_out, beta_out, mean_out, var_out, eps_out = nothing if behind is None else behind[:5]
    partial = stats = vectors = arrived = None
    if seen is not None:
        partial = torch.empty((places.parts, 2, channels_out), dtype=torch.float32, device=out.device)
        arrived = places.counters(left, 1)
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
        PRECISION=_precision(image),
        **_options(tile),
    )
    return None if partial is None or arrived is not None else Parts(partial, rows.size, tile.BP, seen)


def _apply(mode: str, image: Tensor, other: Tensor | None, vectors: Tensor, out: Tensor) -> None:
    rows = _rows(out)
    image, s_x = _as_rows(rows, image)
    other, s_r = (out, (0, 0, 0)) if other is None else _as_rows(rows, other)
    _, s_o = _as_rows(rows, out)
    pixels, channels = FLAT[:2]
    tiles = rows.tiles(pixels)
    inverted_bottleneck_apply_kernel[(rows.images * tiles * triton.cdiv(out.shape[1], channels),)](
        *(image, other, vectors, out, rows.size, tiles, *s_x, *s_r, *s_o),
        C=out.shape[1],
        BP=pixels,
        BC=channels,
        LAST=rows.last,
        MODE=mode,
        **_options(FLAT),
    )


def _sum(partial: Tensor, total: Tensor, finish: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """``finish``: the product, vectors and mean that the kernel has for it."""
    product, vectors, mean = finish or (partial, partial, partial)
    count, width = FEW if partial.shape[0] <= 4 * FEW[0] else MANY
    inverted_bottleneck_sum_kernel[(triton.cdiv(total.numel(), width),)](
        *(partial, product, vectors, mean, total, total.numel(), partial.shape[0]),
        C=total.shape[-1],
        BT=count,
        BS=width,
        FINISH=finish is not None,
        num_warps=4 if count == FEW[0] else 8,
    )


def _weight_places(rows: Rows, tile: Tile, channels_out: int, channels: int, others: int = 0) -> tuple[int, int, int]:
    """The programs of a part of a weight's gradient, the tiles that one adds up, and the parts."""
    programs = triton.cdiv(channels, tile.BK) * triton.cdiv(channels_out, tile.BO)
    steps = rows.images * rows.tiles(tile.BP)
    run = run_length(programs, steps, others)
    return programs, run, triton.cdiv(steps, run)


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
    (grad, s_g), (image, s_x) = _as_rows(rows, grad), _as_rows(rows, image)
    tile = setting_of(kind_of(rows, grad, image), channels_out, channels).weight
    programs, run, parts = _weight_places(rows, tile, channels_out, channels)
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
        PRECISION=_precision(image),
        **_options(tile),
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
    rows = _rows(grad, out)
    channels, channels_out = weight.shape
    grad, s_g = _as_rows(rows, grad)
    other, s_r = (out, (0, 0, 0)) if residual is None else _as_rows(rows, residual)
    image, mean, matrix, vectors = gram
    image, s_x = _as_rows(rows, image)
    _, s_o = _as_rows(rows, out)
    tile = setting_of(kind_of(rows, grad, out, image, other), rows.images * rows.size, channels_out).image
    tiles = rows.tiles(tile.BP)
    inverted_bottleneck_bwd_image_kernel[(rows.images * tiles * triton.cdiv(channels_out, tile.BO),)](
        *(grad, weight, image, mean, matrix, vectors, residual if residual is None else other, out),
        *(rows.size, tiles, *s_g, *s_x, *s_r, *s_o),
        C=channels,
        O=channels_out,
        BP=tile.BP,
        BO=tile.BO,
        BK=tile.BK,
        LAST=rows.last,
        CENTRE=grad.dtype == torch.float32,
        PRECISION=_precision(grad),
        **_options(tile),
    )


class Group(NamedTuple):
    """A launch for the gradients of both operands of a product: the tile and places of the map's, and of the weight's
    the tile, the programs of a part, the tiles that one adds up, and the parts."""

    tile: Tile
    places: Places
    weight: Tile
    programs: int
    run: int
    parts: int

    def constexprs(self) -> dict[str, int]:
        tiles = zip(("BP", "BO", "BK", "WP", "WO", "WK"), (*self.tile[:3], *self.weight[:3]), strict=True)
        return {**dict(tiles), **_options(self.tile)}


def _group(rows: Rows, kind: str, which: str, inner: int, outer: int) -> Group:
    """``which``: the gradient of a map of ``outer`` channels from one of ``inner``, by a weight ``[inner, outer]``."""
    setting = setting_of(kind, rows.images * rows.size, outer)
    tile = getattr(setting, which)
    places = Places(rows.images * rows.tiles(tile.BP), triton.cdiv(outer, tile.BO))
    others = places.parts * places.blocks * (START + triton.cdiv(inner, tile.BK))
    return Group(tile, places, setting.weight, *_weight_places(rows, setting.weight, inner, outer, others))


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
    with _device_of(x):
        parts = _fwd(x, None, w1, y1, _seen(stats1, vectors1, weight1, bias1, eps1), fresh=counters)
        if parts is not None and (stats1 is not None or len(parts.partial) > JOINED):
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
        arrived = left.counters[0] if _finishes_depthwise(y2) else None
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
    with _device_of(y2):
        parts = _fwd(y2, affine2, w3, y3, _seen(stats3, vectors3, weight3, bias3, eps3), left=left)
        if parts is not None:
            parts.join()


def inverted_bottleneck_residual_fwd(y3: Tensor, affine3: Tensor, x: Tensor | None, out: Tensor) -> None:
    """``out`` = v3, plus ``x`` if there is one."""
    with _device_of(y3):
        _apply("affine" if x is None else "residual", y3, x, affine3, out)


def inverted_bottleneck_infer(
    x: Tensor,
    w1: Tensor,
    norm1: tuple,
    wd: Tensor,
    norm2: tuple,
    w3: Tensor,
    norm3: tuple,
    stride: int,
    residual: bool,
    out: Tensor,
) -> None:
    """All of it, no gradients wanted. The norms, by running statistics: weight, bias, mean, var and eps."""
    layout = torch.channels_last if out.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    wide = {"dtype": x.dtype, "device": x.device, "memory_format": layout}
    with _device_of(x):
        a1 = torch.empty((x.shape[0], w1.shape[0], *x.shape[2:]), **wide)
        y2 = torch.empty((x.shape[0], w1.shape[0], *out.shape[2:]), **wide)
        _fwd(x, None, w1, a1, None, "relu6", norm1)
        torch.ops.fusekern_cuda.bn_relu6_dw_fwd(a1, None, wd, stride, y2, None)
        _fwd(y2, norm2, w3, out, None, "residual" if residual else "affine", norm3, x if residual else None)


def inverted_bottleneck_output_bwd(g: Tensor, y3: Tensor, mean3: Tensor, *summed: Tensor | float | None) -> Left:
    """``sums3`` ``[2, O]``: sum g and sum g (y3 - mean3); of them what ``Summed`` has, and of few pixels dy3, the
    gradient of y3."""
    summed, rows = Summed(*summed), _rows(y3)
    whole = _is_whole(rows)
    tile = WHOLE if whole else FLAT
    tiles, count = rows.tiles(tile.BP), rows.images * rows.size
    steps, programs = rows.images * tiles, triton.cdiv(y3.shape[1], tile.BO)
    run = steps if whole else run_length(programs, steps)
    parts, counters = triton.cdiv(steps, run), _new_counters(y3)
    with _device_of(y3):
        (g, s_g), (y3, s_y) = _as_rows(rows, g), _as_rows(rows, y3)
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
            **_options(tile),
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
    rows, summed = _rows(y2, y3, dz), Summed(*summed)
    with _device_of(y2):
        # Written once: as the operand of two products each of its tiles is read some dozens of times.
        dy3 = None if left is None else left.grad
        if dy3 is None:
            dy3 = torch.empty_like(y3)
            _apply("gradient", g, y3, coef3, dy3)
        (_, s_g), (_, s_y), (_, s_z) = (_as_rows(rows, image) for image in (dy3, y2, dz))
        channels, channels_out = w3.shape
        group = _group(rows, kind_of(rows, dy3, y2, dz), "hidden", channels, channels_out)
        parts, count = group.places.parts, rows.images * rows.size
        partial = torch.empty((parts, 2, channels_out), dtype=torch.float32, device=y2.device)
        dw = dw3[None] if group.parts == 1 else _new_parts(group.parts, *w3.shape, y2)
        arrived = group.places.counters(left, 0)
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
            PRECISION=_precision(y2),
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
    arrived = left.counters[1] if left is not None and _finishes_depthwise(d) else None
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
    with _device_of(d):
        if _gram(x, w1.shape[0]):
            _expand_bwd_by_gram(d, coef1, x, w1, g, dx, dw1)
            return
        rows = _rows(d, dx)
        dy1 = torch.empty_like(d)
        _apply("gradient", d, y1, coef1, dy1)
        (_, s_g), (x, s_x), (_, s_o) = (_as_rows(rows, image) for image in (dy1, x, dx))
        residual, s_r = (dx, (0, 0, 0)) if g is None else _as_rows(rows, g)
        channels, channels_out = w1.shape
        group = _group(rows, kind_of(rows, dy1, x, dx, residual), "image", channels, channels_out)
        dw = dw1[None] if group.parts == 1 else _new_parts(group.parts, *w1.shape, d)
        first, tiles_w = group.programs * group.parts, rows.tiles(group.weight.BP)
        inverted_bottleneck_bwd_expand_kernel[(first + group.places.parts * group.places.blocks,)](
            *(dy1, w1, x, None if g is None else residual, dx, dw),
            *(first, rows.size, rows.tiles(group.tile.BP), tiles_w, rows.images * tiles_w, group.run),
            *(*s_g, *s_x, *s_r, *s_o),
            C=channels,
            O=channels_out,
            LAST=rows.last,
            PRECISION=_precision(x),
            **group.constexprs(),
        )
        if group.parts > 1:
            _sum(dw, dw1)


def _expand_bwd_by_gram(
    d: Tensor, coef1: Tensor, x: Tensor, w1: Tensor, g: Tensor | None, dx: Tensor, dw1: Tensor
) -> None:
    pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]
    rows = _rows(d, dx)
    x = _as_rows(rows, x)[0]
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


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, load), setting in SETTINGS.items():
        dtypes = {"half": ("bf16", "fp16") if load == "medium" else ("bf16",), "odd half": ("bf16",)}
        for dtype in ("ieee", "tf32") if kind == "odd fp32" else dtypes.get(kind, (kind,)):
            shapes = ((200, "channels_last"), (512, "nchw")) if kind.startswith("odd") else ((512, "channels_last"),)
            for C, layout in shapes:
                yield from _cases(kind if kind.startswith("odd") else load, dtype, setting, C, layout)
    for dtype, C, layout in (("bf16", 512, "channels_last"), ("ieee", 512, "channels_last"), ("bf16", 200, "nchw")):
        for mode in ("affine", "residual", "gradient"):
            yield _case(f"apply {mode}", inverted_bottleneck_apply_kernel, dtype, FLAT, C, layout, MODE=mode)
        kernel = inverted_bottleneck_reduce_kernel
        yield _case("reduce", kernel, dtype, FLAT, C, layout, (*SUMMED, "out"), BC=FLAT.BO)
        yield _case("reduce whole", kernel, dtype, WHOLE, C, layout, ("partial",), BC=WHOLE.BO)
    for C in (512, 200):
        few, many = Tile(0, 0, 0, 4, 3), Tile(128, 0, 0, 8, 3)
        widths = {"BT": MANY[0], "BS": MANY[1]}
        for finish in (False, True):
            name = "sum finish" if finish else "sum"
            yield _case(f"{name} few", inverted_bottleneck_sum_kernel, "bf16", few, C, FINISH=finish)
            yield _case(f"{name} many", inverted_bottleneck_sum_kernel, "bf16", many, C, FINISH=finish, **widths)


def _cases(name: str, dtype: str, setting: Setting, C: int, layout: str) -> Iterator[Case]:
    def case(what: str, kernel: JITFunction, tile: Tile, **more: object) -> Case:
        # As in a model of 16 bits and under autocast.
        norms = dtype if name == "medium" else "fp32"
        return _case(f"{what} {name}", kernel, dtype, tile, C, layout, norms=norms, **more)

    before, running = ("affine",), ("mean", "var", "gamma", "beta")
    behind = "mean_out", "var_out", "gamma_out", "beta_out"
    seen = "partial", "stats", "vectors", "arrived"
    kernel, tile = inverted_bottleneck_fwd_kernel, setting.fwd
    none = *before, *running, *behind, *seen[1:], "residual"
    yield case("fwd expand", kernel, tile, none=none)
    none = *running, *behind[:2], "stats", "residual", "fresh"
    yield case("fwd project", kernel, tile, none=none)
    yield case("fwd project apart", kernel, tile, none=(*none, *behind[2:], "vectors", "arrived"))
    none = *seen, "fresh"
    yield case("infer expand", kernel, tile, none=(*before, *running, "residual", *none), NORM="relu6")
    yield case("infer project", kernel, tile, none=(*before, *none), NORM="residual")
    weight = dict(zip(("WP", "WO", "WK"), setting.weight[:3], strict=True))
    kernel = inverted_bottleneck_bwd_project_kernel
    yield case("bwd project", kernel, setting.hidden, out=dtype, **weight)
    yield case("bwd project parts", kernel, setting.hidden, none=(*SUMMED, "arrived"), **weight)
    yield case("bwd expand", inverted_bottleneck_bwd_expand_kernel, setting.image, out=dtype, **weight)
    yield case("bwd expand parts", inverted_bottleneck_bwd_expand_kernel, setting.image, **weight)
    yield case("bwd image", inverted_bottleneck_bwd_image_kernel, setting.image)
    kernel, centred = inverted_bottleneck_bwd_weight_kernel, dtype in ("ieee", "tf32")
    if centred:
        yield case("bwd weight", kernel, setting.weight, CENTRE="image")
        yield case("bwd weight gram", kernel, setting.weight, none=("sums",), CENTRE="both")
    else:
        yield case("bwd weight", kernel, setting.weight, none=("mean", "sums"))


# What the sums of a norm's backward become, and what that takes.
SUMMED = "vectors", "gamma", "sums", "coef", "dweight", "dbias"


def _case(
    name: str,
    kernel: JITFunction,
    dtype: str,
    tile: Tile,
    C: int = 512,
    layout: str = "channels_last",
    none: tuple[str, ...] = (),
    out: str = "fp32",
    norms: str = "fp32",
    **more: object,
) -> Case:
    """``none``: what is not given; ``out`` and ``norms``: dtypes of a weight's gradient and of the norms' parameters;
    ``more``: constexprs that differ."""
    last = layout == "channels_last"
    fp32 = dtype in ("ieee", "tf32")
    unit = ("s_xc", "s_gc", "s_rc", "s_oc") if last else ("s_xp", "s_gp", "s_rp", "s_op")
    constexprs = {
        **dict(zip(("BP", "BO", "BK"), tile[:3], strict=True)),
        "FINISH": False,
        "BC": tile.BK,
        "BT": FEW[0] if kernel is inverted_bottleneck_sum_kernel else AT_ONCE,
        "BS": FEW[1],
        "COUNTERS": 2 * COUNTERS,
        "C": C,
        "O": C,
        "LAST": last,
        "BATCH": True,
        "NORM": "none",
        "MODE": "affine",
        "CENTRE": fp32 if kernel is inverted_bottleneck_bwd_image_kernel else "none",
        "PRECISION": dtype if fp32 else "ieee",
        **dict.fromkeys(unit, 1),
        **dict.fromkeys(none),
        **more,
    }
    weight = "out" if kernel is inverted_bottleneck_bwd_weight_kernel else "out_w"
    maps = "image", "weight", "residual", "out", "grad", "other", "matrix", "total"
    types = {key: "*fp32" if fp32 else f"*{dtype}" for key in maps}
    types[weight] = "*fp32" if fp32 else f"*{out}"
    types |= dict.fromkeys(("affine", "mean", "partial", "product", "stats", *SUMMED), "*fp32")
    parameters = {f"{name}{place}" for name in ("mean", "var", "gamma", "beta") for place in ("", "_out")}
    if kernel is not inverted_bottleneck_fwd_kernel:  # there "mean" is of no parameter
        parameters = "gamma", "dweight", "dbias"
    types |= dict.fromkeys(parameters, "*fp32" if fp32 else f"*{norms}")
    types |= dict.fromkeys(("fresh", "arrived"), "*i32") | dict.fromkeys(("eps", "eps_out", "count"), "fp32")
    params = [param for param in kernel.params if param.name not in constexprs]
    odd = "s_" if not last or C % 16 else "none"
    divisible = [param.name for param in params if not (param.do_not_specialize or param.name.startswith(odd))]
    return Case(
        kernel,
        f"{name} {dtype} {C} {layout}",
        {param.name: types.get(param.name, "i32") for param in params},
        {key: value for key, value in constexprs.items() if key in kernel.arg_names},
        tuple(divisible),
        tile.warps,
        tile.stages,
        tile.registers,
    )
