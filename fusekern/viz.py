"""Pictures of labels and scores: images are uint8 [H, W, 3] RGB arrays, labels uint8 [H, W] arrays of class indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fusekern.config import IGNORE

Palette = Sequence[tuple[int, int, int]]
_INK = (25, 25, 25)
_PAPER = (255, 255, 255)


def overlay(image: np.ndarray, label: np.ndarray, palette: Palette, alpha: float = 0.5) -> np.ndarray:
    """Tint every labelled pixel with the colour of its class.

    Args:
        image: uint8 [H, W, 3], RGB.
        label: uint8 [H, W], class indices; pixels of 255 keep the colour of the image.
        palette: K colours (red, green, blue), 0 to 255.
        alpha: share of the class colour, 0 to 1.

    Returns:
        uint8 [H, W, 3], a new array.

    Raises:
        ValueError: wrong shape or dtype, or a label that has no colour.
    """
    _check_image(image)
    if label.dtype != np.uint8 or label.shape != image.shape[:2]:
        raise ValueError(f"label must be uint8 {image.shape[:2]} like the image, got {label.dtype} {label.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    known = label != IGNORE
    if known.any() and label[known].max() >= len(palette):
        raise ValueError(f"label has class {label[known].max()}, the palette has {len(palette)} colours")
    tinted = image.copy()
    colours = np.asarray(palette, dtype=np.float32).reshape(-1, 3)[label[known]]
    tinted[known] = np.rint((1 - alpha) * image[known] + alpha * colours).astype(np.uint8)
    return tinted


def with_legend(image: np.ndarray, names: Sequence[str], palette: Palette, present: Sequence[int]) -> np.ndarray:
    """The picture with the colours and names of some classes below it.

    Args:
        image: uint8 [H, W, 3].
        names: K class names.
        palette: K colours.
        present: class indices to list, in this order.

    Returns:
        uint8 [H', W', 3] with H' >= H and W' >= W; the picture stands unscaled in the upper left corner.

    Raises:
        ValueError: wrong shape or dtype, or an index without a name or a colour.
    """
    _check_image(image)
    for index in present:
        if not 0 <= index < min(len(names), len(palette)):
            raise ValueError(f"present has class {index}, there are {len(names)} names and {len(palette)} colours")
    if not present:
        return image.copy()
    height, width = image.shape[:2]
    size = min(max(round(min(height, width) / 26), 12), 32)
    font = ImageFont.load_default(size=size)
    row, swatch, gap = round(1.5 * size), size, round(0.5 * size)
    cell = ceil(max(font.getlength(names[index]) for index in present)) + swatch + 3 * gap
    # As many columns as fit below the picture; more where a small picture would get a legend taller than wide.
    columns = min(len(present), max((width - gap) // cell, ceil((len(present) * row / cell) ** 0.5)))
    rows = ceil(len(present) / columns)
    canvas = Image.new("RGB", (max(width, columns * cell + gap), height + rows * row + 2 * gap), _PAPER)
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for place, index in enumerate(present):
        left = gap + place // rows * cell
        middle = height + gap + place % rows * row + row // 2
        box = (left, middle - swatch // 2, left + swatch, middle - swatch // 2 + swatch)
        draw.rectangle(box, fill=tuple(int(value) for value in palette[index]), outline=_INK)
        draw.text((left + swatch + gap, middle), names[index], fill=_INK, font=font, anchor="lm")
    return np.asarray(canvas)


def contact_sheet(
    panels: Sequence[np.ndarray], columns: int, path: str | Path, captions: Sequence[str] | None = None
) -> None:
    """Write pictures of any sizes as one picture, row by row, with a caption below each.

    Args:
        panels: uint8 [H, W, 3] each; at least one.
        columns: pictures in a row.
        path: file to write.
        captions: one text per panel.

    Raises:
        ValueError: no panels, a wrong shape or dtype, or another number of captions.
    """
    if not panels or columns < 1:
        raise ValueError(f"a contact sheet needs panels and columns, got {len(panels)} panels and {columns} columns")
    if captions is not None and len(captions) != len(panels):
        raise ValueError(f"captions must have one text per panel, got {len(captions)} for {len(panels)}")
    for panel in panels:
        _check_image(panel)
    texts = [""] * len(panels) if captions is None else captions
    width, height = max(p.shape[1] for p in panels), max(p.shape[0] for p in panels)
    size = min(max(round(min(height, width) / 22), 12), 28)
    font = ImageFont.load_default(size=size)
    pencil = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pencil.multiline_textbbox((0, 0), text, font=font) for text in texts]
    gap = round(0.7 * size)
    cell_width = max(width, ceil(max(box[2] for box in boxes))) + gap
    caption_height = ceil(max(box[3] for box in boxes)) + gap // 2 if any(texts) else 0
    cell_height = height + caption_height + gap
    columns = min(columns, len(panels))
    rows = ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (panel, text) in enumerate(zip(panels, texts, strict=True)):
        left, top = gap + place % columns * cell_width, gap + place // columns * cell_height
        sheet.paste(Image.fromarray(panel), (left, top))
        draw.multiline_text((left, top + panel.shape[0] + gap // 4), text, fill=_INK, font=font)
    sheet.save(path)


def confusion_png(matrix: np.ndarray, names: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw a confusion matrix, each row as shares of its ground truth.

    Up to 20 classes carry their percentages and up to 200 their names; beyond that the axes show class indices.

    Args:
        matrix: int64 [K, K]; rows are the ground truth, columns the prediction.
        names: K class names.
        path: file to write.
        title: text above the picture.

    Raises:
        ValueError: the matrix is not square or does not fit the names.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(names)
    if matrix.shape != (classes, classes):
        raise ValueError(f"matrix must be [{classes}, {classes}] for {classes} names, got {list(matrix.shape)}")
    total = matrix.sum(axis=1, keepdims=True)
    share = np.where(total > 0, 100.0 * matrix / np.maximum(total, 1), np.nan)
    cell = 0.45 if classes <= 20 else max(0.13, 0.45 * 20 / classes) if classes <= 200 else 20 / classes
    side = max(cell * classes, 2.0)
    figure = Figure(figsize=(side, side), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    # The square root in the colour scale keeps confusions of a few per cent visible.
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    picture = axes.imshow(share, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=100))
    bar = axes.inset_axes((1 + 0.15 / side, 0, 0.2 / side, 1))
    figure.colorbar(picture, cax=bar, label="share of the ground truth [%]", ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    hint = "grey: not in the ground truth" if np.isnan(share).any() else ""
    axes.set_title("\n".join(filter(None, (title, hint))), fontsize=9, parse_math=False)
    if classes <= 200:
        size = min(9.0, 0.75 * 72 * cell)
        axes.set_xticks(range(classes), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(classes), names, fontsize=size, parse_math=False)
    if classes <= 20:
        for y, x in np.argwhere(share >= 0.5):
            colour = "black" if share[y, x] > 40 else "white"
            axes.text(x, y, f"{share[y, x]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


def curves_png(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    path: str | Path,
    spread: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Draw curves over a common axis, such as loss or mIoU over training steps.

    Args:
        series: name -> points (x, y); a y of nan leaves a gap.
        xlabel: text of the horizontal axis.
        ylabel: text of the vertical axis.
        path: file to write.
        spread: name -> (low, high) per point, drawn as a band around the curve.

    Raises:
        ValueError: a spread without its curve, or with another number of points.
    """
    from matplotlib.figure import Figure

    spread = spread or {}
    for name, band in spread.items():
        if len(band) != len(series.get(name, ())):
            raise ValueError(f"spread of {name!r} has {len(band)} points, its curve {len(series.get(name, ()))}")
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        x, y = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
        line = axes.plot(x, y, label=name, linewidth=1.5, marker="o" if len(x) <= 30 else None, markersize=3.5)[0]
        if name in spread:
            low, high = np.asarray(spread[name], dtype=np.float64).reshape(-1, 2).T
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    if series:
        longest = max(len(name) for name in series)
        figure.legend(loc="outside lower center", ncols=max(1, min(len(series), 80 // (longest + 6))), frameon=False)
    figure.savefig(path)


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
