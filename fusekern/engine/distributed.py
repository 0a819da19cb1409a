"""The few collectives of training. Every function does nothing, or the obvious, in a single process; none pickles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Each flag, true if it is true in any process."""
    if not dist.is_initialized():
        return list(flags)
    reduced = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return [bool(flag) for flag in reduced.tolist()]


def gather_tensor(tensor: Tensor, *, device: torch.device) -> list[Tensor]:
    """The tensors of all processes, by rank, on the CPU; they must have one shape and dtype."""
    if not dist.is_initialized():
        return [tensor.cpu()]
    own = tensor.to(device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return [part.cpu() for part in parts]


def gather_text(text: str, *, device: torch.device) -> list[str]:
    """The texts of all processes, by rank, cut to 4096 bytes each."""
    data = text.encode()[:4096].ljust(4096, b"\0")
    parts = gather_tensor(torch.frombuffer(bytearray(data), dtype=torch.uint8), device=device)
    return [part.numpy().tobytes().rstrip(b"\0").decode(errors="ignore") for part in parts]


def broadcast_files(files: Mapping[str, bytes] | None, *, device: torch.device) -> dict[str, bytes]:
    """Rank 0's files by name, in every process, so that only rank 0's machine needs them; the others pass None."""
    if not dist.is_initialized():
        return dict(files)
    index = json.dumps({name: len(data) for name, data in files.items()}).encode() if files is not None else b""
    sizes = json.loads(_broadcast(index, None, device))
    return {name: _broadcast(files[name] if files is not None else b"", size, device) for name, size in sizes.items()}


def _broadcast(data: bytes, size: int | None, device: torch.device) -> bytes:
    if size is None:
        length = torch.tensor(len(data), device=device)
        dist.broadcast(length, 0)
        size = int(length)
    block = torch.zeros(size, dtype=torch.uint8, device=device)
    if dist.get_rank() == 0 and size:
        block.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(block, 0)
    return block.cpu().numpy().tobytes()


@torch.no_grad()
def broadcast_buffers(buffers: Iterable[Tensor]) -> None:
    """Overwrites floating-point buffers, such as the statistics of batch norm, with rank 0's, in one message."""
    if not dist.is_initialized():
        return
    floats = [buffer for buffer in buffers if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten().float() for buffer in floats])
    dist.broadcast(flat, 0)
    for buffer, values in zip(floats, flat.split([buffer.numel() for buffer in floats]), strict=True):
        buffer.copy_(values.view_as(buffer))
