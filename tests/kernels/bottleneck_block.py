"""Random blocks for the launchers of inverted_bottleneck, and how their stages are judged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import inverted_bottleneck as kernels
from fusekern.kernels import inverted_bottleneck_places as places
from layouts import lay_out
from torch import Tensor
from where import DEVICE

from fusekern.testing import assert_parity

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
