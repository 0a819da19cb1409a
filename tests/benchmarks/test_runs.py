"""What a run measures and writes, and that it says nothing about a kernel that is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from bench_runs import MODULES, TINY, WRONG, run

from bench import common, former2conv, inverted_bottleneck, peers, report, score_map
from bench.case import LAYOUTS, Shape, make
from fusekern.backends import BACKENDS


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
