"""Text to image: ``image + softmax(scale image K^T) V`` per head. ``python -m bench.former2conv --help``"""

from __future__ import annotations

import sys

from torch import Tensor

from bench.case import Case, shapes
from bench.common import main
from bench.peers import rows, split_heads
from fusekern.ops import former2conv
from fusekern.ops.former2conv import former2conv_reference


class Former2Conv(Case):
    name = op = "former2conv"
    attention = True
    fed = ("image", "key", "value")
    shapes = {
        "cpu": shapes("1,256,64,19", "1,256,64,150", "1,256,16,19", "1,512,16,150", "1,512,32,150", "1,256,128,19"),
        "quick": shapes("1,256,64,19", "1,256,64,150"),
        "cuda": shapes(
            *("1,256,16,19", "1,256,16,150", "1,512,16,19", "1,512,16,150", "1,1024,16,150", "1,512,32,150"),
            *("1,512,64,150", "4,512,16,150", "4,512,32,150", "16,256,32,19", "16,512,16,150", "16,512,32,150"),
            *("16,256,64,150", "16,512,64,150", "16,1024,32,150", "32,512,16,150", "32,512,32,150"),
            *("32,256,64,19", "32,256,128,19", "32,256,128,150", "16,512,128,150"),
        ),
        "headline": shapes("16,512,32,150", "16,512,64,150", "32,256,128,150", "32,256,64,19", "1,512,16,150"),
        "compile": shapes("16,512,32,150", "16,512,64,150", "32,256,64,19", "1,512,16,150", "1,256,64,19"),
    }

    def sizes(self, shape):
        b, c, h, k = shape.batch, shape.channels, shape.size, shape.tokens
        return {"image": (b, c, h, h), "key": (b, k, c), "value": (b, k, c)}

    def arguments(self, shape, image, key, value):
        return image, key, value, shape.heads, None

    def fused(self, shape, backend, image, key, value):
        return former2conv(image, key, value, heads=shape.heads, backend=backend)

    def reference(self, shape, image, key, value):
        return former2conv_reference(image, key, value, heads=shape.heads)

    def compose(self, shape, attend, image: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(tokens, shape.heads) for tokens in (rows(image), key, value))
        gathered = attend(query, key, value).transpose(1, 2).flatten(2)  # [B, N, C]
        return image + gathered.transpose(1, 2).unflatten(2, image.shape[2:])

    def graph(self, shape, graph, tensors, channels_last):
        b, c, h, k, heads = shape.batch, shape.channels, shape.size, shape.tokens, shape.heads
        n, d = h * h, c // heads
        key = graph.reshape(graph.scaled("key", d**-0.5), b, k, heads, d)
        value = graph.reshape("value", b, k, heads, d)
        if channels_last:
            query = graph.transpose(graph.reshape("image", b, n, heads, d), 0, 2, 1, 3)
            similarity = graph.add("MatMul", query, graph.transpose(key, 0, 2, 3, 1))  # [B, heads, N, K]
            weights = graph.add("Softmax", similarity, axis=3)
            gathered = graph.add("MatMul", weights, graph.transpose(value, 0, 2, 1, 3))
            return graph.add("Add", "image", graph.reshape(graph.transpose(gathered, 0, 2, 1, 3), b, h, h, c))
        query = graph.reshape("image", b, heads, d, n)
        weights = graph.add("Softmax", graph.add("MatMul", graph.transpose(key, 0, 2, 1, 3), query), axis=2)
        gathered = graph.add("MatMul", graph.transpose(value, 0, 2, 3, 1), weights)  # [B, heads, d, N]
        return graph.add("Add", "image", graph.reshape(gathered, b, c, h, h))

    def flops(self, shape):
        forward = 4 * shape.batch * shape.size**2 * shape.tokens * shape.channels
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: image, key, value; out. Backward: grad, image, key, value; the three gradients."""
        image = shape.batch * shape.channels * shape.size**2
        text = shape.batch * shape.channels * shape.tokens
        return 2 * image + 2 * text, 3 * image + 4 * text


CASES = (Former2Conv(),)

if __name__ == "__main__":
    sys.exit(main(CASES))
