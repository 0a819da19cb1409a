"""fuse_inverted_residuals: the same model, run by our op."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fusekern import use_backend
from fusekern.nn import fuse_inverted_residuals
from fusekern.nn.inverted_residual import FusedInvertedResidual

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

MODELS = {
    "timm": (lambda: timm.create_model("mobilenetv2_035", num_classes=7), 16),
    "timm features": (lambda: timm.create_model("mobilenetv2_035", features_only=True), 16),
    "torchvision": (lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=7, dropout=0.0), 16),
}
every_model = pytest.mark.parametrize("name", MODELS)


def pair(name, **keywords):
    """A model whose norms are not at their initial values, and the same with our blocks."""
    torch.manual_seed(0)
    build, blocks = MODELS[name]
    plain = build()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.5)
    fused = copy.deepcopy(plain)
    assert fuse_inverted_residuals(fused, **keywords) == blocks
    return plain.double(), fused.double()


def loss_of(model, image):
    result = model(image)
    return sum(level.square().mean() for level in result) if isinstance(result, list) else result.square().mean()


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_computes_the_same(name, training):
    plain, fused = (model.train(training) for model in pair(name))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    losses = [loss_of(model, image) for model in (plain, fused)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for loss in losses:
        loss.backward()
    mine = dict(fused.named_parameters())
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[key].grad, parameter.grad, rtol=1e-6, atol=1e-9)
    for key, value in fused.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-9, atol=1e-9)


@every_model
@pytest.mark.parametrize("memory", ["default", "low"])
def test_kernels_and_reference_agree_on_a_whole_model(name, memory):
    """In fp32; by loss and gradient norm, since a ReLU6 near its kink may flip."""
    _, fused = (model.float() for model in pair(name, memory=memory))
    image = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found = {}
    for backend in ("auto", "reference"):
        model = copy.deepcopy(fused).train()
        with use_backend(backend):
            loss = loss_of(model, image)
            loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        found[backend] = torch.stack((loss.detach(), norm))
    torch.testing.assert_close(found["auto"], found["reference"], rtol=2e-3, atol=0)


@every_model
def test_state_dicts_go_both_ways(name):
    plain, fused = pair(name)
    assert list(plain.state_dict()) == list(fused.state_dict())
    for source, target in ((plain, fused), (fused, plain)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(1.01)
        target.load_state_dict(source.state_dict())
    assert all(torch.equal(value, fused.state_dict()[key]) for key, value in plain.state_dict().items())


def test_the_weights_are_the_same_tensors():
    model = MODELS["timm"][0]()
    before = list(model.parameters())
    fuse_inverted_residuals(model)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in before]


def test_survives_deepcopy_and_pickle():
    _, fused = pair("torchvision")
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = fused.eval()(image)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(image), expected)


def blocks_of(model):
    return sum(isinstance(module, FusedInvertedResidual) for module in model.modules())


def test_dilated_blocks_stay():
    model = timm.create_model("mobilenetv2_035", features_only=True, output_stride=16)
    count = fuse_inverted_residuals(model)
    dilated = sum(isinstance(m, nn.Conv2d) and m.dilation != (1, 1) for m in model.modules())
    assert dilated > 0 and count == blocks_of(model) == 16 - dilated


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (
            lambda: timm.create_model("mobilenetv2_035", drop_path_rate=0.5),
            r"; left as they are: 16 with drop_path \(DropPath\)",
        ),
        (lambda: timm.create_model("efficientnet_b0"), r"; left as they are: 15 with se \(SqueezeExcite\)"),
        (lambda: nn.Linear(2, 2), ""),
    ],
)
def test_other_blocks_stay_and_it_says_why(build, left):
    model = build()
    name = type(model).__name__
    with pytest.raises(ValueError, match=rf"model \({name}\) has no inverted residual of timm or .* to replace{left}$"):
        fuse_inverted_residuals(model)


def test_a_block_with_hooks_stays():
    model = timm.create_model("mobilenetv2_035")
    model.blocks[2][1].register_forward_hook(lambda module, arguments, result: None)
    assert fuse_inverted_residuals(model) == 15
    assert not isinstance(model.blocks[2][1], FusedInvertedResidual)


def swap(model, old, new):
    for name, child in list(model.named_children()):
        if isinstance(child, old):
            setattr(model, name, new(child))
        else:
            swap(child, old, new)


@every_model
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "old, new",
    [
        (nn.ReLU6, lambda child: nn.SiLU()),
        (nn.BatchNorm2d, lambda child: nn.GroupNorm(1, child.num_features).double()),
        (nn.Identity, lambda child: nn.Tanh()),
    ],
    ids=["activations", "norms", "what does nothing"],
)
def test_children_replaced_later_are_run(name, training, old, new):
    plain, fused = (model.train(training) for model in pair(name))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = loss_of(plain, image)
    for model in (plain, fused):
        swap(model, old, new)
    found, expected = loss_of(fused, image), loss_of(plain, image)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if name != "torchvision" or old is not nn.Identity:
        assert not torch.allclose(expected, before)


@every_model
def test_hooks_on_any_part_are_called(name):
    calls = {}
    for kind, model in zip(("plain", "fused"), pair(name), strict=True):
        calls[kind] = []
        for path, module in model.named_modules():
            if path and not any(module.children()) or type(module).__name__ == "Conv2dNormActivation":
                module.register_forward_hook(lambda *_, kind=kind, path=path: calls[kind].append(path))
        model.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert calls["fused"] == calls["plain"] != []


def test_attributes_stay():
    model = torchvision.models.mobilenet_v2()
    before = [(block.out_channels, block._is_cn) for block in model.features[2:-1]]
    fuse_inverted_residuals(model)
    assert [(block.out_channels, block._is_cn) for block in model.features[2:-1]] == before


def test_fx_takes_blocks_for_leaves():
    from torchvision.models.feature_extraction import create_feature_extractor

    plain, fused = (model.eval() for model in pair("torchvision"))
    extractor = create_feature_extractor(fused, ["features.6"], tracer_kwargs={"leaf_modules": [FusedInvertedResidual]})
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(extractor(image)["features.6"], plain.features[:7](image))


def test_wrong_names_are_refused_before_anything_changes():
    model = timm.create_model("mobilenetv2_035")
    with pytest.raises(ValueError, match="memory must be one of default, low, got 'tiny'"):
        fuse_inverted_residuals(model, memory="tiny")
    with pytest.raises(ValueError, match="backend must be one of"):
        fuse_inverted_residuals(model, backend="fast")
    assert blocks_of(model) == 0
