"""What people do to a layer's children has its effect, whether or not an op could take their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fusekern.backends import EXTENSIONS
from fusekern.errors import FusekernError
from fusekern.nn import ConvFormer, InvertedBottleneck

pytestmark = pytest.mark.skipif(bool(EXTENSIONS["_C"]), reason=f"needs fusekern._C: {EXTENSIONS['_C']}")

CHANNELS = 16
TEXT_CHILDREN = (
    *("image_to_text.query", "image_to_text.out", "image_to_text.norm"),
    *("transformer.qkv", "transformer.out", "transformer.norm1"),
    *("transformer.up", "transformer.down", "transformer.norm2"),
    *("text_to_image.key", "text_to_image.value"),
)
CHILDREN = ("image_to_text.downsample", *TEXT_CHILDREN, "bottleneck.depthwise", "bottleneck.norm2")
LINEAR = tuple(name for name in TEXT_CHILDREN if "norm" not in name)


class Around(nn.Module):
    """An adapter, as those that freeze a layer and learn beside it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.inside(x) * self.gain


def layer(seed=0):
    torch.manual_seed(seed)
    return ConvFormer(CHANNELS, blocks=2, bridge_heads=2, text_heads=2, expansion=2).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, CHANNELS, 7, 6, generator=generator), torch.randn(2, 5, CHANNELS, generator=generator)


def scaled(name):
    """A layer in which this child of each block gives 1.5 times as much, by its own weights."""
    model = layer()
    with torch.no_grad():
        for block in model.blocks:
            child = block.get_submodule(name)
            for tensor in (child.weight, child.bias):
                if tensor is not None:
                    tensor.mul_(1.5)
    return model


def put(model, name, change):
    for block in model.blocks:
        parent, _, last = name.rpartition(".")
        of = block.get_submodule(parent)
        setattr(of, last, change(getattr(of, last)))
    return model


def asked_for(model, backend):
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def by_hook(child):
    child.register_forward_hook(lambda module, arguments, result: result * 1.5)
    return child


def by_forward(child):
    inner = child.forward
    child.forward = lambda x: inner(x) * 1.5
    return child


def by_subclass(child):
    def forward(self, x):
        return kind.forward(self, x) * 1.5

    kind = type(child)
    child.__class__ = type("Own", (kind,), {"forward": forward})
    return child


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("name", CHILDREN)
@pytest.mark.parametrize("way", [Around, by_hook, by_forward, by_subclass])
def test_a_changed_child_counts(way, name, backend):
    model = put(layer(), name, way)
    with torch.no_grad():
        assert_close(asked_for(model, backend)(*data()), scaled(name)(*data()))


@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_learns(name):
    model = put(layer(), name, Around)
    sum(part.square().sum() for part in model(*data())).backward()
    gains = [block.get_submodule(name).gain.grad for block in model.blocks]
    assert all(grad is not None and grad != 0 for grad in gains)


@pytest.mark.parametrize("name", LINEAR)
def test_a_pruned_weight_is_made_again(name):
    model, other = layer(), layer()
    for block in model.blocks:
        prune.l1_unstructured(block.get_submodule(name), "weight", 0.5)
    with torch.no_grad():
        for block, plain in zip(model.blocks, other.blocks, strict=True):
            pruned = block.get_submodule(name)
            pruned.weight_orig.mul_(3)
            plain.get_submodule(name).weight.copy_(pruned.weight_orig * pruned.weight_mask)
        assert_close(model(*data()), other(*data()))


@pytest.mark.parametrize("name", LINEAR)
def test_a_parametrized_child_stays_with_the_op(name):
    model = layer()
    for block in model.blocks:
        parametrizations.weight_norm(block.get_submodule(name))
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = model(*data())
    assert "fusekern::text_path" in {event.name for event in profile.events()}
    with torch.no_grad():
        assert_close(found, layer()(*data()))


@pytest.mark.parametrize("part", ["image_to_text", "transformer", "text_to_image"])
def test_hooks_on_the_parts_are_called(part):
    seen, model = [], layer()
    for block in model.blocks:
        block.get_submodule(part).register_forward_hook(lambda module, arguments, result: seen.append(module))
    with torch.no_grad():
        assert_close(model(*data()), layer()(*data()))
    assert seen == [block.get_submodule(part) for block in model.blocks]


@pytest.mark.parametrize("part", ["image_to_text", "transformer", "text_to_image", "blocks"])
def test_parts_may_be_wrapped(part):
    class Inside(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, *arguments):
            return self.inside(*arguments)

    model = layer()
    if part == "blocks":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Inside(block)
    else:
        put(model, part, Inside)
    with torch.no_grad():
        assert_close(model(*data()), layer()(*data()))


def test_a_hook_on_a_block_may_change_the_text():
    def less(module, arguments):
        image, text, *rest = arguments
        return image, text * 0.5, *rest

    model, other = layer(), layer()
    for one in (model, other):
        one.blocks[1].register_forward_pre_hook(less)
    with torch.no_grad():
        assert_close(model(*data()), asked_for(other, "reference")(*data()))


def test_layers_without_bias_and_other_eps():
    model = layer()
    for block in model.blocks:
        block.transformer.up = nn.Linear(CHANNELS, 2 * CHANNELS, bias=False)
        block.transformer.norm2 = nn.LayerNorm(CHANNELS, eps=0.5, bias=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.blocks:
            up = nn.Linear(CHANNELS, 2 * CHANNELS)
            up.weight.copy_(block.transformer.up.weight)
            up.bias.zero_()
            block.transformer.up = up
            block.transformer.norm2 = nn.LayerNorm(CHANNELS, eps=0.5)
        assert_close(model(*data()), other(*data()))
        for block in other.blocks:
            block.transformer.norm2.eps = 1e-5
        assert (model(*data()).text - other(*data()).text).abs().max() > 0.01


@pytest.mark.parametrize("change", [{"dilation": (2, 2), "padding": (2, 2)}, {"padding_mode": "reflect"}])
def test_another_convolution_runs_itself(change):
    torch.manual_seed(0)
    module = InvertedBottleneck(8, 2).eval()
    own = nn.Conv2d(16, 16, 3, groups=16, bias=False, **{"padding": 1, **change})
    own.load_state_dict(module.depthwise.state_dict())
    module.depthwise = own
    image = torch.randn(2, 8, 7, 6)
    hidden = nn.functional.relu6(module.norm1(module.expand(image)))
    hidden = nn.functional.relu6(module.norm2(own(hidden)))
    torch.testing.assert_close(module(image), image + module.norm3(module.project(hidden)))


def test_another_downsampling_runs_itself():
    model = layer()
    bridge, (image, _) = model.blocks[0].image_to_text, data()
    own = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=3, dilation=2)
    own.load_state_dict(bridge.downsample.state_dict())
    bridge.downsample = own
    with torch.no_grad():
        assert torch.equal(bridge.tokens(image), own(image))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_tangents(frozen, train):
    model = layer().train(train).requires_grad_(not frozen).double()
    image, text = (part.double() for part in data())
    tangents = torch.randn_like(image), torch.randn_like(text)
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, (image, text), tangents)
        found = [torch.autograd.forward_ad.unpack_dual(part).tangent for part in model(*duals)]
    step = 1e-6
    ahead, behind = (model(image + s * tangents[0], text + s * tangents[1]) for s in (step, -step))
    for one, high, low in zip(found, ahead, behind, strict=True):
        torch.testing.assert_close(one, (high - low) / (2 * step), rtol=1e-5, atol=1e-6)


def test_tangents_in_fp32_are_not_dropped():
    model, (image, text) = layer().requires_grad_(False), data()
    wanted = torch.func.jvp(lambda image: tuple(model(image, text)), (image,), (torch.ones_like(image),))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image, torch.ones_like(image))
        assert_close([torch.autograd.forward_ad.unpack_dual(part).tangent for part in model(dual, text)], wanted)
        with pytest.raises(FusekernError, match="it does not work under forward-mode derivatives"):
            asked_for(model, "cpp")(dual, text)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced():
    model = layer()
    with torch.no_grad():
        traced = torch.jit.trace(model, data())
        assert "fusekern::" not in str(traced.inlined_graph)
        assert_close(traced(*data()), model(*data()))


@pytest.mark.parametrize(
    "image, text, message",
    [
        (
            torch.zeros(1, CHANNELS, 3, 3),
            torch.zeros(0, CHANNELS),
            r"text must hold at least one token; got shape \[0, 16\]",
        ),
        (torch.zeros(1, CHANNELS, 6, 6), torch.zeros(2, CHANNELS).half(), "text is torch.float16, image torch.float32"),
        (torch.zeros(1, CHANNELS, 6, 6), torch.zeros(2, CHANNELS, device="meta"), "text is on meta, image on cpu"),
    ],
)
def test_refused(image, text, message):
    with pytest.raises(ValueError, match=message):
        layer()(image, text)
