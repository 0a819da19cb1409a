"""A run of a few steps with a tiny recipe, as a process of its own: `python run_training.py DATA OUT [KEY=VALUE ...]`.

Keys are those of a recipe, dotted, with JSON values, and `resume` and `init`. Errors end it with code 2, as on the
command line, an interrupted run with code 130.
"""

import dataclasses
import json
import sys
from pathlib import Path

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
