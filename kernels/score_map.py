"""Score map: ``S = I T^T``, rows of unit length if asked, beside the image in one tensor if asked.

The forward divides by the norms behind the product: they come from the tiles that the product loads, and the image part
of the concatenation is what has been loaded too. The backward has a kernel for dI, which computes S again because a
pixel's gradient along itself drops out, and one for dT, whose sums over parts of the pixels a third one adds in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from fusekern.kernels.aot import Case
from fusekern.kernels.launching import cdiv, on_device_of, precision_of
from fusekern.kernels.score_map_bwd import (
    score_map_bwd_image_kernel,
    score_map_bwd_sum_kernel,
    score_map_bwd_text_kernel,
)
from fusekern.kernels.score_map_fwd import CHANNELS_LAST, NCHW, STRIDED, score_map_fwd_kernel, score_map_unit_kernel
from torch import Tensor


class Setting(NamedTuple):
    """Pixels, channels and tokens of a tile; BK2 more tokens where one block is a bit too small."""

    BN: int
    BC: int
    BK: int
    BK2: int
    num_warps: int
    num_stages: int
    maxnreg: int


TILE = Setting._fields[:4]
# For each kernel and arithmetic: what serves everywhere, then what serves up to BK + BK2 tokens, few tokens first.
SETTINGS = {
    ("fwd", "half"): (
        Setting(64, 64, 64, 0, 8, 3, 255),
        Setting(64, 64, 32, 0, 4, 3, 255),
        Setting(128, 64, 64, 0, 8, 3, 255),
        Setting(128, 64, 128, 0, 8, 3, 255),
        Setting(128, 64, 128, 32, 8, 3, 255),
    ),
    ("fwd", "tf32"): (
        Setting(64, 32, 64, 0, 8, 3, 255),
        Setting(64, 32, 32, 0, 4, 3, 255),
        Setting(128, 32, 128, 32, 8, 3, 255),
    ),
    ("fwd", "ieee"): (Setting(64, 16, 64, 0, 8, 2, 255), Setting(64, 16, 32, 0, 4, 2, 255)),
    ("image", "half"): (
        Setting(64, 64, 64, 0, 8, 3, 255),
        Setting(64, 64, 32, 0, 4, 3, 255),
        Setting(64, 64, 64, 0, 8, 3, 128),
        Setting(64, 64, 128, 32, 8, 3, 128),
    ),
    ("image", "tf32"): (
        Setting(64, 32, 32, 0, 8, 3, 255),
        Setting(64, 32, 32, 0, 8, 3, 128),
        Setting(64, 32, 128, 32, 8, 3, 255),
    ),
    ("image", "ieee"): (Setting(32, 32, 32, 0, 8, 2, 255),),
    ("text", "half"): (
        Setting(64, 64, 64, 0, 8, 3, 255),
        Setting(64, 128, 32, 0, 8, 3, 128),
        Setting(64, 128, 64, 0, 8, 3, 255),
        Setting(64, 128, 128, 0, 8, 3, 255),
        Setting(64, 128, 128, 32, 8, 3, 255),
    ),
    ("text", "tf32"): (
        Setting(64, 32, 64, 0, 8, 3, 255),
        Setting(64, 32, 32, 0, 8, 3, 255),
        Setting(64, 64, 128, 32, 8, 2, 255),
    ),
    ("text", "ieee"): (Setting(16, 64, 64, 0, 8, 2, 255), Setting(16, 64, 32, 0, 4, 2, 255)),
}
# Channels that a program of the kernels over rows takes at a time, and partial sums.
ROW = {"BC": 512, "num_warps": 4, "maxnreg": 255}
SUMS = 8


class View(NamedTuple):
    """How an image lies in memory, ``strides`` being those of batch, channels, rows and pixels.

    In CHANNELS_LAST the first and the last are in units of ``vec`` elements, of which 16 bytes hold a multiple.
    """

    layout: int
    vec: int
    strides: tuple[int, int, int, int]


def view(image: Tensor, *multiples: int) -> View:
    """``multiples`` are other numbers that ``vec`` has to divide."""
    s_b, s_c, s_h, s_w = (0 if size == 1 else stride for size, stride in zip(image.shape, image.stride(), strict=True))
    channels, height, width = image.shape[1:]
    s_n = s_h if width == 1 else s_w
    if height == 1 or width == 1 or s_h == width * s_w:
        if s_c == 1 or channels == 1:
            vec = gcd(16 // image.element_size(), s_b, s_n, *multiples)
            return View(CHANNELS_LAST.value, vec, (s_b // vec, 1, 0, s_n // vec))
        if s_n == 1 or height * width == 1:
            return View(NCHW.value, 1, (s_b, s_c, 0, 1))
    return View(STRIDED.value, 1, (s_b, s_c, s_h, s_w))


def setting_of(kernel: str, kind: str, tokens: int, arch: int, access: str, idle: bool) -> Setting:
    """The launch setting.

    Args:
        kernel: ``"fwd"``, ``"image"`` or ``"text"``.
        kind: ``"half"``, ``"tf32"`` or ``"ieee"``.
        tokens: K.
        arch: 10 times the compute capability.
        access: ``"wide"``; ``"narrow"`` where an access takes one element, so that a thread needs many addresses;
            ``"strided"`` where each pixel's has to be computed.
        idle: large tiles would leave processors idle.
    """
    general, *fitted = SETTINGS[kernel, kind]
    if arch < 90 or access == "strided" or not fitted:
        return general
    if tokens <= fitted[0].BK or (idle and kernel != "image"):
        return fitted[0]
    if access == "narrow":
        return general
    enough = [setting for setting in fitted if tokens <= setting.BK + setting.BK2]
    # Else blocks of tokens, the largest there are.
    return enough[0] if enough else max((general, *(s for s in fitted if not s.BK2)), key=lambda s: s.BK)


def _access(*views: View) -> str:
    if any(v.layout == STRIDED.value for v in views):
        return "strided"
    return "narrow" if any(v.layout == CHANNELS_LAST.value and v.vec == 1 for v in views) else "wide"


def _blocks(tokens: int, setting: Setting) -> int:
    """Of tokens, a program each."""
    return 1 if tokens <= setting.BK + setting.BK2 else cdiv(tokens, setting.BK)


def _kind(image: Tensor) -> str:
    return precision_of(image.dtype) if image.dtype == torch.float32 else "half"


@cache
def _processor(index: int | None) -> tuple[int, int]:
    """Of the device: architecture, 10 times the compute capability, and the number of multiprocessors."""
    if index is None:  # the interpreter's CPU
        return 90, 132
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


def _copied(text: Tensor) -> bool:
    return text.stride(2) != 1 and not text.is_contiguous()


def _rows(text: Tensor) -> Tensor:
    return text.contiguous() if _copied(text) else text


class Shares(NamedTuple):
    """How the gradient of the text is shared out: tiles of pixels, columns of channels, blocks of tokens, and the
    programs that each have a part of the tiles."""

    setting: Setting
    tiles: int
    columns: int
    blocks: int
    programs: int


def _text_shares(image: Tensor, tokens: int, g: View, arch: int, processors: int) -> Shares:
    batch, channels, height, width = image.shape

    def setting(idle: bool) -> Setting:
        return setting_of("text", _kind(image), tokens, arch, _access(g, view(image)), idle)

    # More than 8 partial sums are not worth the large tiles.
    s = setting(False)
    s = setting(8 * batch * cdiv(channels, s.BC) * _blocks(tokens, s) < processors)
    tiles, columns, blocks = cdiv(height * width, s.BN), cdiv(channels, s.BC), _blocks(tokens, s)
    return Shares(s, tiles, columns, blocks, max(1, min(tiles, processors // (batch * columns * blocks))))


def _direct(programs: int, normalize: bool) -> bool:
    """Is what a single program adds up the gradient of the text already?"""
    return programs == 1 and not normalize


def launches(
    image: Tensor,
    text: Tensor,
    normalize: bool,
    concat: bool,
    grad: Tensor,
    processor: tuple[int, int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and a ``"copy"`` where PyTorch makes one.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result; ``processor`` is what
    ``_processor`` says, by default of the image's device.
    """
    copies = ["copy"] * _copied(text)
    g = view(grad, text.shape[1], image.shape[1] if concat else 0)
    programs = _text_shares(image, text.shape[1], g, *(processor or _processor(image.device.index))).programs
    unit = ["score_map_unit_kernel"] * normalize
    total = ["score_map_bwd_sum_kernel"] * (not _direct(programs, normalize))
    bwd = *copies, *unit, "score_map_bwd_image_kernel", "score_map_bwd_text_kernel", *total
    return {"fwd": (*copies, "score_map_fwd_kernel"), "bwd": bwd}


def score_map_fwd(image: Tensor, text: Tensor, normalize: bool, concat: bool, out: Tensor) -> None:
    """Fills ``out``, ``[B, K, H, W]`` or ``[B, C + K, H, W]``, from ``[B, C, H, W]`` and ``[B, K, C]``."""
    text = _rows(text)
    batch, channels, height, width = image.shape
    tokens, pixels = text.shape[1], height * width
    x, o = view(image), view(out, tokens, channels if concat else 0)
    arch, processors = _processor(image.device.index)

    def setting(idle: bool) -> Setting:
        return setting_of("fwd", _kind(image), tokens, arch, _access(x, o), idle)

    s = setting(False)
    s = setting(batch * cdiv(pixels, s.BN) * _blocks(tokens, s) < processors)
    tiles, blocks = cdiv(pixels, s.BN), _blocks(tokens, s)
    with on_device_of(image):
        score_map_fwd_kernel[(batch * tiles * blocks,)](
            image,
            text,
            out,
            pixels,
            width,
            tokens // o.vec,
            channels,
            tiles,
            blocks,
            *x.strides,
            *text.stride()[:2],
            *o.strides,
            LAYOUT=x.layout,
            LAYOUT_OUT=o.layout,
            VEC=x.vec,
            VEC_OUT=o.vec,
            NORMALIZE=normalize,
            CONCAT=concat,
            PRECISION=precision_of(image.dtype),
            **s._asdict(),
        )


def score_map_bwd(
    grad: Tensor, image: Tensor, text: Tensor, normalize: bool, concat: bool, dimage: Tensor, dtext: Tensor
) -> None:
    """Fills ``dimage`` and ``dtext``, of the shapes of ``image`` and ``text``; ``grad`` is that of ``out``."""
    text = _rows(text)
    g = view(grad, text.shape[1], image.shape[1] if concat else 0)
    modes = {"NORMALIZE": normalize, "CONCAT": concat, "PRECISION": precision_of(image.dtype)}
    with on_device_of(image):
        inverse = _bwd_image(grad, image, text, dimage, g, modes)
        _bwd_text(grad, image, text, inverse, dtext, g, modes)


def _bwd_image(grad: Tensor, image: Tensor, text: Tensor, dimage: Tensor, g: View, modes: dict) -> Tensor | None:
    """Fills ``dimage``; returns 1 / |x| of the pixels, if they are to be normalised."""
    batch, channels, height, width = image.shape
    tokens, pixels = text.shape[1], height * width
    x, o = view(image), view(dimage)
    arch, processors = _processor(image.device.index)
    unit, inverse = text, None
    if modes["NORMALIZE"]:
        unit = torch.empty(text.shape, dtype=text.dtype, device=text.device)
        inverse = torch.empty(batch, pixels, dtype=torch.float32, device=text.device)
        score_map_unit_kernel[(batch * tokens,)](text, unit, tokens, channels, *text.stride()[:2], **ROW)
    s = setting_of("image", _kind(image), tokens, arch, _access(g, x, o), False)
    tiles = cdiv(pixels, s.BN)
    programs = max(1, min(cdiv(channels, s.BC), processors // (batch * tiles)))
    score_map_bwd_image_kernel[(batch * tiles * programs,)](
        grad,
        image,
        unit,
        dimage,
        inverse,
        pixels,
        width,
        tokens // g.vec,
        channels,
        tiles,
        programs,
        *g.strides,
        *x.strides,
        *unit.stride()[:2],
        *o.strides,
        ONE=tokens <= s.BK + s.BK2,
        LAYOUT_GRAD=g.layout,
        LAYOUT=x.layout,
        LAYOUT_OUT=o.layout,
        VEC_GRAD=g.vec,
        VEC=x.vec,
        VEC_OUT=o.vec,
        **modes,
        **s._asdict(),
    )
    return inverse


def _bwd_text(
    grad: Tensor, image: Tensor, text: Tensor, inverse: Tensor | None, dtext: Tensor, g: View, modes: dict
) -> None:
    """Fills ``dtext``."""
    batch, channels, height, width = image.shape
    tokens, pixels = text.shape[1], height * width
    x = view(image)
    s, tiles, columns, blocks, programs = _text_shares(image, tokens, g, *_processor(image.device.index))
    direct = _direct(programs, modes["NORMALIZE"])
    sums = dtext if direct else torch.empty(programs, *dtext.shape, dtype=torch.float32, device=dtext.device)
    score_map_bwd_text_kernel[(batch * programs * blocks * columns,)](
        grad,
        image,
        inverse,
        sums,
        batch,
        pixels,
        width,
        tokens // g.vec,
        channels,
        tiles,
        programs,
        blocks,
        columns,
        *g.strides,
        *x.strides,
        LAYOUT_GRAD=g.layout,
        LAYOUT=x.layout,
        VEC_GRAD=g.vec,
        VEC=x.vec,
        **modes,
        **s._asdict(),
    )
    if not direct:
        score_map_bwd_sum_kernel[(batch * tokens,)](
            sums,
            text,
            dtext,
            batch * tokens,
            tokens,
            channels,
            programs,
            *text.stride()[:2],
            BP=SUMS,
            NORMALIZE=modes["NORMALIZE"],
            **ROW,
        )


def compile_cases() -> Iterator[Case]:
    """Every setting in each layout for which ``setting_of`` takes it; normalised and concatenated, which is most."""
    for (kernel, kind), (general, *fitted) in SETTINGS.items():
        for dtype in {"half": ("bf16", "fp16")}.get(kind, ("fp32",)):
            precision = "tf32" if kind == "tf32" else "ieee"
            for access in ("narrow", "nchw", "strided"):
                for one in (True, False) if kernel == "image" else (True,):
                    if dtype != "fp16" or access == "narrow":
                        yield _case(kernel, dtype, precision, general, access, one)
            for i, setting in enumerate(fitted):
                for access in ("narrow" if i == 0 else "wide", "nchw", "aligned"):
                    if dtype != "fp16" or access in ("narrow", "wide"):
                        yield replace(_case(kernel, dtype, precision, setting, access), archs=(90, 100))
    for dtype in ("bf16", "fp16", "fp32"):
        for kernel in (score_map_unit_kernel, score_map_bwd_sum_kernel):
            names = {"text": f"*{dtype}", "unit": f"*{dtype}", "dtext": f"*{dtype}", "partials": "*fp32"}
            constexprs = {"BC": ROW["BC"], "BP": SUMS, "NORMALIZE": True}
            constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
            signature = {name: names.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
            divisible = tuple(name for name in signature if name in (*names, "C", "s_tb", "s_tk"))
            name = f"{kernel.__name__.removeprefix('score_map_').removesuffix('_kernel')} {dtype}"
            yield Case(kernel, name, signature, constexprs, divisible, ROW["num_warps"], 3, ROW["maxnreg"])


def _case(kernel: str, dtype: str, precision: str, setting: Setting, access: str, one: bool = True) -> Case:
    """``access`` is that of out or grad: ``"narrow"``, ``"wide"`` and ``"aligned"`` are channels_last."""
    function = {"fwd": score_map_fwd_kernel, "image": score_map_bwd_image_kernel, "text": score_map_bwd_text_kernel}
    function = function[kernel]
    layout = {"nchw": NCHW, "strided": STRIDED}.get(access, CHANNELS_LAST).value
    most = 4 if dtype == "fp32" else 8
    vec = {"wide": 2, "aligned": most}.get(access, 1)
    most = most if layout == CHANNELS_LAST.value else 1
    *tile, num_warps, num_stages, maxnreg = setting
    constexprs = {
        **dict(zip(TILE, tile, strict=True)),
        **{"LAYOUT": layout, "LAYOUT_GRAD": layout, "LAYOUT_OUT": min(layout, NCHW.value)},
        **{"VEC": most, "VEC_GRAD": vec, "VEC_OUT": vec if kernel == "fwd" else most},
        **{"ONE": one, "NORMALIZE": True, "CONCAT": True, "PRECISION": precision},
    }
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    pointers = dict.fromkeys(("image", "text", "out", "grad", "dimage"), f"*{dtype}")
    pointers.update(inverse="*fp32", dtext="*fp32")
    signature = {name: pointers.get(name, "i32") for name in function.arg_names if name not in constexprs}
    divisible = [*pointers, "C", "s_tb", "s_tk"]
    if access == "nchw":
        divisible += ["N", "s_xb", "s_xc", "s_ob", "s_oc", "s_gb", "s_gc"]
    size = "x".join(map(str, tile[:3])) + (f"+{setting.BK2}" if setting.BK2 else "")
    limit = "" if maxnreg == 255 else f" {maxnreg} registers"
    return Case(
        function,
        f"{kernel} {dtype} {precision} {size} {access}" + ("" if one else " in blocks") + limit,
        signature,
        constexprs,
        tuple(name for name in signature if name in divisible),
        num_warps,
        num_stages,
        maxnreg,
    )
