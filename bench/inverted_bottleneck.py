"""Expand, filter each channel, project, in training and in inference; and the filter alone.

    python -m bench.inverted_bottleneck --help

The last number of a shape is the expansion, E / C. Gradients are judged with ReLU6 far from its kinks and timed with
norms as PyTorch starts them; one case is timed without a zero, too.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.case import Case, shapes
from bench.common import main
from fusekern.ops import BatchNorm, inverted_bottleneck
from fusekern.ops._kernel import empty_image, launch
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

    def scaled(self, name, tensor):
        """ReLU6 sees 3 +- 0.4 times a normal value."""
        if name.startswith("scale"):
            return 0.4 + 0.01 * tensor
        return 3 + 0.1 * tensor if name.startswith("shift") else super().scaled(name, tensor)

    def timed(self, name, tensor):
        if name.startswith("scale"):
            return torch.ones_like(tensor)
        return torch.zeros_like(tensor) if name.startswith("shift") else super().timed(name, tensor)

    def judged_with(self, name):
        return "vectors" if name.startswith(("dscale", "dshift")) else name

    def norms(self, scale1, shift1, scale2, scale3, shift3) -> tuple[BatchNorm, BatchNorm, BatchNorm]:
        # The second learns no shift, for the third takes it away: it has the first's.
        found = []
        for scale, shift in ((scale1, shift1), (scale2, shift1.detach()), (scale3, shift3)):
            mean, var = torch.zeros_like(scale).detach(), torch.ones_like(scale).detach()
            found.append(BatchNorm(scale, shift, mean, var, EPS, self.batch))
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


@cache
def _plain(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``affine`` of a norm that changes nothing, and ``coef``."""
    one = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)[:, None].repeat(1, channels)
    return one[:2].clone(), one


class _Stage(torch.autograd.Function):
    """The op's depthwise stages, with the statistics and the sums that they give the norms around them."""

    @staticmethod
    def forward(ctx, image: Tensor, weight: Tensor, backend: str) -> Tensor:
        affine, _ = _plain(image.shape[1], image.device)
        out, filters = empty_image(image), weight.flatten(0, 1)
        launch(
            backend, "inverted_bottleneck", "depthwise_fwd", image, affine, filters, 1, out, torch.empty_like(affine)
        )
        ctx.save_for_backward(image, filters, out)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        image, filters, out = ctx.saved_tensors
        affine, coef = _plain(image.shape[1], image.device)
        dimage, dfilters, sums = torch.empty_like(image), torch.empty_like(filters), torch.empty_like(affine)
        maps = grad, out, coef, image, affine, coef[1], filters, 1, dimage, dfilters, sums
        launch(ctx.backend, "inverted_bottleneck", "depthwise_bwd", *maps)
        return dimage, dfilters[:, None], None


class WithoutZeros(Training):
    """Nothing is cut off by ReLU6."""

    name = "inverted_bottleneck without zeros"
    shapes = {name: shapes("1,512,16,6", "1,256,64,2") for name in ("cpu", "cuda", "headline", "compile")}
    shapes["quick"] = ()
    timed = Case.timed


class Depthwise(Training):
    """ReLU6 of a norm and the filter of each channel, without the products around them.

    The input lies between 0 and 6 and the norm changes nothing, so that the convolution alone, of an input that is
    activated already, computes the same: it is among the contenders.
    """

    name = "inverted_bottleneck depthwise"
    others = {"eager-convolution": "alone"}
    native = "alone"
    timed = Case.timed

    def sizes(self, shape):
        e = shape.channels * shape.tokens
        return {"image": (shape.batch, e, shape.size, shape.size), "depthwise_weight": (e, 1, 3, 3)}

    def scaled(self, name, tensor):
        return 3 + 0.4 * tensor if name == "image" else super().scaled(name, tensor)

    def arguments(self, shape, image, depthwise):
        expand = depthwise.new_empty(1, 1, 1, 1).expand(image.shape[1], image.shape[1], 1, 1)
        return image, expand, depthwise, expand, (), 1, ""

    def fused(self, shape, backend, image, depthwise):
        return (
            self.reference(shape, image, depthwise)
            if backend == "reference"
            else _Stage.apply(image, depthwise, backend)
        )

    def reference(self, shape, image, depthwise):
        return self.alone(shape, F.relu6(image), depthwise)

    def eager(self, shape, image, depthwise):
        mean = image.new_zeros(image.shape[1])
        # As good as 0, which torch 2.11 refuses.
        hidden = F.relu6(F.batch_norm(image, mean, mean + 1, training=False, eps=1e-30), inplace=True)
        return self.alone(shape, hidden, depthwise)

    def alone(self, shape, image, depthwise):
        return F.conv2d(image, depthwise, padding=1, groups=image.shape[1])

    def graph(self, shape, graph, tensors, channels_last):
        bounds = [graph.constant(torch.tensor(bound)) for bound in (0.0, 6.0)]
        weight = tensors["depthwise_weight"]
        attributes = {"group": len(weight), "pads": [1, 1, 1, 1]}
        return graph.add("Conv", graph.add("Clip", "image", *bounds), graph.constant(weight.contiguous()), **attributes)

    def flops(self, shape):
        forward = 2 * 9 * shape.batch * shape.size**2 * shape.channels * shape.tokens
        return forward, 2 * forward

    def elements(self, shape):
        e = shape.channels * shape.tokens
        image = shape.batch * shape.size**2 * e
        return 2 * image + 9 * e, 3 * image + 18 * e


def pointwise(image: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution as a product over channels that lie side by side."""
    return F.linear(image.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


CASES = (Training(), Inference(), WithoutZeros(), Depthwise())

if __name__ == "__main__":
    sys.exit(main(CASES))
