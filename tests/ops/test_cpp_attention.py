"""The C++ kernels of former2conv and conv2former themselves, below what their ops check, allocate and choose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from walls import channels_last, empty, walls_stand

from fusekern.extensions import load
from fusekern.ops.conv2former import conv2former_reference
from fusekern.ops.former2conv import former2conv_reference
from fusekern.testing import assert_parity

if load("_C"):
    pytest.skip(f"the C++ module is not there: {load('_C')}", allow_module_level=True)

import fusekern._C as extension

kernels = torch.ops.fusekern_cpp
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# batch, channels, heads, height, width, tokens: every K, every d, heights and widths around the sizes of a block.
SHAPES = [
    (1, 8, 1, 1, 1, 1),  # d = 8
    (2, 24, 3, 5, 13, 19),
    (2, 10, 2, 3, 3, 2),  # d = 5, odd
    (1, 32, 2, 9, 31, 65),  # d = 16
    (1, 48, 2, 16, 16, 19),  # d = 24
    (2, 64, 2, 8, 9, 150),  # d = 32
    (1, 128, 2, 21, 23, 19),  # d = 64
    (1, 64, 1, 7, 11, 847),
    (2, 192, 2, 5, 5, 200),  # d = 96
    (1, 128, 1, 20, 3, 65),  # d = 128
    (1, 256, 1, 13, 6, 150),  # d = 256
    (1, 7, 7, 6, 6, 3),  # d = 1
]


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are small: more threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shape_id(shape):
    batch, channels, heads, height, width, count = shape
    return f"B{batch}-{heads}x{channels // heads}-{height}x{width}-K{count}"


def empty_like(tensor: Tensor, layout: str = "NCHW") -> Tensor:
    return empty(tensor.shape, tensor.dtype, layout)


class Former2conv:
    """``run`` gives the output and the gradients of image, key and value."""

    @staticmethod
    def inputs(shape, dtype):
        batch, channels, _, height, width, count = shape
        image, grad = torch.randn(2, batch, channels, height, width).to(dtype)
        key, value = torch.randn(2, batch, count, channels).to(dtype)
        return image, key, value, grad

    @staticmethod
    def run(image, key, value, grad, heads, scale, layout="NCHW"):
        out, dimage = empty_like(image, layout), empty_like(image, layout)
        dkey, dvalue = empty_like(key), empty_like(value)
        kernels.former2conv_fwd(image, key, value, heads, scale, out)
        kernels.former2conv_bwd(grad, image, key, value, heads, scale, dimage, dkey, dvalue)
        assert all(map(walls_stand, (out, dimage, dkey, dvalue)))
        return out, dimage, dkey, dvalue

    @staticmethod
    def reference(image, key, value, heads, scale):
        return former2conv_reference(image, key, value, heads=heads, scale=scale)

    @staticmethod
    def sdpa(image, key, value, heads, scale):
        q = image.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
        k, v = (tokens.unflatten(2, (heads, -1)).transpose(1, 2) for tokens in (key, value))
        gathered = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        return image + gathered.transpose(1, 2).unflatten(2, image.shape[2:])


class Conv2former:
    """``run`` gives the output and the gradients of query and tokens."""

    @staticmethod
    def inputs(shape, dtype):
        batch, channels, _, height, width, count = shape
        query, grad = torch.randn(2, batch, count, channels).to(dtype)
        return query, torch.randn(batch, channels, height, width).to(dtype), grad

    @staticmethod
    def run(query, tokens, grad, heads, scale, layout="NCHW"):
        out, dquery, dtokens = empty_like(query), empty_like(query), empty_like(tokens, layout)
        lse = torch.full((query.shape[0], heads, query.shape[1]), float("nan"))
        kernels.conv2former_fwd(query, tokens, heads, scale, out, lse)
        kernels.conv2former_bwd(grad, query, tokens, out, lse, heads, scale, dquery, dtokens)
        assert all(map(walls_stand, (out, dquery, dtokens)))
        return out, dquery, dtokens

    @staticmethod
    def reference(query, tokens, heads, scale):
        return conv2former_reference(query, tokens, heads=heads, scale=scale)

    @staticmethod
    def sdpa(query, tokens, heads, scale):
        q = query.unflatten(2, (heads, -1)).transpose(1, 2)
        x = tokens.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, x, x, scale=scale).transpose(1, 2).flatten(2)


every_op = pytest.mark.parametrize("op", [Former2conv, Conv2former], ids=["former2conv", "conv2former"])


def with_gradients(function, inputs, grad, heads, scale):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves, heads, scale)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_all_parity(op, results, inputs, grad, heads, scale):
    truth = with_gradients(op.reference, [t.double() for t in inputs], grad.double(), heads, scale)
    peers = []
    for lay_out in (Tensor.contiguous, lambda t: channels_last(t) if t.dim() == 4 else t):
        for function in (op.reference, op.sdpa):
            peers.append(with_gradients(function, [lay_out(t) for t in inputs], grad, heads, scale))
    for i, result in enumerate(results):
        assert_parity(result, [peer[i] for peer in peers], truth[i], gradient=i > 0)


@every_op
@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_parity(op, dtype, layout, shape):
    *inputs, grad = op.inputs(shape, dtype)
    heads, scale = shape[2], (shape[1] // shape[2]) ** -0.5
    laid_out = [channels_last(t) if layout == "channels_last" and t.dim() == 4 else t for t in (*inputs, grad)]
    results = op.run(*laid_out, heads, scale, layout)
    assert_all_parity(op, results, inputs, grad, heads, scale)


@every_op
@every_dtype
@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0])
def test_parity_of_other_scales(op, dtype, scale):
    *inputs, grad = op.inputs((1, 32, 2, 5, 14, 19), dtype)
    assert_all_parity(op, op.run(*inputs, grad, 2, scale), inputs, grad, 2, scale)


@every_op
@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("strides", ["permuted", "sliced", "expanded"])
@pytest.mark.parametrize("width", [5, 32])
def test_strides_do_not_matter(op, dtype, layout, strides, width, lay_out):
    """One tensor after the other in other strides than the rest: the same bits, for outputs of either layout."""
    tensors = op.inputs((2, 3 * width, 3, 6, 13, 20), dtype)
    if strides == "expanded":
        tensors = [tensor[:1].expand_as(tensor) for tensor in tensors]
    plain = [tensor.contiguous() for tensor in tensors]
    expected = op.run(*plain, 3, 0.3, layout)
    for i in range(len(tensors)):
        mixed = [lay_out(strides, t) if j == i else t for j, t in enumerate(plain)]
        for result, other in zip(op.run(*mixed, 3, 0.3, layout), expected, strict=True):
            assert torch.equal(result, other)


@every_op
def test_pixels_with_gaps(op):
    """Every other row, column and channel, of both layouts."""
    shape = (1, 32, 1, 12, 44, 7)
    for lay_out in (Tensor.contiguous, channels_last):
        tensors = [
            lay_out(t)[:, :, ::2, ::2] if t.dim() == 4 else t[:, :, ::2] for t in op.inputs(shape, torch.float32)
        ]
        tensors = [t[:, ::2] if t.dim() == 4 else t for t in tensors]
        *inputs, grad = tensors
        assert_all_parity(op, op.run(*tensors, 2, 0.25), [t.contiguous() for t in inputs], grad.contiguous(), 2, 0.25)


@every_op
@every_dtype
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_input_spreads_as_in_the_reference(op, dtype, layout, value):
    """One bad number in each input in turn: what it spoils is what it spoils in the reference."""
    tensors = op.inputs((2, 48, 2, 5, 15, 20), dtype)
    tensors = [channels_last(t) if layout == "channels_last" and t.dim() == 4 else t for t in tensors]
    for i in range(len(tensors)):
        mixed = [t.clone() for t in tensors]
        mixed[i][1, 3, 2] = value
        *inputs, grad = mixed
        results = op.run(*mixed, 2, 0.2, layout)
        expected = with_gradients(op.reference, [t.double() for t in inputs], grad.double(), 2, 0.2)
        for result, truth in zip(results, expected, strict=True):
            assert truth.isfinite().any()
            assert torch.equal(result.isfinite(), truth.isfinite())


@every_op
@every_dtype
def test_threads_do_not_matter(op, dtype):
    tensors = op.inputs((2, 128, 2, 24, 40, 100), dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(op.run(*tensors, 2, 0.1))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_parity_of_every_instruction_set(name):
    found = extension.cpu_capability()
    order = ["baseline", "avx2", "avx512"]
    if order.index(name) >= order.index(found):
        pytest.skip(f"the other tests run {found}" if name == found else f"this CPU has {found} at most")
    environment = {**os.environ, "FUSEKERN_CPU_CAPABILITY": name, "EXPECTED_CAPABILITY": name}
    tests = f"{__file__}::test_parity", f"{__file__}::test_strides_do_not_matter", f"{__file__}::test_capability"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_capability():
    """Guards the test above: the environment variable reaches the kernels."""
    assert extension.cpu_capability() == os.environ.get("EXPECTED_CAPABILITY", extension.cpu_capability())


def test_what_would_go_out_of_bounds_is_refused():
    image, key = torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 4)
    out = torch.empty(1, 4, 2, 2)
    for arguments in (
        (image, key[:, :, :3], key, 2, 1.0, out),
        (image, key, key[:, :2], 2, 1.0, out),
        (image, key, key, 3, 1.0, out),
        (image, key, key, 2, 1.0, out[:, :, :1]),
        (image, key, key, 2, 1.0, out.double()),
        (image.half(), key.half(), key.half(), 2, 1.0, out.half()),
    ):
        with pytest.raises(RuntimeError):
            kernels.former2conv_fwd(*arguments)
