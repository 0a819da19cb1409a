"""The layouts of images that the launchers' tests share."""

from __future__ import annotations

import torch
from torch import Tensor


def lay_out(layout: str, image: Tensor) -> Tensor:
    if layout == "channels_last":
        return image.to(memory_format=torch.channels_last)
    if layout == "sliced":  # NaN around it, so that a read outside shows
        larger = image.new_full([size + 3 for size in image.shape], float("nan"))
        return larger[tuple(slice(1, 1 + size) for size in image.shape)].copy_(image)
    if layout == "cropped":  # the same of a channels_last map
        larger = image.new_full([size + 2 * (i > 1) for i, size in enumerate(image.shape)], float("nan"))
        larger = larger.to(memory_format=torch.channels_last)
        return larger[:, :, 1:-1, 1:-1].copy_(image)
    if layout == "permuted":
        return image.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "expanded":
        return image[:1].expand_as(image)
    return image
