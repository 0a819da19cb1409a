"""Evaluation: the test protocol, the loop over a data set, and the report on a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from fusekern import viz
from fusekern._version import __version__
from fusekern.config import EvalConfig
from fusekern.data.folder import SegmentationFolder
from fusekern.data.spec import load_spec
from fusekern.engine.checkpoint import resolve
from fusekern.engine.histogram import histogram_baseline
from fusekern.engine.metrics import ConfusionMatrix
from fusekern.engine.predict import load_for_test, predict_label
from fusekern.errors import FusekernError

_WEIGHTS = {"ema": "EMA weights", "model": "weights as trained (not EMA)"}


def evaluate_checkpoint(
    path: str | Path,
    *,
    config: EvalConfig | None = None,
    root: str | None = None,
    out: Path | None = None,
    split: str = "val",
    baseline: bool = False,
    dataset: str | None = None,
) -> dict:
    """Evaluate a checkpoint; under torchrun the processes share the images.

    The first process prints the report and writes ``results.json``, ``per_class.csv``, ``confusion.csv`` (pixel counts)
    and ``confusion.png``.

    Args:
        path: checkpoint, or run folder for its last one.
        config: test protocol; default: that of the checkpoint's recipe.
        root: folder of the data; default: that of the recipe, or of ``dataset``.
        out: report folder, made where it is missing; default: ``path/eval``, for another data set or the train split
            with their names behind it.
        split: ``train`` or ``val``.
        baseline: also score the classifier that sees only each pixel's colour.
        dataset: name or YAML of another data set with as many classes; default: the checkpoint's own.

    Returns:
        The contents of ``results.json``; the baseline in the first process alone.

    Raises:
        FusekernError: a checkpoint or data that cannot be used, or data with another number or order of classes; of
            classes with other names it is said.
    """
    # Without cpu=True accelerate ignores torchrun where there is no GPU: each process would count every image.
    state = PartialState(cpu=not torch.cuda.is_available())
    checkpoint = resolve(path)
    loaded, config = load_for_test(checkpoint, config, state.device)
    spec = load_spec(dataset) if dataset else loaded.spec
    if len(spec.names) != len(loaded.spec.names):
        raise FusekernError(
            f"{checkpoint}: made for {len(loaded.spec.names)} classes, but the data set {spec.name!r} has "
            f"{len(spec.names)}; they must be equal"
        )
    known = list(loaded.spec.names)
    moved = [name for k, name in enumerate(spec.names) if name in known and known[k] != name]
    if moved:
        raise FusekernError(
            f"{checkpoint}: its classes stand in another order than those of the data set {spec.name!r}: {moved[0]!r} "
            f"is class {known.index(moved[0])} of the checkpoint and {spec.names.index(moved[0])} of the data set"
        )
    renamed = [f"{new!r} was {old!r}" for old, new in zip(known, spec.names, strict=True) if old != new]
    if root is None and dataset is None:
        root = loaded.recipe.data.root
    folder = SegmentationFolder(spec, split, root)
    train = SegmentationFolder(spec, "train", root) if baseline else None
    world, rank = state.num_processes, state.process_index
    out = out or Path(path) / _folder_name(spec.name if dataset else "", split)
    if state.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)  # if it cannot be made, better now than after the evaluation
        except OSError as error:
            raise FusekernError(f"--out must be a folder that can be written: {error}") from error
    matrix = evaluate(loaded.model, folder, config, device=state.device, rank=rank, world=world)
    # Hashed names are random vectors that carry no meaning: no score of theirs goes without saying so.
    note = "no language prior" if loaded.text_source and not loaded.language_prior else ""
    report = {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "weights": loaded.weights_used,
        "dataset": spec.name,
        "split": split,
        "images": len(folder),
        "protocol": {key: value for key, value in dataclasses.asdict(config).items() if key != "weights"},
        "text": loaded.text_source,
        "language_prior": loaded.language_prior,
        "note": note,
        **matrix.to_dict(spec.names),
        "versions": {"fusekern": __version__, "torch": torch.__version__, "timm": version("timm")},
        "processes": world,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if state.is_main_process:
        lines = [describe(report), "", matrix.table(spec.names, note)]
        if renamed:
            lines.insert(1, f"{len(renamed)} classes had other names in training: {', '.join(renamed[:5])}")
        if train is not None:
            colour = histogram_baseline(train, folder, len(spec.names))
            report["baseline"] = colour.to_dict(spec.names)
            lines.append(
                f"colour alone    {100 * colour.miou:6.2f}  mIoU, pixel accuracy {100 * colour.accuracy:.2f} "
                "(a classifier that sees each pixel's RGB and nothing else)"
            )
        print("\n".join(lines))
        (out / "results.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        matrix.write_csv(out / "per_class.csv", spec.names, note)
        matrix.write_counts_csv(out / "confusion.csv", spec.names)
        title = f"{spec.name} {split}, step {loaded.step}, {_WEIGHTS[loaded.weights_used]}" + (note and f", {note}")
        viz.confusion_png(matrix.counts.cpu().numpy(), spec.names, out / "confusion.png", title)
        print(f"\nresults.json, per_class.csv, confusion.csv and confusion.png in {out}")
    return report


def _folder_name(dataset: str, split: str) -> str:
    parts = ["eval", re.sub(r"[^\w.-]+", "-", dataset), "" if split == "val" else split]
    return "-".join(filter(None, parts))


def describe(report: dict) -> str:
    """What was evaluated and how, for people, of the contents of ``results.json``."""
    protocol = report["protocol"]
    windows = "windows of {}x{} every {}x{} pixels".format(*protocol["crop"], *protocol["stride"])
    test = [
        windows if protocol["mode"] == "slide" else "whole image",
        "fitted into {}x{}".format(*protocol["scale"]),
        "times " + ", ".join(map(str, protocol["ratios"])),
        "flip" if protocol["flip"] else "no flip",
        protocol["precision"],
    ]
    text = report["text"] or "none"
    return "\n".join(
        [
            f"checkpoint  {report['checkpoint']}, step {report['step']}, {_WEIGHTS[report['weights']]}",
            f"data        {report['dataset']}, {report['split']}, {report['images']} images",
            f"protocol    {', '.join(test)}",
            f"text        {text}" + (f" ({report['note']})" if report["note"] and report["note"] not in text else ""),
        ]
    )


def evaluate(
    model: nn.Module,
    folder: SegmentationFolder,
    config: EvalConfig,
    *,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> ConfusionMatrix:
    """Count a model's predictions on a data set; the labels are never resized.

    Process ``rank`` takes the samples rank, rank + world, ...: none twice, none padded, and the processes meet in one
    all-reduce at the end. The modules' training flags are as before afterwards, and no random number is drawn.

    Args:
        model: maps an image [B, 3, H, W] in [0, 1] to an output with ``.logits`` [B, K, h, w]; not wrapped in DDP,
            whose forward synchronises buffers.
        folder: data set.
        config: test protocol.
        device: where the model is.
        rank: this process.
        world: number of processes.
        stop: asked before each image; once true, this process counts no more.

    Returns:
        The confusion matrix over the whole data set, in every process; unless stopped.

    Raises:
        FusekernError: a protocol that cannot be followed.
        ValueError: a class that the data set lacks is predicted.
    """
    matrix = ConfusionMatrix(len(folder.spec.names), device)
    indices = range(rank, len(folder), world)
    with _eval_mode(model):
        for index in tqdm(indices, "evaluate", leave=False, disable=None if rank == 0 else True):
            if stop():
                break
            sample = folder[index]
            matrix.update(predict_label(model, sample.image, config, device=device), sample.label)
    if world > 1:
        matrix.all_reduce()
    return matrix


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
