"""The launchers of batch_norm's vectors, judged by PyTorch's batch norm in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import batch_norm as kernels
from torch import Tensor
from where import DEVICE, DTYPES

EPS = 1e-3


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=2e-6)


def blank(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


class Norm:
    """A norm over some pixels, and what float64 makes of them."""

    def __init__(self, channels: int, learned: bool, dtype: torch.dtype = torch.float32, batch: bool = True) -> None:
        torch.manual_seed(channels)
        self.channels, self.batch = channels, batch
        self.rows = 3 * torch.randn(50, channels, dtype=torch.float64, device=DEVICE) + 5
        self.mean = torch.randn(channels, device=DEVICE).to(dtype)
        self.var = (torch.rand(channels, device=DEVICE) + 0.5).to(dtype)
        self.weight = torch.randn(channels, device=DEVICE).to(dtype) if learned else None
        self.bias = torch.randn(channels, device=DEVICE).to(dtype) if learned else None
        self.leaves = [self.rows.clone().requires_grad_()]
        parameters = [None if p is None else p.double().requires_grad_() for p in (self.weight, self.bias)]
        self.leaves += [p for p in parameters if p is not None]
        running = self.mean.double(), self.var.double()
        self.truth = F.batch_norm(self.leaves[0], *running, *parameters, training=batch, eps=EPS)

    def judge(self, vectors: Tensor) -> None:
        scale, shift, mean, biased, unbiased = vectors
        close(scale.double() * self.rows + shift.double(), self.truth.detach())
        close(mean, self.rows.mean(0) if self.batch else self.mean.double())
        close(biased, self.rows.var(0, unbiased=False) if self.batch else self.var.double())
        close(unbiased, self.rows.var(0) if self.batch else self.var.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [True, False])
def test_three_norms_in_one_launch(learned, dtype):
    """By running statistics; without a norm nothing is written."""
    norms = [Norm(channels, learned, dtype, batch=False) for channels in (1, 300, 40)]
    for absent in (None, 0, 1, 2):
        present = [norm for i, norm in enumerate(norms) if i != absent]
        vectors = {norm: blank(5, norm.channels) for norm in present}
        kernels.batch_norm_fwd(
            *(
                argument
                for norm in norms
                for argument in (
                    (norm.mean, norm.var, norm.weight, norm.bias, EPS, vectors[norm])
                    if norm in vectors
                    else (None, None, None, None, 0.0, None)
                )
            )
        )
        for norm in present:
            norm.judge(vectors[norm])


def test_from_moments():
    """As they are over several processes."""
    norm = Norm(40, True)
    vectors = blank(5, 40)
    vectors[2:] = torch.stack((norm.rows.mean(0), norm.rows.var(0, unbiased=False), norm.rows.var(0)))
    kernels.batch_norm_fwd(
        *[None] * 4, 0.0, None, None, None, norm.weight, norm.bias, EPS, vectors, *[None] * 4, 0.0, None
    )
    norm.judge(vectors)


@pytest.mark.parametrize("pixels", [50, 7, 1, 60])
@pytest.mark.parametrize("channels, learned", [(1, True), (40, False), (40, True)])
def test_join(channels, learned, pixels):
    """Of tiles of several sizes, the last of them with fewer pixels."""
    norm = Norm(channels, learned)
    parts = norm.rows.split(pixels)
    moments = [torch.stack((part.mean(0), ((part - part.mean(0)) ** 2).sum(0))) for part in parts]
    partial, stats, vectors = torch.stack(moments).float(), blank(2, channels), blank(5, channels)
    arguments = partial, 50, len(parts), pixels
    kernels.join(*arguments, None, vectors, norm.weight, norm.bias, EPS)
    norm.judge(vectors)
    kernels.join(*arguments, stats, None, None, None, 0.0)
    assert torch.equal(stats[0], vectors[2])
    close(stats[1] / 50, norm.rows.var(0, unbiased=False))


@pytest.mark.parametrize("parts", [1, 10, 50, 300])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("channels", [1, 40, 300])
def test_backward(channels, batch, learned, parts):
    """From the sums of parts, and from those of this process with the means over all."""
    norm = Norm(channels, learned, batch=batch)
    mean, var = (norm.rows.mean(0), norm.rows.var(0, unbiased=False)) if batch else (norm.mean, norm.var)
    grad = torch.randn_like(norm.rows)
    dx, *learnt = torch.autograd.grad(norm.truth, norm.leaves, grad)
    terms = torch.stack((grad, grad * (norm.rows - mean)), 1).float()  # [pixels, 2, channels]
    partial = terms.new_zeros(parts, 2, channels)
    partial.index_add_(0, torch.arange(50, device=DEVICE) % parts, terms)
    vectors = blank(5, channels)
    vectors[2], vectors[3] = mean, var
    sums, coef, dweight = blank(2, channels), blank(4, channels), blank(channels)
    dbias = blank(channels).to(DTYPES[-1])
    summed = kernels.Summed(sums, coef, dweight, vectors, norm.weight, EPS, batch, dbias)
    kernels.add(partial, 50, summed)
    assert torch.equal(dbias, sums[0].to(dbias.dtype))
    narrow = blank(channels).to(DTYPES[-1])
    kernels.add(partial, 50, summed._replace(dweight=narrow))
    assert torch.equal(narrow, dweight.to(narrow.dtype))
    torch.testing.assert_close(sums.double(), terms.double().sum(0), rtol=1e-5, atol=1e-5)

    def judge() -> None:
        p, q, r, middle = coef.double()
        close(p * grad + q * (norm.rows - middle) + r, dx)
        if learned:
            torch.testing.assert_close(dweight.double(), learnt[0], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(sums[0].double(), learnt[1], rtol=1e-5, atol=1e-5)

    judge()
    coef, dweight, other = blank(4, channels), blank(channels), blank(2, channels)
    means = sums / 50 if batch else None
    kernels.batch_norm_bwd(sums, means, 50, vectors, norm.weight, EPS, batch, coef, dweight)
    judge()
    kernels.add(partial, 50, kernels.Summed(other))
    assert torch.equal(other, sums)


def test_of_one_value_nothing_is_divided_by_zero():
    vectors = blank(5, 5)
    partial = torch.stack((torch.arange(5.0, device=DEVICE), torch.zeros(5, device=DEVICE)))[None]
    kernels.join(partial, 1, 1, 64, None, vectors, None, None, EPS)
    assert torch.isfinite(vectors).all() and (vectors[3:] == 0).all()
