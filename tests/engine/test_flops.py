"""FLOPs: the paper's own figures come out, and every part is what the maths says."""

import json
import subprocess
import sys

import pytest

from fusekern import recipes
from fusekern.engine.flops import count_flops, render
from fusekern.errors import FusekernError

PAPER = {"ade20k/mobilenetv2-fpn": (32.7, 33.4), "ade20k/mobilenetv2-convformer": (41.3, 41.9)}


@pytest.fixture(scope="module")
def convformer():
    return count_flops(recipes.load("ade20k/mobilenetv2-convformer"), (512, 512))


@pytest.fixture(scope="module")
def vanilla():
    return count_flops(recipes.load("ade20k/mobilenetv2-fpn"), (512, 512))


@pytest.mark.parametrize("recipe", PAPER)
def test_figures_of_the_paper(recipe, vanilla, convformer):
    """Table 1 prints 32.7 and 41.3; with the classifier, which it leaves out, 33.4 and 41.9."""
    report = convformer if recipe.endswith("convformer") else vanilla
    assert (report["gmac_paper"], report["gmac_full"]) == PAPER[recipe]
    assert (report["classes"], report["size"]) == (150, [512, 512])


def test_parameters_sum_up(vanilla, convformer):
    for report in (vanilla, convformer):
        parameters = dict(report["parameters"])
        assert parameters.pop("total") == sum(parameters.values())
        assert parameters.keys() == report["parts"].keys()


def test_every_part_of_a_block_by_hand(convformer):
    """C = 512, 16 x 16 pixels, 5 x 5 tokens for the text, 150 names."""
    c, pixels, tokens, k = 512, 256, 25, 150
    expected = {
        "conv": pixels * (2 * c * 6 * c + 9 * 6 * c),
        "downsample": tokens * 9 * c * c,
        "image_to_text": 2 * k * c * c + 2 * k * tokens * c,
        "former": 4 * k * c * c + 2 * k * k * c + 4 * k * c * c,
        "text_to_image": 2 * k * c * c + 2 * pixels * k * c,
    }
    for i in range(6):
        found = {part: convformer["parts"][f"guidance.blocks.{i}.{part}"] for part in expected}
        assert found == pytest.approx({part: macs / 1e9 for part, macs in expected.items()})
    assert convformer["parts"]["guidance.projection"] == pytest.approx(pixels * 320 * c / 1e9)
    assert convformer["parts"]["guidance.score"] == pytest.approx(pixels * k * c / 1e9)
    assert convformer["parts"]["guidance.text"] == 0


def test_vanilla_parts_by_hand(vanilla):
    pixels = [128**2, 64**2, 32**2, 16**2]
    widths = [24, 32, 96, 320]
    conv = 9 * 256 * 256
    expected = {
        "backbone": vanilla["parts"]["backbone"],
        "neck": sum(n * (256 * w + conv) for n, w in zip(pixels, widths, strict=True)) / 1e9,
        # stages per level: 1, 1, 2, 3, each at the size before its doubling
        "head": conv * (pixels[0] + pixels[1] + pixels[2] + pixels[1] + pixels[3] + pixels[2] + pixels[1]) / 1e9,
        "classifier": pixels[0] * 256 * 150 / 1e9,
    }
    assert vanilla["parts"] == pytest.approx(expected)
    assert vanilla["parts"]["backbone"] == pytest.approx(1.460, abs=5e-4)


def test_parameters(vanilla, convformer):
    layer = {name: n for name, n in convformer["parameters"].items() if name.startswith("guidance.blocks.")}
    assert sum(layer.values()) == pytest.approx(52.2e6, abs=5e4)
    assert convformer["parameters"]["guidance.score"] == convformer["parameters"]["guidance.text"] == 0
    wider_lateral = (512 + 150 - 320) * 256
    assert convformer["parameters"]["neck"] - vanilla["parameters"]["neck"] == wider_lateral
    assert vanilla["parameters"]["backbone"] == convformer["parameters"]["backbone"] == 1_811_712


def test_text_of_another_width_is_counted():
    recipe = recipes.load("demo", "--text.width", "64")
    report = count_flops(recipe, (192, 256))
    classes = report["classes"]
    assert report["parameters"]["guidance.text"] == 64 * 128
    assert report["parts"]["guidance.text"] == pytest.approx(classes * 64 * 128 / 1e9)
    assert report["size"] == [192, 256]


def test_render_shows_the_totals(convformer):
    table = render(convformer)
    assert "41.9 GMAC in all, 41.3 as the paper counts" in table
    total = next(line for line in table.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "41.915", f"{convformer['parameters']['total']:,}"]
    assert sum(line.startswith("guidance.blocks.conv") for line in table.splitlines()) == 1


def test_too_small_a_size():
    with pytest.raises(FusekernError, match="size: .* needs 32 pixels"):
        count_flops(recipes.load("demo"), (16, 512))


def test_command_line_needs_no_network():
    """Sockets that raise stand for a machine without network."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from fusekern.cli import main\n"
        "sys.exit(main(['flops', 'ade20k/mobilenetv2-convformer', '--size', '512', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["gmac_paper"], report["gmac_full"]) == (41.3, 41.9)
