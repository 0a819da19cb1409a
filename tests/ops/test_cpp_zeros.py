"""The C++ stages of inverted_bottleneck that pass over zeros: of what ReLU6 has cut off, and of gradients there."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import run_again
from test_cpp_inverted_bottleneck import SHAPES, Plain, check, every_layout, make, run
from torch import Tensor

from fusekern.extensions import load

if load("_C"):
    pytest.skip(f"the C++ module is not there: {load('_C')}", allow_module_level=True)

import fusekern._C as extension

# Where the affine of a norm before ReLU6 stands among a stage's arguments.
AFFINES = {"project_fwd": (1,), "project_bwd": (4,), "infer": (2, 4)}
# Beside and on panels of 64 terms, 96 or 128 columns, 32 wanted columns and 256 terms; more than one block and chunk.
LARGER = [
    (1, 9, 130, 150, 12, 11, 3, 1),
    (1, 24, 70, 260, 7, 9, 3, 1),
    (2, 16, 700, 128, 13, 10, 3, 1),
    (1, 8, 96, 33, 25, 23, 3, 1),
]
CPU_HAS_FMA = extension.cpu_capability() != "baseline"


def with_zeros(shape, layout, shift: float, dtype=torch.float32) -> dict[str, tuple]:
    """Stages whose ReLU6 sees about ``shift`` instead of 3, with a deviation of 2."""
    stages = make(shape, dtype, layout)
    found = {}
    for name, where in AFFINES.items():
        arguments = [a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a for a in stages[name]]
        for i in where:
            arguments[i][1] += shift - 3
        found[name] = tuple(arguments)
    return found


@every_layout
@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["half zeros", "few left"])
@pytest.mark.parametrize("shape", SHAPES + LARGER, ids=str)
def test_parity(shape, shift, layout):
    for name, arguments in with_zeros(shape, layout, shift).items():
        check(name, arguments, run(name, arguments, layout), torch.float32)


def test_nothing_but_zeros():
    for name, arguments in with_zeros((2, 8, 40, 24, 6, 7, 3, 1), "channels_last", -100.0).items():
        truth = getattr(Plain(torch.float64), name)(*arguments)
        for result, exact in zip(run(name, arguments, "channels_last")[:2], truth, strict=False):
            torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def beside(y: Tensor, filler: float) -> Tensor:
    """Rows of pixels, and seven times as many that are ``filler``."""
    whole = torch.full((1, y.shape[1], 8 * y.shape[2], y.shape[3]), filler)
    whole[:, :, : y.shape[2]] = y
    return whole.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spoilt", [None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(("hidden", "outside"), [(64, 70), (300, 150), (97, 130), (1090, 97)])
def test_no_bit_of_a_product_shows_it(hidden, outside, spoilt):
    """Beside pixels without zeros all terms are multiplied, and alone only some of them, unless a weight is not finite:
    zero times that is no zero."""
    torch.manual_seed(0)
    y2 = torch.randn(1, hidden, 3, 5).contiguous(memory_format=torch.channels_last)
    w3 = torch.randn(outside, hidden)
    if spoilt is not None:
        w3[3, 7] = spoilt
    affine = torch.stack([torch.ones(hidden), torch.zeros(hidden)])
    alone, _ = run("project_fwd", (y2, affine, w3), "channels_last")
    among, _ = run("project_fwd", (beside(y2, 3.0), affine, w3), "channels_last")
    torch.testing.assert_close(alone, among[:, :, :3], rtol=0, atol=0, equal_nan=True)
    assert bool(alone[:, 3].isfinite().all()) == (spoilt is None)
    assert bool(alone[:, 4:].isfinite().all())


def test_no_bit_of_the_weight_s_gradient_shows_it():
    """There zeros are of channels; each block has some with and some without them."""
    torch.manual_seed(0)
    hidden, outside, size = 24, 80, (9, 11)
    y2, g = torch.randn(1, hidden, *size), torch.randn(1, outside, *size)
    w3 = torch.randn(outside, hidden)
    through = torch.stack([torch.ones(outside), *torch.zeros(3, outside)])
    many, weights = torch.full((1, 8 * hidden, *size), 3.0), torch.randn(outside, 8 * hidden)
    many[:, ::8], weights[:, ::8] = y2, w3
    found = []
    for y, w in ((y2, w3), (many, weights)):
        images = [t.contiguous(memory_format=torch.channels_last) for t in (g, g, y)]
        count = y.shape[1]
        affine = torch.stack([torch.ones(count), torch.zeros(count)])
        arguments = (*images[:2], through, images[2], affine, torch.zeros(count), w)
        found.append(run("project_bwd", arguments, "channels_last"))
    assert torch.equal(found[0][1], found[1][1][:, ::8])


@pytest.mark.skipif(not CPU_HAS_FMA, reason="without FMA all products are PyTorch's")
def test_gradients_that_are_cut_off_are_not_computed():
    """Those that are left are summed up in another order than beside pixels whose gradients all are wanted."""
    torch.manual_seed(0)
    hidden, outside = 64, 96
    y2, g = torch.randn(1, hidden, 3, 5) - 1.2, torch.randn(1, outside, 3, 5)
    w3 = torch.randn(outside, hidden)
    through = torch.stack([torch.ones(outside), *torch.zeros(3, outside)])
    affine = torch.stack([torch.ones(hidden), torch.zeros(hidden)])
    found = []
    for y, dy in ((y2, g), (beside(y2, 3.0), beside(g, 1.0))):
        y, dy = (t.contiguous(memory_format=torch.channels_last) for t in (y, dy))
        found.append(run("project_bwd", (dy, dy, through, y, affine, torch.zeros(hidden), w3), "channels_last")[0])
    alone, among = found[0], found[1][:, :, :3]
    assert torch.equal(alone == 0, y2 <= 0) and torch.equal(among == 0, y2 <= 0)
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-5)
    assert not torch.equal(alone, among)


@pytest.mark.parametrize("isa", extension.build_info()["isas"])
def test_other_instruction_sets(isa):
    run_again(__file__, isa)
