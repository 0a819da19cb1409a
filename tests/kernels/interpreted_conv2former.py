"""The launchers of conv2former, judged against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import conv2former as kernels
from layouts import lay_out
from spy import Launches, short
from torch import Tensor
from where import DEVICE, DTYPES

from fusekern.ops._kernel import empty_image
from fusekern.ops.conv2former import conv2former_reference
from fusekern.testing import assert_parity

# batch, queries, heads, channels of a head, height, width, layout of the tokens
CASES = [
    (1, 1, 1, 16, 1, 1, "nchw"),
    (2, 19, 2, 24, 5, 5, "channels_last"),
    (2, 33, 2, 50, 7, 9, "nchw"),
    (1, 64, 2, 64, 8, 8, "sliced"),
    (2, 65, 1, 128, 9, 15, "channels_last"),
    (1, 150, 4, 64, 5, 5, "channels_last"),
    (1, 161, 1, 256, 6, 11, "nchw"),
    (1, 200, 3, 20, 13, 17, "permuted"),
    (2, 847, 1, 32, 3, 3, "expanded"),
    (4, 16, 8, 1, 4, 70, "cropped"),
]
# Tokens enough for several programs to share a block of queries, in both directions.
SPLIT = [
    (1, 19, 1, 32, 30, 37, "channels_last"),
    (2, 70, 1, 16, 25, 41, "nchw"),
    (1, 5, 2, 64, 1, 1100, "sliced"),
]


def make(case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """grad, query and tokens."""
    batch, count, heads, width, height, breadth, layout = case
    grad = torch.randn(batch, count, heads * width, dtype=dtype, device=DEVICE)
    query = torch.randn(batch, count, heads * width, dtype=dtype, device=DEVICE)
    tokens = torch.randn(batch, heads * width, height, breadth, dtype=dtype, device=DEVICE)
    return grad, query, lay_out(layout, tokens)


def guarded(like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A tensor full of NaN with the strides of a dense one, and the memory before and behind it, full of 7."""
    memory = like.new_full((like.numel() + 256,), 7)
    tensor = memory[128:-128].as_strided(like.shape, like.stride()).fill_(float("nan"))
    return tensor, [memory[:128], memory[-128:]]


def run(
    grad: Tensor, query: Tensor, tokens: Tensor, heads: int, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, dquery and dtokens; the launchers write all of them and nothing else."""
    batch, count, channels = query.shape
    scale = (channels // heads) ** -0.5 if scale is None else scale
    dense = query.new_empty(query.shape)
    (out, *around), (lse, *around_lse) = guarded(dense), guarded(dense.new_empty(batch, heads, count).float())
    (dquery, *around_dquery), (dtokens, *around_dtokens) = guarded(dense), guarded(empty_image(tokens))
    before = [tensor.clone() for tensor in (grad, query, tokens)]
    kernels.conv2former_fwd(query, tokens, heads, scale, out, lse)
    kernels.conv2former_bwd(grad, query, tokens, out, lse, heads, scale, dquery, dtokens)
    for tensor, copy in zip((grad, query, tokens), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    for memory in sum(around + around_lse + around_dquery + around_dtokens, []):
        assert (memory == 7).all()
    return out, dquery, dtokens


def composition(query: Tensor, tokens: Tensor, *, heads: int, scale: float | None) -> Tensor:
    rows = tokens.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
    query = query.unflatten(2, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, rows, rows, scale=scale).transpose(1, 2).flatten(2)


def differentiated(op, grad: Tensor, query: Tensor, tokens: Tensor, heads: int, scale: float | None):
    query, tokens = query.detach().requires_grad_(), tokens.detach().requires_grad_()
    out = op(query, tokens, heads=heads, scale=scale)
    return out.detach(), *torch.autograd.grad(out, (query, tokens), grad)


def judge(grad: Tensor, query: Tensor, tokens: Tensor, heads: int, scale: float | None = None) -> None:
    results = run(grad, query, tokens, heads, scale)
    last = tokens.contiguous(memory_format=torch.channels_last)
    peers = [
        differentiated(op, grad, query, laid_out, heads, scale)
        for op in (conv2former_reference, composition)
        for laid_out in (tokens.contiguous(), last)
    ]
    exact = [tensor.double() for tensor in (grad, query, tokens)]
    truths = differentiated(conv2former_reference, *exact, heads, scale)
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        assert_parity(result, [peer[i] for peer in peers], truth, gradient=i > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch(case, dtype):
    judge(*make(case, dtype), case[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_with_split_tokens(case, dtype, monkeypatch):
    launched = []
    for name in ("conv2former_fwd_join_kernel", "conv2former_bwd_sum_kernel"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, Spy(kernel, launched))
    judge(*make(case, dtype), case[2])
    assert len(launched) == 2


class Spy:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, launched: list) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize(
    "case, dtype, of_text, forward, backward",
    [
        (CASES[5], torch.float16, "plain", "fwd", "bwd_dx"),
        (CASES[5], torch.float32, "plain", "fwd", "bwd_dq bwd_dx"),
        (CASES[2], torch.float16, "plain", "fwd", "bwd_dq bwd_dx"),
        (SPLIT[0], torch.float16, "plain", "fwd fwd_join", "bwd_dq bwd_sum bwd_dx"),
        (SPLIT[1], torch.float32, "plain", "fwd fwd_join", "bwd_dq bwd_sum bwd_dx"),
        (SPLIT[2], torch.float16, "plain", "fwd fwd_join", "bwd_dq bwd_sum bwd_dx"),
        (CASES[5], torch.float16, "permuted", "copy fwd", "copy copy bwd_dx"),
        (SPLIT[0], torch.float16, "permuted", "copy fwd fwd_join", "copy copy bwd_dq bwd_sum bwd_dx"),
    ],
    ids=str,
)
def test_launches_are_those_planned(case, dtype, of_text, forward, backward, monkeypatch):
    grad, query, tokens = make(case, dtype)
    if of_text == "permuted":
        grad, query = (tensor.mT.contiguous().mT for tensor in (grad, query))
    plan, heads = kernels.launches(query, tokens, case[2], grad), case[2]
    out, dquery, dtokens = torch.empty_like(query.contiguous()), torch.empty_like(query), empty_image(tokens)
    lse = out.new_empty((case[0], heads, case[1]), dtype=torch.float32)
    with Launches(kernels, monkeypatch) as launches:
        kernels.conv2former_fwd(query, tokens, heads, 0.2, out, lse)
        found = {"fwd": launches.taken()}
        kernels.conv2former_bwd(grad, query, tokens, out, lse, heads, 0.2, dquery, dtokens)
        found["bwd"] = launches.taken()
    assert found == plan and short("conv2former", plan) == {"fwd": forward, "bwd": backward}


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0, 2])
def test_scales(scale):
    judge(*make((2, 20, 2, 32, 5, 14, "channels_last"), torch.float32), 2, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_text(dtype):
    grad, query, tokens = make((3, 37, 2, 24, 5, 5, "channels_last"), dtype)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    judge(grad[:1, :1, :1].expand_as(grad), query, tokens, 2)
    judge(lay_out("sliced", grad), query[:1].expand_as(query), tokens, 2)


def test_large_similarities():
    """Tokens whose weight is 0 in float32 come first, then those that count: the maximum starts far below."""
    grad, query, tokens = make((1, 18, 1, 16, 2, 70, "nchw"), torch.float32)
    query, tokens = query.abs(), tokens.abs()
    tokens[:, :, 0] = -1e20
    query[:, 3] = 1e20
    out, dquery, dtokens = run(grad, query, tokens, 1)
    truth = differentiated(conv2former_reference, grad.double(), query.double(), tokens.double(), 1, None)
    rows = [row for row in range(18) if row != 3]
    torch.testing.assert_close(out.double()[:, rows], truth[0][:, rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dquery.double()[:, rows], truth[1][:, rows], rtol=1e-4, atol=1e-5)
    # One token has all the weight.
    torch.testing.assert_close(out.double()[:, 3], truth[0][:, 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 5), (9, 20)])
@pytest.mark.parametrize("where", range(3), ids=["grad", "query", "tokens"])
def test_nan_stays_in_its_head(where, size, dtype):
    inputs = make((2, 21, 3, 32, *size, "channels_last"), dtype)
    clean = run(*inputs, 3)
    inputs[where][(0, 4, 40) if where < 2 else (0, 40, 2, 3)] = float("nan")
    results = run(*inputs, 3)
    truths = differentiated(conv2former_reference, *(tensor.double() for tensor in inputs), 3, None)
    for result, before, truth in zip(results, clean, truths, strict=True):
        assert torch.equal(result.isnan(), truth.isnan())
        assert torch.equal(result[~truth.isnan()], before[~truth.isnan()])
    assert [bool(truth.isnan().any()) for truth in truths] == [where > 0, True, True]


@pytest.mark.parametrize("case", [CASES[4], SPLIT[0]], ids=str)
def test_same_bits_again(case):
    inputs = make(case, DTYPES[-1])
    first, second = run(*inputs, case[2]), run(*inputs, case[2])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    # The comparison can fail: a change of a single input shows.
    inputs[2][0, 0, 0, 0] += 0.25
    assert not any(torch.equal(one, other) for one, other in zip(first, run(*inputs, case[2]), strict=True))


def test_more_than_int32_elements():
    """Batch and channels further apart than 2**31 elements."""
    far = 2**31 + 64
    memory = torch.empty(far + 32 * 40, dtype=torch.float16, device=DEVICE)
    tokens = memory.as_strided((2, 16, 5, 8), (far, 40, 8, 1)).copy_(torch.randn(2, 16, 5, 8))
    grad, query, _ = make((2, 17, 1, 16, 1, 1, "nchw"), torch.float16)
    assert_same(run(grad, query, tokens, 1), run(grad, query, tokens.clone(), 1))
    tokens = memory.as_strided((1, 2, 5, 8), (1, far, 8, 1)).copy_(tokens[:1, :2])
    assert_same(
        run(grad[:1, :, :2], query[:1, :, :2], tokens, 1), run(grad[:1, :, :2], query[:1, :, :2], tokens.clone(), 1)
    )


def assert_same(results, others) -> None:
    for one, other in zip(results, others, strict=True):
        assert torch.equal(one, other)


def test_settings():
    """Every width of a head has a setting, of tiles that the tensor cores take."""
    for kind in ("half", "tf32", "ieee", "odd half", "odd fp32"):
        for width in range(1, 257):
            for tile in kernels.SETTINGS[kind, kernels.padded_width(width)]:
                assert tile.queries >= 16 and tile.tokens >= 16
    image = torch.empty(2, 96, 5, 5, dtype=torch.float16, device=DEVICE)
    last = image.to(memory_format=torch.channels_last)
    assert kernels.kind_of(last, 32) == "half" and kernels.kind_of(last, 24) == "odd half"
    assert kernels.kind_of(image, 32) == "odd half" and kernels.kind_of(image[..., :4, :4].contiguous(), 32) == "half"
    assert kernels.kind_of(last[..., 1:], 32) == "odd half"


def test_run_length():
    assert kernels.run_length(24, 3) == 3
    assert kernels.run_length(24, 28) == 6
    assert kernels.run_length(200, 28) == 28
