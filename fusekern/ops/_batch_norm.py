"""Batch norm as per-channel vectors, which is all of it that a fused kernel needs.

A kernel applies ``v = scale y + shift``, tells mean and M2 (the sum of squared deviations) of what it wrote, and in the
backward the sums of dv and of dv (y - mean). Between the kernels stands what this file has, on vectors of length c.
"""

from __future__ import annotations

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


def forward_of(norm: Norm, stats: Tensor | None, count: int, group: str, backend: str) -> tuple[Tensor, Tensor]:
    """What the norm normalises by, and how.

    Args:
        norm: whose running statistics count if it has no batch statistics.
        stats: mean and M2 of this process' ``count`` values, ``[2, c]``.
        count: values a channel.
        group: name of the process group over whose batches the statistics are, or empty.
        backend: whose kernels compute it.

    Returns:
        ``moments`` ``[3, c]``: mean, biased and unbiased variance; ``affine`` ``[2, c]``: scale and shift. Both fp32.
    """
    if norm.batch and group:
        moments = _over_processes(stats, count, group)
        return moments, affine_of(norm, moments, backend)
    mean, var = (None, None) if norm.batch else (_fp32(norm.mean), _fp32(norm.var))
    like = stats if norm.batch else mean
    moments, affine = like.new_empty(3, like.shape[-1]), like.new_empty(2, like.shape[-1])
    parameters = _fp32(norm.weight), _fp32(norm.bias), norm.eps
    launch(backend, "batch_norm", "fwd", stats if norm.batch else None, count, mean, var, *parameters, moments, affine)
    return moments, affine


def affine_of(norm: Norm, moments: Tensor, backend: str) -> Tensor:
    """``affine`` once more, from the moments."""
    affine = torch.empty_like(moments[:2])
    parameters = _fp32(norm.weight), _fp32(norm.bias), norm.eps
    launch(backend, "batch_norm", "fwd", None, 0, None, None, *parameters, moments, affine)
    return affine


def _fp32(part: Tensor | None) -> Tensor | None:
    return part if part is None else part.float().contiguous()


def _gathered(vectors: Tensor, count: int, group: str) -> Tensor:
    """``[2, c]`` and the count of each process, ``[processes, 3, c]`` in the order of their ranks, float64."""
    found = dist.distributed_c10d._resolve_process_group(group)
    own = torch.cat((vectors.double(), vectors.new_full((1, vectors.shape[1]), count, dtype=torch.float64)))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(found))]
    dist.all_gather(parts, own, group=found)
    return torch.stack(parts)


def _over_processes(stats: Tensor, count: int, group: str) -> Tensor:
    """The moments over all processes by Chan's rule: the same bits in each of them."""
    means, m2s, counts = _gathered(stats, count, group).unbind(1)  # [processes, c] each
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    m2 = (m2s + counts * (means - mean) ** 2).sum(0)
    return torch.stack((mean, m2 / total, m2 / (total - 1).clamp_min(1))).float()


def backward_of(
    norm: Norm, moments: Tensor, sums: Tensor, count: int, group: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """From ``sums`` ``[2, c]`` of dv and dv (y - mean) to ``coef`` and the gradients of weight and bias, fp32.

    ``coef`` ``[4, c]`` holds p, q, r and mean, with dy = p dv + q (y - mean) + r. The gradients of weight and bias are
    those of this process' batch, as of any parameter under DDP.
    """
    means = None
    if norm.batch and group:
        means, total = _gathered(sums, count, group).sum(0).split((2, 1))
        means = (means / total).float()
    coef, dweight = moments.new_empty(4, moments.shape[1]), moments.new_empty(moments.shape[1])
    weight = _fp32(norm.weight)
    launch(backend, "batch_norm", "bwd", moments, sums, means, count, weight, norm.eps, norm.batch, coef, dweight)
    return coef, dweight, sums[0]
