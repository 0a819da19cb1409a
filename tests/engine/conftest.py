from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

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


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("areas"))
