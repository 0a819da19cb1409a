"""Patches of the feature map become tokens: the convolution before the image-to-text bridge."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import resolve
from fusekern.ops._check import check_alike, check_choice, check_shape

PADS = ("floor", "ceil")


def downsampled_size(height: int, width: int, pad: str) -> tuple[int, int]:
    """Height and width of the map of tokens.

    Raises:
        ValueError: ``pad`` is neither ``"floor"`` nor ``"ceil"``.
    """
    check_choice("pad", pad, PADS)
    if pad == "ceil":
        return (height + 2) // 3, (width + 2) // 3
    return max(height // 3, min(height, 1)), max(width // 3, min(width, 1))


def downsample_reference(image: Tensor, weight: Tensor, bias: Tensor | None = None, *, pad: str = "floor") -> Tensor:
    """Plain PyTorch; see ``downsample``."""
    height, width = image.shape[2:]
    h, w = downsampled_size(height, width, pad)
    # A side of 0 is completed to one patch too, which the last line cuts off: convolutions refuse an empty map.
    below, right = 3 * max(h, 1) - height, 3 * max(w, 1) - width
    if below > 0 or right > 0:
        image = F.pad(image, (0, max(right, 0), 0, max(below, 0)))
    tokens = F.conv2d(image, weight, bias, stride=3, groups=image.shape[1] // weight.shape[1])
    return tokens[:, :, :h, :w]


def downsample(
    image: Tensor, weight: Tensor, bias: Tensor | None = None, *, pad: str = "floor", backend: str = "auto"
) -> Tensor:
    """3x3 convolution with stride 3: every 3x3 patch becomes one token.

        X[b, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] image[b, c, 3 y + i, 3 x + j]

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.3, "aggregating each 3x3xC patch
    into 1xC". The paper does not say what becomes of sizes that 3 does not divide; ``"floor"`` fits its GFLOPs.

    Args:
        image: ``[B, C, H, W]``, floating point, any strides.
        weight: ``[C, C, 3, 3]`` (full) or ``[C, 1, 3, 3]`` (depthwise).
        bias: ``[C]`` or none.
        pad: rows and columns beyond a multiple of 3 are dropped (``"floor"``) or completed with zeros (``"ceil"``).
            A side below 3 is always completed.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, C, h, w]`` with ``(h, w) = downsampled_size(H, W, pad)``.

    Raises:
        ValueError: wrong shape, device, dtype or ``pad``.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("image", image, "B C H W")
    channels = image.shape[1]
    group = weight.shape[1] if weight.dim() == 4 else 0
    if weight.shape != (channels, group, 3, 3) or group not in (1, channels):
        raise ValueError(
            f"weight must be [C, C, 3, 3] or [C, 1, 3, 3] with C = {channels}; got shape {list(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, "C", C=channels)
    check_alike(image=image, weight=weight, bias=bias)
    check_choice("pad", pad, PADS)
    resolve("downsample", backend, image, weight, bias, pad)
    return downsample_reference(image, weight, bias, pad=pad)
