"""Checkpoints: a folder of safetensors files and one JSON file, no pickle in either direction.

``RUN/checkpoints/step-00000100/`` holds ``model.safetensors``, ``ema.safetensors`` (with ``train.ema``),
``optimizer.safetensors`` (``PARAMETER::exp_avg``), ``rng.safetensors`` (``rank0.cpu``) and ``state.json`` (the recipe,
the classes and all else that is no tensor). A folder is written under a temporary name and renamed when it is on the
disk, so whatever is called ``step-...`` is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from fusekern import recipes
from fusekern.config import Recipe
from fusekern.data.spec import DatasetSpec, Split
from fusekern.errors import FusekernError
from fusekern.models.pickles import refuse_pickle
from fusekern.models.segmenter import Segmenter, build_segmenter

FORMAT = 1
STATE = "state.json"
REQUIRED = (STATE, "model.safetensors", "optimizer.safetensors", "rng.safetensors")
OPTIONAL = ("ema.safetensors",)

_FOLDER = re.compile(r"step-(\d{8})")
_KEYS = (
    *("step", "world", "device", "threads", "versions", "recipe", "backbone_mult"),
    *("dataset", "images", "text", "score", "scaler"),
)
_CLASSIFIER = "head.classifier.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, its tensors on the CPU. ``ema`` is None where the run keeps no moving average."""

    path: Path
    state: dict
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]


@dataclass(frozen=True)
class LoadedSegmenter:
    """A trained segmenter in eval mode, and where it comes from.

    ``weights_used`` is ``model`` or ``ema``; ``text_source`` is None without guidance; ``language_prior`` says whether
    the embeddings of the class names carry meaning.
    """

    model: Segmenter
    recipe: Recipe
    spec: DatasetSpec
    step: int
    weights_used: str
    text_source: str | None
    language_prior: bool


def save(run: Path, step: int, *, state: dict, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> Path:
    """Writes the checkpoint of one step and deletes all but the last ``keep``.

    Args:
        run: run folder.
        step: optimizer steps taken.
        state: what goes into ``state.json``.
        tensors: tensors by name, by file (``model``, ``optimizer``, ...), on any device, in any memory format.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        FusekernError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final = folder_of(run, step)
    folder = final.parent
    temporary = folder / f".tmp-{final.name}"
    try:
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            flat = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            _write(temporary / f"{name}.safetensors", tensors_to_bytes(flat))
        _write(temporary / STATE, json.dumps({"format": FORMAT, "step": step, **state}, indent=1).encode())
        _to_disk(temporary)
        temporary.rename(final)
        _to_disk(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = find(run)
        reason = f"no space left ({error})" if is_disk_full(error) else str(error)
        kept = f"{last.name} before it is whole: go on from there with --resume auto" if last else "none is saved yet"
        raise FusekernError(f"step {step} could not be saved in {folder}: {reason}; {kept}") from error
    for old in _complete(run)[:-keep]:
        doomed = old.with_name(f".old-{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return final


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def is_disk_full(error: OSError) -> bool:
    """Whether there was no room left, or a quota or a size limit stood in the way."""
    return error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def set_score(folder: Path, score: dict) -> None:
    """Puts the score of a checkpoint's weights, known after they are safe, into its ``state.json``."""
    state = {**json.loads((folder / STATE).read_text()), "score": score}
    temporary = folder / f".{STATE}"
    _write(temporary, json.dumps(state, indent=1).encode())
    temporary.replace(folder / STATE)


def find(run: Path) -> Path | None:
    """The run folder's last complete checkpoint, or None."""
    return next(reversed(_complete(run)), None)


def sweep(run: Path) -> None:
    """Removes what a killed run has left of checkpoints half written or half deleted."""
    for leftover in [*run.glob("checkpoints/.tmp-*"), *run.glob("checkpoints/.old-*")]:
        shutil.rmtree(leftover)


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the last one of a run folder.

    Raises:
        FusekernError: neither; the message says what was found.
    """
    path = Path(path)
    if path.is_file():
        refuse_pickle(path)
        inside = f"; {path.parent} is one" if (path.parent / STATE).is_file() else ""
        raise FusekernError(f"{path} is a file, not a run folder or a checkpoint folder{inside}")
    if not path.is_dir():
        raise FusekernError(f"{path}: no such folder; a run folder or a checkpoint folder is needed")
    if _FOLDER.fullmatch(path.name) or (path / STATE).is_file():
        return path
    if last := find(path):
        return last
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise FusekernError(f"{path} holds no checkpoint: found {found}; looked for checkpoints/step-*")


def read(path: Path, needed: Collection[str] = REQUIRED) -> dict[str, bytes]:
    """The files of a checkpoint folder, unread; ``decode`` makes a Checkpoint of them.

    Args:
        path: checkpoint folder.
        needed: files that must be there; of the others, the moving average is read too.

    Raises:
        FusekernError: a file is missing or cannot be read.
    """
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        raise FusekernError(f"{path} is no whole checkpoint: it lacks {', '.join(missing)}")
    return {name: (path / name).read_bytes() for name in (*needed, *OPTIONAL) if (path / name).is_file()}


def decode(files: Mapping[str, bytes], path: Path) -> Checkpoint:
    """Makes a Checkpoint of the files that ``read`` found in ``path``.

    Raises:
        FusekernError: a file is cut short or damaged, or of another format.
    """
    state = _parse_state(files[STATE], path / STATE)
    tensors = {
        Path(name).stem: parse_tensors(data, path / name)
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(path, state, **{"ema": None, "optimizer": {}, "rng": {}, **tensors})


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint; ``path`` as in ``resolve``.

    Raises:
        FusekernError: as ``resolve``, ``read`` and ``decode``.
    """
    folder = resolve(path)
    return decode(read(folder), folder)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a checkpoint; ``path`` as in ``resolve``.

    Raises:
        FusekernError: as ``resolve`` and ``decode``.
    """
    file = resolve(path) / STATE
    if not file.is_file():
        raise FusekernError(f"{file.parent} is no whole checkpoint: it lacks {STATE}")
    return recipes.from_dict(_parse_state(file.read_bytes(), file)["recipe"])


def load_segmenter(
    path: str | Path, weights: str = "auto", device: str | torch.device = "cpu", backend: str = "trained"
) -> LoadedSegmenter:
    """Rebuilds a trained segmenter from a checkpoint's ``state.json`` and weights: no data set, no text tower.

    Args:
        path: run folder or checkpoint folder.
        weights: ``model``, ``ema``, or ``auto`` for the moving average where there is one.
        device: where the model goes.
        backend: of the fusion layer's ops, ``trained`` for that of the checkpoint's recipe.

    Raises:
        FusekernError: as ``load``; the checkpoint has no moving average; its weights are not its recipe's.
    """
    folder = resolve(path)
    checkpoint = decode(read(folder, (STATE, "model.safetensors")), folder)
    if weights == "ema" and checkpoint.ema is None:
        raise FusekernError(f"{checkpoint.path} has no moving average (train.ema was off); use --eval.weights model")
    used = "model" if weights == "model" or checkpoint.ema is None else "ema"
    tensors = checkpoint.model if used == "model" else checkpoint.ema
    recipe = recipes.from_dict(checkpoint.state["recipe"])
    spec = spec_from_dict(checkpoint.state["dataset"])
    model = rebuild(recipe, len(spec.names), tensors, backend)
    load_weights(model, tensors, checkpoint.path / f"{used}.safetensors")
    text = checkpoint.state["text"]
    return LoadedSegmenter(
        model=model.to(device).eval(),
        recipe=recipe,
        spec=spec,
        step=checkpoint.state["step"],
        weights_used=used,
        text_source=text and text["source"],
        language_prior=bool(text and text["language_prior"]),
    )


def rebuild(recipe: Recipe, classes: int, tensors: Mapping[str, Tensor], backend: str = "trained") -> Segmenter:
    """The recipe's segmenter around the text embeddings among ``tensors``, its backbone without pretrained weights."""
    backbone = dataclasses.replace(recipe.model.backbone, weights="none")
    guidance = recipe.model.guidance
    if backend != "trained":
        guidance = dataclasses.replace(guidance, backend=backend)
    config = dataclasses.replace(recipe.model, backbone=backbone, guidance=guidance)
    return build_segmenter(config, recipe.data, classes, tensors.get("text"), seed=recipe.train.seed)


def read_weights(path: Path) -> tuple[Path, bytes]:
    """The safetensors file that ``--init`` means, and its contents; in a checkpoint or run folder it is the model's.

    Raises:
        FusekernError: no such file, or a pickle.
    """
    if path.is_dir():
        path = resolve(path) / "model.safetensors"
    if not path.is_file():
        raise FusekernError(f"{path}: no such file; a safetensors file, a checkpoint folder or a run folder is needed")
    refuse_pickle(path)
    return path, path.read_bytes()


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file's contents.

    Raises:
        FusekernError: cut short or damaged; the message names ``path``.
    """
    try:
        return tensors_from_bytes(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise FusekernError(f"{path} is cut short or damaged ({len(data)} bytes): {error}") from None


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: Path, *, skip: Collection[str] = ()) -> None:
    """Copies tensors into the model's parameters and buffers of the same names; every one must be there and fit.

    Args:
        model: changed in place.
        tensors: tensors by name.
        source: the file they are from, for messages.
        skip: names that the model keeps its own of.

    Raises:
        FusekernError: names or shapes differ; the message speaks of the number of classes where that is why.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in skip}
    given = {name: tensor for name, tensor in tensors.items() if name not in skip}
    faults = [f"{name} is missing in the file" for name in own if name not in given]
    faults += [f"{name} is not in the model" for name in given if name not in own]
    faults += [
        f"{name} is {list(given[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if faults:
        classes = ""
        if _CLASSIFIER in given and _CLASSIFIER in own and len(given[_CLASSIFIER]) != len(own[_CLASSIFIER]):
            classes = f"it is made for {len(given[_CLASSIFIER])} classes and the data set has {len(own[_CLASSIFIER])}; "
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise FusekernError(f"{source} does not fit the model: {classes}{'; '.join(faults[:6])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _parse_state(data: bytes, path: Path) -> dict:
    try:
        state = json.loads(data)
    except ValueError as error:
        raise FusekernError(f"{path} is cut short or damaged: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise FusekernError(f"{path}: found checkpoint format {found}, this version reads format {FORMAT}")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise FusekernError(f"{path} lacks {', '.join(missing)}")
    return state


def spec_to_dict(spec: DatasetSpec) -> dict:
    """The data set's description as JSON-able values."""
    values = dataclasses.asdict(spec)
    return {**values, "root": None if spec.root is None else str(spec.root)}


def spec_from_dict(values: dict) -> DatasetSpec:
    """The inverse of ``spec_to_dict``.

    Raises:
        FusekernError: a field is missing or unknown.
    """
    try:
        return DatasetSpec(
            **{
                **values,
                "names": tuple(values["names"]),
                "palette": tuple(tuple(colour) for colour in values["palette"]),
                "root": None if values["root"] is None else Path(values["root"]),
                "train": values["train"] and Split(**values["train"]),
                "val": values["val"] and Split(**values["val"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise FusekernError(f"the checkpoint's description of the data set is not of this version: {error}") from None


def _complete(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("checkpoints/step-*") if _FOLDER.fullmatch(path.name) and path.is_dir())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
