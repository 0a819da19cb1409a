"""All that needs a GPU, in stages that fit into a short lease of one.

    python -m bench.gpu_check [--budget SECONDS] [--stage NAME ...] [--out DIR] [--dry-run]

Every stage is a process of its own, with a time limit out of what the budget has left, and leaves its verdict in
``DIR/stages/NAME.json`` and its output beside it as ``NAME.log``; benchmarks and numerics write ``DIR/OP.json`` row by
row. Called again, it skips what is green for the same sources, and benchmarks go on after their last row. A red stage
does not stop the next. It needs torch, triton, numpy, pytest, hypothesis and a compiler: a part that wants more is left
out and named. Exit code: 0, 1 if a stage is red, 2 without a GPU, 3 if time ran out before all was done.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch

from bench import report
from bench.common import STOPPED
from fusekern import ops

OPS = ("layer", "former2conv", "conv2former", "score_map", "downsample", "inverted_bottleneck", "former", "text_path")
# Tests of training, data and command line, and what must be installed for them.
SEG_TESTS = (
    *("data", "engine", "models", "nn/test_backends_agree.py"),
    *("test_cli.py", "test_learning.py", "test_recipes.py", "test_viz.py"),
)
SEG_MODULES = (
    *("timm", "open_clip", "torchvision", "accelerate", "jsonargparse", "safetensors", "yaml", "PIL", "tqdm"),
    *("tensorboard", "matplotlib", "torchmetrics", "psutil"),
)
GREEN, RED, SKIPPED, UNDONE = "green", "red", "skipped", "not done"


@dataclass(frozen=True)
class Stage:
    """
    Args:
        commands: run one after the other until one fails; ``{seconds}`` in a word becomes the time a benchmark has.
        limit: seconds it may take at most.
        missing: why it cannot run here; empty if it can.
        always: it is cheap and of this machine, so it is done every time.
        wrap_up: seconds that a benchmark needs at most after the last shape it starts.
        environment: variables of its own.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    missing: str = ""
    always: bool = False
    wrap_up: float = 20
    environment: tuple[tuple[str, str], ...] = ()


def stages(out: Path) -> list[Stage]:
    """In the order in which they run: first what the figures rest on, then the shapes with goals, then the rest."""
    python = "python"  # stands for the interpreter that runs this
    pip = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", ".")
    tell = (python, "-c", "from fusekern import info; print(info.render(info.collect()))")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    spread = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    absent = [name for name in SEG_MODULES if find_spec(name) is None]
    ignored = [f"--ignore=tests/{name}" for name in SEG_TESTS] if absent else []
    done = "--deselect=tests/kernels/test_interpreter.py::test_on_the_device"
    measure = ("--device", "cuda", "--out")
    found = [
        Stage("environment", ((python, "-m", "bench.report"),), 60, always=True),
        Stage("build", (pip, tell), 240, always=True),
        Stage("kernels", ((*pytest, *spread, "-m", "gpu", "tests/kernels"),), 240),
        Stage("tests", ((*pytest, *spread, done, *ignored, "tests"),), 300),
        Stage("launches", ((python, "-m", "bench.launches", *measure, str(out / "launches.json")),), 240),
    ]
    sanitizer = _sanitizer()
    for tool in ("memcheck", "racecheck"):
        options = ("--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no")
        command = (sanitizer or "compute-sanitizer", *options, python, "-m", "bench.gpu_check", "--exercise")
        missing = "" if sanitizer else "compute-sanitizer was not found"
        # Without torch's pool each tensor has an allocation of its own, and a read beyond it shows.
        alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        found.append(Stage(tool, (command,), 150, missing, environment=alone))
    numerics = (python, "-m", "bench.numerics", *measure, str(out / "numerics.json"))
    found.append(Stage("numerics", (numerics,), 120))
    for kind in ("headline", "rest", "compile"):
        for op in OPS:
            file = out / (f"{op}-compile.json" if kind == "compile" else f"{op}.json")
            bench = (python, "-m", f"bench.{op}", *measure, str(file), "--resume", "--seconds", "{seconds}")
            headline = (*bench, "--shapes", "headline", "--dtypes")
            if kind == "headline":
                found.append(Stage(f"{op}-headline", ((*headline, "bfloat16"),), 120))
            elif kind == "rest":
                rest = (*bench, "--dtypes", "bfloat16", "--layouts", "channels_last")
                commands = (rest, (*headline, "float32", "--layouts", "channels_last"))
                found.append(Stage(f"{op}-rest", commands, 180))
            else:
                compiled = (*bench, "--shapes", "compile", "--dtypes", "bfloat16", "--layouts", "channels_last")
                found.append(Stage(f"{op}-compile", ((*compiled, "--compile"),), 400, wrap_up=120))
    model = (python, "-m", "bench.model", *measure, str(out / "model.json"))
    missing = f"{', '.join(absent)} not installed" if set(absent) & {"timm", "open_clip", "jsonargparse"} else ""
    found.append(Stage("model", (model,), 180, missing))
    return found


def _sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr/local/cuda/compute-sanitizer"]
    folders = [place for root in filter(None, places) for place in (root, f"{root}/bin")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_all(chosen: Sequence[Stage], out: Path, budget: float, source: str) -> list[dict]:
    """Runs the stages within ``budget`` seconds.

    Returns:
        Each one's verdict: ``stage``, ``state``, ``reason``, ``seconds`` and what it ran with.
    """
    start, device = perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    verdicts = []
    for stage in chosen:
        left = budget - (perf_counter() - start)
        earlier = _read(report.ROOT / out / "stages" / f"{stage.name}.json")
        if not stage.always and earlier.get("state") == GREEN and report.is_of(earlier, device, source):
            verdict = {**earlier, "reason": "done before"}
        elif stage.missing:
            verdict = _verdict(stage, SKIPPED, stage.missing, 0.0, source)
        elif left < 10:
            verdict = _verdict(stage, UNDONE, "no time left", 0.0, source)
        else:
            print(f"-- {stage.name} ({min(stage.limit, left):.0f} s at most)", flush=True)
            verdict = _run(stage, out, min(stage.limit, left), source)
        verdicts.append(verdict)
        print(f"   {stage.name}: {verdict['state']} {verdict['reason']}", flush=True)
    return verdicts


def _run(stage: Stage, out: Path, limit: float, source: str) -> dict:
    """Runs one stage and writes its verdict and log."""
    folder = report.ROOT / out / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **dict(stage.environment)}
    environment.pop("TRITON_INTERPRET", None)
    codes: list[int | None] = []
    log = folder / f"{stage.name}.log"
    with log.open("w") as file:
        for command in stage.commands:
            left = limit - (perf_counter() - start)
            words = [word.replace("{seconds}", f"{max(left - stage.wrap_up, 1):.0f}") for word in command]
            words = [sys.executable if word == "python" else word for word in words]
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            codes.append(_timed(words, file, environment, left))
            if codes[-1] not in (0, STOPPED):
                break
    text = log.read_text(errors="replace")
    state, reason = _judge(codes, text)
    print("\n".join(f"   | {line}" for line in text.splitlines()[-25 if state == RED else -1 :]), flush=True)
    verdict = _verdict(stage, state, reason, perf_counter() - start, source)
    (folder / f"{stage.name}.json").write_text(json.dumps(verdict, indent=1) + "\n")
    return verdict


def _timed(command: Sequence[str], file, environment: dict[str, str], limit: float) -> int | None:
    """The exit code, or none if it outlasted its limit: then it is ended with all that it started."""
    process = subprocess.Popen(
        command, stdout=file, stderr=subprocess.STDOUT, cwd=report.ROOT, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(limit, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _judge(codes: Sequence[int | None], text: str) -> tuple[str, str]:
    """State and reason; only the last code can be another than 0 and STOPPED."""
    if codes[-1] is None:
        return UNDONE, "its time limit came first"
    if codes[-1] not in (0, STOPPED):
        if "Device not supported" in text:
            return SKIPPED, "the tool does not support this device"
        return RED, f"exit code {codes[-1]}, see its log"
    return (UNDONE, "its time was over, rows are left") if STOPPED in codes else (GREEN, "")


def _verdict(stage: Stage, state: str, reason: str, seconds: float, source: str) -> dict:
    facts = report.describe("cuda" if torch.cuda.is_available() else "cpu")
    commands = [shlex.join(command) for command in stage.commands]
    verdict = {"stage": stage.name, "state": state, "reason": reason, "seconds": seconds, "commands": commands}
    return {**verdict, **facts, "source": source}


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def exercise(device: str = "cuda", backend: str = "triton") -> None:
    """Every launcher once on small odd shapes, for a memory checker: ragged tiles, each token bucket, slices."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype, sliced: bool = False) -> torch.Tensor:
        larger = [edge + 2 * sliced for edge in size]
        tensor = torch.randn(larger, generator=generator, device=device).to(dtype)
        return tensor[tuple(slice(0, edge) for edge in size)].requires_grad_()

    for dtype in (torch.bfloat16, torch.float32):
        for sliced in (False, True):
            for tokens in (19, 70, 150, 170):
                image = draw(2, 128, 7, 13, dtype=dtype, sliced=sliced)
                if not sliced:
                    image = image.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
                key, value = (draw(2, tokens, 128, dtype=dtype, sliced=sliced) for _ in range(2))
                weight, bias = draw(128, 128, 3, 3, dtype=dtype), draw(128, dtype=dtype)
                expand, depthwise = draw(256, 128, 1, 1, dtype=dtype), draw(256, 1, 3, 3, dtype=dtype)
                project, norms = draw(128, 256, 1, 1, dtype=dtype), [draw(2, c, dtype=dtype) for c in (256, 256, 128)]
                block = (image, expand, depthwise, project)
                shapes = ((384, 128), 384, (128, 128), 128, 128, 128, (256, 128), 256, (128, 256), 128, 128, 128)
                parts = [draw(*(size if isinstance(size, tuple) else (size,)), dtype=dtype) for size in shapes]
                pairs = [tuple(parts[i : i + 2]) for i in range(0, len(parts), 2)]
                batch = tuple(ops.BatchNorm(*of, None, None, 1e-5, True) for of in norms)
                whole = "cuda" if backend == "triton" else backend  # half CUDA, half Triton
                square = [
                    draw(*size, dtype=dtype) for size in ((128, 128), (128,), (128, 128), (128,), (128, 128), (128,))
                ]
                around = [tuple(square[i : i + 2]) for i in (0, 2, 4)]
                path = (around[0], pairs[2], tuple(pairs), *around[:3])
                calls = {
                    "text_path": (
                        torch.cat(ops.text_path(key, value, *path, heads=2, backend=backend), 2),
                        (key, value, *parts, *square),
                    ),
                    "former": (ops.former(key, *pairs, heads=2, backend=backend), (key, *parts)),
                    "former2conv": (ops.former2conv(image, key, value, heads=2, backend=backend), (image, key, value)),
                    "conv2former": (ops.conv2former(key, image, heads=2, backend=backend), (key, image)),
                    "score_map": (ops.score_map(image, key, concat=True, backend=backend), (image, key)),
                    "downsample": (ops.downsample(image, weight, bias, backend=backend), (image, weight, bias)),
                    "inverted_bottleneck": (ops.inverted_bottleneck(*block, batch, backend=whole)[0], (*block, *norms)),
                }
                for name, (out, leaves) in calls.items():
                    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
                    for tensor in (out, *gradients):
                        if not tensor.isfinite().all():
                            raise SystemExit(f"{name}: not finite at K = {tokens}, {dtype}, sliced = {sliced}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages together")
    parser.add_argument("--stage", nargs="+", help="only these; by default all")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--dry-run", action="store_true", help="list the stages and their commands")
    parser.add_argument("--exercise", action="store_true", help="run each launcher on small shapes, and nothing else")
    options = parser.parse_args(arguments)
    out = Path(os.path.relpath(options.out, report.ROOT))  # stages run in the root
    known = stages(out)
    if unknown := set(options.stage or ()) - {stage.name for stage in known}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in known)}")
    chosen = [stage for stage in known if options.stage is None or stage.name in options.stage]
    if options.dry_run:
        for stage in chosen:
            print(f"{stage.name}: {stage.limit:.0f} s at most{stage.missing and ', skipped: ' + stage.missing}")
            print("\n".join(f"    {shlex.join(command)}" for command in stage.commands))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check (--dry-run lists the stages)")
        return 2
    if options.exercise:
        exercise()
        return 0
    absent = [name for name in SEG_MODULES if find_spec(name) is None]
    if absent:
        print(f"tests/{{{','.join(SEG_TESTS)}}} are left out: {', '.join(absent)} not installed")
    verdicts = run_all(chosen, out, options.budget, report.source())
    print("\n| stage | state | seconds | |\n|---|---|---|---|")
    for verdict in verdicts:
        print(f"| {verdict['stage']} | {verdict['state']} | {verdict['seconds']:.0f} | {verdict['reason']} |")
    return exit_code(verdicts)


def exit_code(verdicts: Sequence[dict]) -> int:
    states = {verdict["state"] for verdict in verdicts}
    return 1 if RED in states else STOPPED if UNDONE in states else 0


if __name__ == "__main__":
    sys.exit(main())
