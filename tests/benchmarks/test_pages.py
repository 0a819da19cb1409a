"""Pages, pictures and the table of numerics say what was found."""

from __future__ import annotations

import json

import pytest
from bench_runs import MODULES, WRONG, run

from bench import conv2former, memory, numerics, page


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


def test_a_page_says_whether_launches_were_measured():
    result = json.loads((page.RESULTS / "launches.json").read_text())
    words, _, _, _, first, *_ = page.launches({**result, "rows": [{**result["rows"][0], "state": "planned"}]})
    assert words.startswith("Planned, not measured") and first.endswith("| planned |")
    words, _, _, _, first, *_ = page.launches({**result, "rows": [{**result["rows"][0], "state": "measured"}]})
    assert words.startswith("Measured") and first.endswith("| measured |")


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
