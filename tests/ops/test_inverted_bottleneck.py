import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusekern.ops import BatchNorm, inverted_bottleneck


def by_modules(channels, hidden, momentum=0.1):
    """MobileNetV2's block out of torch's own modules, with norms that saturate ReLU6 at both ends."""
    block = nn.Sequential(
        nn.Conv2d(channels, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden, momentum=momentum),
        nn.ReLU6(),
        nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden, momentum=momentum),
        nn.ReLU6(),
        nn.Conv2d(hidden, channels, 1, bias=False),
        nn.BatchNorm2d(channels, momentum=momentum),
    )
    for norm in block:
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 4.0)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            norm.eps = 0.1
    return block


def arguments_of(block):
    norms = tuple(
        BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.training)
        for norm in (block[1], block[4], block[7])
    )
    return block[0].weight, block[3].weight, block[6].weight, norms


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    hidden=st.integers(1, 9),
    height=st.integers(1, 5),
    breadth=st.integers(2, 5),
    training=st.booleans(),
)
def test_equals_the_modules_of_torch(batch, channels, hidden, height, breadth, training):
    block = by_modules(channels, hidden).double().train(training)
    image = torch.randn(batch, channels, height, breadth, dtype=torch.float64)
    result, statistics = inverted_bottleneck(image, *arguments_of(block))
    torch.testing.assert_close(result, image + block(image), rtol=1e-10, atol=1e-10)
    assert [seen is not None for seen in statistics] == [training] * 3


def test_relu6_saturates_at_both_ends_in_these_tests():
    block = by_modules(4, 24).double()
    clipped = block[:3](torch.randn(2, 4, 6, 6, dtype=torch.float64))
    assert (clipped == 0).double().mean() > 0.1
    assert (clipped == 6).double().mean() > 0.02


def test_statistics_are_those_of_the_batch():
    block = by_modules(3, 6).double()
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    _, statistics = inverted_bottleneck(image, *arguments_of(block))
    for seen, depth in zip(statistics, (1, 4, 7), strict=True):
        inside = block[:depth](image).transpose(0, 1).flatten(1)  # [c, B H W], what the norm sees
        torch.testing.assert_close(seen.mean, inside.mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen.var, inside.var(1, correction=1), rtol=1e-12, atol=1e-12)
        assert not seen.mean.requires_grad


def test_buffers_stay_as_they_are():
    block = by_modules(3, 6)
    before = [buffer.clone() for buffer in block.buffers()]
    inverted_bottleneck(torch.randn(2, 3, 4, 4), *arguments_of(block))
    assert all(torch.equal(buffer, copy) for buffer, copy in zip(block.buffers(), before, strict=True))


def test_norms_may_be_frozen_one_by_one():
    block = by_modules(3, 6).double()
    block[4].eval()
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result, statistics = inverted_bottleneck(image, *arguments_of(block))
    torch.testing.assert_close(result, image + block(image), rtol=1e-10, atol=1e-10)
    assert [seen is not None for seen in statistics] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_norms_beside_a_half_image(dtype, assert_as_good_as):
    block = by_modules(4, 24)
    for layer in block:
        if isinstance(layer, nn.Conv2d):
            layer.to(dtype)
    image = torch.randn(2, 4, 6, 6, dtype=dtype)
    result, statistics = inverted_bottleneck(image, *arguments_of(block))
    assert result.dtype == dtype
    assert all(seen.var.dtype == torch.float32 for seen in statistics)
    peer = image + block(image)
    assert_as_good_as(result, peer, image.double() + block.double()(image.double()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_no_pixels_no_statistics(shape):
    result, statistics = inverted_bottleneck(torch.zeros(shape), *arguments_of(by_modules(3, 6)))
    assert result.shape == shape
    assert statistics == (None, None, None)


def test_errors_name_the_argument():
    block = by_modules(3, 6)
    expand, depthwise, project, norms = arguments_of(block)
    image = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"expand must be \[E, C, 1, 1\] with C = 3; got shape \[6, 3\]"):
        inverted_bottleneck(image, expand[..., 0, 0], depthwise, project, norms)
    with pytest.raises(
        ValueError, match=r"depthwise must be \[E, 1, k, k\] with E = 6, k = 5; got shape \[6, 1, 3, 5\]"
    ):
        inverted_bottleneck(image, expand, torch.zeros(6, 1, 3, 5), project, norms)
    with pytest.raises(ValueError, match=r"depthwise must have an odd kernel; got shape \[6, 1, 4, 4\]"):
        inverted_bottleneck(image, expand, torch.zeros(6, 1, 4, 4), project, norms)
    with pytest.raises(ValueError, match=r"project must be \[O, E, 1, 1\] with E = 6; got shape \[6, 3, 1, 1\]"):
        inverted_bottleneck(image, expand, depthwise, torch.zeros(6, 3, 1, 1), norms)
    with pytest.raises(ValueError, match="residual needs .* got stride 1, 3 channels in, 6 out"):
        inverted_bottleneck(image, expand, depthwise, torch.zeros(6, 6, 1, 1), norms)
    with pytest.raises(ValueError, match="residual needs .* got stride 2, 3 channels in, 3 out"):
        inverted_bottleneck(image, expand, depthwise, project, norms, stride=2)
    with pytest.raises(ValueError, match="stride must be 1 or more, got 0"):
        inverted_bottleneck(image, expand, depthwise, project, norms, stride=0, residual=False)
    with pytest.raises(ValueError, match="memory must be one of default, low, got 'less'"):
        inverted_bottleneck(image, expand, depthwise, project, norms, memory="less")
    with pytest.raises(ValueError, match="norms must be three batch norms, got 2"):
        inverted_bottleneck(image, expand, depthwise, project, norms[:2])
    with pytest.raises(ValueError, match=r"norms\[1\]\.mean must be \[c\] with c = 6; got shape \[3\]"):
        wrong = (norms[0], norms[1]._replace(mean=torch.zeros(3)), norms[2])
        inverted_bottleneck(image, expand, depthwise, project, wrong)
    with pytest.raises(ValueError, match=r"norms\[0\] needs a running mean and variance, or batch=True"):
        wrong = (norms[0]._replace(batch=False, mean=None), *norms[1:])
        inverted_bottleneck(image, expand, depthwise, project, wrong)
    with pytest.raises(ValueError, match=r"norms\[2\]\.weight is torch.float16: beside an image of torch.float32"):
        wrong = (*norms[:2], norms[2]._replace(weight=norms[2].weight.half()))
        inverted_bottleneck(image, expand, depthwise, project, wrong)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        inverted_bottleneck(image[..., :1, :1], expand, depthwise, project, norms)
