"""Text to image: every pixel gathers what it needs from the text tokens."""

from __future__ import annotations

from torch import Tensor

from fusekern.backends import resolve
from fusekern.ops._check import check_alike, check_heads, check_shape, check_tokens


def former2conv_reference(
    image: Tensor, key: Tensor, value: Tensor, *, heads: int, scale: float | None = None
) -> Tensor:
    """Plain PyTorch; see ``former2conv``."""
    width = image.shape[1] // heads
    pixels = image.unflatten(1, (heads, width)).flatten(3)  # [B, heads, d, N]
    k = key.unflatten(2, (heads, width)).transpose(1, 2)  # [B, heads, K, d]
    v = value.unflatten(2, (heads, width)).permute(0, 2, 3, 1)  # [B, heads, d, K]
    similarity = (k * (width**-0.5 if scale is None else scale)) @ pixels  # [B, heads, K, N]
    gathered = v @ similarity.softmax(dim=2)  # [B, heads, d, N]
    return image + gathered.reshape(image.shape)


def former2conv(
    image: Tensor, key: Tensor, value: Tensor, *, heads: int, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of pixels over text tokens, added to the image.

        I' = I + softmax(scale I K^T) V    per head, I = [H W, C / heads]

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.3, equation 4, with key = T W^K
    and value = T W^V computed outside. The pixels have no projection; the residual is Mobile-Former's (arXiv
    2108.05895).

    Args:
        image: ``[B, C, H, W]``, floating point, any strides.
        key: ``[B, K, C]``.
        value: ``[B, K, C]``.
        heads: number of heads; head ``i`` takes the ``i``-th run of ``C / heads`` channels.
        scale: factor on the similarities; by default ``(C / heads) ** -0.5``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        ValueError: wrong shape, device or dtype, no key, or ``heads`` that do not divide ``C``.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("image", image, "B C H W")
    batch, channels = image.shape[:2]
    check_shape("key", key, "B K C", B=batch, C=channels)
    check_tokens("key", key)
    check_shape("value", value, "B K C", B=batch, K=key.shape[1], C=channels)
    check_heads(channels, heads)
    check_alike(image=image, key=key, value=value)
    resolve("former2conv", backend, image, key, value, heads, scale)
    return former2conv_reference(image, key, value, heads=heads, scale=scale)
