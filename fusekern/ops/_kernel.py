"""What the bodies of the ops with kernels share.

Each allocates the outputs, with the strides that its fake promises, and has a launcher fill them: a Triton launcher of
``kernels/<op>.py`` or a C++ op of ``csrc/<op>.cpp``, alike in name and arguments.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from fusekern.ops._check import autocast_enabled


def follow_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on; like autocast, it leaves float64 alone."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def empty_image(image: Tensor, channels: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """An uninitialised ``[B, C, H, W]`` in the layout of ``image``: channels_last if its channels lie side by side."""
    layout = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format
    if channels is None and size is None:
        return torch.empty_like(image, memory_format=layout)
    shape = (image.shape[0], image.shape[1] if channels is None else channels, *(size or image.shape[2:]))
    return torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=layout)


def empty_tokens(tokens: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape."""
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def launch(backend: str, op: str, direction: str, *arguments: object, **more: object) -> object:
    """Have the launcher ``<op>_<direction>`` of a backend fill the outputs among its arguments; its result is returned.

    Autocast is off meanwhile: the arguments have their dtypes already.
    """
    # Triton is optional, and importing it takes longer than importing fusekern.
    module = torch.ops.fusekern_cpp if backend == "cpp" else import_module(f"fusekern.kernels.{op}")
    launcher = getattr(module, f"{op}_{direction}")
    for argument in arguments:
        if isinstance(argument, Tensor):
            device = argument.device.type
            break
    if not autocast_enabled(device):
        return launcher(*arguments, **more)
    with torch.autocast(device, enabled=False):
        return launcher(*arguments, **more)
