"""The floor under every score: a classifier that sees one pixel's colour and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from fusekern.config import IGNORE
from fusekern.data.folder import SegmentationFolder
from fusekern.engine.metrics import ConfusionMatrix

BINS = 16


def histogram_baseline(train: SegmentationFolder, val: SegmentationFolder, classes: int) -> ConfusionMatrix:
    """Score the most frequent class of each colour, counted over the training images.

    Colours are quantised to 16 levels a channel. A class's count in a colour is smoothed by its share of all training
    pixels, less than one pixel: it decides ties and colours that the training images lack.

    Args:
        train: where colours are counted.
        val: what is scored.
        classes: number of classes K.

    Returns:
        The confusion matrix over ``val``.
    """
    counts = torch.zeros(BINS**3 * classes, dtype=torch.int64)
    for index in tqdm(range(len(train)), "colour histogram", leave=False, disable=None):
        sample = train[index]
        known = sample.label != IGNORE
        cell = _colour(sample.image)[known] * classes + sample.label[known].long()
        counts += torch.bincount(cell, minlength=len(counts))
    counts = counts.view(BINS**3, classes).double()
    best = (counts + counts.sum(0) / counts.sum().clamp_min(1)).argmax(1)
    matrix = ConfusionMatrix(classes)
    for index in tqdm(range(len(val)), "colour baseline", leave=False, disable=None):
        sample = val[index]
        matrix.update(best[_colour(sample.image)], sample.label)
    return matrix


def _colour(image: Tensor) -> Tensor:
    """int64 [H, W]: the quantised colour of every pixel of a uint8 image [3, H, W]."""
    red, green, blue = image.long() * BINS // 256
    return (red * BINS + green) * BINS + blue
