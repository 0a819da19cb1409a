"""What is kept for a backward, and peaks."""

from __future__ import annotations

import pytest
import torch

from bench import memory
from bench.case import Shape
from fusekern.backends import BACKENDS


def test_what_is_kept_is_measured():
    x, weight = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    assert memory.kept_bytes(lambda: (x * weight).exp().sum()) == 3 * 400
    assert memory.kept_bytes(lambda: (x * weight).exp().sum(), [weight]) == 2 * 400
    assert memory.kept_bytes(lambda: (x * x[:50].repeat(2)).sum()) == 2 * 400
    found, eager = memory.of_the_op(2, "low")
    assert 3 * 4 * 256 * 32**2 < found < 0.3 * eager


def test_a_peak_is_measured():
    """Of what is there at one time, above what was there before."""
    x = torch.randn(1000)

    def call():
        y = x * 2
        del y
        return (x + 1) + (x + 2) + (x + 3)

    assert memory.peak_bytes(call) == pytest.approx(3 * 4000, abs=200)  # and the numbers that are added


@pytest.mark.skipif(bool(BACKENDS["cuda"].missing), reason=f"no CUDA extension: {BACKENDS['cuda'].missing}")
@pytest.mark.parametrize("which, images, most", [("default", 14, 0.45), ("low", 8, 0.33)])
def test_the_peak_planned_for_a_gpu(which, images, most):
    """The launchers for a GPU take memory as they would there, in the shape of the goal but for its width."""
    layers = memory.Layers(Shape(16, 128, 32, 38), 6, which, torch.bfloat16)
    ours, eager = layers.peak(planned=True)
    assert ours <= most * eager, f"{ours / eager:.3f} of {eager / 1e6:.0f} MB"
    assert ours > 6 * images * layers.image.nbytes  # what each block keeps, in images
    assert BACKENDS["triton"].device == "cuda"
