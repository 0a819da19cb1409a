"""The C++ kernel of score_map itself, below what the op checks, allocates and chooses."""

from __future__ import annotations

import os
import random
from itertools import product

import pytest
import torch
from instruction_sets import run_again
from torch import Tensor
from walls import channels_last, empty, lay_out, walls_stand

from fusekern.extensions import load
from fusekern.ops.score_map import score_map_reference
from fusekern.testing import assert_parity

if load("_C"):
    pytest.skip(f"the C++ module is not there: {load('_C')}", allow_module_level=True)

import fusekern._C as extension

kernels = torch.ops.fusekern_cpp
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LAYOUTS = ("NCHW", "channels_last", "sliced", "sliced channels_last", "transposed", "expanded")

# batch, channels, height, width, tokens: with tiles of 96, 48 and 24 pixels, chunks of up to 3 tiles, vectors of 4, 8
# and 16, and sums of 64 terms, on either side of each limit.
SHAPES = [
    (3, 16, 1, 7, 19),
    (2, 24, 7, 1, 1),
    (2, 1, 6, 5, 3),
    (1, 13, 8, 12, 17),
    (1, 65, 5, 5, 8),
    (2, 40, 11, 9, 65),
    (1, 128, 16, 16, 150),
    (1, 24, 49, 41, 9),
    (1, 33, 4, 4, 847),
]


def run(image, text, grad, normalize, concat, layout="NCHW"):
    """Output and gradients of image and text; dense results in ``layout``."""
    batch, channels, *size = image.shape
    out = empty((batch, text.shape[1] + concat * channels, *size), image.dtype, layout)
    dimage, dtext = empty(image.shape, image.dtype, layout), empty(text.shape, text.dtype)
    kernels.score_map_fwd(image, text, normalize, concat, out)
    kernels.score_map_bwd(grad, image, text, normalize, concat, dimage, dtext)
    assert walls_stand(out) and walls_stand(dimage) and walls_stand(dtext)
    return out, dimage, dtext


def reference(image, text, grad, normalize, concat):
    image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
    out = score_map_reference(image, text, normalize=normalize, concat=concat)
    return out.detach(), *torch.autograd.grad(out, (image, text), grad)


def peers(image, text, grad, normalize, concat):
    """PyTorch's results in both layouts, and with channels, pixels and tokens summed in the opposite order."""
    direct = [reference(lay(image), text, grad, normalize, concat) for lay in (Tensor.contiguous, channels_last)]
    channels, tokens = image.shape[1], text.shape[1]
    flipped = [image.flip(1, 2, 3), text.flip(1, 2)]
    parts = grad.split([channels, tokens], 1) if concat else [grad]
    out, dimage, dtext = reference(*flipped, torch.cat([part.flip(1, 2, 3) for part in parts], 1), normalize, concat)
    parts = out.split([channels, tokens], 1) if concat else [out]
    back = torch.cat([part.flip(1, 2, 3) for part in parts], 1)
    return [*direct, (back, dimage.flip(1, 2, 3), dtext.flip(1, 2))]


def check(results, image, text, grad, normalize, concat):
    truth = reference(image.double(), text.double(), grad.double(), normalize, concat)
    of_torch = peers(image, text, grad, normalize, concat)
    for i, result in enumerate(results):
        assert_parity(result, [peer[i] for peer in of_torch], truth[i], gradient=i > 0)


def make(shape, dtype, concat):
    batch, channels, height, width, count = shape
    image, text = torch.randn(batch, channels, height, width), torch.randn(batch, count, channels)
    return image.to(dtype), text.to(dtype), torch.randn(batch, count + concat * channels, height, width).to(dtype)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype):
    """A sample of all layouts of image, gradient, result and text, in all modes."""
    flags = (False, True)
    for deal in random.Random(str(shape)).sample([*product(LAYOUTS, LAYOUTS, LAYOUTS[:2], flags, flags, flags)], 12):
        of_image, of_grad, of_result, normalize, concat, turned = deal
        normalize = normalize and shape[1] > 1  # the cosine of numbers has no gradient: there is but its rounding error
        image, text, grad = make(shape, dtype, concat)
        image, grad = lay_out(of_image, image), lay_out(of_grad, grad)
        text = text.transpose(1, 2).contiguous().transpose(1, 2) if turned else text
        before = [tensor.clone() for tensor in (image, text, grad)]
        results = run(image, text, grad, normalize, concat, of_result)
        assert all(map(torch.equal, before, (image, text, grad)))
        check(results, image, text, grad, normalize, concat)


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_every_layout_gives_the_same_bits(layout, dtype):
    """What is read must not depend on where it lies: of a result's own layout alone."""
    image, text, grad = make((2, 24, 11, 9, 19), dtype, True)
    expected = run(image, text, grad, True, True, layout)
    for of_image, of_grad in product(LAYOUTS[:5], LAYOUTS[:5]):
        found = run(lay_out(of_image, image), text, lay_out(of_grad, grad), True, True, layout)
        assert all(map(torch.equal, found, expected)), (of_image, of_grad)


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_infinity_stay_in_their_pixel(normalize, layout, dtype):
    image, text, grad = make((1, 20, 6, 7, 19), dtype, True)
    out, dimage, _ = run(image, text, grad, normalize, True, layout)
    for bad in (float("nan"), float("inf")):
        spoilt = image.clone()
        spoilt[0, 3, 2, 5] = bad
        found, dfound, dtext = run(spoilt, text, grad, normalize, True, layout)
        truth = score_map_reference(spoilt.double(), text.double(), normalize=normalize, concat=True)
        assert torch.equal(found.isfinite(), truth.isfinite())
        elsewhere = torch.ones(6, 7, dtype=torch.bool)
        elsewhere[2, 5] = False
        assert torch.equal(found[..., elsewhere], out[..., elsewhere])
        assert torch.equal(dfound[..., elsewhere], dimage[..., elsewhere])
        assert not dtext.isfinite().all()
    text[0, 4, 1] = float("nan")
    found, *_ = run(image, text, grad, normalize, True, layout)
    assert found[:, 24].isnan().all()
    others = [channel for channel in range(39) if channel != 24]
    assert torch.equal(found[:, others], out[:, others])


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_vectors_without_length(layout, dtype):
    """They score 0, and their gradient is that of the division by the floor."""
    image, text, grad = make((1, 20, 5, 7, 19), dtype, False)
    image[0, :, 2, 3] = 0
    image[0, :, 4, 4] *= 0.7e-12 / image[0, :, 4, 4].float().norm()
    text[0, 5] = 0
    text[0, 7] *= 0.7e-12 / text[0, 7].float().norm()
    results = run(image, text, grad, True, False, layout)
    assert (results[0][0, :, 2, 3] == 0).all() and (results[0][0, 5] == 0).all()
    # Gradients there are 1e12 times as large as elsewhere: each kind by itself.
    truth = reference(image.double(), text.double(), grad.double(), True, False)
    of_torch = peers(image, text, grad, True, False)
    short = torch.zeros(5, 7, dtype=torch.bool)
    short[2, 3] = short[4, 4] = True
    for pixels in (short, ~short):
        assert_parity(
            results[1][..., pixels], [p[1][..., pixels] for p in of_torch], truth[1][..., pixels], gradient=True
        )
    tokens = torch.arange(19)
    short = (tokens == 5) | (tokens == 7)
    for index in (short, ~short):
        assert_parity(results[2][:, index], [p[2][:, index] for p in of_torch], truth[2][:, index], gradient=True)


@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_neither_run_nor_number_of_threads_shows(layout, dtype):
    image, text, grad = make((2, 48, 33, 29, 65), dtype, True)
    threads = torch.get_num_threads()
    expected = run(image, text, grad, True, True, layout)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(image, text, grad, True, True, layout), expected))
    finally:
        torch.set_num_threads(threads)
    image.view(-1)[0] += 0.01  # the comparison can fail
    assert not torch.equal(run(image, text, grad, True, True, layout)[0], expected[0])


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_strides_beyond_31_bits(layout, dim):
    """A view into 2^31 elements and some, of which only those of the view are ever touched."""
    memory = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)
    image, text, grad = make((2, 3, 2, 2, 3), torch.bfloat16, False)
    strides = [307, 101, 23, 7]
    strides[dim] = 2**31 // (image.shape[dim] - 1) + 1
    far_image = memory.as_strided(image.shape, strides).copy_(image)
    far_grad = memory.as_strided(grad.shape, strides, 1).copy_(grad)
    expected = run(image, text, grad, True, False, layout)
    assert all(map(torch.equal, run(far_image, text, far_grad, True, False, layout), expected))


def test_what_does_not_fit_is_refused():
    image, text, _ = make((1, 8, 3, 3, 5), torch.float32, False)
    out = torch.empty(1, 5, 3, 3)
    for arguments in (
        (image.double(), text.double(), True, False, out.double()),
        (image, text.bfloat16(), True, False, out),
        (image, text[..., :7], True, False, out),
        (image, text, True, True, out),
        (image, text, True, False, out.transpose(2, 3)),
    ):
        with pytest.raises(RuntimeError):
            kernels.score_map_fwd(*arguments)


def test_the_instruction_set_is_the_one_asked_for():
    asked = os.environ.get("FUSEKERN_CPU_CAPABILITY", "avx512")
    isas = extension.build_info()["isas"]
    assert extension.cpu_capability() in isas[: isas.index(asked) + 1]


@pytest.mark.parametrize("isa", extension.build_info()["isas"])
def test_other_instruction_sets(isa):
    run_again(__file__, isa)
