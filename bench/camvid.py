"""What language buys on CamVid: four arms from equal initial weights and equal batches.

    python -m bench.camvid run --data DIR --out runs/camvid --seeds 0 1 --steps 1200
    python -m bench.camvid report --data DIR --out runs/camvid --seeds 0 1

``DIR`` holds the photographs in the ADE20K folder layout, ``text_vit_b16.npy`` and ``classes.txt``. ``run`` trains and
evaluates what is not there yet, one process and one thread a run; ``report`` writes ``bench/results/camvid.json`` (it
has the name of the ``--out`` folder) and the pictures of ``docs/camvid.md``, and prints the tables. Parts that two arms
share by name start from the same weights, and step s of every arm with the same seed sees the same crops.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fusekern import viz
from fusekern.data.folder import SegmentationFolder
from fusekern.data.spec import load_spec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURES = ROOT / "docs" / "camvid"

SHARED = [
    *("--model.backbone.name", "mobilenetv2_050", "--model.backbone.output_stride", "16"),
    *("--model.head.neck_channels", "64", "--model.head.channels", "64"),
    *("--data.scale", "[320, 240]", "--data.crop", "[192, 192]", "--data.workers", "0"),
    *("--eval.scale", "[320, 240]"),
    *("--optim.lr", "1e-3", "--optim.warmup", "50", "--optim.clip", "1.0"),
    *("--train.batch", "8", "--train.log_every", "20", "--train.save_every", "200", "--train.keep", "1"),
]
GUIDED = [
    *("--model.guidance.channels", "128", "--model.guidance.blocks", "2", "--model.guidance.downsample", "conv"),
    *("--model.guidance.bridge_heads", "2", "--model.guidance.text_heads", "2"),
]


def arms(data: Path) -> dict[str, list[str]]:
    """Recipe and options of each arm."""
    guided = ["camvid/mobilenetv2-convformer", *SHARED, *GUIDED]
    clip = ["--text.source", "file", "--text.file", str(data / "text_vit_b16.npy")]
    clip += ["--text.names", str(data / "classes.txt")]
    return {
        "vanilla": ["camvid/mobilenetv2-fpn", *SHARED],
        "convformer, CLIP text": [*guided, *clip],
        "convformer, hash text": [*guided, "--text.source", "hash"],
        "convformer, CLIP text, no auxiliary loss": [*guided, *clip, "--model.guidance.aux_weight", "0"],
    }


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}"


def run(data: Path, out: Path, chosen: list[str], seeds: list[int], steps: int, jobs: int) -> None:
    """Trains and evaluates every chosen arm and seed that has no result yet, ``jobs`` at a time."""

    def one(seed: int, arm: str) -> None:
        folder = folder_of(out, arm, seed)
        if (folder / "eval" / "results.json").exists():
            return
        fusekern = [sys.executable, "-m", "fusekern"]
        options = ["--data.root", str(data), "--train.seed", str(seed), "--train.steps", str(steps)]
        options += ["--train.eval_every", str(steps // 6), "--out", str(folder), "--resume", "auto"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*fusekern, "train", *arms(data)[arm], *options], check=True, env=environment)
        subprocess.run([*fusekern, "eval", str(folder)], check=True, env=environment)

    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "bench.camvid", "run", "--arms", *chosen])
    command += f" --seeds {' '.join(map(str, seeds))} --steps {steps}"
    (out / "run.json").write_text(json.dumps({"command": command, "commit": commit}))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: one(*pair), [(seed, arm) for seed in seeds for arm in chosen]))


def report(data: Path, out: Path, chosen: list[str], seeds: list[int]) -> None:
    """Collects the runs into ``bench/results/NAME.json``, prints the tables, draws curves and label maps."""
    known = _known(RESULTS / f"{out.name}.json")
    results = {arm: [_result(folder_of(out, arm, seed)) or known.get((arm, seed)) for seed in seeds] for arm in chosen}
    missing = [
        str(folder_of(out, arm, seed)) for arm in chosen for seed in seeds if not results[arm][seeds.index(seed)]
    ]
    if missing:
        raise SystemExit(f"not run yet, and in no earlier report: {', '.join(missing)}")
    first = results[chosen[0]][0]
    lengths = {run["steps"] for runs in results.values() for run in runs}
    if len(lengths) > 1:
        raise SystemExit(f"{out}: these runs have different numbers of steps, {sorted(lengths)}: they do not compare")
    summary = {
        **json.loads((out / "run.json").read_text()),
        "device": f"{platform.machine()} CPU, 1 thread a run",
        "date": first["date"],
        "versions": first["versions"],
        "seeds": seeds,
        "arms": {arm: {"mean": _mean(runs), "spread": _spread(runs), "runs": runs} for arm, runs in results.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{out.name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    _print_head(["arm", *(f"seed {seed}" for seed in seeds), "mean", "spread"])
    for arm, runs in results.items():
        print(f"| {arm} | {_cells([*(run['miou'] for run in runs), _mean(runs), _spread(runs)])} |")
    print()
    _print_head(["class", *results])
    for name in first["iou"]:
        print(f"| {name} | {_cells(statistics.mean(run['iou'][name] for run in runs) for runs in results.values())} |")
    PICTURES.mkdir(exist_ok=True)
    for key, label in (("miou", "validation mIoU, %"), ("loss", "training loss of the head")):
        curves = {arm: _over_seeds([run["curves"][key] for run in runs]) for arm, runs in results.items()}
        series = {arm: [(step, statistics.mean(values)) for step, values in curve] for arm, curve in curves.items()}
        spread = {arm: [(min(values), max(values)) for _, values in curve] for arm, curve in curves.items()}
        viz.curves_png(series, "step", label, PICTURES / f"{out.name}-{key}.png", spread)
    if all(folder_of(out, arm, seeds[0]).exists() for arm in chosen):
        _draw_labels(data, out, chosen, seeds[0])


def _known(path: Path) -> dict[tuple[str, int], dict]:
    """The runs of an earlier report, by arm and seed: a folder that is gone need not be trained again."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    return {
        (arm, seed): run
        for arm, of in earlier["arms"].items()
        for seed, run in zip(earlier["seeds"], of["runs"], strict=True)
    }


def _result(folder: Path) -> dict | None:
    """One run's final score in [0, 1] and curves; none where there is no such run."""
    if not (folder / "eval" / "results.json").exists():
        return None
    final = json.loads((folder / "eval" / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "miou": final["miou"],
        "accuracy": final["accuracy"],
        "iou": {row["name"]: row["iou"] for row in final["classes"]},
        "confusion": _confusion(folder),
        "text": final["text"],
        "steps": final["step"],
        "date": final["date"],
        "versions": final["versions"],
        "token_cosine": [line["token_cosine"] for line in lines if "token_cosine" in line][-1:],
        "curves": {
            "miou": [(line["step"], 100 * line["miou"]) for line in lines if "miou" in line],
            "loss": [(line["step"], line["decode"]) for line in lines if "decode" in line],
        },
    }


def _confusion(folder: Path) -> dict[str, dict[str, float]]:
    """For each class of the ground truth, the classes that at least one in a hundred of its pixels are taken for."""
    with open(folder / "eval" / "confusion.csv", newline="", encoding="utf-8") as file:
        (_, *names), *rows = csv.reader(file)
    shares = {}
    for truth, *cells in rows:
        counts = [int(cell) for cell in cells]
        taken = {name: count / sum(counts) for name, count in zip(names, counts, strict=True) if count}
        shares[truth] = {name: round(share, 4) for name, share in taken.items() if share >= 0.01}
    return shares


def _mean(runs: list[dict]) -> float:
    return statistics.mean(run["miou"] for run in runs)


def _spread(runs: list[dict]) -> float:
    return max(run["miou"] for run in runs) - min(run["miou"] for run in runs)


def _over_seeds(curves: list[list[tuple[int, float]]]) -> list[tuple[int, list[float]]]:
    return [(points[0][0], [value for _, value in points]) for points in zip(*curves, strict=True)]


def _print_head(titles: list[str]) -> None:
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")


def _cells(shares) -> str:
    return " | ".join(f"{100 * share:.1f}" for share in shares)


def _draw_labels(data: Path, out: Path, arms: list[str], seed: int) -> None:
    """Ground truth and every arm's label map for a few validation frames, without the photographs."""
    spec = load_spec("camvid")
    val = SegmentationFolder(spec, "val", str(data))
    blank = np.full((*val[0].label.shape, 3), 255, np.uint8)
    panels, captions = [], []
    for index in range(0, len(val), len(val) // 3)[:3]:
        image = val.pairs[index][0]
        panels.append(viz.overlay(blank, val[index].label.numpy(), spec.palette, alpha=1.0))
        captions.append("ground truth")
        for arm in arms:
            folder = folder_of(out, arm, seed)
            where = folder / "predictions" / "labels" / f"{image.stem}.png"
            if not where.exists():
                command = [sys.executable, "-m", "fusekern", "predict", str(folder), str(image)]
                subprocess.run([*command, "--out", str(folder / "predictions")], check=True)
            label = spec.to_train(np.asarray(Image.open(where)), where)
            panels.append(viz.overlay(blank, label, spec.palette, alpha=1.0))
            captions.append(arm)
    viz.contact_sheet(panels, len(arms) + 1, PICTURES / f"{out.name}-labels.png", captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "report"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", help="default: all four")
    options = parser.parse_args()
    data = options.data.resolve()
    chosen = options.arms or list(arms(data))
    if options.verb == "run":
        run(data, options.out, chosen, options.seeds, options.steps, options.jobs)
    else:
        report(data, options.out, chosen, options.seeds)


if __name__ == "__main__":
    main()
