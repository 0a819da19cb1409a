"""What language buys on CamVid: four arms from equal initial weights and equal batches.

    python -m bench.camvid run --data DIR --out runs/camvid --seeds 0 1
    python -m bench.camvid report --out runs/camvid

``DIR`` holds the photographs in the ADE20K folder layout, ``text_vit_b16.npy`` and ``classes.txt``. ``run`` trains and evaluates
what is not there yet, one process a run; ``report`` writes ``bench/results/camvid.json`` and the pictures of
``docs/camvid.md``. Parts that two arms share by name start from the same weights, and step s of every arm sees the same crops.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from fusekern import viz

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "camvid.json"

SHARED = [
    *("--model.backbone.name", "mobilenetv2_050", "--model.backbone.output_stride", "16"),
    *("--model.head.neck_channels", "64", "--model.head.channels", "64"),
    *("--data.scale", "[320, 240]", "--data.crop", "[192, 192]", "--data.workers", "0", "--eval.scale", "[320, 240]"),
    *("--optim.lr", "1e-3", "--optim.warmup", "50", "--optim.clip", "1.0", "--optim.min_lr", "0"),
    *("--train.batch", "8", "--train.log_every", "20", "--train.save_every", "500", "--train.keep", "1"),
]
GUIDED = [
    *("--model.guidance.channels", "128", "--model.guidance.blocks", "2"),
    *("--model.guidance.bridge_heads", "2", "--model.guidance.text_heads", "2", "--model.guidance.downsample", "conv"),
]


def arms(data: Path) -> dict[str, list[str]]:
    """Recipe and options of each arm."""
    clip = [
        "--text.source",
        "file",
        "--text.file",
        str(data / "text_vit_b16.npy"),
        "--text.names",
        str(data / "classes.txt"),
    ]
    guided = ["camvid/mobilenetv2-convformer", *SHARED, *GUIDED]
    return {
        "vanilla": ["camvid/mobilenetv2-fpn", *SHARED],
        "convformer-clip": [*guided, *clip],
        "convformer-hash": [*guided, "--text.source", "hash"],
        "convformer-clip-noaux": [*guided, *clip, "--model.guidance.aux_weight", "0"],
    }


def run(data: Path, out: Path, seeds: list[int], steps: int, jobs: int) -> None:
    """Trains and evaluates every arm and seed that has no result yet, ``jobs`` at a time with one thread each."""

    def one(seed: int, arm: str) -> None:
        folder = out / f"{arm}-{seed}"
        if (folder / "eval" / "results.json").exists():
            return
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        fusekern = [sys.executable, "-m", "fusekern"]
        options = ["--data.root", str(data), "--train.seed", str(seed), "--train.steps", str(steps)]
        options += ["--train.eval_every", str(steps // 10), "--out", str(folder), "--resume", "auto"]
        subprocess.run([*fusekern, "train", *arms(data)[arm], *options], check=True, env=environment)
        subprocess.run([*fusekern, "eval", str(folder)], check=True, env=environment)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: one(*pair), [(seed, arm) for seed in seeds for arm in arms(data)]))
