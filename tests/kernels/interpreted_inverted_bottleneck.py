"""The Triton stages of inverted_bottleneck, judged against float64. The depthwise stages are CUDA: see
test_cuda_tiles.py; where they are needed here without a device, a stand-in takes their place."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
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

CL, NCHW = "channels_last", "nchw"
# batch, channels in, hidden, out, height, width, layout
CASES = [
    (1, 1, 1, 1, 1, 1, NCHW),
    (2, 16, 32, 16, 5, 7, CL),
    (3, 20, 70, 24, 3, 4, CL),
    (2, 16, 40, 17, 9, 11, NCHW),
    (1, 64, 144, 64, 12, 13, CL),
    (4, 32, 16, 48, 1, 1, CL),
]
ODD = ["sliced", "cropped", "expanded", "permuted", NCHW, CL]


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def by_gram(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the last stage of the backward take the way over a Gram matrix, or the other one, whatever the sizes."""
    monkeypatch.setattr(places, "GRAM_PIXELS", 0 if on else float("inf"))
    monkeypatch.setattr(places, "GRAM_NUMBERS", 0)


def guarded(like: Tensor) -> Tensor:
    """A tensor full of NaN with the strides of a dense one, with 7 before and behind it."""
    memory = like.new_full((like.numel() + 256,), 7)
    return memory[128:-128].as_strided(like.shape, like.stride(), 128).fill_(float("nan"))


def assert_guarded(tensor: Tensor) -> None:
    memory = tensor.as_strided((tensor.numel() + 256,), (1,), 0)
    assert (memory[:128] == 7).all() and (memory[-128:] == 7).all()


class Block:
    """Random tensors of a block, and the stages' outputs in a precision, as PyTorch rounds them."""

    def __init__(self, case, dtype: torch.dtype, offset: float = 0.5) -> None:
        batch, channels, hidden, out, height, width, self.layout = case
        self.dtype, size = dtype, (height, width)

        def image(c: int, shift: float = 0.0) -> Tensor:
            y = torch.randn(batch, c, *size, device=DEVICE) + shift * torch.randn(c, 1, 1, device=DEVICE)
            return lay_out(self.layout, y.to(dtype))

        def vector(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE)

        self.x = image(channels, offset)
        self.g = image(out)
        self.d = image(hidden)
        self.w1 = (vector(hidden, channels) / channels**0.5).to(dtype)
        self.w3 = (vector(out, hidden) / hidden**0.5).to(dtype)
        self.y1 = lay_out(self.layout, torch.einsum("bchw,ec->behw", self.x.float(), self.w1.float()).to(dtype))
        self.y2, self.y3 = image(hidden, offset), image(out, offset)
        self.affine2 = torch.stack([2 + vector(hidden) / 2, 2 + vector(hidden)])
        self.affine3 = vector(2, out)
        self.mean2, self.mean3 = (y.float().mean((0, 2, 3)) for y in (self.y2, self.y3))
        self.coef3 = torch.stack([vector(out), vector(out) / 4, vector(out) / 8, self.mean3])
        # As batch norm has it: the gradient has no part along 1 and y1.
        self.coef1 = self.batch_norm_coef(vector(hidden))
        self.wide = hidden

    def batch_norm_coef(self, weight: Tensor) -> Tensor:
        y, d = self.y1.double(), self.d.double()
        mean = y.mean((0, 2, 3))
        centred = y - mean[:, None, None]
        scale = weight.double() / (centred.square().mean((0, 2, 3)) + 1e-3).sqrt()
        q = -scale * (d * centred).mean((0, 2, 3)) / (centred.square().mean((0, 2, 3)) + 1e-3)
        return torch.stack([scale, q, -scale * d.mean((0, 2, 3)), mean]).float()

    def like(self, channels: int) -> Tensor:
        batch, _, height, width = self.x.shape
        return lay_out(self.layout, torch.empty(batch, channels, height, width, dtype=self.dtype, device=DEVICE))


def per_channel(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    return vectors.to(torch.promote_types(dtype, torch.float32))[..., None, None]


def affine(y: Tensor, vectors: Tensor) -> Tensor:
    """In y's dtype, computed as wide as PyTorch computes a norm."""
    scale, shift = per_channel(vectors, y.dtype)
    return (scale * y + shift).to(y.dtype)


def norm_gradient(dv: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    p, q, r, mean = per_channel(coef, dv.dtype)
    return (p * dv + q * (y - mean) + r).to(dv.dtype)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None])


def rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def assert_stats(stats: Tensor, y: Tensor, dtype: torch.dtype) -> None:
    eps = 2.0**-20 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    mean = y.mean((0, 2, 3))
    m2 = (y - mean[:, None, None]).square().sum((0, 2, 3))
    largest = y.abs().amax()
    assert ((stats[0] - mean).abs() <= eps * largest).all()
    assert ((stats[1] - m2).abs() <= eps * (4 * m2 + largest**2)).all()


def assert_sums(sums: Tensor, dv: Tensor, y: Tensor, mean: Tensor, dtype: torch.dtype) -> None:
    eps = 2.0**-19 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for found, terms in zip(sums, (dv, dv * (y.double() - mean.double()[:, None, None])), strict=True):
        scale = terms.abs().sum((0, 2, 3))
        assert ((found - terms.sum((0, 2, 3))).abs() <= eps * (scale + scale.mean())).all()


def exact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expand_fwd(case, dtype):
    block = Block(case, dtype, offset=20)
    y1, stats = guarded(block.like(block.wide)), torch.empty(2, block.wide, device=DEVICE)
    kernels.inverted_bottleneck_expand_fwd(block.x, block.w1, y1, stats)
    assert_guarded(y1)
    truth = pointwise(*exact(block.x, block.w1))
    assert_parity(y1, [pointwise(block.x, block.w1)], truth)
    assert_stats(stats, truth, dtype)
    again = torch.empty_like(y1)
    kernels.inverted_bottleneck_expand_fwd(block.x, block.w1, again, None)
    assert torch.equal(again, y1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_project_fwd(case, dtype):
    block = Block(case, dtype)
    y3, stats = guarded(torch.empty_like(block.y3)), torch.empty(2, len(block.w3), device=DEVICE)
    kernels.inverted_bottleneck_project_fwd(block.y2, block.affine2, block.w3, y3, stats)
    assert_guarded(y3)
    truth = pointwise(F.relu6(affine(block.y2.double(), block.affine2)), block.w3.double())
    assert_parity(y3, [pointwise(F.relu6(affine(block.y2, block.affine2)), block.w3)], truth)
    assert_stats(stats, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual_fwd(case, residual, dtype):
    block = Block(case, dtype)
    out, x = guarded(torch.empty_like(block.y3)), block.g if residual else None
    kernels.inverted_bottleneck_residual_fwd(block.y3, block.affine3, x, out)
    assert_guarded(out)
    truth, peer = affine(block.y3.double(), block.affine3), affine(block.y3, block.affine3)
    assert_parity(out, [peer + x if residual else peer], truth + x.double() if residual else truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_output_bwd(whole, case, dtype, monkeypatch):
    """By programs that have all pixels, which also write the gradient of what the norm saw, or by parts."""
    monkeypatch.setattr(places, "WHOLE_PIXELS", 4096 if whole else 0)
    block = Block(case, dtype)
    channels = len(block.w3)
    sums = torch.empty(2, channels, device=DEVICE)
    left = kernels.inverted_bottleneck_output_bwd(block.g, block.y3, block.mean3, sums)
    assert_sums(sums, block.g.double(), block.y3, block.mean3, torch.float32)
    assert left.grad is None and not left.counters.any()
    coef, vectors, dweight = (torch.rand(rows, channels, device=DEVICE) + 0.5 for rows in (4, 5, 1))
    vectors[2] = block.mean3
    left = kernels.inverted_bottleneck_output_bwd(
        *(block.g, block.y3, block.mean3, sums, coef, dweight[0], vectors, None, 0.1)
    )
    assert (left.grad is not None) == whole
    if whole:
        truth = norm_gradient(block.g.double(), block.y3.double(), coef)
        assert_parity(left.grad, [norm_gradient(block.g, block.y3, coef)], truth, gradient=True)
        assert left.grad.stride() == block.y3.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case, parts", [((1, 16, 32, 16, 40, 52, CL), 33), ((2, 20, 70, 24, 9, 11, NCHW), 4), (CASES[0], 1)], ids=str
)
def test_the_last_program_finishes(case, parts, dtype, monkeypatch):
    """What a launch of its own makes of the parts, to the order of the sums; what does not depend on it to the bit."""
    block = Block(case, dtype)
    wide, out = block.wide, len(block.w3)
    weight, bias = torch.randn(2, wide, device=DEVICE).to(dtype)
    seen = torch.rand(5, wide, device=DEVICE) + 0.5

    def new_left() -> kernels.Left:
        return kernels.Left(torch.zeros(2, places.COUNTERS, dtype=torch.int32, device=DEVICE))

    def forward(left: kernels.Left | None) -> list[Tensor]:
        y3, vectors = torch.empty_like(block.y3), torch.full((5, out), float("nan"), device=DEVICE)
        norm = vectors, weight[:out], None, 0.1
        arguments = block.y2, block.affine2, block.w3, y3
        kernels.inverted_bottleneck_project_fwd(*arguments, None, *norm, left=left)
        if left is not None:  # or stats, for a norm over several processes
            stats = torch.empty(2, out, device=DEVICE)
            kernels.inverted_bottleneck_project_fwd(*arguments, stats, left=new_left())
            pixels = y3.numel() // out
            assert torch.equal(stats[0], vectors[2])
            torch.testing.assert_close(stats[1] / pixels, vectors[3])
        return [y3, vectors]

    def backward(left: kernels.Left | None) -> list[Tensor]:
        dz, dw3 = torch.empty_like(block.y2), torch.empty_like(block.w3)
        sums, coef = (torch.full((rows, wide), float("nan"), device=DEVICE) for rows in (2, 4))
        dweight, dbias = torch.full((2, wide), float("nan"), dtype=dtype, device=DEVICE)
        arguments = block.g, block.y3, block.coef3, block.y2, block.affine2, block.mean2, block.w3, dz, dw3
        summed = sums, coef, dweight, seen, weight, 0.1, True, dbias
        kernels.inverted_bottleneck_project_bwd(*arguments, *summed, left=left)
        if left is not None:
            alone = torch.empty_like(sums)
            kernels.inverted_bottleneck_project_bwd(*arguments, alone, left=new_left())
            assert torch.equal(alone, sums)
        return [dz, dw3, sums, coef, dweight, dbias]

    monkeypatch.setattr(kernels.batch_norm, "join", Mock(wraps=kernels.batch_norm.join))
    monkeypatch.setattr(kernels.batch_norm, "add", Mock(wraps=kernels.batch_norm.add))
    for run, exact, row, apart in (
        (forward, 1, 1, kernels.batch_norm.join),
        (backward, 2, 0, kernels.batch_norm.add),
    ):
        left = new_left()
        found = run(left)
        assert not apart.called
        expected = run(None)
        assert apart.call_count == 1
        assert all(torch.equal(one, other) for one, other in zip(found[:exact], expected[:exact], strict=True))
        for one, other in zip(found[exact:], expected[exact:], strict=True):
            eps = max(2 * torch.finfo(one.dtype).eps, 1e-5)
            torch.testing.assert_close(one, other, rtol=eps, atol=eps * other.abs().amax().item())
        assert left.counters[row].unique().tolist() in ([0, parts], [parts])
        assert not left.counters[1 - row].any()


def project_bwd(block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g, y3, y2, w3 = (tensor.to(dtype) for tensor in (block.g, block.y3, block.y2, block.w3))
    dy3, v2 = norm_gradient(g, y3, block.coef3), affine(y2, block.affine2)
    wide = affine(block.y2.double(), block.affine2)
    dz = F.conv2d(dy3, w3.t()[:, :, None, None]) * ((wide > 0) & (wide < 6))
    return dz, rows(dy3).t() @ rows(F.relu6(v2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_project_bwd(case, dtype):
    block = Block(case, dtype)
    dz, dw3 = guarded(torch.empty_like(block.y2)), guarded(block.w3)
    sums = torch.empty(2, block.wide, device=DEVICE)
    arguments = block.g, block.y3, block.coef3, block.y2, block.affine2, block.mean2, block.w3
    kernels.inverted_bottleneck_project_bwd(*arguments, dz, dw3, sums)
    assert_guarded(dz)
    assert_guarded(dw3)
    truths, peers = project_bwd(block, torch.float64), project_bwd(block, dtype)
    for result, peer, truth in zip((dz, dw3), peers, truths, strict=True):
        assert_parity(result, [peer], truth, gradient=True)
    assert_sums(sums, truths[0], block.y2, block.mean2, dtype)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=str)
def test_stages_make_the_vectors_of_norms(case, learned):
    """From the same sums as they tell."""
    block = Block(case, torch.float16, offset=20)
    wide, out = block.wide, len(block.w3)
    pixels = block.x.numel() // block.x.shape[1]

    def judge_forward(stage, y: Tensor, arguments: tuple[object, ...]) -> None:
        channels = y.shape[1]
        weight, bias = torch.randn(2, channels, device=DEVICE).half() if learned else (None, None)
        stats, vectors = torch.empty(2, channels, device=DEVICE), torch.empty(5, channels, device=DEVICE)
        stage(*arguments, y, stats)
        left = stage(*arguments, y, None, vectors, weight, bias, 0.1)
        if left is not None and left.parts is not None:
            left.parts.join()
        mean, squares = stats.double()
        scale = (squares / pixels + 0.1).rsqrt() * (weight.double() if learned else 1)
        shift = (bias.double() if learned else 0) - mean * scale
        truth = torch.stack((scale, shift, mean, squares / pixels, squares / max(pixels - 1, 1)))
        torch.testing.assert_close(vectors.double(), truth, rtol=2e-6, atol=2e-6)

    judge_forward(kernels.inverted_bottleneck_expand_fwd, torch.empty_like(block.y1), (block.x, block.w1))
    project = block.y2, block.affine2, block.w3
    judge_forward(kernels.inverted_bottleneck_project_fwd, torch.empty_like(block.y3), project)

    def judge_backward(stage, channels: int, arguments: tuple[object, ...]) -> None:
        vectors = torch.rand(5, channels, device=DEVICE) + 0.5
        weight = torch.randn(channels, device=DEVICE) if learned else None
        sums, alone, coef = (torch.empty(rows, channels, device=DEVICE) for rows in (2, 2, 4))
        dweight = torch.empty(channels, device=DEVICE)
        stage(*arguments, alone)
        for batch in (True, False):
            stage(*arguments, sums, coef, dweight, vectors, weight, 0.1, batch)
            assert torch.equal(sums, alone)
            rstd = (vectors[3].double() + 0.1).rsqrt()
            p, means = rstd * (weight.double() if learned else 1), sums.double() / pixels
            q, r = (-p * rstd**2 * means[1], -p * means[0]) if batch else (0 * p, 0 * p)
            truth = torch.stack((p, q, r, vectors[2].double()))
            torch.testing.assert_close(coef.double(), truth, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(dweight.double(), sums[1].double() * rstd, rtol=2e-6, atol=2e-6)

    judge_backward(kernels.inverted_bottleneck_output_bwd, out, (block.g, block.y3, block.mean3))
    arguments = block.g, block.y3, block.coef3, block.y2, block.affine2, block.mean2, block.w3
    grads = torch.empty_like(block.y2), torch.empty_like(block.w3)
    judge_backward(kernels.inverted_bottleneck_project_bwd, wide, (*arguments, *grads))


def expand_bwd(block: Block, x: Tensor, g: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    d, y1, w1, x = (tensor.to(dtype) for tensor in (block.d, block.y1, block.w1, x))
    if dtype == torch.float64:
        y1 = pointwise(x, w1)  # what has been rounded is of no use to this gradient
    dy1 = norm_gradient(d, y1, block.coef1)
    dx = F.conv2d(dy1, w1.t()[:, :, None, None])
    return dx if g is None else dx + g.to(dtype), rows(dy1).t() @ rows(x)


def judge_expand_bwd(block: Block, x: Tensor, g: Tensor | None, dtype: torch.dtype) -> None:
    dx, dw1 = guarded(block.like(x.shape[1])), guarded(block.w1)
    kernels.inverted_bottleneck_expand_bwd(block.d, block.y1, block.coef1, x, block.w1, g, dx, dw1)
    assert_guarded(dx)
    assert_guarded(dw1)
    truths, peers = expand_bwd(block, x, g, torch.float64), expand_bwd(block, x, g, dtype)
    for result, peer, truth in zip((dx, dw1), peers, truths, strict=True):
        assert_parity(result, [peer], truth, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "way, case", [("direct", case) for case in CASES] + [("gram", case) for case in CASES if case[4] > 1], ids=str
)
def test_expand_bwd(case, way, dtype, monkeypatch):
    """A Gram matrix of no more pixels than channels is nobody's choice."""
    by_gram(way == "gram", monkeypatch)
    block = Block(case, dtype)
    judge_expand_bwd(block, block.x, None, dtype)
    judge_expand_bwd(block, block.x, torch.randn_like(block.x), dtype)


@pytest.mark.parametrize("way", ["direct", "gram"])
def test_expand_bwd_of_frozen_and_shared_norms(way, monkeypatch):
    """Running statistics have q = r = 0; a mean over other processes' pixels too is not that of these."""
    by_gram(way == "gram", monkeypatch)
    block = Block(CASES[2], torch.float32, offset=3)
    block.coef1[3] += torch.randn_like(block.coef1[3])
    judge_expand_bwd(block, block.x, block.x + 1, torch.float32)
    block.coef1[1:3] = 0
    judge_expand_bwd(block, block.x, None, torch.float32)


def test_gram_of_a_far_mean(monkeypatch):
    """Uncentred sums of fp32 would lose what is left of x when its mean is taken away."""
    by_gram(True, monkeypatch)
    block = Block((2, 16, 32, 16, 8, 9, CL), torch.float32, offset=1000)
    judge_expand_bwd(block, block.x, None, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("layout", [CL, NCHW])
def test_strides_of_input_and_gradient(layout, odd, dtype, monkeypatch):
    block = Block((2, 16, 32, 16, 5, 6, layout), dtype)
    likes = [block.y1, block.x, block.x, block.w1, block.w1, block.y2, block.w3, block.y3]

    def run(x: Tensor, g: Tensor) -> list[Tensor]:
        y1, dx, dx2, dw1, dw12, dz, dw3, out = outputs = [torch.empty_like(like) for like in likes]
        stats1, sums2, sums3 = sums = [torch.empty(2, c, device=DEVICE) for c in (32, 32, 16)]
        kernels.inverted_bottleneck_expand_fwd(x, block.w1, y1, stats1)
        kernels.inverted_bottleneck_residual_fwd(block.y3, block.affine3, x, out)
        kernels.inverted_bottleneck_output_bwd(g, block.y3, block.mean3, sums3)
        arguments = g, block.y3, block.coef3, block.y2, block.affine2, block.mean2, block.w3
        kernels.inverted_bottleneck_project_bwd(*arguments, dz, dw3, sums2)
        for gram, grads in ((True, (dx, dw1)), (False, (dx2, dw12))):
            by_gram(gram, monkeypatch)
            kernels.inverted_bottleneck_expand_bwd(block.d, block.y1, block.coef1, x, block.w1, g, *grads)
        return outputs + sums

    x, g = lay_out(odd, block.x), lay_out(odd, block.g)
    plain = run(lay_out(layout, x.contiguous()), lay_out(layout, g.contiguous()))
    assert all(torch.equal(one, other) for one, other in zip(run(x, g), plain, strict=True))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", ["large", "medium"])
def test_settings_and_parts(load, dtype, monkeypatch):
    """One multiprocessor has work enough with large tiles and no parts; 1000 of them have not."""
    monkeypatch.setattr(places, "PROGRAMS", 1 if load == "large" else 1000)
    monkeypatch.setattr(places, "START", 0)
    by_gram(True, monkeypatch)
    block = Block((2, 48, 80, 48, 10, 12, CL), dtype)
    judge_expand_bwd(block, block.x, block.x, dtype)
    kind = "half" if dtype != torch.float32 else "ieee"
    assert places.setting_of(kind, 240, 48) == places.SETTINGS[kind, load]
    y1, stats = torch.empty_like(block.y1), torch.empty(2, 80, device=DEVICE)
    kernels.inverted_bottleneck_expand_fwd(block.x, block.w1, y1, stats)
    assert_stats(stats, pointwise(*exact(block.x, block.w1)), dtype)


@pytest.mark.parametrize("way", ["direct", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_the_ends_of_relu6(dtype, way, monkeypatch):
    by_gram(way == "gram", monkeypatch)
    block = Block((2, 16, 32, 16, 4, 5, CL), dtype)
    block.affine2 = torch.stack([torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)])
    block.y2[:, :8], block.y2[:, 8:16], block.y2[:, 16:24] = 0, 6, 3
    block.y2[1, 30, 2, 2] = float("nan")
    dz, dw3, sums = torch.empty_like(block.y2), torch.empty_like(block.w3), torch.empty(2, 32, device=DEVICE)
    arguments = block.g, block.y3, block.coef3, block.y2, block.affine2, block.mean2, block.w3
    kernels.inverted_bottleneck_project_bwd(*arguments, dz, dw3, sums)
    assert (dz[:, :16] == 0).all() and (dz[:, 16:24] != 0).any()
    assert dw3.isnan().any(0).nonzero().flatten().tolist() == [30] and not dz.isnan().any()
    y3 = torch.empty_like(block.y3)
    kernels.inverted_bottleneck_project_fwd(block.y2, block.affine2, block.w3, y3, None)
    assert y3[1, :, 2, 2].isnan().all() and y3.isnan().sum() == 16


@pytest.mark.parametrize("way", ["direct", "gram"])
def test_same_bits_again(way, monkeypatch):
    by_gram(way == "gram", monkeypatch)
    block = Block((2, 16, 32, 16, 10, 12, CL), DTYPES[-1])

    def run() -> list[Tensor]:
        dx, dw1 = torch.empty_like(block.x), torch.empty_like(block.w1)
        kernels.inverted_bottleneck_expand_bwd(block.d, block.y1, block.coef1, block.x, block.w1, None, dx, dw1)
        y1, stats = torch.empty_like(block.y1), torch.empty(2, 32, device=DEVICE)
        kernels.inverted_bottleneck_expand_fwd(block.x, block.w1, y1, stats)
        return [dx, dw1, y1, stats]

    first = run()
    assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))
    # The comparison can fail: a change of single inputs shows.
    block.x[0, :, 0, 0] += 1
    block.d[0, :, 0, 0] += 1
    assert not any(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


def test_run_length():
    """No part is empty, and many tiles are shared out only where programs are few."""
    for programs in (1, 8, 96, 131, 132, 133, 2000):
        for steps in (1, 2, 9, 128, 1000):
            run = places.run_length(programs, steps)
            parts = -(-steps // run)
            assert 1 <= run <= steps and (parts - 1) * run < steps
            assert parts == 1 or programs * parts <= 4 * places.PROGRAMS
    assert places.run_length(96, 256) < 256 and places.run_length(2000, 256) == 256


def test_products_of_a_launch_share_what_is_of_the_launch():
    for setting in places.SETTINGS.values():
        assert setting.hidden[3:5] == setting.image[3:5] == setting.weight[3:5]


def test_kinds():
    image = torch.empty(2, 32, 5, 6, dtype=torch.float16, device=DEVICE)
    last = image.to(memory_format=torch.channels_last)
    assert places.rows_of(last) == places.Rows(1, 60, True) and places.rows_of(image) == places.Rows(2, 30, False)
    assert (
        places.kind_of(places.rows_of(last), last) == "half"
        and places.kind_of(places.rows_of(image), image) == "odd half"
    )
    assert places.kind_of(places.rows_of(last), last.float()) == "ieee"
    odd = torch.empty(2, 20, 5, 6, device=DEVICE).to(memory_format=torch.channels_last)
    assert places.kind_of(places.rows_of(odd), odd) == "odd fp32"


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
