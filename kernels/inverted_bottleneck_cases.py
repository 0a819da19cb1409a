"""What the launchers of the inverted bottleneck can choose, for the gate in ``fusekern.kernels.aot``."""

from __future__ import annotations

from collections.abc import Iterator

from fusekern.kernels.aot import Case
from fusekern.kernels.inverted_bottleneck_bwd import (
    inverted_bottleneck_bwd_expand_kernel,
    inverted_bottleneck_bwd_image_kernel,
    inverted_bottleneck_bwd_project_kernel,
    inverted_bottleneck_bwd_weight_kernel,
    inverted_bottleneck_reduce_kernel,
    inverted_bottleneck_sum_kernel,
)
from fusekern.kernels.inverted_bottleneck_fwd import inverted_bottleneck_apply_kernel, inverted_bottleneck_fwd_kernel
from fusekern.kernels.inverted_bottleneck_places import (
    AT_ONCE,
    COUNTERS,
    FEW,
    FLAT,
    MANY,
    SETTINGS,
    WHOLE,
    Setting,
    Tile,
)
from triton.runtime.jit import JITFunction

# What the sums of a norm's backward become, and what that takes.
SUMMED = "vectors", "gamma", "sums", "coef", "dweight", "dbias"


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for (kind, load), setting in SETTINGS.items():
        dtypes = {"half": ("bf16", "fp16") if load == "medium" else ("bf16",), "odd half": ("bf16",)}
        for dtype in ("ieee", "tf32") if kind == "odd fp32" else dtypes.get(kind, (kind,)):
            shapes = ((200, "channels_last"), (512, "nchw")) if kind.startswith("odd") else ((512, "channels_last"),)
            for C, layout in shapes:
                yield from _cases(kind if kind.startswith("odd") else load, dtype, setting, C, layout)
    for dtype, C, layout in (("bf16", 512, "channels_last"), ("ieee", 512, "channels_last"), ("bf16", 200, "nchw")):
        for mode in ("affine", "residual", "gradient"):
            yield _case(f"apply {mode}", inverted_bottleneck_apply_kernel, dtype, FLAT, C, layout, MODE=mode)
        kernel = inverted_bottleneck_reduce_kernel
        yield _case("reduce", kernel, dtype, FLAT, C, layout, (*SUMMED, "out"), BC=FLAT.BO)
        yield _case("reduce whole", kernel, dtype, WHOLE, C, layout, ("partial",), BC=WHOLE.BO)
    for C in (512, 200):
        few, many = Tile(0, 0, 0, 4, 3), Tile(128, 0, 0, 8, 3)
        widths = {"BT": MANY[0], "BS": MANY[1]}
        for finish in (False, True):
            name = "sum finish" if finish else "sum"
            yield _case(f"{name} few", inverted_bottleneck_sum_kernel, "bf16", few, C, FINISH=finish)
            yield _case(f"{name} many", inverted_bottleneck_sum_kernel, "bf16", many, C, FINISH=finish, **widths)


def _cases(name: str, dtype: str, setting: Setting, C: int, layout: str) -> Iterator[Case]:
    def case(what: str, kernel: JITFunction, tile: Tile, **more: object) -> Case:
        # As in a model of 16 bits and under autocast.
        norms = dtype if name == "medium" else "fp32"
        return _case(f"{what} {name}", kernel, dtype, tile, C, layout, norms=norms, **more)

    before, running = ("affine",), ("mean", "var", "gamma", "beta")
    behind = "mean_out", "var_out", "gamma_out", "beta_out"
    seen = "partial", "stats", "vectors", "arrived"
    kernel, tile = inverted_bottleneck_fwd_kernel, setting.fwd
    none = *before, *running, *behind, *seen[1:], "residual"
    yield case("fwd expand", kernel, tile, none=none)
    none = *running, *behind[:2], "stats", "residual", "fresh"
    yield case("fwd project", kernel, tile, none=none)
    yield case("fwd project apart", kernel, tile, none=(*none, *behind[2:], "vectors", "arrived"))
    none = *seen, "fresh"
    yield case("infer expand", kernel, tile, none=(*before, *running, "residual", *none), NORM="relu6")
    yield case("infer project", kernel, tile, none=(*before, *none), NORM="residual")
    weight = dict(zip(("WP", "WO", "WK"), setting.weight[:3], strict=True))
    kernel = inverted_bottleneck_bwd_project_kernel
    yield case("bwd project", kernel, setting.hidden, out=dtype, **weight)
    yield case("bwd project parts", kernel, setting.hidden, none=(*SUMMED, "arrived"), **weight)
    yield case("bwd expand", inverted_bottleneck_bwd_expand_kernel, setting.image, out=dtype, **weight)
    yield case("bwd expand parts", inverted_bottleneck_bwd_expand_kernel, setting.image, **weight)
    yield case("bwd image", inverted_bottleneck_bwd_image_kernel, setting.image)
    kernel, centred = inverted_bottleneck_bwd_weight_kernel, dtype in ("ieee", "tf32")
    if centred:
        yield case("bwd weight", kernel, setting.weight, CENTRE="image")
        yield case("bwd weight gram", kernel, setting.weight, none=("sums",), CENTRE="both")
    else:
        yield case("bwd weight", kernel, setting.weight, none=("mean", "sums"))


def _case(
    name: str,
    kernel: JITFunction,
    dtype: str,
    tile: Tile,
    C: int = 512,
    layout: str = "channels_last",
    none: tuple[str, ...] = (),
    out: str = "fp32",
    norms: str = "fp32",
    **more: object,
) -> Case:
    """``none``: what is not given; ``out`` and ``norms``: dtypes of a weight's gradient and of the norms' parameters;
    ``more``: constexprs that differ."""
    last = layout == "channels_last"
    fp32 = dtype in ("ieee", "tf32")
    unit = ("s_xc", "s_gc", "s_rc", "s_oc") if last else ("s_xp", "s_gp", "s_rp", "s_op")
    constexprs = {
        **dict(zip(("BP", "BO", "BK"), tile[:3], strict=True)),
        "FINISH": False,
        "BC": tile.BK,
        "BT": FEW[0] if kernel is inverted_bottleneck_sum_kernel else AT_ONCE,
        "BS": FEW[1],
        "COUNTERS": 2 * COUNTERS,
        "C": C,
        "O": C,
        "LAST": last,
        "BATCH": True,
        "NORM": "none",
        "MODE": "affine",
        "CENTRE": fp32 if kernel is inverted_bottleneck_bwd_image_kernel else "none",
        "PRECISION": dtype if fp32 else "ieee",
        **dict.fromkeys(unit, 1),
        **dict.fromkeys(none),
        **more,
    }
    weight = "out" if kernel is inverted_bottleneck_bwd_weight_kernel else "out_w"
    maps = "image", "weight", "residual", "out", "grad", "other", "matrix", "total"
    types = {key: "*fp32" if fp32 else f"*{dtype}" for key in maps}
    types[weight] = "*fp32" if fp32 else f"*{out}"
    types |= dict.fromkeys(("affine", "mean", "partial", "product", "stats", *SUMMED), "*fp32")
    parameters = {f"{name}{place}" for name in ("mean", "var", "gamma", "beta") for place in ("", "_out")}
    if kernel is not inverted_bottleneck_fwd_kernel:  # there "mean" is of no parameter
        parameters = "gamma", "dweight", "dbias"
    types |= dict.fromkeys(parameters, "*fp32" if fp32 else f"*{norms}")
    types |= dict.fromkeys(("fresh", "arrived"), "*i32") | dict.fromkeys(("eps", "eps_out", "count"), "fp32")
    odd, setting = ("s_",) if not last or C % 16 else (), (tile.warps, tile.stages, tile.registers)
    return Case.of(kernel, f"{name} {dtype} {C} {layout}", constexprs, types, *setting, odd=odd)
