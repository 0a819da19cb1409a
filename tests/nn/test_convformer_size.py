"""Parameters and multiplications of the layer, against the paper's figures and those derived from them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusekern import ConvFormer
from fusekern.nn import ConvFormerBlock


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


# Published for the paper's shape: 52.2 M. The per-block figures leave out the biases of the linear maps and of the
# down-sampling convolution, which are 12 C.


@pytest.mark.parametrize(
    ("options", "per_block", "six_blocks"),
    [
        ({}, 8.69, 52.2),
        ({"downsample": "depthwise"}, 6.34, 38.0),
        ({"expansion": 4}, 7.63, 45.8),
        ({"expansion": 2}, 6.57, 39.4),
        ({"channels": 256}, 2.18, 13.1),
        ({"channels": 256, "downsample": "depthwise"}, 1.60, 9.6),
    ],
)
def test_parameter_counts(options, per_block, six_blocks):
    with torch.device("meta"):
        layer = ConvFormer.preset("paper", **options)
    biases = 12 * layer.channels / 1e6
    assert round(millions(layer.blocks[0]) - biases, 2) == per_block
    assert round(millions(layer) - 6 * biases, 1) == six_blocks


def test_parameter_counts_of_the_presets():
    with torch.device("meta"):
        assert round(millions(ConvFormer.preset("paper")), 1) == 52.2
        assert round(millions(ConvFormer.preset("small")), 1) == 9.6


def test_parameter_count_of_resnet50_width():
    with torch.device("meta"):
        assert round(millions(ConvFormer(1024))) == 208


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 8.457e9),
        ({"pad": "ceil"}, 8.457e9 + 0.165e9),
        ({"expansion": 4}, 6.83e9),
        ({"expansion": 2}, 5.21e9),
        ({"channels": 256}, 2.22e9),
    ],
)
def test_multiplications_of_six_blocks_at_the_papers_shape(options, total):
    with torch.device("meta"):
        layer = ConvFormer(**options).eval()
        image, text = torch.zeros(1, layer.channels, 16, 16), torch.zeros(1, 150, layer.channels)
    with FlopCounterMode(display=False) as counter:
        layer(image, text)
    score = layer.channels * 16 * 16 * 150
    assert abs(counter.get_total_flops() / 2 - score - total) < 0.006e9  # the precision of the figures


def test_multiplications_of_one_block():
    with torch.device("meta"):
        block = ConvFormerBlock(512)
        image, text = torch.zeros(1, 512, 16, 16), torch.zeros(1, 150, 512)
    counts = {}
    for name, call in {
        "image_to_text": lambda: block.image_to_text(text, image),
        "transformer": lambda: block.transformer(text),
        "bottleneck": lambda: block.bottleneck(image),
        "text_to_image": lambda: block.text_to_image(image, text),
    }.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = round(counter.get_total_flops() / 2e6, 1)
    assert counts == {
        "image_to_text": 59.0 + 82.5,
        "transformer": 337.6,
        "bottleneck": 812.4,
        "text_to_image": 118.0,
    }
