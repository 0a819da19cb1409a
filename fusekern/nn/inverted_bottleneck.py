"""The convolutional path of a block, as a module."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fusekern import ops
from fusekern.nn._attributes import is_plain, tensor_of
from fusekern.nn._backend import HasBackend
from fusekern.ops._check import check_choice
from fusekern.ops.inverted_bottleneck import MEMORY, Recipe, with_recipe


class InvertedBottleneck(HasBackend):
    """MobileNetV2's inverted bottleneck: expand, filter each channel, project back, add the input.

    It runs the op ``inverted_bottleneck`` on its children's weights and keeps the running averages of their batch norms
    as ``nn.BatchNorm2d`` does; ``nn.SyncBatchNorm`` takes its statistics over its process group, on a CPU too. Where a
    child is another module (a wrapped convolution, a norm of one's own), has hooks or another dilation or padding, the
    children run themselves.

    Args:
        channels: C.
        expansion: hidden channels over C.
        out_channels: O; C if none.
        kernel_size: of the depthwise convolution, odd.
        stride: of the depthwise convolution. The input is added where it is 1 and O = C.
        memory: ``"default"``, or ``"low"`` to keep less for the backward and compute the expansion twice.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: ``kernel_size`` is even, or ``memory`` or ``backend`` unknown.

    Shape: ``[B, C, H, W]`` to ``[B, O, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 6,
        *,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        memory: str = "default",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        hidden = channels * expansion
        out_channels = channels if out_channels is None else out_channels
        same = {"padding": kernel_size // 2, "stride": stride}
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size, groups=hidden, bias=False, **same)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1 and out_channels == channels
        check_choice("memory", memory, MEMORY)
        self.memory = memory
        self.backend = backend

    def forward(self, image: Tensor, recipes: list[Recipe] | None = None) -> Tensor:
        """``recipes`` is for one who would keep the result for a backward: how to make it again, if known, is added."""
        parts = Parts(*[self._modules[name] for name in Parts._fields])
        known = all(is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm) for norm in parts.norms) and are_known(parts)
        group = group_of(parts.norms) if known else None
        if group is None:
            hidden = F.relu6(parts.norm1(parts.expand(image)))
            hidden = F.relu6(parts.norm2(parts.depthwise(hidden)))
            result = parts.norm3(parts.project(hidden))
            return image + result if self.residual else result
        result, recipe = run(image, parts, group, self.residual, self.memory, self.backend)
        if recipes is not None and recipe is not None:
            recipes.append(recipe)
        return result


class Parts(NamedTuple):
    """The six modules of a block."""

    expand: nn.Module
    norm1: nn.Module
    depthwise: nn.Module
    norm2: nn.Module
    project: nn.Module
    norm3: nn.Module

    @property
    def norms(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.norm1, self.norm2, self.norm3


def run(
    image: Tensor, parts: Parts, group: str, residual: bool, memory: str, backend: str
) -> tuple[Tensor, Recipe | None]:
    """The block by the op, and its result's recipe. ``group`` as of ``group_of``."""
    image, statistics, recipe = with_recipe(
        *(image, *[tensor_of(conv, "weight") for conv in (parts.expand, parts.depthwise, parts.project)]),
        tuple(map(_as_argument, parts.norms)),
        stride=parts.depthwise.stride[0],
        residual=residual,
        memory=memory,
        group=group,
        backend=backend,
    )
    seen = [
        pair for pair in zip(parts.norms, statistics, strict=True) if pair[0].training and pair[0].track_running_stats
    ]
    if seen:  # here: an exported no_grad with nothing in it cannot be loaded
        _track(seen)
    return image, recipe


def are_known(parts: Parts) -> bool:
    """Are these the convolutions of an inverted bottleneck, by modules that the op may take the place of?"""
    expand, across, project = parts.expand, parts.depthwise, parts.project
    for convolution in (expand, across, project):
        if not is_plain(convolution, nn.Conv2d) or convolution._parameters.get("bias") is not None:
            return False
        if convolution.dilation != (1, 1) or convolution.padding_mode != "zeros":
            return False
    for pointwise in (expand, project):
        if pointwise.kernel_size != (1, 1) or pointwise.stride != (1, 1) or pointwise.groups != 1:
            return False
        if pointwise.padding != (0, 0):
            return False
    size, step = across.kernel_size[0], across.stride[0]
    same = across.kernel_size == (size, size) and across.padding == (size // 2, size // 2) and size % 2 == 1
    return same and across.stride == (step, step) and across.groups == across.in_channels == across.out_channels


def _takes_batch(norm: nn.Module) -> bool:
    return norm.training or tensor_of(norm, "running_mean") is None


def group_of(norms: tuple[nn.Module, ...]) -> str | None:
    """The name of the process group that the norms share, empty for none; ``None`` if they do not share it."""
    found = {_own_group(norm) for norm in norms if _takes_batch(norm)}
    return None if len(found) > 1 else "".join(found)


def _own_group(norm: nn.Module) -> str:
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return ""
    group = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _as_argument(norm: nn.BatchNorm2d) -> ops.BatchNorm:
    tensors = [tensor_of(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    return ops.BatchNorm(*tensors, norm.eps, _takes_batch(norm))


@torch.no_grad()
def _track(seen: list[tuple[nn.BatchNorm2d, ops.BatchStatistics | None]]) -> None:
    """What ``nn.BatchNorm2d.forward`` does to its buffers in training, without its wait for the device, and for all
    norms together: one launch for their counts, and one for the averages of those with the same momentum."""
    if counts := [norm.num_batches_tracked for norm, _ in seen if norm.num_batches_tracked is not None]:
        torch._foreach_add_(counts, 1)
    averages, values = {}, {}
    for norm, statistics in seen:
        if statistics is None or norm.running_mean is None:
            continue
        averages.setdefault(norm.momentum, []).extend((norm.running_mean, norm.running_var))
        values.setdefault(norm.momentum, []).extend(statistics)
        if norm.momentum is None:
            share = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
            torch._foreach_lerp_(averages.pop(None), values.pop(None), [share, share])
    for momentum, of in averages.items():
        torch._foreach_lerp_(of, values[momentum], momentum)
