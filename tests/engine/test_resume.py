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
from fusekern.errors import FusekernError

STEPS = 24
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
        kill_at_random(run := start(data, out, world), out, dice.randint(1, 5), dice.uniform(0, 0.1))
        attempts = 0
        while not kill_while_it_writes(run := start(data, out, world, 'resume="auto"'), out, 7 + attempts):
            attempts += 1  # the folder was renamed between the look and the kill
            assert attempts < 5
        left = sorted(path.name for path in out.glob("checkpoints/.tmp-*"))
        print(f"killed while {left} was written, after {attempts} vain attempts")
        run, step = start(data, out, world, 'resume="auto"'), step_of(out) + dice.randint(1, 5)
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


def stopped_half_way(data: Path, out: Path, **settings) -> tuple[Path, Path]:
    """A finished run of six steps, and a copy of its folder as it was after three."""
    whole = train(micro_recipe(data, train__save_every=3, **settings), out=out / "whole")
    half = shutil.copytree(out / "whole", out / "half")
    shutil.rmtree(half / "checkpoints" / whole.name)
    return whole, half


@pytest.mark.parametrize(
    "settings",
    [
        {"optim__name": "sgd", "train__accumulate": 2},
        {"model__guidance__kind": "none", "optim__clip": None, "data__workers": 2},
        {"train__ema": 0.9, "train__precision": "bf16", "model__guidance__bridge": "inner_product"},
    ],
)
def test_a_resumed_run_is_the_run(data, tmp_path, settings):
    whole, half = stopped_half_way(data, tmp_path, **settings)
    resumed = train(micro_recipe(data, train__save_every=3, **settings), out=half, resume="auto")
    assert differing(whole, resumed) == []


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "rng"])
def test_every_part_of_a_checkpoint_matters(data, tmp_path, part):
    """The control: the comparison sees a change in any file, so an equal result means that all of them were used."""
    settings = {"train__save_every": 3, "train__ema": 0.9}
    whole, half = stopped_half_way(data, tmp_path, train__ema=0.9)
    file = checkpoints.find(half) / f"{part}.safetensors"
    tensors = load_file(file)
    if part == "rng":
        tensors["rank0.cpu"] = torch.Generator().manual_seed(123).get_state()
    else:
        tensors["head.classifier.bias" + ("::exp_avg" if part == "optimizer" else "")] += 1e-3
    save_file(tensors, file)
    resumed = train(micro_recipe(data, **settings), out=half, resume="auto")
    reached = ["ema"] if part == "ema" else ["ema", "model", "optimizer"]
    assert {f"{name}.safetensors" for name in reached} <= set(differing(whole, resumed))


def test_three_processes_add_in_the_same_order_after_a_stop(data, tmp_path):
    """Two terms add up the same in any order; from three on, DDP's regrouping of gradients would show."""
    settings = ["train.steps=6", "train.save_every=3", "train.batch=3"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert start(data, whole, 3, *settings).wait(timeout=200) == 0, whole.with_suffix(".txt").read_text()[-3000:]
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000006")
    run = start(data, half, 3, *settings, 'resume="auto"')
    assert run.wait(timeout=200) == 0, half.with_suffix(".txt").read_text()[-3000:]
    assert differing(checkpoints.find(whole), checkpoints.find(half)) == []


def test_another_number_of_processes_is_refused(data, tmp_path):
    _, half = stopped_half_way(data, tmp_path)
    path = checkpoints.find(half) / "state.json"
    path.write_text(path.read_text().replace('"world": 1', '"world": 4'))
    with pytest.raises(FusekernError, match="is from a run of 4 processes, this one has 1: each process has its own"):
        train(micro_recipe(data, train__save_every=3), out=half, resume="auto")


def test_other_versions_or_threads_are_warned_about(data, tmp_path, caplog):
    _, half = stopped_half_way(data, tmp_path)
    path = checkpoints.find(half) / "state.json"
    path.write_text(path.read_text().replace('"threads": ', '"threads": 9'))
    train(micro_recipe(data, train__save_every=3), out=half, resume="auto")
    assert "the weights may differ in their last bits" in caplog.text


def test_a_line_of_metrics_that_a_kill_has_cut_is_dropped(data, tmp_path):
    _, half = stopped_half_way(data, tmp_path, train__log_every=1)
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    train(micro_recipe(data, train__save_every=3, train__log_every=1), out=half, resume="auto")
    lines = [json.loads(line)["step"] for line in (half / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_the_run_on_cuda(data, tmp_path, precision):
    settings = {"train__deterministic": True, "train__precision": precision, "train__ema": 0.9}
    whole, half = stopped_half_way(data, tmp_path, **settings)
    resumed = train(micro_recipe(data, train__save_every=3, **settings), out=half, resume="auto")
    assert differing(whole, resumed) == []
