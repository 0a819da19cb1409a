"""How much every pixel looks like every class."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekern.backends import resolve
from fusekern.ops._check import check_alike, check_shape, check_tokens


def _unit(vectors: Tensor, dim: int) -> Tensor:
    """Norms in fp32 for fp16 and bf16: the floor below which a vector counts as zero does not exist in fp16."""
    norm = torch.linalg.vector_norm(
        vectors, dim=dim, keepdim=True, dtype=torch.promote_types(vectors.dtype, torch.float32)
    )
    return (vectors / norm.clamp_min(1e-12)).to(vectors.dtype)


def score_map_reference(image: Tensor, text: Tensor, *, normalize: bool = True, concat: bool = False) -> Tensor:
    """Plain PyTorch; see ``score_map``."""
    pixels, names = (_unit(image, 1), _unit(text, 2)) if normalize else (image, text)
    score = (names @ pixels.flatten(2)).unflatten(2, image.shape[2:])  # [B, K, H, W]
    return torch.cat([image, score], dim=1) if concat else score


def score_map(
    image: Tensor, text: Tensor, *, normalize: bool = True, concat: bool = False, backend: str = "auto"
) -> Tensor:
    """Inner product of every pixel with every text token.

        S = I T^T    with I = [H W, C], T = [K, C], rows of unit length if ``normalize``

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.1, equation 2, which is literally
    ``normalize=False``; the cosine is DenseCLIP's (arXiv 2112.01518).

    Args:
        image: ``[B, C, H, W]``, floating point, any strides.
        text: ``[B, K, C]``.
        normalize: cosine, in [-1, 1]. Vectors shorter than 1e-12 score 0.
        concat: return the image and the score map in one tensor, as the decoder takes them.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, K, H, W]``; with ``concat`` ``[B, C + K, H, W]``, the image first.

    Raises:
        ValueError: wrong shape, device or dtype, or no token.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("image", image, "B C H W")
    check_shape("text", text, "B K C", B=image.shape[0], C=image.shape[1])
    check_tokens("text", text)
    check_alike(image=image, text=text)
    resolve("score_map", backend, image, text, normalize, concat)
    return score_map_reference(image, text, normalize=normalize, concat=concat)
