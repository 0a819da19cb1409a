"""The kernels of inverted_bottleneck against float64, as a whole.

By the rule of errors where ReLU6 is far from its kinks: a value that lies on the other side of one has another slope,
and PyTorch's own results differ there by as much. Across the kinks by the share of pixels that differ, and by what
remains when the flipped ones are few. The masks themselves are tested stage by stage.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import CUDA, device_of, dtypes_of, every_backend

from fusekern import use_backend
from fusekern.backends import BACKENDS
from fusekern.nn import ConvFormer
from fusekern.ops import BatchNorm, inverted_bottleneck
from fusekern.ops.inverted_bottleneck import inverted_bottleneck_reference

# The gradient of the second norm's bias: zero without a kink, since the third norm takes every shift away again.
BIAS2 = 8


def backend_of(name):
    return "cuda" if name == "triton" else name


def make(batch, channels, expansion, out, height, width, kernel, spread):
    """ReLU6 sees 3 +- spread times a normal value."""
    hidden = channels * expansion
    image = torch.randn(batch, channels, height, width, dtype=torch.float64)
    weights = [
        torch.randn(hidden, channels, 1, 1, dtype=torch.float64) / channels**0.5,
        torch.randn(hidden, 1, kernel, kernel, dtype=torch.float64) / kernel,
        torch.randn(out, hidden, 1, 1, dtype=torch.float64) / hidden**0.5,
    ]
    vectors = []
    for count, inside in ((hidden, True), (hidden, True), (out, False)):
        weight = spread * (1 + 0.1 * torch.rand(count, dtype=torch.float64)) if inside else torch.rand(count).double()
        bias = torch.full_like(weight, 3.0) if inside else torch.randn(count, dtype=torch.float64)
        vectors += [weight, bias]
    return [image, *weights, *vectors]


def run(function, tensors, cotangent, running, **keywords):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    norms = []
    for i in range(3):
        weight, bias = leaves[4 + 2 * i : 6 + 2 * i]
        mean, var = torch.zeros_like(bias), torch.ones_like(bias)
        norms.append(BatchNorm(weight, bias, mean.detach(), var.detach(), 1e-5, not running))
    result, _ = function(*leaves[:4], tuple(norms), **keywords)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent.to(result.dtype))]


@every_backend
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parity_far_from_the_kinks(backend, lay_out, data):
    if BACKENDS[backend].device == "cuda" and not CUDA:
        pytest.skip("needs a CUDA device")
    stride = data.draw(st.sampled_from([1, 2]), "stride")
    channels = data.draw(st.sampled_from([3, 8, 16, 24]), "channels")
    out = channels if stride == 1 else data.draw(st.sampled_from([5, 16]), "out")
    tensors = make(
        data.draw(st.integers(2, 3), "batch"),
        channels,
        data.draw(st.sampled_from([1, 2, 6]), "expansion"),
        out,
        data.draw(st.integers(6, 13), "height"),
        data.draw(st.integers(6, 20), "width"),
        data.draw(st.sampled_from([3, 5]), "kernel"),
        spread=0.4,  # 7 standard deviations
    )
    tensors = [tensor.to(device_of(backend), torch.float32) for tensor in tensors]
    tensors[0] = lay_out(data.draw(st.sampled_from(["plain", "permuted", "sliced"]), "layout"), tensors[0])
    memory = data.draw(st.sampled_from(["default", "low"]), "memory")
    running = data.draw(st.booleans(), "running")
    settings_of_both = {"stride": stride, "residual": stride == 1}
    shape = run_shape(tensors, stride)
    cotangent = torch.randn(shape, dtype=torch.float64).to(tensors[0])
    found = run(
        inverted_bottleneck, tensors, cotangent, running, memory=memory, backend=backend_of(backend), **settings_of_both
    )
    doubles = [tensor.double() for tensor in tensors]
    truth = run(inverted_bottleneck_reference, doubles, cotangent.double(), running, **settings_of_both)
    peers = [
        run(
            inverted_bottleneck_reference,
            [tensors[0].contiguous(memory_format=layout), *tensors[1:]],
            cotangent,
            running,
            **settings_of_both,
        )
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    if not running:
        assert found[BIAS2].abs().max() < 1e-4 and truth[BIAS2].abs().max() < 1e-9
    # Vectors of a few elements, on which a peer may be lucky: how good they are shows in the next test.
    theirs = torch.stack([errors(peer, truth) for peer in peers]).amax(0)
    assert (errors(found, truth) <= (2 * theirs).clamp_min(2**-16)).all()


@every_backend
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("size", [(2, 16, 2, 16, 12, 12, 3), (2, 64, 6, 64, 16, 16, 3)])
def test_as_good_as_pytorch(backend, size, running):
    """The rule for relative L2 errors, over six draws: on one of them, either may be lucky with a vector."""
    for dtype in dtypes_of(backend):
        ours, theirs = torch.zeros(10), torch.zeros(10)
        for seed in range(6):
            torch.manual_seed(seed)
            tensors = [tensor.to(device_of(backend), dtype) for tensor in make(*size, spread=0.4)]
            cotangent = torch.randn(run_shape(tensors, 1), dtype=torch.float64).to(tensors[0])
            doubles = [tensor.double() for tensor in tensors]
            truth = run(inverted_bottleneck_reference, doubles, cotangent.double(), running)
            found = run(inverted_bottleneck, tensors, cotangent, running, backend=backend_of(backend))
            ours += errors(found, truth)
            last = [tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:]]
            peers = [run(inverted_bottleneck_reference, peer, cotangent, running) for peer in (tensors, last)]
            theirs += torch.stack([errors(peer, truth) for peer in peers]).amax(0)
        allowed = 2 * theirs + 6 * 2**-22 if dtype == torch.float32 else 1.1 * theirs
        assert (ours <= allowed).all(), (ours / theirs).tolist()


def errors(found, truth):
    """Relative L2 errors."""
    pairs = list(zip(found, truth, strict=True))
    del pairs[BIAS2]
    return torch.tensor([(mine.double() - right).norm() / right.norm() for mine, right in pairs])


def run_shape(tensors, stride):
    image, project = tensors[0], tensors[3]
    return image.shape[0], project.shape[0], -(-image.shape[2] // stride), -(-image.shape[3] // stride)


@every_backend
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("running", [False, True])
def test_parity_across_the_kinks(backend, memory, running):
    tensors = [t.to(device_of(backend), torch.float32) for t in make(2, 32, 6, 32, 14, 15, 3, spread=3.0)]
    cotangent = torch.randn(run_shape(tensors, 1), device=tensors[0].device)
    found = run(inverted_bottleneck, tensors, cotangent, running, memory=memory, backend=backend_of(backend))
    truth = run(inverted_bottleneck_reference, [t.double() for t in tensors], cotangent.double(), running)
    assert ((found[0] - truth[0]).abs().amax((1,)) > 1e-4).double().mean() == 0
    for mine, right in zip(found, truth, strict=True):
        assert (mine.double() - right).norm() <= 1e-4 * right.norm()


@every_backend
def test_ten_steps_of_six_blocks(backend):
    torch.manual_seed(0)
    layer = ConvFormer(32, blocks=6, bridge_heads=2, text_heads=2, expansion=2).to(device_of(backend))
    image, text = torch.randn(4, 32, 12, 12), torch.randn(5, 32)
    image, text = (tensor.to(device_of(backend)) for tensor in (image, text))
    target = torch.randint(0, 5, (4, 12, 12), device=image.device)

    def losses(name, perturb=0.0):
        model, found = copy.deepcopy(layer), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        with use_backend(name):
            for _ in range(10):
                loss = torch.nn.functional.cross_entropy(model(image + perturb, text).score / 0.07, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
        return torch.stack(found)

    wanted, noise = losses("reference"), losses("reference", 1e-6)
    found = losses("auto")
    assert wanted[-1] < 0.9 * wanted[0]
    # As near as the reference is to itself on an image that differs in its last bits.
    assert (found - wanted).abs().max() <= 10 * (noise - wanted).abs().max() + 1e-5
