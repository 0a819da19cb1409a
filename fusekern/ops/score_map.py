"""How much every pixel looks like every class."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekern.backends import register, resolve
from fusekern.ops._check import check_alike, check_shape, check_tokens
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_image, empty_tokens, follow_autocast, launch
from fusekern.ops._limits import cpp_dtypes, triton_dtypes


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


@kernel_op("score_map", "(Tensor image, Tensor text, bool normalize, bool concat, str backend) -> Tensor")
def _score_map(image, text, normalize, concat, backend):
    out = _empty_score(image, text, concat)
    if out.numel():
        launch(backend, "score_map", "fwd", image, text, normalize, concat, out)
    return out


def _empty_score(image: Tensor, text: Tensor, concat: bool) -> Tensor:
    return empty_image(image, text.shape[1] + (image.shape[1] if concat else 0))


@fake_of(_score_map)
def _(image, text, normalize, concat, backend):
    return _empty_score(image, text, concat)


@kernel_op(
    "score_map_backward",
    "(Tensor grad, Tensor image, Tensor text, bool normalize, bool concat, str backend) -> (Tensor, Tensor)",
)
def _score_map_backward(grad, image, text, normalize, concat, backend):
    dimage, dtext = empty_image(image), empty_tokens(text)
    if dimage.numel():
        launch(backend, "score_map", "bwd", grad, image, text, normalize, concat, dimage, dtext)
    else:
        dtext.zero_()
    return dimage, dtext


@fake_of(_score_map_backward)
def _(grad, image, text, normalize, concat, backend):
    return empty_image(image), empty_tokens(text)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.normalize, ctx.concat, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 5
    return *_score_map_backward(grad, *ctx.saved_tensors, ctx.normalize, ctx.concat, ctx.backend), None, None, None


differentiate(_score_map, _backward, _setup_context)
differentiate(_score_map_backward, no_second_derivative("score_map"))


def _why_slow_cpp(image, text, normalize, concat):
    # Then there is one product of matrices and little to fuse with it; in bench/results/score_map-cpu.json.
    plain = image.stride(1) == 1 and image.dtype == torch.float32
    trained = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
    if not normalize and not (concat and plain):
        return ["without norms it is slower, but for a concatenation in channels_last and fp32"]
    if not concat and plain and not trained and image.shape[1] >= 512:
        return ["without concatenation and gradients PyTorch is as fast in channels_last and fp32 with many channels"]
    return []


register("score_map", "cpp", cpp_dtypes, _why_slow_cpp)
register("score_map", "triton", triton_dtypes)


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
    image, text = follow_autocast(image, text)
    backend = resolve("score_map", backend, image, text, normalize, concat)
    if backend == "reference":
        return score_map_reference(image, text, normalize=normalize, concat=concat)
    return _score_map(image, text, normalize, concat, backend)
