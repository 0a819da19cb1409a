"""What stands between the stages of inverted_bottleneck: batch norms, their gradients, what is kept, process groups.

The stages themselves are PyTorch in float64 here, so that nothing but the vectors between them is rounded to fp32.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from stages_in_torch import STAGES

from fusekern.ops import BatchNorm, inverted_bottleneck
from fusekern.ops.inverted_bottleneck import inverted_bottleneck_reference

MODULE = import_module("fusekern.ops.inverted_bottleneck")  # the package has the function under this name


def use_stages_in_torch(patch):
    patch(MODULE, "launch", lambda backend, op, stage, *arguments: STAGES[stage](*arguments))
    patch(MODULE, "resolve", lambda *arguments: "cpp")


@pytest.fixture
def stages(monkeypatch):
    use_stages_in_torch(monkeypatch.setattr)


def make(batch=3, channels=4, hidden=12, out=None, height=6, width=5, kernel=3, affine=True, dtype=torch.float64):
    """Image, weights and norms whose ReLU6 saturates at both ends."""
    out = channels if out is None else out
    image = torch.randn(batch, channels, height, width, dtype=dtype) + 0.5
    weights = [
        torch.randn(hidden, channels, 1, 1, dtype=dtype),
        torch.randn(hidden, 1, kernel, kernel, dtype=dtype),
        torch.randn(out, hidden, 1, 1, dtype=dtype),
    ]
    vectors = [[4 * torch.randn(c), torch.randn(c), torch.randn(c), torch.rand(c) + 0.5] for c in (hidden, hidden, out)]
    return image, weights, [[v.to(dtype) if affine or i > 1 else None for i, v in enumerate(of)] for of in vectors]


def leaves_of(image, weights, vectors):
    learned = [vector for of in vectors for vector in of[:2] if vector is not None]
    return [image, *weights, *learned]


def call(function, image, weights, vectors, batch, **keywords):
    """Result, statistics, and the gradients of all that is learned."""
    leaves = [
        leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for leaf in leaves_of(image, weights, vectors)
    ]
    rest = iter(leaves[4:])
    norms = tuple(
        BatchNorm(*(None if v is None else next(rest) for v in of[:2]), *of[2:], 0.1, on)
        for of, on in zip(vectors, batch, strict=True)
    )
    result, statistics = function(*leaves[:4], norms, **keywords)
    cotangent = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent)], statistics


TRAINED, FROZEN, MIXED = (True,) * 3, (False,) * 3, (True, False, True)


@pytest.mark.parametrize("batch", [TRAINED, FROZEN, MIXED])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize(
    "sizes, keywords",
    [
        ({}, {}),
        ({"kernel": 5, "affine": False}, {}),
        ({"out": 6}, {"residual": False, "stride": 2}),
        ({"kernel": 5, "height": 1, "width": 2}, {"residual": False}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_reference(stages, batch, memory, sizes, keywords, layout):
    image, weights, vectors = make(**sizes)
    image = image.contiguous(memory_format=layout)
    wanted, seen = call(inverted_bottleneck_reference, image, weights, vectors, batch, **keywords)
    found, mine = call(inverted_bottleneck, image, weights, vectors, batch, memory=memory, **keywords)
    for value, right in zip(found, wanted, strict=True):
        assert (value - right).abs().max() <= 2e-6 * right.abs().max()
    assert found[0].is_contiguous(memory_format=layout)
    assert [of is not None for of in mine] == [of is not None for of in seen] == list(batch)
    for of, right in zip(mine, seen, strict=True):
        if right is not None:
            torch.testing.assert_close(of, right, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        norms = tuple(BatchNorm(*of, 0.1, on) for of, on in zip(vectors, batch, strict=True))
        inference, _ = inverted_bottleneck(image, *weights, norms, **keywords)
    assert (inference - wanted[0]).abs().max() <= 2e-6 * wanted[0].abs().max()


def kept_bytes(function, leaves):
    """What a forward keeps for its backward, parameters left out."""
    kept = {}
    skip = {leaf.untyped_storage().data_ptr() for leaf in leaves[1:]}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(size for where, size in kept.items() if where not in skip)


@pytest.mark.parametrize(
    "expansion, memory, most", [(6, "default", 0.40), (2, "default", 0.45), (6, "low", 0.25), (2, "low", 0.30)]
)
def test_what_is_kept(stages, expansion, memory, most):
    image, weights, vectors = make(2, 64, 64 * expansion, height=16, width=16, dtype=torch.float32)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [leaf.requires_grad_() for leaf in leaves_of(image, weights, vectors)]
    norms = tuple(BatchNorm(*of, 1e-5, True) for of in vectors)
    ours = kept_bytes(lambda: inverted_bottleneck(image, *weights, norms, memory=memory)[0], leaves)
    eager = kept_bytes(lambda: inverted_bottleneck_reference(image, *weights, norms)[0], leaves)
    assert ours <= most * eager
    assert ours >= 0.9 * (4 if memory == "default" else 3) * image.nbytes  # the measure sees what must be kept


def test_nothing_is_kept_without_gradients(stages):
    image, weights, vectors = make()
    norms = tuple(BatchNorm(*of, 0.1, True) for of in vectors)
    arguments = [image, *weights, *(part for norm in norms for part in norm[:4])]
    settings = ([0.1] * 3, [True] * 3, 1, True)
    _, *kept = torch.ops.fusekern.inverted_bottleneck(*arguments, *settings, False, False, "", "cpp")
    assert [tensor.numel() for tensor in kept[:3]] == [0, 0, 0]
    assert [tensor.shape for tensor in kept[3:]] == [(5, 12), (5, 12), (5, 4)]


@pytest.mark.parametrize("batch, learning, low", [(TRAINED, True, False), (MIXED, True, True), (FROZEN, False, False)])
def test_opcheck(stages, batch, learning, low):
    image, weights, vectors = make(dtype=torch.float32)
    leaves = [leaf.requires_grad_(learning) for leaf in leaves_of(image, weights, vectors)]
    assert len(leaves) == 10
    arguments = (image, *weights, *(part for of in vectors for part in of), [0.1] * 3, list(batch), 1, True)
    torch.library.opcheck(torch.ops.fusekern.inverted_bottleneck, (*arguments, learning, low, "", "cpp"))


def test_opcheck_of_inference(stages):
    image, weights, vectors = make(dtype=torch.float32)
    parts = [part for weight, bias, mean, var in vectors for part in (weight, None, mean, var)]
    arguments = image, *weights, *parts, [0.1] * 3, 1, True, "cpp"
    torch.library.opcheck(torch.ops.fusekern.inverted_bottleneck_infer, arguments)


def test_a_second_derivative_is_refused_by_name(stages):
    image, weights, vectors = make()
    image.requires_grad_()
    norms = tuple(BatchNorm(*of, 0.1, True) for of in vectors)
    result, _ = inverted_bottleneck(image, *weights, norms)
    (first,) = torch.autograd.grad(result.square().sum(), image, create_graph=True)
    with pytest.raises(NotImplementedError, match="inverted_bottleneck has no second derivative"):
        first.sum().backward()


def test_statistics_carry_no_gradient(stages):
    image, weights, vectors = make()
    image.requires_grad_()
    _, seen = inverted_bottleneck(image, *weights, tuple(BatchNorm(*of, 0.1, True) for of in vectors))
    assert not any(part.requires_grad for of in seen for part in of)


@pytest.mark.parametrize("batch", [TRAINED, FROZEN])
def test_buffers_may_change_before_the_backward(stages, batch):
    image, weights, vectors = make()
    wanted, _ = call(inverted_bottleneck_reference, image, weights, vectors, batch)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (image, *weights)]
    buffers = [[vector.clone() for vector in of] for of in vectors]
    norms = tuple(BatchNorm(*of, 0.1, on) for of, on in zip(buffers, batch, strict=True))
    result, _ = inverted_bottleneck(*leaves, norms)
    for norm in norms:
        norm.mean.add_(1)
        norm.var.mul_(2)
    cotangent = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    for value, right in zip(torch.autograd.grad(result, leaves, cotangent), wanted[1:5], strict=True):
        assert (value - right).abs().max() <= 2e-6 * right.abs().max()


def test_one_pixel_has_no_variance(stages):
    image, weights, vectors = make(1, height=2, width=2)
    norms = tuple(BatchNorm(*of, 0.1, True) for of in vectors)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training: norms\[1\]"):
        inverted_bottleneck(image, *weights, norms, stride=2, residual=False)
    inverted_bottleneck(image, *weights, norms)


SPLIT = (3, 1)  # images of each process


def work(rank, backend, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    if backend == "stages":
        use_stages_in_torch(setattr)
    image, weights, vectors = make(sum(SPLIT))
    image = image.split(SPLIT)[rank]
    keywords = {"group": dist.group.WORLD.group_name, "backend": "auto" if backend == "stages" else backend}
    found, seen = call(inverted_bottleneck, image, weights, vectors, TRAINED, **keywords)
    torch.save((found, [part for of in seen for part in of]), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["stages", "reference"])
def test_two_processes_with_unequal_batches_are_one_with_both(tmp_path, backend):
    torch.multiprocessing.spawn(work, (backend, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    torch.manual_seed(0)
    image, weights, vectors = make(sum(SPLIT))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(image, weights, vectors)]
    norms = tuple(BatchNorm(leaves[4 + 2 * i], leaves[5 + 2 * i], *vectors[i][2:], 0.1, True) for i in range(3))
    result, seen = inverted_bottleneck_reference(*leaves[:4], norms)
    halves = result.split(SPLIT)
    cotangents = [torch.linspace(-1, 1, half.numel(), dtype=half.dtype).view(half.shape) for half in halves]
    wanted = torch.autograd.grad(result, leaves, torch.cat(cotangents))
    found = [values for values, _ in results]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]]), result.detach(), **close)
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]]), wanted[0], **close)
    for index, right in enumerate(wanted[1:], 2):  # each process has its own part, as under DDP before it averages
        torch.testing.assert_close(found[0][index] + found[1][index], right, **close)
    for rank in (0, 1):
        for part, right in zip(results[rank][1], (part for of in seen for part in of), strict=True):
            torch.testing.assert_close(part, right, **close)
