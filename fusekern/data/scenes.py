"""Procedural scenes: a landscape in few colours whose classes differ in texture and shape.

Each scene draws a palette of six colours, and each region two of them, whatever its class: a pixel's colour tells
little, and a model must see the texture (6 to 18 pixels a period) or the outline.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fusekern.data import textures
from fusekern.data.spec import DatasetSpec, load_spec
from fusekern.data.textures import Field
from fusekern.errors import FusekernError

IMAGES = (160, 40)
SIZE = (224, 288)
MANIFEST = "scenes.json"
_FORMAT = 1

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_PALETTES = (
    ("264653", "2a9d8f", "e76f51", "f4a261", "e9c46a", "f6e9cf"),
    ("003049", "6b2c39", "d62828", "f77f00", "fcbf49", "eae2b7"),
    ("0d3b66", "3d6a98", "f95738", "ee964b", "f4d35e", "faf0ca"),
    ("355070", "6d597a", "b56576", "e56b6f", "eaac8b", "f3dcc4"),
    ("1b4332", "40916c", "95d5b2", "774936", "d08c60", "f2e0c9"),
    ("22223b", "4a4e69", "9a8c98", "c9ada7", "f2cc8f", "e07a5f"),
    ("10454f", "506266", "818274", "a3ab78", "bde038", "eef2c4"),
    ("3a0ca3", "4361ee", "4cc9f0", "b5179e", "f72585", "fcd5e5"),
    ("2b2d42", "5f6f94", "8d99ae", "d90429", "ef7f8b", "edf2f4"),
    ("5f0f40", "9a031e", "cb793a", "fb8b24", "0f4c5c", "bfd7d2"),
)


def draw_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        size: height and width in pixels, 96 or more each.
        rng: source of all its randomness.

    Returns:
        image uint8 [H, W, 3] and label uint8 [H, W]: 0 = void, k = the k-th name of the ``scenes`` data set.
    """
    height, width = size
    canvas = _Canvas(size, rng)
    horizon = height * rng.uniform(0.38, 0.48)
    canvas.paint("sky", (0, 0, width, height), _everywhere, textures.sky(height, rng))
    if rng.random() < 0.75:
        _house(canvas, horizon, rng)
    if rng.random() < 0.65:
        _fence(canvas, horizon, rng)
    _ground(canvas, horizon, rng)
    # From back to front, so that what stands lower in the picture covers what stands behind it.
    things = [_tree] * rng.integers(1, 3) + [_tent] * (rng.random() < 0.75) + [_ball] * rng.integers(1, 4)
    feet = np.sort(rng.uniform(horizon + 0.12 * height, 0.97 * height, len(things)))
    places = (rng.permutation(len(things)) + rng.uniform(0.2, 0.8, len(things))) * width / len(things)
    for kind, middle, foot in zip(rng.permutation(len(things)), places.tolist(), feet.tolist(), strict=True):
        things[kind](canvas, middle, foot, rng)
    return canvas.finish()


class _Canvas:
    """A picture at twice the resolution, so that edges come out smooth, and its label."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.height, self.width = size
        self.x = ((np.arange(2 * self.width, dtype=np.float32) + 0.5) / 2)[None, :]
        self.y = ((np.arange(2 * self.height, dtype=np.float32) + 0.5) / 2)[:, None]
        self.image = np.zeros((2 * self.height, 2 * self.width, 3), np.float32)
        self.label = np.zeros((2 * self.height, 2 * self.width), np.uint8)
        self.rng = rng
        self.pairs = _colour_pairs(rng)

    def paint(self, name: str, box: Box, inside: Field, weight: Field) -> None:
        """Fill where ``inside`` holds, within ``box``, with two colours mixed by ``weight``."""
        part = self._part(box)
        x, y = self.x[:, part[1]], self.y[part[0]]
        mask = np.broadcast_to(inside(x, y), (y.size, x.size))
        first, second = next(self.pairs)
        mix = np.broadcast_to(weight(x, y), mask.shape)[mask].astype(np.float32)
        self.image[part][mask] = first + (second - first) * mix[:, None]
        self.label[part][mask] = _spec().names.index(name) + 1

    def shadow(self, x: float, y: float, radius: float) -> None:
        part = self._part((x - radius, y - 0.3 * radius, x + radius, y + 0.3 * radius))
        distance = ((self.x[:, part[1]] - x) / radius) ** 2 + ((self.y[part[0]] - y) / (0.3 * radius)) ** 2
        self.image[part] *= (1 - 0.35 * np.clip(1.6 - 1.6 * distance, 0, 1))[..., None]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        fine = (self.image[::2, ::2] + self.image[::2, 1::2] + self.image[1::2, ::2] + self.image[1::2, 1::2]) / 4
        grain = 3 * self.rng.standard_normal((self.height, self.width, 1), np.float32)
        label = self.label[::2, ::2].copy()
        across, down = label[:, 1:] != label[:, :-1], label[1:] != label[:-1]
        for border, edge in ((label[:, 1:], across), (label[:, :-1], across), (label[1:], down), (label[:-1], down)):
            border[edge] = 0
        return np.clip(fine + grain, 0, 255).astype(np.uint8), label

    def _part(self, box: Box) -> tuple[slice, slice]:
        left, top, right, bottom = (max(int(2 * edge), 0) for edge in box)
        return slice(top, bottom + 1), slice(left, right + 1)


def _colour_pairs(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless pairs of colours of one palette, in random order, light enough apart to show a texture."""
    codes = _PALETTES[rng.integers(len(_PALETTES))]
    colours = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in codes], np.float32)
    light = colours @ np.array((0.299, 0.587, 0.114), np.float32)
    pairs = [(a, b) for a, b in itertools.permutations(range(6), 2) if abs(light[a] - light[b]) > 80]
    while True:
        for a, b in rng.permutation(pairs):
            yield colours[a], colours[b]


def _everywhere(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.ones((), bool)


def _ground(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    surfaces = [
        ("water", textures.water),
        ("meadow", textures.meadow),
        ("gravel", textures.gravel),
        ("checkered floor", textures.checks),
    ]
    order = rng.permutation(4)[: rng.integers(2, 4)]
    edges = np.linspace(horizon, canvas.height, len(order) + 1)[:-1]
    for place, (surface, edge) in enumerate(zip(order, edges, strict=True)):
        steepest = 0.05 if place == 0 else 0.45
        slope = rng.uniform(-steepest, steepest)
        swing, length, phase = rng.uniform(2, 7), rng.uniform(60, 120), rng.uniform(0, 6)

        def below(x, y, edge=edge, slope=slope, swing=swing, length=length, phase=phase):
            return y > edge + slope * (x - canvas.width / 2) + swing * np.sin(6.2832 * x / length + phase)

        name, texture = surfaces[surface]
        top = edge - abs(slope) * canvas.width / 2 - swing
        canvas.paint(name, (0, top, canvas.width, canvas.height), below, texture(rng))


def _house(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    width = canvas.width * rng.uniform(0.5, 0.75)
    left = rng.uniform(-0.1 * width, canvas.width - 0.9 * width)
    top, bottom = horizon - canvas.height * rng.uniform(0.25, 0.34), horizon + 16
    canvas.paint("brick wall", (left, top, left + width, bottom), _everywhere, textures.bricks(rng))
    if rng.random() < 0.9:
        _awning(canvas, left + width / 2, top + 8, width * rng.uniform(0.28, 0.42), rng)


def _awning(canvas: _Canvas, middle: float, top: float, half: float, rng: np.random.Generator) -> None:
    bottom, scallop = top + canvas.height * rng.uniform(0.14, 0.2), rng.uniform(10, 14)

    def inside(x, y):
        spread = half * (0.8 + 0.2 * (y - top) / (bottom - top))
        hem = bottom - 5 * np.sin(3.1416 * (x - middle) / scallop) ** 2
        return (abs(x - middle) < spread) & (y < hem)

    canvas.paint("striped awning", (middle - half, top, middle + half, bottom), inside, textures.stripes(rng))


def _fence(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    plank, width = rng.uniform(9, 12), canvas.width * rng.uniform(0.35, 0.7)
    left = rng.choice([rng.uniform(-20, 0), canvas.width - width + rng.uniform(0, 20)])
    top, bottom = horizon - canvas.height * rng.uniform(0.12, 0.22), horizon + 16

    def inside(x, y):
        return y > top + 8 * abs((x - left) / plank % 1 - 0.5)

    canvas.paint("wooden fence", (left, top, left + width, bottom), inside, textures.planks(left, plank, rng))


def _tree(canvas: _Canvas, middle: float, foot: float, rng: np.random.Generator) -> None:
    tall = canvas.height * rng.uniform(0.36, 0.5)
    radius = tall * rng.uniform(0.3, 0.36)
    centre = foot - tall + radius
    turns = np.linspace(0, 6.2832, 9)[:-1] + rng.uniform(-0.2, 0.2, 8)
    sizes = radius * rng.uniform(0.36, 0.5, 8)
    blobs = [(middle, centre, radius)]
    blobs += list(
        zip(middle + 0.75 * radius * np.cos(turns), centre + 0.75 * radius * np.sin(turns), sizes, strict=True)
    )

    def inside(x, y):
        trunk = (abs(x - middle) < 0.09 * tall) & (y > centre) & (y < foot)
        return np.any([(x - u) ** 2 + (y - v) ** 2 < r * r for u, v, r in blobs] + [trunk], axis=0)

    canvas.shadow(middle, foot, 0.5 * tall)
    box = (middle - 1.3 * radius, centre - 1.3 * radius, middle + 1.3 * radius, foot)
    canvas.paint("tree", box, inside, textures.leaves(rng))


def _tent(canvas: _Canvas, middle: float, foot: float, rng: np.random.Generator) -> None:
    tall, half = canvas.height * rng.uniform(0.32, 0.42), canvas.width * rng.uniform(0.15, 0.21)
    top = foot - tall

    def inside(x, y):
        return abs(x - middle) < half * np.clip((y - top) / tall, 0, 1) ** 1.2

    canvas.shadow(middle, foot, 1.1 * half)
    canvas.paint("polka dot tent", (middle - half, top, middle + half, foot), inside, textures.dots(rng))


def _ball(canvas: _Canvas, middle: float, foot: float, rng: np.random.Generator) -> None:
    radius = canvas.height * rng.uniform(0.07, 0.13)
    centre = foot - radius

    def inside(x, y):
        return (x - middle) ** 2 + (y - centre) ** 2 < radius * radius

    canvas.shadow(middle, foot, 1.1 * radius)
    box = (middle - radius, centre - radius, middle + radius, foot)
    canvas.paint("ball", box, inside, textures.sphere(middle, centre, radius))


def write_scenes(
    root: str | Path, *, images: tuple[int, int] = IMAGES, size: tuple[int, int] = SIZE, seed: int = 0
) -> None:
    """Write a data set of scenes in the ADE20K layout; the same arguments give the same files, byte for byte.

    The folder appears whole or not at all.

    Args:
        root: folder to write; it must not exist, or be empty.
        images: number of training and of validation images.
        size: height and width in pixels, 96 or more each.
        seed: 0 or more.

    Raises:
        FusekernError: ``root`` holds something already, or cannot be written.
        ValueError: an argument out of range.
    """
    if min(images) < 1 or min(size) < 96 or seed < 0:
        raise ValueError(f"images must be 1 or more, size 96 or more, seed 0 or more, got {images}, {size}, {seed}")
    root = Path(root).expanduser()
    if not _vacant(root):
        raise FusekernError(f"{root} is not an empty folder: the scenes need one of their own")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            work.chmod(0o755)  # mkdtemp's own is for this user alone
            for split, (folder, count) in enumerate(zip(("training", "validation"), images, strict=True)):
                _write_split(work, folder, [np.random.default_rng((seed, split, k)) for k in range(count)], size)
            about = {"format": _FORMAT, "images": list(images), "size": list(size), "seed": seed}
            (work / MANIFEST).write_text(json.dumps(about, indent=2) + "\n")
            os.rename(work, root)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise FusekernError(f"{root}: cannot write the scenes: {error}") from error


def ensure_scenes(root: str | Path) -> None:
    """Make sure that ``root`` holds scenes: those that are there, or new ones with the defaults of ``write_scenes``.

    Several processes may call it at once: the first to finish writes the folder, and all use it.

    Raises:
        FusekernError: ``root`` holds something else, or scenes of another version, or cannot be written.
    """
    root = Path(root).expanduser()
    if _holds_scenes(root):
        return
    try:
        write_scenes(root, images=IMAGES, size=SIZE)
    except FusekernError:
        if not _holds_scenes(root):  # else another process was faster
            raise


def ensure_built_in(dataset: str, root: str | Path | None) -> None:
    """``ensure_scenes`` for the data set that the package draws; others are the user's to bring."""
    if dataset == "scenes" and root is not None:
        ensure_scenes(root)


def _write_split(root: Path, folder: str, generators: list[np.random.Generator], size: tuple[int, int]) -> None:
    (root / "images" / folder).mkdir(parents=True)
    (root / "annotations" / folder).mkdir(parents=True)
    colours = [0, 0, 0] + [part for colour in _spec().palette for part in colour]
    for index, rng in enumerate(generators):
        image, label = draw_scene(size, rng)
        Image.fromarray(image).save(root / "images" / folder / f"scene_{index:04d}.jpg", quality=92)
        picture = Image.fromarray(label)
        picture.putpalette(colours)
        picture.save(root / "annotations" / folder / f"scene_{index:04d}.png")


def _holds_scenes(root: Path) -> bool:
    """Whether the scenes are there; raises where something else is."""
    if _vacant(root):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text())["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FusekernError(
            f"{root} holds something other than the built-in scenes (no readable {MANIFEST}): "
            "point data.root to a new folder"
        ) from error
    if found != _FORMAT:
        raise FusekernError(
            f"{root} holds scenes of version {found}, this fusekern draws version {_FORMAT}: "
            "delete it, or point data.root to a new folder"
        )
    return True


def _vacant(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))


@cache
def _spec() -> DatasetSpec:
    return load_spec("scenes")
