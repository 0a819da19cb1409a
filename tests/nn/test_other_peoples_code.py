"""What people do to modules and tensors around a layer: no backend may answer another way than plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusekern import ConvFormer, ops
from fusekern.nn import InvertedBottleneck, TextTransformer

BACKENDS = ["auto", "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(backend: str, blocks: int = 2) -> tuple[ConvFormer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = ConvFormer(16, blocks=blocks, bridge_heads=2, text_heads=2, backend=backend)
    return layer, torch.randn(2, 16, 7, 8), torch.randn(5, 16)


class Halved(InvertedBottleneck):
    def forward(self, image):
        return 0.5 * super().forward(image)


@pytest.mark.parametrize("way", ["subclass", "instance"])
def test_a_bottleneck_with_a_forward_of_its_own(way):
    found = []
    for backend in BACKENDS:
        layer, image, text = make(backend)
        own = layer.blocks[0].bottleneck
        if way == "subclass":
            layer.blocks[0].bottleneck = Halved(16, backend=backend)
            layer.blocks[0].bottleneck.load_state_dict(own.state_dict())
        else:
            own.forward = lambda image, forward=own.forward: 0.5 * forward(image)
        out = layer(image, text)
        out.score.square().mean().backward()
        found.append([*out, layer.blocks[0].transformer.up.weight.grad])
    plain = make("auto")
    assert not torch.allclose(plain[0](*plain[1:]).score, found[0][2], atol=1e-3)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [lambda: TextTransformer(16, 2), lambda: InvertedBottleneck(16)])
def test_hooks_of_all_modules_act(kind):
    torch.manual_seed(0)
    module = kind().eval()
    given = torch.randn(2, 5, 16) if isinstance(module, TextTransformer) else torch.randn(2, 16, 7, 8)
    plain = module(given)

    def doubled(child, arguments, result):
        return 2 * result if isinstance(child, (nn.Linear, nn.Conv2d)) else None

    with nn.modules.module.register_module_forward_hook(doubled):
        found = module(given)
    handles = [child.register_forward_hook(doubled) for child in module.modules()]
    torch.testing.assert_close(found, module(given))
    assert len(handles) > 3 and not torch.allclose(found, plain, atol=1e-2)


@every_backend
def test_weights_that_nothing_depends_on_have_no_gradient(backend):
    layer, image, text = make(backend)
    layer(image, text).text.sum().backward()
    last = layer.blocks[1].text_to_image
    assert all(parameter.grad is None for parameter in (*last.key.parameters(), *last.value.parameters()))
    first = layer.blocks[0].text_to_image
    assert all(parameter.grad is not None for parameter in (*first.key.parameters(), *first.value.parameters()))


@every_backend
def test_compiled_autograd(backend):
    grads = []
    for compiled in (False, True):
        layer, image, text = make(backend, blocks=1)
        image.requires_grad_()
        loss = layer(image, text).score.square().mean()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        grads.append([image.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_an_image_changed_before_the_backward_is_noticed():
    layer, image, text = make("auto", blocks=1)
    wide = image.clone().requires_grad_() * 1
    loss = layer(wide, text).score.square().mean()
    wide.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_backend
def test_a_scale_is_a_number(backend):
    image, text, scale = torch.randn(2, 16, 7, 8), torch.randn(2, 5, 16), torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="scale must be a number, got a tensor"):
        ops.former2conv(image, text, text, heads=2, scale=scale, backend=backend)
    with pytest.raises(ValueError, match="scale must be a number, got a tensor"):
        ops.conv2former(text, image, heads=2, scale=scale, backend=backend)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_an_even_kernel_is_refused(size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd, got {size}"):
        InvertedBottleneck(16, kernel_size=size)


@every_backend
def test_norms_whose_averages_were_taken_away(backend):
    torch.manual_seed(0)
    module, image = InvertedBottleneck(16, backend=backend), torch.randn(2, 16, 7, 8)
    expected = module(image)
    for norm in (module.norm1, module.norm2):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    torch.testing.assert_close(module(image), expected)
    assert module.norm3.num_batches_tracked == 2
