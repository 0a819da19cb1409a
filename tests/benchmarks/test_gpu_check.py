"""The stages of a first day with a GPU."""

from __future__ import annotations

import json
import time

import pytest
import torch
from bench_runs import MODULES

from bench import common, gpu_check, report


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_without_a_gpu_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_what_the_memory_checker_runs():
    gpu_check.exercise("cpu", "reference")
