"""A layer in inference computes from the weights that it has now, whichever way they came there.

The layer keeps nothing made of its weights between two calls, on purpose: a write through ``.data`` changes neither the
tensor's address nor its version, so that nothing kept could know of it.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fusekern import ConvFormer
from fusekern.backends import BACKENDS
from fusekern.nn import TextGuidance

CPP = pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing)
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
every_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("reference", "cpu"),
        ("auto", "cpu"),
        pytest.param("cpp", "cpu", marks=CPP),
        pytest.param("auto", "cuda", marks=CUDA),
    ],
)
every_inference = pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(backend, device):
    """A layer whose tensors are all random, the running statistics too."""
    layer = ConvFormer(16, blocks=2, bridge_heads=2, text_heads=2, expansion=2, backend=backend).to(device).eval()
    layer.load_state_dict(another(layer))
    return layer


def another(layer):
    """Other weights for a layer of this shape."""
    state = {}
    for name, tensor in layer.state_dict().items():
        if name.endswith("var"):
            state[name] = torch.rand_like(tensor) + 0.5
        elif tensor.is_floating_point():
            state[name] = 0.3 * torch.randn_like(tensor) + (tensor.dim() == 1)
        else:
            state[name] = tensor + 1
    return state


def inputs(device):
    return torch.randn(2, 16, 7, 6, device=device), torch.randn(5, 16, device=device)


def run(inference, layer, *arguments):
    with inference():
        return layer(*arguments)


def fresh(layer):
    """A new layer with copies of the weights."""
    found = build(layer.backend, next(layer.parameters()).device)
    found.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    return found


def same(found, wanted):
    return [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)]


def assert_same(found, wanted):
    """To the bit; on a GPU a library may add in another order for tensors that lie elsewhere."""
    for one, other in zip(found, wanted, strict=True):
        most = 1e-4 * other.abs().max() if other.is_cuda else 0
        assert (one - other).abs().max() <= most


# The ways to change a layer; each returns the layer that has changed.


def _load(layer):
    layer.load_state_dict(another(layer))
    return layer


def _assign(layer):
    layer.load_state_dict(another(layer), assign=True)
    return layer


def _exchange(layer):
    """As ``load_state_dict`` and ``to`` do under ``torch.__future__.set_swap_module_params_on_conversion``."""
    for parameter in layer.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.randn_like(parameter)))
    return layer


def _write_into_data(layer):
    state = another(layer)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        tensor.data.copy_(state[name])
    return layer


def _give_other_data(layer):
    state = another(layer)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        tensor.data = state[name]
    return layer


def _copy_without_gradients(layer):
    state = another(layer)
    with torch.no_grad():
        for name, tensor in layer.state_dict(keep_vars=True).items():
            tensor.copy_(state[name])
    return layer


def _copy_in_inference_mode(layer):
    state = another(layer)
    with torch.inference_mode():
        for name, tensor in layer.state_dict(keep_vars=True).items():
            tensor.copy_(state[name])
    return layer


def _write_through_numpy(layer):
    if next(layer.parameters()).device.type != "cpu":
        pytest.skip("numpy shares memory with tensors on a CPU")
    for parameter in layer.parameters():
        parameter.detach().numpy()[...] *= 1.5
    return layer


def _scale_a_copy(layer):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    return layer


def _from_a_vector(layer):
    vector_to_parameters(torch.randn_like(parameters_to_vector(layer.parameters())), layer.parameters())
    return layer


def _new_modules(layer):
    layer.blocks[0] = copy.deepcopy(layer.blocks[1])
    return layer


def _new_parameters(layer):
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn_like(parameter)))
    return layer


def _there_and_back(layer):
    for parameter in layer.double().parameters():
        parameter.data.mul_(1.5)
    return layer.float()


def _train(layer):
    optimizer = torch.optim.AdamW(layer.train().parameters(), lr=0.1)
    for _ in range(2):
        found = layer(*inputs(next(layer.parameters()).device))
        optimizer.zero_grad()
        (found.image.square().mean() + found.score.square().mean()).backward()
        optimizer.step()
    return layer.eval()


WAYS = [
    *(_load, _assign, _exchange, _write_into_data, _give_other_data, _copy_without_gradients, _copy_in_inference_mode),
    *(_write_through_numpy, _scale_a_copy, _from_a_vector, _new_modules, _new_parameters, _there_and_back, _train),
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__[1:])


@every_backend
@every_inference
@every_way
def test_inference_has_the_weights_of_now(backend, device, inference, way):
    layer, arguments = build(backend, device), inputs(device)
    before = [run(inference, layer, *arguments) for _ in range(2)][-1]
    changed = way(layer)
    found = run(inference, changed, *arguments)
    assert not any(same(found, before))
    assert_same(found, run(inference, fresh(changed), *arguments))


@every_backend
def test_a_copy_leaves_the_first_as_it_was(backend, device):
    layer, arguments = build(backend, device), inputs(device)
    before = run(torch.no_grad, layer, *arguments)
    run(torch.no_grad, _load(copy.deepcopy(layer)), *arguments)
    assert all(same(run(torch.no_grad, layer, *arguments), before))


@every_backend
def test_no_tensor_is_forgotten(backend, device):
    """One after the other, through ``.data``, the running statistics too."""
    layer, arguments = build(backend, device), inputs(device)
    before = run(torch.no_grad, layer, *arguments)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        tensor.data.mul_(1.5).add_(0.1)
        found = run(torch.no_grad, layer, *arguments)
        # A bias of the keys shifts the similarities of a pixel alike, which softmax ignores.
        assert name.endswith("key.bias") or not all(same(found, before)), name
        assert_same(found, run(torch.no_grad, fresh(layer), *arguments))
        before = found


class _Remembers(ConvFormer):
    """A layer that keeps its result until a weight's address or version changes."""

    def forward(self, image, text):
        now = [(p.data_ptr(), p._version) for p in self.parameters()]
        if getattr(self, "then", None) != now:
            self.then, self.found = now, super().forward(image, text)
        return self.found


def test_the_check_can_fail():
    layer, arguments = _Remembers(16, blocks=1, bridge_heads=2, text_heads=2, expansion=2).eval(), inputs("cpu")
    before = run(torch.no_grad, layer, *arguments)
    assert not any(same(run(torch.no_grad, _copy_without_gradients(layer), *arguments), before))
    before = run(torch.no_grad, layer, *arguments)
    assert all(same(run(torch.no_grad, _write_into_data(layer), *arguments), before))


# Another vocabulary


def _other_tensor(text):
    return torch.randn(9, *text.shape[1:], device=text.device)


def _in_place(text):
    return text.normal_()


def _in_its_data(text):
    text.data.mul_(1.5).add_(0.1)
    return text


def _of_the_same_memory(text):
    return text[:3]


every_change_of_text = pytest.mark.parametrize(
    "change", [_other_tensor, _in_place, _in_its_data, _of_the_same_memory], ids=lambda change: change.__name__[1:]
)


@every_backend
@every_inference
@every_change_of_text
def test_inference_has_the_vocabulary_of_now(backend, device, inference, change):
    layer, (image, text) = build(backend, device), inputs(device)
    before = run(inference, layer, image, text)
    text = change(text)
    found = run(inference, layer, image, text)
    assert not torch.equal(found.image, before.image)
    assert_same(found, run(inference, fresh(layer), image, text.clone()))


@every_backend
@every_inference
@pytest.mark.parametrize("way", ["copy_", "data", "load_state_dict", "assign", "setattr"])
def test_a_module_that_holds_its_text_has_that_of_now(backend, device, inference, way):
    image, text = inputs(device)
    guidance = TextGuidance(build(backend, device), text).eval()
    before = run(inference, guidance, image)
    new = torch.randn_like(text)
    if way == "copy_":
        guidance.text.copy_(new)
    elif way == "data":
        guidance.text.data.copy_(new)
    elif way == "setattr":
        guidance.text = new
    else:
        guidance.load_state_dict({**guidance.state_dict(), "text": new}, assign=way == "assign")
    found = run(inference, guidance, image)
    assert not torch.equal(found, before)
    assert_same([found], [run(inference, TextGuidance(fresh(guidance.layer), new), image)])
