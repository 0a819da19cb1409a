"""Conv2Former: ``out = softmax(scale Q X^T) X`` per head, forward and backward.

X are the tokens of the image, keys and values at once: a tile of them is loaded once for both products. The forward
walks over the tiles with a running maximum. Few queries and many tokens are too few programs for a GPU: then several
share a block of queries, and a second kernel joins what they found. The backward has two kernels, one with a block of
queries and a loop over the tokens for dQ, one with a tile of tokens and a loop over the queries, which adds the
gradients as key and as value in one accumulator. Where one tile has all tokens the latter does it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from fusekern.kernels.aot import Case
from fusekern.kernels.conv2former_bwd import (
    conv2former_bwd_dq_kernel,
    conv2former_bwd_dx_kernel,
    conv2former_bwd_sum_kernel,
)
from fusekern.kernels.conv2former_fwd import conv2former_fwd_join_kernel, conv2former_fwd_kernel
from fusekern.kernels.launching import cdiv, next_power_of_2, on_device_of, precision_of
from torch import Tensor
from triton.runtime.jit import JITFunction


class Tile(NamedTuple):
    """Launch setting: queries and tokens of a tile, warps of a program, stages of the loop's pipeline."""

    queries: int
    tokens: int
    warps: int
    stages: int


class Setting(NamedTuple):
    """Of the three kernels with products in them."""

    fwd: Tile
    dq: Tile
    dx: Tile


# By the products' kind and the padded width of a head. The first side of a product fills the tensor cores of sm_90 from
# 64 on: queries in fwd and dq, tokens in dx. "ieee" is fp32 without tf32, which has no tensor cores and its operands in
# registers; "odd" are tokens without accesses of 16 bytes, of which every element has an address in a register.
SETTINGS = {
    ("half", 16): Setting(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    ("half", 32): Setting(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    ("half", 64): Setting(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    ("half", 128): Setting(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)),
    ("half", 256): Setting(Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("tf32", 16): Setting(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    ("tf32", 32): Setting(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    ("tf32", 64): Setting(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    ("tf32", 128): Setting(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("tf32", 256): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2)),
    ("ieee", 16): Setting(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ieee", 32): Setting(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ieee", 64): Setting(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ieee", 128): Setting(Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)),
    ("ieee", 256): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2)),
    ("odd half", 16): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 32): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 64): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 128): Setting(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd half", 256): Setting(Tile(32, 16, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("odd fp32", 16): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 32): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 64): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 128): Setting(Tile(16, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("odd fp32", 256): Setting(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# A split costs another kernel, which takes as long as a few tiles.
MIN_RUN = 4
# Queries of a program that joins splits, elements of one that adds them.
JOIN_QUERIES, SUM_ELEMENTS = 16, 512


def padded_width(width: int) -> int:
    """Of a head, as a tile has it."""
    return max(16, next_power_of_2(width))


def run_length(programs: int, tiles: int) -> int:
    """How many of its tiles a program walks over: all, if there are programs enough."""
    splits = max(1, min(PROGRAMS // programs, tiles // MIN_RUN))
    return cdiv(tiles, splits)


def _layout(tokens: Tensor) -> tuple[str, tuple[int, int, int, int]]:
    """The layout's name and the strides as ``token_offsets`` has them."""
    _, _, h, w = tokens.shape
    s_b, s_c, s_h, s_w = tokens.stride()
    s_n = s_h if w == 1 else s_w
    if h == 1 or s_h == w * s_n:
        if s_c == 1:
            return "channels_last", (s_b, s_c, s_h, s_n)
        if s_n == 1:
            return "nchw", (s_b, s_c, s_h, s_n)
    return "strided", (s_b, s_c, s_h, s_w)


def kind_of(tokens: Tensor, width: int) -> str:
    """Which products the launch settings are for, with heads of ``width`` channels."""
    layout, (_, s_c, _, s_w) = _layout(tokens)
    odd = {"channels_last": s_w, "nchw": s_c, "strided": 1}[layout] % 16 > 0 or width % 16 > 0
    if tokens.dtype == torch.float32:
        return "odd fp32" if odd else precision_of(tokens.dtype)
    return "odd half" if odd else "half"


def _copied(tensor: Tensor) -> bool:
    return tensor.stride(2) != 1 and not tensor.is_contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """``[B, K, C]`` with the channels of a token side by side; what is as small as text may be copied."""
    return tensor.contiguous() if _copied(tensor) else tensor


def _shares(query: Tensor, tokens: Tensor, heads: int, tile: Tile) -> tuple[int, int, int]:
    """Blocks of queries, tiles that a program walks over, and programs that share a block."""
    blocks = cdiv(query.shape[1], tile.queries)
    tiles = cdiv(tokens.shape[2] * tokens.shape[3], tile.tokens)
    run = run_length(query.shape[0] * heads * blocks, tiles)
    return blocks, run, cdiv(tiles, run)


def _alone(tiles: int, kind: str) -> bool:
    """Does one kernel do the whole backward? For the other kinds a fifth product is too much for the registers."""
    return tiles == 1 and kind == "half"


def launches(query: Tensor, tokens: Tensor, heads: int, grad: Tensor) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and a ``"copy"`` where PyTorch makes one.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result.
    """
    width = tokens.shape[1] // heads
    kind = kind_of(tokens, width)
    setting = SETTINGS[kind, padded_width(width)]
    tiles = cdiv(tokens.shape[2] * tokens.shape[3], setting.dx.tokens)
    fwd = [*["copy"] * _copied(query), "conv2former_fwd_kernel"]
    if _shares(query, tokens, heads, setting.fwd)[2] > 1:
        fwd.append("conv2former_fwd_join_kernel")
    bwd = ["copy"] * (_copied(grad) + _copied(query))
    if not _alone(tiles, kind):
        bwd.append("conv2former_bwd_dq_kernel")
        if _shares(query, tokens, heads, setting.dq)[2] > 1:
            bwd.append("conv2former_bwd_sum_kernel")
    return {"fwd": tuple(fwd), "bwd": (*bwd, "conv2former_bwd_dx_kernel")}


def conv2former_fwd(query: Tensor, tokens: Tensor, heads: int, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` ``[B, K, C]`` and ``lse`` ``[B, heads, K]`` fp32, which the backward needs."""
    batch, count, channels = query.shape
    size, width = tokens.shape[2] * tokens.shape[3], channels // heads
    layout, strides = _layout(tokens)
    kind = kind_of(tokens, width)
    tile = SETTINGS[kind, padded_width(width)].fwd
    blocks, run, splits = _shares(query, tokens, heads, tile)
    head = {"D": width, "BD": padded_width(width)}
    with on_device_of(tokens):
        query = _rows(query)
        result, mass, peak = out, lse, lse
        if splits > 1:
            result = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
            mass, peak = torch.empty((2, splits, *lse.shape), dtype=torch.float32, device=out.device)
        conv2former_fwd_kernel[(batch * splits * blocks * heads,)](
            *(query, tokens, result, mass, peak, scale),
            *(batch, size, tokens.shape[3], count, heads, blocks, splits, run),
            *(*query.stride()[:2], *strides, *result.stride()[-3:-1]),
            **head,
            BQ=tile.queries,
            BN=tile.tokens,
            LAYOUT=layout,
            SPLIT=splits > 1,
            PRECISION=precision_of(tokens.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if splits > 1:
            blocks = cdiv(count, JOIN_QUERIES)
            conv2former_fwd_join_kernel[(batch * blocks * heads,)](
                *(result, mass, peak, out, lse, batch, count, heads, blocks, splits),
                *(*result.stride()[-3:-1], *out.stride()[:2]),
                **head,
                BQ=JOIN_QUERIES,
                num_warps=4,
            )


def conv2former_bwd(
    grad: Tensor,
    query: Tensor,
    tokens: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    scale: float,
    dquery: Tensor,
    dtokens: Tensor,
) -> None:
    """Fills ``dquery`` ``[B, K, C]`` and ``dtokens`` ``[B, C, h, w]``."""
    batch, count, channels = query.shape
    size, width = tokens.shape[2] * tokens.shape[3], channels // heads
    layout, strides = _layout(tokens)
    layout_out, (s_yb, s_yc, _, s_yw) = _layout(dtokens)
    kind = kind_of(tokens, width)
    setting = SETTINGS[kind, padded_width(width)]
    tiles = cdiv(size, setting.dx.tokens)
    shared = {
        "D": width,
        "BD": padded_width(width),
        "LAYOUT": layout,
        "PRECISION": precision_of(tokens.dtype),
    }
    with on_device_of(tokens):
        grad, query, out = _rows(grad), _rows(query), _rows(out)
        alone = _alone(tiles, kind)
        delta = lse if alone else torch.empty_like(lse)
        inputs = (*grad.stride()[:2], *query.stride()[:2], *strides, *out.stride()[:2])
        if not alone:
            _bwd_dq(grad, query, tokens, out, lse, delta, heads, scale, dquery, inputs, setting.dq, shared)
        conv2former_bwd_dx_kernel[(batch * tiles * heads,)](
            *(grad, query, tokens, out, lse, delta, dquery, dtokens, scale),
            *(size, tokens.shape[3], count, heads, tiles),
            *(*inputs, *dquery.stride()[:2], s_yb, s_yc, s_yw),
            **shared,
            BQ=setting.dx.queries,
            BN=setting.dx.tokens,
            LAYOUT_OUT=layout_out,
            ALONE=alone,
            num_warps=setting.dx.warps,
            num_stages=setting.dx.stages,
        )


def _bwd_dq(grad, query, tokens, out, lse, delta, heads, scale, dquery, strides, tile, shared) -> None:
    batch, count, _ = query.shape
    size = tokens.shape[2] * tokens.shape[3]
    blocks, run, splits = _shares(query, tokens, heads, tile)
    result = dquery
    if splits > 1:
        result = torch.empty((splits, *dquery.shape), dtype=torch.float32, device=dquery.device)
    conv2former_bwd_dq_kernel[(batch * splits * blocks * heads,)](
        *(grad, query, tokens, out, lse, delta, result, scale),
        *(batch, size, tokens.shape[3], count, heads, blocks, splits, run),
        *(*strides, *result.stride()[-3:-1]),
        **shared,
        BQ=tile.queries,
        BN=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        grid = (cdiv(dquery.numel(), SUM_ELEMENTS),)
        conv2former_bwd_sum_kernel[grid](result, dquery, dquery.numel(), splits, BS=SUM_ELEMENTS, num_warps=4)


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, width), setting in SETTINGS.items():
        if kind in ("tf32", "ieee"):
            yield from _cases(kind, "fp32", width, setting, PRECISION=kind)
        elif kind == "half":
            join, alone = Tile(JOIN_QUERIES, 0, 4, 3), {"ALONE": True}
            yield from _cases(kind, "bf16", width, setting)
            yield _case("fwd split", conv2former_fwd_kernel, kind, "bf16", width, setting.fwd, SPLIT=True, out="*fp32")
            yield _case("fwd join", conv2former_fwd_join_kernel, kind, "bf16", width, join)
            yield _case("bwd alone", conv2former_bwd_dx_kernel, kind, "bf16", width, setting.dx, **alone)
    setting = SETTINGS["half", 64]
    yield from _cases("half", "fp16", 64, setting)
    yield from _cases("half", "bf16", 64, setting, "nchw")
    yield _case("bwd alone", conv2former_bwd_dx_kernel, "half", "bf16", 64, setting.dx, "nchw", **alone)
    yield _case("bwd dq split", conv2former_bwd_dq_kernel, "half", "bf16", 64, setting.dq, dquery="*fp32")
    yield _case("bwd sum", conv2former_bwd_sum_kernel, "half", "bf16", 64, Tile(0, 0, 4, 3))
    for kind, dtype, precision in (
        ("odd half", "bf16", "ieee"),
        ("odd fp32", "fp32", "ieee"),
        ("odd fp32", "fp32", "tf32"),
    ):
        yield from _cases(kind, dtype, 64, SETTINGS[kind, 64], "nchw", PRECISION=precision)
        for width in (64, 128, 256):
            setting = SETTINGS[kind, width]
            yield from _cases(kind, dtype, width - width // 8 + 1, setting, "strided", PRECISION=precision)


def _cases(
    kind: str, dtype: str, width: int, setting: Setting, layout: str = "channels_last", **more: object
) -> Iterator[Case]:
    yield _case("fwd", conv2former_fwd_kernel, kind, dtype, width, setting.fwd, layout, **more)
    yield _case("bwd dq", conv2former_bwd_dq_kernel, kind, dtype, width, setting.dq, layout, **more)
    yield _case("bwd dx", conv2former_bwd_dx_kernel, kind, dtype, width, setting.dx, layout, **more)


def _case(
    name: str,
    kernel: JITFunction,
    kind: str,
    dtype: str,
    width: int,
    tile: Tile,
    layout: str = "channels_last",
    **more: object,
) -> Case:
    """``more`` are constexprs, and types of pointers that are not the usual ones."""
    units = {"channels_last": ("s_xc", "s_yc"), "nchw": ("s_xw", "s_yw"), "strided": ("s_yw",)}[layout]
    constexprs = {
        "D": width,
        "BD": padded_width(width),
        "BQ": tile.queries,
        "BN": tile.tokens,
        "BS": SUM_ELEMENTS,
        "LAYOUT": layout,
        "LAYOUT_OUT": "nchw" if layout == "strided" else layout,
        "SPLIT": False,
        "ALONE": False,
        "PRECISION": "ieee",
        **dict.fromkeys(units, 1),
    }
    types = dict.fromkeys(("query", "tokens", "out", "grad", "dquery", "dtokens"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "delta", "peak", "mass", "partial"), "*fp32") | {"scale": "fp32"}
    for key, value in more.items():
        (types if key in types else constexprs)[key] = value
    number = ("odd " if kind.startswith("odd") else "") + (constexprs["PRECISION"] if dtype == "fp32" else dtype)
    # The number of tokens matters where they lie side by side.
    odd = ("N", "s_") if kind.startswith("odd") else () if layout == "nchw" else ("N",)
    name = f"{name} {number} {width} {layout}"
    return Case.of(kernel, name, constexprs, types, tile.warps, tile.stages, odd=("scale", *odd))
