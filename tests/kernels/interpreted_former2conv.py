"""Former2Conv's launchers against the reference, see ``test_interpreter.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import former2conv as kernels
from fusekern.kernels.former2conv import former2conv_bwd, former2conv_fwd, layout_of
from spy import Launches, short
from where import DEVICE, DTYPES

from fusekern.ops._kernel import empty_image, empty_tokens
from fusekern.ops.former2conv import former2conv_reference
from fusekern.testing import assert_parity

NAMES = ("out", "dimage", "dkey", "dvalue")


def make(batch, heads, width, height, breadth, tokens, dtype=torch.float32):
    """Image, key, value and the gradient, contiguous."""
    torch.manual_seed(0)
    image, text = (batch, heads * width, height, breadth), (batch, tokens, heads * width)
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in (image, text, text, image)]


def in_layout(tensor, layout):
    """The values of a tensor in memory as ``layout`` says."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        larger = torch.full([size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
        inner = larger[tuple(slice(1, size + 1) for size in tensor.shape)]
        return inner.copy_(tensor)
    if layout == "expanded":
        return tensor[:1, ..., :1].expand(tensor.shape)
    return tensor


def launch(image, key, value, grad, heads, scale, layout=None):
    """Output and gradients of the launchers, in memory that was NaN."""
    layout = layout or ("channels_last" if image.stride(1) == 1 else "contiguous")
    out, dimage = (in_layout(torch.full(image.shape, float("nan")).to(image), layout) for _ in range(2))
    dkey, dvalue = (torch.full(key.shape, float("nan"), dtype=key.dtype, device=key.device) for _ in range(2))
    former2conv_fwd(image, key, value, heads, scale, out)
    former2conv_bwd(grad, image, key, value, heads, scale, dimage, dkey, dvalue)
    return out, dimage, dkey, dvalue


def reference(image, key, value, grad, heads, scale, function=former2conv_reference):
    leaves = [tensor.detach().requires_grad_() for tensor in (image, key, value)]
    out = function(*leaves, heads=heads, scale=scale)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def with_sdpa(image, key, value, *, heads, scale):
    q = image.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = (tokens.unflatten(2, (heads, -1)).transpose(1, 2) for tokens in (key, value))
    gathered = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return image + gathered.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, image.shape[2:])


def check(image, key, value, grad, heads, scale, sdpa=True, layout=None):
    """The launchers' results, all of them right."""
    results = launch(image, key, value, grad, heads, scale, layout)
    truth = reference(*(tensor.double() for tensor in (image, key, value, grad)), heads, scale)
    last = (
        image.contiguous(memory_format=torch.channels_last),
        key,
        value,
        grad.contiguous(memory_format=torch.channels_last),
    )
    plain = image.contiguous(), key, value, grad.contiguous()
    peers = [reference(*inputs, heads, scale) for inputs in (plain, last)]
    if sdpa:
        peers += [reference(*inputs, heads, scale, function=with_sdpa) for inputs in (plain, last)]
    for i, name in enumerate(NAMES):
        try:
            assert_parity(results[i], [peer[i] for peer in peers], truth[i], gradient=i > 0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return results


# batch, heads, width, height, breadth, tokens: each kernel in each block of tokens, last tiles that are not full.
SHAPES = [
    (2, 2, 32, 5, 16, 19),
    (1, 1, 16, 9, 16, 1),
    (1, 2, 64, 5, 16, 33),
    (2, 1, 64, 9, 16, 64),
    (1, 1, 64, 9, 16, 65),
    (1, 1, 64, 9, 16, 150),
    (1, 2, 32, 5, 16, 161),
    (2, 1, 64, 5, 16, 200),
    (1, 1, 128, 5, 16, 19),
    (1, 1, 128, 5, 16, 65),
    (1, 1, 128, 5, 16, 150),
    (1, 2, 24, 3, 16, 40),
    (1, 1, 256, 3, 16, 33),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_last(shape, dtype):
    inputs = [in_layout(tensor, "channels_last") for tensor in make(*shape, dtype)]
    assert layout_of(inputs[0], shape[1]) == "channels_last"
    check(*inputs, shape[1], shape[2] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_nchw(shape, dtype):
    inputs = make(*shape, dtype)
    assert layout_of(inputs[0], shape[1]) == "nchw"
    check(*inputs, shape[1], shape[2] ** -0.5)


@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("shape", [(2, 2, 32, 5, 7, 19), (2, 1, 64, 3, 16, 65)], ids=str)
def test_any_strides(shape, layout):
    inputs = [in_layout(tensor, layout) for tensor in make(*shape, torch.float16)]
    assert layout_of(inputs[0], shape[1]) == "strided"
    check(*inputs, shape[1], 0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1, 1, 1, 1), (1, 2, 7, 5, 3, 11), (1, 1, 40, 1, 9, 161), (3, 2, 17, 6, 1, 5), (1, 1, 250, 2, 3, 20)],
    ids=str,
)
def test_odd_sizes(shape, dtype):
    check(*make(*shape, dtype), shape[1], 0.3)


def test_each_tensor_has_its_own_layout():
    image, key, value, grad = make(2, 2, 32, 5, 16, 70, torch.float16)
    last = in_layout(image, "channels_last")
    check(last, in_layout(key, "permuted"), in_layout(value, "sliced"), grad, 2, 0.2)
    check(image, in_layout(key, "expanded"), value, in_layout(grad, "expanded"), 2, 0.2)
    wide = torch.cat([last, last], dim=1)[:, 64:]
    assert layout_of(wide, 2) == "channels_last"
    check(wide, key[:1].expand(2, -1, -1), value, in_layout(grad, "channels_last"), 2, 0.2)
    check(last, key, value, grad, 2, 0.2, layout="contiguous")
    check(image, key, value, grad, 2, 0.2, layout="channels_last")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("shape", [(1, 1, 64, 5, 16, 19), (1, 1, 64, 5, 16, 64), (1, 1, 64, 5, 16, 161)], ids=str)
def test_both_precisions_of_fp32(shape, precision):
    """The interpreter computes either exactly, so there this is about the settings."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        check(*make(*shape), shape[1], 0.125)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("tokens", [20, 140, 200])
def test_scales(scale, tokens):
    check(*make(1, 1, 64, 5, 16, tokens, torch.float16), 1, scale)


@pytest.mark.parametrize("tokens", [19, 150, 200])
def test_a_pixel_that_is_not_finite_spoils_its_own_row(tokens):
    clean = make(1, 2, 64, 5, 16, tokens, torch.float16)
    wanted = launch(*clean, 2, 0.125)
    for number, bad in enumerate((float("nan"), float("inf"))):
        image, *rest = (tensor.clone() for tensor in clean)
        image[0, 64 + 3, 2, 5 + number] = bad
        found = check(image, *rest, 2, 0.125, sdpa=False)
        for name, result, right in zip(NAMES, found, wanted, strict=True):
            spoilt = torch.zeros_like(result, dtype=torch.bool)
            if result.dim() == 4:
                spoilt[0, 64:, 2, 5 + number] = True
            else:
                spoilt[..., 64:] = True
            assert torch.equal(result[~spoilt], right[~spoilt]), name
            assert name == "dvalue" or not result[spoilt].isfinite().any(), name


@pytest.mark.parametrize("tokens", [19, 150, 200])
def test_a_token_that_is_never_looked_at_may_be_infinite(tokens):
    """Its similarities are -inf: nothing of it is in the output or in the other tokens' gradients."""
    image, key, value, grad = make(1, 1, 64, 5, 16, tokens, torch.float16)
    image[:, 3] = image[:, 3].abs() + 0.1
    key[:, : tokens // 2, 3] = float("-inf")
    out, dimage, dkey, dvalue = check(image, key, value, grad, 1, 0.125, sdpa=False)
    assert out.isfinite().all() and dkey.isfinite().all() and dvalue.isfinite().all()
    assert not dimage[:, 3].isfinite().any() and dimage[:, 4:].isfinite().all()


@pytest.mark.parametrize("tokens", [19, 70, 200])
def test_equal_bits_in_two_runs(tokens, monkeypatch):
    image, key, value, grad = make(1, 1, 64, 8, 16, tokens, torch.float16)
    # The tokens' gradients are zero but for rounding, which shows the order of summation: above what fp16 can hold.
    inputs = torch.cat([image, image], 2), key, value, torch.cat([256 * grad, -256 * grad], 2)
    first, second = (launch(*inputs, 1, 0.125) for _ in range(2))
    for name, one, other in zip(NAMES, first, second, strict=True):
        assert torch.equal(one, other), name
    # The check can fail.
    monkeypatch.setattr(kernels, "programs_of", lambda tiles, rows, slots: 3)
    _, dimage, dkey, dvalue = launch(*inputs, 1, 0.125)
    assert torch.equal(dimage, first[1]) and not torch.equal(dkey, first[2]) and not torch.equal(dvalue, first[3])


def test_more_programs_than_are_summed_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "programs_of", lambda tiles, rows, slots: tiles)
    monkeypatch.setattr(kernels, "SUM_PROGRAMS", 4)
    check(*make(1, 1, 16, 22, 16, 19, torch.float16), 1, 0.25)


def test_offsets_beyond_32_bits():
    """Images, and the channels of an image, far apart in a storage of which only their own pages are ever touched."""
    image, key, value, grad = make(2, 1, 16, 4, 8, 20, torch.float16)
    for strides in ((2**31, 32, 8, 1), (512, 2**31 // 15 + 16, 8, 1)):
        far = torch.empty(2**31 + 2**12, dtype=torch.float16, device=DEVICE).as_strided(image.shape, strides, 0)
        check(far.copy_(image), key, value, grad, 1, 0.25)


@pytest.mark.parametrize(
    "tokens, layout, processors, forward, backward",
    [
        (19, "channels_last", 132, "fwd", "bwd bwd_sum"),
        (19, "contiguous", 1, "fwd", "bwd bwd_sum"),
        (19, "channels_last", 0, "fwd", "bwd"),
        (150, "channels_last", 132, "fwd", "bwd_dx bwd_dkv bwd_sum"),
        (150, "contiguous", 0, "fwd", "bwd_dx bwd_dkv"),
        (200, "channels_last", 132, "fwd_online", "bwd_dx_online bwd_dkv bwd_sum"),
        (200, "channels_last", 0, "fwd_online", "bwd_dx_online bwd_dkv"),
        (19, "sliced", 132, "copy copy fwd_online", "copy copy bwd_dx_online bwd_dkv bwd_sum"),
        (19, "permuted", 0, "copy copy fwd_online", "copy copy bwd_dx_online bwd_dkv"),
    ],
)
def test_launches_are_those_planned(tokens, layout, processors, forward, backward, monkeypatch):
    device = 90, processors  # with none of them a row has one program
    monkeypatch.setattr(kernels, "_device", lambda _: device)
    image, key, value, grad = (in_layout(t, layout) for t in make(2, 1, 64, 9, 16, tokens, torch.float16))
    plan = kernels.launches(image, key, value, 1, grad)
    out, dimage, dkey, dvalue = empty_image(image), empty_image(image), empty_tokens(key), empty_tokens(value)
    with Launches(kernels, monkeypatch) as launches:
        former2conv_fwd(image, key, value, 1, 0.2, out)
        found = {"fwd": launches.taken()}
        former2conv_bwd(grad, image, key, value, 1, 0.2, dimage, dkey, dvalue)
        found["bwd"] = launches.taken()
    assert found == plan and short("former2conv", plan) == {"fwd": forward, "bwd": backward}
    # The device can be given: then the tensors may be anywhere, if they are aligned.
    if layout in ("channels_last", "contiguous"):
        monkeypatch.setattr(kernels, "_device", lambda _: (80, 7))
        image, key, value, grad = (tensor.to("meta") for tensor in (image, key, value, grad))
        assert kernels.launches(image, key, value, 1, grad, device) == plan


def test_the_layout_that_is_chosen():
    """Vectors of 16 bytes must be possible, and offsets within a tile of 32 bits."""

    def empty(*shape, last=False):
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=torch.float16, device="meta", memory_format=layout)

    assert layout_of(empty(2, 64, 5, 7, last=True), 2) == "channels_last"
    assert layout_of(empty(2, 64, 1, 1), 2) == "channels_last"
    assert layout_of(empty(2, 64, 4, 8), 2) == "nchw"
    assert layout_of(empty(2, 64, 5, 7), 2) == "strided"
    assert layout_of(empty(2, 40, 4, 8, last=True), 2) == "strided"
    assert layout_of(empty(2, 96, 4, 8, last=True), 8) == "strided"
    assert layout_of(empty(2, 64, 4, 8, last=True)[:, :, :, 1:], 2) == "strided"
    assert layout_of(empty(2, 64, 4, 8, last=True)[:, :, 1:], 2) == "channels_last"
    assert layout_of(empty(2, 64, 4, 8, last=True)[:, :48], 2) == "channels_last"
    assert layout_of(empty(1, 128, 4096, 4096), 2) == "nchw"
    assert layout_of(empty(1, 128, 4096, 4096), 1) == "strided"
