"""What the kernels cannot take, in words: the ``why_not`` functions that the ops register."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from fusekern.extensions import load

CPU_HAS_BF16 = not load("_C") and import_module("fusekern._C").cpu_has_bf16()


def cpp_dtypes(first: Tensor, *rest: object) -> list[str]:
    """The C++ kernels compute in fp32."""
    return _dtypes(first, torch.float32, torch.bfloat16)


def cpp_linear(tokens: list[Tensor], parts: list[Tensor]) -> list[str]:
    """Of C++ kernels that take parameters where they lie."""
    dtype = tokens[0].dtype
    reasons = _dtypes(tokens[0], torch.float32, torch.bfloat16)
    if not reasons and any([part.dtype not in (dtype, torch.float32) for part in parts]):
        reasons.append("parameters that are not float32")
    if not all([part.is_contiguous() for part in parts]):
        reasons.append("parameters that are not contiguous")
    return reasons


def slow_bf16(first: Tensor, *rest: object) -> list[str]:
    """Where products in bf16 are the kernel's own."""
    return [] if CPU_HAS_BF16 or first.dtype != torch.bfloat16 else ["this CPU does not multiply bfloat16"]


def triton_dtypes(first: Tensor, *rest: object) -> list[str]:
    """The Triton kernels need tensor cores that know bf16, and accumulate in fp32."""
    reasons = _dtypes(first, torch.float32, torch.bfloat16, torch.float16)
    device = torch.cuda.get_device_properties(first.device.index)
    if device.major < 8:
        reasons.append(f"it needs compute capability 8.0, the device has {device.major}.{device.minor}")
    return reasons


def triton_attention(first: Tensor, *rest: object) -> list[str]:
    """``rest`` ends with ``heads, scale``; a head lies on chip as a whole."""
    *tensors, heads, _ = rest
    width = tensors[-1].shape[1 if tensors[-1].dim() == 4 else 2] // heads
    wide = [f"heads of {width} channels, it takes up to 256"] if width > 256 else []
    return triton_dtypes(first) + wide


def _dtypes(tensor: Tensor, *known: torch.dtype) -> list[str]:
    if tensor.dtype in known:
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
    return [f"{str(tensor.dtype).removeprefix('torch.')}, it takes {names}"]
