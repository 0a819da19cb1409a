"""Where the C++ kernels read and write in their tests: in any strides, with NaN between, and in memory with walls."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def lay_out(layout: str, tensor: Tensor) -> Tensor:
    """The same values, but for ``expanded``, in other strides; what lies between those of a slice is NaN."""
    if layout.startswith("sliced"):
        larger = torch.full([size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
        larger = channels_last(larger) if "channels_last" in layout else larger
        return larger[tuple(slice(1, 1 + size) for size in tensor.shape)].copy_(tensor)
    if layout == "channels_last":
        return channels_last(tensor)
    if layout == "transposed":  # neither channels nor pixels lie side by side
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return tensor[:, :, :1, :1].expand_as(tensor)
    if layout == "batch permuted":
        return tensor.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    return tensor.contiguous()


def empty(shape, dtype: torch.dtype, layout: str = "NCHW") -> Tensor:
    """Dense, full of NaN, with a wall of sevens on either side that ``walls_stand`` looks at."""
    count = torch.Size(shape).numel()
    memory = torch.full((count + 64,), 7.0, dtype=dtype)
    inside = memory[32 : 32 + count].fill_(float("nan"))
    if layout == "channels_last":
        batch, channels, height, width = shape
        return inside.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return inside.view(shape)


def walls_stand(tensor: Tensor) -> bool:
    memory = tensor.as_strided((tensor.numel() + 64,), (1,), tensor.storage_offset() - 32)
    return bool((memory[:32] == 7).all() and (memory[-32:] == 7).all())
