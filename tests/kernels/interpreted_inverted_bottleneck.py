"""The Triton stages of inverted_bottleneck, judged against float64, each by itself."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from bottleneck_block import (
    CASES,
    CL,
    NCHW,
    ODD,
    Block,
    affine,
    assert_guarded,
    assert_stats,
    assert_sums,
    by_gram,
    exact,
    guarded,
    judge_expand_bwd,
    norm_gradient,
    pointwise,
    rows,
)
from fusekern.kernels import inverted_bottleneck as kernels
from fusekern.kernels import inverted_bottleneck_places as places
from layouts import lay_out
from torch import Tensor
from where import DEVICE, DTYPES

from fusekern.testing import assert_parity


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
    for run, same, row, apart in ((forward, 1, 1, kernels.batch_norm.join), (backward, 2, 0, kernels.batch_norm.add)):
        left = new_left()
        found = run(left)
        assert not apart.called
        expected = run(None)
        assert apart.call_count == 1
        assert all(torch.equal(one, other) for one, other in zip(found[:same], expected[:same], strict=True))
        for one, other in zip(found[same:], expected[same:], strict=True):
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
