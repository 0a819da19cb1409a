"""The rule that judges the kernels can fail, and does not fail on what is right."""

from __future__ import annotations

import pytest
import torch

from fusekern.testing import assert_parity, check_parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_rounded_truth_passes_whatever_the_peer(dtype, size):
    truth = torch.randn(size, dtype=torch.float64)
    assert check_parity(truth.to(dtype), [truth.to(dtype)], truth) == []
    assert check_parity(truth.to(dtype), [torch.zeros(size, dtype=dtype)], truth) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_off_by_some_roundings_fails(dtype):
    truth = torch.randn(1000, dtype=torch.float64)
    result = truth.to(dtype)
    result[500] = 2 + 16 * torch.finfo(dtype).eps
    truth[500] = 2
    assert any("max error" in line for line in check_parity(result, [truth.to(dtype)], truth))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.25), (torch.float16, 1.25), (torch.float32, 4)])
def test_an_error_spread_over_all_elements_fails(dtype, factor):
    truth = torch.randn(10000, dtype=torch.float64)
    noise = torch.randn(10000, dtype=torch.float64) * 8 * torch.finfo(dtype).eps
    peer = (truth + noise).to(dtype)
    assert_parity(peer, [peer], truth)
    worse = (truth + factor * noise).to(dtype)
    with pytest.raises(AssertionError, match="relative L2"):
        assert_parity(worse, [peer], truth)
    assert len(check_parity((truth + 10 * noise).to(dtype), [peer], truth, gradient=True)) == 2


def test_gradients_have_more_room_than_outputs():
    truth = torch.zeros(2, dtype=torch.float64)
    peer, result = torch.tensor([1.0, 0.0]), torch.tensor([2.5, 0.0])
    assert check_parity(result, [peer], truth)
    assert not check_parity(result, [peer], truth, gradient=True)


def test_what_is_not_finite_must_not_be_finite_in_the_peer():
    truth = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    assert check_parity(truth.float(), [truth.float()], truth) == []
    spoiled = torch.tensor([float("nan"), float("nan"), 2.0])
    assert check_parity(spoiled, [truth.float()], truth) == ["1 of 3 values are not finite, where the peers' are"]
    missed = torch.tensor([1.0, 5.0, 2.0])
    assert check_parity(missed, [truth.float()], truth) == ["1 of 3 values are finite, where the truth's are not"]


def test_it_refuses_what_it_cannot_judge():
    truth = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one peer"):
        check_parity(truth.float(), [], truth)
    with pytest.raises(ValueError, match="truth must be float64, got torch.float32"):
        check_parity(truth.float(), [truth.float()], truth.float())
    with pytest.raises(ValueError, match=r"peer has shape \[2\], truth \[3\]"):
        check_parity(truth.float(), [torch.zeros(2)], truth)
