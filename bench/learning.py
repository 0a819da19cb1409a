"""Whether a model learns alike under every backend: the loss of the demo recipe, step by step.

    python -m bench.learning run --out runs/learning --steps 200 --backends reference cpp --seeds 0 1 2
    python -m bench.learning report --out runs/learning --backends reference cpp --seeds 0 1 2

``run`` trains and evaluates what is not there yet, one process and one thread a run, on the GPU if there is one (there
``auto`` is what has the kernels). ``report`` writes ``bench/results/learning.json`` and ``docs/learning.png``, which
have the name of the ``--out`` folder, and prints the table of ``docs/numerics.md``.

Runs of one seed start from equal weights and see equal batches; only rounding drives their losses apart. The measure of
how far is another seed, which no one would call another model: the exit code of ``report`` is 1 if a backend's loss is
farther from the reference's than two seeds of the reference are from each other, in the mean of their pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch

from bench import report
from fusekern.backends import NAMES

RESULTS = report.ROOT / "bench" / "results"
PICTURES = report.ROOT / "docs"
OPTIONS = ["--train.log_every", "5", "--train.eval_every", "0", "--data.workers", "0"]
WINDOW = 4  # logged points that the smoothed loss is the mean of
COLOURS = {"reference": "#999999", "cpp": "#d55e00", "triton": "#0072b2", "cuda": "#009e73", "auto": "#cc79a7"}
STYLES = ("-", "--", ":", "-.")


def folder_of(out: Path, backend: str, seed: int) -> Path:
    return out / f"{backend}-{seed}"


def fusekern(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "fusekern", *words], check=True, env=environment)


def run(options: argparse.Namespace) -> None:
    """Trains and evaluates every backend and seed that has no result yet, ``jobs`` at a time.

    Raises:
        SystemExit: the folder holds runs of other sources, on another device or of another length.
    """
    out, device = options.out, "cuda" if torch.cuda.is_available() else "cpu"
    facts = {"op": "learning", **report.describe(device), "command": _command(options), "steps": options.steps}
    origin = out / "run.json"
    if origin.exists():
        earlier = json.loads(origin.read_text())
        if not report.is_of(earlier, device, facts["source"]) or earlier["steps"] != options.steps:
            raise SystemExit(
                f"{out} holds runs of {earlier['steps']} steps on {earlier['device']} at commit {earlier['commit']}: "
                "they do not compare with what would be run now; choose another --out"
            )
        facts["command"] = "; ".join(dict.fromkeys([*earlier["command"].split("; "), facts["command"]]))
    report.write(facts, origin)

    def one(seed: int, backend: str) -> None:
        folder = folder_of(out, backend, seed)
        if (folder / "eval" / "results.json").exists():
            return
        words = ["--model.guidance.backend", backend, "--data.root", str(options.data or out / "scenes")]
        words += ["--train.seed", str(seed), "--train.steps", str(options.steps), *OPTIONS]
        fusekern("train", "demo", *words, "--out", str(folder), "--resume", "auto")
        fusekern("eval", str(folder))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda pair: one(*pair), [(seed, name) for seed in options.seeds for name in options.backends]))


def _command(options: argparse.Namespace) -> str:
    words = ["python", "-m", "bench.learning", "run", "--steps", str(options.steps)]
    return shlex.join([*words, "--backends", *options.backends, "--seeds", *map(str, options.seeds)])


def collect(out: Path, backends: list[str], seeds: list[int]) -> dict:
    """What a folder of runs tells: the runs with their losses, and as rows the pairs of them that are compared.

    Raises:
        SystemExit: a run is missing.
    """
    wanted = [(backend, seed) for backend in backends for seed in seeds]
    missing = [str(folder_of(out, *names)) for names in wanted if not _score(out, *names).exists()]
    if missing:
        raise SystemExit(f"not run yet: {', '.join(missing)}")
    runs = []
    for backend, seed in wanted:
        score = json.loads(_score(out, backend, seed).read_text())
        lines = (folder_of(out, backend, seed) / "metrics.jsonl").read_text().splitlines()
        loss = [[line["step"], line["loss"]] for line in map(json.loads, lines) if "loss" in line]
        runs.append({"backend": backend, "seed": seed, "miou": score["miou"], "loss": loss})
    plain = {run["seed"]: run for run in runs if run["backend"] == "reference"}
    rows = [_pair(run, plain[run["seed"]]) for run in runs if run["backend"] != "reference"]
    rows += [_pair(one, other) for one, other in combinations(plain.values(), 2)]
    return {**json.loads((out / "run.json").read_text()), "window": WINDOW, "rows": rows, "runs": runs}


def _score(out: Path, backend: str, seed: int) -> Path:
    return folder_of(out, backend, seed) / "eval" / "results.json"


def _pair(one: dict, other: dict) -> dict:
    """Two runs of one seed or of one backend, with the largest distance of their smoothed losses."""
    pairs = zip(smoothed(one["loss"]), smoothed(other["loss"]), strict=True)
    return {
        "backends": [one["backend"], other["backend"]],
        "seeds": [one["seed"], other["seed"]],
        "distance": max(abs(mine - theirs) for (_, mine), (_, theirs) in pairs),
        "miou": [one["miou"], other["miou"]],
    }


def smoothed(points: list[list[float]]) -> list[tuple[int, float]]:
    """The mean of ``WINDOW`` points, or of all where they are fewer, at the step of the last."""
    width = min(WINDOW, len(points))
    ends = range(width, len(points) + 1)
    return [(points[end - 1][0], sum(loss for _, loss in points[end - width : end]) / width) for end in ends]


def faults(rows: list[dict]) -> list[str]:
    """Which backends are farther from the reference than its own seeds are from each other, in words."""
    most = fmean(row["distance"] for row in rows if row["seeds"][0] != row["seeds"][1])
    return [
        f"{row['backends'][0]}, seed {row['seeds'][0]}: {row['distance']:.3g} from the reference, "
        f"whose own seeds are {most:.3g} apart in the mean"
        for row in rows
        if row["seeds"][0] == row["seeds"][1] and not row["distance"] <= most
    ]


def table(rows: list[dict]) -> list[str]:
    """The pairs with the distance of their losses and both scores, as Markdown."""
    lines = ["| | largest distance of the losses | mIoU, % |", "|---|---|---|"]
    for row in rows:
        (backend, other), (seed, last) = row["backends"], row["seeds"]
        words = f"{backend} and {other}, seed {seed}" if seed == last else f"{backend}, seeds {seed} and {last}"
        scores = " and ".join(f"{100 * miou:.2f}" for miou in row["miou"])
        lines.append(f"| {words} | {row['distance']:.2g} | {scores} |")
    return lines


def draw(runs: list[dict], file: Path) -> None:
    """Smoothed loss over steps: a colour for each backend, a line style for each seed, the reference broad below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes, seeds = figure.subplots(), sorted({run["seed"] for run in runs})
    for run in runs:
        name, seed, plain = run["backend"], run["seed"], run["backend"] == "reference"
        style = {"color": COLOURS[name], "linestyle": STYLES[seeds.index(seed) % len(STYLES)]}
        steps, losses = zip(*smoothed(run["loss"]), strict=True)
        axes.plot(steps, losses, **style, linewidth=4 if plain else 1.3, zorder=2 if plain else 3)
        axes.plot([], [], **style, label=f"{name}, seed {seed}")
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--data", type=Path, help="folder of the scenes, drawn where there is none; default OUT/scenes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=["reference", "cpp"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args(arguments)
    if "reference" not in options.backends or len(set(options.seeds)) < 2:
        parser.error("what a backend is judged by is the reference with two seeds or more")
    if options.verb == "run":
        run(options)
        return 0
    found = collect(options.out, options.backends, options.seeds)
    report.write(found, RESULTS / f"{options.out.name}.json")
    draw(found["runs"], PICTURES / f"{options.out.name}.png")
    wrong = faults(found["rows"])
    print("\n".join([*table(found["rows"]), "", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
