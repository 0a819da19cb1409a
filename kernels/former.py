"""Former: a post-norm transformer block over B K rows of text, forward and backward.

    Q, K, V = W_qkv T + b,   M = softmax(Q K^T / sqrt(d)) V per head,   S1 = T + W_out M + b,   U = norm1(S1)
    Z = W_up U + b,          G = gelu(Z),                               S2 = U + W_down G + b,  T' = norm2(S2)

A block of text is little work, and what costs is to start kernels: all of it is two launches, a product and the chain
of what follows, and its backward five. A norm needs whole rows of S1, of which a program of the product has a part of
the columns: each part leaves its moments, and whoever reads S1 joins them. So no tensor is written but the ones named
above, and U not at all.

The text's side of a block of the layer is former between other linear layers (``text_path.py``), by the same kernels:
these layers are tasks of the same chains.

The gradients of all parameters are one launch; sums over the rows have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from fusekern.kernels.aot import Case
from fusekern.kernels.former_bwd import (
    former_bwd_attention_kernel,
    former_bwd_chain_kernel,
    former_bwd_entry_kernel,
    former_bwd_exits_kernel,
    former_bwd_norm_kernel,
    former_bwd_parameters_kernel,
)
from fusekern.kernels.former_fwd import former_fwd_chain_kernel, former_fwd_first_kernel
from fusekern.kernels.launching import cdiv, next_power_of_2, on_device_of, precision_of
from torch import Tensor
from triton.runtime.jit import JITFunction


class Tile(NamedTuple):
    """Launch setting of a product.

    Rows, columns that come out, and terms of a step; of a weight's gradient the terms are rows, and the last its
    columns. Registers of a thread at most: some kernels spill unless it is stated, some if it is.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    registers: int | None = 255

    def of(self, rows: int, columns: int) -> int:
        """How many there are in a product with so many results."""
        return cdiv(rows, self.BM) * cdiv(columns, self.BN)


class Setting(NamedTuple):
    """Of the forward products, their backward, and the gradients of the weights."""

    fwd: Tile
    bwd: Tile
    weight: Tile


class Heads(NamedTuple):
    """Launch setting of the attention: queries and keys of a tile."""

    BQ: int
    BN: int
    warps: int
    stages: int
    registers: int | None = None


# By the products' kind and how many tiles there are for the multiprocessors. "ieee" is fp32 without tf32, which has no
# tensor cores and its operands in registers; "odd" are channels without accesses of 16 bytes.
SETTINGS = {
    ("half", "small"): Setting(Tile(32, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3)),
    ("half", "medium"): Setting(Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3)),
    ("half", "large"): Setting(Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 128, 128, 8, 3)),
    ("tf32", "small"): Setting(Tile(32, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(32, 64, 64, 4, 3)),
    ("tf32", "medium"): Setting(Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(32, 64, 64, 4, 3)),
    ("tf32", "large"): Setting(Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(32, 128, 64, 8, 3)),
    ("ieee", "small"): Setting(Tile(32, 64, 16, 4, 2), Tile(32, 64, 16, 4, 2), Tile(16, 64, 64, 8, 2)),
    ("ieee", "medium"): Setting(Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(16, 64, 64, 8, 2)),
    ("ieee", "large"): Setting(Tile(128, 64, 16, 8, 2), Tile(128, 64, 16, 8, 2), Tile(16, 128, 64, 8, 2)),
    ("odd half", "any"): Setting(Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(16, 64, 64, 8, 2)),
    ("odd fp32", "any"): Setting(Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(16, 64, 64, 8, 2)),
}
# By kind and padded width of a head; forward, with the chain's number of warps if it is larger, and backward.
ATTENTION = {
    ("half", 16): (Heads(64, 64, 4, 3), Heads(64, 64, 4, 2)),
    ("half", 32): (Heads(64, 64, 4, 3), Heads(64, 64, 4, 2)),
    ("half", 64): (Heads(64, 64, 4, 3), Heads(32, 64, 4, 2)),
    ("half", 128): (Heads(64, 32, 4, 2), Heads(64, 64, 8, 2)),
    ("half", 256): (Heads(64, 32, 8, 2), Heads(32, 32, 8, 2)),
    ("tf32", 16): (Heads(64, 32, 4, 2), Heads(32, 32, 4, 2, 255)),
    ("tf32", 32): (Heads(64, 32, 4, 2), Heads(32, 32, 4, 2)),
    ("tf32", 64): (Heads(64, 32, 4, 2), Heads(32, 32, 4, 2)),
    ("tf32", 128): (Heads(64, 32, 8, 2), Heads(32, 32, 8, 2)),
    ("tf32", 256): (Heads(32, 32, 8, 2), Heads(16, 16, 8, 2)),
    ("ieee", 16): (Heads(32, 32, 4, 2), Heads(32, 32, 8, 2)),
    ("ieee", 32): (Heads(32, 32, 4, 2), Heads(32, 32, 8, 2)),
    ("ieee", 64): (Heads(32, 32, 4, 2), Heads(16, 16, 8, 2)),
    ("ieee", 128): (Heads(32, 16, 8, 2), Heads(16, 16, 8, 2)),
    ("ieee", 256): (Heads(16, 16, 8, 2), Heads(16, 16, 8, 2)),
    ("odd half", 16): (Heads(32, 32, 8, 2), Heads(32, 32, 8, 2)),
    ("odd half", 32): (Heads(32, 32, 8, 2), Heads(32, 32, 8, 2, 255)),
    ("odd half", 64): (Heads(32, 32, 8, 2), Heads(32, 32, 8, 2, 255)),
    ("odd half", 128): (Heads(32, 32, 8, 2), Heads(16, 16, 8, 2, 255)),
    ("odd half", 256): (Heads(32, 16, 8, 2), Heads(16, 16, 8, 2)),
    ("odd fp32", 16): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1)),
    ("odd fp32", 32): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1)),
    ("odd fp32", 64): (Heads(16, 32, 8, 2), Heads(16, 16, 8, 1, 255)),
    ("odd fp32", 128): (Heads(16, 16, 8, 2), Heads(16, 16, 8, 1)),
    ("odd fp32", 256): (Heads(16, 16, 8, 2), Heads(16, 16, 8, 2)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# Numbers of a tile of whole rows, and the most channels of one.
NORM_TILE, MAX_CHANNELS = 2048, 2048
# Rows and columns at a time of the kernel that adds rows, and from which number of them on there are many.
FEW, MANY, MANY_ROWS = (64, 32), (256, 16), 512


def kind_of(dtype: torch.dtype, *widths: int) -> str:
    """Which products the launch settings are for."""
    odd = any(width % 16 for width in widths)
    if dtype == torch.float32:
        return "odd fp32" if odd else precision_of(dtype)
    return "odd half" if odd else "half"


def setting_of(kind: str, rows: int, columns: int) -> Setting:
    """The launch settings of products with so many results and more."""
    if kind.startswith("odd"):
        return SETTINGS[kind, "any"]
    if cdiv(rows, 128) * cdiv(columns, 128) >= PROGRAMS:
        return SETTINGS[kind, "large"]
    # One multiprocessor in two: smaller tiles read the operands more often.
    return SETTINGS[kind, "medium" if 2 * cdiv(rows, 64) * cdiv(columns, 64) >= PROGRAMS else "small"]


def padded(width: int, least: int) -> int:
    """Channels of a head or of a row, as a tile has them."""
    return max(least, next_power_of_2(width))


def _shared(tile: Tile, queries: Heads) -> Tile:
    """A product's setting where the same programs have queries of the attention."""
    return tile._replace(warps=max(tile.warps, queries.warps))


def _heads_kind(dtype: torch.dtype, width: int) -> tuple[str, int]:
    return kind_of(dtype, width), padded(width, 16)


def launches() -> dict[str, tuple[str, ...]]:
    """The kernels that forward and backward launch, in their order, whatever the shapes."""
    return {
        "fwd": ("former_fwd_first_kernel", "former_fwd_chain_kernel"),
        "bwd": (
            *("former_bwd_norm_kernel", "former_bwd_chain_kernel", "former_bwd_attention_kernel"),
            *("former_bwd_entry_kernel", "former_bwd_parameters_kernel"),
        ),
    }


def _rows(text: Tensor) -> tuple[Tensor, int, int]:
    """``[B, K, C]`` and its strides; what is as small as text is copied where it has no accesses of 16 bytes."""
    batch, count, channels = text.shape
    s_b, s_k, s_c = text.stride()
    s_b, s_k = s_b if batch > 1 else 0, s_k if count > 1 else 0
    odd = channels % 16 == 0 and (s_b % 16 or s_k % 16)
    if (s_c != 1 and channels > 1) or odd:
        return text.contiguous(), count * channels, channels
    return text, s_b, s_k


def _launch(kernel: JITFunction, programs: int, tile: Tile | Heads, *arguments: object, **constexprs: object) -> None:
    sizes = {key: value for key, value in tile._asdict().items() if key.startswith("B")}
    kernel[(programs,)](
        *arguments, **sizes, **constexprs, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers
    )


class Entry(NamedTuple):
    """What comes before the tokens are in the block: tokens' = norm(sums), sums = tokens + W gathered + b."""

    gathered: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor
    shift: Tensor
    sums: Tensor


class Exit(NamedTuple):
    """A linear layer of the result; in the backward ``image`` is its result's gradient."""

    weight: Tensor
    bias: Tensor | None
    image: Tensor


def forward(
    tokens: Tensor,
    entry: Entry | None,
    parts: Sequence[Tensor],
    exits: Sequence[Exit],
    heads: int,
    eps: float,
    out: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
) -> None:
    """``former_fwd`` and ``text_path_fwd``; entry and exits come together or not at all."""
    qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1, *rest = (part.contiguous() for part in parts)
    up_weight, up_bias, down_weight, down_bias, gain2, shift2 = rest
    batch, count, channels = tokens.shape
    rows, wide, width = batch * count, up_weight.shape[0], channels // heads
    kind, precision = kind_of(tokens.dtype, channels, wide), precision_of(tokens.dtype)
    tile, (queries, *_) = setting_of(kind, rows, channels).fwd, ATTENTION[_heads_kind(tokens.dtype, width)]
    with on_device_of(tokens):
        tokens, *strides = _rows(tokens)
        activated = torch.empty_like(hidden)
        partial = moments.new_empty(3 if entry else 2, cdiv(channels, tile.BN), 2, rows)
        counters = torch.empty(2, dtype=torch.int32, device=tokens.device)
        if entry:
            norm0 = entry.gain.contiguous(), entry.shift.contiguous()
            image, weight, bias, result = entry.gathered, entry.weight, entry.bias, entry.sums
        else:
            norm0, image, weight, bias, result = (gain1, shift1), tokens, qkv_weight, qkv_bias, qkv
        _launch(
            *(former_fwd_first_kernel, tile.of(rows, weight.shape[0]), tile),
            *(image if entry is None else image.contiguous(), weight.contiguous(), bias.contiguous(), tokens),
            *(partial, result, counters, rows, count, eps, *strides),
            N=weight.shape[0],
            C=channels,
            ENTRY=entry is not None,
            PRECISION=precision,
        )
        block, blocks = padded(channels, 64), cdiv(count, queries.BQ)
        tasks = batch * blocks * heads + 2 * tile.of(rows, channels) + tile.of(rows, wide)
        if entry:
            tasks += tile.of(rows, 3 * channels) + len(exits) * tile.of(rows, channels)
        else:
            tasks += cdiv(rows, NORM_TILE // block)
        each = [(exit.weight.contiguous(), exit.bias.contiguous(), exit.image) for exit in exits]
        _launch(
            *(former_fwd_chain_kernel, tasks, _shared(tile, queries)),
            *(entry.sums if entry else tokens, *norm0, gain1, shift1, gain2, shift2, partial, moments),
            *(qkv_weight, qkv_bias, qkv, mixed, lse, out_weight, out_bias, sums1),
            *(up_weight, up_bias, hidden, activated, down_weight, down_bias, sums2, out),
            *_three(each or [(out_weight, out_bias, out)]),
            *(counters, width**-0.5, rows, count, heads, blocks, eps, *strides),
            C=channels,
            F=wide,
            D=width,
            BP=next_power_of_2(cdiv(channels, tile.BN)),
            BQ=queries.BQ,
            BT=queries.BN,
            BD=padded(width, 16),
            BR=NORM_TILE // block,
            BC=block,
            EXITS=len(exits),
            STAGES=queries.stages,
            PRECISION=precision,
        )


def _three(some: Sequence[Sequence[object]]) -> list[object]:
    """Up to three of them one after the other, and the first for those that are not there."""
    return [part for each in (*some, *[some[0]] * (3 - len(some))) for part in each]


def backward(
    grad: Tensor,
    tokens: Tensor,
    entry: Entry | None,
    weights: Sequence[Tensor],
    exits: Sequence[Exit],
    out: Tensor | None,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
    heads: int,
    dtokens: Tensor,
    dentry: Sequence[Tensor],
    dparts: Sequence[Tensor],
    dexits: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """``former_bwd`` and ``text_path_bwd``.

    ``out`` is the forward's, which only exits need. ``dentry``: the gradients of gathered, weight, bias, gain and
    shift; ``dparts``: of the twelve parts; ``dexits``: of weight and bias of each.
    """
    qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2 = (part.contiguous() for part in weights)
    dqkv_weight, dqkv_bias, dout_weight, dout_bias, dgain1, dshift1, *rest = dparts
    dup_weight, dup_bias, ddown_weight, ddown_bias, dgain2, dshift2 = rest
    batch, count, channels = sums1.shape
    rows, wide = batch * count, up_weight.shape[0]
    kind = kind_of(sums1.dtype, channels, wide)
    tile, block = setting_of(kind, rows, channels).bwd, padded(channels, 64)
    blocks = cdiv(rows, NORM_TILE // block)
    run = cdiv(blocks, 2 * PROGRAMS)
    parts = cdiv(blocks, run)
    square = tile.of(rows, channels)
    alike = {"C": channels, "PRECISION": precision_of(sums1.dtype)}
    norms = {"BR": NORM_TILE // block, "BC": block}
    with on_device_of(sums1):
        partial = moments.new_empty(3 if entry else 2, parts, 2, channels)
        dsums1, dsums2, dnormed, dmixed, normed = (torch.empty_like(sums1) for _ in range(5))
        dhidden, activated, dqkv = (torch.empty_like(tensor) for tensor in (hidden, hidden, qkv))
        counters = torch.empty(4, dtype=torch.int32, device=sums1.device)
        each = [(exit.image.contiguous(), exit.weight.contiguous()) for exit in exits]
        if exits:
            dout = torch.empty_like(sums1)
            _launch(
                *(former_bwd_exits_kernel, square, tile),
                *(*_three(each), grad.contiguous(), dout, counters, rows),
                **alike,
                EXITS=len(exits),
            )
        else:
            dout, *strides = _rows(grad)
            former_bwd_norm_kernel[(parts,)](
                *(dout, sums2, gain2, moments, dsums2, partial, counters, rows, count, run, *strides),
                C=channels,
                **norms,
                num_warps=4,
            )
        tasks = tile.of(rows, wide) + 2 * square + parts * (2 if exits else 1)
        _launch(
            *(former_bwd_chain_kernel, tasks, tile),
            *(dout, sums2, gain2, moments, dsums2, partial, down_weight, hidden, dhidden, activated),
            *(up_weight, dnormed, sums1, gain1, shift1, dsums1, normed, out_weight, dmixed, counters),
            *(rows, count, run, parts),
            F=wide,
            BRIDGED=bool(exits),
            **alike,
            **norms,
        )
        _attention_bwd(dmixed, qkv, mixed, lse, heads, dqkv)
        if entry:
            dgathered, dentry_weight, dentry_bias, dgain0, dshift0 = dentry
            image, strides, gathered = (
                torch.empty_like(sums1),
                (count * channels, channels),
                entry.gathered.contiguous(),
            )
            _launch(
                *(former_bwd_entry_kernel, 2 * square + parts, tile),
                *(dqkv, qkv_weight, dsums1, dnormed, entry.sums, entry.gain.contiguous(), entry.shift.contiguous()),
                *(moments, dtokens, image, partial, entry.weight.contiguous(), dgathered, counters),
                *(rows, count, run, parts),
                BRIDGED=True,
                **alike,
                **norms,
            )
            gradients = [(*one[:1], *two) for one, two in zip(each, dexits, strict=True)]
            three = _three(gradients)
            bridged = (dtokens, gathered, dentry_weight, *three[::3], out, *three[1::3])
            vectors = (dentry_bias, dgain0, dshift0, *three[2::3])
        else:
            _launch(
                *(former_bwd_entry_kernel, square, tile),
                *(dqkv, qkv_weight, dsums1, dtokens, *[dsums1] * 3, moments, *[dsums1] * 2, partial, *[dsums1] * 2),
                *(counters, rows, count, run, parts),
                BRIDGED=False,
                **alike,
                **norms,
            )
            image, *strides = _rows(tokens)
            bridged, vectors = (dqkv,) * 10, (dqkv_bias,) * 6  # not touched

        tile = setting_of(kind, 4 * channels + 2 * wide, channels).weight
        height, across = FEW if rows < MANY_ROWS else MANY
        squares = 1 + len(exits) if entry else 0
        programs = sum(
            cdiv(weight.shape[0], tile.BN) * cdiv(weight.shape[1], tile.BK)
            for weight in (qkv_weight, out_weight, up_weight, down_weight, *[out_weight] * squares)
        )
        programs += (6 + (3 + len(exits) if entry else 0)) * cdiv(channels, across)
        programs += sum(cdiv(n, across) for n in (3 * channels, wide))
        _launch(
            *(former_bwd_parameters_kernel, programs, tile),
            *(dqkv, image, dqkv_weight, dsums1, mixed, dout_weight),
            *(dhidden, normed, dup_weight, dsums2, activated, ddown_weight, *bridged, partial),
            *(dqkv_bias, dout_bias, dgain1, dshift1, dup_bias, ddown_bias, dgain2, dshift2, *vectors),
            *(rows, count, parts, *strides),
            F=wide,
            BT=height,
            BV=across,
            EXITS=len(exits),
            **alike,
        )


def former_fwd(
    tokens: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    heads: int,
    eps: float,
    out: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
) -> None:
    """Fills ``out`` ``[B, K, C]`` and what the backward needs.

    That is in the dtype of the tokens ``qkv`` ``[B, K, 3 C]``, ``mixed``, ``sums1`` and ``sums2`` ``[B, K, C]`` and
    ``hidden`` ``[B, K, F]``, in fp32 ``lse`` ``[B, heads, K]`` and ``moments`` ``[4, B K]``. The weights have the
    dtype of the tokens, the vectors any.
    """
    parts = (qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1)
    parts += (up_weight, up_bias, down_weight, down_bias, gain2, shift2)
    forward(tokens, None, parts, (), heads, eps, out, qkv, mixed, lse, sums1, hidden, sums2, moments)


def former_bwd(
    grad: Tensor,
    tokens: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gain2: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
    heads: int,
    dtokens: Tensor,
    *dparts: Tensor,
) -> None:
    """Fills the gradients of the tokens and of the twelve parts, contiguous, of the shapes that the forward has."""
    weights = (qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2)
    saved = (qkv, mixed, lse, sums1, hidden, sums2, moments)
    backward(grad, tokens, None, weights, (), None, *saved, heads, dtokens, (), dparts, ())


def _attention_bwd(grad: Tensor, qkv: Tensor, mixed: Tensor, lse: Tensor, heads: int, dqkv: Tensor) -> None:
    batch, count, channels = mixed.shape
    width = channels // heads
    tile = ATTENTION[_heads_kind(qkv.dtype, width)][1]
    blocks, tiles = cdiv(count, tile.BQ), cdiv(count, tile.BN)
    _launch(
        *(former_bwd_attention_kernel, batch * (blocks + tiles) * heads, tile),
        *(grad, qkv, mixed, lse, dqkv, width**-0.5, count, heads, blocks, tiles),
        C=channels,
        D=width,
        BD=padded(width, 16),
        PRECISION=precision_of(qkv.dtype),
    )


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, load), setting in SETTINGS.items():
        for dtype in _dtypes(kind, load == "medium"):
            channels = 200 if kind.startswith("odd") else 512
            name = f"{'odd' if kind.startswith('odd') else load} {dtype} {channels}"
            yield from _products(name, dtype, setting, channels)
            for (of, padded_to), (queries, _) in ATTENTION.items():
                if of == kind and (padded_to == 64 or dtype != "fp16"):
                    yield from _chains(load, dtype, channels, setting.fwd, padded_to, queries)
    for dtype in ("bf16", "ieee"):
        setting, queries = SETTINGS[_kind(dtype), "medium"], ATTENTION[_kind(dtype), 64][0]
        for channels in (64, 2048):  # rows of a norm's tile: as many as there are, and one
            yield from _products(f"medium {dtype} {channels}", dtype, setting, channels)
            yield from _chains("medium", dtype, channels, setting.fwd, 64, queries)
    for (kind, width), (_, tile) in ATTENTION.items():
        for dtype in _dtypes(kind, width == 64):
            true = width - width // 8 + 1 if kind.startswith("odd") else width
            channels, more = 4 * true if kind.startswith("odd") else 512, {"D": true, "BD": width}
            yield _case(f"bwd attention {dtype} {true}", former_bwd_attention_kernel, dtype, channels, tile, **more)


def _products(name: str, dtype: str, setting: Setting, channels: int) -> Iterator[Case]:
    """All but the forward's chain and the attention."""
    for entry in (False, True):
        more = {"ENTRY": entry, "N": channels if entry else 3 * channels}
        yield _case(
            f"fwd first{' entry' * entry} {name}", former_fwd_first_kernel, dtype, channels, setting.fwd, **more
        )
    yield _case(f"bwd norm {name}", former_bwd_norm_kernel, dtype, channels, Tile(0, 0, 0, 4, 3, None))
    yield _case(f"bwd exits {name}", former_bwd_exits_kernel, dtype, channels, setting.bwd, EXITS=3)
    for bridged in (False, True):
        more, of = {"BRIDGED": bridged, "EXITS": 3 * bridged}, " bridged" * bridged
        yield _case(f"bwd chain{of} {name}", former_bwd_chain_kernel, dtype, channels, setting.bwd, **more)
        yield _case(f"bwd entry{of} {name}", former_bwd_entry_kernel, dtype, channels, setting.bwd, **more)
        for many, (height, across) in (("few", FEW), ("many", MANY)):
            more |= {"BT": height, "BV": across}
            kernel = former_bwd_parameters_kernel
            yield _case(f"bwd parameters{of} {many} {name}", kernel, dtype, channels, setting.weight, **more)


def _chains(load: str, dtype: str, channels: int, tile: Tile, width: int, queries: Heads) -> Iterator[Case]:
    """The forward's, with heads of such a padded width."""
    odd = channels == 200
    more = {"D": width - width // 8 + 1 if odd else width, "BD": width, "BQ": queries.BQ, "BT": queries.BN}
    for exits in (0, 3):
        name = f"fwd chain{' exits' * (exits > 0)} {'odd' if odd else load} {dtype} {channels} {more['D']}"
        more |= {"EXITS": exits, "STAGES": queries.stages}
        yield _case(name, former_fwd_chain_kernel, dtype, channels, _shared(tile, queries), **more)


def _kind(dtype: str) -> str:
    return "half" if dtype in ("bf16", "fp16") else dtype


def _dtypes(kind: str, both: bool) -> tuple[str, ...]:
    """Types of numbers, fp32 by the precision of its products."""
    if kind.endswith("half"):
        return ("bf16", "fp16") if both else ("bf16",)
    return ("ieee", "tf32") if kind == "odd fp32" else (kind,)


def _case(name: str, kernel: JITFunction, dtype: str, channels: int, tile: Tile | Heads, **more: object) -> Case:
    """``more`` are constexprs that are not the usual ones."""
    fp32, block = dtype in ("ieee", "tf32"), padded(channels, 64)
    constexprs = {
        **tile._asdict(),
        "C": channels,
        "F": 2 * channels,
        "BP": next_power_of_2(cdiv(channels, max(tile.BN, 1))),
        "BR": NORM_TILE // block,
        "BC": block,
        "PRECISION": dtype if fp32 else "ieee",
        **more,
    }
    integers = ("rows", "count", "heads", "blocks", "tiles", "run", "parts", "s_b", "s_k")
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(("eps", "scale"), "fp32")
    types |= dict.fromkeys(("partial", "moments", "lse"), "*fp32") | {"counters": "*i32"}
    usual = "*fp32" if fp32 else f"*{dtype}"
    odd, setting = ("scale",) if channels % 16 == 0 else ("scale", "s_"), (tile.warps, tile.stages, tile.registers)
    return Case.of(kernel, name, constexprs, types, *setting, usual=usual, odd=odd)
