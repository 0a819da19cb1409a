"""What the tests of all ops share."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from torch import Tensor


class _TorchRandom:
    """Lets hypothesis seed torch before every example, so that a failing one fails again when it is replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which cuDNN, and with it ``downsample``, computes fp32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _lay_out(layout: str, tensor: Tensor) -> Tensor:
    if layout == "permuted":  # channels_last for images, column-major for matrices
        order = (0, *range(2, tensor.dim()), 1) if tensor.dim() > 2 else tuple(reversed(range(tensor.dim())))
        inverse = [order.index(i) for i in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(inverse)
    if layout == "sliced":  # NaN around it, so that a read outside shows
        larger = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
        inside = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
        return inside.copy_(tensor)
    if layout == "expanded":  # stride 0 along the first dimension
        return tensor[:1].expand_as(tensor)
    return tensor


@pytest.fixture
def lay_out():
    """``lay_out(layout, tensor)``: the same values in other strides (``expanded`` repeats the first entry)."""
    return _lay_out


def _assert_as_good_as(result: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice the error of ``peer``, PyTorch's own result in this dtype, plus a floor of about two ulp.

    Adding and taking away 0.3 in the dtype rounds twice as any other order of operations would.
    """
    rounded = truth.to(result.dtype)
    floor = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().double()
    allowed = 2 * (peer.double() - truth).abs().max() + floor
    error = (result.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture
def assert_as_good_as():
    return _assert_as_good_as
