"""The work, the traffic and the floors that are told beside times."""

from __future__ import annotations

import pytest
import torch
from bench_runs import ALL_CASES, run
from torch.utils.flop_counter import FlopCounterMode

from bench import common, downsample, former2conv
from bench.case import Shape, make
from bench.timing import Ceilings


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_flops_are_those_of_the_products_that_the_reference_makes(case):
    shape = Shape(2, 128, 9, 5)
    leaves = [tensor.double().requires_grad_() for tensor in make(case, shape, torch.float32, "cpu").values()]
    with FlopCounterMode(display=False) as forward:
        out = case.reference(shape, *leaves)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    if case.op in (
        "inverted_bottleneck",
        "layer",
    ):  # torch counts the depthwise weight's gradient as if there were no groups
        assert case.flops(shape) == (forward.get_total_flops(), 2 * forward.get_total_flops())
    else:
        assert case.flops(shape) == (forward.get_total_flops(), backward.get_total_flops())


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_least_traffic_is_every_input_and_output_once(case):
    shape = Shape(2, 128, 9, 5)
    tensors = make(case, shape, torch.float32, "cpu")
    inputs = sum(tensor.numel() for tensor in tensors.values())
    out = case.reference(shape, *tensors.values()).numel()
    bias = tensors["bias"].numel() if "bias" in tensors else 0  # no gradient depends on it
    assert case.elements(shape) == (inputs + out, out + inputs - bias + inputs)


def test_costs_by_hand():
    assert former2conv.CASES[0].flops(Shape(1, 64, 2, 3)) == (4 * 4 * 3 * 64, 8 * 4 * 3 * 64)
    # 5x5 has one 3x3 patch: 36 covered values of 100, 144 weights, 4 biases, 4 results.
    assert downsample.CASES[0].flops(Shape(1, 4, 5)) == (2 * 144, 4 * 144)
    assert downsample.CASES[0].elements(Shape(1, 4, 5)) == (36 + 144 + 4 + 4, 4 + 36 + 144 + 100 + 144 + 4)


def test_floors_come_from_the_rates_measured():
    ceilings = Ceilings("cpu", {1000: 100.0, 4000: 10.0}, {"float32": 50.0})
    assert [ceilings.copy_rate(moved) for moved in (10, 1000, 3999, 4000, 9000)] == [100, 100, 100, 10, 10]
    assert ceilings.floor(500, 900, "float32") == (10.0, "compute")
    assert ceilings.floor(500, 5000, "float32") == (500.0, "memory")
    ceilings.include(Ceilings("cpu", {4000: 7.0, 9: 8.0}, {"float32": 90.0}).as_json())
    assert ceilings.copy == {1000: 100.0, 4000: 10.0, 9: 8.0} and ceilings.gemm == {"float32": 90.0}
    ceilings.measure([torch.float32], 0.02, quick=True)
    assert ceilings.gemm["float32"] > 1e8 and ceilings.copy[2**20] > 1e8
    assert ceilings.copy[1000] == 100.0


def test_shares_are_of_the_best_that_was_seen(tmp_path, monkeypatch):
    class Waking(Ceilings):
        """Twice as fast each time one looks."""

        def measure(self, *_):
            self.gemm = {"float32": 2 * self.gemm.get("float32", 1e9)}
            self.copy = {1: 2 * self.copy.get(1, 1e9)}

    monkeypatch.setattr(common, "Ceilings", Waking)
    _, found = run("former2conv", tmp_path / "found.json", "--shapes", "1,64,4,2", "1,64,6,2")
    assert found["ceilings"]["gemm_flop_per_s"]["float32"] == 4 * found["ceilings_before"]["gemm_flop_per_s"]["float32"]
    for row in found["rows"]:
        work = row["roofline"]["forward"]
        assert work["floor_s"] == pytest.approx(max(work["flops"], work["bytes"]) / 8e9, rel=1e-3)


def test_graphs_are_compared_to_graphs():
    times = {"fusekern": 2.0, "fusekern, graphed": 1.0, "eager": 6.0, "eager, graphed": 4.0}
    times["compile-reduce-overhead"] = 3.0
    found = {name: {"median_s": seconds, "best_s": seconds} for name, seconds in times.items()}
    row = {"shape": "1,64,2,3", "dtype": "float32", "forward": found, "forward_backward": found}
    ceilings = Ceilings("cuda", {1: 1e9}, {"float32": 1e9})
    common.compare(former2conv.CASES[0], row, ceilings)
    assert row["ratio"]["forward"] == {"eager": 3.0, "eager, graphed": 4.0, "compile-reduce-overhead": 3.0}
    flops, moved = row["roofline"]["forward_backward"]["flops"], row["roofline"]["forward_backward"]["bytes"]
    assert (flops, moved) == (12 * 4 * 3 * 64, 4 * (2 * 256 + 2 * 192 + 3 * 256 + 4 * 192))
