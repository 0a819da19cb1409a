"""check-data: every bad file of a data set is found in one go, and the values are counted."""

import json

import numpy as np
import pytest
from PIL import Image

from fusekern.data.check import check_data, render
from fusekern.data.spec import load_spec
from fusekern.errors import FusekernError


def check(path, tmp_path):
    return check_data(load_spec(path), None, tmp_path / "sheets" / "sheet.png")


def test_good_data_set(small, picture, tmp_path):
    image, label = picture
    half = np.where(label == 2, 255, label).astype(np.uint8)
    report = check(small(a=(image, label), b=(image, half)), tmp_path)
    train = report["splits"]["train"]
    assert report["ok"] and train["problems"] == {} and train["absent"] == []
    assert (train["images"], train["labels"]) == (2, 2)
    assert train["values"] == {0: (32, 2), 1: (32, 2), 2: (16, 1), 255: (16, 1)}
    width, height = Image.open(report["contact_sheet"]).size
    assert width > 16 and height > 12
    text = render(report)
    assert "train: 2 images, 2 labels, no problems" in text and "sheet.png" in text
    row = next(line for line in text.splitlines() if " stone " in line)
    assert row.split() == ["2", "stone", "16.667", "%", "1"]
    assert next(line for line in text.splitlines() if "(ignored)" in line).split()[0] == "255"


@pytest.fixture
def broken(small, picture, tmp_path):
    """Two good pairs and one of each kind of bad file."""
    image, label = picture
    good = {name: picture for name in ("good1", "good2", "torn", "bare", "rgb", "size", "range", "text", "wide")}
    path = small(**good)
    images, labels = tmp_path / "images", tmp_path / "labels"
    (images / "torn.png").write_bytes((images / "torn.png").read_bytes()[:60])
    (labels / "bare.png").unlink()
    Image.fromarray(label).convert("RGB").save(labels / "rgb.png")
    Image.fromarray(label[:4]).save(labels / "size.png")
    Image.fromarray(label + np.uint8(1)).save(labels / "range.png")
    (labels / "text.png").write_text("oops")
    Image.fromarray(np.uint16(label) * 1000).save(labels / "wide.png")
    Image.fromarray(label).save(labels / "orphan.png")
    return path


def test_every_bad_file_is_found(broken, tmp_path):
    report = check(broken, tmp_path)
    train = report["splits"]["train"]
    assert not report["ok"]
    found = {
        kind: [message.split(":")[0].split("/")[-1] for message in found] for kind, found in train["problems"].items()
    }
    assert found == {
        "label without an image": ["orphan.png"],
        "image without its label": ["bare.png"],
        "label value out of range": ["range.png", "wide.png"],
        "label of several channels": ["rgb.png"],
        "label of another size": ["size.png"],
        "unreadable label": ["text.png"],
        "unreadable image": ["torn.png"],
    }
    assert (train["images"], train["labels"]) == (9, 8)
    assert train["values"][3] == (16, 1) and train["values"][2000] == (16, 1)
    assert report["contact_sheet"] and json.loads(json.dumps(report))["splits"]["train"]["absent"] == []


def test_rendered_problems(broken, tmp_path):
    text = render(check(broken, tmp_path))
    assert "train: 9 images, 8 labels, 7 problems" in text
    assert "labels/size.png: 8 x 4 pixels, but its image" in text
    assert "range.png: label values 3 are out of range: 3 classes have 0 to 2" in text
    assert "a label of mode RGB; a single-channel or palette PNG" in text
    assert [line.split()[:4] for line in text.splitlines() if "OUT OF RANGE" in line] == [
        [value, "OUT", "OF", "RANGE"] for value in ("3", "1000", "2000")
    ]


def test_long_lists_are_cut(small, picture, tmp_path):
    path = small(**{f"p{k:02}": (picture[0], picture[1] + np.uint8(50)) for k in range(14)})
    report = check(path, tmp_path)
    assert len(report["splits"]["train"]["problems"]["label value out of range"]) == 14
    text = render(report)
    assert text.count("are out of range") == 10 and "and 4 more" in text
    assert report["contact_sheet"] is None and not (tmp_path / "sheets").exists()


def test_absent_classes_are_named_but_no_error(small, picture, tmp_path):
    image, label = picture
    report = check(small(a=(image, np.zeros_like(label))), tmp_path)
    assert report["ok"] and report["splits"]["train"]["absent"] == ["plant", "stone"]
    assert "no pixel of: plant, stone" in render(report)


def test_zero_label_is_counted_as_ignored(small, picture, tmp_path):
    report = check(small(more="reduce_zero_label: true\n", a=picture), tmp_path)
    assert report["first_id"] == 1 and report["void"] == [0, 255]
    rows = [line.split()[:2] for line in render(report).splitlines() if "%" in line]
    assert rows == [["0", "(ignored)"], ["1", "ground"], ["2", "plant"], ["3", "stone"]]
    assert report["splits"]["train"]["absent"] == ["stone"]


def test_nested_labels_without_images(small, picture, tmp_path):
    yaml = 'val: {images: "i/**/*.png", labels: "labels/{stem}.png"}\nnames: [a, b, c]\n'
    path = small(yaml)
    for file in ("i/x/1.png", "labels/x/1.png", "labels/x/2.png", "labels/3.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[file.startswith("labels")]).save(tmp_path / file)
    problems = check(path, tmp_path)["splits"]["val"]["problems"]
    assert problems == {"label without an image": [str(tmp_path / "labels" / name) for name in ("3.png", "x/2.png")]}


def test_labels_of_both_splits_in_one_folder(small, picture, tmp_path):
    splits = [f'{name}: {{images: "{name[0]}/*.png", labels: "labels/{{stem}}.png"}}\n' for name in ("train", "val")]
    path = small("".join(splits) + "names: [ground, plant, stone]\n")
    for file in ("t/1.png", "labels/1.png", "v/2.png", "labels/2.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[file.startswith("labels")]).save(tmp_path / file)
    assert all(split["problems"] == {} for split in check(path, tmp_path)["splits"].values())
    Image.fromarray(picture[1]).save(tmp_path / "labels" / "2_color.png")
    report = check(path, tmp_path)  # nobody reads it
    assert report["ok"] and list(report["splits"]["val"]["problems"]) == ["label without an image"]
    assert "1 images, 1 labels, no problems" in render(report) and "2_color.png" in render(report)


def test_folders_that_no_image_can_refer_to_are_not_looked_into(small, picture, tmp_path):
    path = small(a=picture)
    (tmp_path / "labels" / "old").mkdir()
    Image.fromarray(picture[1]).save(tmp_path / "labels" / "old" / "b.png")
    assert check(path, tmp_path)["ok"]


def test_empty_split_is_a_problem_not_the_end(small, picture, tmp_path):
    path = small(more='val: {images: "none/*.png", labels: "labels/{stem}.png"}\n', a=picture)
    report = check(path, tmp_path)
    assert not report["ok"] and report["splits"]["train"]["problems"] == {}
    assert "no image matches" in report["splits"]["val"]["problems"]["images"][0]


def test_needs_a_root_and_a_place_to_write(small, picture, tmp_path):
    with pytest.raises(FusekernError, match="data.root is not set"):
        check_data(load_spec("ade20k"), None, tmp_path / "sheet.png")
    (tmp_path / "file").touch()
    with pytest.raises(FusekernError, match="cannot write the contact sheet"):
        check_data(load_spec(small(a=picture)), None, tmp_path / "file" / "sheet.png")
    for out in (tmp_path / "sheet.txt", tmp_path / "sheet", tmp_path):
        with pytest.raises(FusekernError, match="--out must be a PNG file"):
            check_data(load_spec(tmp_path / "small.yaml"), None, out)
