"""Two-tone textures of the scenes: functions of the place that say how much of the second colour is there, 0 to 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x [1, W], y [H, 1] in pixels -> broadcasts to [H, W]


def sky(height: int, rng: np.random.Generator) -> Field:
    clouds = noise(70, 28, rng)
    return lambda x, y: 0.8 * np.clip(1.8 * y / height + 0.5 * np.clip(clouds(x, y) - 0.55, 0, 1), 0, 1)


def water(rng: np.random.Generator) -> Field:
    period, length, swell = rng.uniform(9, 13), rng.uniform(26, 40), rng.uniform(1.5, 2.5)
    phase = rng.uniform(0, 6, 2)
    drift = noise(60, 20, rng)

    def weight(x, y):
        wave = y + swell * np.sin(6.2832 * x / length + phase[0]) + 6 * drift(x, y)
        return np.clip(0.5 + 0.9 * np.sin(6.2832 * wave / period + phase[1]), 0, 1)

    return weight


def meadow(rng: np.random.Generator) -> Field:
    blades, patches = noise(3.2, 13, rng), noise(40, 20, rng)
    return lambda x, y: np.clip(0.5 + 3.2 * (blades(x, y) - 0.5) + 0.3 * (patches(x, y) - 0.5), 0, 1)


def gravel(rng: np.random.Generator) -> Field:
    """Voronoi cells of a jittered grid: a pebble ends where its centre is hardly nearer than the second nearest one."""
    cell = rng.uniform(6, 7.5)
    offset, tone = rng.uniform(0.1, 0.9, (2, 64 * 64)).astype(np.float32), rng.random(64 * 64, np.float32)

    def weight(x, y):
        u, v = x / cell, y / cell
        column, row = np.floor(u), np.floor(v)
        nearest = np.full((v.size, u.size), np.inf, np.float32)
        second, pebble = nearest.copy(), np.zeros(nearest.shape, np.int64)
        for i, j in itertools.product((-1, 0, 1), repeat=2):
            key = (row + i).astype(np.int64) % 64 * 64 + (column + j).astype(np.int64) % 64
            distance = np.square(offset[0].take(key) + (column + j - u)) + np.square(
                offset[1].take(key) + (row + i - v)
            )
            closer = distance < nearest
            np.minimum(second, np.where(closer, nearest, distance), out=second)
            np.copyto(nearest, distance, where=closer)
            np.copyto(pebble, key, where=closer)
        return np.clip((np.sqrt(second) - np.sqrt(nearest)) * 4 - 0.5, 0, 1) * (0.4 + 0.6 * tone.take(pebble))

    return weight


def checks(rng: np.random.Generator) -> Field:
    side = rng.uniform(14, 18)
    u, v = _turned(rng.uniform(-0.25, 0.25))
    return lambda x, y: (np.floor(u(x, y) / side) + np.floor(v(x, y) / side)) % 2


def bricks(rng: np.random.Generator) -> Field:
    row_height, brick, joint = rng.uniform(8, 10), rng.uniform(18, 24), 1.8
    tone = rng.uniform(0.6, 1, (64, 64)).astype(np.float32)

    def weight(x, y):
        row = np.floor(y / row_height).astype(np.int64)
        along = x + brick / 2 * (row % 2)
        column = np.floor(along / brick).astype(np.int64)
        solid = (y - row * row_height > joint) & (along - column * brick > joint)
        return solid * tone[row % 64, column % 64]

    return weight


def planks(left: float, plank: float, rng: np.random.Generator) -> Field:
    grain = noise(plank / 3, 60, rng)
    return lambda x, y: (abs((x - left) / plank % 1 - 0.5) < 0.4) * (0.75 + 0.25 * grain(x, y))


def stripes(rng: np.random.Generator) -> Field:
    period, sign = rng.uniform(11, 14), rng.choice([-1, 1])
    u, _ = _turned(sign * rng.uniform(0.65, 0.9))
    return lambda x, y: u(x, y) / period % 1 < 0.5


def dots(rng: np.random.Generator) -> Field:
    pitch = rng.uniform(12, 14)
    u, v = _turned(rng.uniform(-0.3, 0.3))

    def weight(x, y):
        row = np.floor(v(x, y) / pitch)
        across = (u(x, y) / pitch + 0.5 * (row % 2)) % 1 - 0.5
        return np.hypot(across, v(x, y) / pitch - row - 0.5) < 0.32

    return weight


def leaves(rng: np.random.Generator) -> Field:
    coarse, fine = noise(9, 9, rng), noise(5, 5, rng)
    return lambda x, y: np.clip(0.5 + 4 * (0.65 * coarse(x, y) + 0.35 * fine(x, y) - 0.5), 0, 1)


def sphere(x0: float, y0: float, radius: float) -> Field:
    """Shading from a highlight at the upper left of a ball around (x0, y0)."""
    return lambda x, y: (np.hypot(x - x0 + 0.35 * radius, y - y0 + 0.4 * radius) / (1.5 * radius)).clip(0, 1) ** 1.3


def noise(width: float, height: float, rng: np.random.Generator) -> Field:
    """Smooth noise between 0 and 1 with cells of width x height pixels."""
    table = rng.random((128, 128), np.float32)

    def field(x, y):
        u, v = x.ravel() / width, y.ravel() / height
        column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
        u, v = _ease(u - column), _ease(v - row)[:, None]
        rows = table[row % 128] * (1 - v) + table[(row + 1) % 128] * v
        return rows[:, column % 128] * (1 - u) + rows[:, (column + 1) % 128] * u

    return field


def _ease(t: np.ndarray) -> np.ndarray:
    return t * t * (3 - 2 * t)


def _turned(angle: float) -> tuple[Field, Field]:
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return (lambda x, y: c * x + s * y), (lambda x, y: c * y - s * x)
