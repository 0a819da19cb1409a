"""The run folder: config.yaml, metrics.jsonl, log, tensorboard/ and checkpoints/; written by rank 0 alone."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

import yaml
from tqdm import tqdm

from fusekern import recipes
from fusekern.config import Recipe
from fusekern.engine import checkpoint as checkpoints
from fusekern.errors import FusekernError


def choose_start(out: Path, recipe: Recipe, resume: str | None) -> Path | None:
    """What a run in ``out`` starts from; nothing is written.

    Args:
        out: run folder, existing or not.
        recipe: the recipe of this run.
        resume: None, ``auto``, or the path of a checkpoint.

    Returns:
        The checkpoint's folder, or None for the beginning.

    Raises:
        FusekernError: the folder is not empty and ``resume`` is not given, or it is not this recipe's run folder.
    """
    if out.exists() and not out.is_dir():
        raise FusekernError(f"{out} is a file; the run folder cannot be made")
    found = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")) if out.exists() else []
    if resume is None:
        if found:
            raise FusekernError(
                f"{out} is not empty (it holds {', '.join(found[:5])}): go on with --resume auto, or name another --out"
            )
        return None
    if resume != "auto":
        start = checkpoints.resolve(resume)
        last = checkpoints.find(out)
        if found and start.resolve().parent != (out / "checkpoints").resolve():
            raise FusekernError(f"{out} holds another run than {start}: name the checkpoint's own folder or a new one")
        if last is not None and last.name != start.name:
            raise FusekernError(
                f"{start} is not the last checkpoint of {out}: remove {last.name} or name another --out"
            )
        return start
    if not found:
        return None
    config = out / "config.yaml"
    if not config.is_file():
        raise FusekernError(f"{out} is not a run folder (no config.yaml; it holds {', '.join(found[:5])})")
    start = checkpoints.find(out)
    if start is None:
        try:
            saved = yaml.safe_load(config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FusekernError(f"{config} is damaged: {error}") from None
        refuse_differences(saved, recipe, str(config))
    return start


def refuse_differences(saved: dict, recipe: Recipe, source: str) -> None:
    """Raises FusekernError, listing them, if two recipes differ in what alters training.

    Args:
        saved: a recipe as ``recipes.to_dict`` gives it.
        recipe: the recipe of this run.
        source: what ``saved`` is from, for the message.
    """
    differences = list(_differences(saved, recipes.to_dict(recipe), recipe, ""))
    if differences:
        raise FusekernError(
            f"{source} is from another recipe, and resuming it would not be the run that either describes: "
            + "; ".join(differences)
        )


def _differences(saved: object, now: dict, config: object, prefix: str) -> Iterator[str]:
    saved = saved if isinstance(saved, dict) else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        old = saved.get(field.name, "nothing")
        if dataclasses.is_dataclass(value):
            yield from _differences(old, now[field.name], value, f"{prefix}{field.name}.")
        elif not field.metadata.get("resume") and old != now[field.name]:
            yield f"{prefix}{field.name}: {old} in the checkpoint, {now[field.name]} now"


@contextmanager
def open_run(out: Path, recipe: Recipe, step: int, early: MemoryHandler) -> Iterator[None]:
    """Makes ``out`` this process's run folder, as it was after ``step`` steps, until the block ends.

    Args:
        out: run folder.
        recipe: what config.yaml gets, in a new folder.
        step: steps taken before.
        early: what was logged before there was a file for it.

    Raises:
        FusekernError: another process trains in it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 - held until the end
    except OSError as error:
        raise FusekernError(f"the run folder {out} cannot be made: {error}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it however this process ends
        except BlockingIOError:
            raise FusekernError(f"another process is training in {out}") from None
        checkpoints.sweep(out)
        if not (out / "config.yaml").exists():
            _replace(out / "config.yaml", recipes.dump(recipe))
        _forget_after(out / "metrics.jsonl", step)
        with _log_file(out / "log", early):
            yield


def append_metrics(out: Path, record: dict) -> None:
    """Adds one line to metrics.jsonl; a number that is not finite, which JSON lacks, becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(finite) + "\n")


@contextmanager
def console_log(*, visible: bool) -> Iterator[MemoryHandler]:
    """Shows fusekern's log on standard error, unless the caller's own logging does; only warnings beside a bar.

    Args:
        visible: false for all ranks but 0.

    Yields:
        a handler that collects what is logged until ``open_run`` has a file for it.
    """
    logger = logging.getLogger("fusekern")
    early = MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL)
    handler = _Console() if visible else logging.NullHandler()
    handler.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    taken, level, propagate = logger.hasHandlers(), logger.level, logger.propagate
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    logger.propagate = propagate and visible
    if not taken or not visible:
        logger.addHandler(handler)
    logger.addHandler(early)
    try:
        yield early
    finally:
        logger.removeHandler(handler)
        logger.removeHandler(early)
        logger.setLevel(level)
        logger.propagate = propagate


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)  # above the bar, where there is one


@contextmanager
def _log_file(path: Path, early: MemoryHandler) -> Iterator[None]:
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fusekern")
    logger.removeHandler(early)
    early.setTarget(handler)
    early.flush()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and one that a kill has cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
