import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekern.ops import downsample, downsampled_size


def by_patches(image, weight, bias, pad):
    """The equation, one patch at a time."""
    batch, channels, height, width = image.shape
    rows = -(-height // 3) if pad == "ceil" or height < 3 else height // 3
    columns = -(-width // 3) if pad == "ceil" or width < 3 else width // 3
    result = image.new_zeros(batch, channels, rows, columns)
    for y in range(rows):
        for x in range(columns):
            patch = image[:, :, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
            kernel = weight[:, :, : patch.shape[2], : patch.shape[3]]
            if weight.shape[1] == 1:
                result[:, :, y, x] = torch.einsum("bcij,cij->bc", patch, kernel[:, 0])
            else:
                result[:, :, y, x] = torch.einsum("bcij,ocij->bo", patch, kernel)
    return result + bias[:, None, None]


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(0, 2),
    channels=st.integers(1, 4),
    height=st.integers(0, 10),
    width=st.integers(0, 10),
    pad=st.sampled_from(["floor", "ceil"]),
    depthwise=st.booleans(),
)
def test_equals_the_equation(batch, channels, height, width, pad, depthwise):
    image = torch.randn(batch, channels, height, width, dtype=torch.float64)
    weight = torch.randn(channels, 1 if depthwise else channels, 3, 3, dtype=torch.float64)
    bias = torch.randn(channels, dtype=torch.float64)
    result = downsample(image, weight, bias, pad=pad)
    torch.testing.assert_close(result, by_patches(image, weight, bias, pad), rtol=1e-12, atol=1e-12)
    assert result.shape[2:] == downsampled_size(height, width, pad)


def test_is_the_convolution_of_torch_where_three_divides():
    convolution = torch.nn.Conv2d(4, 4, 3, stride=3)
    image = torch.randn(2, 4, 6, 9)
    assert torch.equal(downsample(image, convolution.weight, convolution.bias), convolution(image))


@pytest.mark.parametrize(
    ("side", "floor", "ceil"), [(0, 0, 0), (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 2), (5, 1, 2), (6, 2, 2), (16, 5, 6)]
)
def test_sizes(side, floor, ceil):
    assert downsampled_size(side, 16, "floor") == (floor, 5)
    assert downsampled_size(16, side, "ceil") == (6, ceil)


def test_rows_beyond_a_multiple_of_three_count_only_if_completed():
    weight = torch.randn(2, 2, 3, 3)
    image = torch.randn(1, 2, 4, 4)
    changed = image.clone()
    changed[:, :, 3] += 1
    assert torch.equal(downsample(image, weight), downsample(changed, weight))
    assert not torch.equal(downsample(image, weight, pad="ceil"), downsample(changed, weight, pad="ceil"))


def test_channels_last_stays_so():
    image = torch.randn(2, 4, 7, 8).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 4, 3, 3)
    assert downsample(image, weight).is_contiguous(memory_format=torch.channels_last)


def test_errors_name_the_argument():
    image, weight = torch.zeros(1, 4, 6, 6), torch.zeros(4, 4, 3, 3)
    with pytest.raises(ValueError, match="pad must be one of floor, ceil, got 'same'"):
        downsample(image, weight, pad="same")
    with pytest.raises(ValueError, match=r"weight must be \[C, C, 3, 3\] or .* with C = 4; got shape \[4, 2, 3, 3\]"):
        downsample(image, torch.zeros(4, 2, 3, 3))
    with pytest.raises(ValueError, match=r"got shape \[4, 4, 5, 5\]"):
        downsample(image, torch.zeros(4, 4, 5, 5))
    with pytest.raises(ValueError, match=r"bias must be \[C\] with C = 4; got shape \[3\]"):
        downsample(image, weight, torch.zeros(3))
