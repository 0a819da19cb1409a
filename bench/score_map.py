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

HEADLINE = shapes("16,512,32,150", "16,512,64,150", "32,256,64,19", "1,512,16,150")
FEW = shapes("1,512,16,150", "1,256,64,19", "1,256,64,150", "1,512,32,150")


class ScoreMap(Case):
    """As the segmenter takes it: cosines, beside the image."""

    name = op = "score_map"
    fed = ("image", "text")
    normalize = concat = True
    shapes = Former2Conv.shapes | {
        "headline": HEADLINE,
        "compile": shapes("16,512,32,150", "32,256,64,19", "1,512,16,150", "1,256,64,19"),
    }

    def sizes(self, shape):
        b, c, h, k = shape.batch, shape.channels, shape.size, shape.tokens
        return {"image": (b, c, h, h), "text": (b, k, c)}

    def arguments(self, shape, image, text):
        return image, text, self.normalize, self.concat

    def fused(self, shape, backend, image, text):
        return score_map(image, text, normalize=self.normalize, concat=self.concat, backend=backend)

    def reference(self, shape, image, text):
        return score_map_reference(image, text, normalize=self.normalize, concat=self.concat)

    def compose(self, shape, attend, image: Tensor, text: Tensor) -> Tensor:
        """Norms divide the scores instead of the pixels, so that no normalised image is written."""
        names = F.normalize(text, dim=2, eps=1e-12) if self.normalize else text
        if image.stride(1) == 1:
            pixels, channels = image.flatten(2).transpose(1, 2), 2  # [B, N, C]
            score = pixels @ names.transpose(1, 2)
        else:
            pixels, channels = image.flatten(2), 1  # [B, C, N]
            score = names @ pixels
        if self.normalize:
            norm = torch.linalg.vector_norm(pixels, dim=channels, keepdim=True, dtype=torch.float32)
            score = score * norm.clamp_min(1e-12).reciprocal().to(score.dtype)
        both = torch.cat([pixels, score], dim=channels) if self.concat else score
        return (both.transpose(1, 2) if channels == 2 else both).unflatten(2, image.shape[2:])

    def graph(self, shape, graph, tensors, channels_last):
        b, c, h, k = shape.batch, shape.channels, shape.size, shape.tokens
        names, channels = "text", 2 if channels_last else 1
        if self.normalize:
            names = graph.add("Div", "text", graph.add("ReduceL2", "text", axes=[2], keepdims=1))
        if channels_last:
            pixels = graph.reshape("image", b, h * h, c)
            score = graph.add("MatMul", pixels, graph.transpose(names, 0, 2, 1))
        else:
            pixels = graph.reshape("image", b, c, h * h)
            score = graph.add("MatMul", names, pixels)
        if self.normalize:
            score = graph.add("Div", score, graph.add("ReduceL2", pixels, axes=[channels], keepdims=1))
        both = graph.add("Concat", pixels, score, axis=channels) if self.concat else score
        width = c + k if self.concat else k
        return graph.reshape(both, *((b, h, h, width) if channels_last else (b, width, h, h)))

    def parts(self, shape, out):
        if not self.concat:
            return {"score": out}
        return {"image": out[:, : shape.channels], "score": out[:, shape.channels :]}

    def flops(self, shape):
        forward = 2 * shape.batch * shape.size**2 * shape.tokens * shape.channels
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: image, text; image (where it is concatenated) and scores. Backward: the gradient of these, image,
        text; two gradients."""
        pixels = shape.batch * shape.size**2
        image, text = pixels * shape.channels, shape.batch * shape.tokens * shape.channels
        score, copied = pixels * shape.tokens, image if self.concat else 0
        return image + copied + score + text, 2 * image + copied + score + 2 * text


class Cosine(ScoreMap):
    """The op's defaults: no concatenation."""

    name = "score_map cosine"
    concat = False
    shapes = {**ScoreMap.shapes, "cpu": FEW, "cuda": HEADLINE, "compile": ()}


class Plain(Cosine):
    """Equation 2 to the letter: nothing but a product."""

    name = "score_map plain"
    normalize = False


class PlainConcatenated(Plain):
    name = "score_map plain concatenated"
    concat = True


CASES = (ScoreMap(), Cosine(), Plain(), PlainConcatenated())

if __name__ == "__main__":
    sys.exit(main(CASES))
