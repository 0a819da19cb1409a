"""Loss curves of the backends beside each other: what is run, what is compared, what is written."""

import json

import pytest

from bench import learning, page, report
from fusekern import cli
from fusekern.backends import BACKENDS
from fusekern.data.scenes import write_scenes

SMALLEST = [
    *("--model.backbone.name", "mobilenetv2_035", "--model.guidance.channels", "32", "--model.guidance.blocks", "1"),
    *("--model.head.neck_channels", "16", "--model.head.channels", "16", "--text.width", "32"),
    *("--data.scale", "[128, 96]", "--data.crop", "[96, 96]", "--data.workers", "0", "--eval.scale", "[128, 96]"),
    *("--train.batch", "2", "--train.log_every", "1", "--train.eval_every", "0", "--optim.warmup", "0"),
]


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Small runs without a start of Python each; the words of those that ran."""
    ran = []

    def fusekern(*words):
        ran.append(words)
        assert cli.main(words) == 0

    monkeypatch.setattr(learning, "fusekern", fusekern)
    monkeypatch.setattr(learning, "OPTIONS", SMALLEST)
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(learning, "PICTURES", tmp_path / "docs")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "source", lambda: "these")
    write_scenes(tmp_path / "scenes", images=(4, 2), size=(96, 128), seed=0)
    return ran


def test_learning_is_compared_between_backends_and_seeds(tmp_path, capsys, in_this_process):
    pytest.importorskip("matplotlib")
    backends = ["reference"] if BACKENDS["cpp"].missing else ["reference", "cpp"]
    where = ["--out", str(tmp_path / "learning"), "--data", str(tmp_path / "scenes"), "--backends", *backends]
    where += ["--seeds", "0", "1"]
    with pytest.raises(SystemExit, match="not run yet: .*reference-0.*reference-1"):
        learning.main(["report", *where])
    assert learning.main(["run", *where, "--steps", "5"]) == 0
    assert [words[0] for words in in_this_process] == ["train", "eval"] * 2 * len(backends)
    assert learning.main(["run", *where, "--steps", "5"]) == 0  # done already
    assert len(in_this_process) == 4 * len(backends)
    with pytest.raises(SystemExit, match="holds runs of 5 steps on .*; choose another --out"):
        learning.main(["run", *where, "--steps", "6"])
    capsys.readouterr()
    assert learning.main(["report", *where]) == 0
    found = json.loads((tmp_path / "results" / "learning.json").read_text())
    assert found["device"] and found["commit"] and found["date"] and found["steps"] == 5
    assert found["command"].startswith("python -m bench.learning run --steps 5 --backends reference")
    assert [[step for step, _ in run["loss"]] for run in found["runs"]] == [[1, 2, 3, 4, 5]] * 2 * len(backends)
    by_name = {(run["backend"], run["seed"]): run["loss"] for run in found["runs"]}
    first = {names: points[0][1] for names, points in by_name.items()}
    for (backend, seed), loss in first.items():  # of equal weights and equal pictures
        assert loss == pytest.approx(first["reference", seed], rel=1e-3), backend
    assert first["reference", 0] != first["reference", 1]
    apart = found["rows"][-1]
    assert apart["seeds"] == [0, 1] and apart["distance"] > 1e-3
    assert (tmp_path / "docs" / "learning.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + len(found["rows"]) and table[-1].startswith("| reference, seeds 0 and 1 |")
    text = tmp_path / "page.md"
    text.write_text("<!-- figures: learning -->\n<!-- end of figures -->\n")
    assert page.main([str(text)]) == 0 and table[-1] in text.read_text()


def test_a_backend_that_learns_otherwise_is_named():
    def pair(backend, seeds, distance):
        return {"backends": [backend, "reference"], "seeds": seeds, "distance": distance, "miou": [0.5, 0.25]}

    rows = [pair("cpp", [0, 0], 0.01), pair("cpp", [1, 1], 0.2), pair("reference", [0, 1], 0.1)]
    assert learning.faults(rows) == ["cpp, seed 1: 0.2 from the reference, whose own seeds are 0.1 apart in the mean"]
    assert learning.table(rows)[2] == "| cpp and reference, seed 0 | 0.01 | 50.00 and 25.00 |"
    assert learning.faults([pair("cpp", [0, 0], float("nan")), *rows[2:]])
    assert learning.smoothed([[5 * step, float(step)] for step in range(6)]) == [(15, 1.5), (20, 2.5), (25, 3.5)]
    assert learning.smoothed([[1, 2.0], [2, 4.0]]) == [(2, 3.0)]


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--seeds", "1", "1"], ["--backends", "cpp", "auto"]])
def test_learning_needs_two_seeds_of_the_reference(words, capsys):
    with pytest.raises(SystemExit):
        learning.main(["run", *words])
    assert "the reference with two seeds or more" in capsys.readouterr().err
