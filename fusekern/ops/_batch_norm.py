"""Batch norm as per-channel vectors, which is all of it that a fused kernel needs.

A kernel applies ``v = scale y + shift``, tells mean and M2 (the sum of squared deviations) of what it wrote, and in the
backward the sums of dv and of dv (y - mean). What becomes of these is for vectors of length c, which are fp32:

``vectors`` ``[5, c]``: scale and shift (``affine``), mean, biased and unbiased variance.
``coef`` ``[4, c]``: p, q, r and mean, with dy = p dv + q (y - mean) + r.

The stage that ends with mean and M2, or with the sums, makes them. This file has what no stage can: norms by running
statistics, and statistics over the processes of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusekern.ops._kernel import launch


class Norm(NamedTuple):
    """One batch norm as the op's schema flattens it; ``fusekern.ops.BatchNorm`` says what its parts are."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    batch: bool


def new_vectors(like: Tensor, rows: int, channels: int) -> Tensor:
    """Uninitialised, but for a map without a pixel: no stage runs there, and its sums are 0."""
    return (like.new_empty if like.numel() else like.new_zeros)(rows, channels, dtype=torch.float32)


def readable(part: Tensor | None, backend: str) -> Tensor | None:
    """A norm's tensor as a backend's kernels can read it."""
    if part is None:
        return None
    # In C++ they have one dtype.
    return (part.float() if backend == "cpp" else part).contiguous()


def fill_vectors(norms: Sequence[Norm | None], vectors: Sequence[Tensor], backend: str) -> None:
    """``vectors`` of three norms at once, from running statistics or, if ``batch``, from the moments in them."""
    arguments = []
    for norm, of in zip(norms, vectors, strict=True):
        if norm is None:
            arguments += (None, None, None, None, 0.0, None)
        else:
            seen = (None, None) if norm.batch else (norm.mean, norm.var)
            arguments += (*seen, norm.weight, norm.bias, norm.eps, of)
    launch(backend, "batch_norm", "fwd", *arguments)


def over_processes(stats: Tensor, count: int, group: str, vectors: Tensor) -> None:
    """The moments over all processes by Chan's rule, into ``vectors``: the same bits in each of them.

    Args:
        stats: mean and M2 of this process' ``count`` values, ``[2, c]``.
        count: values a channel.
        group: name of the process group.
        vectors: ``[5, c]``, of which this fills the last three.
    """
    means, m2s, counts = _gathered(stats, count, group).unbind(1)  # [processes, c] each
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    m2 = (m2s + counts * (means - mean) ** 2).sum(0)
    vectors[2:].copy_(torch.stack((mean, m2 / total, m2 / (total - 1).clamp_min(1))))


def _gathered(vectors: Tensor, count: int, group: str) -> Tensor:
    """``[2, c]`` and the count of each process, ``[processes, 3, c]`` in the order of their ranks, float64."""
    found = dist.distributed_c10d._resolve_process_group(group)
    own = torch.cat((vectors.double(), vectors.new_full((1, vectors.shape[1]), count, dtype=torch.float64)))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(found))]
    dist.all_gather(parts, own, group=found)
    return torch.stack(parts)


def backward_of(
    norm: Norm, vectors: Tensor, sums: Tensor, count: int, group: str, backend: str, coef: Tensor, dweight: Tensor
) -> None:
    """From ``sums`` ``[2, c]`` of dv and dv (y - mean) of this process to ``coef`` and ``dweight``, the weight's
    gradient, which is that of this process' batch, as of any parameter under DDP."""
    means = None
    if norm.batch:
        means, total = _gathered(sums, count, group).sum(0).split((2, 1))
        means = (means / total).float()
    settings = vectors, norm.weight, norm.eps, norm.batch
    launch(backend, "batch_norm", "bwd", sums, means, count, *settings, coef, dweight)
