"""A run that is stopped, however often and however rudely, ends with the weights of one that never was.

The random moments come from a seed that is printed; FUSEKERN_KILL_SEED=N repeats them.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from run_training import micro_recipe
from safetensors.torch import load_file, save_file

from fusekern.engine import checkpoint as checkpoints
from fusekern.engine.train import train

STEPS = 40
SETTINGS = [f"train.steps={STEPS}", "train.save_every=1", "train.ema=0.99", 'train.precision="bf16"', "data.workers=1"]
SCRIPT = str(Path(__file__).with_name("run_training.py"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the files of two checkpoints that are not the same bytes."""
    first, second = files(one), files(other)
    assert {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"} <= set(first)
    assert set(first) == set(second)
    return sorted(name for name in first if first[name] != second[name])


def start(data: Path, out: Path, world: int, *settings: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, SCRIPT, str(data), str(out), *SETTINGS, *settings]
    with open(out.with_suffix(".txt"), "a") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
        )


def processes(run: subprocess.Popen) -> list[psutil.Process]:
    """torchrun or the single process first, then all below it."""
    try:
        parent = psutil.Process(run.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(victims: list[psutil.Process]) -> None:
    for process in victims:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, timeout=60)


def step_of(out: Path) -> int:
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)


def wait_for_step(run: subprocess.Popen, out: Path, step: int) -> None:
    limit = time.monotonic() + 120
    while step_of(out) < step:
        assert run.poll() is None, f"the run ended early:\n{out.with_suffix('.txt').read_text()[-3000:]}"
        assert time.monotonic() < limit, f"step {step} was not reached in two minutes"
        time.sleep(0.002)


def kill_at_random(run: subprocess.Popen, out: Path, step: int, delay: float) -> None:
    wait_for_step(run, out, step)
    time.sleep(delay)
    kill(processes(run))


def kill_while_it_writes(run: subprocess.Popen, out: Path, step: int) -> bool:
    """Kills as soon as a checkpoint's temporary folder is there. Returns whether it was left behind."""
    wait_for_step(run, out, step)
    victims, folder = processes(run), out / "checkpoints"
    while run.poll() is None:
        if any(name.startswith(".tmp-") for name in os.listdir(folder)):
            kill(victims)
            break
    return any(name.startswith(".tmp-") for name in os.listdir(folder))


def kill_one_worker(run: subprocess.Popen, out: Path, step: int, which: int) -> None:
    """One process of a torchrun dies; torchrun ends the others."""
    wait_for_step(run, out, step)
    workers = [process for process in processes(run)[0].children() if "run_training.py" in " ".join(process.cmdline())]
    kill([workers[which % len(workers)]])
    assert run.wait(timeout=120) != 0


def press_ctrl_c(run: subprocess.Popen, out: Path, step: int) -> None:
    """As a terminal does it: SIGINT to every process, loader workers included."""
    wait_for_step(run, out, step)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=120) != 0
    text = out.with_suffix(".txt").read_text()
    assert f"interrupted at step {step_of(out)}; saved {checkpoints.find(out)}; continue with --resume auto" in text


@pytest.mark.parametrize("world", [1, 2])
def test_killed_runs_end_with_the_weights_of_one_never_stopped(data, tmp_path, world):
    seed = int(os.environ.get("FUSEKERN_KILL_SEED", random.SystemRandom().randrange(10**6)))
    dice = random.Random(seed)
    print(f"FUSEKERN_KILL_SEED={seed}")
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = start(data, whole, world)
    try:
        kill_at_random(run := start(data, out, world), out, dice.randint(1, 6), dice.uniform(0, 0.1))
        attempts = 0
        while not kill_while_it_writes(run := start(data, out, world, 'resume="auto"'), out, 8 + attempts):
            attempts += 1  # the folder was renamed between the look and the kill
            assert attempts < 5
        left = sorted(path.name for path in out.glob("checkpoints/.tmp-*"))
        print(f"killed while {left} was written, after {attempts} vain attempts")
        run, step = start(data, out, world, 'resume="auto"'), step_of(out) + dice.randint(1, 6)
        if world > 1:
            kill_one_worker(run, out, step, dice.randrange(world))
        else:
            kill_at_random(run, out, step, dice.uniform(0, 0.1))
        press_ctrl_c(run := start(data, out, world, 'resume="auto"'), out, step_of(out) + 1)
        assert step_of(out) < STEPS, "all four stops came before the end"
        run = start(data, out, world, 'resume="auto"')
        assert run.wait(timeout=120) == 0, out.with_suffix(".txt").read_text()[-3000:]
        assert uninterrupted.wait(timeout=120) == 0, whole.with_suffix(".txt").read_text()[-3000:]
    finally:
        for process in (run, uninterrupted):
            kill(processes(process))
    assert differing(whole / "checkpoints" / f"step-{STEPS:08d}", out / "checkpoints" / f"step-{STEPS:08d}") == []
    assert not list(out.glob("checkpoints/.*")), "what the kills had left is swept away"
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(2, STEPS + 1, 2), STEPS], "no line twice, none lost"
