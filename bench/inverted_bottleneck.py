"""Expand, filter each channel, project, in training and in inference. ``python -m bench.inverted_bottleneck --help``

The last number of a shape is the expansion, E / C. ReLU6 is kept away from its kinks, so that parity can be judged by
the common rule: that costs no contender more or less time.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.case import Case, shapes
from bench.common import main
from fusekern.ops import BatchNorm, inverted_bottleneck
from fusekern.ops.inverted_bottleneck import inverted_bottleneck_reference

EPS = 1e-5


class Training(Case):
    """Norms by the statistics of the batch."""

    name = op = "inverted_bottleneck"
    batch = True
    kernels = {"cpu": "cpp", "cuda": "cuda"}
    others = {"eager-linear": "with_linear"}
    fed = ("image",)
    engines_want_nchw = True
    shapes = {
        "cpu": shapes("1,512,16,6", "1,256,64,2", "1,256,16,6", "4,512,16,6", "1,512,32,6"),
        "quick": shapes("1,512,16,6", "1,256,64,2"),
        "cuda": shapes(
            *("1,512,16,6", "4,512,16,6", "16,512,16,6", "16,512,32,6", "32,512,32,6", "16,256,64,2", "32,256,64,2"),
            *("32,256,128,2", "16,1024,32,6"),
        ),
        "headline": shapes("16,512,32,6", "32,256,64,2", "1,512,16,6"),
        "compile": shapes("16,512,32,6", "32,256,64,2", "1,512,16,6", "1,256,64,2"),
    }

    def sizes(self, shape):
        c, e = shape.channels, shape.channels * shape.tokens
        weights = {"expand_weight": (e, c, 1, 1), "depthwise_weight": (e, 1, 3, 3), "project_weight": (c, e, 1, 1)}
        vectors = {"scale1": (e,), "shift1": (e,), "scale2": (e,), "scale3": (c,), "shift3": (c,)}
        return {"image": (shape.batch, c, shape.size, shape.size), **weights, **vectors}

    def norms(self, scale1, shift1, scale2, scale3, shift3) -> tuple[BatchNorm, BatchNorm, BatchNorm]:
        """With 3 +- 0.4 times a normal value before ReLU6. The second learns no shift: the third takes it away."""
        found = []
        for scale, shift in ((scale1, shift1), (scale2, torch.zeros_like(scale2)), (scale3, shift3)):
            mean, var = torch.zeros_like(scale).detach(), torch.ones_like(scale).detach()
            found.append(BatchNorm(0.4 + 0.01 * scale, 3 + 0.1 * shift, mean, var, EPS, self.batch))
        return tuple(found)

    def arguments(self, shape, image, expand, depthwise, project, *vectors):
        return image, expand, depthwise, project, self.norms(*vectors), 1, ""

    def fused(self, shape, backend, image, expand, depthwise, project, *vectors):
        return inverted_bottleneck(image, expand, depthwise, project, self.norms(*vectors), backend=backend)[0]

    def reference(self, shape, image, expand, depthwise, project, *vectors):
        return inverted_bottleneck_reference(image, expand, depthwise, project, self.norms(*vectors))[0]

    def eager(self, shape, *tensors):
        return self._eager(F.conv2d, *tensors)

    def with_linear(self, shape, *tensors):
        return self._eager(pointwise, *tensors)

    def compose(self, shape, attend, *tensors):
        return self.eager(shape, *tensors)

    def _eager(self, convolve, image, expand, depthwise, project, *vectors):
        """The modules' way, activations in place."""
        norms = self.norms(*vectors)
        hidden = F.relu6(self._normalise(convolve(image, expand), norms[0]), inplace=True)
        hidden = F.conv2d(hidden, depthwise, padding=1, groups=hidden.shape[1])
        hidden = F.relu6(self._normalise(hidden, norms[1]), inplace=True)
        return image + self._normalise(convolve(hidden, project), norms[2])

    def _normalise(self, x: Tensor, norm: BatchNorm) -> Tensor:
        running = (None, None) if self.batch else (norm.mean, norm.var)
        return F.batch_norm(x, *running, norm.weight, norm.bias, training=self.batch, eps=EPS)

    def graph(self, shape, graph, tensors, channels_last):
        raise peers.Unavailable("inference engines have no statistics of the batch")

    def flops(self, shape):
        c, e = shape.channels, shape.channels * shape.tokens
        forward = 2 * shape.batch * shape.size**2 * e * (2 * c + 9)
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: image, weights, vectors; out. Backward: grad and these; their gradients. Statistics of the batch
        make another pass over what is as wide as E, kept or computed again, which is not counted."""
        c, e = shape.channels, shape.channels * shape.tokens
        image, rest = shape.batch * shape.size**2 * c, e * (2 * c + 9) + 3 * e + 2 * c
        return 2 * image + rest, 3 * image + 2 * rest


class Inference(Training):
    """Norms by running statistics; ONNX Runtime and OpenVINO get them folded into the convolutions."""

    name = "inverted_bottleneck inference"
    batch = False
    shapes = {
        "cpu": shapes("1,512,16,6", "1,256,128,2", "1,256,64,2", "1,256,16,6", "1,512,32,6"),
        "quick": shapes("1,512,16,6", "1,256,128,2"),
        "cuda": shapes("1,512,16,6", "16,512,16,6", "16,512,32,6", "32,256,64,2"),
        "headline": shapes("1,512,16,6", "16,512,32,6"),
        "compile": shapes("1,512,16,6", "16,512,32,6"),
    }

    def graph(self, shape, graph, tensors, channels_last):
        image, expand, depthwise, project, *vectors = tensors.values()
        value = "image"
        for weight, norm in zip((expand, depthwise, project), self.norms(*vectors), strict=True):
            scale = norm.weight * (norm.var + EPS).rsqrt()
            folded = [graph.constant((weight * scale[:, None, None, None]).contiguous())]
            folded.append(graph.constant(norm.bias - norm.mean * scale))
            across = weight is depthwise
            attributes = {"group": len(weight), "pads": [1, 1, 1, 1]} if across else {}
            value = graph.add("Conv", value, *folded, **attributes)
            if weight is not project:
                bounds = (torch.tensor(0.0), torch.tensor(6.0))
                value = graph.add("Clip", value, *(graph.constant(bound) for bound in bounds))
        return graph.add("Add", value, "image")


def pointwise(image: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution as a product over channels that lie side by side."""
    return F.linear(image.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


CASES = (Training(), Inference())

if __name__ == "__main__":
    sys.exit(main(CASES))
