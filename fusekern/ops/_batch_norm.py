"""Batch norm as per-channel vectors, which is all of it that a fused kernel needs.

A kernel applies ``v = scale y + shift``, tells mean and M2 (the sum of squared deviations) of what it wrote, and in the
backward the sums of dv and of dv (y - mean). Between the kernels stands what this file has, on vectors of length c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Norm(NamedTuple):
    """One batch norm as the op's schema flattens it; ``fusekern.ops.BatchNorm`` says what its parts are."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    batch: bool


def moments_of(norm: Norm, stats: Tensor | None, count: int, group: str) -> Tensor:
    """What the norm normalises by. ``[3, c]``, fp32: mean, biased and unbiased variance.

    Args:
        norm: whose running statistics count if it has no batch statistics.
        stats: mean and M2 of this process' ``count`` values, ``[2, c]``.
        count: values a channel.
        group: name of the process group over whose batches the statistics are, or empty.
    """
    if not norm.batch:
        mean, var = norm.mean.float(), norm.var.float()
        return torch.stack((mean, var, var))
    if group:
        return _over_processes(stats, count, group)
    mean, m2 = stats
    return torch.stack((mean, m2 / count, m2 / max(count - 1, 1)))


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


def affine_of(norm: Norm, moments: Tensor) -> Tensor:
    """scale and shift, ``[2, c]``, fp32."""
    scale = (moments[1] + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    shift = -moments[0] * scale
    return torch.stack((scale, shift if norm.bias is None else shift + norm.bias.float()))


def backward_of(norm: Norm, moments: Tensor, sums: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """From ``sums`` ``[2, c]`` of dv and dv (y - mean) to ``coef`` and the gradients of weight and bias, fp32.

    ``coef`` ``[4, c]`` holds p, q, r and mean, with dy = p dv + q (y - mean) + r. The gradients of weight and bias are
    those of this process' batch, as of any parameter under DDP.
    """
    rstd = (moments[1] + norm.eps).rsqrt()
    p = rstd if norm.weight is None else rstd * norm.weight.float()
    dweight, dbias = sums[1] * rstd, sums[0]
    if not norm.batch:
        q = r = torch.zeros_like(p)
    else:
        if group:
            *sums, count = _gathered(sums, count, group).sum(0).float()
        q = -p * rstd * rstd * (sums[1] / count)
        r = -p * (sums[0] / count)
    return torch.stack((p, q, r, moments[0])), dweight, dbias
