"""Inference, the op over its stages, and their launches. The depthwise stages are CUDA, see test_cuda_tiles.py: without
a device a stand-in takes their place."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from bottleneck_block import CASES, CL, NCHW, Block, affine, assert_guarded, by_gram, guarded, pointwise
from fusekern.kernels import inverted_bottleneck as kernels
from fusekern.kernels import inverted_bottleneck_places as places
from layouts import lay_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from where import DEVICE, DTYPES, INTERPRETED

from fusekern import extensions
from fusekern.ops import BatchNorm
from fusekern.ops.inverted_bottleneck import inverted_bottleneck_reference
from fusekern.testing import assert_parity

sys.path.append(str(Path(__file__).parents[1] / "ops"))
import stages_in_torch

# The package has the functions under these names.
OP, BEHIND = (import_module(f"fusekern.ops.{name}") for name in ("inverted_bottleneck", "former2conv"))


def join(partial: Tensor, size: int, pixels: int, vectors: Tensor, *norm: Tensor | float | None) -> None:
    """As many values as the tiles have pixels, with the tiles' moments."""
    tiles = -(-size // pixels)
    counts = torch.tensor([min(pixels, size - i % tiles * pixels) for i in range(len(partial))])[:, None]
    count, (means, squares) = counts.sum(), partial.unbind(1)
    mean = (counts * means).sum(0) / count
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    weight, bias, eps = norm
    scale = (squares / count + eps).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean * scale
    vectors.copy_(torch.stack((scale, shift, mean, squares / count, squares / (count - 1).clamp_min(1))))


@pytest.fixture
def depthwise():
    """Without a device the ops of ``torch.ops.fusekern_cuda`` have stand-ins for a CPU."""
    if not INTERPRETED:
        yield
        return
    library = torch.library.Library("fusekern_cuda", "FRAGMENT")
    if extensions.load("_C_cuda"):
        library.define(
            "bn_relu6_dw_fwd(Tensor y1, Tensor? affine, Tensor weight, int stride, Tensor(a!) y2, Tensor(b!)? stats, "
            "Tensor(c!)? vectors=None, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0., "
            "Tensor(d!)? arrived=None, Tensor? partial1=None, int size1=0, int pixels1=0, Tensor(e!)? vectors1=None, "
            "Tensor? weight1=None, Tensor? bias1=None, float eps1=0.) -> ()"
        )
        library.define(
            "bn_relu6_dw_bwd(Tensor dz, Tensor y2, Tensor coef, Tensor y1, Tensor affine, Tensor mean, Tensor weight, "
            "int stride, Tensor(a!) d, Tensor(b!) dweight, Tensor(c!) sums, Tensor(d!)? coef1=None, "
            "Tensor(e!)? norm_dweight=None, Tensor? vectors=None, Tensor? norm_weight=None, float eps=0., "
            "bool batch=True, Tensor(f!)? norm_dbias=None, Tensor(g!)? arrived=None) -> ()"
        )

    def forward(y1, vectors, weight, stride, y2, *seen):
        seen, (arrived, partial, size, pixels, vectors1, *norm1) = seen[:5], (*seen[5:], *[None] * 8)[:8]
        assert arrived is None or not arrived.any()
        if partial is not None:
            assert vectors is None
            join(partial.double(), size, pixels, vectors1, *norm1)
            vectors = vectors1[:2]
        elif vectors is None:
            vectors = torch.stack([torch.ones(len(weight)), torch.zeros(len(weight))])
        stages_in_torch.depthwise_fwd(y1, vectors, weight, stride, y2, *seen)

    def backward(*arguments):
        *arguments, dbias, arrived = (*arguments, *[None] * 19)[:19]
        assert arrived is None or not arrived.any()
        stages_in_torch.depthwise_bwd(*arguments)
        if dbias is not None:
            dbias.copy_(arguments[10][0])

    library.impl("bn_relu6_dw_fwd", forward, "CPU")
    library.impl("bn_relu6_dw_bwd", backward, "CPU")
    yield
    library._destroy()


def running(affine: Tensor, eps: float, dtype: torch.dtype) -> tuple[tuple, Tensor]:
    """A norm by running statistics whose affine is about this: weight, bias, mean, var and eps; and what it is."""
    scale, shift = affine
    mean, var = torch.randn_like(scale), torch.rand_like(scale) + 0.5
    parts = [part.to(dtype) for part in (scale * (var + eps).sqrt(), shift + mean * scale, mean, var)]
    weight, bias, mean, var = (part.double() for part in parts)
    scale = weight / (var + eps).sqrt()
    return (*parts, eps), torch.stack((scale, bias - mean * scale)).float()


def composition(block: Block, wd: Tensor, affine1: Tensor, stride: int, residual: bool, dtype) -> Tensor:
    x, w1, w3 = (tensor.to(dtype) for tensor in (block.x, block.w1, block.w3))
    y = F.relu6(affine(pointwise(x, w1), affine1))
    y = F.conv2d(y, wd.to(dtype)[:, None], stride=stride, padding=wd.shape[1] // 2, groups=len(wd))
    y = affine(pointwise(F.relu6(affine(y, block.affine2)), w3), block.affine3)
    return y + x if residual else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel, stride, residual", [(3, 1, True), (5, 1, False), (3, 2, False)])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]], ids=str)
def test_infer(case, kernel, stride, residual, dtype, depthwise):
    block = Block(case, dtype)
    wd = torch.randn(block.wide, kernel, kernel, device=DEVICE).to(dtype)
    affine1 = torch.stack([2 + torch.randn(block.wide, device=DEVICE), torch.randn(block.wide, device=DEVICE)])
    norms = [running(of, 1e-3, dtype) for of in (affine1, block.affine2, block.affine3)]
    affine1, block.affine2, block.affine3 = (affine for _, affine in norms)
    batch, _, height, width = block.x.shape
    size = batch, len(block.w3), (height - 1) // stride + 1, (width - 1) // stride + 1
    out = guarded(lay_out(block.layout, block.x.new_empty(size)))
    parts = [part for norm, _ in norms for part in norm]
    kernels.inverted_bottleneck_infer(block.x, block.w1, wd, block.w3, *parts, stride, residual, out)
    assert_guarded(out)
    arguments = block, wd, affine1, stride, residual
    assert_parity(out, [composition(*arguments, dtype)], composition(*arguments, torch.float64))


def op_of(block: Block, x: Tensor, kernel: int, stride: int, batch: tuple[bool, ...], dtype=torch.float32):
    """Arguments of the op: image, weights, norms."""
    wide, out = block.wide, len(block.w3)
    wd = torch.randn(wide, 1, kernel, kernel, device=DEVICE).to(block.dtype) / kernel
    norms = [
        BatchNorm(
            *((torch.randn(c, device=DEVICE) + shift).to(dtype) for shift in (0.5, 1, 0)),
            (torch.rand(c, device=DEVICE) + 0.5).to(dtype),
            *(1e-3, on),
        )
        for c, on in zip((wide, wide, out), batch, strict=True)
    ]
    return x, block.w1[:, :, None, None], wd, block.w3[:, :, None, None], tuple(norms)


def run_op(arguments, grad: Tensor, backend: str, dtype: torch.dtype, memory: str = "default", **keywords):
    """Result, statistics and gradients, in a dtype."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments[:4]]
    wide = torch.promote_types(dtype, torch.float32)
    norms = []
    for norm in arguments[4]:
        own = dtype if norm.weight.dtype != torch.float32 else wide
        leaves += [part.to(own).requires_grad_() for part in norm[:2]]
        norms.append(BatchNorm(*leaves[-2:], norm.mean.to(own), norm.var.to(own), norm.eps, norm.batch))
    if backend == "reference":
        result, seen = inverted_bottleneck_reference(*leaves[:4], tuple(norms), **keywords)
    else:
        monkey = Mock(return_value=backend)  # resolve() looks for a device
        with patch.object(OP, "resolve", monkey):
            result, seen = OP.inverted_bottleneck(*leaves[:4], tuple(norms), memory=memory, **keywords)
    gradients = torch.autograd.grad(result, leaves, grad.to(dtype))
    return [result.detach(), *gradients, *(part for of in seen if of for part in of)]


@pytest.mark.parametrize("narrow", [False, True], ids=["norms in fp32", "norms in the image's dtype"])
@pytest.mark.parametrize("batch", [(True,) * 3, (False,) * 3, (True, False, True)], ids=str)
@pytest.mark.parametrize("stride, memory", [(1, "default"), (2, "low")])
@pytest.mark.parametrize("way", ["direct", "gram"])
def test_the_op(way, stride, memory, batch, narrow, depthwise, monkeypatch):
    """What the stages hand to one another, judged where the depthwise stand-in is as exact as float64."""
    by_gram(way == "gram", monkeypatch)
    block = Block((2, 16, 32, 16, 6, 8, CL), torch.float16 if narrow else torch.float32)
    arguments = op_of(block, block.x, 3, stride, batch, block.dtype)
    grad = lay_out(CL, torch.randn(2, 16, 6 // stride, 8 // stride, device=DEVICE).to(block.dtype))
    keywords = {"stride": stride, "residual": stride == 1}
    truths = run_op(arguments, grad, "reference", torch.float64, **keywords)
    peers = run_op(arguments, grad, "reference", block.dtype, **keywords)
    found = run_op(arguments, grad, "cuda", block.dtype, memory, **keywords)
    assert [result.dtype for result in found] == [peer.dtype for peer in peers]
    # Of so many results of few elements each, one is always less lucky than its peer: they are judged as one.
    sizes = [2.0 ** -truth.abs().amax().log2().round() for truth in truths]
    one, other, right = (
        torch.cat([(size * result).to(result.dtype).flatten() for size, result in zip(sizes, results, strict=True)])
        for results in (found, peers, truths)
    )
    assert_parity(one, [other], right, gradient=True)


@pytest.mark.parametrize("layout", [CL, NCHW])
def test_a_result_is_made_again(layout, depthwise):
    """In the backward of ``former2conv``, from what this op keeps: the same bits, so the same gradients."""
    block = Block((2, 16, 32, 16, 6, 8, layout), torch.float32)
    arguments = op_of(block, block.x, 3, 1, (True,) * 3)
    leaves = [tensor.detach().requires_grad_() for tensor in arguments[:4]]
    key, value = (text.requires_grad_() for text in torch.randn(2, 2, 19, 16, device=DEVICE))
    settings = {"stride": 1, "residual": True, "memory": "default", "group": "", "backend": "cuda"}

    def gradients(again: bool) -> tuple[Tensor, ...]:
        with patch.object(OP, "resolve", Mock(return_value="cuda")):
            image, _, recipe = OP.with_recipe(*leaves, arguments[4], **settings)
        assert torch.equal(OP.made_again(*recipe[1:]), image)
        recipe = recipe if again else None
        with patch.object(BEHIND, "resolve", Mock(return_value="triton")):
            out = BEHIND.by_recipe(image, recipe, key, value, heads=1, scale=None, backend="triton")
        return torch.autograd.grad(out, [*leaves, key, value], lay_out(layout, block.g))

    assert all(map(torch.equal, gradients(True), gradients(False)))


class Spy:
    """A kernel that says when it is launched, and is no business of the mode that watches torch's operations."""

    def __init__(self, kernel, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        def launch(*arguments, **keywords):
            self.launched.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*arguments, **keywords)

        return launch


class Watch(TorchDispatchMode):
    """Torch's operations that launch something, and the CUDA kernels behind the depthwise ones."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        name = op._schema.name
        if name == "fusekern_cuda::bn_relu6_dw_fwd":
            seen = any(isinstance(argument, Tensor) for argument in arguments[5:7])
            apart = seen and (len(arguments) < 11 or arguments[10] is None)
            self.launched += ["bn_relu6_dw_fwd_kernel", *["bn_relu6_dw_moments_kernel"] * apart]
        elif name == "fusekern_cuda::bn_relu6_dw_bwd":
            apart = len(arguments) < 19 or arguments[18] is None
            self.launched += ["bn_relu6_dw_bwd_kernel", *["bn_relu6_dw_sums_kernel"] * apart]
        elif not op.is_view and name != "aten::squeeze_" and "empty" not in name:
            self.launched.append(name)
        return op(*arguments, **(keywords or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case, programs, gram, stride, batch, low",
    [
        (CASES[1], 132, False, 1, (True, True, True), False),
        (CASES[1], 1, False, 1, (True, True, True), True),
        (CASES[4], 1000, False, 2, (True, False, True), False),
        (CASES[4], 1000, True, 1, (True, True, True), False),
        (CASES[4], 1, True, 1, (False, False, False), True),
        (CASES[3], 132, False, 1, (False, True, True), False),
    ],
    ids=str,
)
def test_launches_are_those_planned(case, programs, gram, stride, batch, low, dtype, depthwise, monkeypatch):
    by_gram(gram, monkeypatch)
    monkeypatch.setattr(places, "PROGRAMS", programs)
    monkeypatch.setattr(places, "START", 0)
    if programs == 1:  # as if there were many of them
        for name in ("WHOLE_PIXELS", "FINISHED", "JOINED"):
            monkeypatch.setattr(places, name, 0)
    launched = []
    for module in (kernels, kernels.batch_norm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Spy(getattr(module, name), name, launched))
    block = Block(case, dtype)
    x, *weights, norms = op_of(block, block.x, 3, stride, batch, dtype)
    size = {"hidden": block.wide, "channels_out": len(block.w3)}
    plan = kernels.launches(x.to("meta"), *size.values(), stride=stride, batch=batch, low=low)
    parts = [part for norm in norms for part in norm[:4]]
    eps = [1e-3] * 3
    residual = stride == 1 and x.shape[1] == len(block.w3)

    def watched(body, *arguments):
        launched.clear()
        with torch.no_grad(), Watch(launched):
            found = body(*arguments)
        return found, tuple(launched)

    settings = eps, list(batch), stride, residual
    (out, *saved), seen = watched(OP._inverted_bottleneck.body, x, *weights, *parts, *settings, True, low, "", "cuda")
    assert seen == plan["fwd"]
    kept = [part for norm in norms for part in (*norm[:2], None, None)]
    backward = OP._inverted_bottleneck_backward.body
    _, seen = watched(backward, torch.randn_like(out), x, *weights, *saved, *kept, *settings, "", "cuda")
    assert seen == plan["bwd"]
    _, seen = watched(OP._infer.body, x, *weights, *parts, eps, stride, residual, "cuda")
    assert seen == plan["infer"]
    assert len(plan["infer"]) == 3
    if programs > 1:
        assert len(plan["fwd"]) == 4 + (not all(batch))
        assert gram or len(plan["bwd"]) <= 5 + plan["bwd"].count("inverted_bottleneck_sum_kernel") + low
    else:
        assert len(plan["fwd"]) == 4 + sum(batch) + (not all(batch))
    sums = plan["bwd"].count("inverted_bottleneck_sum_kernel")
    assert (sums > 0) == (programs > 1 or gram)


def test_the_plan_of_large_maps():
    """As a GPU has it, in bf16 and channels_last: 128 x 16 x 16 pixels take the Gram matrix, 16 images do not."""

    def plan(batch: int) -> dict[str, tuple[str, ...]]:
        image = torch.empty(batch, 512, 16, 16, dtype=torch.bfloat16, device="meta")
        return kernels.launches(image.to(memory_format=torch.channels_last), 3072, 512)

    assert [len(plan(1)[which]) for which in ("fwd", "bwd", "infer")] == [4, 5, 3]
    assert [len(plan(16)[which]) for which in ("fwd", "bwd", "infer")] == [4, 5, 3]
    assert not any(name.startswith("aten::") for name in plan(1)["bwd"])
    assert "aten::mm" in plan(128)["bwd"] and "aten::mm" not in plan(16)["bwd"]
