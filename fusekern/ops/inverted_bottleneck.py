"""The convolutional path of a block: MobileNetV2's inverted bottleneck."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import resolve
from fusekern.ops._check import check_alike, check_shape


class BatchNorm(NamedTuple):
    """One batch norm over ``c`` channels, in the shape that the op takes it.

    Args:
        weight: ``[c]`` or none.
        bias: ``[c]`` or none.
        mean: ``[c]``, the running mean, or none if ``batch``.
        var: ``[c]``, the running variance, or none if ``batch``.
        eps: added to the variance.
        batch: normalise by the statistics of this batch (training) instead of the running ones.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    batch: bool


class BatchStatistics(NamedTuple):
    """What a batch norm saw: mean ``[c]`` and unbiased variance ``[c]`` of the batch, as running averages take them."""

    mean: Tensor
    var: Tensor


def _batch_norm(x: Tensor, norm: BatchNorm) -> tuple[Tensor, BatchStatistics | None]:
    if not norm.batch:
        return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps), None
    # Running averages that forget everything are the statistics of this batch, from PyTorch's own pass over x.
    like = next((t for t in (norm.mean, norm.weight) if t is not None), x)
    seen = BatchStatistics(*(x.new_zeros(x.shape[1], dtype=like.dtype) for _ in range(2)))
    y = F.batch_norm(x, seen.mean, seen.var, norm.weight, norm.bias, training=True, momentum=1.0, eps=norm.eps)
    return y, seen


def inverted_bottleneck_reference(
    image: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, norms: tuple[BatchNorm, BatchNorm, BatchNorm]
) -> tuple[Tensor, tuple[BatchStatistics | None, ...]]:
    """Plain PyTorch; see ``inverted_bottleneck``."""
    if image.numel() == 0:  # convolutions refuse an empty map
        return image.clone(), (None, None, None)
    y, seen1 = _batch_norm(F.conv2d(image, expand), norms[0])
    y = F.relu6(y)
    y, seen2 = _batch_norm(F.conv2d(y, depthwise, padding=1, groups=y.shape[1]), norms[1])
    y = F.relu6(y)
    y, seen3 = _batch_norm(F.conv2d(y, project), norms[2])
    return image + y, (seen1, seen2, seen3)


def inverted_bottleneck(
    image: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    norms: tuple[BatchNorm, BatchNorm, BatchNorm],
    *,
    backend: str = "auto",
) -> tuple[Tensor, tuple[BatchStatistics | None, ...]]:
    """Expand, filter each channel, project back, add the input.

        I' = I + BN3(W_project ReLU6(BN2(W_depthwise * ReLU6(BN1(W_expand I)))))    * a 3x3 convolution, padding 1

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.3, after MobileNetV2 (arXiv
    1801.04381). An expansion of 6 fits the paper's GFLOPs.

    The op changes no argument: in training it returns what the norms saw, and the caller keeps the running averages.

    Args:
        image: ``[B, C, H, W]``, floating point, any strides.
        expand: ``[E, C, 1, 1]``.
        depthwise: ``[E, 1, 3, 3]``.
        project: ``[C, E, 1, 1]``.
        norms: the three batch norms, over E, E and C channels. Beside a bf16 or fp16 image they may be fp32.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The new image ``[B, C, H, W]``, and for each norm what it saw if ``batch``, otherwise none (also where the image
        has no pixel). No gradient flows through the statistics.

    Raises:
        ValueError: wrong shape, device or dtype, a norm without batch and running statistics, or a single pixel in the
            whole batch in training, which has no variance.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("image", image, "B C H W")
    channels = image.shape[1]
    check_shape("expand", expand, "E C 1 1", C=channels)
    hidden = expand.shape[0]
    check_shape("depthwise", depthwise, "E 1 3 3", E=hidden)
    check_shape("project", project, "C E 1 1", C=channels, E=hidden)
    check_alike(image=image, expand=expand, depthwise=depthwise, project=project)
    if len(norms) != 3:
        raise ValueError(f"norms must be three batch norms, got {len(norms)}")
    for index, (norm, width) in enumerate(zip(norms, (hidden, hidden, channels), strict=True)):
        _check_norm(f"norms[{index}]", norm, width, image)
    resolve("inverted_bottleneck", backend, image, expand, depthwise, project, norms)
    return inverted_bottleneck_reference(image, expand, depthwise, project, norms)


def _check_norm(name: str, norm: BatchNorm, width: int, image: Tensor) -> None:
    if not norm.batch and (norm.mean is None or norm.var is None):
        raise ValueError(f"{name} needs a running mean and variance, or batch=True")
    wide = torch.promote_types(image.dtype, torch.float32)
    for part in ("weight", "bias", "mean", "var"):
        tensor = getattr(norm, part)
        if tensor is None:
            continue
        check_shape(f"{name}.{part}", tensor, "c", c=width)
        if tensor.device != image.device:
            raise ValueError(f"{name}.{part} is on {tensor.device}, image on {image.device}: they must share a device")
        if tensor.dtype not in (image.dtype, wide):
            raise ValueError(f"{name}.{part} is {tensor.dtype}: beside an image of {image.dtype} it must be {wide}")
