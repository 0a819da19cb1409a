import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekern.ops import former


def parts_of(layer):
    """The op's arguments out of torch's own layer."""
    attention = layer.self_attn
    return (
        (attention.in_proj_weight, attention.in_proj_bias),
        *(
            (part.weight, part.bias)
            for part in (attention.out_proj, layer.norm1, layer.linear1, layer.linear2, layer.norm2)
        ),
    )


def torch_layer(channels, heads, hidden, dtype=torch.float64, eps=1e-5):
    layer = torch.nn.TransformerEncoderLayer(
        channels, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, layer_norm_eps=eps, dtype=dtype
    )
    for parameter in layer.parameters():  # torch starts biases at 0 and norms at 1, which would hide a swap
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(0, 3),
    count=st.integers(1, 6),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    hidden=st.integers(1, 9),
    eps=st.sampled_from([1e-5, 0.1]),
)
def test_equals_the_layer_of_torch(batch, count, heads, width, hidden, eps):
    layer = torch_layer(heads * width, heads, hidden, eps=eps)
    tokens = torch.randn(batch, count, heads * width, dtype=torch.float64)
    torch.testing.assert_close(
        former(tokens, *parts_of(layer), heads=heads, eps=eps), layer(tokens), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_torch(dtype, assert_as_good_as):
    layer = torch_layer(64, 4, 128, dtype)
    tokens = torch.randn(2, 19, 64, dtype=dtype)
    result, peer = former(tokens, *parts_of(layer), heads=4), layer(tokens)
    assert_as_good_as(result, peer, layer.double()(tokens.double()))


def test_tokens_may_come_in_any_order():
    layer = torch_layer(8, 2, 16)
    tokens = torch.randn(1, 5, 8, dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])
    result = former(tokens, *parts_of(layer), heads=2)
    torch.testing.assert_close(former(tokens[:, order], *parts_of(layer), heads=2), result[:, order])


def test_errors_name_the_argument():
    parts = list(parts_of(torch_layer(8, 2, 16)))
    tokens = torch.zeros(2, 5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"tokens must be \[B, K, C\]; got shape \[5, 8\]"):
        former(tokens[0], *parts, heads=2)
    with pytest.raises(ValueError, match="tokens must have at least one token"):
        former(tokens[:, :0], *parts, heads=2)
    with pytest.raises(ValueError, match="heads must divide the channels: got heads = 3, C = 8"):
        former(tokens, *parts, heads=3)
    parts[0] = (parts[0][0][:8], parts[0][1])
    with pytest.raises(
        ValueError, match=r"qkv must be a weight \[24, 8\] and a bias \[24\]; got shapes \[8, 8\] and \[24\]"
    ):
        former(tokens, *parts, heads=2)


def test_what_the_triton_kernels_cannot_take(monkeypatch):
    module = sys.modules["fusekern.ops.former"]
    monkeypatch.setattr(module, "triton_dtypes", lambda tokens: ["its own"])

    def reasons(channels, heads, hidden=4):
        def pair(*shape):
            return torch.empty(shape, device="meta"), torch.empty(shape[:1], device="meta")

        linears = pair(3 * channels, channels), pair(channels, channels)
        rest = pair(channels), pair(hidden, channels), pair(channels, hidden), pair(channels)
        return module.why_not_triton(torch.empty(1, 2, channels, device="meta"), *linears, *rest, heads, 1e-5)

    assert reasons(2048, 8) == reasons(17, 17) == ["its own"]
    assert reasons(2064, 16) == ["its own", "2064 channels, it takes up to 2048"]
    assert reasons(514, 2) == ["its own", "heads of 257 channels, it takes up to 256"]
    assert reasons(16, 1, hidden=0) == ["its own", "no hidden channel"]


def test_autocast_decides_the_dtype():
    parts = parts_of(torch_layer(32, 2, 64, torch.float32))
    tokens = torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        result = former(tokens, *parts, heads=2)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert all(part.grad.dtype == torch.float32 for pair in parts for part in pair)
