"""The vectors of a batch norm between the stages of an op; ``fusekern/ops/_batch_norm.py`` says what they are.

A stage leaves parts of its statistics and sums, one for each of its programs. Whoever joins them, in a fixed order,
goes on to what the norm makes of them: the last of these programs, if parts are few, or a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from fusekern.kernels.aot import Case
from fusekern.kernels.launching import cdiv, on_device_of
from torch import Tensor

BLOCK = 256  # channels of a program that joins nothing
# Parts and channels at a time of those that do: few parts, or many.
FEW, MANY = (16, 128), (256, 16)


@triton.jit
def affine_of(b_mean, b_var, weight, bias, eps, o_c, m_c):
    """Scale and shift; weight and bias may be none."""
    b_scale = tl.rsqrt(b_var + eps)
    if weight is not None:
        b_scale *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_shift = -b_mean * b_scale
    if bias is not None:
        b_shift += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_scale, b_shift


@triton.jit
def store_vectors(vectors, b_mean, b_var, b_unbiased, weight, bias, eps, o_c, m_c, C: tl.constexpr):
    """Columns of [5, C]; weight and bias may be none."""
    b_scale, b_shift = affine_of(b_mean, b_var, weight, bias, eps, o_c, m_c)
    tl.store(vectors + o_c, b_scale, mask=m_c)
    tl.store(vectors + C + o_c, b_shift, mask=m_c)
    tl.store(vectors + 2 * C + o_c, b_mean, mask=m_c)
    tl.store(vectors + 3 * C + o_c, b_var, mask=m_c)
    tl.store(vectors + 4 * C + o_c, b_unbiased, mask=m_c)


@triton.jit
def store_sums(partial, i_part, b_first, b_second, i_c, C: tl.constexpr, BC: tl.constexpr):
    """Into part ``i_part`` of [parts, 2, C]."""
    o_c = i_c + tl.arange(0, BC)
    partial += i_part * (2 * C)
    tl.store(partial + o_c, b_first, mask=o_c < C)
    tl.store(partial + C + o_c, b_second, mask=o_c < C)


@triton.jit
def last_to_arrive(counter, count):
    """Is this program the last of ``count``? What the others have stored lies behind the L1 cache."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit
def norm_fwd(mean, var, weight, bias, vectors, eps, o_c, C: tl.constexpr):
    """A norm that may be none; without mean and var its moments are in the vectors already."""
    if vectors is not None:
        m_c = o_c < C
        if mean is not None:
            b_mean = tl.load(mean + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_var = tl.load(var + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_unbiased = b_var
        else:
            b_mean = tl.load(vectors + 2 * C + o_c, mask=m_c, other=0.0)
            b_var = tl.load(vectors + 3 * C + o_c, mask=m_c, other=0.0)
            b_unbiased = tl.load(vectors + 4 * C + o_c, mask=m_c, other=0.0)
        store_vectors(vectors, b_mean, b_var, b_unbiased, weight, bias, eps, o_c, m_c, C)


@triton.jit(do_not_specialize=["eps1", "eps2", "eps3"])
def batch_norm_fwd_kernel(
    mean1,
    var1,
    weight1,
    bias1,
    vectors1,
    mean2,
    var2,
    weight2,
    bias2,
    vectors2,
    mean3,
    var3,
    weight3,
    bias3,
    vectors3,
    eps1,
    eps2,
    eps3,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    BC: tl.constexpr,
):
    """The vectors [5, C] of three norms; mean, var, weight and bias are [C], and none where there are none."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    norm_fwd(mean1, var1, weight1, bias1, vectors1, eps1, o_c, C1)
    norm_fwd(mean2, var2, weight2, bias2, vectors2, eps2, o_c, C2)
    norm_fwd(mean3, var3, weight3, bias3, vectors3, eps3, o_c, C3)


@triton.jit
def join_parts(
    partial,
    stats,
    vectors,
    weight,
    bias,
    parts,
    size,
    tiles,
    eps,
    i_c,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """``BC`` channels of what ``batch_norm_join_kernel`` does."""
    o_c = i_c + tl.arange(0, BC)
    m_c = o_c < C
    b_n = tl.zeros([BT], tl.float32)
    b_sum = tl.zeros([BT, BC], tl.float32)
    for i_t in range(0, parts, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = (o_t < parts)[:, None] & m_c[None, :]
        b_count = tl.where(o_t < parts, tl.minimum(size - o_t % tiles * BP, BP), 0).to(tl.float32)
        o_m = o_t.to(tl.int64)[:, None] * (2 * C) + o_c[None, :]
        b_m = tl.load(partial + o_m, mask=m_t, other=0.0, cache_modifier=".cg")  # [BT, BC]
        b_sum += b_m * b_count[:, None]
        b_n += b_count
    n = tl.sum(b_n, 0)
    b_mean = tl.sum(b_sum, 0) / n
    b_m2 = tl.zeros([BT, BC], tl.float32)
    for i_t in range(0, parts, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = (o_t < parts)[:, None] & m_c[None, :]
        b_count = tl.where(o_t < parts, tl.minimum(size - o_t % tiles * BP, BP), 0).to(tl.float32)
        o_m = o_t.to(tl.int64)[:, None] * (2 * C) + o_c[None, :]
        b_m = tl.load(partial + o_m, mask=m_t, other=0.0, cache_modifier=".cg")
        b_d = tl.where(m_t, b_m - b_mean[None, :], 0.0)
        b_m2 += tl.load(partial + o_m + C, mask=m_t, other=0.0, cache_modifier=".cg") + b_d * b_d * b_count[:, None]
    b_squares = tl.sum(b_m2, 0)
    if stats is not None:
        tl.store(stats + o_c, b_mean, mask=m_c)
        tl.store(stats + C + o_c, b_squares, mask=m_c)
    if vectors is not None:
        b_unbiased = b_squares / tl.maximum(n - 1.0, 1.0)
        store_vectors(vectors, b_mean, b_squares / n, b_unbiased, weight, bias, eps, o_c, m_c, C)


@triton.jit(do_not_specialize=["parts", "size", "tiles", "eps"])
def batch_norm_join_kernel(
    partial,
    stats,
    vectors,
    weight,
    bias,
    parts,
    size,
    tiles,
    eps,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """The moments of all pixels from those of tiles of ``BP`` pixels, [parts, 2, C] to stats, [2, C], or vectors.

    mean = sum_t n_t mean_t / n  and  m2 = sum_t (m2_t + n_t (mean_t - mean)^2).
    """
    i_c = tl.program_id(0) * BC
    join_parts(partial, stats, vectors, weight, bias, parts, size, tiles, eps, i_c, C, BP, BC, BT)


@triton.jit
def finish_sums(
    b_first,
    b_second,
    means,
    vectors,
    weight,
    sums,
    coef,
    dweight,
    dbias,
    count,
    eps,
    o_c,
    C: tl.constexpr,
    BATCH: tl.constexpr,
):
    """What a norm makes of the sums of channels ``o_c``; returns p, q and r of its gradient."""
    m_c = o_c < C
    b_p = b_first
    b_q = tl.zeros_like(b_first)
    b_r = tl.zeros_like(b_first)
    if sums is not None:
        tl.store(sums + o_c, b_first, mask=m_c)
        tl.store(sums + C + o_c, b_second, mask=m_c)
    if dbias is not None:
        tl.store(dbias + o_c, b_first.to(dbias.dtype.element_ty), mask=m_c)
    if coef is not None:
        b_rstd = tl.rsqrt(tl.load(vectors + 3 * C + o_c, mask=m_c, other=1.0) + eps)
        b_p = b_rstd
        if weight is not None:
            b_p *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(dweight + o_c, (b_second * b_rstd).to(dweight.dtype.element_ty), mask=m_c)
        if BATCH:
            if means is not None:
                b_first = tl.load(means + o_c, mask=m_c, other=0.0)
                b_second = tl.load(means + C + o_c, mask=m_c, other=0.0)
            else:
                b_first /= count
                b_second /= count
            b_q = -b_p * b_rstd * b_rstd * b_second
            b_r = -b_p * b_first
        tl.store(coef + o_c, b_p, mask=m_c)
        tl.store(coef + C + o_c, b_q, mask=m_c)
        tl.store(coef + 2 * C + o_c, b_r, mask=m_c)
        tl.store(coef + 3 * C + o_c, tl.load(vectors + 2 * C + o_c, mask=m_c, other=0.0), mask=m_c)
    return b_p, b_q, b_r


@triton.jit
def add_parts(
    partial,
    means,
    vectors,
    weight,
    sums,
    coef,
    dweight,
    dbias,
    parts,
    count,
    eps,
    i_c,
    C: tl.constexpr,
    BATCH: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """``BC`` channels of what ``batch_norm_bwd_kernel`` does."""
    o_c = i_c + tl.arange(0, BC)
    m_c = o_c < C
    b_sum = tl.zeros([BT, BC], tl.float32)
    b_product = tl.zeros([BT, BC], tl.float32)
    for i_t in range(0, parts, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = (o_t < parts)[:, None] & m_c[None, :]
        o_s = o_t.to(tl.int64)[:, None] * (2 * C) + o_c[None, :]
        b_sum += tl.load(partial + o_s, mask=m_t, other=0.0, cache_modifier=".cg")
        b_product += tl.load(partial + o_s + C, mask=m_t, other=0.0, cache_modifier=".cg")
    b_first = tl.sum(b_sum, 0)
    b_second = tl.sum(b_product, 0)
    finish_sums(b_first, b_second, means, vectors, weight, sums, coef, dweight, dbias, count, eps, o_c, C, BATCH)


@triton.jit(do_not_specialize=["parts", "count", "eps"])
def batch_norm_bwd_kernel(
    partial,  # [parts, 2, C]
    means,  # [2, C], or none
    vectors,  # [5, C], or none
    weight,  # [C], or none
    sums,  # [2, C], or none
    coef,  # [4, C], or none
    dweight,  # [C], or none
    dbias,  # [C], or none
    parts,
    count,
    eps,
    C: tl.constexpr,
    BATCH: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """The sums over the parts, and from them, or in their place the means, coef, dweight and dbias."""
    i_c = tl.program_id(0) * BC
    add_parts(partial, means, vectors, weight, sums, coef, dweight, dbias, parts, count, eps, i_c, C, BATCH, BC, BT)


def batch_norm_fwd(*norms: Tensor | float | None) -> None:
    """Mean, var, weight, bias, eps and ``vectors`` of each of three norms.

    The vectors are filled from mean and var or, where there are none, from the moments in them; where there are no
    vectors, there is no norm.
    """
    means, variances, weights, biases, eps, vectors = (norms[i::6] for i in range(6))
    widths = [0 if of is None else of.shape[1] for of in vectors]
    tensors = zip(means, variances, weights, biases, vectors, strict=True)
    with on_device_of(next(of for of in vectors if of is not None)):
        batch_norm_fwd_kernel[(cdiv(max(widths), BLOCK),)](
            *(tensor for norm in tensors for tensor in norm), *eps, *widths, BLOCK
        )


def batch_norm_bwd(
    sums: Tensor,
    means: Tensor | None,
    count: int,
    vectors: Tensor,
    weight: Tensor | None,
    eps: float,
    batch: bool,
    coef: Tensor,
    dweight: Tensor,
) -> None:
    """``coef`` and ``dweight`` from the sums of this process, and the ``means`` of all where there are more."""
    with on_device_of(sums):
        _launch_bwd(sums[None], means, count, None, coef, dweight, vectors, weight, eps, batch)


def join(
    partial: Tensor,
    size: int,
    tiles: int,
    pixels: int,
    stats: Tensor | None,
    vectors: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """From the moments of tiles of ``pixels``, so many of them for ``size``, to ``stats`` or ``vectors``."""
    count, width = MANY
    channels = partial.shape[2]
    batch_norm_join_kernel[(cdiv(channels, width),)](
        *(partial, stats, vectors, weight, bias, partial.shape[0], size, tiles, eps),
        C=channels,
        BP=pixels,
        BC=width,
        BT=count,
        num_warps=8,
    )


class Summed(NamedTuple):
    """What a stage makes of its sums: themselves and, of the norm before it, ``coef`` and its parameters' gradients."""

    sums: Tensor
    coef: Tensor | None = None
    dweight: Tensor | None = None
    vectors: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0
    batch: bool = True
    dbias: Tensor | None = None


def add(partial: Tensor, count: int, summed: Summed) -> None:
    """From the sums of tiles, of a norm over ``count`` pixels."""
    _launch_bwd(partial, None, count, *summed)


def _launch_bwd(partial, means, count, sums, coef, dweight, vectors, weight, eps, batch, dbias=None) -> None:
    parts, _, channels = partial.shape
    many, width = FEW if parts <= 4 * FEW[0] else MANY
    batch_norm_bwd_kernel[(cdiv(channels, width),)](
        *(partial, means, vectors, weight, sums, coef, dweight, dbias, parts, float(count), eps),
        C=channels,
        BATCH=batch,
        BC=width,
        BT=many,
        num_warps=4 if many == FEW[0] else 8,
    )


def compile_cases() -> Iterator[Case]:
    """What the launchers can choose, for the gate in ``fusekern.kernels.aot``."""
    for C in (512, 200):
        for kind in ("fp32", "bf16"):
            for mean in (True, False):
                none = () if mean else ("mean", "var")
                yield _case("fwd running" if mean else "fwd moments", batch_norm_fwd_kernel, C, kind, none, BC=BLOCK)
            for what in ("stats", "vectors"):
                none = {"stats": ("vectors", "weight", "bias"), "vectors": ("stats",)}[what]
                tile = {"BP": 128, "BT": MANY[0], "BC": MANY[1]}
                yield _case(f"join {what}", batch_norm_join_kernel, C, kind, none, 8, **tile)
            for count, width in (FEW, MANY):
                tile, warps = {"BT": count, "BC": width, "BATCH": True}, 4 if count == FEW[0] else 8
                name = "few" if count == FEW[0] else "many"
                yield _case(f"bwd {name}", batch_norm_bwd_kernel, C, kind, ("means",), warps, **tile)
                if kind == "fp32":
                    none = ("means", "coef", "dweight", "dbias", "vectors", "weight")
                    yield _case(f"bwd sums {name}", batch_norm_bwd_kernel, C, kind, none, warps, **tile)
        tile = {"BT": FEW[0], "BC": FEW[1]}
        yield _case("bwd means", batch_norm_bwd_kernel, C, "fp32", ("sums", "dbias"), 4, **tile, BATCH=True)
        yield _case("bwd frozen", batch_norm_bwd_kernel, C, "fp32", ("means",), 4, **tile, BATCH=False)


def _case(
    name: str,
    kernel: triton.runtime.jit.JITFunction,
    C: int,
    kind: str,
    none: tuple[str, ...],
    warps: int = 4,
    **tile: object,
) -> Case:
    """``kind``: the dtype of running statistics, weight and bias."""
    absent = [param.name for param in kernel.params if param.name.rstrip("123") in none]
    constexprs = {**dict.fromkeys(("C", "C1", "C2", "C3"), C), **dict.fromkeys(absent), **tile}
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    types = dict.fromkeys(("parts", "size", "tiles"), "i32") | dict.fromkeys(("eps", "count"), "fp32")
    types |= dict.fromkeys(("mean", "var", "weight", "bias", "dweight", "dbias"), f"*{kind}")
    present = [param for param in kernel.params if param.name not in constexprs]
    signature = {param.name: types.get(param.name.rstrip("123"), "*fp32") for param in present}
    divisible = tuple(param.name for param in present if signature[param.name].startswith("*"))
    return Case(kernel, f"{name} {kind} {C}", signature, constexprs, divisible, warps)
