import numpy as np
import pytest
from PIL import Image

YAML = """
train: {images: "images/*.png", labels: "labels/{stem}.png"}
names: [ground, plant, stone]
"""


@pytest.fixture
def small(tmp_path):
    """Makes a data set of three classes: small(name=(image, label)) writes it and returns its YAML."""

    def make(yaml=YAML, more="", **pairs):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        for name, (image, label) in pairs.items():
            Image.fromarray(np.asarray(image, np.uint8)).save(tmp_path / "images" / f"{name}.png")
            Image.fromarray(np.asarray(label)).save(tmp_path / "labels" / f"{name}.png")
        path = tmp_path / "small.yaml"
        path.write_text("root: .\n" + yaml + more)
        return path

    return make


@pytest.fixture
def picture():
    """A pair (image, label) of 6 x 8 pixels in which every class of ``small`` has two rows."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.array([0, 1, 2], np.uint8), 2)[:, None].repeat(8, axis=1)
    return rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), label
