"""Reading images and labels: pairing by name, decoding, and what is said of every kind of bad file."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fusekern.data.folder import SegmentationFolder, read_image, read_label, read_label_values
from fusekern.data.spec import load_spec
from fusekern.errors import FusekernError


def open_train(path):
    return SegmentationFolder(load_spec(path), "train")


def test_pairs_and_samples(small, picture):
    image, label = picture
    folder = open_train(small(b=(image, label), a=(255 - image, label)))
    assert folder.names == ["a", "b"] and len(folder) == 2
    assert [[path.name for path in pair] for pair in folder.pairs] == [["a.png", "a.png"], ["b.png", "b.png"]]
    sample = folder[1]
    assert sample.name == "b" and sample.image.dtype == sample.label.dtype == torch.uint8
    assert (sample.image.numpy() == image.transpose(2, 0, 1)).all() and (sample.label.numpy() == label).all()
    assert (folder[0].image.numpy() == 255 - image.transpose(2, 0, 1)).all()


def test_palette_png_gives_its_indices(tmp_path, picture):
    label = Image.fromarray(picture[1])
    label.putpalette([10, 20, 30, 10, 20, 30, 0, 0, 1])  # two classes of one colour: RGB would merge them
    label.save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    assert (read_label_values(tmp_path / "p.png") == picture[1]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grey_labels_of_few_bits_are_not_stretched(tmp_path, picture, bits):
    packed = np.packbits(np.unpackbits(picture[1][..., None], axis=2)[..., 8 - bits :].reshape(6, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "few.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert Image.open(tmp_path / "few.png").mode == "L"
    assert (read_label_values(tmp_path / "few.png") == picture[1]).all()


def test_labels_of_one_bit(tmp_path, picture):
    Image.fromarray(picture[1] > 0).save(tmp_path / "bit.png")
    assert Image.open(tmp_path / "bit.png").mode == "1"
    values = read_label_values(tmp_path / "bit.png")
    assert values.dtype == np.uint8 and (values == (picture[1] > 0)).all()


def test_labels_of_16_bits(tmp_path, picture, small):
    wide = picture[1].astype(np.uint16)
    wide[0, 0] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").mode == "I;16"
    assert (read_label(tmp_path / "wide.png", load_spec(small())).numpy() == wide).all()
    Image.fromarray(wide + 256).save(tmp_path / "wide.png")  # must not wrap around to 8 bits
    with pytest.raises(FusekernError, match="label values 256, 257, 258, 511 are out of range"):
        read_label(tmp_path / "wide.png", load_spec(small()))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_any_8_bit_image_becomes_rgb(tmp_path, picture, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(picture[0]).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 6, 8) and image.dtype == torch.uint8
    assert (image.permute(1, 2, 0).numpy() == np.array(Image.open(path).convert("RGB"))).all()


def test_exif_rotation_is_ignored(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.fromarray(picture[0]).save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6
    assert (read_image(tmp_path / "turned.png").permute(1, 2, 0).numpy() == picture[0]).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_label_of_another_mode_is_refused(tmp_path, picture, mode, small):
    path = tmp_path / ("label.tif" if mode == "F" else "label.png")
    Image.fromarray(picture[1]).convert(mode).save(path)
    message = f"{path}: a label of mode {mode}; a single-channel or palette PNG of class ids is needed"
    with pytest.raises(FusekernError, match=re.escape(message)):
        read_label(path, load_spec(small()))


def test_deep_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(FusekernError, match=r"deep\.png: an image of mode I;16; 8 bits a channel are needed"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_truncated_image(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"half.{kind}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FusekernError, match=rf"half\.{kind}: does not decode as a picture \(.*truncated"):
        read_image(path)


def test_no_picture_at_all(tmp_path):
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    with pytest.raises(FusekernError, match=r"text\.jpg: does not decode as a picture"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(FusekernError, match=r"gone\.jpg does not exist"):
        read_image(tmp_path / "gone.jpg")


def test_image_without_its_label(small, picture, tmp_path):
    path = small(a=picture, b=picture, c=picture)
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(FusekernError) as error:
        open_train(path)
    assert str(error.value) == (
        f"1 of 3 train images have no label; the first, {tmp_path}/images/b.png, needs {tmp_path}/labels/b.png "
        "(train.labels is labels/{stem}.png)"
    )


def test_empty_folder(small, tmp_path):
    path = small()
    with pytest.raises(FusekernError, match=r"no image matches .*images/\*\.png; .*images holds nothing"):
        open_train(path)
    (tmp_path / "images" / "a.JPG").touch()
    with pytest.raises(FusekernError, match=r"images holds 1 entries, such as a\.JPG"):
        open_train(path)
    (tmp_path / "images" / "a.JPG").unlink()
    (tmp_path / "images").rmdir()
    with pytest.raises(FusekernError, match="there is no folder .*images"):
        open_train(path)


def test_label_of_another_size(small, picture):
    image, label = picture
    with pytest.raises(FusekernError, match=r"labels/a\.png: 7 x 6 pixels, but its image .*images/a\.png has 8 x 6"):
        open_train(small(a=(image, label[:, :7])))[0]


def test_split_that_is_not_there(small, picture):
    with pytest.raises(FusekernError, match="the data set 'small' has no split 'val'"):
        SegmentationFolder(load_spec(small(a=picture)), "val")


def test_root_argument_wins(small, picture, tmp_path):
    path = small(a=picture)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FusekernError, match=r"no image matches .*elsewhere/images"):
        SegmentationFolder(load_spec(path), "train", tmp_path / "elsewhere")


def write_tree(root, picture, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[1] if file.startswith("gt") else picture[0]).save(root / file)


def test_nested_folders_and_a_suffix(tmp_path, picture, small):
    write_tree(
        tmp_path, picture, "left/train/bonn/b_left.png", "left/train/aachen/a_left.png", "left/train/aachen/x.png"
    )
    write_tree(tmp_path, picture, "gt/train/bonn/b_ids.png", "gt/train/aachen/a_ids.png")
    yaml = 'train: {images: "left/train/**/{stem}_left.png", labels: "gt/train/{stem}_ids.png"}\nnames: [a, b, c]\n'
    folder = open_train(small(yaml))
    assert folder.names == ["aachen/a", "bonn/b"]
    assert [label.relative_to(tmp_path).as_posix() for _, label in folder.pairs] == [
        "gt/train/aachen/a_ids.png",
        "gt/train/bonn/b_ids.png",
    ]
    assert folder[1].label.shape == (6, 8)


def test_nested_folders_share_file_names(tmp_path, picture, small):
    write_tree(tmp_path, picture, "i/one/0.png", "i/two/0.png", "gt/one/0.png", "gt/two/0.png")
    folder = open_train(small('train: {images: "i/*/*.png", labels: "gt/{stem}.png"}\nnames: [a, b, c]\n'))
    assert folder.names == ["one/0", "two/0"]


def test_two_images_of_one_name(tmp_path, picture, small):
    path = small(yaml='train: {images: "images/*", labels: "labels/{stem}.png"}\nnames: [a, b, c]\n', a=picture)
    Image.fromarray(picture[0]).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(FusekernError, match=r"a\.jpg and .*a\.png have one name and would share a label"):
        open_train(path)


def test_hidden_files_are_no_images(tmp_path, picture, small):
    path = small(a=picture)
    (tmp_path / "images" / "._a.png").write_bytes(b"left behind by a file manager")
    assert open_train(path).names == ["a"]
