"""The built-in scenes: reproducible, readable like any data set, and told apart by texture instead of colour."""

import hashlib
import json
import threading

import numpy as np
import pytest
from PIL import Image

from fusekern.data import scenes
from fusekern.data.folder import SegmentationFolder
from fusekern.data.scenes import ensure_scenes, write_scenes
from fusekern.data.spec import load_spec
from fusekern.errors import FusekernError

SPEC = load_spec("scenes")


def digest(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    root = tmp_path_factory.mktemp("full") / "scenes"
    write_scenes(root, images=(30, 10))
    return root


def test_equal_arguments_give_equal_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_scenes(tmp_path / name, images=(2, 1), size=(96, 128), seed=seed)
    first, again, other = (digest(tmp_path / name) for name in "abc")
    assert first == again and len(first) == 7
    assert not set(first.values()) & set(other.values())
    assert first["images/training/scene_0000.jpg"] != first["images/validation/scene_0000.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # and no working folders


def test_read_back_by_the_loader(full_size):
    train, val = (SegmentationFolder(SPEC, split, full_size) for split in ("train", "val"))
    assert (len(train), len(val)) == (30, 10)
    seen = set()
    for folder in (train, val):
        for sample in folder:
            assert sample.image.shape == (3, *scenes.SIZE) and sample.label.shape == scenes.SIZE
            seen |= set(sample.label.unique().tolist())
    assert seen == {*range(len(SPEC.names)), 255}
    stored = Image.open(train.pairs[0][1])
    assert stored.mode == "P" and stored.getpalette()[3:6] == list(SPEC.palette[0])


def test_void_is_a_thin_line_between_regions(full_size):
    for sample in SegmentationFolder(SPEC, "val", full_size):
        label = sample.label.numpy()
        assert 0.01 < (label == 255).mean() < 0.12
        across = (label[:, 1:] != label[:, :-1]) & (label[:, 1:] != 255) & (label[:, :-1] != 255)
        assert not across.any()  # regions never touch


def test_colour_alone_tells_little(full_size):
    def colours(sample):
        cells = sample.image.numpy().astype(np.int64) >> 4
        known = sample.label.numpy() != 255
        return ((cells[0] * 16 + cells[1]) * 16 + cells[2])[known], sample.label.numpy()[known]

    classes = len(SPEC.names)
    counts = np.zeros((4096, classes), np.int64)
    for sample in SegmentationFolder(SPEC, "train", full_size):
        np.add.at(counts, colours(sample), 1)
    matrix = np.zeros((classes, classes), np.int64)
    for sample in SegmentationFolder(SPEC, "val", full_size):
        cell, label = colours(sample)
        np.add.at(matrix, (label, counts.argmax(1)[cell]), 1)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    # 0.08 over all 200 scenes; a tenth would be a constant answer's score if all classes were equally large.
    assert (matrix.diagonal() / union).mean() < 0.12
    # No class keeps to colours of its own: it shares most of them with each other class.
    share = counts / counts.sum(0)
    overlap = np.minimum(share[:, :, None], share[:, None, :]).sum(0)
    assert overlap.min() > 0.1 and overlap.mean() > 0.3  # 0 for classes of different colours, 1 for equal histograms


def test_ensure_draws_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "IMAGES", (2, 1))
    monkeypatch.setattr(scenes, "SIZE", (96, 128))
    root = tmp_path / "deep" / "scenes"
    ensure_scenes(root)
    before = digest(root)
    assert len(before) == 7 and json.loads((root / "scenes.json").read_text())["images"] == [2, 1]
    monkeypatch.setattr(scenes, "draw_scene", None)  # drawing again would fail
    ensure_scenes(root)
    assert digest(root) == before


def test_empty_folder_is_filled(tmp_path):
    write_scenes(tmp_path, images=(1, 1), size=(96, 96))
    assert (tmp_path / "scenes.json").is_file()
    with pytest.raises(FusekernError, match="is not an empty folder"):
        write_scenes(tmp_path, images=(1, 1), size=(96, 96))


def test_scenes_of_other_arguments_are_used(tmp_path):
    write_scenes(tmp_path / "s", images=(1, 1), size=(96, 96), seed=5)
    before = digest(tmp_path / "s")
    ensure_scenes(tmp_path / "s")
    assert digest(tmp_path / "s") == before


def test_someone_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FusekernError, match=r"holds something other than the built-in scenes.*new folder"):
        ensure_scenes(tmp_path)
    (tmp_path / "scenes.json").write_text('{"format": 0}')
    with pytest.raises(FusekernError, match=r"holds scenes of version 0.*delete it, or point data.root"):
        ensure_scenes(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes.json", "thesis.txt"]
    with pytest.raises(FusekernError, match="thesis.txt"):
        ensure_scenes(tmp_path / "thesis.txt" / "below")


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    draw, drawn = scenes.draw_scene, []

    def draw_one(*arguments):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw(*arguments)

    monkeypatch.setattr(scenes, "draw_scene", draw_one)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "s", images=(2, 1), size=(96, 96))
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_share_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "IMAGES", (2, 1))
    monkeypatch.setattr(scenes, "SIZE", (96, 128))
    write, barrier, errors = scenes._write_split, threading.Barrier(2), []

    def wait_and_write(*arguments):
        barrier.wait(timeout=20)  # both have seen that the folder is missing
        write(*arguments)

    def ensure():
        try:
            ensure_scenes(tmp_path / "s")
        except Exception as error:  # a thread would swallow it
            errors.append(error)

    monkeypatch.setattr(scenes, "_write_split", wait_and_write)
    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [path.name for path in tmp_path.iterdir()] == ["s"]
    assert len(digest(tmp_path / "s")) == 7


@pytest.mark.parametrize("bad", [{"images": (0, 1)}, {"size": (95, 200)}, {"seed": -1}])
def test_arguments_out_of_range(tmp_path, bad):
    with pytest.raises(ValueError, match="images must be 1 or more, size 96 or more, seed 0 or more"):
        write_scenes(tmp_path / "s", **bad)
