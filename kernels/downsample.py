"""The 3x3 convolution with stride 3, forward and backward, as products of matrices.

Patches do not overlap: the rows of one matrix are the patches, 9 C values each, and are read where they lie in the
image, tap by tap. Few patches are few programs for a GPU, and the weight is what has to be read: then several programs
share a tile, and a second kernel adds their parts in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from fusekern.kernels.launching import cdiv, on_device_of, precision_of
from torch import Tensor
from triton.runtime.jit import JITFunction


@triton.jit
def patches(i_m, h, w, BM: tl.constexpr):
    """Image (int64), row and column of the patches from ``i_m`` (int64) on. 3 x [BM]"""
    o_m = (i_m % (h * w)).to(tl.int32) + tl.arange(0, BM)
    i_b = i_m // (h * w) + o_m // (h * w)
    o_m = o_m % (h * w)
    return i_b, o_m // w, o_m % w


@triton.jit
def load_rows(source, o_m, m_m, i_c, s_c, C: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr):
    """``BC`` channels from ``i_c`` on of some pixels; with LAST the channels lie side by side. [BM, BC]"""
    o_c = i_c + tl.arange(0, BC)
    if LAST:
        return tl.load(source + (o_m[:, None] + o_c[None, :]), mask=m_m[:, None] & (o_c < C)[None, :], other=0.0)
    # Transposed, so that neighbouring threads read neighbouring pixels.
    o_x = o_m[None, :] + o_c.to(tl.int64)[:, None] * s_c
    return tl.trans(tl.load(source + o_x, mask=m_m[None, :] & (o_c < C)[:, None], other=0.0))


@triton.jit
def store_rows(target, b_y, o_m, m_m, i_c, s_c, C: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr):
    """``BC`` channels from ``i_c`` on into some pixels; ``b_y`` is [BC, BM]."""
    o_c = i_c + tl.arange(0, BC)
    b_y = b_y.to(target.dtype.element_ty)
    if LAST:
        tl.store(target + (o_m[:, None] + o_c[None, :]), tl.trans(b_y), mask=m_m[:, None] & (o_c < C)[None, :])
    else:
        o_y = o_m[None, :] + o_c.to(tl.int64)[:, None] * s_c
        tl.store(target + o_y, b_y, mask=m_m[None, :] & (o_c < C)[:, None])


@triton.jit(do_not_specialize=["M", "H", "W", "h", "w", "blocks", "run"])
def downsample_fwd_kernel(
    image,
    weight,
    bias,
    out,
    M,
    H,
    W,
    h,
    w,
    blocks,
    run,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_ob,
    s_oc,
    s_oh,
    s_ow,
    C: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    LAST: tl.constexpr,
    LAST_OUT: tl.constexpr,
    PADDED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[m, o] = bias[o] + sum_{t, c} weight[o, t, c] x[m, t, c] for M = B h w patches m, taps t and C channels c.

    With SPLIT over the program's ``run`` steps only, without the bias, into out [splits, M, C]. A step is ``BC``
    channels of a tap.
    """
    i = tl.program_id(0)
    i_o = i % tl.cdiv(C, BO) * BO
    i_m = (i // tl.cdiv(C, BO) % blocks).to(tl.int64) * BM
    i_s = i // tl.cdiv(C, BO) // blocks
    i_b, i_y, i_x = patches(i_m, h, w, BM)
    m_m = i_m + tl.arange(0, BM) < M
    o_o = i_o + tl.arange(0, BO)
    o_w = o_o.to(tl.int64)[:, None] * (9 * C) + tl.arange(0, BC)[None, :]  # [BO, BC]
    o_x = i_b * s_xb + (3 * i_y).to(tl.int64) * s_xh + (3 * i_x).to(tl.int64) * s_xw  # [BM]

    # What of a patch lies in the image.
    n_h = tl.where(m_m, H - 3 * i_y, 0)
    n_w = W - 3 * i_x
    b_o = tl.zeros([BO, BM], tl.float32)
    for i in range(i_s * run, tl.minimum((i_s + 1) * run, 9 * tl.cdiv(C, BC))):
        i_t = i // tl.cdiv(C, BC)
        i_c = i % tl.cdiv(C, BC) * BC
        o_t = tl.cast(i_t // 3, tl.int64) * s_xh + tl.cast(i_t % 3, tl.int64) * s_xw
        m_w = (o_o < C)[:, None] & (i_c + tl.arange(0, BC) < C)[None, :]
        b_w = tl.load(weight + (i_t * C + i_c) + o_w, mask=m_w, other=0.0)  # [BO, BC]
        m_x = m_m
        if PADDED:
            m_x = (i_t // 3 < n_h) & (i_t % 3 < n_w)
        b_x = load_rows(image + o_t, o_x, m_x, i_c, s_xc, C, BC, LAST)  # [BM, BC]
        b_o = tl.dot(b_w, tl.trans(b_x), b_o, input_precision=PRECISION)

    if SPLIT:
        o_m = i_s.to(tl.int64) * M + i_m + tl.arange(0, BM)
        store_rows(out, b_o, o_m * C, m_m, i_o, 1, C, BO, True)
    else:
        if BIAS:
            b_o += tl.load(bias + o_o, mask=o_o < C, other=0.0).to(tl.float32)[:, None]
        o_m = i_b * s_ob + i_y.to(tl.int64) * s_oh + i_x.to(tl.int64) * s_ow
        store_rows(out, b_o, o_m, m_m, i_o, s_oc, C, BO, LAST_OUT)


@triton.jit(do_not_specialize=["M", "H", "W", "h", "w"])
def downsample_bwd_image_kernel(
    grad,
    weight,
    dimage,
    M,
    H,
    W,
    h,
    w,
    s_gb,
    s_gc,
    s_gh,
    s_gw,
    s_yb,
    s_yc,
    s_yh,
    s_yw,
    C: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    LAST: tl.constexpr,
    LAST_OUT: tl.constexpr,
    BORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx[m, t, c] = sum_o weight[o, t, c] g[m, o] for ``BO`` channels c of a tap t.

    With BORDER the last patches of rows and columns also write the zeros below and to the right of them, of which
    there are at most two: those with the same tap, three pixels further on.
    """
    i = tl.program_id(0)
    i_c = i % tl.cdiv(C, BO) * BO
    i_t = i // tl.cdiv(C, BO) % 9
    i_m = (i // tl.cdiv(C, BO) // 9).to(tl.int64) * BM
    i_b, i_y, i_x = patches(i_m, h, w, BM)
    m_m = i_m + tl.arange(0, BM) < M
    o_c = i_c + tl.arange(0, BO)
    m_c = o_c < C
    o_g = i_b * s_gb + i_y.to(tl.int64) * s_gh + i_x.to(tl.int64) * s_gw  # [BM]

    b_dx = tl.zeros([BO, BM], tl.float32)
    for i_o in range(0, C, BC):
        o_o = i_o + tl.arange(0, BC)
        o_w = o_o.to(tl.int64)[:, None] * (9 * C) + i_t * C + o_c[None, :]
        b_w = tl.load(weight + o_w, mask=(o_o < C)[:, None] & m_c[None, :], other=0.0)  # [BC, BO]
        b_g = load_rows(grad, o_g, m_m, i_o, s_gc, C, BC, LAST)  # [BM, BC]
        b_dx = tl.dot(tl.trans(b_w), tl.trans(b_g), b_dx, input_precision=PRECISION)

    o_h = 3 * i_y + i_t // 3
    o_w = 3 * i_x + i_t % 3
    o_y = i_b * s_yb + o_h.to(tl.int64) * s_yh + o_w.to(tl.int64) * s_yw  # [BM]
    m_y = m_m & (o_h < H) & (o_w < W)
    store_rows(dimage, b_dx, o_y, m_y, i_c, s_yc, C, BO, LAST_OUT)
    if BORDER:
        for i in range(1, 4):
            m_y = m_m & (o_h + i // 2 * 3 < H) & (o_w + i % 2 * 3 < W)
            m_y = m_y & (i_y >= i // 2 * (h - 1)) & (i_x >= i % 2 * (w - 1))
            o_z = tl.cast(i // 2 * 3, tl.int64) * s_yh + tl.cast(i % 2 * 3, tl.int64) * s_yw
            store_rows(dimage + o_z, tl.zeros([BO, BM], tl.float32), o_y, m_y, i_c, s_yc, C, BO, LAST_OUT)


@triton.jit(do_not_specialize=["M", "H", "W", "h", "w", "run"])
def downsample_bwd_weight_kernel(
    grad,
    image,
    dweight,
    M,
    H,
    W,
    h,
    w,
    run,
    s_gb,
    s_gc,
    s_gh,
    s_gw,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    C: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    LAST_GRAD: tl.constexpr,
    LAST: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dweight[o, t, c] = sum_m g[m, o] x[m, t, c] over the program's ``run`` blocks of patches, [splits, C, 9, C]."""
    i = tl.program_id(0)
    i_c = i % tl.cdiv(C, BC) * BC
    i_t = i // tl.cdiv(C, BC) % 9
    i_o = i // tl.cdiv(C, BC) // 9 % tl.cdiv(C, BO) * BO
    i_s = i // tl.cdiv(C, BC) // 9 // tl.cdiv(C, BO)
    image += tl.cast(i_t // 3, tl.int64) * s_xh + tl.cast(i_t % 3, tl.int64) * s_xw

    b_dw = tl.zeros([BO, BC], tl.float32)
    for i in range(i_s * run, tl.minimum((i_s + 1) * run, tl.cdiv(M, BM))):
        i_m = tl.cast(i, tl.int64) * BM
        i_b, i_y, i_x = patches(i_m, h, w, BM)
        m_m = i_m + tl.arange(0, BM) < M
        o_g = i_b * s_gb + i_y.to(tl.int64) * s_gh + i_x.to(tl.int64) * s_gw
        o_x = i_b * s_xb + (3 * i_y).to(tl.int64) * s_xh + (3 * i_x).to(tl.int64) * s_xw
        m_x = m_m
        if PADDED:
            m_x = m_m & (i_t // 3 < H - 3 * i_y) & (i_t % 3 < W - 3 * i_x)
        b_g = load_rows(grad, o_g, m_m, i_o, s_gc, C, BO, LAST_GRAD)  # [BM, BO]
        b_x = load_rows(image, o_x, m_x, i_c, s_xc, C, BC, LAST)  # [BM, BC]
        b_dw = tl.dot(tl.trans(b_g), b_x, b_dw, input_precision=PRECISION)

    o_o = i_o + tl.arange(0, BO)
    o_c = i_c + tl.arange(0, BC)
    o_w = (tl.cast(i_s, tl.int64) * C + o_o)[:, None] * (9 * C) + i_t * C + o_c[None, :]
    tl.store(dweight + o_w, b_dw.to(dweight.dtype.element_ty), mask=(o_o < C)[:, None] & (o_c < C)[None, :])


@triton.jit(do_not_specialize=["splits", "pixels"])
def downsample_sum_kernel(
    partial,
    bias,
    total,
    size,
    splits,
    pixels,
    C: tl.constexpr,
    BP: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The sum of [splits, size] over the splits, in a fixed order, plus the bias of the channels.

    A part is [., pixels, C], or with WEIGHT [., 9, C]. With LAST the total is so too, else [., C, pixels or 9].
    """
    i_s = tl.program_id(0).to(tl.int64) * BS
    o_s = i_s + tl.arange(0, BS)
    m_s = o_s < size
    if LAST:
        o_c = ((i_s % C).to(tl.int32) + tl.arange(0, BS)) % C
        o_p = o_s
    else:
        n_p = 9 if WEIGHT else pixels
        o_r = (i_s % (n_p * C)).to(tl.int32) + tl.arange(0, BS)
        i_a = i_s // (n_p * C) + o_r // (n_p * C)
        o_r = o_r % (n_p * C)
        o_c = o_r // n_p
        o_p = i_a * (n_p * C) + o_r % n_p * C + o_c
    b_sum = tl.zeros([BS], tl.float32)
    for i in range(0, splits, BP):
        i_p = i + tl.arange(0, BP)
        m_p = (i_p < splits)[:, None] & m_s[None, :]
        b_p = tl.load(partial + i_p.to(tl.int64)[:, None] * size + o_p[None, :], mask=m_p, other=0.0)  # [BP, BS]
        b_sum += tl.sum(b_p, 0)
    if BIAS:
        b_sum += tl.load(bias + o_c, mask=m_s, other=0.0).to(tl.float32)
    tl.store(total + o_s, b_sum.to(total.dtype.element_ty), mask=m_s)


class Tile(NamedTuple):
    """Launch setting. A tile is BO x BM, or BO x BC for the weight's gradient; the third is the step of the sum."""

    BO: int
    BM: int
    BC: int
    warps: int
    stages: int


class Setting(NamedTuple):
    """Of the forward and the gradients of image and weight."""

    fwd: Tile
    image: Tile
    weight: Tile


# By the products' kind and the amount of work: up to 32 patches, tiles enough for all multiprocessors, or between.
# Output channels are the tiles' M, of which the tensor cores of sm_90 want 64; patches may be as few as 32. "ieee" is
# fp32 without tf32, which has no tensor cores and its operands in registers; "odd" is whatever has no accesses of 16
# bytes, NCHW above all: every element has an address in a register there.
SETTINGS = {
    ("half", "small"): Setting(Tile(64, 32, 64, 4, 5), Tile(64, 32, 64, 4, 5), Tile(64, 32, 64, 4, 3)),
    ("half", "medium"): Setting(Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    ("half", "large"): Setting(Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 128, 8, 3)),
    ("tf32", "small"): Setting(Tile(64, 32, 32, 4, 5), Tile(64, 32, 32, 4, 5), Tile(64, 32, 64, 4, 3)),
    ("tf32", "medium"): Setting(Tile(64, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 64, 4, 4)),
    ("tf32", "large"): Setting(Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 32, 128, 8, 3)),
    ("ieee", "small"): Setting(Tile(64, 32, 16, 4, 3), Tile(64, 32, 16, 4, 3), Tile(64, 16, 64, 8, 3)),
    ("ieee", "medium"): Setting(Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(64, 16, 64, 8, 3)),
    ("ieee", "large"): Setting(Tile(128, 64, 16, 8, 3), Tile(64, 64, 32, 8, 2), Tile(128, 16, 128, 8, 3)),
    ("odd", "any"): Setting(Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2), Tile(64, 16, 64, 8, 2)),
}
# A GPU runs about as many programs at once as it has multiprocessors, an H100 or H200 132. The number is fixed: the
# order of the sums, and so the bits of a result, shall not depend on the device.
PROGRAMS = 132
# In steps of a program: what it takes to start one, to write or read its part, and to launch the sum.
START, PART, SUM = 4, 4, 8
# Elements of a program of the sum, and parts that it adds at once.
SUM_ELEMENTS, SUM_PARTS = 128, 16


def setting_of(kind: str, rows: int, channels: int) -> Setting:
    """The launch settings for a number of patches."""
    if kind == "odd":
        return SETTINGS[kind, "any"]
    if rows <= 32:
        return SETTINGS[kind, "small"]
    tiles = cdiv(rows, 128) * cdiv(channels, 128)
    return SETTINGS[kind, "medium" if tiles < PROGRAMS else "large"]


def run_length(programs: int, steps: int) -> int:
    """How many of its steps a program takes, such that the slowest multiprocessor is done first.

    The splits come in waves of ``PROGRAMS`` programs, of which four bound what their parts take of memory.
    """

    def cost(splits: int) -> float:
        waves, run = cdiv(programs * splits, PROGRAMS), cdiv(steps, splits)
        extra = waves * PART + programs * splits / PROGRAMS * PART + SUM
        return waves * (START + run) + (extra if splits > 1 else 0)

    most = max(1, min(steps, 4 * PROGRAMS // programs))
    return cdiv(steps, min(range(1, most + 1), key=cost))


def kind_of(*images: Tensor) -> str:
    """Which products the launch settings are for, of images that lie as these do."""
    for image in images:
        if image.stride(1) != 1 or any(size % 16 for size in (image.shape[1], *image.stride()[::2], image.stride(3))):
            return "odd"
    return precision_of(torch.float32, convolution=True) if images[0].dtype == torch.float32 else "half"


def launches(image: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and of PyTorch's own a ``"copy"`` or a ``"sum"``.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result; the gradient of the weight
    is taken to be channels_last if the weight is.
    """
    channels, rows = image.shape[1], grad.shape[0] * grad.shape[2] * grad.shape[3]
    taps = ["copy"] * (not weight.permute(0, 2, 3, 1).is_contiguous())
    fwd = [*taps, *["copy"] * (bias is not None and not bias.is_contiguous()), "downsample_fwd_kernel"]
    if _fwd_shares(setting_of(kind_of(image), rows, channels).fwd, rows, channels)[2] > 1:
        fwd.append("downsample_sum_kernel")
    bwd = [*["sum"] * (bias is not None), *taps, "downsample_bwd_image_kernel", "downsample_bwd_weight_kernel"]
    tile = setting_of(kind_of(image, grad), rows, channels).weight
    if _summed(_weight_shares(tile, rows, channels)[2], weight):
        bwd.append("downsample_sum_kernel")
    return {"fwd": tuple(fwd), "bwd": tuple(bwd)}


def _fwd_shares(tile: Tile, rows: int, channels: int) -> tuple[int, int, int]:
    """Tiles, steps of a program, and programs that share a tile."""
    tiles, steps = cdiv(rows, tile.BM) * cdiv(channels, tile.BO), 9 * cdiv(channels, tile.BC)
    run = run_length(tiles, steps)
    return tiles, run, cdiv(steps, run)


def _weight_shares(tile: Tile, rows: int, channels: int) -> tuple[int, int, int]:
    """The same of the weight's gradient."""
    tiles, steps = 9 * cdiv(channels, tile.BO) * cdiv(channels, tile.BC), cdiv(rows, tile.BM)
    run = run_length(tiles, steps)
    return tiles, run, cdiv(steps, run)


def _summed(splits: int, dweight: Tensor) -> bool:
    """A contiguous gradient has the taps side by side; the sum puts them there."""
    return splits > 1 or dweight.stride(1) != 1


def _taps(weight: Tensor) -> Tensor:
    """``[C, 9, C]``, the input channels last; a copy if they are not so already."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _sum(partial: Tensor, bias: Tensor | None, total: Tensor, weight: bool) -> None:
    channels, pixels = total.shape[1], total.shape[2] * total.shape[3]
    grid = (cdiv(total.numel(), SUM_ELEMENTS),)
    downsample_sum_kernel[grid](
        *(partial, total if bias is None else bias, total, total.numel(), partial.shape[0], pixels),
        C=channels,
        BP=SUM_PARTS,
        BS=SUM_ELEMENTS,
        LAST=total.stride(1) == 1,
        WEIGHT=weight,
        BIAS=bias is not None,
        num_warps=4,
    )


def downsample_fwd(image: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fills ``out`` ``[B, C, h, w]``, whose size says how many patches; ``weight`` is ``[C, C, 3, 3]``."""
    batch, channels, height, width = image.shape
    h, w = out.shape[2:]
    rows = batch * h * w
    tile = setting_of(kind_of(image), rows, channels).fwd
    blocks = cdiv(rows, tile.BM)
    programs, run, splits = _fwd_shares(tile, rows, channels)
    with on_device_of(image):
        weight = _taps(weight)
        bias = None if bias is None else bias.contiguous()
        result = out
        if splits > 1:
            result = torch.empty((splits, rows, channels), dtype=torch.float32, device=out.device)
        downsample_fwd_kernel[(programs * splits,)](
            *(image, weight, weight if bias is None else bias, result),
            *(rows, height, width, h, w, blocks, run, *image.stride(), *out.stride()),
            C=channels,
            BO=tile.BO,
            BM=tile.BM,
            BC=tile.BC,
            LAST=image.stride(1) == 1,
            LAST_OUT=out.stride(1) == 1,
            PADDED=3 * h > height or 3 * w > width,
            BIAS=bias is not None,
            SPLIT=splits > 1,
            PRECISION=precision_of(image.dtype, convolution=True),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if splits > 1:
            _sum(result, bias, out, weight=False)


def downsample_bwd(
    grad: Tensor, image: Tensor, weight: Tensor, dimage: Tensor, dweight: Tensor, dbias: Tensor | None
) -> None:
    """Fills ``dimage`` ``[B, C, H, W]``, ``dweight`` ``[C, C, 3, 3]`` and, unless it is none, ``dbias`` ``[C]``.

    ``grad`` is ``[B, C, h, w]``. At most two rows and columns of the image may lie beyond the patches.
    """
    _, channels, height, width = image.shape
    h, w = grad.shape[2:]
    rows = grad.shape[0] * h * w
    setting = setting_of(kind_of(image, grad), rows, channels)
    if dbias is not None:
        torch.sum(grad, dim=(0, 2, 3), out=dbias)
    with on_device_of(image):
        tile = setting.image
        blocks = cdiv(rows, tile.BM) * 9 * cdiv(channels, tile.BO)
        downsample_bwd_image_kernel[(blocks,)](
            *(grad, _taps(weight), dimage, rows, height, width, h, w, *grad.stride(), *dimage.stride()),
            C=channels,
            BO=tile.BO,
            BM=tile.BM,
            BC=tile.BC,
            LAST=grad.stride(1) == 1,
            LAST_OUT=dimage.stride(1) == 1,
            BORDER=3 * h < height or 3 * w < width,
            PRECISION=precision_of(image.dtype, convolution=True),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _bwd_weight(grad, image, dweight, setting.weight)


def _bwd_weight(grad: Tensor, image: Tensor, dweight: Tensor, tile: Tile) -> None:
    _, channels, height, width = image.shape
    h, w = grad.shape[2:]
    rows = grad.shape[0] * h * w
    programs, run, splits = _weight_shares(tile, rows, channels)
    result = dweight
    if _summed(splits, dweight):
        result = torch.empty((splits, channels, 9, channels), dtype=torch.float32, device=dweight.device)
    downsample_bwd_weight_kernel[(programs * splits,)](
        *(grad, image, result, rows, height, width, h, w, run, *grad.stride(), *image.stride()),
        C=channels,
        BO=tile.BO,
        BM=tile.BM,
        BC=tile.BC,
        LAST_GRAD=grad.stride(1) == 1,
        LAST=image.stride(1) == 1,
        PADDED=3 * h > height or 3 * w > width,
        PRECISION=precision_of(image.dtype, convolution=True),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if result is not dweight:
        _sum(result, None, dweight, weight=True)


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, load), setting in SETTINGS.items():
        for dtype in {"half": ("bf16", "fp16") if load == "medium" else ("bf16",), "odd": ()}.get(kind, (kind,)):
            yield from _cases(load, dtype, setting)
            if kind == "half":
                split = {"dweight": "*fp32"}
                yield _case(f"fwd split {load}", downsample_fwd_kernel, dtype, setting.fwd, SPLIT=True, out="*fp32")
                yield _case(f"bwd weight split {load}", downsample_bwd_weight_kernel, dtype, setting.weight, **split)
    for load in ("small", "medium", "large"):
        yield from _cases(f"edges {load}", "bf16", SETTINGS["half", load], PADDED=True, BORDER=True)
    for dtype in ("bf16", "ieee", "tf32"):
        for C, layout in ((200, "channels_last"), (512, "nchw"), (50, "strided")):
            yield from _cases("odd edges", dtype, SETTINGS["odd", "any"], C, layout, PADDED=True, BORDER=True)
    for layout in ("channels_last", "nchw"):
        tile = Tile(0, 0, 0, 4, 3)
        yield _case("sum out", downsample_sum_kernel, "bf16", tile, layout=layout, BIAS=True)
        yield _case("sum weight", downsample_sum_kernel, "bf16", tile, layout=layout, WEIGHT=True)


def _cases(
    name: str, dtype: str, setting: Setting, C: int = 512, layout: str = "channels_last", **more: object
) -> Iterator[Case]:
    yield _case(f"fwd {name}", downsample_fwd_kernel, dtype, setting.fwd, C, layout, **more)
    yield _case(f"bwd image {name}", downsample_bwd_image_kernel, dtype, setting.image, C, layout, **more)
    yield _case(f"bwd weight {name}", downsample_bwd_weight_kernel, dtype, setting.weight, C, layout, **more)


def _case(
    name: str, kernel: JITFunction, dtype: str, tile: Tile, C: int = 512, layout: str = "channels_last", **more: object
) -> Case:
    """``more`` are constexprs and types of pointers that are not the usual ones."""
    last = layout == "channels_last"
    unit = {"channels_last": ("s_xc", "s_gc", "s_oc", "s_yc"), "nchw": ("s_xw", "s_gw", "s_ow", "s_yw"), "strided": ()}
    constexprs = {
        **dict(zip(("BO", "BM", "BC"), tile[:3], strict=True)),
        **dict.fromkeys(("LAST", "LAST_OUT", "LAST_GRAD"), last),
        **dict.fromkeys(("PADDED", "BORDER", "SPLIT", "WEIGHT"), False),
        "C": C,
        "BP": SUM_PARTS,
        "BS": SUM_ELEMENTS,
        "BIAS": kernel is downsample_fwd_kernel,
        "PRECISION": dtype if dtype in ("ieee", "tf32") else "ieee",
        **dict.fromkeys(unit[layout], 1),
    }
    pointers = ("image", "weight", "bias", "out", "grad", "dimage", "dweight", "total")
    types = dict.fromkeys(pointers, "*fp32" if dtype in ("ieee", "tf32") else f"*{dtype}") | {"partial": "*fp32"}
    for key, value in more.items():
        (types if key in types else constexprs)[key] = value
    odd = ("s_",) if not last or C % 16 else ()
    return Case.of(kernel, f"{name} {dtype} {C} {layout}", constexprs, types, tile.warps, tile.stages, odd=odd)
