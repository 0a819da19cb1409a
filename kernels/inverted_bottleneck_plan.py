"""What the inverted bottleneck launches on a GPU, from shapes alone."""

from __future__ import annotations

import torch
from fusekern.kernels.inverted_bottleneck_places import (
    Rows,
    by_gram,
    finishes_depthwise,
    fwd_places,
    group_of,
    is_whole,
    joined_behind,
    kind_of,
    rows_of,
    setting_of,
    weight_places,
)
from fusekern.kernels.launching import cdiv
from torch import Tensor


def launches(
    image: Tensor,
    hidden: int,
    channels_out: int,
    *,
    stride: int = 1,
    batch: tuple[bool, bool, bool] = (True, True, True),
    low: bool = False,
) -> dict[str, tuple[str, ...]]:
    """What the op launches on a GPU, in order: ``fwd`` in training, ``bwd`` after it, and ``infer``.

    Kernels have the names that a profiler shows, torch's operations theirs, ``aten::...``. This is for one process and
    a dense image and gradient; what lies otherwise is copied first.

    Args:
        image: ``[B, C, H, W]``; a meta tensor will do.
        hidden: E.
        channels_out: O.
        stride: of the depthwise convolution.
        batch: which norms take the statistics of the batch. With none of them the forward is ``infer`` where nothing
            is to be learned.
        low: the expansion is computed again in the backward.
    """
    size = [cdiv(side, stride) for side in image.shape[2:]]
    layout = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format

    def map_of(channels: int, size: list[int] | torch.Size) -> Tensor:
        shape = image.shape[0], channels, *size
        return torch.empty(shape, dtype=image.dtype, device="meta", memory_format=layout)

    def places(*images: Tensor) -> tuple[Rows, str]:
        rows = rows_of(*images)
        return rows, kind_of(rows, *images)

    def gradients(name: str, which: str, inner: Tensor, outer: Tensor) -> list[str]:
        """Of the two operands of a product."""
        of = group_of(*places(inner, outer), which, inner.shape[1], outer.shape[1])
        apart = which == "hidden" and not of.places.finish()
        return [kernel(name), *[of_sums] * apart, *[add] * (of.parts > 1)]

    kernel = "inverted_bottleneck_{}_kernel".format
    add, of_sums = kernel("sum"), "batch_norm_bwd_kernel"
    x, y1 = map_of(image.shape[1], image.shape[2:]), map_of(hidden, image.shape[2:])
    y2, y3 = map_of(hidden, size), map_of(channels_out, size)
    products = kernel("fwd"), "bn_relu6_dw_fwd_kernel", kernel("fwd")
    joined = (
        not joined_behind(fwd_places(*places(y1, x), hidden)[1].parts),
        not finishes_depthwise(y2),
        not fwd_places(*places(y2, y3), channels_out)[1].finish(),
    )
    names = "batch_norm_join_kernel", "bn_relu6_dw_moments_kernel", "batch_norm_join_kernel"
    forward = [] if all(batch) else ["batch_norm_fwd_kernel"]
    for product, on, apart, name in zip(products, batch, joined, names, strict=True):
        forward += [product, name] if on and apart else [product]
    rows, kind = places(x)
    parts = weight_places(rows, setting_of(kind, *[x.shape[1]] * 2).weight, *[x.shape[1]] * 2)[2]
    of_matrix = kernel("bwd_weight"), *[add] * (parts > 1)
    return {
        "fwd": (*forward, kernel("apply")),
        "bwd": (
            *([kernel("fwd")] if low else []),
            *([kernel("reduce")] if is_whole(rows_of(y3)) else [kernel("reduce"), of_sums, kernel("apply")]),
            *gradients("bwd_project", "hidden", y3, y2),
            *("bn_relu6_dw_bwd_kernel", *["bn_relu6_dw_sums_kernel"] * (not finishes_depthwise(y1))),
            *(
                _gram_launches(x, of_matrix)
                if by_gram(x, hidden)
                else (kernel("apply"), *gradients("bwd_expand", "image", y1, x))
            ),
        ),
        "infer": products,
    }


def _gram_launches(image: Tensor, gram: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the last stage; ``gram`` are those of the matrix."""
    weight, add, last = (f"inverted_bottleneck_{name}_kernel" for name in ("bwd_weight", "sum", "bwd_image"))
    centred = image.dtype == torch.float32
    cast = () if centred else ("aten::_to_copy",)
    of_matrix, of_sums = (), ("aten::sum", "aten::mul", "aten::add_")
    of_vector = ()
    if not centred:
        of_matrix, of_sums = ("aten::addr_",), ()
        of_vector = "aten::_to_copy", "aten::mm", "aten::mul", "aten::sub_"
    middle = "aten::_to_copy", "aten::mv", "aten::sub", "aten::_to_copy", "aten::mul", "aten::add", "aten::_to_copy"
    scale = "aten::linalg_vector_norm", "aten::clamp_min", "aten::div", "aten::mul"
    return (
        *("aten::mean", *cast, *middle, *gram, *of_matrix),
        *(weight, "aten::mul", *of_sums, "aten::mm", "aten::stack", add),
        *(*scale, *cast, "aten::mm", "aten::mm", *of_vector, "aten::stack", "aten::mul", *cast, last),
    )
