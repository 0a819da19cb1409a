"""The vectors of a batch norm between the stages of an op; ``fusekern/ops/_batch_norm.py`` says what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from torch import Tensor

BLOCK = 256  # channels of a program


@triton.jit(do_not_specialize=["count", "eps"])
def batch_norm_fwd_kernel(
    stats,  # [2, C], or null
    mean,  # [C], or null
    var,  # [C], or null
    weight,  # [C], or null
    bias,  # [C], or null
    moments,  # [3, C]
    affine,  # [2, C]
    count,
    eps,
    C: tl.constexpr,
    SEEN: tl.constexpr,  # where the moments are from: stats, running or moments
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    if SEEN == "running":
        b_mean = tl.load(mean + o_c, mask=m_c)
        b_var = tl.load(var + o_c, mask=m_c)
        b_unbiased = b_var
    elif SEEN == "stats":
        b_mean = tl.load(stats + o_c, mask=m_c)
        b_squares = tl.load(stats + C + o_c, mask=m_c)
        b_var = b_squares / count
        b_unbiased = b_squares / tl.maximum(count - 1.0, 1.0)
    else:
        b_mean = tl.load(moments + o_c, mask=m_c)
        b_var = tl.load(moments + C + o_c, mask=m_c)
    if SEEN != "moments":
        tl.store(moments + o_c, b_mean, mask=m_c)
        tl.store(moments + C + o_c, b_var, mask=m_c)
        tl.store(moments + 2 * C + o_c, b_unbiased, mask=m_c)
    b_scale = tl.rsqrt(b_var + eps)
    if WEIGHT:
        b_scale *= tl.load(weight + o_c, mask=m_c)
    b_shift = -b_mean * b_scale
    if BIAS:
        b_shift += tl.load(bias + o_c, mask=m_c)
    tl.store(affine + o_c, b_scale, mask=m_c)
    tl.store(affine + C + o_c, b_shift, mask=m_c)


@triton.jit(do_not_specialize=["count", "eps"])
def batch_norm_bwd_kernel(
    moments,  # [3, C]
    sums,  # [2, C]
    means,  # [2, C], or null
    weight,  # [C], or null
    coef,  # [4, C]
    dweight,  # [C]
    count,
    eps,
    C: tl.constexpr,
    BATCH: tl.constexpr,
    MEANS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_rstd = tl.rsqrt(tl.load(moments + C + o_c, mask=m_c) + eps)
    b_p = b_rstd
    if WEIGHT:
        b_p *= tl.load(weight + o_c, mask=m_c)
    b_first = tl.load(sums + o_c, mask=m_c)
    b_second = tl.load(sums + C + o_c, mask=m_c)
    tl.store(dweight + o_c, b_second * b_rstd, mask=m_c)
    if MEANS:
        b_first = tl.load(means + o_c, mask=m_c)
        b_second = tl.load(means + C + o_c, mask=m_c)
    else:
        b_first /= count
        b_second /= count
    b_q = -b_p * b_rstd * b_rstd * b_second if BATCH else tl.zeros([BC], tl.float32)
    b_r = -b_p * b_first if BATCH else tl.zeros([BC], tl.float32)
    tl.store(coef + o_c, b_p, mask=m_c)
    tl.store(coef + C + o_c, b_q, mask=m_c)
    tl.store(coef + 2 * C + o_c, b_r, mask=m_c)
    tl.store(coef + 3 * C + o_c, tl.load(moments + o_c, mask=m_c), mask=m_c)


def _device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def batch_norm_fwd(
    stats: Tensor | None,
    count: int,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    moments: Tensor,
    affine: Tensor,
) -> None:
    """``moments`` from ``stats``, or from ``mean`` and ``var``, or as they are; and ``affine`` from them."""
    channels = moments.shape[1]
    seen = "stats" if stats is not None else "running" if mean is not None else "moments"
    with _device_of(moments):
        batch_norm_fwd_kernel[(triton.cdiv(channels, BLOCK),)](
            *(stats, mean, var, weight, bias, moments, affine, float(count), eps),
            *(channels, seen, weight is not None, bias is not None, BLOCK),
        )


def batch_norm_bwd(
    moments: Tensor,
    sums: Tensor,
    means: Tensor | None,
    count: int,
    weight: Tensor | None,
    eps: float,
    batch: bool,
    coef: Tensor,
    dweight: Tensor,
) -> None:
    """``coef`` and ``dweight`` from the sums of this process, and the ``means`` of all where there are more."""
    channels = moments.shape[1]
    with _device_of(moments):
        batch_norm_bwd_kernel[(triton.cdiv(channels, BLOCK),)](
            *(moments, sums, means, weight, coef, dweight, float(count), eps),
            *(channels, batch, means is not None, weight is not None, BLOCK),
        )


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for C in (512, 200):
        for seen in ("stats", "running", "moments"):
            flags = {"SEEN": seen, "WEIGHT": True, "BIAS": True}
            yield _case(f"fwd {seen}", batch_norm_fwd_kernel, C, **flags)
        for means in (False, True):
            yield _case(f"bwd{' means' * means}", batch_norm_bwd_kernel, C, BATCH=True, MEANS=means, WEIGHT=True)
        yield _case("bwd frozen", batch_norm_bwd_kernel, C, BATCH=False, MEANS=False, WEIGHT=True)


def _case(name: str, kernel: triton.runtime.jit.JITFunction, C: int, **flags: object) -> Case:
    constexprs = {"C": C, "BC": BLOCK, **flags}
    present = [param.name for param in kernel.params if param.name not in constexprs]
    signature = {param: "fp32" if param in ("count", "eps") else "*fp32" for param in present}
    divisible = tuple(param for param in present if signature[param] == "*fp32")
    return Case(kernel, f"{name} {C}", signature, constexprs, divisible)
