"""Image to text: every text token gathers what it needs from the tokens of the image."""

from __future__ import annotations

from torch import Tensor

from fusekern.backends import resolve
from fusekern.ops._check import check_alike, check_heads, check_shape, check_tokens


def conv2former_reference(query: Tensor, tokens: Tensor, *, heads: int, scale: float | None = None) -> Tensor:
    """Plain PyTorch; see ``conv2former``."""
    width = query.shape[2] // heads
    q = query.unflatten(2, (heads, width)).transpose(1, 2)  # [B, heads, K, d]
    x = tokens.unflatten(1, (heads, width)).flatten(3)  # [B, heads, d, N]
    similarity = (q * (width**-0.5 if scale is None else scale)) @ x  # [B, heads, K, N]
    gathered = similarity.softmax(dim=3) @ x.transpose(2, 3)  # [B, heads, K, d]
    return gathered.transpose(1, 2).flatten(2)


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
    resolve("conv2former", backend, query, tokens, heads, scale)
    return conv2former_reference(query, tokens, heads=heads, scale=scale)
