"""What the launchers of all ops share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# As Triton's functions of these names, which on the host take longer than a launcher has for all else.


def cdiv(count: int, size: int) -> int:
    """How many of ``size`` hold ``count``."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least one that is not below ``count``, which is 1 or more."""
    return 1 << (count - 1).bit_length()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """For launches on the tensor's GPU; on a CPU, where an interpreter runs the kernels, nothing."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision_of(dtype: torch.dtype, convolution: bool = False) -> str:
    """Of fp32 products, ``"tf32"`` or ``"ieee"``: PyTorch's switch, which convolutions have one of their own of."""
    # Not ``allow_tf32``: reading that raises where the newer setting is in use.
    switch = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and switch.fp32_precision == "tf32" else "ieee"
