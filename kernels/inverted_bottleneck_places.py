"""Where the stages of the inverted bottleneck are computed: maps as matrices, their tiles, and a launch's programs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fusekern.kernels.launching import cdiv, precision_of
from torch import Tensor


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
        return cdiv(self.size, pixels)


def _strides(image: Tensor, last: bool) -> tuple[int, int, int] | None:
    """Between images, pixels and channels; none if a map is not a matrix in this layout."""
    _, c, h, w = image.shape
    s_b, s_c, s_h, s_w = image.stride()
    s_p = s_w if w > 1 else s_h
    if h > 1 and w > 1 and s_h != w * s_w:
        return None
    unit = c == 1 or s_c == 1 if last else h * w == 1 or s_p == 1
    return (s_b, 0 if h * w == 1 else s_p, 1 if last else s_c) if unit else None


def rows_of(*dense: Tensor) -> Rows:
    """Of dense maps, which lie alike. Channels_last maps are one matrix."""
    batch, _, h, w = dense[0].shape
    last = all(image.is_contiguous(memory_format=torch.channels_last) for image in dense)
    return Rows(1, batch * h * w, True) if last else Rows(batch, h * w, False)


def as_rows(rows: Rows, image: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The image and its strides between images, pixels and channels.

    It is copied if it is no such matrix: one that is as large as the op's own input or output, not as E channels.
    """
    strides = _strides(image, rows.last)
    if strides is None:
        image = image.contiguous(memory_format=torch.channels_last if rows.last else torch.contiguous_format)
        strides = _strides(image, rows.last)
    if not rows.last:
        return image, strides
    s_b, s_p, s_c = strides
    batch, _, h, w = image.shape
    # Images of one pixel lie as far apart as pixels do.
    if h * w == 1:
        s_p = s_b
    if batch > 1 and s_b != h * w * s_p:
        return as_rows(rows, image.contiguous(memory_format=torch.channels_last))
    return image, (0, s_p, s_c)


def kind_of(rows: Rows, *images: Tensor) -> str:
    """Which products the launch settings are for."""
    odd = any(not rows.last or image.shape[1] % 16 or _strides(image, True)[1] % 16 for image in images)
    if images[0].dtype == torch.float32:
        return "odd fp32" if odd else precision_of(images[0].dtype)
    return "odd half" if odd else "half"


def setting_of(kind: str, pixels: int, channels: int) -> Setting:
    """The launch settings for a product that has so many pixels and channels."""
    if kind.startswith("odd"):
        return SETTINGS[kind, "any"]
    tiles = cdiv(pixels, 128) * cdiv(channels, 128)
    return SETTINGS[kind, "medium" if tiles < PROGRAMS else "large"]


def run_length(programs: int, steps: int, others: int = 0) -> int:
    """How many of its tiles a program adds up, such that the slowest multiprocessor is done first.

    ``others``: what else the launch has to do, in tiles.
    """

    def cost(parts: int) -> float:
        length = START + cdiv(steps, parts)
        return max(cdiv(programs * parts, PROGRAMS) * length, (programs * parts * length + others) / PROGRAMS)

    most = max(1, min(steps, 4 * PROGRAMS // programs))
    return cdiv(steps, min(range(1, most + 1), key=cost))


class Places(NamedTuple):
    """Programs of a launch: so many parts of the pixels by so many blocks of channels."""

    parts: int
    blocks: int

    def finish(self) -> bool:
        """Does the last program to arrive add the parts of its block?"""
        return self.parts <= FINISHED and self.blocks <= COUNTERS


def fwd_places(rows: Rows, kind: str, channels_out: int) -> tuple[Tile, Places]:
    tile = setting_of(kind, rows.images * rows.size, channels_out).fwd
    return tile, Places(rows.images * rows.tiles(tile.BP), cdiv(channels_out, tile.BO))


def finishes_depthwise(y: Tensor) -> bool:
    """Does the last block add up the parts of a depthwise stage that writes ``y``? They are about its tiles."""
    batch, channels, height, width = y.shape
    tiles = batch * cdiv(height, 8) * cdiv(width, 16)
    return tiles <= JOINED and channels <= 8 * COUNTERS


def joined_behind(parts: int) -> bool:
    """Does the depthwise stage behind join so many parts of statistics?"""
    return parts <= JOINED


def is_whole(rows: Rows) -> bool:
    """Are pixels so few that a program has all of them?"""
    return rows.images * rows.size <= WHOLE_PIXELS


def by_gram(image: Tensor, hidden: int) -> bool:
    """There are so many pixels that a Gram matrix is the shorter way."""
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    return pixels >= GRAM_PIXELS * image.shape[1] and pixels * hidden >= GRAM_NUMBERS


def options_of(tile: Tile) -> dict[str, int | None]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}


def weight_places(rows: Rows, tile: Tile, channels_out: int, channels: int, others: int = 0) -> tuple[int, int, int]:
    """The programs of a part of a weight's gradient, the tiles that one adds up, and the parts."""
    programs = cdiv(channels, tile.BK) * cdiv(channels_out, tile.BO)
    steps = rows.images * rows.tiles(tile.BP)
    run = run_length(programs, steps, others)
    return programs, run, cdiv(steps, run)


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
        return {**dict(tiles), **options_of(self.tile)}


def group_of(rows: Rows, kind: str, which: str, inner: int, outer: int) -> Group:
    """``which``: the gradient of a map of ``outer`` channels from one of ``inner``, by a weight ``[inner, outer]``."""
    setting = setting_of(kind, rows.images * rows.size, outer)
    tile = getattr(setting, which)
    places = Places(rows.images * rows.tiles(tile.BP), cdiv(outer, tile.BO))
    others = places.parts * places.blocks * (START + cdiv(inner, tile.BK))
    return Group(tile, places, setting.weight, *weight_places(rows, setting.weight, inner, outer, others))
