"""The benchmarks measure what they say, and say nothing about a kernel that is wrong."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    common,
    conv2former,
    downsample,
    former,
    former2conv,
    gpu_check,
    inverted_bottleneck,
    layer,
    memory,
    numerics,
    page,
    peers,
    report,
    score_map,
    text_path,
)
from bench.case import LAYOUTS, Shape, draws, judge, lay_out, make
from bench.timing import Burst, Ceilings, interleaved, rotation
from fusekern import extensions
from fusekern.backends import BACKENDS

MODULES = {
    module.CASES[0].op: module
    for module in (former2conv, conv2former, score_map, downsample, inverted_bottleneck, former, text_path, layer)
}
ALL_CASES = [case for module in MODULES.values() for case in module.CASES]
TINY = ["--quick", "--backend", "reference", "--seconds-a-pass", "0.01", "--shapes", "1,128,9,5"]
FAST = ["--peers", "reference", "eager"]


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(common, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(layer, "BLOCKS", 1)
    forget_layers()
    known = Ceilings("cpu", {1: 1e10}, {"float32": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr(known, "measure", lambda *_: None)
    monkeypatch.setattr(common, "Ceilings", lambda device: known)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    benchmark, tf32 = cudnn.benchmark, cudnn.allow_tf32
    yield
    forget_layers()
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32


def forget_layers() -> None:
    layer.parameters_of.cache_clear()
    for case in layer.CASES:
        case.layers.clear()


def run(op: str, out, *options: str) -> tuple[int, dict]:
    code = common.main(MODULES[op].CASES, [*TINY, *FAST, "--out", str(out), *options])
    return code, json.loads(out.read_text())


def test_sixteen_bits_are_timed_beside_fusekern_in_fp32(tmp_path):
    options = ["--dtypes", "float32", "bfloat16", "--layouts", "channels_last", "--peers", "eager", peers.WIDE]
    code, found = run("layer", tmp_path / "found.json", *options)
    assert code == 0
    for row in found["rows"]:
        wide = row["dtype"] == "bfloat16"
        assert row["not"] == ({} if wide else {peers.WIDE: "this row is of fp32"})
        for which in common.PASSES:
            times, ratio = row[which], row["ratio"][which]
            assert set(ratio) == ({"eager", peers.WIDE} if wide else {"eager"})
            assert peers.WIDE not in row["roofline"][which]["share"]
            if wide:
                slower = times[peers.WIDE]["best_s"] / times[peers.FUSED]["best_s"]
                assert ratio[peers.WIDE] == pytest.approx(slower, rel=1e-2)
        if wide:
            saved = {name: row["memory"][name]["saved_bytes"] for name in (peers.FUSED, peers.WIDE)}
            assert saved[peers.WIDE] > 1.5 * saved[peers.FUSED]  # it was given fp32


@pytest.mark.parametrize("op", MODULES)
def test_a_run_writes_what_it_promises(op, tmp_path, capsys):
    code, found = run(op, tmp_path / "found.json")
    assert code == 0 and found["complete"] is True
    assert found["device"] and found["commit"] and found["date"] and found["versions"]["torch"]
    assert found["command"].startswith(f"python -m bench.{op} --quick")
    assert set(found["ceilings"]) == {"copy_bytes_per_s", "gemm_flop_per_s"}
    assert len(found["rows"]) == len(MODULES[op].CASES) * len(LAYOUTS)
    table = capsys.readouterr().out
    for row in found["rows"]:
        assert row["heads"] == 2 and row["dtype"] == "float32" and row["layout"] in LAYOUTS
        assert row["auto"] in ("reference", "cpp", "auto") and row["wrong"] == [] and row["not"] == {}
        for which in ("forward", "forward_backward"):
            assert set(row[which]) == {"fusekern", "reference", "eager"}
            for name, times in row[which].items():
                assert 0 < times["best_s"] <= times["median_s"] and times["rounds"] >= 5
                floor, share = row["roofline"][which]["floor_s"], row["roofline"][which]["share"][name]
                assert share == pytest.approx(floor / times["best_s"], rel=1e-2)
            ratio = row[which]["eager"]["best_s"] / row[which]["fusekern"]["best_s"]
            assert row["ratio"][which] == {
                "reference": pytest.approx(row["ratio"][which]["reference"]),
                **{"eager": pytest.approx(ratio, rel=1e-2)},
            }
        memory = row["memory"]["reference"]
        assert (
            memory["saved_bytes"]
            > memory["saved_beyond_inputs_bytes"]
            > -(op == "downsample" or "plain" in row["case"])
        )
        assert f"| {row['case']} | {row['shape']} | 2 | float32 | {row['layout']} | forward+backward |" in table


WRONG = {
    "values": lambda true: lambda *a, **k: true(*a, **k) * 1.001,
    "gradients": lambda true: lambda *a, **k: _scaled_gradient(true(*a, **k)),
    "a crash": lambda true: lambda *a, **k: 1 / 0,
}


def _scaled_gradient(out):
    return out.detach() + 1.01 * (out - out.detach())


@pytest.mark.parametrize("fault", WRONG)
def test_no_speed_of_a_kernel_that_is_wrong(fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(former2conv, "former2conv", WRONG[fault](former2conv.former2conv))
    code, found = run("former2conv", tmp_path / "found.json")
    assert code == 1
    for row in found["rows"]:
        assert row["wrong"] and not {"forward", "forward_backward", "ratio", "roofline"} & set(row)
    if fault == "gradients":
        assert {fault.split(":")[0] for row in found["rows"] for fault in row["wrong"]} <= {"dimage", "dkey", "dvalue"}
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| former2conv |")]
    assert len(rows) == 2 and all("RED, no speed" in line for line in rows)


class Drawn:
    """A truth in bf16 with two peers, whose relative errors are given; of the parameters one is zero but for noise."""

    def __init__(self, errors, zero=1e-17):
        self.case, self.shape = SimpleNamespace(parts=lambda shape, out: {"out": out}, judged_with=self.group), None
        self.sizes = {"out": (64, 64), "dweight": (64, 64), "dbias": (64,)}
        draws = {name: torch.randn(size, dtype=torch.float64) for name, size in self.sizes.items()}
        self.exact = [draws["out"], draws["dweight"], zero * draws["dbias"]]
        self.peers = [self.with_errors(dict.fromkeys(self.sizes, error)) for error in errors]

    @staticmethod
    def group(name):
        return name if name == "out" else "parameters"

    def named(self, found):
        return dict(zip(self.sizes, found, strict=True))

    def with_errors(self, errors):
        found = []
        for name, exact in self.named(self.exact).items():
            noise = errors[name] * torch.randn_like(exact)
            found.append((noise if name == "dbias" else exact * (1 + noise)).bfloat16())
        return found


def test_draws_are_judged_together():
    torch.manual_seed(0)
    truths = [Drawn((0.1, 0.1)) for _ in range(4)]
    found = [
        truth.with_errors({"out": error, "dweight": 0.09, "dbias": 0.09})
        for truth, error in zip(truths, (0.13, 0.07, 0.08, 0.08), strict=True)
    ]
    assert judge(truths, found) == []
    assert len(judge(truths[:1], found[:1])) == 1  # 1.1 times as much is allowed
    found = [truth.with_errors(dict.fromkeys(truth.sizes, 0.13)) for truth in truths]
    assert [fault.split(":")[0] for fault in judge(truths, found)] == ["out", "parameters"]


def test_further_draws_keep_what_is_judged_of_them_and_find_errors_in_it():
    case, shape = layer.CASES[0], Shape(1, 64, 5, 3)
    first, *others = truths = draws(case, shape, torch.bfloat16, "cpu")
    assert len(others) == 3 and first.kept == list(first.tensors)
    assert all(truth.kept == ["image", "text"] for truth in others)
    assert all(len(run) == 3 for truth in others for run in (truth.exact, *truth.peers))
    found = [truth.peers[0] for truth in truths]
    assert judge(truths, found) == []
    out, dimage, dtext = found[-1]
    assert {fault.split(":")[0] for fault in judge(truths, [*found[:-1], (out, dimage, 3 * dtext)])} == {"dtext"}


def test_a_gradient_of_nothing_but_noise_hides_no_error():
    """As that of a bias which a softmax takes away: multiplied until it were 1 it would be all that is judged."""
    torch.manual_seed(0)
    truth = Drawn((0.1, 0.1))
    errors = dict.fromkeys(truth.sizes, 0.1)
    assert judge([truth], [truth.with_errors(errors)]) == []
    assert judge([truth], [truth.with_errors({**errors, "dweight": 0.15})])[0].startswith("parameters: relative L2")
    assert judge([truth], [truth.with_errors({**errors, "dbias": 10})])[0].startswith("parameters: ")


def test_scores_are_not_judged_by_the_scale_of_the_image_beside_them(tmp_path, monkeypatch):
    """An error of 2^-5 of a score is near bf16's steps at the image's largest values, and far above a score's."""

    def wrong(image, text, **options):
        out = score_map.score_map_reference(image, text, concat=True)
        return torch.cat([out[:, :128], out[:, 128:] * (1 + 2**-5)], 1)

    monkeypatch.setattr(score_map, "score_map", wrong)
    code, found = run("score_map", tmp_path / "found.json", "--dtypes", "bfloat16")
    assert code == 1 and any(fault.startswith("score:") for row in found["rows"] for fault in row["wrong"])


def test_a_wrong_peer_has_no_speed_and_excuses_nobody(tmp_path, monkeypatch):
    true = former2conv.former2conv
    monkeypatch.setattr(former2conv, "former2conv", lambda *a, **k: true(*a, **k) * 1.001)
    monkeypatch.setattr(
        former2conv.Former2Conv,
        "eager",
        lambda self, shape, image, key, value: 1.1 * image + 0 * key.sum() + value.sum(),
    )
    assert run("former2conv", tmp_path / "found.json")[0] == 1
    monkeypatch.setattr(former2conv, "former2conv", true)
    code, found = run("former2conv", tmp_path / "found.json")
    assert code == 0
    assert all("wrong result" in row["not"]["eager"] and "eager" not in row["forward"] for row in found["rows"])


def test_a_kernel_that_cannot_run_is_no_error_but_said(tmp_path):
    code, found = run("former2conv", tmp_path / "found.json", "--backend", "triton")
    assert code == 0
    for row in found["rows"]:
        assert "it runs on cuda" in row["not"]["fusekern"] and row["ratio"]["forward"] == {}
        assert set(row["forward"]) == {"reference", "eager"}


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    monkeypatch.setattr(report, "source", lambda: "these")
    code, found = run("former2conv", out, "--seconds", "0")
    assert code == common.STOPPED and found["rows"] == [] and found["complete"] is False
    assert run("former2conv", out, "--layouts", "NCHW")[0] == 0
    first = json.loads(out.read_text())["rows"]
    code, found = run("former2conv", out, "--resume")
    assert code == 0 and [row["layout"] for row in found["rows"]] == ["NCHW", "channels_last"]
    assert found["rows"][0]["forward"] == first[0]["forward"] and found["command"].count("python -m") == 2
    assert report.kept(out, "cpu") == found
    red = {**found["rows"][0], "wrong": ["out: off"]}
    out.write_text(json.dumps({**found, "rows": [red, found["rows"][1]]}))
    code, again = run("former2conv", out, "--resume", "--layouts", "channels_last")
    assert code == 1 and again["rows"][0] == red and again["rows"][1]["forward"] == found["rows"][1]["forward"]
    rows = run("former2conv", out, "--resume")[1]["rows"]
    assert [row["layout"] for row in rows] == ["channels_last", "NCHW"] and not any(row["wrong"] for row in rows)
    for changed in ({"source": "other"}, {"device": "other"}):
        out.write_text(json.dumps({**found, **changed}))
        assert report.kept(out, "cpu") is None


def test_a_fingerprint_of_sources_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("one")
    first = report.source()
    (tmp_path / "bench" / "results" / "found.json").write_text("{}")
    assert report.source() == first
    (tmp_path / "setup.py").write_text("two")
    second = report.source()
    (tmp_path / "bench" / "new.py").write_text("")
    assert len({first, second, report.source()}) == 3
    assert report.commit() == "unknown"
    monkeypatch.setenv("FUSEKERN_COMMIT", "abc")
    assert report.commit() == "abc"


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


@pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing)
def test_the_depthwise_stages_by_themselves(tmp_path):
    """Their kernel is judged, and timed beside the convolution alone and with norm and ReLU6."""
    out, peers_of = tmp_path / "found.json", ["eager", "eager-convolution"]
    options = ["--quick", "--seconds-a-pass", "0.01", "--shapes", "1,16,9,5", "--peers", *peers_of, "--out", str(out)]
    assert common.main([inverted_bottleneck.Depthwise()], options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(LAYOUTS)
    for row in rows:
        assert row["backend"] == "cpp" and not row["wrong"] and not row["not"]
        assert all(set(row["ratio"][which]) == set(peers_of) for which in common.PASSES)


def test_the_depthwise_stages_meet_pytorch_without_cudnn():
    case, shape = inverted_bottleneck.Depthwise(), Shape.parse("1,16,4,2")
    assert "native" in peers.names(case, "cuda", False) and "native" not in peers.names(case, "cpu", True)
    assert "native" not in peers.names(inverted_bottleneck.CASES[0], "cuda", False)
    tensors = make(case, shape, torch.float32, "cpu")
    contender = peers.build("native", case, shape, tensors, True, "cuda")
    with contender.context():
        assert not torch.backends.cudnn.enabled
        found = contender.call(*tensors.values())
    assert torch.backends.cudnn.enabled
    torch.testing.assert_close(found, case.reference(shape, *tensors.values()))


def test_an_engine_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    tensors = make(former2conv.CASES[0], Shape(1, 64, 3, 2), torch.float32, "cpu")
    with pytest.raises(peers.Unavailable, match="onnx is not installed"):
        peers.build("openvino", former2conv.CASES[0], Shape(1, 64, 3, 2), tensors, True, "reference")


def test_numerics_tell_errors_and_break_on_a_wrong_kernel(tmp_path, monkeypatch, capsys):
    options = ["--quick", "--backends", "reference", "--dtypes", "float32", "--out", str(tmp_path / "found.json")]
    assert numerics.main(options) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["op"] for row in found["rows"]} == set(MODULES) - {"layer"}
    assert {row["tensor"] for row in found["rows"] if row["op"] == "downsample"} == {
        "out",
        "dimage",
        "dweight",
        "dbias",
    }
    for row in found["rows"]:
        most = 1e-4 if row["op"] == "inverted_bottleneck" else 1e-5  # norms over the batch subtract what is alike
        assert 0 <= row["relative_l2"] <= row["peer_relative_l2"] < most
    monkeypatch.setattr(conv2former, "conv2former", WRONG["values"](conv2former.conv2former))
    assert numerics.main(options) == 1
    assert "| conv2former | float32 | reference | out | RED" in capsys.readouterr().out


def test_a_picture_of_each_kind(tmp_path):
    plots = pytest.importorskip("bench.plots", exc_type=ImportError)
    _, found = run("conv2former", tmp_path / "found.json")
    found["rows"].append({**found["rows"][0], "wrong": ["out: off"]})
    (tmp_path / "found.json").write_text(json.dumps(found))
    drawn = plots.draw(tmp_path / "found.json", tmp_path / "pictures")
    stems = ["conv2former-cpu-float32", "conv2former-chain-cpu-float32"]
    assert [path.stem for path in drawn] == [f"{stem}-{kind}" for stem in stems for kind in ("time", "roofline")]
    for path in drawn:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def stage(name: str, code: str, **options) -> gpu_check.Stage:
    return gpu_check.Stage(name, (("python", "-c", code),), **{"limit": 60, **options})


def test_stages_run_once_and_a_red_one_stops_nobody(tmp_path):
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    chosen = [
        stage("red", "raise SystemExit(1)"),
        stage("green", mark),
        stage("always", mark, always=True),
        stage("absent", mark, missing="no such tool"),
        stage("rows left", f"raise SystemExit({common.STOPPED})"),
        stage("no such device", "print('Device not supported'); raise SystemExit(1)"),
    ]
    states = ["red", "green", "green", "skipped", "not done", "skipped"]
    verdicts = gpu_check.run_all(chosen, tmp_path, 100, "sources")
    assert [verdict["state"] for verdict in verdicts] == states
    assert gpu_check.exit_code(verdicts) == 1 and gpu_check.exit_code(verdicts[1:]) == common.STOPPED
    assert gpu_check.exit_code(verdicts[1:4]) == 0
    assert (tmp_path / "ran").read_text() == "xx"
    again = gpu_check.run_all(chosen, tmp_path, 100, "sources")
    assert [verdict["state"] for verdict in again] == states and again[1]["reason"] == "done before"
    assert (tmp_path / "ran").read_text() == "xxx"  # only the one that runs always
    gpu_check.run_all(chosen[1:2], tmp_path, 100, "other sources")
    assert (tmp_path / "ran").read_text() == "xxxx"
    kept = json.loads((tmp_path / "stages" / "red.json").read_text())
    assert kept["state"] == "red" and kept["commands"] == ["python -c 'raise SystemExit(1)'"] and kept["device"]


def test_a_stage_ends_in_time_with_all_that_it_started(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    start = time.perf_counter()
    first, second = gpu_check.run_all([stage("long", child, limit=3), stage("next", "")], tmp_path, 14, "sources")
    assert first["state"] == "not done" and time.perf_counter() - start < 14
    assert second["state"] in ("green", "not done")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.perf_counter() + 10
    while _alive(pid) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)
    (last,) = gpu_check.run_all([stage("late", "")], tmp_path, 5, "sources")
    assert (last["state"], last["reason"]) == ("not done", "no time left")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_benchmark_is_told_the_time_it_has(tmp_path):
    chosen = gpu_check.Stage(
        "told", (("python", "-c", "import sys; print(sys.argv[1:])", "{seconds}"),), 50, wrap_up=20
    )
    gpu_check.run_all([chosen], tmp_path, 40, "sources")
    told = int((tmp_path / "stages" / "told.log").read_text().splitlines()[-1].strip("[]'"))
    assert 15 <= told <= 20


def test_gpu_check_lists_its_stages(capsys, monkeypatch):
    assert gpu_check.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    names = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert names[:5] == ["environment", "build", "kernels", "tests", "launches"]
    assert names[5:8] == ["memcheck", "racecheck", "numerics"]
    assert names[8:] == [f"{op}-{kind}" for kind in ("headline", "rest", "compile") for op in gpu_check.OPS] + ["model"]
    assert "--no-build-isolation --no-deps" in text and str(report.ROOT) not in text
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name in ("open_clip", "xdist") else object())
    gpu_check.main(["--dry-run", "--stage", "tests"])
    lean = capsys.readouterr().out
    assert "--ignore=tests/engine" in lean and "-n " not in lean and "--ignore=tests/ops" not in lean
    with pytest.raises(SystemExit):
        gpu_check.main(["--stage", "no-such-stage"])


@pytest.mark.parametrize("module", MODULES)
def test_commands_of_the_stages_parse(module, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for stage in gpu_check.stages(tmp_path):
        for command in stage.commands:
            if command[2] == f"bench.{module}":
                words = [word.replace("{seconds}", "5") for word in command[3:]]
                options = common.parse(MODULES[module].CASES, words)
                assert list(common.plan(MODULES[module].CASES, options)) and options.resume


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


def test_a_page_says_whether_launches_were_measured():
    result = json.loads((page.RESULTS / "launches.json").read_text())
    words, _, _, _, first, *_ = page.launches({**result, "rows": [{**result["rows"][0], "state": "planned"}]})
    assert words.startswith("Planned, not measured") and first.endswith("| planned |")
    words, _, _, _, first, *_ = page.launches({**result, "rows": [{**result["rows"][0], "state": "measured"}]})
    assert words.startswith("Measured") and first.endswith("| measured |")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_without_a_gpu_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_what_the_memory_checker_runs():
    gpu_check.exercise("cpu", "reference")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", MODULES)
def test_on_the_device(op, tmp_path):
    options = ["--device", "cuda", "--backend", "kernel", "--dtypes", "bfloat16", "--out", str(tmp_path / "found.json")]
    code = common.main(MODULES[op].CASES, [*TINY, *options])
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and found["driver"] and found["versions"]["cuda"]
    for row in found["rows"]:
        assert {"fusekern", "fusekern, graphed", "reference, graphed"} <= set(row["forward"])
        assert {"fusekern", "fusekern, graphed", "reference, graphed"} <= set(row["forward_backward"])
        assert row["input_sets"] > 1 and row["memory"]["fusekern"]["peak_bytes"] > 0


def test_pages_say_what_the_results_say(tmp_path, monkeypatch):
    assert page.main(["--check"]) == 0
    wrong = tmp_path / "page.md"
    wrong.write_text("before\n<!-- figures: former2conv-cpu -->\n9.99x\n<!-- end of figures -->\nafter\n")
    assert page.main(["--check", str(wrong)]) == 1
    assert page.main([str(wrong)]) == 0
    text = wrong.read_text()
    assert (
        text.startswith("before\n<!-- figures: former2conv-cpu -->\n`python -m bench.former2conv")
        and "9.99x" not in text
    )
    assert text.endswith("|\n<!-- end of figures -->\nafter\n")
    assert page.main(["--check", str(wrong)]) == 0
    wrong.write_text("<!-- figures: nothing -->\n<!-- end of figures -->\n")
    with pytest.raises(SystemExit, match=r"nothing\.json is not there"):
        page.main(["--check", str(wrong)])


def test_the_goals_of_the_ops_are_met():
    """Those of speed on a CPU and of memory; the layer's stand beside what was measured in docs/performance.md."""
    speed = [line for line in page.goals() if line.startswith(("| former2conv |", "| inverted_bottleneck"))]
    assert len(speed) == 9 and not any("missed" in line for line in speed)
    taken = memory.table(page.load("memory-cpu")["rows"])
    assert sum("met |" in line for line in taken) == 12 and not any("missed" in line for line in taken)


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
