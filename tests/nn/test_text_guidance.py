import copy

import pytest
import torch
from torch import nn

from fusekern.nn import ConvFormer, TextGuidance


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer():
    return ConvFormer(16, blocks=1, bridge_heads=4, text_heads=2, expansion=2)


def test_guides_the_last_level_and_leaves_the_others():
    guidance = TextGuidance(layer(), torch.randn(5, 12)).eval()
    levels = [torch.randn(2, 8, 14, 12), torch.randn(2, 16, 7, 6)]
    expected = guidance.layer(levels[1], guidance.text @ guidance.projection.weight.T).image
    for found in (guidance(levels), guidance(tuple(levels)), guidance([levels[1]])):
        torch.testing.assert_close(found[-1], expected)
    assert guidance(levels)[0] is levels[0]
    torch.testing.assert_close(guidance(levels[1]), expected)


def test_text_of_the_layers_width_needs_no_map():
    text = torch.randn(5, 16, dtype=torch.float64)
    guidance = TextGuidance(layer(), text).eval()
    assert isinstance(guidance.projection, nn.Identity)
    image = torch.randn(2, 16, 7, 6)
    expected = guidance.layer(image, text.float()).image
    text.zero_()
    torch.testing.assert_close(guidance(image), expected)
    assert guidance.state_dict()["text"].dtype == torch.float32


def test_an_encoder_of_another_width():
    guidance = TextGuidance(layer(), torch.randn(5, 16), channels=24).eval()
    image = torch.randn(2, 24, 7, 6)
    narrow, norm = guidance.reduce
    reduced = torch.einsum("bchw,dc->bdhw", image, narrow.weight[..., 0, 0]) / (1 + norm.eps) ** 0.5
    fused = guidance.layer(reduced, guidance.text).image
    wide = torch.einsum("bchw,dc->bdhw", fused, guidance.expand.weight[..., 0, 0]) + guidance.expand.bias[:, None, None]
    torch.testing.assert_close(guidance(image), image + wide)


@pytest.mark.parametrize("channels", [16, 24])
def test_every_parameter_learns(channels):
    guidance = TextGuidance(layer(), torch.randn(5, 12), channels)
    guidance(torch.randn(2, channels, 7, 6)).square().mean().backward()
    for name, parameter in guidance.named_parameters():
        # A bias of the keys shifts the similarities of a pixel alike, which softmax ignores.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_a_hook_takes_the_score_map_compiled_too():
    torch._dynamo.reset()
    guidance = TextGuidance(layer(), torch.randn(5, 12)).eval()
    scores = []
    guidance.layer.register_forward_hook(lambda layer, inputs, output: scores.append(output.score))
    image = torch.randn(2, 16, 7, 6)
    plain = guidance(image)
    compiled = torch.compile(guidance, fullgraph=True, backend="aot_eager")(image)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(*scores)
    assert scores[0].shape == (2, 5, 7, 6)
    scores[1].mean().backward()
    assert guidance.projection.weight.grad.abs().max() > 0


def test_the_text_travels_with_the_weights():
    one, other = (TextGuidance(layer(), torch.randn(5, 12)).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    image = torch.randn(2, 16, 7, 6)
    assert torch.equal(one(image), other(image))
    assert torch.equal(one(image), copy.deepcopy(one)(image))


def test_errors_say_what_was_given_and_what_is_needed():
    with pytest.raises(ValueError, match=r"text must be \[K, D\], floating point; got \[2, 5, 16\], torch.float32"):
        TextGuidance(layer(), torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match=r"floating point; got \[5, 16\], torch.int64"):
        TextGuidance(layer(), torch.ones(5, 16, dtype=torch.int64))
    guidance = TextGuidance(layer(), torch.randn(5, 16))
    with pytest.raises(ValueError, match=r"with C = 16, got \[2, 24, 7, 6\]; .* give channels="):
        guidance(torch.randn(2, 24, 7, 6))
    with pytest.raises(ValueError, match="list or tuple of tensors, got dict"):
        guidance({"out": torch.randn(2, 16, 7, 6)})
