"""Text to image: every pixel gathers what it needs from the text tokens."""

from __future__ import annotations

from torch import Tensor

from fusekern.backends import register, resolve
from fusekern.ops._check import check_alike, check_heads, check_scale, check_shape, check_tokens
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_image, empty_tokens, follow_autocast, launch
from fusekern.ops._limits import cpp_dtypes, triton_attention
from fusekern.ops.inverted_bottleneck import Recipe, made_again


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


@kernel_op(
    "former2conv",
    "(Tensor image, Tensor key, Tensor value, int heads, float scale, str backend, "
    'Tensor? y3=None, Tensor? vectors3=None, Tensor? skip=None, str made_by="") -> Tensor',
)
def _former2conv(image, key, value, heads, scale, backend, y3=None, vectors3=None, skip=None, made_by=""):
    """The last four are the image's recipe: with it the backward makes the image again, and it is not kept."""
    out = empty_image(image)
    if out.numel():
        launch(backend, "former2conv", "fwd", image, key, value, heads, scale, out)
    return out


@fake_of(_former2conv)
def _(image, *rest):
    return empty_image(image)


@kernel_op(
    "former2conv_backward",
    "(Tensor grad, Tensor image, Tensor key, Tensor value, int heads, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def _former2conv_backward(grad, image, key, value, heads, scale, backend):
    dimage, dkey, dvalue = empty_image(image), empty_tokens(key), empty_tokens(value)
    if dimage.numel():
        launch(backend, "former2conv", "bwd", grad, image, key, value, heads, scale, dimage, dkey, dvalue)
    else:
        dkey.zero_(), dvalue.zero_()
    return dimage, dkey, dvalue


@fake_of(_former2conv_backward)
def _(grad, image, key, value, heads, scale, backend):
    return empty_image(image), empty_tokens(key), empty_tokens(value)


def _setup_context(ctx, inputs, output):
    image, key, value, ctx.heads, ctx.scale, ctx.backend, *made_of, ctx.made_by = inputs
    ctx.save_for_backward(None if ctx.made_by else image, key, value, *made_of)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 10
    image, key, value, *made_of = ctx.saved_tensors
    if image is None:
        image = made_again(*made_of, ctx.made_by)
    return *_former2conv_backward(grad, image, key, value, ctx.heads, ctx.scale, ctx.backend), *(None,) * 7


differentiate(_former2conv, _backward, _setup_context)
differentiate(_former2conv_backward, no_second_derivative("former2conv"))


register("former2conv", "cpp", cpp_dtypes)
register("former2conv", "triton", triton_attention)


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
    return by_recipe(image, None, key, value, heads=heads, scale=scale, backend=backend)


def by_recipe(
    image: Tensor, recipe: Recipe | None, key: Tensor, value: Tensor, *, heads: int, scale: float | None, backend: str
) -> Tensor:
    """``former2conv`` of an image that need not be kept for the backward if there is a recipe of it."""
    check_shape("image", image, "B C H W")
    batch, channels = image.shape[:2]
    check_shape("key", key, "B K C", B=batch, C=channels)
    check_tokens("key", key)
    check_shape("value", value, "B K C", B=batch, K=key.shape[1], C=channels)
    check_heads(channels, heads)
    check_alike(image=image, key=key, value=value)
    image, key, value = follow_autocast(image, key, value)
    check_scale(scale)
    backend = resolve("former2conv", backend, image, key, value, heads, scale)
    if backend == "reference":
        return former2conv_reference(image, key, value, heads=heads, scale=scale)
    scale = (channels // heads) ** -0.5 if scale is None else float(scale)
    # Autocast may have made another image of it.
    made_of = () if recipe is None or recipe.y3.dtype != image.dtype else recipe[1:]
    return _former2conv(image, key, value, heads, scale, backend, *made_of)
