"""Times, and the engines that are timed beside fusekern."""

from __future__ import annotations

import time

import pytest
import torch
from bench_runs import ALL_CASES

from bench import former2conv, peers
from bench.case import Shape, lay_out, make
from bench.timing import Burst, interleaved, rotation


def test_timing_tells_slow_from_fast():
    slow, fast = Burst(lambda: time.sleep(0.004)), Burst(lambda: (time.sleep(0.001), time.sleep(0.001)), calls=2)
    found = interleaved({"slow": slow, "fast": fast}, "cpu", 0.05)
    assert 0.001 <= found["fast"]["best_s"] < 0.004 <= found["slow"]["best_s"]
    assert rotation("cpu", 10) == 1


BY_BATCH = ("inverted_bottleneck", "inverted_bottleneck without zeros", "layer")  # norms have the batch's statistics
INFERRED = [case for case in ALL_CASES if case.name not in BY_BATCH]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", INFERRED, ids=lambda case: case.name)
def test_engines_compute_the_same(engine, case):
    pytest.importorskip("onnx")
    pytest.importorskip(engine)
    for size, layout in ((9, "channels_last"), (10, "channels_last"), (10, "NCHW"))[: 1 if case.op == "layer" else 3]:
        shape = Shape(2, 128, size, 5)
        tensors = {name: lay_out(tensor, layout) for name, tensor in make(case, shape, torch.float32, "cpu").items()}
        call = peers.build(engine, case, shape, tensors, layout == "channels_last", "reference").call
        expected = case.reference(shape, *tensors.values())
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)


def test_an_engine_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    tensors = make(former2conv.CASES[0], Shape(1, 64, 3, 2), torch.float32, "cpu")
    with pytest.raises(peers.Unavailable, match="onnx is not installed"):
        peers.build("openvino", former2conv.CASES[0], Shape(1, 64, 3, 2), tensors, True, "reference")
