"""Former2Conv: ``out = image + softmax(scale image K^T) V`` per head, forward and backward.

A program owns one head of one image and walks over tiles of pixels, while the tokens' keys and values stay on chip. Few
tokens are one or two blocks, and the softmax is exact in one pass; many are a loop with a running maximum. The backward
saves nothing, it computes the probabilities again: in one kernel for few tokens; for many, one kernel has a tile of
pixels for dx and leaves behind lse and delta, with which another has a block of tokens for dK and dV. What several
programs add up for dK and dV is summed by a kernel of its own, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from fusekern.kernels.aot import Case
from fusekern.kernels.former2conv_bwd import (
    former2conv_bwd_dkv_kernel,
    former2conv_bwd_dx_kernel,
    former2conv_bwd_dx_online_kernel,
    former2conv_bwd_kernel,
    former2conv_bwd_sum_kernel,
)
from fusekern.kernels.former2conv_fwd import former2conv_fwd_kernel, former2conv_fwd_online_kernel
from fusekern.kernels.launching import cdiv, next_power_of_2, on_device_of, precision_of
from torch import Tensor


class Setting(NamedTuple):
    """How a kernel is launched for up to ``tokens`` tokens.

    Args:
        tokens: the most that it takes.
        BN: pixels of a tile.
        BK: tokens of a block; BK2, of a second one.
        warps: of a program.
        stages: of the loop's pipeline.
        resident: programs that a multiprocessor holds, at 255 registers a thread two of 4 warps or one of 8.
        RELOAD: the residual is loaded again, from L2, instead of being held in registers.
        BC: channels of a chunk in ``dot_channels``.
        archs: where it does not spill.
    """

    tokens: float
    BN: int
    BK: int
    BK2: int = 0
    warps: int = 4
    stages: int = 2
    resident: int = 2
    RELOAD: bool = False
    BC: int = 256
    archs: tuple[int, ...] = (80, 90, 100)


ANY = float("inf")
HOPPER_ON, HOPPER, AMPERE, BLACKWELL = (90, 100), (90,), (80,), (100,)
# By kernel, then by kind of product, which is 16 bits ("half") or either precision of fp32, and head dimension, of
# which 64 stands for all below. None spills (docs/aot.md); sm_80's fit into sm_86's 99 KiB of shared memory.
SETTINGS: dict[str, dict[tuple[str, int], tuple[Setting, ...]]] = {
    "fwd": {
        ("half", 64): (
            Setting(32, 64, 32, stages=3, resident=4),
            Setting(64, 64, 64, stages=3, resident=3),
            Setting(128, 64, 128, resident=3),
            Setting(160, 64, 128, 32),
            Setting(192, 64, 128, 64, archs=HOPPER_ON),
        ),
        ("half", 128): (Setting(32, 64, 32), Setting(64, 64, 64), Setting(128, 64, 128)),
        ("half", 256): (
            Setting(32, 64, 32, warps=8, resident=1),
            Setting(64, 64, 64, warps=8, resident=1, archs=HOPPER_ON),
        ),
        ("tf32", 64): (Setting(32, 64, 32), Setting(64, 64, 64)),
        ("tf32", 128): (Setting(32, 64, 32, warps=8, resident=1, RELOAD=True),),
    },
    "fwd online": {
        ("half", 64): (Setting(ANY, 128, 64, warps=8, archs=(80, 90)), Setting(ANY, 64, 64, archs=BLACKWELL)),
        ("half", 128): (
            Setting(ANY, 128, 64, warps=8, archs=HOPPER_ON),
            Setting(ANY, 64, 32, RELOAD=True, archs=AMPERE),
        ),
        ("half", 256): (
            Setting(ANY, 128, 32, warps=8, RELOAD=True, archs=HOPPER),
            Setting(ANY, 64, 64, warps=8, RELOAD=True, archs=BLACKWELL),
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=AMPERE),
        ),
        ("tf32", 64): (Setting(ANY, 128, 32, warps=8),),
        ("tf32", 128): (Setting(ANY, 64, 32, warps=8),),
        ("tf32", 256): (
            Setting(ANY, 64, 16, warps=8, RELOAD=True, archs=HOPPER),
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=BLACKWELL),
            Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True, archs=AMPERE),
        ),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 32, warps=8, stages=1, BC=32),),
        ("ieee", 256): (Setting(ANY, 32, 16, warps=8, stages=1, BC=16),),
    },
    "fwd strided": {
        ("half", 64): (Setting(ANY, 32, 32, warps=8, stages=1),),
        ("half", 128): (Setting(ANY, 32, 32, warps=8, stages=1),),
        ("half", 256): (Setting(ANY, 16, 16, warps=8, stages=1),),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 16, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 16, warps=8, stages=1, RELOAD=True, BC=16),),
    },
    "bwd": {
        ("half", 64): (
            Setting(32, 64, 32, stages=3, resident=3),
            Setting(64, 64, 64, archs=HOPPER_ON),
        ),
        ("half", 128): (Setting(32, 64, 32, warps=8, resident=1, archs=HOPPER_ON),),
        ("tf32", 64): (
            Setting(32, 64, 32, archs=HOPPER),
            Setting(32, 64, 32, warps=8, resident=1, archs=(80, 100)),
        ),
        ("ieee", 64): (Setting(32, 16, 32, warps=8, stages=1, RELOAD=True, BC=16),),
    },
    "bwd dx": {
        ("half", 64): (
            Setting(128, 64, 128),
            Setting(160, 128, 128, 32, warps=8, resident=1, RELOAD=True, archs=HOPPER),
        ),
        ("half", 128): (
            Setting(64, 64, 64, warps=8, resident=1, RELOAD=True),
            Setting(128, 64, 128, warps=8, resident=1, RELOAD=True, archs=HOPPER_ON),
        ),
    },
    "bwd dx online": {
        ("half", 64): (Setting(ANY, 128, 64, warps=8, archs=(80, 90)), Setting(ANY, 64, 64, archs=BLACKWELL)),
        ("half", 128): (
            Setting(ANY, 128, 64, warps=8, archs=HOPPER_ON),
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=AMPERE),
        ),
        ("half", 256): (
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=HOPPER),
            Setting(ANY, 64, 64, warps=8, RELOAD=True, archs=BLACKWELL),
            Setting(ANY, 32, 32, RELOAD=True, archs=AMPERE),
        ),
        ("tf32", 64): (Setting(ANY, 64, 32, archs=HOPPER_ON), Setting(ANY, 64, 32, warps=8, archs=AMPERE)),
        ("tf32", 128): (
            Setting(ANY, 64, 32, warps=8, RELOAD=True, archs=HOPPER_ON),
            Setting(ANY, 32, 32, warps=8, RELOAD=True, archs=AMPERE),
        ),
        ("tf32", 256): (Setting(ANY, 16, 32, warps=8, stages=1, RELOAD=True),),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 16, warps=8, stages=1, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 16, warps=8, stages=1, BC=16),),
    },
    "bwd dx strided": {
        ("half", 64): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True),),
        ("half", 128): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True),),
        ("half", 256): (Setting(ANY, 16, 16, warps=8, stages=1, RELOAD=True),),
        ("ieee", 64): (Setting(ANY, 32, 32, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 128): (Setting(ANY, 32, 16, warps=8, stages=1, RELOAD=True, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 16, warps=8, stages=1, RELOAD=True, BC=16),),
    },
    "bwd dkv": {
        ("half", 64): (
            Setting(128, 64, 128, warps=8, stages=3, resident=1, archs=HOPPER_ON),
            Setting(192, 64, 64, stages=3, archs=HOPPER_ON),
            Setting(ANY, 64, 128, warps=8, stages=3, resident=1, archs=HOPPER_ON),
            Setting(ANY, 32, 64, archs=AMPERE),
        ),
        ("half", 128): (Setting(ANY, 64, 64, warps=8, resident=1),),
        ("half", 256): (
            Setting(ANY, 64, 32, warps=8, resident=1, archs=HOPPER),
            Setting(ANY, 32, 64, warps=8, resident=1, archs=BLACKWELL),
            Setting(ANY, 32, 32, warps=8, resident=1, archs=AMPERE),
        ),
        ("tf32", 64): (Setting(ANY, 32, 64, archs=HOPPER_ON), Setting(ANY, 32, 32, archs=AMPERE)),
        ("tf32", 128): (Setting(ANY, 32, 32, warps=8, resident=1),),
        ("tf32", 256): (
            Setting(ANY, 16, 32, warps=8, stages=1, resident=1, archs=HOPPER_ON),
            Setting(ANY, 16, 16, warps=8, stages=1, resident=1, archs=AMPERE),
        ),
        ("ieee", 64): (Setting(ANY, 16, 32, warps=8, stages=1, resident=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 16, 16, warps=8, stages=1, resident=1, BC=16),),
        ("ieee", 256): (Setting(ANY, 16, 8, warps=8, stages=1, resident=1, BC=16),),
    },
    "bwd dkv strided": {
        ("half", 64): (Setting(ANY, 32, 32, warps=8, stages=1, resident=1),),
        ("half", 128): (Setting(ANY, 16, 32, warps=8, stages=1, resident=1),),
        ("half", 256): (Setting(ANY, 16, 16, warps=8, stages=1, resident=1),),
        ("ieee", 64): (Setting(ANY, 16, 16, warps=8, stages=1, resident=1, BC=16),),
        ("ieee", 128): (Setting(ANY, 16, 8, warps=8, stages=1, resident=1, BC=32),),
        ("ieee", 256): (Setting(ANY, 16, 4, warps=8, stages=1, resident=1, BC=16),),
    },
}
# How often the programs fill the GPU: more even out its multiprocessors, and fewer load the tokens less often. What
# the backward's programs add up is written and summed once more for each of them.
WAVES, WAVES_OF_SUMS = 4, 2
SUM_PROGRAMS, SUM_ELEMENTS = 16, 128


def padded_width(width: int) -> int:
    """The head dimension as the products need it."""
    return max(16, next_power_of_2(width))


def setting_of(kernel: str, kind: str, width: int, tokens: int, arch: int) -> Setting | None:
    """The first setting that takes so many tokens; ``None`` if a kernel with a loop over them must."""
    for setting in SETTINGS[kernel].get((kind, max(64, padded_width(width))), ()):
        if tokens <= setting.tokens and arch in setting.archs:
            return setting
    return None


def programs_of(tiles: int, rows: int, slots: int) -> int:
    """Among how many programs the tiles of each row, a head of an image, are shared out, to fill so many slots."""
    return min(tiles, max(1, slots // rows))


def strides_of(image: Tensor) -> tuple[int, int, int, int]:
    """Strides of ``[B, C, H, W]`` as ``pixel_offsets`` has them; those that nothing depends on are 0."""
    batch, _, height, width = image.shape
    s_b, s_c, s_h, s_w = image.stride()
    s_w = s_w if width > 1 else s_h
    return s_b if batch > 1 else 0, s_c, s_h, s_w if height * width > 1 else 0


def layout_of(image: Tensor, heads: int) -> str:
    """ "channels_last" or "nchw" where 16 bytes can be loaded at once, else "strided", which takes any strides."""
    _, channels, height, width = image.shape
    s_b, s_c, s_h, s_w = strides_of(image)
    rows_apart = height > 1 and width > 1 and s_h != width * s_w
    if rows_apart or image.data_ptr() % 16 or s_b % 16 or channels % 16 or channels // heads % 8:
        return "strided"
    if s_c == 1 and s_w % 16 == 0:
        return "channels_last"
    # Offsets within a tile have 32 bits.
    if s_w == 1 and s_c % 16 == 0 and height * width % 16 == 0 and channels // heads * s_c < 2**31:
        return "nchw"
    return "strided"


def _layout(heads: int, *images: Tensor) -> str:
    """The layout that they share; what a kernel has to know of two takes registers that it needs for the tokens."""
    layouts = {layout_of(image, heads) for image in images}
    return layouts.pop() if len(layouts) == 1 else "strided"


def _row_strides(tokens: Tensor) -> tuple[int, int]:
    return tokens.stride(0) if tokens.shape[0] > 1 else 0, tokens.stride(1) if tokens.shape[1] > 1 else 0


def _copied(tokens: Tensor) -> bool:
    """Are its channels not side by side, or not aligned?"""
    unit = 1 if tokens.shape[2] % 16 else 16
    return tokens.stride(2) != 1 or any(number % unit for number in (*_row_strides(tokens), tokens.data_ptr()))


def _rows(tokens: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """``[B, K, C]``, its channels side by side and aligned, copied if need be: it is small; and its first strides."""
    if not _copied(tokens):
        return tokens, _row_strides(tokens)
    _, count, channels = tokens.shape
    return tokens.clone(memory_format=torch.contiguous_format), (count * channels, channels)


def _kind(dtype: torch.dtype, layout: str) -> str:
    if dtype != torch.float32:
        return "half"
    return "ieee" if layout == "strided" else precision_of(dtype)


@lru_cache
def _device(device: torch.device) -> tuple[int, int]:
    """The architecture whose settings hold, and the number of multiprocessors."""
    if device.type != "cuda":
        return 90, 1
    properties = torch.cuda.get_device_properties(device)
    return {9: 90, 10: 100}.get(properties.major, 80), properties.multi_processor_count


def _options(setting: Setting, kind: str, width: int, **more: object) -> dict[str, object]:
    """The constexprs that all kernels have, and what Triton takes besides."""
    return {
        "D": width,
        "BN": setting.BN,
        "BD": padded_width(width),
        "BK": setting.BK,
        "BC": setting.BC,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "num_warps": setting.warps,
        "num_stages": setting.stages,
        **more,
    }


class Choice(NamedTuple):
    """A kernel by its name in ``SETTINGS``, and among how many programs the tiles of a row are shared out."""

    name: str
    setting: Setting
    tiles: int
    programs: int


def _choose_fwd(image: Tensor, count: int, heads: int, layout: str, arch: int, processors: int) -> Choice:
    batch, channels, height, width = image.shape
    kind, head, size = _kind(image.dtype, layout), channels // heads, height * width
    fast = layout != "strided"
    setting = setting_of("fwd", kind, head, count, arch) if fast else None
    if setting:
        tiles = cdiv(size, setting.BN)
        programs = programs_of(tiles, batch * heads, WAVES * processors * setting.resident)
        return Choice("fwd", setting, tiles, programs)
    name = "fwd online" if fast else "fwd strided"
    setting = setting_of(name, kind, head, count, arch)
    tiles = cdiv(size, setting.BN)
    return Choice(name, setting, tiles, tiles)


def _choose_bwd(image: Tensor, count: int, heads: int, layout: str, arch: int, processors: int) -> list[Choice]:
    """One kernel for few tokens; for many two, of which the last adds up the tokens' gradients."""
    batch, channels, height, width = image.shape
    kind, head, size, rows = _kind(image.dtype, layout), channels // heads, height * width, batch * heads
    fast = layout != "strided"
    setting = setting_of("bwd", kind, head, count, arch) if fast else None
    if setting:
        tiles = cdiv(size, setting.BN)
        return [Choice("bwd", setting, tiles, programs_of(tiles, rows, WAVES_OF_SUMS * processors * setting.resident))]
    setting = setting_of("bwd dx", kind, head, count, arch) if fast else None
    if setting:
        tiles = cdiv(size, setting.BN)
        dx = Choice("bwd dx", setting, tiles, programs_of(tiles, rows, WAVES * processors * setting.resident))
    else:
        name = "bwd dx online" if fast else "bwd dx strided"
        setting = setting_of(name, kind, head, count, arch)
        tiles = cdiv(size, setting.BN)
        dx = Choice(name, setting, tiles, tiles)
    name = "bwd dkv" if fast else "bwd dkv strided"
    setting = setting_of(name, kind, head, count, arch)
    tiles, blocks = cdiv(size, setting.BN), cdiv(count, setting.BK)
    programs = programs_of(tiles, rows * blocks, WAVES_OF_SUMS * processors * setting.resident)
    return [dx, Choice(name, setting, tiles, programs)]


def launches(
    image: Tensor, key: Tensor, value: Tensor, heads: int, grad: Tensor, device: tuple[int, int] | None = None
) -> dict[str, tuple[str, ...]]:
    """What forward and backward launch, in order: kernels by name, and a ``"copy"`` where PyTorch makes one.

    Nothing of the tensors is read: they may be on ``meta``. ``grad`` is that of the result, which is taken to lie as
    densely as it can, in channels_last if the channels of the image are side by side, and ``dimage`` so too.
    ``device`` is what ``_device`` says, by default of the image's.
    """
    last = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format
    dense = torch.empty(image.shape, dtype=image.dtype, device="meta", memory_format=last)
    given = key.shape[1], heads
    device = device or _device(image.device)
    copies = ["copy"] * (_copied(key) + _copied(value))
    fwd = _choose_fwd(image, *given, _layout(heads, image, dense), *device)
    bwd = _choose_bwd(image, *given, _layout(heads, grad, image, dense), *device)
    total = ["former2conv_bwd_sum_kernel"] * (bwd[-1].programs > 1)
    return {
        "fwd": (*copies, KERNELS[fwd.name].__name__),
        "bwd": (*copies, *(KERNELS[choice.name].__name__ for choice in bwd), *total),
    }


def former2conv_fwd(image: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, out: Tensor) -> None:
    """Fills ``out`` ``[B, C, H, W]``."""
    batch, channels, height, width = image.shape
    size, count, head = height * width, key.shape[1], channels // heads
    layout = _layout(heads, image, out)
    kind = _kind(image.dtype, layout)
    name, setting, tiles, programs = _choose_fwd(image, count, heads, layout, *_device(image.device))
    with on_device_of(image):
        (key, key_strides), (value, value_strides) = _rows(key), _rows(value)
        strides = *strides_of(image), *key_strides, *value_strides, *strides_of(out)
        if name == "fwd":
            options = _options(setting, kind, head, LAYOUT=layout, RELOAD=setting.RELOAD, BK2=setting.BK2)
            former2conv_fwd_kernel[(batch * heads * programs,)](
                *(image, key, value, out, scale, size, width, count, heads, tiles, programs), *strides, **options
            )
        else:
            options = _options(setting, kind, head, LAYOUT=layout, RELOAD=setting.RELOAD)
            former2conv_fwd_online_kernel[(batch * heads * tiles,)](
                *(image, key, value, out, scale, size, width, count, heads, tiles), *strides, **options
            )


def former2conv_bwd(
    grad: Tensor,
    image: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    dimage: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """Fills ``dimage`` ``[B, C, H, W]``, ``dkey`` and ``dvalue`` ``[B, K, C]``, which are contiguous."""
    batch, channels, height, width = image.shape
    size, count, head = height * width, key.shape[1], channels // heads
    layout = _layout(heads, grad, image, dimage)
    kind, rows = _kind(image.dtype, layout), batch * heads
    *first, (name, setting, tiles, programs) = _choose_bwd(image, count, heads, layout, *_device(image.device))
    with on_device_of(image):
        (key, key_strides), (value, value_strides) = _rows(key), _rows(value)
        strides = *strides_of(grad), *strides_of(image), *key_strides, *value_strides
        sums = _sums(dkey, dvalue, programs)
        if name == "bwd":
            former2conv_bwd_kernel[(rows * programs,)](
                *(grad, image, key, value, dimage, *sums, scale),
                *(batch, size, width, count, heads, tiles, programs, *strides, *strides_of(dimage)),
                **_options(setting, kind, head, LAYOUT=layout, RELOAD=setting.RELOAD),
            )
        else:
            lse, delta = torch.empty((2, batch, heads, size), dtype=torch.float32, device=image.device)
            inputs = grad, image, key, value
            dx = first[0]
            if dx.name == "bwd dx":
                former2conv_bwd_dx_kernel[(rows * dx.programs,)](
                    *(*inputs, dimage, lse, delta, scale, size, width, count, heads, dx.tiles, dx.programs),
                    *(*strides, *strides_of(dimage)),
                    **_options(dx.setting, kind, head, LAYOUT=layout, RELOAD=dx.setting.RELOAD, BK2=dx.setting.BK2),
                )
            else:
                former2conv_bwd_dx_online_kernel[(rows * dx.tiles,)](
                    *(*inputs, dimage, lse, delta, scale, size, width, count, heads, dx.tiles),
                    *(*strides, *strides_of(dimage)),
                    **_options(dx.setting, kind, head, LAYOUT=layout, RELOAD=dx.setting.RELOAD),
                )
            blocks = cdiv(count, setting.BK)
            former2conv_bwd_dkv_kernel[(rows * blocks * programs,)](
                *(*inputs, lse, delta, *sums, scale),
                *(batch, size, width, count, heads, tiles, programs, blocks, *strides),
                **_options(setting, kind, head, LAYOUT=layout),
            )
        if programs > 1:
            grid = cdiv(dkey.numel(), SUM_ELEMENTS), 2
            former2conv_bwd_sum_kernel[grid](
                *(sums, dkey, dvalue, dkey.numel(), programs), BP=SUM_PROGRAMS, BS=SUM_ELEMENTS, num_warps=4
            )


def _sums(dkey: Tensor, dvalue: Tensor, programs: int) -> Tensor | tuple[Tensor, Tensor]:
    """What the programs write their sums to, ``[2, programs, B, K, C]``; a single program writes the result."""
    if programs == 1:
        return dkey, dvalue
    return torch.empty((2, programs, *dkey.shape), dtype=torch.float32, device=dkey.device)


KERNELS = {
    "fwd": former2conv_fwd_kernel,
    "fwd online": former2conv_fwd_online_kernel,
    "fwd strided": former2conv_fwd_online_kernel,
    "bwd": former2conv_bwd_kernel,
    "bwd dx": former2conv_bwd_dx_kernel,
    "bwd dx online": former2conv_bwd_dx_online_kernel,
    "bwd dx strided": former2conv_bwd_dx_online_kernel,
    "bwd dkv": former2conv_bwd_dkv_kernel,
    "bwd dkv strided": former2conv_bwd_dkv_kernel,
}


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for kernel, table in SETTINGS.items():
        for (kind, width), settings in table.items():
            for setting in settings:
                if kernel.endswith("strided"):
                    yield _case(kernel, kind, "bf16" if kind == "half" else "fp32", width - 1, setting, "strided")
                    continue
                for layout in ("channels_last", "nchw"):
                    yield _case(kernel, kind, "bf16" if kind == "half" else "fp32", width, setting, layout)
                if (kind, width) == ("half", 64):
                    yield _case(kernel, kind, "fp16", 64, setting, "channels_last")
                    yield _case(kernel, kind, "bf16", 32, setting, "channels_last")
                    yield _case(kernel, kind, "bf16", 16, setting, "channels_last")
    for dtype in ("bf16", "fp32"):
        types = {"sums": "*fp32", "dkey": f"*{dtype}", "dvalue": f"*{dtype}", "size": "i32", "programs": "i32"}
        blocks = {"BP": SUM_PROGRAMS, "BS": SUM_ELEMENTS}
        divisible = "sums", "dkey", "dvalue", "size"
        yield Case(former2conv_bwd_sum_kernel, f"bwd sum {dtype}", types, blocks, divisible, num_warps=4)


def _case(name: str, kind: str, dtype: str, width: int, setting: Setting, layout: str) -> Case:
    kernel = KERNELS[name]
    options = _options(setting, kind, width, LAYOUT=layout, RELOAD=setting.RELOAD, BK2=setting.BK2)
    unit = {"channels_last": ("s_xc", "s_gc", "s_oc"), "nchw": ("s_xw", "s_gw", "s_ow"), "strided": ()}[layout]
    constexprs = {key: value for key, value in {**options, **dict.fromkeys(unit, 1)}.items() if key in kernel.arg_names}
    pointers = dict.fromkeys(("image", "key", "value", "out", "grad", "dimage"), f"*{dtype}")
    # Sums, but for fp16, which stands for a single program.
    pointers |= dict.fromkeys(("dkey", "dvalue"), "*fp16" if dtype == "fp16" else "*fp32")
    pointers |= {"lse": "*fp32", "delta": "*fp32"}
    types = {param.name: "i32" for param in kernel.params} | pointers | {"scale": "fp32"}
    odd = {"channels_last": {"N", "W"}, "nchw": {"W"}, "strided": set(types) - {"lse", "delta"}}[layout] | {"scale"}
    free = {param.name for param in kernel.params if param.do_not_specialize}
    return Case(
        kernel,
        f"{name} {kind if kind != 'half' else dtype} {width} K<={setting.tokens} {layout} {setting.archs[0]}",
        {key: types[key] for key in kernel.arg_names if key not in constexprs},
        constexprs,
        tuple(key for key in kernel.arg_names if key not in constexprs and key not in odd and key not in free),
        num_warps=setting.warps,
        num_stages=setting.stages,
        archs=setting.archs,
    )
