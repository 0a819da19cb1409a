"""The text tokens among themselves: one post-norm transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import register, resolve
from fusekern.ops._check import check_affines, check_heads, check_shape, check_tensors, check_tokens
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_tokens, follow_autocast, launch
from fusekern.ops._limits import cpp_linear, slow_bf16, triton_dtypes

Affine = tuple[Tensor, Tensor]  # weight and bias
Map = Callable[[Tensor], Tensor]


def former_reference(
    tokens: Tensor,
    qkv: Affine,
    out: Affine,
    norm1: Affine,
    up: Affine,
    down: Affine,
    norm2: Affine,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """Plain PyTorch; see ``former``."""

    def linear(affine: Affine) -> Map:
        return lambda x: F.linear(x, *affine)

    def norm(affine: Affine) -> Map:
        return lambda x: F.layer_norm(x, x.shape[2:], *affine, eps)

    return former_by(tokens, linear(qkv), linear(out), norm(norm1), linear(up), linear(down), norm(norm2), heads=heads)


def former_by(tokens: Tensor, qkv: Map, out: Map, norm1: Map, up: Map, down: Map, norm2: Map, *, heads: int) -> Tensor:
    """The block by whatever does the work of its parts, ``[B, K, ..]`` to ``[B, K, ..]``."""
    width = tokens.shape[2] // heads
    qkv_tokens = qkv(tokens).unflatten(2, (3, heads, width))  # [B, K, 3, heads, d]
    q, k, v = qkv_tokens.permute(2, 0, 3, 1, 4).unbind()  # each [B, heads, K, d]
    similarity = (q * width**-0.5) @ k.transpose(2, 3)  # [B, heads, K, K]
    mixed = (similarity.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    tokens = norm1(tokens + out(mixed))
    return norm2(tokens + down(F.gelu(up(tokens))))


PARAMETERS = ", ".join(
    f"Tensor {name}"
    for name in (
        *("qkv_weight", "qkv_bias", "out_weight", "out_bias", "gain1", "shift1"),
        *("up_weight", "up_bias", "down_weight", "down_bias", "gain2", "shift2"),
    )
)
_SAVED = "Tensor qkv, Tensor mixed, Tensor lse, Tensor sums1, Tensor hidden, Tensor sums2, Tensor moments"


def _empty(tokens: Tensor, up_weight: Tensor, heads: int) -> tuple[Tensor, ...]:
    """The result and what the backward needs: 6 C + F numbers for a token, and a few in fp32."""
    batch, count, channels = tokens.shape
    return (
        empty_tokens(tokens),
        tokens.new_empty(batch, count, 3 * channels),
        empty_tokens(tokens),
        tokens.new_empty((batch, heads, count), dtype=torch.float32),
        empty_tokens(tokens),
        tokens.new_empty(batch, count, up_weight.shape[0]),
        empty_tokens(tokens),
        tokens.new_empty((4, batch * count), dtype=torch.float32),
    )


@kernel_op(
    "former", f"(Tensor tokens, {PARAMETERS}, int heads, float eps, str backend) -> ({', '.join(['Tensor'] * 8)})"
)
def _former(tokens, *arguments):
    *parameters, heads, eps, backend = arguments
    results = _empty(tokens, parameters[6], heads)
    if tokens.numel():
        launch(backend, "former", "fwd", tokens, *parameters, heads, eps, *results)
    return results


@fake_of(_former)
def _(tokens, *arguments):
    return _empty(tokens, arguments[6], arguments[12])


@kernel_op(
    "former_backward",
    f"(Tensor grad, Tensor tokens, {PARAMETERS}, {_SAVED}, int heads, str backend) -> ({', '.join(['Tensor'] * 13)})",
)
def _former_backward(grad, tokens, *arguments):
    *tensors, heads, backend = arguments
    parameters, saved = tensors[:12], tensors[12:]
    gradients = tuple(empty_tokens(tensor) for tensor in (tokens, *parameters))
    if tokens.numel():
        qkv_weight, _, out_weight, _, gain1, shift1, up_weight, _, down_weight, _, gain2, _ = parameters
        weights = (qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2)
        launch(backend, "former", "bwd", grad, tokens, *weights, *saved, heads, *gradients)
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


@fake_of(_former_backward)
def _(grad, tokens, *arguments):
    return tuple(empty_tokens(tensor) for tensor in (tokens, *arguments[:12]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 16
    return *_former_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.backend), None, None, None


differentiate(_former, _backward, _setup_context)
differentiate(_former_backward, no_second_derivative("former"))


def why_not_triton(tokens, *rest):
    channels, heads = tokens.shape[2], rest[-2]
    reasons = triton_dtypes(tokens)
    if channels > 2048:
        reasons.append(f"{channels} channels, it takes up to 2048")
    if channels // heads > 256:
        reasons.append(f"heads of {channels // heads} channels, it takes up to 256")
    if rest[3][0].shape[0] == 0:
        reasons.append("no hidden channel")
    return reasons


def _why_not_cpp(tokens, *rest):
    return cpp_linear([tokens], [part for pair in rest[:6] for part in pair])


register("former", "cpp", _why_not_cpp, slow_bf16)
register("former", "triton", why_not_triton)


def affines_of_former(
    channels: int, qkv: Affine, out: Affine, norm1: Affine, up: Affine, down: Affine, norm2: Affine
) -> dict[str, tuple]:
    """What ``check_affines`` takes: each with the shape that its weight must have."""
    check_tensors(**{"up bias": up[1]})
    hidden = up[1].numel()
    return {
        "qkv": (qkv, (3 * channels, channels)),
        "out": (out, (channels, channels)),
        "norm1": (norm1, (channels,)),
        "up": (up, (hidden, channels)),
        "down": (down, (channels, hidden)),
        "norm2": (norm2, (channels,)),
    }


def former(
    tokens: Tensor,
    qkv: Affine,
    out: Affine,
    norm1: Affine,
    up: Affine,
    down: Affine,
    norm2: Affine,
    *,
    heads: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Self-attention, then a feed-forward network, each with a skip and a layer norm after it.

        U  = LN1(T + W_out MHSA(W_qkv T))    MHSA(Q, K, V) = softmax(Q K^T / sqrt(C / heads)) V per head
        T' = LN2(U + W_down GELU(W_up U))

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.2: "standard transformer block"
    with post layer normalisation and an expansion of 2. GELU and no dropout are Mobile-Former's (arXiv 2108.05895).

    Args:
        tokens: ``[B, K, C]``, floating point, any strides.
        qkv: weight ``[3 C, C]`` and bias ``[3 C]``; rows of the queries, the keys, the values.
        out: weight ``[C, C]`` and bias ``[C]``.
        norm1: weight ``[C]`` and bias ``[C]``.
        up: weight ``[F, C]`` and bias ``[F]``.
        down: weight ``[C, F]`` and bias ``[C]``.
        norm2: weight ``[C]`` and bias ``[C]``.
        heads: number of heads; head ``i`` takes the ``i``-th run of ``C / heads`` channels.
        eps: added to the variance of both norms.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, K, C]``.

    Raises:
        ValueError: wrong shape, device or dtype, no token, or ``heads`` that do not divide ``C``.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("tokens", tokens, "B K C")
    check_tokens("tokens", tokens)
    channels = tokens.shape[2]
    check_heads(channels, heads)
    check_affines(tokens, **affines_of_former(channels, qkv, out, norm1, up, down, norm2))
    # Vectors keep their dtype: they are added to sums in fp32.
    linears = (qkv, out, up, down)
    tokens, *weights = follow_autocast(tokens, *(weight for weight, _ in linears))
    qkv, out, up, down = zip(weights, (bias for _, bias in linears), strict=True)
    backend = resolve("former", backend, tokens, qkv, out, norm1, up, down, norm2, heads, eps)
    if backend == "reference":
        result = former_reference(tokens, qkv, out, norm1, up, down, norm2, heads=heads, eps=eps)
        return result.to(tokens.dtype)  # on CUDA, autocast has norms in fp32
    return _former(tokens, *qkv, *out, *norm1, *up, *down, *norm2, heads, float(eps), backend)[0]
