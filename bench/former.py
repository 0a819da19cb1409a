"""The text tokens among themselves: one post-norm transformer block. ``python -m bench.former --help``

H in ``B,C,H,K`` plays no part; it is 0.
"""

from __future__ import annotations

import sys

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Shape, shapes
from bench.common import main
from bench.peers import Graph, split_heads
from fusekern.ops import former
from fusekern.ops.former import former_reference

WB = ("weight", "bias")


class Former(Case):
    name = op = "former"
    attention = True
    fed = ("tokens",)
    shapes = {
        "cpu": shapes("1,512,0,150", "1,256,0,19", "1,512,0,19", "4,512,0,150"),
        "quick": shapes("1,256,0,19"),
        "cuda": shapes(
            *("1,512,0,150", "16,512,0,150", "32,512,0,150", "1,256,0,19", "16,256,0,19", "32,256,0,19"),
            *("1,1024,0,150", "16,1024,0,150"),
        ),
        "headline": shapes("1,512,0,150", "16,512,0,150"),
        "compile": shapes("1,512,0,150", "16,512,0,150"),
    }

    def sizes(self, shape):
        c, f = shape.channels, 2 * shape.channels
        of = {"qkv": (3 * c, c), "out": (c, c), "norm1": (c,), "up": (f, c), "down": (c, f), "norm2": (c,)}
        pairs = {f"{name}_{part}": size if part == "weight" else size[:1] for name, size in of.items() for part in WB}
        return {"tokens": (shape.batch, shape.tokens, c), **pairs}

    def scaled(self, name, tensor):
        if "norm" in name or name.endswith("bias"):
            return 0.1 * tensor + (1 if name.endswith("weight") else 0)
        return super().scaled(name, tensor)

    def arguments(self, shape, tokens, *parts):
        return tokens, *pairs_of(parts), shape.heads, 1e-5

    def fused(self, shape, backend, tokens, *parts):
        return former(tokens, *pairs_of(parts), heads=shape.heads, backend=backend)

    def reference(self, shape, tokens, *parts):
        return former_reference(tokens, *pairs_of(parts), heads=shape.heads)

    def compose(self, shape, attend, tokens: Tensor, *parts: Tensor) -> Tensor:
        return former_composed(shape, attend, tokens, *pairs_of(parts))

    def graph(self, shape, graph, tensors, channels_last):
        return former_graph(shape, graph, tensors, "tokens")

    def flops(self, shape):
        rows, c = shape.batch * shape.tokens, shape.channels
        forward = 16 * rows * c**2 + 4 * rows * shape.tokens * c
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: tokens, parameters; out. Backward: grad and these; their gradients."""
        c = shape.channels
        tokens, parameters = shape.batch * shape.tokens * c, 8 * c**2 + 11 * c
        return 2 * tokens + parameters, 3 * tokens + 2 * parameters


def pairs_of(parts: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


def former_composed(shape: Shape, attend, tokens: Tensor, qkv, out, norm1, up, down, norm2) -> Tensor:
    heads = (split_heads(x, shape.heads) for x in F.linear(tokens, *qkv).chunk(3, 2))
    mixed = attend(*heads).transpose(1, 2).flatten(2)
    tokens = F.layer_norm(tokens + F.linear(mixed, *out), norm1[0].shape, *norm1)
    return F.layer_norm(tokens + F.linear(F.gelu(F.linear(tokens, *up)), *down), norm2[0].shape, *norm2)


def linear(graph: Graph, tensors: dict[str, Tensor], x: str, name: str) -> str:
    """A linear layer, by the name that its weight and bias begin with."""
    weight = graph.constant(tensors[f"{name}_weight"].T.contiguous())
    return graph.add("Add", graph.add("MatMul", x, weight), graph.constant(tensors[f"{name}_bias"]))


def norm(graph: Graph, tensors: dict[str, Tensor], x: str, name: str) -> str:
    """A layer norm likewise."""
    parts = (graph.constant(tensors[f"{name}_{part}"]) for part in WB)
    return graph.add("LayerNormalization", x, *parts, epsilon=1e-5)


def former_graph(shape: Shape, graph: Graph, tensors: dict[str, Tensor], tokens: str) -> str:
    """Adds the block's nodes behind ``tokens`` and returns its result's name."""
    b, c, k, heads, d = shape.batch, shape.channels, shape.tokens, shape.heads, shape.channels // shape.heads

    def gelu(x: str) -> str:
        erf = graph.add("Erf", graph.scaled(x, 0.5**0.5))
        return graph.scaled(graph.add("Mul", x, graph.add("Add", erf, graph.constant(np.float32(1)))), 0.5)

    parts = graph.reshape(linear(graph, tensors, tokens, "qkv"), b, k, 3, heads, d)
    parts = graph.transpose(parts, 2, 0, 3, 1, 4)
    query, key, values = (graph.add("Gather", parts, graph.constant(np.int64(i)), axis=0) for i in range(3))
    similarity = graph.add("MatMul", graph.scaled(query, d**-0.5), graph.transpose(key, 0, 1, 3, 2))
    mixed = graph.add("MatMul", graph.add("Softmax", similarity, axis=3), values)
    mixed = graph.reshape(graph.transpose(mixed, 0, 2, 1, 3), b, k, c)
    first = norm(graph, tensors, graph.add("Add", tokens, linear(graph, tensors, mixed, "out")), "norm1")
    wide = gelu(linear(graph, tensors, first, "up"))
    return norm(graph, tensors, graph.add("Add", first, linear(graph, tensors, wide, "down")), "norm2")


CASES = (Former(),)

if __name__ == "__main__":
    sys.exit(main(CASES))
