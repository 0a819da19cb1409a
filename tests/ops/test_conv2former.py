import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekern.ops import conv2former


def by_loops(query, tokens, heads, scale):
    """The equation, one query of one head at a time."""
    width = query.shape[2] // heads
    result = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for head in range(heads):
            group = slice(head * width, (head + 1) * width)
            keys = tokens[b, group].reshape(width, tokens.shape[2] * tokens.shape[3])
            for k in range(query.shape[1]):
                weight = torch.exp(scale * torch.einsum("d,dn->n", query[b, k, group], keys))
                if weight.numel():
                    result[b, k, group] = torch.einsum("n,dn->d", weight / weight.sum(), keys)
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
    query = torch.randn(batch, count, heads * width, dtype=torch.float64)
    tokens = torch.randn(batch, heads * width, height, breadth, dtype=torch.float64)
    expected = by_loops(query, tokens, heads, 1 / math.sqrt(width) if scale is None else scale)
    result = conv2former(query, tokens, heads=heads, scale=scale)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_one_token_is_what_every_query_gets():
    tokens = torch.randn(2, 8, 1, 1)
    result = conv2former(torch.randn(2, 3, 8), tokens, heads=2)
    torch.testing.assert_close(result, tokens.flatten(1)[:, None].expand(2, 3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_as_good_as_torch(dtype, channels_last, assert_as_good_as):
    query, tokens = torch.randn(2, 19, 64, dtype=dtype), torch.randn(2, 64, 5, 5, dtype=dtype)
    if channels_last:
        tokens = tokens.to(memory_format=torch.channels_last)

    def peer(query, tokens):
        q = query.unflatten(2, (4, 16)).transpose(1, 2)
        x = tokens.flatten(2).transpose(1, 2).unflatten(2, (4, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, x, x).transpose(1, 2).flatten(2)

    truth = peer(query.double(), tokens.double())
    assert_as_good_as(conv2former(query, tokens, heads=4), peer(query, tokens), truth)


def test_large_similarities_do_not_overflow():
    query = torch.full((1, 1, 64), 200.0, dtype=torch.float16)
    tokens = torch.full((1, 64, 2, 2), 200.0, dtype=torch.float16)  # q . k = 2.56 M, beyond fp16; scaled it is 320 k
    tokens[..., 0, 0] = 1
    assert torch.equal(conv2former(query / 16, tokens, heads=1), tokens[:, :, 1, 1][:, None])


def test_errors_name_the_argument():
    query, tokens = torch.zeros(2, 3, 8), torch.zeros(2, 8, 2, 2)
    with pytest.raises(ValueError, match=r"query must be \[B, K, C\]; got shape \[3, 8\]"):
        conv2former(query[0], tokens, heads=2)
    with pytest.raises(ValueError, match=r"query must have at least one token; got shape \[2, 0, 8\]"):
        conv2former(query[:, :0], tokens, heads=2)
    with pytest.raises(ValueError, match=r"tokens must be \[B, C, h, w\] with B = 2, C = 8; got shape \[2, 6, 2, 2\]"):
        conv2former(query, tokens[:, :6], heads=2)
    for heads in (3, 0):
        with pytest.raises(ValueError, match=f"heads must divide the channels: got heads = {heads}, C = 8"):
            conv2former(query, tokens, heads=heads)
