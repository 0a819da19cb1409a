import json

import torch

import fusekern
from fusekern import backends, info, use_backend
from fusekern.backends import OPS


def test_collects_plain_values():
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["version"] == fusekern.__version__
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "cpu" in found["devices"]
    assert list(found["ops"]["cpu"]) == list(OPS)


def test_says_what_every_op_gets_and_why_not_the_others():
    for row in info.collect()["ops"]["cpu"].values():
        assert row["backend"] in ("reference", "cpp")
        others = {"cuda", "triton", "cpp", "reference"} - {row["backend"]}
        assert set(row["not"]) == others
        assert all(reasons for name, reasons in row["not"].items() if name != "reference")


def test_text_names_every_op_and_reason():
    found = info.collect()
    text = info.render(found)
    reasons = [reason or "built" for reason in found["extensions"].values()]
    for name in (*OPS, *found["packages"], *found["extensions"], *reasons, "no CUDA kernel"):
        assert name in text
    assert max(map(len, text.splitlines())) < 180


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    found = info.collect()
    assert found["packages"]["no-such-package"] is None
    assert "no-such-package    not installed" in info.render(found)


def test_a_kernel_shows_up(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cpp", backends.Backend("C++", "cpu", ""))
    monkeypatch.setattr(backends, "_kernels", {op: {} for op in OPS})
    backends.register("former", "cpp", lambda *arguments: [])
    backends.register("score_map", "cpp", lambda image, text, normalize, concat: ["it has one reason"])
    found = info.collect()
    assert found["ops"]["cpu"]["former"]["backend"] == "cpp"
    assert found["ops"]["cpu"]["former"]["not"]["reference"] == []
    assert found["ops"]["cpu"]["score_map"] == {
        "backend": "reference",
        "not": {**found["ops"]["cpu"]["score_map"]["not"], "cpp": ["it has one reason"]},
    }
    text = info.render(found)
    assert "  former               cpp\n    not reference: it is slower" in text
    assert "    not cpp: it has one reason" in text


def test_the_default_backend_does_not_disturb_it():
    chosen = info.collect()["ops"]["cpu"]
    with use_backend("triton"):
        assert info.collect()["ops"]["cpu"] == chosen


def test_an_op_whose_kernels_are_half_triton_does_not_say_that_there_are_none(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.Backend("Triton", "cpu", ""))
    arguments = info._examples("cpu")["inverted_bottleneck"]
    assert backends.why_not("inverted_bottleneck", "triton", *arguments) == ["its Triton kernels run as part of 'cuda'"]
