"""3x3 convolution with stride 3. ``python -m bench.downsample --help``

``reference`` is ``F.conv2d`` (cuDNN, oneDNN); ``eager`` is the same as patches times a matrix.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Shape, shapes
from bench.common import main
from bench.peers import Graph
from fusekern.ops import downsample
from fusekern.ops.downsample import downsample_reference


class Downsample(Case):
    name = op = "downsample"
    fed = ("image",)
    shapes = {
        "cpu": shapes("1,256,64", "1,256,16", "1,512,16", "1,512,32", "1,256,128", "4,512,16"),
        "quick": shapes("1,256,64", "1,512,16"),
        "cuda": shapes(
            *("1,256,16", "1,512,16", "1,1024,16", "1,512,32", "1,512,64", "4,512,16", "4,512,32", "16,256,32"),
            *("16,512,16", "16,512,32", "16,256,64", "16,512,64", "16,1024,32", "32,512,16", "32,512,32"),
            *("32,256,64", "32,256,128", "16,512,128"),
        ),
        "headline": shapes("1,512,16", "4,512,16", "16,512,64", "32,256,64"),
        "compile": shapes("1,512,16", "16,512,64", "1,256,64"),
    }

    def sizes(self, shape):
        b, c, h = shape.batch, shape.channels, shape.size
        return {"image": (b, c, h, h), "weight": (c, c, 3, 3), "bias": (c,)}

    def arguments(self, shape, image, weight, bias):
        return image, weight, bias, "floor"

    def fused(self, shape, backend, image, weight, bias):
        return downsample(image, weight, bias, backend=backend)

    def reference(self, shape, image, weight, bias):
        return downsample_reference(image, weight, bias)

    def compose(self, shape, attend, image, weight, bias):
        return patches_times_weight(image, weight, bias)

    def graph(self, shape, graph, tensors, channels_last):
        return convolution(graph, shape, tensors["weight"], tensors["bias"], channels_last)

    def flops(self, shape):
        forward = 18 * shape.batch * (shape.size // 3) ** 2 * shape.channels**2
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: the covered pixels, weight, bias; out. Backward: grad, the covered pixels, weight; the gradients."""
        tokens = shape.batch * shape.channels * (shape.size // 3) ** 2
        image = shape.batch * shape.channels * shape.size**2
        weight, bias = 9 * shape.channels**2, shape.channels
        return 10 * tokens + weight + bias, 10 * tokens + image + 2 * weight + bias


def patches_times_weight(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, C, h, w]``; the patches are copied once, in an order that suits the image's layout."""
    h, w = image.shape[2] // 3, image.shape[3] // 3
    patches = image[:, :, : 3 * h, : 3 * w].unflatten(3, (w, 3)).unflatten(2, (h, 3))  # [B, C, h, 3, w, 3]
    if image.stride(1) == 1:
        rows, matrix = patches.permute(0, 2, 4, 3, 5, 1), weight.permute(0, 2, 3, 1)
    else:
        rows, matrix = patches.permute(0, 2, 4, 1, 3, 5), weight
    return F.linear(rows.flatten(3), matrix.flatten(1), bias).permute(0, 3, 1, 2)


def convolution(graph: Graph, shape: Shape, weight: Tensor, bias: Tensor, channels_last: bool) -> str:
    """ONNX nodes from ``image`` to tokens: ``[B, h, w, C]`` if channels_last, else ``[B, C, h, w]``."""
    if not channels_last:
        return graph.add("Conv", "image", graph.constant(weight.contiguous()), graph.constant(bias), strides=[3, 3])
    b, c, h = shape.batch, shape.channels, shape.size // 3
    image = "image"
    if shape.size % 3:
        bounds = ([0, 0], [3 * h, 3 * h], [1, 2])
        image = graph.add("Slice", image, *(graph.constant(bound) for bound in bounds))
    patches = graph.transpose(graph.reshape(image, b, h, 3, h, 3, c), 0, 1, 3, 2, 4, 5)
    matrix = weight.permute(2, 3, 1, 0).reshape(9 * c, c)
    product = graph.add("MatMul", graph.reshape(patches, b, h, h, 9 * c), graph.constant(matrix))
    return graph.add("Add", product, graph.constant(bias))


CASES = (Downsample(),)

if __name__ == "__main__":
    sys.exit(main(CASES))
