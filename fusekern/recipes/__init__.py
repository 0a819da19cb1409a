"""Recipes as YAML: found by name, checked key by key, overridden by dotted options.

>>> from fusekern import recipes
>>> recipe = recipes.load("demo", "--train.steps", "10")
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, Namespace

from fusekern.config import EvalConfig, Recipe
from fusekern.errors import FusekernError, did_you_mean

FOLDER = Path(__file__).parent

# Keys, what every number of their value must satisfy, and that in words. Seed, batch and learning rate are checked
# where they are used.
_RANGES = (
    (
        "model.guidance.channels model.guidance.bridge_heads model.guidance.text_heads model.guidance.expansion "
        "model.guidance.ffn_ratio model.head.neck_channels model.head.channels text.width data.scale data.crop "
        "train.steps train.keep eval.scale eval.crop eval.stride",
        lambda value: value >= 1,
        "1 or more",
    ),
    (
        "model.guidance.blocks model.guidance.aux_weight data.workers optim.weight_decay optim.backbone_lr_mult "
        "optim.warmup optim.power optim.min_lr train.log_every train.eval_every train.save_every",
        lambda value: value >= 0,
        "0 or more",
    ),
    ("model.guidance.aux_tau data.ratio data.std optim.clip eval.ratios", lambda value: value > 0, "above 0"),
    ("model.head.dropout optim.momentum", lambda value: 0 <= value < 1, "from 0 to below 1"),
    ("data.flip optim.warmup_ratio", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("data.cat_max_ratio", lambda value: 0 < value <= 1, "above 0 and up to 1"),
    ("train.ema", lambda value: 0 < value < 1, "above 0 and below 1"),
)


def names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = (path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml") if path.name != "dataset.yaml")
    return sorted(path.with_suffix("").as_posix() for path in files)


def find(name: str) -> Path:
    """Path of a recipe.

    Args:
        name: a name from ``names()`` or the path of a YAML file.

    Raises:
        FusekernError: neither; the message names the nearest recipe.
    """
    if name in names():
        return FOLDER / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise FusekernError(
        f"recipe {name!r} is neither a file nor one of {', '.join(names())}{did_you_mean(name, names())}"
    )


def check(recipe: Recipe) -> None:
    """Raises FusekernError, naming key, value and need, for a value out of range."""
    for keys, fits, need in _RANGES:
        for key in keys.split():
            value = recipe
            for name in key.split("."):
                value = getattr(value, name)
            parts = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(fits(part) for part in parts):
                raise FusekernError(f"{key} is {value}; it must be {need}")
    low, high = recipe.data.ratio
    if low > high:
        raise FusekernError(f"data.ratio is {recipe.data.ratio}; the first must not be above the second")


def is_recipe(name: str) -> bool:
    """Whether ``name`` is a recipe: one of the package, or a YAML file without the ``names`` of a data set's."""
    if name in names():
        return True
    if not Path(name).is_file():
        return False
    values = _read(Path(name))
    return isinstance(values, dict) and "names" not in values


def load(name: str, *overrides: str) -> Recipe:
    """A recipe with dotted overrides, such as ``load("demo", "--train.steps", "10")``.

    Raises:
        FusekernError: unknown recipe, unknown key, or a value of the wrong type or out of range.
    """
    return parse(recipe_parser(), [name, *overrides])[1]


def eval_parser(**options: str) -> ArgumentParser:
    """A parser for ``RUN|CHECKPOINT`` and the keys of ``eval``; a verb adds its own options."""
    parser = ArgumentParser(exit_on_error=False, **options)
    parser.add_argument(
        "checkpoint", metavar="RUN|CHECKPOINT", help="a run folder (its last checkpoint) or a checkpoint"
    )
    parser.add_class_arguments(EvalConfig, "eval")
    return parser


def parse_eval(parser: ArgumentParser, argv: Sequence[str], recipe: Recipe) -> tuple[Namespace, EvalConfig]:
    """Reads a command line over the ``eval`` keys of a checkpoint's recipe.

    Returns:
        The verb's own options, and the test protocol.

    Raises:
        FusekernError: unknown key, or a value of the wrong type or out of range.
    """
    parser.set_defaults({f"eval.{key}": value for key, value in to_dict(recipe)["eval"].items()})
    options = parser.instantiate(parse_options(parser, argv))
    config = options.pop("eval")
    check(dataclasses.replace(recipe, eval=config))
    return options, config


def recipe_parser(**options: str) -> ArgumentParser:
    """A parser for ``RECIPE`` and every dotted key of it; a verb adds its own options."""
    parser = ArgumentParser(exit_on_error=False, **options)
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(names())}, or a YAML file")
    parser.add_class_arguments(Recipe, as_group=False)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, Recipe]:
    """Reads a command line: the recipe's file first, then the dotted options over it.

    Returns:
        The verb's own options, and the recipe.

    Raises:
        FusekernError: as ``load``.
    """
    path = find(parse_options(parser, argv).recipe)
    _check_keys(path)
    parser.default_config_files = [glob.escape(str(path))]
    try:
        options = parser.instantiate(parse_options(parser, argv))
    except FusekernError as error:
        raise FusekernError(f"{path.name}: {error}") from None
    recipe = Recipe(**{field.name: options.pop(field.name) for field in dataclasses.fields(Recipe)})
    check(recipe)
    return options, recipe


def parse_options(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """``parser.parse_args`` whose errors are FusekernErrors that name the nearest right option."""
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        option = word.split("=", 1)[0]
        if option.startswith("--") and option not in known:
            raise FusekernError(f"unknown option {option}{did_you_mean(option, known)}")
    try:
        return parser.parse_args(list(argv))
    except Exception as error:  # jsonargparse raises several types, argparse one more
        raise FusekernError(_as_in_usage(str(error), parser)) from None


def _as_in_usage(message: str, parser: ArgumentParser) -> str:
    """jsonargparse calls missing arguments by their keys; users know them by what the usage calls them."""
    text, colon, missing = message.partition("are required: ")
    if not colon:
        return message
    called = {action.dest: (*action.option_strings, action.metavar)[0] for action in parser._actions}
    return text + colon + ", ".join(called.get(key, key) for key in missing.split(", "))


def to_dict(recipe: Recipe) -> dict:
    """The recipe as plain YAML-able values."""
    return _plain(dataclasses.asdict(recipe))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every key of it."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, default_flow_style=None)


def from_dict(values: dict) -> Recipe:
    """The inverse of ``to_dict``.

    Raises:
        FusekernError: unknown key or a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, as_group=False)
    try:
        return Recipe(**parser.instantiate(parser.parse_object(values)))
    except Exception as error:  # as above
        raise FusekernError(f"not a recipe of this version: {error}") from None


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FusekernError(f"{path}: cannot be read as YAML: {error}") from None


def _check_keys(path: Path) -> None:
    values = _read(path)
    if not isinstance(values, dict):
        raise FusekernError(f"{path}: found {type(values).__name__}, a recipe is a mapping of keys to values")
    if "names" in values:
        raise FusekernError(f"{path} is a data set, not a recipe: give it as --data.dataset beside a recipe")
    known = list(_keys(Recipe))
    for key in _given(values):
        if key not in known:
            raise FusekernError(f"{path}: unknown key {key}{did_you_mean(key, known)}")


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        yield key
        if dataclasses.is_dataclass(field.default_factory):
            yield from _keys(field.default_factory, key + ".")


def _given(values: dict, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _given(value, f"{prefix}{name}.")
