import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekern.ops import former2conv


def by_loops(image, key, value, heads, scale):
    """The equation, one pixel of one head at a time."""
    width = image.shape[1] // heads
    result = image.clone()
    for b in range(image.shape[0]):
        for head in range(heads):
            group = slice(head * width, (head + 1) * width)
            for y in range(image.shape[2]):
                for x in range(image.shape[3]):
                    weight = torch.exp(scale * torch.einsum("kd,d->k", key[b, :, group], image[b, group, y, x]))
                    result[b, group, y, x] += torch.einsum("k,kd->d", weight / weight.sum(), value[b, :, group])
    return result


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(0, 2),
    count=st.integers(1, 5),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    height=st.integers(0, 4),
    breadth=st.integers(0, 4),
    scale=st.sampled_from([None, 0.7]),
)
def test_equals_the_equation(batch, count, heads, width, height, breadth, scale):
    image = torch.randn(batch, heads * width, height, breadth, dtype=torch.float64)
    key, value = torch.randn(2, batch, count, heads * width, dtype=torch.float64)
    expected = by_loops(image, key, value, heads, 1 / math.sqrt(width) if scale is None else scale)
    result = former2conv(image, key, value, heads=heads, scale=scale)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_one_key_adds_its_value_everywhere():
    image, value = torch.randn(2, 8, 3, 3), torch.randn(2, 1, 8)
    result = former2conv(image, torch.randn(2, 1, 8), value, heads=2)
    torch.testing.assert_close(result, image + value.transpose(1, 2)[..., None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_as_good_as_torch(dtype, channels_last, assert_as_good_as):
    image = torch.randn(2, 64, 7, 6, dtype=dtype)
    key, value = torch.randn(2, 2, 19, 64, dtype=dtype)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)

    def peer(image, key, value):
        q = image.flatten(2).transpose(1, 2).unflatten(2, (4, 16)).transpose(1, 2)
        k, v = (x.unflatten(2, (4, 16)).transpose(1, 2) for x in (key, value))
        gathered = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return image + gathered.transpose(1, 2).reshape(image.shape)

    truth = peer(image.double(), key.double(), value.double())
    assert_as_good_as(former2conv(image, key, value, heads=4), peer(image, key, value), truth)


def test_channels_last_stays_so():
    image = torch.randn(2, 8, 5, 4).to(memory_format=torch.channels_last)
    text = torch.randn(2, 3, 8)
    assert former2conv(image, text, text, heads=2).is_contiguous(memory_format=torch.channels_last)


def test_errors_name_the_argument():
    image, text = torch.zeros(2, 8, 3, 3), torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"image must be \[B, C, H, W\]; got shape \[2, 8, 9\]"):
        former2conv(image.flatten(2), text, text, heads=2)
    with pytest.raises(ValueError, match=r"key must be \[B, K, C\] with B = 2, C = 8; got shape \[1, 5, 8\]"):
        former2conv(image, text[:1], text, heads=2)
    with pytest.raises(ValueError, match=r"key must have at least one token; got shape \[2, 0, 8\]"):
        former2conv(image, text[:, :0], text[:, :0], heads=2)
    with pytest.raises(ValueError, match=r"value must be \[B, K, C\] with B = 2, K = 5, C = 8; got shape \[2, 4, 8\]"):
        former2conv(image, text, text[:, :4], heads=2)
    with pytest.raises(ValueError, match="heads must divide the channels: got heads = 5, C = 8"):
        former2conv(image, text, text, heads=5)
