"""The launchers of downsample, judged against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import downsample as kernels
from layouts import lay_out
from spy import Launches, short
from torch import Tensor
from where import DEVICE, DTYPES

from fusekern.ops._kernel import empty_image
from fusekern.ops.downsample import _empty_gradients, downsample_reference, downsampled_size
from fusekern.testing import assert_parity

# batch, channels, height, width, pad, layout of the image, layout of the weight
CASES = [
    (1, 1, 1, 1, "floor", "nchw", "nchw"),
    (1, 32, 16, 17, "floor", "channels_last", "channels_last"),
    (2, 40, 8, 7, "ceil", "nchw", "nchw"),
    (3, 50, 2, 11, "floor", "channels_last", "nchw"),
    (1, 128, 16, 16, "floor", "channels_last", "channels_last"),
    (2, 65, 9, 9, "floor", "nchw", "channels_last"),
    (2, 33, 7, 8, "ceil", "sliced", "sliced"),
    (5, 16, 20, 10, "floor", "cropped", "nchw"),
    (3, 19, 11, 13, "ceil", "permuted", "expanded"),
    (40, 8, 4, 5, "floor", "expanded", "channels_last"),
]


def make(case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad, image, weight and bias."""
    batch, channels, height, width, pad, layout, weight_layout = case
    image = torch.randn(batch, channels, height, width, dtype=dtype, device=DEVICE)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype, device=DEVICE) / (9 * channels) ** 0.5
    bias = torch.randn(channels, dtype=dtype, device=DEVICE)
    grad = torch.randn(batch, channels, *downsampled_size(height, width, pad), dtype=dtype, device=DEVICE)
    if layout in ("channels_last", "sliced"):
        grad = lay_out(layout, grad)
    return grad, lay_out(layout, image), lay_out(weight_layout, weight), bias


def guarded(like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A tensor full of NaN with the strides of a dense one, and the memory before and behind it, full of 7."""
    memory = like.new_full((like.numel() + 256,), 7)
    tensor = memory[128:-128].as_strided(like.shape, like.stride()).fill_(float("nan"))
    return tensor, [memory[:128], memory[-128:]]


def run(grad: Tensor, image: Tensor, weight: Tensor, bias: Tensor | None, last: bool | None = None) -> list[Tensor]:
    """out, dimage, dweight and, with a bias, dbias; the launchers write all of them and nothing else.

    ``last``: the gradient of the weight is channels_last; by default if the weight is.
    """
    last = weight.stride(1) == 1 if last is None else last
    dweight = torch.empty_like(weight, memory_format=torch.channels_last if last else torch.contiguous_format)
    likes = [empty_image(image, size=grad.shape[2:]), empty_image(image), dweight, weight.new_empty(weight.shape[0])]
    outputs, guards = zip(*map(guarded, likes), strict=True)
    inputs = [tensor for tensor in (grad, image, weight, bias) if tensor is not None]
    before = [tensor.clone() for tensor in inputs]
    kernels.downsample_fwd(image, weight, bias, outputs[0])
    kernels.downsample_bwd(grad, image, weight, *outputs[1:3], None if bias is None else outputs[3])
    for tensor, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    for memory in sum(guards, []):
        assert (memory == 7).all()
    return list(outputs[: 3 if bias is None else 4])


def patches_times_weight(image: Tensor, weight: Tensor, bias: Tensor | None, *, pad: str) -> Tensor:
    h, w = downsampled_size(*image.shape[2:], pad)
    image = F.pad(image, (0, max(3 * w - image.shape[3], 0), 0, max(3 * h - image.shape[2], 0)))[..., : 3 * h, : 3 * w]
    patches = image.unflatten(3, (w, 3)).unflatten(2, (h, 3)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


def differentiated(op, grad: Tensor, *inputs: Tensor | None, pad: str) -> list[Tensor]:
    inputs = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    out = op(*inputs, pad=pad)
    return [out.detach(), *torch.autograd.grad(out, [tensor for tensor in inputs if tensor is not None], grad)]


def judge(grad: Tensor, image: Tensor, weight: Tensor, bias: Tensor | None, pad: str, last: bool | None = None) -> None:
    results = run(grad, image, weight, bias, last)
    peers = [
        differentiated(op, grad, image.contiguous(memory_format=layout), weight, bias, pad=pad)
        for op in (downsample_reference, patches_times_weight)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    exact = [tensor if tensor is None else tensor.double() for tensor in (grad, image, weight, bias)]
    truths = differentiated(downsample_reference, *exact, pad=pad)
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        assert_parity(result, [peer[i] for peer in peers], truth, gradient=i > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch(case, dtype):
    judge(*make(case, dtype), case[4])


class Spy:
    """A kernel that notes the constexprs that it is launched with."""

    def __init__(self, kernel, launched: list[dict]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*arguments, **constexprs):
            self.launched.append(constexprs)
            return self.kernel[grid](*arguments, **constexprs)

        return launch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", ["large", "medium"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_settings_and_splits(layout, load, dtype, monkeypatch):
    """One multiprocessor has work enough without splits; 1000 of them have not, all the more if splits cost nothing."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1 if load == "large" else 1000)
    for cost in ("START", "PART", "SUM"):
        monkeypatch.setattr(kernels, cost, 0)
    products, sums = [], []
    monkeypatch.setattr(kernels, "downsample_fwd_kernel", Spy(kernels.downsample_fwd_kernel, products))
    monkeypatch.setattr(kernels, "downsample_sum_kernel", Spy(kernels.downsample_sum_kernel, sums))
    inputs = make((2, 48, 16, 22, "floor", layout, "channels_last"), dtype)
    judge(*inputs, "floor")
    kind = "half" if dtype != torch.float32 else "ieee"
    setting = kernels.SETTINGS[(kind, load) if layout == "channels_last" else ("odd", "any")]
    assert [products[0][name] for name in ("BO", "BM", "BC")] == list(setting.fwd[:3])
    assert [launch["WEIGHT"] for launch in sums] == ([] if load == "large" else [False, True])
    judge(*inputs, "floor", last=False)
    assert sums[-1]["WEIGHT"] and not sums[-1]["LAST"]


@pytest.mark.parametrize(
    "case, programs, bias, forward, backward",
    [
        (CASES[4], 132, "dense", "fwd sum", "sum bwd_image bwd_weight"),
        (CASES[4], 1, "none", "fwd", "bwd_image bwd_weight"),
        ((1, 128, 16, 16, "floor", "nchw", "nchw"), 1, "dense", "copy fwd", "sum copy bwd_image bwd_weight sum"),
        (CASES[2], 132, "strided", "copy copy fwd sum", "sum copy bwd_image bwd_weight sum"),
        ((9, 16, 40, 40, "floor", *["channels_last"] * 2), 132, "none", "fwd", "bwd_image bwd_weight sum"),
        (CASES[8], 1, "dense", "copy fwd", "sum copy bwd_image bwd_weight sum"),
    ],
    ids=str,
)
def test_launches_are_those_planned(case, programs, bias, forward, backward, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    grad, image, weight, values = make(case, torch.float16)
    values = {"none": None, "dense": values, "strided": values.repeat(2)[::2]}[bias]
    plan = kernels.launches(image, weight, values, grad)
    out, (dimage, dweight, dbias) = empty_image(image, size=grad.shape[2:]), _empty_gradients(image, weight, True)
    with Launches(kernels, monkeypatch) as launches:
        kernels.downsample_fwd(image, weight, values, out)
        found = {"fwd": launches.taken()}
        kernels.downsample_bwd(grad, image, weight, dimage, dweight, None if values is None else dbias)
        found["bwd"] = launches.taken()
    assert found == plan and short("downsample", plan) == {"fwd": forward, "bwd": backward}


@pytest.mark.parametrize("bias", ["none", "expanded", "strided"])
def test_biases(bias):
    grad, image, weight, values = make((2, 20, 7, 6, "floor", "channels_last", "nchw"), torch.float32)
    values = {"none": None, "expanded": values[:1].expand(20), "strided": values.repeat(2)[::2]}[bias]
    judge(grad, image, weight, values, "floor")
    judge(grad[:1, :1, :1, :1].expand_as(grad), image, weight, values, "floor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", ["floor", "ceil"])
@pytest.mark.parametrize("where", range(3), ids=["grad", "image", "weight"])
def test_nan_stays_where_it_is(where, pad, dtype):
    *inputs, bias = make((2, 20, 7, 8, pad, "channels_last", "channels_last"), dtype)
    clean = run(*inputs, bias)
    inputs[where][1, 3, 1, 1] = float("nan")
    results = run(*inputs, bias)
    truths = differentiated(downsample_reference, *(tensor.double() for tensor in (*inputs, bias)), pad=pad)
    for result, before, truth in zip(results, clean, truths, strict=True):
        assert torch.equal(result.isnan(), truth.isnan())
        assert torch.equal(result[~truth.isnan()], before[~truth.isnan()])
    assert sum(bool(truth.isnan().any()) for truth in truths) == (3 if where == 0 else 2)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 10), (2, 5), (5, 1)])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_what_no_patch_covers_has_gradient_zero(layout, size):
    grad, image, weight, bias = make((2, 17, *size, "floor", layout, "nchw"), torch.float32)
    h, w = grad.shape[2:]
    dimage = run(grad + 1, image, weight, bias)[1]
    covered = torch.zeros(size, dtype=torch.bool, device=DEVICE)
    covered[: 3 * h, : 3 * w] = True
    assert (dimage[:, :, ~covered] == 0).all() and (dimage[:, :, covered] != 0).all()


def test_same_bits_again():
    inputs = make((1, 40, 16, 10, "floor", "channels_last", "nchw"), DTYPES[-1])
    first, second = run(*inputs), run(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    # The comparison can fail: a change of single inputs shows.
    inputs[0][0, 0, 0, 0] += 0.25
    inputs[1][0, 0, 0, 0] += 0.25
    assert not any(torch.equal(one, other) for one, other in zip(first, run(*inputs), strict=True))


def test_more_than_int32_elements():
    """Images, channels, rows and columns further apart than 2**31 elements."""
    far = 2**31 + 64
    memory = torch.empty(far + 5000, dtype=torch.float16, device=DEVICE)
    dense = torch.randn(2, 2, 6, 8, dtype=torch.float16, device=DEVICE)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float16, device=DEVICE)
    for axis in range(4):
        grad = torch.randn(2, 2, 2, 2, dtype=torch.float16, device=DEVICE)
        strides = [far if i == axis else stride for i, stride in enumerate((1, 2, 4, 24))]
        image = dense.movedim(axis, 0)[:2].movedim(0, axis)
        grad = grad[:, :, : image.shape[2] // 3 or 1, : image.shape[3] // 3 or 1]
        apart = memory.as_strided(image.shape, strides).copy_(image)
        for one, other in zip(run(grad, apart, weight, None), run(grad, image.clone(), weight, None), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_run_length(kind):
    """No split is empty, and many steps are shared out only where programs are few."""
    for programs in (1, 8, 36, 131, 132, 133, 2000):
        for steps in (1, 2, 9, 72, 1000):
            run_length = kernels.run_length(programs, steps)
            splits = -(-steps // run_length)
            assert 1 <= run_length <= steps and (splits - 1) * run_length < steps
            assert splits == 1 or programs * splits <= 4 * kernels.PROGRAMS
    assert kernels.run_length(8, 72) <= 6
    assert kernels.run_length(2000, 72) == 72
    assert kernels.setting_of(kind, 25, 512) == kernels.SETTINGS[kind, "small"]
