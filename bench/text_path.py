"""All that a block does with its text between the two attentions over the image. ``python -m bench.text_path --help``

H in ``B,C,H,K`` plays no part; it is 0. The four results are put side by side, by every contender.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import main
from bench.former import Former, former_composed, former_graph, linear, norm, pairs_of
from fusekern.ops import text_path
from fusekern.ops.text_path import text_path_reference


class TextPath(Former):
    name = op = "text_path"
    fed = ("tokens", "gathered")

    def sizes(self, shape):
        c = shape.channels
        tokens, *former = super().sizes(shape).items()
        before = {"entry_weight": (c, c), "entry_bias": (c,), "norm0_weight": (c,), "norm0_bias": (c,)}
        after = {f"{name}_{part}": size for name in ("key", "value", "query") for part, size in _square(c).items()}
        return {**dict([tokens]), "gathered": tokens[1], **before, **dict(former), **after}

    def arguments(self, shape, tokens, gathered, *parts):
        return tokens, gathered, *in_order(parts), shape.heads, 1e-5

    def path(self, shape, backend, tokens, gathered, *parts):
        return text_path(tokens, gathered, *in_order(parts), heads=shape.heads, backend=backend)

    def fused(self, shape, backend, *tensors):
        return torch.cat(self.path(shape, backend, *tensors), 2)

    def reference(self, shape, tokens, gathered, *parts):
        return torch.cat(text_path_reference(tokens, gathered, *in_order(parts), heads=shape.heads), 2)

    def compose(self, shape, attend, tokens: Tensor, gathered: Tensor, *parts: Tensor) -> Tensor:
        entry, norm0, former, *exits = in_order(parts)
        tokens = F.layer_norm(tokens + F.linear(gathered, *entry), norm0[0].shape, *norm0)
        tokens = former_composed(shape, attend, tokens, *former)
        return torch.cat((tokens, *(F.linear(tokens, *exit) for exit in exits)), 2)

    def graph(self, shape, graph, tensors, channels_last):
        sums = graph.add("Add", "tokens", linear(graph, tensors, "gathered", "entry"))
        tokens = former_graph(shape, graph, tensors, norm(graph, tensors, sums, "norm0"))
        exits = (linear(graph, tensors, tokens, name) for name in ("key", "value", "query"))
        return graph.add("Concat", tokens, *exits, axis=2)

    def flops(self, shape):
        forward, _ = super().flops(shape)
        forward += 8 * shape.batch * shape.tokens * shape.channels**2
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: both inputs, parameters; four results. Backward: their gradients and the inputs; the gradients."""
        c = shape.channels
        tokens, parameters = shape.batch * shape.tokens * c, 12 * c**2 + 17 * c
        return 6 * tokens + parameters, 8 * tokens + 2 * parameters


def _square(channels: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (channels, channels), "bias": (channels,)}


def in_order(parts: tuple[Tensor, ...]) -> tuple:
    """As the op takes them: former's six pairs are one argument."""
    entry, norm0, *former, key, value, query = pairs_of(parts)
    return entry, norm0, tuple(former), key, value, query


CASES = (TextPath(),)

if __name__ == "__main__":
    sys.exit(main(CASES))
