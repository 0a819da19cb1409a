"""Image to text: ``softmax(scale Q X^T) X`` per head, alone and in its chain. ``python -m bench.conv2former --help``

H in ``B,C,H,K`` is the side of the feature map; the op sees its ``H // 3`` squared tokens.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, shapes
from bench.common import main
from bench.downsample import convolution
from bench.peers import rows, split_heads
from fusekern.ops import conv2former, downsample
from fusekern.ops.conv2former import conv2former_reference
from fusekern.ops.downsample import downsample_reference

SHAPES = {
    "cpu": shapes("1,256,64,19", "1,512,16,150", "1,512,32,150", "1,256,128,19", "4,512,16,150"),
    "quick": shapes("1,256,64,19", "1,512,32,150"),
    "cuda": shapes(
        *("1,256,16,19", "1,256,16,150", "1,512,16,19", "1,512,16,150", "1,1024,16,150", "1,512,32,150"),
        *("1,512,64,150", "4,512,16,150", "4,512,32,150", "16,256,32,19", "16,512,16,150", "16,512,32,150"),
        *("16,256,64,150", "16,512,64,150", "16,1024,32,150", "32,512,16,150", "32,512,32,150"),
        *("32,256,64,19", "32,256,128,19", "32,256,128,150", "16,512,128,150"),
    ),
    "headline": shapes("1,512,16,150", "4,512,16,150", "1,256,16,150", "16,512,64,150", "32,256,64,19"),
    "compile": shapes("1,512,16,150", "4,512,16,150", "16,512,64,150", "1,256,64,19"),
}


class Conv2Former(Case):
    name = op = "conv2former"
    attention = True
    shapes = SHAPES
    fed = ("query", "tokens")

    def sizes(self, shape):
        b, c, h, k = shape.batch, shape.channels, shape.size // 3, shape.tokens
        return {"query": (b, k, c), "tokens": (b, c, h, h)}

    def arguments(self, shape, query, tokens):
        return query, tokens, shape.heads, None

    def fused(self, shape, backend, query, tokens):
        return conv2former(query, tokens, heads=shape.heads, backend=backend)

    def reference(self, shape, query, tokens):
        return conv2former_reference(query, tokens, heads=shape.heads)

    def compose(self, shape, attend, query: Tensor, tokens: Tensor) -> Tensor:
        pixels = split_heads(rows(tokens), shape.heads)
        return attend(split_heads(query, shape.heads), pixels, pixels).transpose(1, 2).flatten(2)

    def graph(self, shape, graph, tensors, channels_last):
        return attention(graph, shape, "query", "tokens", channels_last)

    def flops(self, shape):
        forward = 4 * shape.batch * (shape.size // 3) ** 2 * shape.tokens * shape.channels
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: query, tokens; out. Backward: grad, query, tokens; the two gradients."""
        tokens = shape.batch * shape.channels * (shape.size // 3) ** 2
        text = shape.batch * shape.channels * shape.tokens
        return tokens + 2 * text, 2 * tokens + 3 * text


class Chain(Case):
    """downsample, W^Q, conv2former, W^O, + T: the bridge from a feature map to the text tokens as a whole.

    fusekern's downsample in it is the one that ``backend="auto"`` takes.
    """

    name = "conv2former chain"
    op = "conv2former"
    attention = True
    shapes = SHAPES | {"cuda": SHAPES["headline"], "cpu": SHAPES["quick"]}
    fed = ("image", "text")

    def sizes(self, shape):
        b, c, h, k = shape.batch, shape.channels, shape.size, shape.tokens
        weights = {"weight": (c, c, 3, 3), "bias": (c,), "query_weight": (c, c), "out_weight": (c, c)}
        return {"image": (b, c, h, h), "text": (b, k, c), **weights}

    def arguments(self, shape, image, text, *weights):
        return text, image, shape.heads, None

    def fused(self, shape, backend, image, text, weight, bias, query_weight, out_weight):
        tokens = downsample(image, weight, bias, backend="reference" if backend == "reference" else "auto")
        query = F.linear(text, query_weight)
        return text + F.linear(conv2former(query, tokens, heads=shape.heads, backend=backend), out_weight)

    def reference(self, shape, image, text, weight, bias, query_weight, out_weight):
        tokens = downsample_reference(image, weight, bias)
        gathered = conv2former_reference(F.linear(text, query_weight), tokens, heads=shape.heads)
        return text + F.linear(gathered, out_weight)

    def compose(self, shape, attend, image, text, weight, bias, query_weight, out_weight):
        pixels = split_heads(rows(F.conv2d(image, weight, bias, stride=3)), shape.heads)
        gathered = attend(split_heads(F.linear(text, query_weight), shape.heads), pixels, pixels)
        return text + F.linear(gathered.transpose(1, 2).flatten(2), out_weight)

    def graph(self, shape, graph, tensors, channels_last):
        tokens = convolution(graph, shape, tensors["weight"], tensors["bias"], channels_last)
        query = graph.add("MatMul", "text", graph.constant(tensors["query_weight"].T.contiguous()))
        gathered = attention(graph, shape, query, tokens, channels_last)
        out = graph.add("MatMul", gathered, graph.constant(tensors["out_weight"].T.contiguous()))
        return graph.add("Add", "text", out)

    def flops(self, shape):
        tokens, text = shape.batch * (shape.size // 3) ** 2, shape.batch * shape.tokens
        c = shape.channels
        forward = 18 * tokens * c**2 + 4 * text * c**2 + 4 * tokens * shape.tokens * c
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: the covered pixels, text, weights; out. Backward: grad and these; the gradients."""
        c = shape.channels
        covered, image = 9 * shape.batch * c * (shape.size // 3) ** 2, shape.batch * c * shape.size**2
        text, weights = shape.batch * c * shape.tokens, 11 * c**2
        return covered + 2 * text + weights + c, covered + image + 3 * text + 2 * weights + c


def attention(graph, shape, query: str, tokens: str, channels_last: bool) -> str:
    """ONNX nodes; query ``[B, K, C]``, tokens ``[B, h, w, C]`` or ``[B, C, h, w]``; gives ``[B, K, C]``."""
    b, c, k, heads = shape.batch, shape.channels, shape.tokens, shape.heads
    n, d = (shape.size // 3) ** 2, c // heads
    query = graph.transpose(graph.reshape(graph.scaled(query, d**-0.5), b, k, heads, d), 0, 2, 1, 3)
    if channels_last:
        pixels = graph.reshape(tokens, b, n, heads, d)
        key, value = graph.transpose(pixels, 0, 2, 3, 1), graph.transpose(pixels, 0, 2, 1, 3)
    else:
        key = graph.reshape(tokens, b, heads, d, n)
        value = graph.transpose(key, 0, 1, 3, 2)
    weights = graph.add("Softmax", graph.add("MatMul", query, key), axis=3)
    return graph.reshape(graph.transpose(graph.add("MatMul", weights, value), 0, 2, 1, 3), b, k, c)


CASES = (Conv2Former(), Chain())

if __name__ == "__main__":
    sys.exit(main(CASES))
