"""Image to text: every text token gathers what it needs from the tokens of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekern.backends import register, resolve
from fusekern.ops._check import check_alike, check_heads, check_scale, check_shape, check_tokens
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_image, empty_tokens, follow_autocast, launch
from fusekern.ops._limits import cpp_dtypes, triton_attention


def conv2former_reference(query: Tensor, tokens: Tensor, *, heads: int, scale: float | None = None) -> Tensor:
    """Plain PyTorch; see ``conv2former``."""
    width = query.shape[2] // heads
    q = query.unflatten(2, (heads, width)).transpose(1, 2)  # [B, heads, K, d]
    x = tokens.unflatten(1, (heads, width)).flatten(3)  # [B, heads, d, N]
    similarity = (q * (width**-0.5 if scale is None else scale)) @ x  # [B, heads, K, N]
    gathered = similarity.softmax(dim=3) @ x.transpose(2, 3)  # [B, heads, K, d]
    return gathered.transpose(1, 2).flatten(2)


def _empty_rows(query: Tensor, heads: int) -> Tensor:
    return torch.empty((query.shape[0], heads, query.shape[1]), dtype=torch.float32, device=query.device)


@kernel_op("conv2former", "(Tensor query, Tensor tokens, int heads, float scale, str backend) -> (Tensor, Tensor)")
def _conv2former(query, tokens, heads, scale, backend):
    out, lse = empty_tokens(query), _empty_rows(query, heads)
    if tokens.numel():
        launch(backend, "conv2former", "fwd", query, tokens, heads, scale, out, lse)
    else:
        out.zero_(), lse.zero_()
    return out, lse


@fake_of(_conv2former)
def _(query, tokens, heads, scale, backend):
    return empty_tokens(query), _empty_rows(query, heads)


@kernel_op(
    "conv2former_backward",
    "(Tensor grad, Tensor query, Tensor tokens, Tensor out, Tensor lse, int heads, float scale, str backend) "
    "-> (Tensor, Tensor)",
)
def _conv2former_backward(grad, query, tokens, out, lse, heads, scale, backend):
    dquery, dtokens = empty_tokens(query), empty_image(tokens)
    if tokens.numel():
        launch(backend, "conv2former", "bwd", grad, query, tokens, out, lse, heads, scale, dquery, dtokens)
    else:
        dquery.zero_()
    return dquery, dtokens


@fake_of(_conv2former_backward)
def _(grad, query, tokens, out, lse, heads, scale, backend):
    return empty_tokens(query), empty_image(tokens)


def _setup_context(ctx, inputs, output):
    query, tokens, ctx.heads, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, tokens, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    return *_conv2former_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.scale, ctx.backend), None, None, None


differentiate(_conv2former, _backward, _setup_context)
differentiate(_conv2former_backward, no_second_derivative("conv2former"))


register("conv2former", "cpp", cpp_dtypes)
register("conv2former", "triton", triton_attention)


def conv2former(
    query: Tensor, tokens: Tensor, *, heads: int, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of text queries over image tokens that are key and value alike.

        A = softmax(scale Q X^T) X    per head, X = [h w, C / heads]

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.3, equation 3, without W^Q and
    W^O, which act on the text and lie outside; the image side has no projections.

    Args:
        query: ``[B, K, C]``, floating point, any strides.
        tokens: ``[B, C, h, w]``, the down-sampled feature map.
        heads: number of heads; head ``i`` takes the ``i``-th run of ``C / heads`` channels.
        scale: factor on the similarities; by default ``(C / heads) ** -0.5``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, K, C]``; zero where the map has no token (``h w = 0``).

    Raises:
        ValueError: wrong shape, device or dtype, no query, or ``heads`` that do not divide ``C``.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("query", query, "B K C")
    batch, _, channels = query.shape
    check_tokens("query", query)
    check_shape("tokens", tokens, "B C h w", B=batch, C=channels)
    check_heads(channels, heads)
    check_alike(query=query, tokens=tokens)
    query, tokens = follow_autocast(query, tokens)
    check_scale(scale)
    backend = resolve("conv2former", backend, query, tokens, heads, scale)
    if backend == "reference":
        return conv2former_reference(query, tokens, heads=heads, scale=scale)
    scale = (channels // heads) ** -0.5 if scale is None else float(scale)
    return _conv2former(query, tokens, heads, scale, backend)[0]
