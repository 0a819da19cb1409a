"""Patches of the feature map become tokens: the convolution before the image-to-text bridge."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import register, resolve
from fusekern.ops._check import check_alike, check_choice, check_shape, check_tensors
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_image, follow_autocast, launch
from fusekern.ops._limits import CPU_HAS_BF16, cpp_dtypes, triton_dtypes

PADS = ("floor", "ceil")


def downsampled_size(height: int, width: int, pad: str) -> tuple[int, int]:
    """Height and width of the map of tokens.

    Raises:
        ValueError: ``pad`` is neither ``"floor"`` nor ``"ceil"``.
    """
    check_choice("pad", pad, PADS)
    if pad == "ceil":
        return (height + 2) // 3, (width + 2) // 3
    return max(height // 3, min(height, 1)), max(width // 3, min(width, 1))


def downsample_reference(image: Tensor, weight: Tensor, bias: Tensor | None = None, *, pad: str = "floor") -> Tensor:
    """Plain PyTorch; see ``downsample``."""
    groups = image.shape[1] // weight.shape[1]
    return downsampled_by(lambda patches: F.conv2d(patches, weight, bias, stride=3, groups=groups), image, pad)


def downsampled_by(convolve: Callable[[Tensor], Tensor], image: Tensor, pad: str) -> Tensor:
    """The map of tokens by a 3x3 convolution with stride 3, which is given whole patches."""
    height, width = image.shape[2:]
    h, w = downsampled_size(height, width, pad)
    # A side of 0 is completed to one patch too, which the last line cuts off: convolutions refuse an empty map.
    below, right = 3 * max(h, 1) - height, 3 * max(w, 1) - width
    if below > 0 or right > 0:
        image = F.pad(image, (0, max(right, 0), 0, max(below, 0)))
    return convolve(image)[:, :, :h, :w]


@kernel_op("downsample", "(Tensor image, Tensor weight, Tensor? bias, SymInt h, SymInt w, str backend) -> Tensor")
def _downsample(image, weight, bias, h, w, backend):
    out = empty_image(image, size=(h, w))
    if out.numel():
        launch(backend, "downsample", "fwd", image, weight, bias, out)
    return out


@fake_of(_downsample)
def _(image, weight, bias, h, w, backend):
    return empty_image(image, size=(h, w))


@kernel_op(
    "downsample_backward",
    "(Tensor grad, Tensor image, Tensor weight, bool bias, str backend) -> (Tensor, Tensor, Tensor)",
)
def _downsample_backward(grad, image, weight, bias, backend):
    gradients = _empty_gradients(image, weight, bias)
    if grad.numel():
        launch(backend, "downsample", "bwd", grad, image, weight, *gradients[:2], gradients[2] if bias else None)
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


def _empty_gradients(image: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.channels_last if weight.stride(1) == 1 else torch.contiguous_format
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device, memory_format=layout)
    return empty_image(image), dweight, dweight.new_empty(weight.shape[0] if bias else 0)


@fake_of(_downsample_backward)
def _(grad, image, weight, bias, backend):
    return _empty_gradients(image, weight, bias)


def _setup_context(ctx, inputs, output):
    image, weight, bias, _, _, ctx.backend = inputs
    ctx.save_for_backward(image, weight)
    ctx.bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 6
    dimage, dweight, dbias = _downsample_backward(grad, *ctx.saved_tensors, ctx.bias, ctx.backend)
    return dimage, dweight, dbias if ctx.bias else None, None, None, None


differentiate(_downsample, _backward, _setup_context)
differentiate(_downsample_backward, no_second_derivative("downsample"))


def _full(backend_dtypes):
    def why_not(image, weight, bias, pad):
        depthwise = ["it takes no depthwise weight"] if weight.shape[1] != image.shape[1] else []
        return backend_dtypes(image) + depthwise

    return why_not


def _why_slow_cpp(image, weight, bias, pad):
    # As measured; in bench/results/downsample-cpu.json.
    h, w = downsampled_size(*image.shape[2:], pad)
    patches, last = image.shape[0] * h * w, image.stride(1) == 1
    if torch.is_grad_enabled() and (image.requires_grad or weight.requires_grad):
        return []
    if image.dtype == torch.float32:
        many = patches > image.shape[1]
        return ["without gradients oneDNN is faster on more patches than channels"] if many else []
    few = CPU_HAS_BF16 and last and image.shape[1] >= 128 and 2 * patches <= image.shape[1]
    return [] if few else ["without gradients oneDNN's convolution is as fast in bf16"]


def _why_slow_triton(image, weight, bias, pad):
    return ["nobody has measured it against cuDNN yet"]


register("downsample", "cpp", _full(cpp_dtypes), _why_slow_cpp)
register("downsample", "triton", _full(triton_dtypes), _why_slow_triton)


def downsample(
    image: Tensor, weight: Tensor, bias: Tensor | None = None, *, pad: str = "floor", backend: str = "auto"
) -> Tensor:
    """3x3 convolution with stride 3: every 3x3 patch becomes one token.

        X[b, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] image[b, c, 3 y + i, 3 x + j]

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.3, "aggregating each 3x3xC patch
    into 1xC". The paper does not say what becomes of sizes that 3 does not divide; ``"floor"`` fits its GFLOPs.

    Args:
        image: ``[B, C, H, W]``, floating point, any strides.
        weight: ``[C, C, 3, 3]`` (full) or ``[C, 1, 3, 3]`` (depthwise).
        bias: ``[C]`` or none.
        pad: rows and columns beyond a multiple of 3 are dropped (``"floor"``) or completed with zeros (``"ceil"``).
            A side below 3 is always completed.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, C, h, w]`` with ``(h, w) = downsampled_size(H, W, pad)``.

    Raises:
        ValueError: wrong shape, device, dtype or ``pad``.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("image", image, "B C H W")
    check_tensors(weight=weight)
    channels = image.shape[1]
    group = weight.shape[1] if weight.dim() == 4 else 0
    # Not `group not in (1, channels)`: torch before 2.14 compiles that wrong where the weight is a module's own.
    if weight.shape != (channels, group, 3, 3) or (group != 1 and group != channels):
        raise ValueError(
            f"weight must be [C, C, 3, 3] or [C, 1, 3, 3] with C = {channels}; got shape {list(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, "C", C=channels)
    check_alike(image=image, weight=weight, bias=bias)
    check_choice("pad", pad, PADS)
    image, weight, bias = follow_autocast(image, weight, bias)
    backend = resolve("downsample", backend, image, weight, bias, pad)
    if backend == "reference":
        return downsample_reference(image, weight, bias, pad=pad)
    return _downsample(image, weight, bias, *downsampled_size(*image.shape[2:], pad), backend)
