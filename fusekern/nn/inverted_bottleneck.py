"""The convolutional path of a block, as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusekern import ops
from fusekern.backends import check_name


class InvertedBottleneck(nn.Module):
    """MobileNetV2's inverted bottleneck with its residual: expand, filter each channel, project back.

    It runs the op ``inverted_bottleneck`` on its children's weights and keeps the running averages of their batch norms
    as ``nn.BatchNorm2d`` does. Where a child is not the plain module it was built with (``nn.SyncBatchNorm``, a frozen
    norm, a wrapped convolution) or has hooks, the children run themselves.

    Args:
        channels: C.
        expansion: hidden channels over C.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Shape: ``[B, C, H, W]`` to ``[B, C, H, W]``.
    """

    def __init__(self, channels: int, expansion: int = 6, *, backend: str = "auto") -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.backend = check_name(backend)

    def forward(self, image: Tensor) -> Tensor:
        if not all(map(_is_plain, self.children())):
            hidden = F.relu6(self.norm1(self.expand(image)))
            hidden = F.relu6(self.norm2(self.depthwise(hidden)))
            return image + self.norm3(self.project(hidden))
        norms = (self.norm1, self.norm2, self.norm3)
        image, statistics = ops.inverted_bottleneck(
            image,
            self.expand.weight,
            self.depthwise.weight,
            self.project.weight,
            tuple(map(_as_argument, norms)),
            backend=self.backend,
        )
        for norm, seen in zip(norms, statistics, strict=True):
            _track(norm, seen)
        return image


def _is_plain(child: nn.Module) -> bool:
    hooks = (child._forward_pre_hooks, child._forward_hooks, child._backward_pre_hooks, child._backward_hooks)
    return type(child) in (nn.Conv2d, nn.BatchNorm2d) and not any(hooks)


def _as_argument(norm: nn.BatchNorm2d) -> ops.BatchNorm:
    batch = norm.training or norm.running_mean is None
    return ops.BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, batch)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, seen: ops.BatchStatistics | None) -> None:
    """What ``nn.BatchNorm2d.forward`` does to its buffers in training, without its wait for the device."""
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)
    if seen is None:
        return
    for average, value in ((norm.running_mean, seen.mean), (norm.running_var, seen.var)):
        momentum = 1 / norm.num_batches_tracked.to(average.dtype) if norm.momentum is None else norm.momentum
        average.mul_(1 - momentum).add_(value * momentum)
