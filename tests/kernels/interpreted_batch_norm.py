"""The launchers of batch_norm's vectors, judged by PyTorch's batch norm in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import batch_norm as kernels
from torch import Tensor
from where import DEVICE

EPS = 1e-3


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 40, 300])
@pytest.mark.parametrize("seen", ["stats", "running", "moments"])
@pytest.mark.parametrize("learned", [True, False])
def test_forward_and_backward(channels, seen, learned):
    torch.manual_seed(channels)
    pixels, batch = 50, seen != "running"
    x = torch.randn(pixels, channels, dtype=torch.float64, device=DEVICE, requires_grad=True)
    mean, var = torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE) + 0.5
    weight = torch.randn(channels, device=DEVICE) if learned else None
    bias = torch.randn(channels, device=DEVICE) if learned else None
    parameters = [None if p is None else p.double().requires_grad_() for p in (weight, bias)]
    truth = F.batch_norm(x, mean.double(), var.double(), *parameters, training=batch, eps=EPS)

    rows = x.detach()
    stats = torch.stack((rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0))).float()
    moments = torch.full((3, channels), float("nan"), device=DEVICE)
    affine = torch.full((2, channels), float("nan"), device=DEVICE)
    if seen == "moments":
        moments = torch.stack((stats[0], stats[1] / pixels, stats[1] / (pixels - 1)))
    given = stats if seen == "stats" else None, pixels, *((mean, var) if seen == "running" else (None, None))
    kernels.batch_norm_fwd(*given, weight, bias, EPS, moments, affine)
    close(moments[0], rows.mean(0) if batch else mean.double())
    close(moments[1], rows.var(0, unbiased=False) if batch else var.double())
    close(moments[2], rows.var(0) if batch else var.double())
    close(affine[0].double() * rows + affine[1].double(), truth.detach())

    grad = torch.randn_like(truth)
    dx, *learnt = torch.autograd.grad(truth, [x, *(p for p in parameters if p is not None)], grad)
    sums = torch.stack((grad.sum(0), (grad * (rows - moments[0].double())).sum(0))).float()
    means = sums / pixels if seen == "moments" else None
    coef = torch.full((4, channels), float("nan"), device=DEVICE)
    dweight = torch.full((channels,), float("nan"), device=DEVICE)
    kernels.batch_norm_bwd(moments, sums, means, pixels, weight, EPS, batch, coef, dweight)
    p, q, r, middle = coef.double()
    close(p * grad + q * (rows - middle) + r, dx)
    if learned:
        torch.testing.assert_close(dweight.double(), learnt[0], rtol=1e-5, atol=1e-5)


def test_of_one_value_nothing_is_divided_by_zero():
    moments, affine = torch.empty(3, 5, device=DEVICE), torch.empty(2, 5, device=DEVICE)
    stats = torch.stack((torch.arange(5.0, device=DEVICE), torch.zeros(5, device=DEVICE)))
    kernels.batch_norm_fwd(stats, 1, None, None, None, None, EPS, moments, affine)
    assert torch.isfinite(moments).all() and (moments[1:] == 0).all()
