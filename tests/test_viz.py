"""Pictures: exact pixels where they are defined, and no clipped text where a font draws."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fusekern import viz

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
NAMES = ["sky", "a rather long class name", "tree"]


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ink(image):
    """Rows and columns of pixels that are not background."""
    return np.argwhere((image != 255).any(-1))


def test_overlay_mixes_colours_and_leaves_ignored_pixels():
    image = np.full((2, 2, 3), 100, np.uint8)
    label = np.array([[0, 1], [2, 255]], np.uint8)
    mixed = viz.overlay(image, label, PALETTE, alpha=0.25)
    assert mixed.tolist() == [[[125, 75, 75], [75, 125, 75]], [[75, 75, 125], [100, 100, 100]]]
    assert (image == 100).all()
    assert viz.overlay(image, label, PALETTE, alpha=1)[0, 0].tolist() == [200, 0, 0]
    assert (viz.overlay(image, label, PALETTE, alpha=0) == image).all()
    assert (viz.overlay(image, np.full((2, 2), 255, np.uint8), []) == image).all()


@pytest.mark.parametrize(
    ("image", "label", "alpha", "message"),
    [
        (picture().astype(float), np.zeros((40, 60), np.uint8), 0.5, "uint8"),
        (picture()[..., 0], np.zeros((40, 60), np.uint8), 0.5, "uint8"),
        (picture(), np.zeros((60, 40), np.uint8), 0.5, "label"),
        (picture(), np.zeros((40, 60), np.int64), 0.5, "label"),
        (picture(), np.full((40, 60), 3, np.uint8), 0.5, "class 3, the palette has 3"),
        (picture(), np.zeros((40, 60), np.uint8), 1.5, "alpha"),
    ],
)
def test_overlay_refuses(image, label, alpha, message):
    with pytest.raises(ValueError, match=message):
        viz.overlay(image, label, PALETTE, alpha)


@pytest.mark.parametrize("size", [(1, 1), (40, 60), (300, 50), (360, 480), (1500, 2000)])
def test_legend_keeps_the_picture_and_shows_every_colour_once(size):
    image = picture(*size)
    shown = viz.with_legend(image, NAMES, PALETTE, [0, 1, 2])
    height, width = size
    assert (shown[:height, :width] == image).all()
    legend = shown.copy()
    legend[:height, :width] = 255
    swatches = [np.argwhere((legend == colour).all(-1)) for colour in PALETTE]
    for swatch in swatches:
        assert (np.ptp(swatch, axis=0) >= 9).all() and (np.ptp(swatch, axis=0) == np.ptp(swatch, axis=0)[0]).all()
        assert len(swatch) == (np.ptp(swatch, axis=0) + 1).prod()  # a full square: nothing is written over it
    top, left = ink(legend).min(0)
    bottom, right = ink(legend).max(0)
    assert top >= height and left > 0 and bottom < len(shown) - 1 and right < shown.shape[1] - 1


def test_legend_lists_only_what_is_present():
    shown = viz.with_legend(picture(), NAMES, PALETTE, [2])
    legend = shown[40:]
    assert (legend == PALETTE[2]).all(-1).any() and not (legend == PALETTE[0]).all(-1).any()
    assert (viz.with_legend(picture(), NAMES, PALETTE, []) == picture()).all()
    with pytest.raises(ValueError, match="class 3"):
        viz.with_legend(picture(), NAMES, PALETTE, [3])


def test_legend_of_many_classes_stays_compact():
    names = [f"class number {k}" for k in range(150)]
    shown = viz.with_legend(picture(72, 96), names, [(k, 255 - k, 0) for k in range(150)], list(range(150)))
    assert max(shown.shape) < 1000


def test_contact_sheet_holds_every_panel(tmp_path):
    panels = [picture(30, 50, 1), picture(60, 20, 2), picture(10, 90, 3)]
    captions = ["one", "a caption that is far wider than its panel", "two\nlines"]
    viz.contact_sheet(panels, 2, tmp_path / "sheet.png", captions)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    corners = []
    for panel in panels:
        height, width = panel.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(sheet, panel.shape)[:, :, 0]
        found = np.argwhere((windows[..., 0, 0, :] == panel[0, 0]).all(-1))
        found = [spot for spot in found if (windows[tuple(spot)] == panel).all()]
        assert len(found) == 1, (height, width)
        corners.append(tuple(found[0]))
    assert corners[0][0] == corners[1][0] < corners[2][0] and corners[0][1] == corners[2][1] < corners[1][1]
    assert (ink(sheet).max(0) < np.array(sheet.shape[:2]) - 1).all()  # the widest caption is not cut


def test_contact_sheet_refuses(tmp_path):
    with pytest.raises(ValueError, match="panels"):
        viz.contact_sheet([], 2, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="captions"):
        viz.contact_sheet([picture()], 2, tmp_path / "sheet.png", ["a", "b"])


@pytest.mark.parametrize("classes", [1, 11, 40, 220])
def test_confusion_png_is_not_clipped(classes, tmp_path):
    matrix = np.random.default_rng(0).integers(0, 50, (classes, classes)) + 500 * np.eye(classes, dtype=np.int64)
    matrix[0] = 0  # not in the ground truth
    viz.confusion_png(matrix, [f"class number {k}" for k in range(classes)], tmp_path / "confusion.png", "a title")
    drawn = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))
    border = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
    assert (border == 255).all() and drawn.shape[0] < 3200 and drawn.shape[1] < 3200
    assert (drawn == 217).all(-1).sum() > 10  # the row without ground truth is grey (0.85)


def test_confusion_png_refuses_names_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        viz.confusion_png(np.zeros((3, 3), np.int64), ["a", "b"], tmp_path / "confusion.png")


def test_curves_png(tmp_path):
    series = {"loss": [(0, 3.0), (10, 2.0), (20, float("nan")), (30, 1.0)], "another one": [(0, 1.0)]}
    viz.curves_png(series, "step", "loss", tmp_path / "plain.png")
    viz.curves_png(series, "step", "loss", tmp_path / "band.png", {"loss": [(2, 4), (1, 3), (1, 2), (0, 2)]})
    plain, band = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("plain.png", "band.png"))
    assert plain.shape == band.shape and (plain != band).any()
    with pytest.raises(ValueError, match="spread of 'loss'"):
        viz.curves_png(series, "step", "loss", tmp_path / "band.png", {"loss": [(2, 4)]})


def test_plots_leave_pyplot_alone(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from fusekern import viz\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        f"viz.confusion_png(np.eye(2, dtype=int), ['a', 'b'], {str(tmp_path / 'confusion.png')!r})\n"
        f"viz.curves_png({{'a': [(0, 1)]}}, 'x', 'y', {str(tmp_path / 'curves.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_no_formulas(tmp_path):
    names = ["road $a_$", 'b"ä,x $^{$', "c"]
    viz.confusion_png(np.eye(3, dtype=np.int64), names, tmp_path / "confusion.png", "a title with $^{$")
    assert (tmp_path / "confusion.png").stat().st_size > 5000
