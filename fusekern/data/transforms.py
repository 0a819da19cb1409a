"""From the file to the model: mmsegmentation's training transforms, and the resize of the test."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fusekern.config import IGNORE, DataConfig
from fusekern.data.folder import Sample

# One choice for training and test. Without a low-pass filter, shrinking aliases just the textures to be told apart;
# mmsegmentation's OpenCV has none, which changes results where images shrink.
ANTIALIAS = True


class TrainTransform:
    """Random resize, crop, flip, photometric distortion, padding.

    Images are fitted into ``data.scale`` times a random ratio, cropped to ``data.crop`` at most (up to ten tries for a
    crop in which no class has ``data.cat_max_ratio`` of the labelled pixels), mirrored, distorted and padded on the
    right and at the bottom: the image with ``data.mean``, which the model subtracts, the label with 255.
    """

    def __init__(self, data: DataConfig):
        self.data = data

    def __call__(self, sample: Sample, *, seed: int, step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A pure function of its arguments: ``slot`` is the place in the global batch of ``step``.

        Returns:
            image float32 [3, h, w] in [0, 1], label int64 [h, w] with 255 ignored; h, w = ``data.crop``.
        """
        data = self.data
        rng = np.random.default_rng((1, seed, step, slot))  # the sampler hashes (2, ...): other streams
        size = fit(sample.label.shape, data.scale, rng.uniform(*data.ratio))
        label = F.resize(sample.label[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]
        image = _resize(sample.image, size)
        rows, columns = _crop(label.numpy(), data.crop, data.cat_max_ratio, rng)
        image, label = image[:, rows, columns], label[rows, columns]
        if rng.random() < data.flip:
            image, label = image.flip(2), label.flip(1)
        image = image.contiguous().float() / 255  # decoded images have their channels last, slow for what follows
        if data.photometric:
            image = _distort(image, rng)
        return _pad(image, label, data)


def resize_for_test(image: torch.Tensor, scale: tuple[int, int], ratio: float = 1.0) -> torch.Tensor:
    """Fit an image into ``scale`` times ``ratio``, as training does.

    Args:
        image: uint8 [3, H, W].
        scale: longest and shortest side, in either order.
        ratio: factor on both.

    Returns:
        float32 [3, h, w] in [0, 1].
    """
    return _resize(image, fit(image.shape[1:], scale, ratio)).float().contiguous() / 255


def fit(size: tuple[int, int], scale: tuple[float, float], ratio: float = 1.0) -> tuple[int, int]:
    """Height and width of an image of ``size`` fitted into ``scale`` times ``ratio``, its aspect kept."""
    factor = ratio * min(max(scale) / max(size), min(scale) / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=ANTIALIAS)


def _crop(label: np.ndarray, crop: tuple[int, int], limit: float, rng: np.random.Generator) -> tuple[slice, slice]:
    for _ in range(10):
        top = int(rng.integers(max(label.shape[0] - crop[0], 0) + 1))
        left = int(rng.integers(max(label.shape[1] - crop[1], 0) + 1))
        window = slice(top, top + crop[0]), slice(left, left + crop[1])
        if limit >= 1:
            break
        counts = np.bincount(label[window].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if 0 < counts.max() < limit * counts.sum():
            break
    return window


def _distort(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Brightness +-32/255, contrast and saturation 0.5 to 1.5, hue +-36 degrees, each with probability 1/2.

    As mmsegmentation's PhotoMetricDistortion, without its rounding to uint8 between the parts. Brightness is added,
    contrast is a factor and comes before or after the colour, saturation is that of HSV: torchvision's own differ.
    """
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    gain = float(rng.uniform(0.5, 1.5))
    if brightness:
        image = (image + float(rng.uniform(-32, 32)) / 255).clamp(0, 1)
    if contrast and contrast_first:
        image = (image * gain).clamp(0, 1)
    if saturation:
        image = _scale_saturation(image, float(rng.uniform(0.5, 1.5)))
    if hue:
        image = F.adjust_hue(image, float(rng.uniform(-0.1, 0.1)))
    if contrast and not contrast_first:
        image = (image * gain).clamp(0, 1)
    return image


def _scale_saturation(image: torch.Tensor, factor: float) -> torch.Tensor:
    # At constant value v (the largest channel) and hue, S = (v - min) / v goes with every channel's distance to v.
    value = image.amax(0)
    most = value / (value - image.amin(0)).clamp(min=1e-8)  # the factor that makes S = 1
    return value - (value - image) * most.clamp(max=factor)


def _pad(image: torch.Tensor, label: torch.Tensor, data: DataConfig) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = label.shape
    padded = torch.tensor(data.mean)[:, None, None].expand(3, *data.crop).clone()
    padded[:, :height, :width] = image
    full = torch.full(data.crop, IGNORE)
    full[:height, :width] = label
    return padded, full
