import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusekern.nn import ConvFormerBlock
from fusekern.ops import former, text_path


def pair(*shape, **keywords):
    return torch.randn(shape, **keywords), torch.randn(shape[0], **keywords)


def parts_of(channels, hidden, **keywords):
    square, vector = (channels, channels), (channels,)
    former = [(3 * channels, channels), square, vector, (hidden, channels), (channels, hidden), vector]
    entry, norm, *rest = [pair(*shape, **keywords) for shape in (square, vector, *former, square, square, square)]
    return entry, norm, tuple(rest[:6]), *rest[6:]


def test_is_the_modules_one_after_the_other():
    """The block's children, each called as a module, in float64."""
    block = ConvFormerBlock(12, bridge_heads=2, text_heads=3, expansion=1).double()
    for parameter in block.parameters():  # norms start at 1 and 0, which would hide a swap
        nn.init.normal_(parameter, std=0.5)
    text, gathered = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    query = nn.Linear(12, 12).double()
    bridge, former, last = block.image_to_text, block.transformer, block.text_to_image
    wanted = former(bridge.norm(text + bridge.out(gathered)))
    linears = [(part.weight, part.bias) for part in (last.key, last.value, query)]
    entry, norm = ((part.weight, part.bias) for part in (bridge.out, bridge.norm))
    path = text_path(text, gathered, entry, norm, former.parts(), *linears, heads=3)
    for found, right in zip(path, (wanted, last.key(wanted), last.value(wanted), query(wanted)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_without_a_query(backend):
    parts = parts_of(8, 16)
    text, gathered = torch.randn(2, 2, 5, 8)
    with_one = text_path(text, gathered, *parts, heads=2, backend=backend)
    without = text_path(text, gathered, *parts[:-1], heads=2, backend=backend)
    assert without.query is None and with_one.query is not None
    assert all(map(torch.equal, without[:3], with_one[:3]))


def test_gradients_where_a_result_is_not_used():
    parts = parts_of(8, 16)
    leaves = [part.requires_grad_() for pair in (*parts[:2], *parts[2], *parts[3:]) for part in pair]
    text, gathered = torch.randn(2, 2, 5, 8)
    found = text_path(text, gathered, *parts, heads=2)
    wanted = text_path(text, gathered, *parts, heads=2, backend="reference")
    used = leaves[:18]  # up to the key's
    grads = [torch.autograd.grad(path.key.square().sum(), used) for path in (found, wanted)]
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_eps_is_that_of_all_norms():
    entry, norm, rest, key, value, _ = parts_of(8, 16, dtype=torch.float64)
    text, gathered = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    found = text_path(text, gathered, entry, norm, rest, key, value, heads=2, eps=0.3)
    first = F.layer_norm(text + F.linear(gathered, *entry), (8,), *norm, 0.3)
    torch.testing.assert_close(found.tokens, former(first, *rest, heads=2, eps=0.3), rtol=1e-12, atol=1e-12)


def test_errors_name_the_argument():
    entry, norm, rest, key, value, _ = parts_of(8, 16)
    text = torch.zeros(2, 5, 8)
    with pytest.raises(
        ValueError, match=r"gathered must be \[B, K, C\] with B = 2, K = 5, C = 8; got shape \[2, 4, 8\]"
    ):
        text_path(text, text[:, :4], entry, norm, rest, key, value, heads=2)
    with pytest.raises(ValueError, match="tokens must have at least one token"):
        text_path(text[:, :0], text[:, :0], entry, norm, rest, key, value, heads=2)
    with pytest.raises(ValueError, match=r"key must be a weight \[8, 8\] and a bias \[8\]; got shapes \[8, 4\]"):
        text_path(text, text, entry, norm, rest, (key[0][:, :4], key[1]), value, heads=2)
    with pytest.raises(ValueError, match="heads must divide the channels"):
        text_path(text, text, entry, norm, rest, key, value, heads=3)


def test_what_the_triton_kernels_cannot_take(monkeypatch):
    monkeypatch.setattr(sys.modules["fusekern.ops.former"], "triton_dtypes", lambda tokens: [])
    entry, norm, rest, key, value, query = parts_of(8, 16, device="meta")
    text = torch.empty(2, 5, 8, device="meta")
    reasons = sys.modules["fusekern.ops.text_path"]._why_not_triton
    assert reasons(text, text, entry, norm, rest, key, value, query, 2, 1e-5) == []
    assert reasons(text, text, entry, norm, rest, key, value, None, 2, 1e-5) == []
    query = query[0], query[1].half()
    differ = "biases of key, value and query that differ in dtype"
    assert reasons(text, text, entry, norm, rest, key, value, query, 2, 1e-5) == [differ]
    assert reasons(text, text, entry, norm, rest, key, value, None, 2, 1e-5) == []
