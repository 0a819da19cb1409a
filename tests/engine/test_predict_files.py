"""The files that ``predict`` writes: labels that load again, and overlays."""

import numpy as np
import pytest
import torch
from PIL import Image
from toys import label_of, photo, save_checkpoint

from fusekern import viz
from fusekern.config import EvalConfig
from fusekern.data.folder import read_image, read_label
from fusekern.data.spec import DatasetSpec, load_spec
from fusekern.engine.predict import predict, write_label
from fusekern.errors import FusekernError


@pytest.fixture
def run(tmp_path):
    save_checkpoint(tmp_path / "run", tmp_path / "no data needed", kind="none")
    return tmp_path / "run"


def save(path, seed=0, size=(60, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(*size, seed).permute(1, 2, 0).numpy()).save(path)


def test_files_of_a_folder(run, tmp_path):
    model = save_checkpoint(tmp_path / "again", tmp_path, kind="none")["ema"]
    spec, folder, out = load_spec("scenes"), tmp_path / "pictures", tmp_path / "out"
    save(folder / "b.png", 1)
    save(folder / "a.JPG", 2, (33, 90))
    (folder / "notes.txt").write_text("no picture")
    save(folder / "below" / "c.png")
    assert predict(run, folder, out) == [out / "labels" / "a.png", out / "labels" / "b.png"]
    assert sorted(path.name for path in out.rglob("*.png")) == ["a.png", "a.png", "b.png", "b.png"]
    for source in (folder / "a.JPG", folder / "b.png"):
        image = read_image(source)
        expected = label_of(image, EvalConfig(scale=(256, 192)), model)  # the recipe's protocol, EMA weights
        name = f"{source.stem}.png"
        assert torch.equal(read_label(out / "labels" / name, spec), expected)
        stored = Image.open(out / "labels" / name)
        assert stored.mode == "P" and (np.asarray(stored) == expected.numpy() + 1).all()  # reduce_zero_label
        colours = np.array(spec.palette, dtype=np.uint8)[expected.numpy()]
        assert (np.asarray(stored.convert("RGB")) == colours).all()
        overlay = viz.overlay(image.permute(1, 2, 0).numpy(), expected.numpy(), spec.palette)
        picture = viz.with_legend(overlay, spec.names, spec.palette, expected.unique().tolist())
        assert (np.asarray(Image.open(out / "overlays" / name)) == picture).all()
        assert picture.shape[0] > image.shape[1]


def test_single_file_and_protocol(run, tmp_path):
    save(tmp_path / "a.png")
    first = predict(run, tmp_path / "a.png", tmp_path / "one")
    second = predict(run, tmp_path / "a.png", tmp_path / "two", config=EvalConfig(scale=(64, 48), weights="model"))
    assert first[0].read_bytes() != second[0].read_bytes()


def test_images_that_differ_in_the_suffix_alone_keep_it(run, tmp_path):
    folder = tmp_path / "pictures"
    for seed, name in enumerate(["a.jpg", "a.png", "b.png", "a.jpg.png"]):
        save(folder / name, seed)
    written = predict(run, folder, tmp_path / "out")
    assert sorted(path.name for path in written) == ["a.jpg.png", "a.jpg.png.png", "a.png.png", "b.png"]
    assert all(path.is_file() for path in written)


def test_a_folder_is_finished_before_unreadable_images_are_told(run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not a picture")
    save(folder / "b.png")
    (folder / "c.jpg").write_bytes(b"")
    with pytest.raises(FusekernError, match=r"(?s)1 of 3 images labelled.*a\.png.*c\.jpg"):
        predict(run, folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "labels").iterdir()] == ["b.png"]
    with pytest.raises(FusekernError, match=r"a\.png"):
        predict(run, folder / "a.png", tmp_path / "out")


def test_refuses_inputs_without_images_and_results_over_the_input(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FusekernError, match="no images in this folder"):
        predict(run, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FusekernError, match="no such image or folder"):
        predict(run, tmp_path / "nowhere", tmp_path / "out")
    save(tmp_path / "labels" / "a.png")
    before = (tmp_path / "labels" / "a.png").read_bytes()
    for source in (tmp_path / "labels", tmp_path / "labels" / "a.png"):
        with pytest.raises(FusekernError, match="over the input"):
            predict(run, source, tmp_path)
    assert (tmp_path / "labels" / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("classes", "ignore", "reduced"),
    [(1, 255, False), (11, 255, True), (150, 255, True), (254, 255, True), (255, 255, False), (255, 256, True)],
)
def test_labels_load_again(classes, ignore, reduced, tmp_path):
    palette = tuple((k, 255 - k, k // 2) for k in range(classes))
    spec = DatasetSpec("x", tuple(map(str, range(classes))), palette, None, None, None, ignore, reduced)
    label = np.random.default_rng(0).integers(0, classes, (40, 50), dtype=np.uint8)
    label[0, 0] = classes - 1
    write_label(label, tmp_path / "label.png", spec)
    assert (read_label(tmp_path / "label.png", spec).numpy() == label).all()
    assert np.asarray(Image.open(tmp_path / "label.png").convert("RGB"))[0, 0].tolist() == list(palette[-1])
