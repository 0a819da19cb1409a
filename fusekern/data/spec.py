"""Data set descriptions: where the files lie, what the classes are called, which label value means what."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusekern.config import IGNORE
from fusekern.errors import FusekernError, did_you_mean

_RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Split:
    """The files of one split, relative to the root of the data set.

    Args:
        images: glob, ``**`` for any depth. A ``{stem}`` in place of the last ``*`` says which part of the file name
            image and label share; without it, that is all but the extension.
        labels: path of an image's label; ``{stem}`` stands for the shared part, with the folders that ``**`` or ``*``
            passed through before it.
    """

    images: str
    labels: str


@dataclass(frozen=True)
class DatasetSpec:
    """A data set.

    Args:
        name: short name, for messages and reports.
        names: the K class names, at most 255; a class index is a place in this list.
        palette: K colours (red, green, blue), 0 to 255.
        root: folder of the data; None where the user must name it.
        train: training split, if there is one.
        val: validation split, if there is one.
        ignore_index: label value of pixels that count neither in training nor in evaluation.
        reduce_zero_label: label value 0 is ignored too, and k stands for class k - 1.
    """

    name: str
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    root: Path | None
    train: Split | None
    val: Split | None
    ignore_index: int = IGNORE
    reduce_zero_label: bool = False

    @property
    def ids(self) -> range:
        """Label values of the classes, in the order of ``names``."""
        return range(int(self.reduce_zero_label), int(self.reduce_zero_label) + len(self.names))

    @property
    def void(self) -> tuple[int, ...]:
        """Label values that are ignored."""
        return tuple(sorted({0, self.ignore_index})) if self.reduce_zero_label else (self.ignore_index,)

    def to_train(self, label: np.ndarray, source: str | Path) -> np.ndarray:
        """Class indices of a label as it is in its file.

        Args:
            label: integers [H, W], the data set's own values.
            source: file name for the message.

        Returns:
            uint8 [H, W], 0 to K - 1, and 255 where ignored.

        Raises:
            FusekernError: a value that is neither a class nor ignored.
        """
        values = count_values(label)
        strange = [value for value in values if value not in self.ids and value not in self.void]
        if strange:
            raise FusekernError(f"{source}: {self.describe_strange(strange)}")
        table = np.full(max(values, default=0) + 1, IGNORE, np.uint8)
        for value in set(values) - set(self.void):
            table[value] = value - self.ids.start
        return table[label]

    def to_ids(self, pred: np.ndarray) -> np.ndarray:
        """The data set's own label values of class indices, for files that its tools read.

        Args:
            pred: integers of any shape, 0 to K - 1, and 255 where ignored.

        Returns:
            uint8 (uint16 where ``ignore_index`` is above 255) of the same shape.
        """
        dtype = np.uint8 if self.ignore_index <= 255 else np.uint16
        table = np.full(256, self.void[0], dtype)
        table[: len(self.names)] = self.ids
        return table[np.asarray(pred)]

    def describe_strange(self, strange: list[int]) -> str:
        """What to say of label values that are neither a class nor ignored."""
        shown = ", ".join(map(str, strange[:10])) + (", ..." if len(strange) > 10 else "")
        text = (
            f"label values {shown} are out of range: {len(self.names)} classes have "
            f"{self.ids.start} to {self.ids.stop - 1}, and {' and '.join(map(str, self.void))} "
            f"{'are' if len(self.void) > 1 else 'is'} ignored"
        )
        if not self.reduce_zero_label and strange == [len(self.names)]:
            text += (
                "; is a name missing? Or are the classes numbered from 1, and 0 is what to ignore? Then set "
                "reduce_zero_label: true"
            )
        return text


def count_values(label: np.ndarray) -> dict[int, int]:
    """The values of a label, ascending, and how many pixels have each."""
    if label.dtype == np.uint8:  # several times as fast as sorting
        counts = np.bincount(label.ravel())
        return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    values, counts = np.unique(label, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def built_in_datasets() -> list[str]:
    """Names that ``load_spec`` knows."""
    return sorted(path.parent.name for path in _RECIPES.glob("*/dataset.yaml"))


def load_spec(dataset: str | Path) -> DatasetSpec:
    """Load the description of a data set.

    Args:
        dataset: name of a built-in one, or path of a YAML file.

    Raises:
        FusekernError: no such name or file, or the file is not as docs/custom-dataset.md describes it.
    """
    path = _RECIPES / str(dataset) / "dataset.yaml" if str(dataset) in built_in_datasets() else Path(dataset)
    if not path.is_file():
        raise FusekernError(
            f"data.dataset: {str(dataset)!r} is neither a built-in data set ({', '.join(built_in_datasets())}) "
            f"nor a YAML file{did_you_mean(str(dataset), built_in_datasets())}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FusekernError(f"{path}: cannot be read as YAML: {error}") from error
    return _Reader(path).spec(content)


def data_root(spec: DatasetSpec, root: str | Path | None = None) -> Path:
    """The folder of the data: ``root`` where given, else the description's own.

    Raises:
        FusekernError: neither names one, or it is not a folder.
    """
    folder = Path(root).expanduser() if root is not None else spec.root
    if folder is None:
        raise FusekernError(
            f"data.root is not set, and the data set {spec.name!r} does not say where its files lie: "
            f"pass --data.root FOLDER, such that FOLDER/{(spec.train or spec.val).images} are its images"
        )
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise FusekernError(
            f"data.root: {folder} {found}; the data set {spec.name!r} needs its images and labels there"
        )
    return folder


def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours for a data set without a palette: hues by the golden ratio, in three shades; no two equal up to 255."""
    shades = ((0.75, 0.95), (0.95, 0.6), (0.45, 0.8))
    colours = []
    for k in range(count):
        saturation, value = shades[k % 3]
        colours.append(tuple(round(255 * v) for v in colorsys.hsv_to_rgb(k * 0.618034 % 1, saturation, value)))
    return tuple(colours)


class _Reader:
    """Checks a YAML file key by key, so that each message names the file, the key and what it needs."""

    def __init__(self, path: Path):
        self.path = path

    def fail(self, text: str) -> FusekernError:
        return FusekernError(f"{self.path}: {text}")

    def keys(self, content: Any, known: tuple[str, ...], where: str = "") -> dict[str, Any]:
        if not isinstance(content, dict):
            raise self.fail(
                f"{where or 'the file'} must be a mapping with keys from {', '.join(known)}, found {content!r}"
            )
        for key in content:
            if key not in known:
                hint = did_you_mean(str(key), known) or f"; known are {', '.join(known)}"
                raise self.fail(f"unknown key {f'{where}.{key}' if where else str(key)!r}{hint}")
        return content

    def get(self, content: dict[str, Any], key: str, kind: type, default: Any, need: str) -> Any:
        value = content.get(key, default)
        # bool is an int in Python, never in a YAML file.
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise self.fail(f"{key} must be {need}, found {value!r}")
        return value

    def spec(self, content: Any) -> DatasetSpec:
        known = ("name", "root", "train", "val", "names", "palette", "ignore_index", "reduce_zero_label")
        content = self.keys(content, known)
        names = self.names(content.get("names"))
        root = self.get(content, "root", str, None, "the path of a folder")
        spec = DatasetSpec(
            name=self.get(content, "name", str, self.path.stem, "a text"),
            names=names,
            palette=self.palette(content.get("palette"), len(names)),
            root=None if root is None else (self.path.parent / Path(root).expanduser()).absolute(),
            train=self.split(content, "train"),
            val=self.split(content, "val"),
            ignore_index=self.get(content, "ignore_index", int, IGNORE, "a number"),
            reduce_zero_label=self.get(content, "reduce_zero_label", bool, False, "true or false"),
        )
        if spec.train is None and spec.val is None:
            raise self.fail("neither train nor val is there: a data set needs at least one split")
        if not 0 <= spec.ignore_index <= 65535:
            raise self.fail(f"ignore_index must be a label value from 0 to 65535, found {spec.ignore_index}")
        if spec.ignore_index in spec.ids:
            raise self.fail(
                f"ignore_index {spec.ignore_index} is also the label value of a class: "
                f"{len(names)} classes have {spec.ids.start} to {spec.ids.stop - 1}"
            )
        return spec

    def split(self, content: dict[str, Any], which: str) -> Split | None:
        if content.get(which) is None:
            return None
        part = self.keys(content[which], ("images", "labels"), which)
        for key in ("images", "labels"):
            if not isinstance(part.get(key), str):
                raise self.fail(f"{which}.{key} must be a path pattern relative to root, found {part.get(key)!r}")
        if part["labels"].count("{stem}") != 1 or "*" in part["labels"]:
            raise self.fail(f"{which}.labels must have {{stem}} once and no *, found {part['labels']!r}")
        folder, _, file = part["images"].rpartition("/")
        if "{stem}" in folder or file.count("{stem}") > 1 or ("{stem}" in file and set(file) & set("*?[")):
            raise self.fail(
                f"{which}.images may have {{stem}} once, in its last part and without a * beside it, "
                f"found {part['images']!r}"
            )
        return Split(part["images"], part["labels"])

    def names(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            file = self.path.parent / Path(value).expanduser()
            try:
                value = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise self.fail(f"names: cannot read {file}: {error}") from error
        if not isinstance(value, list) or not value:
            raise self.fail(
                f"names must be a list of class names, or the path of a file with one a line, found {value!r}"
            )
        for place, name in enumerate(value):
            if not isinstance(name, str) or not name.strip():
                raise self.fail(f"names[{place}] must be a text, found {name!r}; put it in quotes")
        value = [name.strip() for name in value]
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise self.fail(f"names has {twice[0]!r} twice: a class needs a name of its own")
        if len(value) > 255:
            raise self.fail(f"names has {len(value)} classes; there can be 255 at most")
        return tuple(value)

    def palette(self, value: Any, classes: int) -> tuple[tuple[int, int, int], ...]:
        if value is None:
            return distinct_colours(classes)
        if not isinstance(value, list) or len(value) != classes:
            found = f"{len(value)} colours" if isinstance(value, list) else repr(value)
            raise self.fail(f"palette must have a colour for each of the {classes} names, found {found}")
        for place, colour in enumerate(value):
            valid = isinstance(colour, list) and len(colour) == 3
            if not valid or not all(type(part) is int and 0 <= part <= 255 for part in colour):
                raise self.fail(f"palette[{place}] must be [red, green, blue], 0 to 255 each, found {colour!r}")
        return tuple(tuple(colour) for colour in value)
