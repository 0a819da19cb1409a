"""Images and their labels, read from folders."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fusekern.data.spec import DatasetSpec, Split, data_root
from fusekern.errors import FusekernError


class Sample(NamedTuple):
    """image uint8 [3, H, W], RGB; label uint8 [H, W], class indices, 255 = ignored; name without extension."""

    image: torch.Tensor
    label: torch.Tensor
    name: str


class SegmentationFolder(Dataset):
    """One split of a data set, in the order of the file names.

    Args:
        spec: the data set.
        split: ``train`` or ``val``.
        root: folder of the data; overrides the description's own.

    Attributes:
        pairs: image and label path of each sample.

    Raises:
        FusekernError: no such split, no root, no image, or an image without its label.
    """

    def __init__(self, spec: DatasetSpec, split: str, root: str | Path | None = None):
        patterns = {"train": spec.train, "val": spec.val}[split]
        if patterns is None:
            raise FusekernError(
                f"the data set {spec.name!r} has no split {split!r}: its YAML needs {split}: {{images, labels}}"
            )
        self.spec, self.root = spec, data_root(spec, root)
        images = list_images(self.root, patterns)
        self.names = list(images)
        self.pairs = [(image, label_path(self.root, patterns, name)) for name, image in images.items()]
        bare = [(image, label) for image, label in self.pairs if not label.is_file()]
        if bare:
            raise FusekernError(
                f"{len(bare)} of {len(self.pairs)} {split} images have no label; the first, {bare[0][0]}, "
                f"needs {bare[0][1]} ({split}.labels is {patterns.labels})"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_path, label_path = self.pairs[index]
        image, label = read_image(image_path), read_label(label_path, self.spec)
        if image.shape[1:] != label.shape:
            raise FusekernError(describe_sizes(image_path, tuple(image.shape[1:]), label_path, tuple(label.shape)))
        return Sample(image, label, self.names[index])


def read_image(path: str | Path) -> torch.Tensor:
    """Decode an image to uint8 [3, H, W], RGB, by the pixels as stored: labels are drawn on those, so EXIF is ignored.

    Raises:
        FusekernError: it does not decode, or has more than 8 bits a channel.
    """
    picture = _decode(path)
    if picture.mode.startswith("I") or picture.mode == "F":
        raise FusekernError(
            f"{path}: an image of mode {picture.mode}; 8 bits a channel are needed, such as an RGB JPEG or PNG"
        )
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_label(path: str | Path, spec: DatasetSpec) -> torch.Tensor:
    """Decode a label to uint8 [H, W]: class indices, 255 where ignored.

    Raises:
        FusekernError: it does not decode, has several channels, or a value that is neither a class nor ignored.
    """
    return torch.from_numpy(spec.to_train(read_label_values(path), path))


def read_label_values(path: str | Path) -> np.ndarray:
    """Decode a label to integers [H, W], the values as stored: palette indices of a palette PNG, else grey values.

    Raises:
        FusekernError: it does not decode, or is neither grey nor palette.
    """
    picture = _decode(path)
    if picture.mode not in ("1", "L", "P", "I", "I;16"):
        raise NotSingleChannel(
            f"{path}: a label of mode {picture.mode}; a single-channel or palette PNG of class ids is needed"
        )
    values = np.array(picture)
    if picture.mode == "1":
        return values.astype(np.uint8)
    if picture.format == "PNG" and picture.mode == "L":
        with open(path, "rb") as file:
            depth = file.read(25)[24]  # bits a pixel: Pillow stretches grey values of 2 and 4 bits to 0..255
        values //= 255 // (2**depth - 1)
    return values


class NotSingleChannel(FusekernError):
    """A label in RGB, or in another mode that holds no class ids."""


def list_images(root: Path, split: Split) -> dict[str, Path]:
    """The images of a split by name: the path below the fixed folders of the glob, without extension (see ``Split``).

    Raises:
        FusekernError: there is none, or two have one name and so would share a label.
    """
    parts = split.images.split("/")
    fixed = next((k for k, part in enumerate(parts[:-1]) if set(part) & set("*?[")), len(parts) - 1)
    before, marked, after = parts[-1].partition("{stem}")
    found: dict[str, Path] = {}
    for file in sorted(glob.glob(split.images.replace("{stem}", "*"), root_dir=root, recursive=True)):
        image = root / file
        if not image.is_file():
            continue
        below = Path(*Path(file).parts[fixed:])
        stem = below.name[len(before) : len(below.name) - len(after)] if marked else below.stem
        name = (below.parent / stem).as_posix()
        if name in found:
            raise FusekernError(
                f"{found[name]} and {image} have one name and would share a label; {split.images} must match one"
            )
        found[name] = image
    if not found:
        raise FusekernError(f"no image matches {root / split.images}; {_contents(root.joinpath(*parts[:fixed]))}")
    return found


def label_path(root: Path, split: Split, name: str) -> Path:
    """Where the label of an image lies."""
    return root / split.labels.replace("{stem}", name)


def describe_sizes(image: Path, size: tuple[int, int], label: Path, label_size: tuple[int, int]) -> str:
    """What to say of a label that does not fit its image; sizes are height and width."""
    return (
        f"{label}: {label_size[1]} x {label_size[0]} pixels, but its image {image} has {size[1]} x {size[0]}: "
        "they must be equal"
    )


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"{folder} holds " + (f"{len(names)} entries, such as {', '.join(names[:3])}" if names else "nothing")


def _decode(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise FusekernError(f"{path} does not exist") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise FusekernError(f"{path}: does not decode as a picture ({type(error).__name__}: {error})") from error
