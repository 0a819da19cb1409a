"""What language buys on CamVid: four arms from equal initial weights and equal batches.

    python -m bench.camvid run --data DIR --out runs/camvid
    python -m bench.camvid report --data DIR --out runs/camvid

``DIR`` holds the photographs in the ADE20K folder layout, ``text_vit_b16.npy`` and ``classes.txt``. ``run`` trains and
evaluates what is not there yet, one process and one thread a run; ``report`` writes ``bench/results/camvid.json`` and
the pictures of ``docs/camvid.md``. Parts that two arms share by name start from the same weights, and step s of every
arm with the same seed sees the same crops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fusekern import viz
from fusekern.data.folder import SegmentationFolder
from fusekern.data.spec import load_spec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "camvid.json"
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


def run(data: Path, out: Path, seeds: list[int], steps: int, jobs: int) -> None:
    """Trains and evaluates every arm and seed that has no result yet, ``jobs`` at a time."""

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
    command = f"python -m bench.camvid run --seeds {' '.join(map(str, seeds))} --steps {steps}"
    (out / "run.json").write_text(json.dumps({"command": command, "commit": commit}))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: one(*pair), [(seed, arm) for seed in seeds for arm in arms(data)]))


def report(data: Path, out: Path, seeds: list[int]) -> None:
    """Collects the runs into ``bench/results/camvid.json``, prints the tables, draws curves and label maps."""
    results = {arm: [_result(folder_of(out, arm, seed)) for seed in seeds] for arm in arms(data)}
    first = results["vanilla"][0]
    RESULTS.parent.mkdir(exist_ok=True)
    summary = {
        **json.loads((out / "run.json").read_text()),
        "device": f"{platform.machine()} CPU, 1 thread a run",
        "date": first["date"],
        "versions": first["versions"],
        "seeds": seeds,
        "arms": {arm: {"mean": _mean(runs), "spread": _spread(runs), "runs": runs} for arm, runs in results.items()},
    }
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    names = list(first["iou"])
    print(
        "| arm | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean | spread |\n|---|"
        + "---|" * (len(seeds) + 2)
    )
    for arm, runs in results.items():
        print(
            f"| {arm} | {_cells(run['miou'] for run in runs)} | {100 * _mean(runs):.1f} | {100 * _spread(runs):.1f} |"
        )
    print("\n| class | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for name in names:
        print(f"| {name} | {_cells(statistics.mean(run['iou'][name] for run in runs) for runs in results.values())} |")
    PICTURES.mkdir(exist_ok=True)
    for key, label in (("miou", "validation mIoU, %"), ("loss", "training loss of the head")):
        series = {arm: _mean_curve([run["curves"][key] for run in runs]) for arm, runs in results.items()}
        viz.curves_png(series, "step", label, PICTURES / f"{key}.png")
    _draw_labels(data, out, seeds[0])


def _result(folder: Path) -> dict:
    """One run's final score and curves, in [0, 1]."""
    final = json.loads((folder / "eval" / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "miou": final["miou"],
        "accuracy": final["accuracy"],
        "iou": {row["name"]: row["iou"] for row in final["classes"]},
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


def _mean(runs: list[dict]) -> float:
    return statistics.mean(run["miou"] for run in runs)


def _spread(runs: list[dict]) -> float:
    return max(run["miou"] for run in runs) - min(run["miou"] for run in runs)


def _mean_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*curves, strict=True)]


def _print_head(titles: list[str]) -> None:
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")


def _cells(shares) -> str:
    return " | ".join(f"{100 * share:.1f}" for share in shares)


def _draw_labels(data: Path, out: Path, seed: int) -> None:
    """Ground truth and every arm's label map for a few validation frames, without the photographs."""
    from PIL import Image

    spec = load_spec("camvid")
    val = SegmentationFolder(spec, "val", str(data))
    chosen = range(0, len(val), len(val) // 3)[:3]
    blank = np.full((*val[0].label.shape, 3), 255, np.uint8)
    panels, captions = [], []
    for index in chosen:
        image = val.pairs[index][0]
        panels.append(viz.overlay(blank, val[index].label.numpy(), spec.palette, alpha=1.0))
        captions.append("ground truth")
        for arm in arms(data):
            folder = folder_of(out, arm, seed)
            where = folder / "predictions" / "labels" / f"{image.stem}.png"
            if not where.exists():
                command = [sys.executable, "-m", "fusekern", "predict", str(folder), str(image)]
                subprocess.run([*command, "--out", str(folder / "predictions")], check=True)
            label = spec.to_train(np.asarray(Image.open(where)), where)
            panels.append(viz.overlay(blank, label, spec.palette, alpha=1.0))
            captions.append(arm)
    viz.contact_sheet(panels, len(arms(data)) + 1, PICTURES / "labels.png", captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "report"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    if options.verb == "run":
        run(options.data, options.out, options.seeds, options.steps, options.jobs)
    else:
        report(options.data, options.out, options.seeds)


if __name__ == "__main__":
    main()
