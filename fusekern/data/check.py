"""Looks at every file of a data set before a training run does, and goes on after a bad one."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fusekern import viz
from fusekern.data.folder import (
    NotSingleChannel,
    describe_sizes,
    label_path,
    list_images,
    read_image,
    read_label_values,
)
from fusekern.data.spec import DatasetSpec, Split, count_values, data_root
from fusekern.errors import FusekernError

PANELS = 4  # of each split in the contact sheet
_LONGEST = 480  # pixels of a panel's side
_LISTED = 10  # files of one kind in the rendered report
_SURPLUS = "label without an image"  # is told, and hinders nobody


def check_data(spec: DatasetSpec, root: str | Path | None, out: Path) -> dict:
    """Decode every image and label of both splits.

    Args:
        spec: the data set.
        root: folder of the data; None for the description's own.
        out: PNG to write: images beside their overlays, with the names of the classes.

    Returns:
        a dictionary of plain values: ``dataset``, ``root``, ``ok`` (no split has a problem but surplus labels),
        ``classes`` (names), ``first_id`` (label value of the first class), ``void`` (ignored label values),
        ``contact_sheet`` (its path, or None if there was nothing to show) and ``splits``. A split has ``images`` and
        ``labels`` (numbers of files), ``values`` (label value -> pixels, and files that have it), ``absent`` (classes
        without a pixel) and ``problems`` (kind -> messages, one a file).

    Raises:
        FusekernError: there is no root folder to look into, or ``out`` cannot be written.
    """
    folder = data_root(spec, root)
    _check_writable(out)
    splits, panels = {}, []
    for name, split in (("train", spec.train), ("val", spec.val)):
        if split is not None:
            splits[name], pairs = _check_split(spec, folder, name, split)
            chosen = np.unique(np.linspace(0, len(pairs) - 1, PANELS).astype(int)) if pairs else []
            panels += [(f"{name} {pairs[k][0]}", _panel(spec, *pairs[k][1:])) for k in chosen]
    if panels:
        captions, pictures = zip(*panels, strict=True)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            viz.contact_sheet(pictures, 2, out, captions)
        except OSError as error:
            raise FusekernError(f"{out}: cannot write the contact sheet: {error}") from error
    return {
        "dataset": spec.name,
        "root": str(folder),
        "ok": not any(set(split["problems"]) - {_SURPLUS} for split in splits.values()),
        "classes": list(spec.names),
        "first_id": spec.ids.start,
        "void": list(spec.void),
        "contact_sheet": str(out) if panels else None,
        "splits": splits,
    }


def _check_writable(out: Path) -> None:
    """Before the work, not after it."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise FusekernError(f"--out must be a PNG file, found {out}")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise FusekernError(f"{out}: cannot write the contact sheet: {folder} is no folder that can be written")


def render(report: dict) -> str:
    """The report as text: a table of label values, then what is absent, then what is wrong."""
    lines = [f"{report['dataset']} in {report['root']}: {len(report['classes'])} classes", ""]
    splits = report["splits"]
    first, names = report["first_id"], report["classes"]
    meaning = {value: "(ignored)" for value in report["void"]} | {first + k: name for k, name in enumerate(names)}
    seen = {value for split in splits.values() for value in split["values"]}
    shown = sorted(set(meaning) - {value for value in report["void"] if value not in seen} | seen)
    width = max(len(text) for text in [*meaning.values(), "OUT OF RANGE"])
    lines.append(
        f"{'value':>7}  {'class':<{width}}" + "".join(f"  {name + ' pixels':>12}  {'files':>6}" for name in splits)
    )
    for value in shown:
        row = f"{value:>7}  {meaning.get(value, 'OUT OF RANGE'):<{width}}"
        for split in splits.values():
            total = sum(pixels for pixels, _ in split["values"].values())
            pixels, files = split["values"].get(value, (0, 0))
            row += f"  {100 * pixels / max(total, 1):>10.3f} %  {files:>6}"
        lines.append(row)
    lines.append("")
    for name, split in splits.items():
        count = sum(len(messages) for kind, messages in split["problems"].items() if kind != _SURPLUS)
        lines.append(f"{name}: {split['images']} images, {split['labels']} labels, {count or 'no'} problems")
        if split["absent"]:
            lines.append(f"  no pixel of: {', '.join(split['absent'])}")
        for kind, messages in split["problems"].items():
            lines.append(f"  {kind} ({len(messages)}):")
            lines += [f"    {message}" for message in messages[:_LISTED]]
            if len(messages) > _LISTED:
                lines.append(f"    and {len(messages) - _LISTED} more")
    if report["contact_sheet"]:
        lines += ["", f"overlays: {report['contact_sheet']}"]
    return "\n".join(lines)


def _check_split(spec: DatasetSpec, root: Path, name: str, split: Split) -> tuple[dict, list[tuple[str, Path, Path]]]:
    """The report of a split, and name, image and label of each good pair."""
    problems: dict[str, list[str]] = defaultdict(list)
    try:
        images = list_images(root, split)
    except FusekernError as error:
        images = {}
        problems["images"].append(str(error))
    labels = {stem: label_path(root, split, stem) for stem in images}
    for label in sorted(_existing_labels(root, split) - set(labels.values()) - _labels_of_others(spec, root, split)):
        problems[_SURPLUS].append(str(label))
    pixels, files, good = defaultdict(int), defaultdict(int), []
    for stem, image in tqdm(images.items(), name, leave=False, disable=None):
        before = sum(map(len, problems.values()))
        size = None
        try:
            size = tuple(read_image(image).shape[1:])
        except FusekernError as error:
            problems["unreadable image"].append(str(error))
        if not labels[stem].is_file():
            problems["image without its label"].append(f"{image} needs {labels[stem]}")
            continue
        try:
            values = read_label_values(labels[stem])
        except FusekernError as error:
            kind = "label of several channels" if isinstance(error, NotSingleChannel) else "unreadable label"
            problems[kind].append(str(error))
            continue
        if size is not None and values.shape != size:
            problems["label of another size"].append(describe_sizes(image, size, labels[stem], values.shape))
        for value, count in count_values(values).items():
            pixels[value] += count
            files[value] += 1
        try:
            spec.to_train(values, labels[stem])
        except FusekernError as error:
            problems["label value out of range"].append(str(error))
        if before == sum(map(len, problems.values())):
            good.append((stem, image, labels[stem]))
    report = {
        "images": len(images),
        "labels": sum(label.is_file() for label in labels.values()),
        "values": {value: (pixels[value], files[value]) for value in sorted(pixels)},
        "absent": [text for value, text in zip(spec.ids, spec.names, strict=True) if not pixels[value]],
        "problems": dict(problems),
    }
    return report, good


def _labels_of_others(spec: DatasetSpec, root: Path, split: Split) -> set[Path]:
    """Of the images of the other split, which may have its labels in the same folder."""
    try:
        others = [other for other in (spec.train, spec.val) if other is not None and other is not split]
        return {label_path(root, other, stem) for other in others for stem in list_images(root, other)}
    except FusekernError:
        return set()  # it is told where that split is looked at


def _existing_labels(root: Path, split: Split) -> set[Path]:
    nested = set(split.images.rpartition("/")[0]) & set("*?[")
    pattern = split.labels.replace("{stem}", "**/*" if nested else "*")
    return {root / file for file in glob.glob(pattern, root_dir=root, recursive=True) if (root / file).is_file()}


def _panel(spec: DatasetSpec, image_path: Path, label_path: Path) -> np.ndarray:
    """Image and overlay side by side, with the legend of the classes in it."""
    image = read_image(image_path).permute(1, 2, 0).numpy()
    label = spec.to_train(read_label_values(label_path), label_path)
    factor = min(_LONGEST / max(label.shape), 1)
    size = max(round(label.shape[1] * factor), 1), max(round(label.shape[0] * factor), 1)
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    both = np.concatenate([image, viz.overlay(image, label, spec.palette, alpha=0.6)], axis=1)
    return viz.with_legend(both, spec.names, spec.palette, [k for k in count_values(label) if k < len(spec.names)])
