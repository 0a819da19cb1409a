import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fusekern.nn import SemanticFPN


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


CHANNELS = (3, 4, 5, 6)


def small(**options):
    return SemanticFPN(CHANNELS, 7, neck_channels=8, channels=10, **options)


def pyramid(*sizes, batch=2, channels=CHANNELS):
    return [torch.randn(batch, c, *size) for c, size in zip(channels, sizes, strict=True)]


def by_functions(model, features):
    """The decoder for sizes that double exactly, written out level by level."""
    laterals = [F.conv2d(x, m.weight, m.bias) for x, m in zip(features, model.neck.lateral, strict=True)]
    p5 = laterals[3]
    p4 = laterals[2] + p5.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p3 = laterals[1] + p4.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p2 = laterals[0] + p3.repeat_interleave(2, 2).repeat_interleave(2, 3)
    levels = [
        F.conv2d(x, m.weight, m.bias, padding=1) for x, m in zip((p2, p3, p4, p5), model.neck.output, strict=True)
    ]

    def stage(x, module):
        convolution, norm = module[0], module[1]
        assert convolution.bias is None
        x = F.conv2d(x, convolution.weight, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + norm.eps).sqrt()
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp_min(0)

    total = stage(levels[0], model.stages[0][0])
    for level, stages in zip(levels[1:], model.stages[1:], strict=True):
        for module in stages:
            level = F.interpolate(stage(level, module), scale_factor=2, mode="bilinear", align_corners=False)
        total = total + level
    return F.conv2d(total, model.classifier.weight, model.classifier.bias)


def test_equals_the_decoder_written_out():
    model = small(dropout=0.0)
    torch.nn.init.normal_(model.classifier.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    model = model.double()
    features = [x.double() for x in pyramid((16, 24), (8, 12), (4, 6), (2, 3))]
    torch.testing.assert_close(model(features), by_functions(model, features), rtol=1e-9, atol=1e-9)


def test_stages_per_level():
    assert [len(stages) for stages in small().stages] == [1, 1, 2, 3]
    assert [len(stages) for stages in small(strides=(4, 8, 16, 16)).stages] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "sizes",
    [
        [(127, 90), (64, 45), (32, 23), (16, 12)],
        [(63, 5), (32, 3), (16, 2), (8, 1)],
        [(1, 1), (1, 1), (1, 1), (1, 1)],
    ],
)
def test_sizes_that_nothing_divides(sizes):
    features = pyramid(*sizes)
    before = [x.clone() for x in features]
    assert small()(features).shape == (2, 7, *sizes[0])
    assert len(features) == 4
    assert all(torch.equal(x, copied) for x, copied in zip(features, before, strict=True))


def test_last_level_at_stride_16():
    features = pyramid((32, 24), (16, 12), (8, 6), (8, 6))
    assert small(strides=(4, 8, 16, 16))(features).shape == (2, 7, 32, 24)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_takes_whole_channels_in_training_alone(training):
    model = small(dropout=0.5).train(training)
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(pyramid((8, 8), (4, 4), (2, 2), (1, 1)))
    gone = (seen[0] == 0).flatten(2).all(2)  # [B, channels]
    assert gone.any() == training
    assert not gone.all()
    kept = seen[0][~gone]
    assert (kept != 0).double().mean() > 0.9


def test_multiplications_of_the_papers_baseline():
    """Neck 13.015 G, head 18.90 G: MobileNetV2 at 512x512, 256 channels, 150 classes."""
    channels = (24, 32, 96, 320)
    with torch.device("meta"):
        model = SemanticFPN(channels, 150)
        features = pyramid((128, 128), (64, 64), (32, 32), (16, 16), batch=1, channels=channels)
    with FlopCounterMode(display=False) as neck:
        model.neck(features)
    with FlopCounterMode(display=False) as everything:
        model(features)
    assert round(neck.get_total_flops() / 2e9, 3) == 13.015
    assert round((everything.get_total_flops() - neck.get_total_flops()) / 2e9, 2) == 18.90


def test_compiles_and_copies():
    model = small().eval()
    features = pyramid((15, 10), (8, 5), (4, 3), (2, 2))
    expected = model(features)
    assert torch.equal(copy.deepcopy(model)(features), expected)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(features), expected)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="strides must have one entry a level: got 3 for 4 levels"):
        small(strides=(4, 8, 16))
    for strides in ((4, 8, 16, 24), (4, 8, 16, 2), (4, 6, 8, 16)):
        with pytest.raises(ValueError, match="strides must be powers of 2 times the first, got"):
            small(strides=strides)
    with pytest.raises(ValueError, match="features must be 4 levels, got 3"):
        small()(pyramid((8, 8), (4, 4), (2, 2), (1, 1))[:3])
