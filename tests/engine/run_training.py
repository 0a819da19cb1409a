"""Training in little: a data set of a few pictures, the smallest recipe, and what looks at a run folder.

As a program it is one run: `python run_training.py DATA OUT [KEY=VALUE ...]`. Keys are those of a recipe, dotted, with
JSON values, and `resume` and `init`. Errors end it with code 2, an interrupted run with code 130.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from fusekern.config import (
    BackboneConfig,
    DataConfig,
    EvalConfig,
    GuidanceConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TextConfig,
    TrainConfig,
)
from fusekern.errors import FusekernError

NAMES = ["left", "right", "below"]


def write_data(root: Path, *, train: int = 6, val: int = 3, names: list[str] | None = None) -> Path:
    """Pictures of three areas of noise about a colour each, void between them, and their dataset.yaml."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            label = np.zeros((80, 96), np.uint8)
            label[:, rng.integers(30, 66) :] = 1
            label[rng.integers(30, 60) :] = 2
            image = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])[label] + rng.integers(-40, 40, (80, 96, 3))
            label[::16] = 255
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{index}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{index}.png")
    spec = {
        "name": "areas",
        "root": ".",
        "train": {"images": "images/train/*.png", "labels": "labels/train/{stem}.png"},
        "val": {"images": "images/val/*.png", "labels": "labels/val/{stem}.png"},
        "names": names or NAMES,
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec))
    return root


def micro_recipe(data: Path, **overrides: object) -> Recipe:
    """The smallest recipe that has every part; an override is `train__steps=3`."""
    recipe = Recipe(
        model=ModelConfig(
            BackboneConfig("mobilenetv2_035"),
            GuidanceConfig(channels=32, blocks=1, bridge_heads=2, text_heads=2, expansion=2, pad="ceil"),
            HeadConfig(16, 16),
        ),
        text=TextConfig(source="hash", width=16),
        data=DataConfig(dataset=str(data / "dataset.yaml"), scale=(96, 80), crop=(64, 64), workers=0),
        optim=OptimConfig(lr=1e-3, warmup=2, clip=1.0),
        train=TrainConfig(steps=6, batch=4, log_every=2, save_every=2, eval_every=0, keep=2),
        eval=EvalConfig(scale=(96, 80)),
    )
    for key, value in overrides.items():
        recipe = _replace(recipe, key.split("__"), value)
    return recipe


def _replace(config, path: list[str], value: object):
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: tuple(value) if isinstance(value, list) else value})


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, byte for byte."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) >= 3 and names == sorted(path.name for path in other.glob("*.safetensors"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def main(data: str, out: str, *settings: str) -> int:
    from fusekern.engine.train import Interrupted, train

    values = {key: json.loads(value) for key, value in (word.split("=", 1) for word in settings)}
    resume, init = values.pop("resume", None), values.pop("init", None)
    recipe = micro_recipe(Path(data), **{key.replace(".", "__"): value for key, value in values.items()})
    try:
        print("last checkpoint:", train(recipe, out=out, resume=resume, init=init))
    except FusekernError as error:
        print(f"error: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
