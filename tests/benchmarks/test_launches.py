"""The plans of launches, and what the device did."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu_check, page
from bench.case import LAYOUTS, Shape
from fusekern import extensions


def launches():
    """Its plans need Triton."""
    return pytest.importorskip("bench.launches", exc_type=ImportError)


def test_launches_without_a_gpu_are_called_planned(tmp_path, capsys):
    assert launches().main(["--device", "none", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    entries, places = launches().ENTRIES, launches().PLACES
    assert len(found["rows"]) == len(entries) * len(places) and found["blocks"] == []
    for row in found["rows"]:
        assert row["state"] == "planned" and row["wrong"] == [] and "found" not in row
        assert {"fwd", "bwd"} <= set(row["planned"]) <= set(launches().BUDGET) and all(row["planned"].values())
        names = sum(row["planned"].values(), [])
        known = ("aten::", *launches().TORCH)
        assert all(name.endswith("_kernel") or name.startswith(known) for name in names)
    committed = json.loads((page.RESULTS / "launches.json").read_text())
    assert [row["planned"] for row in committed["rows"]] == [row["planned"] for row in found["rows"]]
    (down,) = (row for row in found["rows"] if row["op"] == "downsample" and row["layout"] == "NCHW")
    assert down["planned"]["fwd"][0] == "copy"  # of the weight
    text = capsys.readouterr().out
    assert text.count("| planned |") == sum(len(row["planned"]) for row in found["rows"])
    assert "0 red, all of them planned" in text


@pytest.mark.skipif(bool(extensions.load("_C")), reason=f"no C++ kernels: {extensions.load('_C')}")
def test_a_block_keeps_its_budget():
    """By the plan, with what PyTorch does between the ops."""
    committed = json.loads((page.RESULTS / "launches.json").read_text())
    between = launches().between()
    assert committed["between"] == {which: list(names) for which, names in between.items()}
    planned = launches().of_a_block(committed["rows"], between)
    assert committed["planned"] == planned
    assert planned.keys() == launches().BUDGET.keys()
    assert all(planned[which] <= most for which, most in launches().BUDGET.items()), planned
    # Of the ops alone it would be less: the averages of the norms, and the sum of two gradients.
    assert "aten::_foreach_lerp_" in between["fwd"] and "aten::add" in between["bwd"] and not between["infer"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_stage_of_launches_wants_a_device(tmp_path, capsys):
    (stage,) = (stage for stage in gpu_check.stages(tmp_path) if stage.name == "launches")
    assert stage.commands[0][:3] == ("python", "-m", "bench.launches")
    with pytest.raises(SystemExit, match="2"):
        launches().main(stage.commands[0][3:])
    assert capsys.readouterr().err == "no CUDA device\n"


# As the profiler names them.
COPY = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda"
    "(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}> >(at::TensorIteratorBase&, int)"
)
SUM = (
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::func_wrapper_t<"
    "c10::BFloat16, at::native::sum_functor<c10::BFloat16, float, c10::BFloat16>::operator()(at::TensorIterator&)"
    "::{lambda(float, float)#1}>, unsigned int, c10::BFloat16, 4, 4> >(int)"
)
OURS = "void (anonymous namespace)::forward_kernel<__nv_bfloat16, (anonymous namespace)::Tile<3, 1> >(float const*)"


def test_what_a_plan_calls_what_the_device_did():
    names = {
        COPY: "copy",
        "Memcpy DtoD (Device -> Device)": "copy",
        "Memcpy HtoD (Pageable -> Device)": "memcpy",
        "Memset (Device)": "memset",
        SUM: "sum",
        SUM.replace("sum_functor", "MeanOps"): "reduce_kernel",
        OURS: "forward_kernel",
        "inverted_bottleneck_reduce_kernel": "inverted_bottleneck_reduce_kernel",
        "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT": "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT",
    }
    assert {activity: launches().name_of(activity) for activity in names} == names


def test_a_wrong_plan_is_told_from_a_right_one():
    differences, plan = launches().differences, ("sum", "copy", "downsample_bwd_image_kernel")
    found = [SUM, COPY, "downsample_bwd_image_kernel"]
    assert differences("bwd", plan, found) == differences("bwd", plan, ["Memset (Device)", *found]) == []
    for wrong in (
        found[:2],
        [*found, found[-1]],
        [found[1], found[0], found[2]],
        [*found[:2], "Memset (Device)", found[2]],
        [*found[:2], "downsample_bwd_weight_kernel"],
        [],
    ):
        (words,) = differences("bwd", plan, wrong)
        assert words.startswith("bwd: planned sum, copy, downsample_bwd_image_kernel; found ")
    assert differences("fwd", (), []) == [] and "planned nothing" in differences("fwd", (), found)[0]


@pytest.mark.parametrize("extra", [0, 1])
def test_what_the_device_did_is_held_against_the_plan(extra, monkeypatch):
    """On a CPU nothing is recorded: what stands in for it is the plan, with a copy too much or without."""
    monkeypatch.setattr(launches(), "DTYPE", torch.float32)
    recorded = []

    def activities(call):
        call()
        return recorded.pop(0)

    monkeypatch.setattr(launches(), "activities", activities)
    for entry in launches().ENTRIES:
        recorded[:] = [], [], []
        nothing = launches().row_of(entry, Shape(1, 64, 6, 5), "channels_last", "cpu")
        plan = nothing["planned"]
        fwd, bwd, infer = (list(plan.get(which, plan["fwd"])) for which in ("fwd", "bwd", "infer"))
        assert len(nothing["wrong"]) == len(plan) and nothing["state"] == "measured"
        recorded[:] = fwd, [*bwd, *[COPY] * extra], infer
        row = launches().row_of(entry, Shape(1, 64, 6, 5), "channels_last", "cpu")
        assert row["found"]["bwd"] == [*bwd, *["copy"] * extra]
        assert row["wrong"] == launches().differences("bwd", bwd, row["found"]["bwd"])
        assert len(row["wrong"]) == extra


def test_the_block_whose_launches_are_counted(monkeypatch):
    """All contenders compute the same, in training and in inference."""
    monkeypatch.setattr(launches(), "DTYPE", torch.float32)
    shape, results = Shape(2, 64, 6, 5), {}
    for contender in ("auto", "reference", "eager"):
        run, inputs = launches().block_and_inputs(shape, contender, "cpu")
        with torch.no_grad():
            results[contender] = [run(False, *inputs)[:2], run(True, *inputs)[:2]]
    for contender in ("auto", "eager"):
        torch.testing.assert_close(results[contender], results["reference"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results["auto"][0][0], results["auto"][1][0])  # other statistics

    def activities(call):
        call()
        return [COPY, SUM]

    monkeypatch.setattr(launches(), "activities", activities)
    row = launches().block_of(shape, "auto", "cpu")
    assert row["launches"] == {"fwd": 2, "bwd": 2, "infer": 2} and row["found"]["fwd"] == ["copy", "sum"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launches_on_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(launches(), "PLACES", [(Shape(1, 256, 16, 19), layout) for layout in LAYOUTS])
    assert launches().main(["--device", "cuda", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(row["state"] == "measured" and all(row["found"].values()) for row in found["rows"])
    assert len(found["blocks"]) == 4 and all(min(row["launches"].values()) > 0 for row in found["blocks"])
