"""The scores of all pixels, written beside the image: ``[I', S]``. ``python -m bench.score_map --help``"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, shapes
from bench.common import main
from bench.former2conv import Former2Conv
from fusekern.ops import score_map
from fusekern.ops.score_map import score_map_reference


class ScoreMap(Case):
    name = op = "score_map"
    fed = ("image", "text")
    shapes = Former2Conv.shapes | {
        "headline": shapes("16,512,32,150", "16,512,64,150", "32,256,64,19", "1,512,16,150"),
        "compile": shapes("16,512,32,150", "32,256,64,19", "1,512,16,150", "1,256,64,19"),
    }

    def sizes(self, shape):
        b, c, h, k = shape.batch, shape.channels, shape.size, shape.tokens
        return {"image": (b, c, h, h), "text": (b, k, c)}

    def arguments(self, shape, image, text):
        return image, text, True, True

    def fused(self, shape, backend, image, text):
        return score_map(image, text, concat=True, backend=backend)

    def reference(self, shape, image, text):
        return score_map_reference(image, text, concat=True)

    def compose(self, shape, attend, image: Tensor, text: Tensor) -> Tensor:
        """Norms divide the scores instead of the pixels, so that no normalised image is written."""
        names = F.normalize(text, dim=2, eps=1e-12)
        if image.stride(1) == 1:
            pixels, channels = image.flatten(2).transpose(1, 2), 2  # [B, N, C]
            score = pixels @ names.transpose(1, 2)
        else:
            pixels, channels = image.flatten(2), 1  # [B, C, N]
            score = names @ pixels
        norm = torch.linalg.vector_norm(pixels, dim=channels, keepdim=True, dtype=torch.float32)
        score = score * norm.clamp_min(1e-12).reciprocal().to(score.dtype)
        both = torch.cat([pixels, score], dim=channels)
        return (both.transpose(1, 2) if channels == 2 else both).unflatten(2, image.shape[2:])

    def graph(self, shape, graph, tensors, channels_last):
        b, c, h, k = shape.batch, shape.channels, shape.size, shape.tokens
        names = graph.add("Div", "text", graph.add("ReduceL2", "text", axes=[2], keepdims=1))
        if channels_last:
            pixels = graph.reshape("image", b, h * h, c)
            score = graph.add("MatMul", pixels, graph.transpose(names, 0, 2, 1))
            score = graph.add("Div", score, graph.add("ReduceL2", pixels, axes=[2], keepdims=1))
            return graph.reshape(graph.add("Concat", pixels, score, axis=2), b, h, h, c + k)
        pixels = graph.reshape("image", b, c, h * h)
        score = graph.add(
            "Div", graph.add("MatMul", names, pixels), graph.add("ReduceL2", pixels, axes=[1], keepdims=1)
        )
        return graph.reshape(graph.add("Concat", pixels, score, axis=1), b, c + k, h, h)

    def parts(self, shape, out):
        return {"image": out[:, : shape.channels], "score": out[:, shape.channels :]}

    def flops(self, shape):
        forward = 2 * shape.batch * shape.size**2 * shape.tokens * shape.channels
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: image, text; image and scores. Backward: the gradient of these, image, text; two gradients."""
        pixels = shape.batch * shape.size**2
        image, text = pixels * shape.channels, shape.batch * shape.tokens * shape.channels
        score = pixels * shape.tokens
        return 2 * image + score + text, 3 * image + score + 2 * text


CASES = (ScoreMap(),)

if __name__ == "__main__":
    sys.exit(main(CASES))
