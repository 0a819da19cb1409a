"""The C++ kernel of downsample itself, below what the op checks, allocates and chooses."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from instruction_sets import run_again
from torch import Tensor
from walls import channels_last, empty, lay_out, walls_stand

from fusekern.extensions import load
from fusekern.ops.downsample import downsample_reference, downsampled_size
from fusekern.testing import assert_parity

if load("_C"):
    pytest.skip(f"the C++ module is not there: {load('_C')}", allow_module_level=True)

import fusekern._C as extension

kernels = torch.ops.fusekern_cpp
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LAYOUTS = ("NCHW", "channels_last", "sliced", "sliced channels_last", "transposed", "expanded")

# batch, channels, height, width: sides of 1 and 2, beside and on multiples of 3; 16 channels at a time are moved, and
# above half as many patches as channels it is torch's convolution that runs forward.
SHAPES = [
    (2, 24, 1, 1),
    (1, 16, 2, 7),
    (2, 17, 3, 5),
    (1, 33, 12, 9),
    (3, 8, 7, 8),
    (1, 64, 16, 16),
    (2, 128, 13, 14),
    (2, 40, 24, 23),
]


def run(image, weight, bias, grad, layout="NCHW", weight_layout="NCHW"):
    """Output and gradients of image, weight and, if there is one, bias; dense results in ``layout``."""
    dtype = image.dtype
    out, dimage = empty(grad.shape, dtype, layout), empty(image.shape, dtype, layout)
    dweight = empty(weight.shape, dtype, weight_layout)
    dbias = None if bias is None else empty(bias.shape, dtype)
    kernels.downsample_fwd(image, weight, bias, out)
    kernels.downsample_bwd(grad, image, weight, dimage, dweight, dbias)
    results = [result for result in (out, dimage, dweight, dbias) if result is not None]
    assert all(map(walls_stand, results))
    return results


def reference(image, weight, bias, grad, pad):
    tensors = [tensor.detach().requires_grad_() for tensor in (image, weight, bias) if tensor is not None]
    out = downsample_reference(*tensors, pad=pad)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def peers(image, weight, bias, grad, pad):
    """PyTorch's results in both layouts, and with channels in the opposite order."""
    direct = [reference(lay(image), weight, bias, grad, pad) for lay in (Tensor.contiguous, channels_last)]
    flipped_bias = None if bias is None else bias.flip(0)
    out, dimage, dweight, *dbias = reference(image.flip(1), weight.flip(0, 1), flipped_bias, grad.flip(1), pad)
    return [*direct, (out.flip(1), dimage.flip(1), dweight.flip(0, 1), *(bias.flip(0) for bias in dbias))]


def make(shape, dtype, pad, bias=True):
    batch, channels, height, width = shape
    image = torch.randn(shape)
    weight = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
    grad = torch.randn(batch, channels, *downsampled_size(height, width, pad))
    return image.to(dtype), weight.to(dtype), torch.randn(channels).to(dtype) if bias else None, grad.to(dtype)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype):
    """A sample of all layouts of image, gradient, weight and results, rounded either way, with and without bias."""
    weights, dense, flags = ("NCHW", "channels_last", "transposed"), LAYOUTS[:2], (False, True)
    deals = [*product(LAYOUTS, LAYOUTS, weights, dense, dense, ("floor", "ceil"), flags)]
    for deal in random.Random(str(shape)).sample(deals, 12):
        of_image, of_grad, of_weight, of_result, of_dweight, pad, has_bias = deal
        image, weight, bias, grad = make(shape, dtype, pad, has_bias)
        image, weight, grad = lay_out(of_image, image), lay_out(of_weight, weight), lay_out(of_grad, grad)
        before = [tensor.clone() for tensor in (image, weight, grad)]
        results = run(image, weight, bias, grad, of_result, of_dweight)
        assert all(map(torch.equal, before, (image, weight, grad)))
        truth = reference(*(None if t is None else t.double() for t in (image, weight, bias, grad)), pad)
        of_torch = peers(image, weight, bias, grad, pad)
        for i, result in enumerate(results):
            assert_parity(result, [peer[i] for peer in of_torch], truth[i], gradient=i > 0)


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_every_layout_gives_the_same_bits(layout, dtype):
    """Few enough patches for the kernel's own way; what is read must not depend on where it lies."""
    image, weight, bias, grad = make((1, 40, 8, 10), dtype, "ceil")
    expected = run(image, weight, bias, grad, layout)
    for of_image, of_grad in product(LAYOUTS[:5], LAYOUTS[:5]):
        found = run(lay_out(of_image, image), weight, bias, lay_out(of_grad, grad), layout)
        assert all(map(torch.equal, found, expected)), (of_image, of_grad)


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 40, 8, 10), (1, 16, 20, 20)], ids=["own", "convolution"])
def test_pixels_beyond_the_patches(shape, layout, dtype):
    """They do not count, whatever they are, and their gradient is exactly 0."""
    image, weight, bias, grad = make(shape, dtype, "floor")
    height, width = 3 * grad.shape[2], 3 * grad.shape[3]
    expected = run(image, weight, bias, grad, layout)
    image[:, :, height:], image[:, :, :, width:] = float("nan"), float("inf")
    found = run(image, weight, bias, grad, layout)
    assert all(map(torch.equal, found, expected))
    assert (found[1][:, :, height:] == 0).all() and (found[1][:, :, :, width:] == 0).all()
    assert (found[1][:, :, :height, :width] != 0).any()


@every_dtype
def test_nan_stays_in_its_patch(dtype):
    image, weight, bias, grad = make((1, 40, 8, 10), dtype, "ceil")
    out, dimage, *_ = run(image, weight, bias, grad)
    image[0, 7, 4, 5] = float("nan")
    found, dfound, dweight, dbias = run(image, weight, bias, grad)
    assert found[0, :, 1, 1].isnan().all()
    found[0, :, 1, 1] = out[0, :, 1, 1]
    assert torch.equal(found, out)
    assert torch.equal(dfound, dimage) and dbias.isfinite().all()
    spoilt = torch.zeros(40, 40, 3, 3, dtype=torch.bool)
    spoilt[:, 7, 1, 2] = True
    assert torch.equal(dweight.isnan(), spoilt)


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_two_runs_give_equal_bits(layout, dtype):
    image, weight, bias, grad = make((2, 64, 13, 14), dtype, "floor")
    expected = run(image, weight, bias, grad, layout)
    assert all(map(torch.equal, run(image, weight, bias, grad, layout), expected))
    image.view(-1)[0] += 0.1  # the comparison can fail
    assert not torch.equal(run(image, weight, bias, grad, layout)[0], expected[0])


@pytest.mark.skipif(extension.cpu_capability() == "baseline", reason="without FMA the products are torch's")
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_neither_threads_nor_other_images_show(layout):
    image, weight, bias, grad = make((3, 128, 16, 16), torch.float32, "floor")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(image, weight, bias, grad, layout)
        torch.set_num_threads(2)
        assert all(map(torch.equal, run(image, weight, bias, grad, layout), expected))
    finally:
        torch.set_num_threads(threads)
    alone = run(image[1:2], weight, bias, grad[1:2], layout)
    assert torch.equal(alone[0], expected[0][1:2]) and torch.equal(alone[1], expected[1][1:2])


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_strides_beyond_31_bits(layout, dim):
    """A view into 2^31 elements and some, of which only those of the view are ever touched."""
    memory = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)
    image, weight, bias, grad = make((2, 24, 4, 4), torch.bfloat16, "ceil")
    strides = [1999, 83, 19, 4]
    strides[dim] = 2**31 // (image.shape[dim] - 1) + 1
    far_image = memory.as_strided(image.shape, strides).copy_(image)
    expected = run(image, weight, bias, grad, layout)
    assert all(map(torch.equal, run(far_image, weight, bias, grad, layout), expected))
    strides[dim] = 2**31 // (grad.shape[dim] - 1) + 1
    far_grad = memory.as_strided(grad.shape, strides).copy_(grad)
    assert all(map(torch.equal, run(image, weight, bias, far_grad, layout), expected))


def test_what_does_not_fit_is_refused():
    image, weight, bias, grad = make((1, 8, 6, 6), torch.float32, "floor")
    out = torch.empty_like(grad)
    for arguments in (
        (image.double(), weight.double(), bias.double(), out.double()),
        (image, weight.bfloat16(), bias, out),
        (image, weight[:, :1], bias, out),
        (image, weight, bias[:7], out),
        (image, weight, bias, out[:, :7]),
    ):
        with pytest.raises(RuntimeError):
            kernels.downsample_fwd(*arguments)


@pytest.mark.parametrize("isa", extension.build_info()["isas"])
def test_other_instruction_sets(isa):
    run_again(__file__, isa)
