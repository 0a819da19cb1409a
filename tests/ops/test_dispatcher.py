"""A call of an op goes to its body at once, or by way of PyTorch's dispatcher where somebody listens there."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fusekern import ops
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative

CALLS = []


@kernel_op("scaled_for_a_test", "(Tensor image, Tensor? weight, float factor=2.0) -> Tensor")
def scaled(image, weight, factor=2.0):
    CALLS.append(torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality))
    return image * factor if weight is None else image * weight * factor


@fake_of(scaled)
def _(image, weight, factor=2.0):
    return torch.empty_like(image)


@kernel_op("scaled_for_a_test_backward", "(Tensor grad, Tensor? weight, float factor) -> Tensor")
def scaled_backward(grad, weight, factor):
    return grad * factor if weight is None else grad * weight * factor


@fake_of(scaled_backward)
def _(grad, weight, factor):
    return torch.empty_like(grad)


def _setup_context(ctx, inputs, output):
    _, weight, ctx.factor = inputs
    ctx.save_for_backward(weight)


def _backward(ctx, grad):
    return scaled_backward(grad, *ctx.saved_tensors, ctx.factor), None, None


differentiate(scaled, _backward, _setup_context)
differentiate(scaled_backward, no_second_derivative("scaled_for_a_test"))
NAME = "fusekern::scaled_for_a_test"


class Names(TorchDispatchMode):
    """The dispatcher's ops that were called."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass that sees the ops which are called with it."""

    found = []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.found.append(function._schema.name)
        return super().__torch_dispatch__(function, types, args, kwargs or {})


@pytest.fixture
def image():
    CALLS.clear()
    return torch.randn(2, 3)


@pytest.mark.parametrize("leaf", [Tensor, nn.Parameter, None], ids=["tensor", "parameter", "none"])
@pytest.mark.parametrize("learns", [False, True])
def test_nobody_listens(image, leaf, learns):
    """The same result and gradient as the dispatcher's; which is not asked."""
    weight = None if leaf is None else torch.randn(3)
    weight = nn.Parameter(weight, requires_grad=False) if leaf is nn.Parameter else weight
    image.requires_grad_(learns)
    found, wanted = scaled(image, weight), scaled.op(image, weight)
    assert CALLS == [False, True]  # the dispatcher has its layer of gradients behind it, and excludes it
    assert torch.equal(found, wanted) and found.requires_grad == wanted.requires_grad == learns
    assert torch.equal(scaled(image, weight, 3.0), scaled.op(image, weight, 3.0))
    if learns:
        grad = torch.randn(2, 3)
        (one,), (other,) = (torch.autograd.grad(result, image, grad) for result in (found, wanted))
        assert torch.equal(one, other)
        (first,) = torch.autograd.grad(scaled(image, weight).square().sum(), image, create_graph=True)
        with pytest.raises(NotImplementedError, match="scaled_for_a_test has no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("learns", [False, True])
def test_a_mode_hears_of_it(image, learns):
    with Names() as names:
        result = scaled(image.requires_grad_(learns), None)
        if learns:
            result.sum().backward()
    assert NAME in names.found and ("aten::mul" not in names.found)
    assert (f"{NAME}_backward" in names.found) == learns


def test_a_profile_has_its_name(image):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        scaled(image, None)
    assert NAME in {event.name for event in found.events()}


@pytest.mark.parametrize("where", [0, 1])
def test_a_subclass_sees_it(image, where):
    arguments = [image, torch.randn(3)]
    arguments[where] = arguments[where].as_subclass(Tagged)
    Tagged.found.clear()
    scaled(*arguments)
    assert Tagged.found[0] == NAME


def test_batched_gradients():
    """PyTorch's ``vmap`` calls an op for one gradient after the other; the body would get a tensor without memory."""
    grads, key, value = torch.randn(4, 2, 6, 3, 3), *torch.randn(2, 2, 5, 6)
    maps = torch.randn(2, 6, 3, 3, requires_grad=True)
    for backend in ("auto", "reference"):
        result = ops.former2conv(maps, key, value, heads=2, backend=backend)
        one = partial(torch.autograd.grad, result, maps, retain_graph=True)
        (found,) = one(grads, is_grads_batched=True)
        torch.testing.assert_close(found, torch.stack([one(grad)[0] for grad in grads]))


@pytest.mark.parametrize("of", [Tensor, nn.Parameter])
def test_numbers_of_the_other_sign_are_made_so(image, of):
    seen = []
    turned = torch._neg_view(image) if of is Tensor else nn.Parameter(torch._neg_view(image), requires_grad=False)
    assert turned.is_neg()

    def look(tensor, weight):
        seen.append(tensor.is_neg())
        return tensor.clone()

    body, scaled.body = scaled.body, look
    try:
        assert torch.equal(scaled(turned, None), -2 * image) and not seen
    finally:
        scaled.body = body


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_traces_have_it(image):
    assert NAME in str(torch.jit.trace(lambda x: scaled(x, None), image).graph)
    assert "scaled_for_a_test" in make_fx(lambda x: scaled(x, None))(image).code
    graphs = []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: scaled(x, None), backend=look, fullgraph=True)(image)
    assert "scaled_for_a_test" in graphs[0]
