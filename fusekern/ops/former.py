"""The text tokens among themselves: one post-norm transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import resolve
from fusekern.ops._check import check_alike, check_heads, check_shape, check_tokens

Affine = tuple[Tensor, Tensor]  # weight and bias


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
    channels = tokens.shape[2]
    width = channels // heads
    qkv_tokens = F.linear(tokens, *qkv).unflatten(2, (3, heads, width))  # [B, K, 3, heads, d]
    q, k, v = qkv_tokens.permute(2, 0, 3, 1, 4).unbind()  # each [B, heads, K, d]
    similarity = (q * width**-0.5) @ k.transpose(2, 3)  # [B, heads, K, K]
    mixed = (similarity.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    tokens = F.layer_norm(tokens + F.linear(mixed, *out), (channels,), *norm1, eps)
    return F.layer_norm(tokens + F.linear(F.gelu(F.linear(tokens, *up)), *down), (channels,), *norm2, eps)


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
    hidden = up[1].numel()
    for name, (weight, bias), shape in (
        ("qkv", qkv, (3 * channels, channels)),
        ("out", out, (channels, channels)),
        ("norm1", norm1, (channels,)),
        ("up", up, (hidden, channels)),
        ("down", down, (channels, hidden)),
        ("norm2", norm2, (channels,)),
    ):
        if weight.shape != shape or bias.shape != shape[:1]:
            raise ValueError(
                f"{name} must be a weight {list(shape)} and a bias {list(shape[:1])}; "
                f"got shapes {list(weight.shape)} and {list(bias.shape)}"
            )
        check_alike(**{"tokens": tokens, f"{name} weight": weight, f"{name} bias": bias})
    resolve("former", backend, tokens, qkv, out, norm1, up, down, norm2, heads, eps)
    return former_reference(tokens, qkv, out, norm1, up, down, norm2, heads=heads, eps=eps)
