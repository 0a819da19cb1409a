"""The C++ stages of inverted_bottleneck, each by itself, below what the op composes, checks and allocates."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import run_again
from torch import Tensor
from walls import channels_last, empty, lay_out, walls_stand

from fusekern.extensions import load
from fusekern.testing import check_parity

if load("_C"):
    pytest.skip(f"the C++ module is not there: {load('_C')}", allow_module_level=True)

import fusekern._C as extension

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_layout = pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
LAYOUTS = ("NCHW", "channels_last", "sliced", "sliced channels_last", "transposed", "expanded", "batch permuted")

# batch, input, hidden and output channels, height, width, kernel, stride: sides of 1, beside and on multiples of
# vectors of 4, 8 and 16, more than a piece of 512 channels and more than a chunk of 512 pixels.
SHAPES = [
    (1, 3, 5, 2, 1, 1, 3, 1),
    (2, 8, 48, 8, 1, 1, 3, 2),
    (3, 1, 1, 1, 5, 3, 3, 1),
    (2, 7, 1, 7, 4, 1, 5, 1),
    (2, 8, 33, 8, 1, 9, 3, 1),
    (1, 16, 100, 16, 7, 6, 3, 1),
    (2, 24, 64, 16, 9, 17, 3, 2),
    (1, 5, 17, 9, 8, 8, 5, 2),
    (2, 12, 70, 12, 6, 5, 5, 1),
    (1, 40, 600, 530, 3, 4, 3, 1),
    (1, 20, 40, 20, 33, 31, 3, 1),
    (2, 9, 144, 24, 25, 23, 3, 2),
    (1, 70, 35, 9, 11, 9, 3, 1),
]


def stage(name: str):
    return getattr(torch.ops.fusekern_cpp, f"inverted_bottleneck_{name}")


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- the stages in plain PyTorch: float64 is the truth, fp32 with operands rounded to the tensors' dtype the peer ----


class Plain:
    def __init__(self, compute: torch.dtype, store: torch.dtype | None = None, way: str = "convolutions") -> None:
        self.compute, self.store, self.way = compute, store, way

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.compute)

    def rounded(self, tensor: Tensor) -> Tensor:
        return tensor if self.store is None else tensor.to(self.store).to(self.compute)

    def result(self, tensor: Tensor) -> Tensor:
        return tensor if self.store is None else tensor.to(self.store)

    def affine(self, affine: Tensor, y: Tensor) -> Tensor:
        scale, shift = self(affine)
        return scale[:, None, None] * self(y) + shift[:, None, None]

    def coef(self, coef: Tensor, dv: Tensor, y: Tensor) -> Tensor:
        p, q, r, mean = (part[:, None, None] for part in self(coef))
        return p * self(dv) + torch.where(q == 0, 0, q * (self(y) - mean)) + r

    def stats(self, y: Tensor) -> Tensor:
        mean = self(y).mean((0, 2, 3), keepdim=True)
        return torch.stack([mean.flatten(), (self(y) - mean).square().sum((0, 2, 3))])

    def sums(self, dv: Tensor, y: Tensor, mean: Tensor) -> Tensor:
        apart = self(y) - self(mean)[:, None, None]
        return torch.stack([self(dv).sum((0, 2, 3)), (self(dv) * apart).sum((0, 2, 3))])

    def scale_of_stats(self, y: Tensor) -> Tensor:
        """What errors of stats are measured by: a rounding of y in proportion."""
        apart = self(y) - self(y).mean((0, 2, 3), keepdim=True)
        size = self(y).abs()
        return torch.stack(
            [size.mean((0, 2, 3)), ((size + apart.abs()) * apart.abs() + 2**-7 * size**2).sum((0, 2, 3))]
        )

    def scale_of_sums(self, dv: Tensor, y: Tensor, mean: Tensor) -> Tensor:
        apart = self(y) - self(mean)[:, None, None]
        return torch.stack([self(dv).abs().sum((0, 2, 3)), (self(dv) * apart).abs().sum((0, 2, 3))])

    def dense(self, x: Tensor, w: Tensor) -> Tensor:
        if self.way != "convolutions":
            x, w = (x.flip(1), w.flip(1)) if self.way == "reversed" else (x, w)
            return F.linear(self(x).movedim(1, 3), self(w)).movedim(3, 1)
        return F.conv2d(self(x), self(w)[:, :, None, None])

    def weight_of(self, dy: Tensor, x: Tensor) -> Tensor:
        if self.way != "convolutions":
            dy, x = (dy.flip(0, 2, 3), x.flip(0, 2, 3)) if self.way == "reversed" else (dy, x)
            return dy.movedim(1, 3).flatten(0, 2).t() @ x.movedim(1, 3).flatten(0, 2)
        return torch.einsum("bohw,bchw->oc", dy, x)

    def masked(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.where((v <= 0) | (v >= 6), 0, x)

    def depthwise(self, y: Tensor, wd: Tensor, stride: int) -> Tensor:
        return F.conv2d(y, self(wd)[:, None], stride=stride, padding=wd.shape[-1] // 2, groups=y.shape[1])

    def activated(self, affine: Tensor, y: Tensor) -> Tensor:
        return F.relu6(self.affine(affine, y))

    def expand_fwd(self, x, w1):
        y1 = self.result(self.dense(x, w1))
        return y1, self.stats(y1)

    def depthwise_fwd(self, y1, affine1, wd, stride):
        y2 = self.depthwise(self.activated(affine1, y1), wd, stride)
        return self.result(y2), self.stats(y2)

    def project_fwd(self, y2, affine2, w3):
        y3 = self.result(self.dense(self.rounded(self.activated(affine2, y2)), w3))
        return y3, self.stats(y3)

    def residual_fwd(self, y3, affine3, x):
        out = self.affine(affine3, y3)
        return (self.result(out if x is None else out + self(x)),)

    def infer(self, x, w1, affine1, wd, affine2, w3, affine3, stride, residual):
        y1 = self.rounded(self.dense(x, w1))
        y2 = self.depthwise(self.activated(affine1, y1), wd, stride)
        y3 = self.rounded(self.dense(self.rounded(self.activated(affine2, y2)), w3))
        out = self.affine(affine3, y3)
        return (self.result(out + self(x) if residual else out),)

    def output_bwd(self, g, y3, mean3):
        return (self.sums(g, y3, mean3),)

    def project_bwd(self, g, y3, coef3, y2, affine2, mean2, w3):
        dy3 = self.rounded(self.coef(coef3, g, y3))
        v2 = self.affine(affine2, y2)
        dz = self.masked(self.rounded(self.dense(dy3, w3.t())), v2)
        dw3 = self.weight_of(dy3, self.rounded(F.relu6(v2)))
        return self.result(dz), self.result(dw3), self.sums(dz, y2, mean2)

    def depthwise_bwd(self, dz, y2, coef2, y1, affine1, mean1, wd, stride):
        dy2 = self.coef(coef2, dz, y2)
        v1 = self.affine(affine1, y1)
        options = dict(stride=stride, padding=wd.shape[-1] // 2, groups=v1.shape[1])
        weight = self(wd)[:, None]
        d = self.masked(torch.nn.grad.conv2d_input(v1.shape, weight, dy2, **options), v1)
        dwd = torch.nn.grad.conv2d_weight(F.relu6(v1), weight.shape, dy2, **options)[:, 0]
        return self.result(d), self.result(dwd), self.sums(d, y1, mean1)

    def expand_bwd(self, d, y1, coef1, x, w1, g):
        dy1 = self.rounded(self.coef(coef1, d, y1))
        dx = self.dense(dy1, w1.t())
        return self.result(dx if g is None else dx + self(g)), self.result(self.weight_of(dy1, self(x)))


# Which result is one of statistics or sums.
VECTORS = {"expand_fwd": 1, "depthwise_fwd": 1, "project_fwd": 1, "output_bwd": 0, "project_bwd": 2, "depthwise_bwd": 2}
GRADIENTS = {"output_bwd", "project_bwd", "depthwise_bwd", "expand_bwd"}


def make(shape, dtype, layout, of_x="NCHW", of_g="NCHW", mean=0.0) -> dict[str, tuple]:
    """The arguments of every stage; not those that one stage would hand to the next, but of their size."""
    batch, inside, hidden, outside, height, width, k, stride = shape
    low_height, low_width = (height - 1) // stride + 1, (width - 1) // stride + 1

    def image(channels, *size, of=layout):
        return lay_out(of, (torch.randn(batch, channels, *size) + mean).to(dtype))

    def affine(channels):  # of v = scale y + shift about a tenth are cut off on either side
        scale = torch.rand(channels) + 1.5
        return torch.stack([scale, 3 - scale * mean])

    def coef(channels):
        p, q, r, about = torch.randn(4, channels)
        q[::3] = 0
        return torch.stack([p, 0.1 * q, 0.1 * r, about + mean])

    low, full = (low_height, low_width), (height, width)
    x, g = image(inside, *full, of=of_x), image(outside, *low, of=of_g)
    w1, wd, w3 = torch.randn(hidden, inside), torch.randn(hidden, k, k), torch.randn(outside, hidden)
    w1, wd, w3 = (w1 / inside**0.5).to(dtype), (wd / k).to(dtype), (w3 / hidden**0.5).to(dtype)
    y1, y2, y3 = image(hidden, *full), image(hidden, *low), image(outside, *low)
    about = [torch.randn(channels) + mean for channels in (hidden, hidden, outside)]
    residual = stride == 1 and inside == outside
    return {
        "expand_fwd": (x, w1),
        "depthwise_fwd": (y1, affine(hidden), wd, stride),
        "project_fwd": (y2, affine(hidden), w3),
        "residual_fwd": (y3, affine(outside), g),
        "infer": (x, w1, affine(hidden), wd, affine(hidden), w3, affine(outside), stride, residual),
        "output_bwd": (g, y3, about[2]),
        "project_bwd": (g, y3, coef(outside), y2, affine(hidden), about[1], w3),
        "depthwise_bwd": (image(hidden, *low), y2, coef(hidden), y1, affine(hidden), about[0], wd, stride),
        "expand_bwd": (image(hidden, *full), y1, coef(hidden), x, w1, image(inside, *full, of=of_g)),
    }


def run(name: str, arguments: tuple, layout: str) -> tuple[Tensor, ...]:
    """All results of a stage."""
    images = [a for a in arguments if isinstance(a, Tensor) and a.dim() == 4]
    dtype, first = images[0].dtype, images[0]
    weights = {i: a for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.dim() < 4}

    def like(tensor, channels=None):
        shape = list(tensor.shape)
        shape[1] = channels or shape[1]
        return empty(shape, dtype, layout)

    def vectors(channels):
        return empty((2, channels), torch.float32)

    def weight(i):
        return empty(weights[i].shape, dtype)

    def low(stride):
        size = [(size - 1) // stride + 1 for size in first.shape[2:]]
        return first.new_empty(first.shape[0], 1, *size)

    results = {
        "expand_fwd": lambda: (like(first, len(arguments[1])), vectors(len(arguments[1]))),
        "depthwise_fwd": lambda: (like(low(arguments[-1]), first.shape[1]), vectors(first.shape[1])),
        "project_fwd": lambda: (like(first, len(arguments[2])), vectors(len(arguments[2]))),
        "residual_fwd": lambda: (like(first),),
        "infer": lambda: (like(low(arguments[7]), len(arguments[5])),),
        "output_bwd": lambda: (vectors(first.shape[1]),),
        "project_bwd": lambda: (like(arguments[3]), weight(6), vectors(arguments[3].shape[1])),
        "depthwise_bwd": lambda: (like(arguments[3]), weight(6), vectors(first.shape[1])),
        "expand_bwd": lambda: (like(arguments[3]), weight(4)),
    }[name]()
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    given = as_norms(*arguments) if name == "infer" else arguments
    stage(name)(*given, *results)
    assert all(map(walls_stand, results))
    assert all(same(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor))
    return results


def as_norms(x, w1, affine1, wd, affine2, w3, affine3, stride, residual) -> tuple:
    """The arguments of inference, with norms whose scale and shift are these."""
    norms = []
    for scale, shift in (affine1, affine2, affine3):
        norms += [scale, shift, torch.zeros_like(scale), torch.ones_like(scale), 0.0]
    return x, w1, wd, w3, *norms, stride, residual


def check(name: str, arguments: tuple, results: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    truth = getattr(Plain(torch.float64), name)(*arguments)
    of_torch = []
    for lay in (Tensor.contiguous, channels_last):
        laid = [lay(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
        for way in ("convolutions", "matrices", "reversed"):
            of_torch.append(getattr(Plain(torch.float32, dtype, way), name)(*laid))
    for i, result in enumerate(results):
        if i == VECTORS.get(name):
            # Of what was stored, which in bf16 may have been summed before it was rounded.
            found, scale = sums_of(name, arguments, results)
            excess = (result - found).abs() - (2e-6 if dtype == torch.float32 else 2**-7) * scale
            assert excess.max() <= 1e-30, f"{name}, result {i}: {excess.max()} too far off"
            continue
        wrong = check_parity(result, [peer[i] for peer in of_torch], truth[i], gradient=name in GRADIENTS)
        if wrong and (result.numel() < 64 or name in GRADIENTS):
            # All of so few peers can be lucky. Terms of one sign, as a constant g has them, share their rounding: in 16
            # bits that of two operands and the result, half an eps each; in fp32 that of the sum, term after term.
            nearest = torch.finfo(dtype).eps * (truth[i].abs().max() + 0.3)
            terms = 2 if dtype == torch.bfloat16 else 4 if result.numel() < 64 else 12
            wrong = [] if (result - truth[i]).abs().max() <= terms * nearest else wrong
        assert not wrong, f"{name}, result {i}: {'; '.join(wrong)}"


def sums_of(name: str, arguments: tuple, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A stage's sums of its inputs and its own results, and what their errors are measured by."""
    exact = Plain(torch.float64)
    if name in ("expand_fwd", "depthwise_fwd", "project_fwd"):
        return exact.stats(results[0]), exact.scale_of_stats(results[0])
    terms = arguments if name == "output_bwd" else (results[0], arguments[3], arguments[5])
    return exact.sums(*terms), exact.scale_of_sums(*terms)


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, layout, dtype):
    """Every stage, with a sample of the layouts of x and g."""
    deals = random.Random(str(shape)).sample([*product(LAYOUTS, LAYOUTS)], 6)
    for of_x, of_g in deals:
        for name, arguments in make(shape, dtype, layout, of_x, of_g).items():
            check(name, arguments, run(name, arguments, layout), dtype)


def test_optional_arguments():
    stages = make((2, 8, 33, 8, 9, 7, 3, 1), torch.float32, "channels_last")
    results = {name: run(name, arguments, "channels_last") for name, arguments in stages.items()}
    for name, last in (
        ("expand_fwd", 1),
        ("depthwise_fwd", 1),
        ("project_fwd", 1),
        ("project_bwd", 2),
        ("depthwise_bwd", 2),
    ):
        outputs = [torch.full_like(result, float("nan")) for result in results[name]]
        outputs[last] = None
        stage(name)(*stages[name], *outputs)
        assert all(map(torch.equal, outputs[:last], results[name][:last])), name
    for name in ("residual_fwd", "expand_bwd"):
        arguments = (*stages[name][:-1], None)
        check(name, arguments, run(name, arguments, "channels_last"), torch.float32)


@every_dtype
@pytest.mark.parametrize("learned", [True, False])
def test_vectors_of_the_norms(learned, dtype):
    """A stage makes them of the very statistics and sums that it tells."""
    shape = (2, 24, 70, 16, 9, 17, 3, 2)
    stages = make(shape, dtype, "channels_last", mean=3.0)
    for name, channels in (("expand_fwd", 70), ("depthwise_fwd", 70), ("project_fwd", 16)):
        weight, bias = torch.randn(2, channels) if learned else (None, None)
        y, stats = run(name, stages[name], "channels_last")
        vectors, pixels = empty((5, channels), torch.float32), y.numel() // channels
        again = torch.empty_like(y)
        stage(name)(*stages[name], again, None, vectors, weight, bias, 0.1)
        assert torch.equal(again, y) and walls_stand(vectors)
        mean, squares = stats.double()
        scale = (squares / pixels + 0.1).rsqrt() * (weight.double() if learned else 1)
        shift = (bias.double() if learned else 0) - mean * scale
        truth = torch.stack([scale, shift, mean, squares / pixels, squares / (pixels - 1)])
        torch.testing.assert_close(vectors.double(), truth, rtol=2e-6, atol=2e-6)
    for name, channels, image in (("output_bwd", 16, 0), ("project_bwd", 70, 3), ("depthwise_bwd", 70, 3)):
        vectors, weight = torch.rand(5, channels) + 0.5, torch.randn(channels) if learned else None
        *gradients, sums = run(name, stages[name], "channels_last")
        pixels = stages[name][image].numel() // channels
        for batch in (True, False):
            found = [torch.empty_like(gradient) for gradient in (*gradients, sums)]
            coef, dweight = empty((4, channels), torch.float32), empty((channels,), torch.float32)
            stage(name)(*stages[name], *found, coef, dweight, vectors, weight, 0.1, batch)
            assert all(map(torch.equal, found, [*gradients, sums])) and walls_stand(coef) and walls_stand(dweight)
            rstd, (total, product) = (vectors[3].double() + 0.1).rsqrt(), sums.double()
            p = rstd * (weight.double() if learned else 1)
            q, r = (-p * rstd**2 * product / pixels, -p * total / pixels) if batch else (0 * p, 0 * p)
            truth = torch.stack([p, q, r, vectors[2].double()])
            torch.testing.assert_close(coef.double(), truth, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(dweight.double(), product * rstd, rtol=2e-6, atol=2e-6)


def test_batch_norms_where_no_stage_has_them():
    """By running statistics and by moments over processes; one of the three is absent."""
    mean, var, weight, bias, moments = torch.randn(9), torch.rand(9), torch.randn(9), torch.randn(9), torch.rand(3, 5)
    first, third = empty((5, 9), torch.float32), empty((5, 5), torch.float32)
    third[2:] = moments
    absent = None, None, None, None, 0.0, None
    run_fwd, run_bwd = torch.ops.fusekern_cpp.batch_norm_fwd, torch.ops.fusekern_cpp.batch_norm_bwd
    run_fwd(mean, var, weight, bias, 0.1, first, *absent, None, None, None, None, 0.1, third)
    scale = weight * (var + 0.1).rsqrt()
    torch.testing.assert_close(first, torch.stack([scale, bias - mean * scale, mean, var, var]))
    scale = (moments[1] + 0.1).rsqrt()
    torch.testing.assert_close(third, torch.stack([scale, -moments[0] * scale, *moments]))
    sums, means, rstd = torch.randn(2, 9), torch.randn(2, 9), (var + 0.1).rsqrt()
    coef, dweight = empty((4, 9), torch.float32), empty((9,), torch.float32)
    for given, over in ((means, means), (None, sums / 7)):
        run_bwd(sums, given, 7, first, weight, 0.1, True, coef, dweight)
        p = weight * rstd
        torch.testing.assert_close(coef, torch.stack([p, -p * rstd**2 * over[1], -p * over[0], mean]))
        torch.testing.assert_close(dweight, sums[1] * rstd)
    with pytest.raises(RuntimeError, match="mean and var belong together"):
        run_fwd(mean, None, weight, bias, 0.1, first, *absent, *absent)


@every_layout
def test_inference_reads_norms_as_they_are(layout):
    """In bf16 or fp32, each with or without weight and bias: the bits that scale and shift of the same numbers give."""
    arguments = make((2, 24, 40, 24, 11, 9, 3, 1), torch.bfloat16, layout)["infer"]
    x, w1, _, wd, _, w3, _, stride, residual = arguments
    wide, narrow, affines = [], [], []
    for i, width in enumerate((40, 40, 24)):
        parts = [(torch.rand(width) + 0.5).bfloat16() for _ in range(4)]
        given = [None if i == 1 else parts[0], None if i == 2 else parts[1], *parts[2:]]
        narrow += [*given, 0.5]
        wide += [*(part if part is None else part.float() for part in given), 0.5]
        affine = empty((5, width), torch.float32)
        absent = None, None, None, None, 0.0, None
        weight, bias, mean, var, eps = wide[-5:]
        torch.ops.fusekern_cpp.batch_norm_fwd(mean, var, weight, bias, eps, affine, *absent, *absent)
        affines.append(affine[:2])
    found = []
    for norms in (narrow, wide):
        found.append(empty(list(x.shape), torch.bfloat16, layout))
        stage("infer")(x, w1, wd, w3, *norms, stride, residual, found[-1])
    through_affines = run("infer", (x, w1, affines[0], wd, affines[1], w3, affines[2], stride, residual), layout)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], *through_affines)
    mean = narrow[2]
    for wrong in (mean[:-1], mean.double(), torch.stack([mean, mean], 1)[:, 0]):
        with pytest.raises(RuntimeError):
            stage("infer")(x, w1, wd, w3, *narrow[:2], wrong, *narrow[3:], stride, residual, found[0])


@every_dtype
@every_layout
def test_every_layout_gives_the_same_bits(layout, dtype):
    """What is read must not depend on where it lies."""
    shape = (2, 24, 40, 24, 11, 9, 3, 1)
    torch.manual_seed(1)
    expected = {name: run(name, arguments, layout) for name, arguments in make(shape, dtype, layout).items()}
    for of_x, of_g in product(LAYOUTS[:5], LAYOUTS[:5]):
        torch.manual_seed(1)
        for name, arguments in make(shape, dtype, layout, of_x, of_g).items():
            if name in ("expand_fwd", "infer", "expand_bwd"):
                continue  # torch's products take other ways for other strides
            assert all(map(torch.equal, run(name, arguments, layout), expected[name])), (name, of_x, of_g)


@every_dtype
@every_layout
def test_neither_run_nor_number_of_threads_shows(layout, dtype):
    stages = make((3, 48, 160, 48, 23, 29, 3, 1), dtype, layout)
    threads = torch.get_num_threads()
    expected = {name: run(name, arguments, layout) for name, arguments in stages.items()}
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for name, arguments in stages.items():
                assert all(map(torch.equal, run(name, arguments, layout), expected[name])), (name, count)
    finally:
        torch.set_num_threads(threads)
    for name, arguments in stages.items():  # the comparison can fail
        arguments[0][0, 0, 0, 0] += 1
        assert not all(map(torch.equal, run(name, arguments, layout), expected[name])), name


@every_layout
def test_statistics_far_from_zero(layout):
    """Numbers about 1e4 with a deviation of 1: of sums of squares nothing of the deviation would be left."""
    y = torch.randn(2, 40, 33, 31)
    far, near = lay_out(layout, y + 1e4), lay_out(layout, y * 1e-4 + 3)
    ones, wd = torch.stack([torch.ones(40), torch.zeros(40)]), torch.zeros(40, 3, 3)
    wd[:, 1, 1] = 3333
    for name, arguments in (
        ("expand_fwd", (far, torch.eye(40))),
        ("depthwise_fwd", (near, ones, wd, 1)),
        ("project_fwd", (near, ones, 3333 * torch.eye(40))),
    ):
        result, stats = run(name, arguments, layout)
        truth = Plain(torch.float64).stats(result)
        assert (stats[0] - truth[0]).abs().max() < 1e-3, name
        assert ((stats[1] - truth[1]) / truth[1]).abs().max() < 1e-6, name


@every_dtype
@every_layout
def test_mean_is_exact_where_all_numbers_are_the_same(layout, dtype):
    y1 = torch.full((2, 20, 13, 9), 3.0).to(dtype)
    x, w1 = lay_out(layout, y1[:, :1]), torch.ones(20, 1, dtype=dtype)
    _, stats = run("expand_fwd", (x, w1), layout)
    assert (stats[0] == 3).all() and (stats[1] == 0).all()


@every_dtype
@every_layout
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(bad, k, stride, layout, dtype):
    """In the middle and in a corner, where the zeros around the map are near; elsewhere equal bits."""
    shape = (2, 8, 40, 8, 9, 10, k, stride)
    stages = make(shape, dtype, layout)
    exact = Plain(torch.float64)
    for name, (row, column) in product(stages, ((0, 0), (4, 4))):
        good, untouched_truth = run(name, stages[name], layout), getattr(exact, name)(*stages[name])
        for index in [i for i, a in enumerate(stages[name]) if isinstance(a, Tensor) and a.dim() == 4]:
            spoilt = list(stages[name])
            spoilt[index] = spoilt[index].clone(memory_format=torch.preserve_format)
            spoilt[index][1, 3, row // stride, column // stride] = bad
            found = run(name, tuple(spoilt), layout)
            truth = getattr(exact, name)(*spoilt)
            for i, (result, whole, before) in enumerate(zip(found, truth, good, strict=True)):
                where = (name, index, row, i)
                if name == "depthwise_bwd" and i == 1:  # torch multiplies the zeros around the map, too
                    assert bool(result.isfinite().all()) == bool(whole.isfinite().all()), where
                else:
                    assert torch.equal(result.isfinite(), whole.isfinite()), where
                if result.dim() == 4 and result.shape[2:] == before.shape[2:]:
                    untouched = whole == untouched_truth[i]
                    assert torch.equal(result[untouched], before[untouched]), where


@every_dtype
@every_layout
def test_slopes_at_the_corners_of_relu6(layout, dtype):
    """None at 0 and at 6, as PyTorch has it; one where the number is NaN."""
    y = torch.zeros(1, 20, 2, 3)
    y[:, :] = torch.tensor([[0.0, 6.0, 3.0], [-0.0, 7.0, float("nan")]])
    slope = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    y = lay_out(layout, y.to(dtype))
    affine, mean = torch.stack([torch.ones(20), torch.zeros(20)]), torch.zeros(20)
    ones = lay_out(layout, torch.ones_like(y))
    through = torch.stack([torch.ones(20), torch.zeros(20), torch.zeros(20), torch.zeros(20)])
    dz, *_ = run("project_bwd", (ones, ones, through, y, affine, mean, torch.eye(20).to(dtype)), layout)
    assert torch.equal(dz[0, 4].float(), slope)
    wd = torch.zeros(20, 3, 3)
    wd[:, 1, 1] = 1
    d, *_ = run("depthwise_bwd", (ones, ones, through, y, affine, mean, wd.to(dtype), 1), layout)
    assert torch.equal(d[0, 4].float(), slope)


def test_what_does_not_fit_is_refused():
    stages = make((2, 8, 33, 8, 6, 5, 3, 1), torch.float32, "channels_last")
    for name, arguments in stages.items():
        results = run(name, arguments, "channels_last")
        for i, argument in enumerate((*arguments, *results)):
            if not isinstance(argument, Tensor):
                continue
            for wrong in (argument.double(), argument[..., :-1], argument[:0]):
                everything = [*arguments, *results]
                everything[i] = wrong
                with pytest.raises(RuntimeError):
                    stage(name)(*everything)
    with pytest.raises(RuntimeError):
        y1, *rest = stages["depthwise_fwd"]
        stage("depthwise_fwd")(y1.contiguous(), *rest, *run("depthwise_fwd", stages["depthwise_fwd"], "channels_last"))


@pytest.mark.parametrize("isa", extension.build_info()["isas"])
def test_other_instruction_sets(isa):
    run_again(__file__, isa)
