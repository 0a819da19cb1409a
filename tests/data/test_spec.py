"""Descriptions of data sets: the built-in ones, the YAML and its errors, label values to class indices and back."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusekern.data.spec import DatasetSpec, built_in_datasets, data_root, distinct_colours, load_spec
from fusekern.errors import FusekernError

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPLITS = 'train: {images: "images/*.jpg", labels: "labels/{stem}.png"}\n'


def spec(classes, **options):
    names = tuple(f"class {k}" for k in range(classes))
    return DatasetSpec("test", names, distinct_colours(classes), None, None, None, **options)


def write(folder, text, name="set.yaml"):
    (folder / name).write_text(text)
    return folder / name


def test_built_in_sets_load_by_name():
    assert built_in_datasets() == ["ade20k", "camvid", "scenes"]
    for name in built_in_datasets():
        found = load_spec(name)
        assert found.name == name and found.root is None and found.reduce_zero_label
        assert len(found.names) == len(found.palette) and found.train and found.val
    assert len(load_spec("scenes").names) >= 8


def test_ade20k_is_the_benchmark():
    ade = load_spec("ade20k")
    assert len(ade.names) == 150
    colours = dict(zip(ade.names, ade.palette, strict=True))
    assert colours["wall"] == (120, 120, 120) and colours["building"] == (180, 120, 120)
    assert colours["sky"] == (6, 230, 230) and colours["person"] == (150, 5, 61) and colours["flag"] == (92, 0, 255)
    assert [ade.names.index(name) for name in ("wall", "person", "sea", "flag")] == [0, 12, 26, 149]
    assert ade.ids == range(1, 151) and ade.void == (0, 255)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the vocabularies are not part of the repository")
def test_names_are_in_the_order_of_other_lists():
    lines = (SHARED / "vocabularies" / "ade20k_150_with_prompt_eng.txt").read_text().splitlines()[1:]
    synonyms = [line.split(":")[1].split(",") for line in lines]
    # That list replaces some benchmark names, such as base, hood and fan, by less ambiguous ones.
    others = {name for name, known in zip(load_spec("ade20k").names, synonyms, strict=True) if name not in known}
    assert others == {"house", "base", "blind", "palm", "light", "pot", "screen", "hood", "fan", "glass"}
    assert list(load_spec("camvid").names) == (SHARED / "camvid" / "classes.txt").read_text().split()


def test_zero_label_is_dropped_before_the_rest_moves():
    label = np.array([[0, 1, 2, 3, 255]], np.uint8)
    assert spec(3, reduce_zero_label=True).to_train(label, "x").tolist() == [[255, 0, 1, 2, 255]]
    assert spec(4).to_train(label, "x").tolist() == [[0, 1, 2, 3, 255]]
    assert spec(3, ignore_index=0, reduce_zero_label=True).to_train(label[:, :4], "x").tolist() == [[255, 0, 1, 2]]
    assert spec(3, ignore_index=3).to_train(label[:, :4], "x").tolist() == [[0, 1, 2, 255]]


@given(classes=st.integers(1, 254), reduce=st.booleans(), data=st.data())
def test_to_ids_undoes_to_train(classes, reduce, data):
    subject = spec(classes, reduce_zero_label=reduce)
    values = data.draw(st.lists(st.sampled_from([*subject.ids, *subject.void]), min_size=1, max_size=20))
    label = np.array([values], np.uint8)
    back = subject.to_ids(subject.to_train(label, "x"))
    assert back.dtype == np.uint8
    assert back.tolist() == [[subject.void[0] if value in subject.void else value for value in values]]


def test_sixteen_bit_values():
    wide = spec(2, ignore_index=65535)
    assert wide.to_train(np.array([[0, 1, 65535]], np.uint16), "x").tolist() == [[0, 1, 255]]
    assert wide.to_ids(np.array([0, 255])).tolist() == [0, 65535]
    with pytest.raises(FusekernError, match=r"far\.png: label values -1, 70000 are out of range"):
        wide.to_train(np.array([[-1, 1, 70000]], np.int32), "far.png")


def test_out_of_range_names_file_values_and_range():
    label = np.array([[0, 1, 7, 9, 255]], np.uint8)
    with pytest.raises(FusekernError) as error:
        spec(3, reduce_zero_label=True).to_train(label, "dir/a.png")
    assert str(error.value) == (
        "dir/a.png: label values 7, 9 are out of range: 3 classes have 1 to 3, and 0 and 255 are ignored"
    )
    with pytest.raises(FusekernError, match=r"numbered from 1, and .*\? Then set reduce_zero_label: true"):
        spec(3).to_train(np.array([[0, 1, 2, 3]], np.uint8), "a.png")


def test_yaml_with_everything(tmp_path):
    write(tmp_path, "sky\n\nwide road\n", "names.txt")
    path = write(
        tmp_path,
        'name: mine\nroot: files\nval: {images: "v/*.jpg", labels: "w/{stem}.png"}\nnames: names.txt\n'
        "palette: [[1, 2, 3], [4, 5, 6]]\nignore_index: 9\nreduce_zero_label: true\n",
    )
    found = load_spec(str(path))
    assert (found.name, found.names, found.palette) == ("mine", ("sky", "wide road"), ((1, 2, 3), (4, 5, 6)))
    assert found.root == tmp_path / "files" and found.ignore_index == 9 and found.train is None
    assert (found.val.images, found.val.labels) == ("v/*.jpg", "w/{stem}.png")


def test_defaults(tmp_path):
    found = load_spec(write(tmp_path, SPLITS + "names: [a, b]\n"))
    assert (found.name, found.root, found.ignore_index, found.reduce_zero_label) == ("set", None, 255, False)
    assert found.palette == distinct_colours(2) and found.val is None


def test_generated_colours_differ():
    assert len(set(distinct_colours(255))) == 255
    assert distinct_colours(255)[:10] == distinct_colours(10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", "cannot be read as YAML"),
        ("just text", "the file must be a mapping with keys from name, root.*found 'just text'"),
        (SPLITS + "names: [a]\nignore_idx: 0", "unknown key 'ignore_idx'; did you mean ignore_index?"),
        (SPLITS + "names: [a]\nq: 0", "unknown key 'q'; known are name, root, train"),
        ("train: {image: x, labels: y}\nnames: [a]", "unknown key 'train.image'; did you mean images?"),
        ("train: images\nnames: [a]", "train must be a mapping with keys from images, labels, found 'images'"),
        ("train: {images: x}\nnames: [a]", r"train.labels must be a path pattern relative to root, found None"),
        ("train: {images: 'x/*', labels: y.png}\nnames: [a]", r"train.labels must have \{stem\} once and no \*"),
        ("val: {images: '{stem}_*.png', labels: '{stem}'}\nnames: [a]", r"val.images may have \{stem\} once"),
        ("names: [a]", "neither train nor val is there"),
        (SPLITS, "names must be a list of class names.*found None"),
        (SPLITS + "names: none.txt", "names: cannot read .*none.txt"),
        (SPLITS + "names: [a, no]", r"names\[1\] must be a text, found False; put it in quotes"),
        (SPLITS + "names: [a, 'a ']", "names has 'a' twice"),
        (SPLITS + f"names: [{', '.join(f'c{k}' for k in range(256))}]", "names has 256 classes; .* 255 at most"),
        (SPLITS + "names: [a, b]\npalette: [[0, 0, 0]]", "palette .* each of the 2 names, found 1 colours"),
        (SPLITS + "names: [a]\npalette: [[0, 0, 256]]", r"palette\[0\] must be .* found \[0, 0, 256\]"),
        (SPLITS + "names: [a]\npalette: red", "palette .* each of the 1 names, found 'red'"),
        (SPLITS + "names: [a]\nignore_index: none", "ignore_index must be a number, found 'none'"),
        (SPLITS + "names: [a]\nignore_index: true", "ignore_index must be a number, found True"),
        (SPLITS + "names: [a]\nignore_index: -1", "ignore_index must be a label value from 0 to 65535, found -1"),
        (SPLITS + "names: [a, b]\nignore_index: 1", "ignore_index 1 is also the label value of a class: 2 classes"),
        (SPLITS + "names: [a]\nreduce_zero_label: 1", "reduce_zero_label must be true or false, found 1"),
        (SPLITS + "names: [a]\nroot: 3", "root must be the path of a folder, found 3"),
    ],
)
def test_a_bad_yaml_is_told_from_its_message(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(FusekernError, match=f"^{re.escape(str(path))}: {message}"):
        load_spec(path)


def test_255_classes_leave_no_value_to_ignore_when_numbered_from_1(tmp_path):
    names = f"names: [{', '.join(f'c{k}' for k in range(255))}]\n"
    assert load_spec(write(tmp_path, SPLITS + names)).ids == range(255)
    with pytest.raises(FusekernError, match="ignore_index 255 is also the label value of a class"):
        load_spec(write(tmp_path, SPLITS + names + "reduce_zero_label: true\n"))


def test_unknown_data_set():
    with pytest.raises(FusekernError, match=r"'ade2k' is neither .*\(ade20k, camvid, scenes\).*did you mean ade20k\?"):
        load_spec("ade2k")


def test_root(tmp_path):
    found = load_spec("ade20k")
    assert data_root(found, tmp_path) == tmp_path
    with pytest.raises(FusekernError, match=r"data.root is not set.*'ade20k'.*--data.root FOLDER.*images/training"):
        data_root(found)
    with pytest.raises(FusekernError, match=r"data.root: .*nowhere does not exist"):
        data_root(found, tmp_path / "nowhere")
    with pytest.raises(FusekernError, match=r"set.yaml is not a folder"):
        data_root(found, write(tmp_path, ""))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "names.txt").write_text("road\nsky\n", encoding="utf-8-sig")
    path = tmp_path / "streets.yaml"
    path.write_text("root: .\nnames: names.txt\ntrain: {images: '*.jpg', labels: '{stem}.png'}\n")
    spec = load_spec(path)
    assert spec.names == ("road", "sky") and spec.root == tmp_path


def test_a_root_does_not_depend_on_where_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "streets.yaml").write_text(
        "root: .\nnames: [road]\ntrain: {images: '*.jpg', labels: '{stem}.png'}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_spec("data/streets.yaml").root == tmp_path / "data"
