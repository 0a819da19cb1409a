"""The whole fusion layer, in training and in inference. ``python -m bench.layer --help``

Six blocks and the score map, concatenated to the image as a decoder takes them. The text is one for all images,
``[K, C]``. The expansion is 6, as in the paper, and 2 on maps of 64x64 pixels and more, where 6 is beyond any budget.
Gradients are judged with ReLU6 far from its kinks, as in ``bench.inverted_bottleneck``; timed is the layer with norms
as PyTorch starts them.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import peers
from bench.case import Case, shapes
from bench.common import main
from bench.score_map import ScoreMap
from fusekern import ConvFormer

BLOCKS = 6
SHAPES = {
    "cpu": shapes(
        *("1,512,16,150", "1,256,16,19", "1,256,64,19", "4,512,16,150"),
        *("16,512,16,150", "32,256,16,19", "1,1024,16,150", "1,256,128,19"),
    ),
    "quick": shapes("1,256,16,19"),
    "cuda": shapes(
        *("1,512,16,150", "4,512,16,150", "16,512,16,150", "16,512,32,150", "32,512,16,150", "1,256,16,19"),
        *("16,256,32,19", "32,256,64,19", "16,1024,16,150", "4,256,128,19", "1,512,64,150"),
    ),
    "headline": shapes("1,512,16,150", "16,512,16,150", "32,256,64,19", "16,512,32,150"),
    "compile": shapes("1,512,16,150", "16,512,16,150", "32,256,64,19"),
}


def expansion(shape) -> int:
    return 2 if shape.size >= 64 else 6


class Training(Case):
    """Norms by the statistics of the batch."""

    name = op = "layer"
    training = True
    spread = 0.4  # of what goes into ReLU6, around 3
    attention = True
    kernels = {"cpu": "auto", "cuda": "auto"}
    shapes = SHAPES
    fed = ("image", "text")
    widened = True
    engines_want_nchw = True
    draws = 4  # the score's error is mostly the text's, which all pixels share: of one draw it is luck by half

    def __init__(self) -> None:
        self.layers: dict[tuple, Bound] = {}

    def sizes(self, shape):
        image, text = (shape.batch, shape.channels, shape.size, shape.size), (shape.tokens, shape.channels)
        return {"image": image, "text": text, **parameters_of(shape)}

    def scaled(self, name, tensor):
        if "bottleneck.norm1" in name or "bottleneck.norm2" in name:
            return self.spread * (1 + 0.025 * tensor) if name.endswith("weight") else 3 + 0.1 * tensor
        if "norm" in name or name.endswith("bias"):
            return 0.1 * tensor + (1 if name.endswith("weight") else 0)
        return super().scaled(name, tensor)

    def timed(self, name, tensor):
        if "bottleneck.norm" in name:
            return torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
        return super().timed(name, tensor)

    def judged_with(self, name):
        return name if name in ("image", "score", "dimage", "dtext") else "parameters"

    def arguments(self, shape, *tensors):
        return ()

    def resolved(self, shape, *tensors):
        return "auto"

    def refused(self, shape, backend, *tensors):
        return []

    def fused(self, shape, backend, image, text, *parameters):
        key = shape, backend, image.dtype, image.device
        if key not in self.layers:
            self.layers[key] = Bound(layer_of(shape, backend).to(image.device, image.dtype).train(self.training))
        image, _, score = self.layers[key](parameters, image, text)
        return torch.cat((image, score), 1)

    def reference(self, shape, *tensors):
        return self.fused(shape, "reference", *tensors)

    def compose(self, shape, attend, image, text, *parameters):
        named = dict(zip(parameters_of(shape), parameters, strict=True))
        return eager(named, image, text, shape.heads, attend, self.training)

    def graph(self, shape, graph, tensors, channels_last):
        raise peers.Unavailable("inference engines have no statistics of the batch")

    def parts(self, shape, out):
        return {"image": out[:, : shape.channels], "score": out[:, shape.channels :]}

    def flops(self, shape):
        forward = sum(flops_of_ops(shape).values())
        return forward, 2 * forward

    def elements(self, shape):
        """Forward: image, text, parameters; image and score. Backward: the gradient of these, image, text, parameters;
        their gradients. What passes from block to block is not counted."""
        image, text, *rest = (torch.Size(size).numel() for size in self.sizes(shape).values())
        score, given = shape.batch * shape.size**2 * shape.tokens, image + text + sum(rest)
        return given + image + score, 2 * given + image + score


class Inference(Training):
    """Norms by running statistics; ONNX Runtime and OpenVINO get the layer as PyTorch exports it."""

    name = "layer inference"
    training = False
    spread = 0.1  # of what has more than unit variance, block after block

    def onnx(self, shape, tensors, channels_last, fed, size):
        image, text = (tensors[name].contiguous() for name in self.fed)
        with torch.no_grad():
            program = torch.onnx.export(
                Exported(self, shape, tensors).eval(),
                (image, text),
                input_names=self.fed,
                output_names=["out"],
                dynamo=True,
                verbose=False,
            )
        return program.model_proto.SerializeToString(), "out"


def layer_of(shape, backend: str = "auto") -> ConvFormer:
    heads = {"bridge_heads": shape.heads, "text_heads": shape.heads}
    return ConvFormer(shape.channels, blocks=BLOCKS, expansion=expansion(shape), backend=backend, **heads)


def flops_of_ops(shape) -> dict[str, int]:
    """Of the forward, by the op that a block has for them."""
    c, k, b = shape.channels, shape.tokens, shape.batch
    pixels, tokens, hidden = b * shape.size**2, b * (shape.size // 3) ** 2, c * expansion(shape)
    block = {
        "inverted_bottleneck": 2 * pixels * hidden * (2 * c + 9),
        "downsample": 18 * tokens * c**2,
        "conv2former": 4 * tokens * k * c,
        "text_path": 24 * b * k * c**2 + 4 * b * k**2 * c,
        "former2conv": 4 * pixels * k * c,
    }
    return {**{op: BLOCKS * flops for op, flops in block.items()}, "score_map": 2 * pixels * k * c}


@cache
def parameters_of(shape) -> dict[str, tuple[int, ...]]:
    """Their sizes by their names."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in layer_of(shape).named_parameters()}


class Bound:
    """A layer whose parameters are whatever tensors come with the call: ``functional_call`` would look each of them up
    by its name, which takes as long as a small op."""

    def __init__(self, layer: ConvFormer) -> None:
        self.layer = layer
        modules = dict(layer.named_modules())
        places = [name.rpartition(".") for name, _ in layer.named_parameters()]
        self.places = [(modules[owner]._parameters, key) for owner, _, key in places]

    def __call__(self, parameters: tuple[Tensor, ...], *arguments: object) -> tuple[Tensor, ...]:
        for (owner, key), parameter in zip(self.places, parameters, strict=True):
            owner[key] = parameter
        return self.layer(*arguments)


class Exported(nn.Module):
    """``eager`` with the parameters in it."""

    def __init__(self, case: Case, shape, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.shape = case, shape
        self.values = nn.ParameterList([tensor for name, tensor in tensors.items() if name not in case.fed])

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.case.eager(self.shape, image, text, *self.values)


def eager(p: dict[str, Tensor], image: Tensor, text: Tensor, heads: int, attend, training: bool) -> Tensor:
    """The layer as PyTorch is fastest at it: fused attention, activations in place."""
    text = text.expand(image.shape[0], -1, -1)
    first_image, first_text = image, text
    for i in range(BLOCKS):
        image, text = eager_block(p, f"blocks.{i}.", image, text, heads, attend, training)
    image, text = image + first_image, text + first_text
    return ScoreMap().compose(None, None, image, text)


def eager_block(
    p: dict[str, Tensor], prefix: str, image: Tensor, text: Tensor, heads: int, attend, training: bool
) -> tuple[Tensor, Tensor]:
    """One block; ``prefix`` begins the names of its parameters, and of its running statistics if they are given."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def batch_norm(x: Tensor, name: str) -> Tensor:
        running = p.get(f"{name}.running_mean"), p.get(f"{name}.running_var")
        if training:
            running = None, None
        elif running[0] is None:
            running = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        return F.batch_norm(x, *running, p[f"{name}.weight"], p[f"{name}.bias"], training=training)

    def cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(*(peers.split_heads(x, heads) for x in (query, key, value))).transpose(1, 2).flatten(2)

    at = f"{prefix}image_to_text"
    pixels = F.conv2d(image, p[f"{at}.downsample.weight"], p[f"{at}.downsample.bias"], stride=3)
    pixels = peers.rows(pixels)
    text = layer_norm(text + linear(cross(linear(text, f"{at}.query"), pixels, pixels), f"{at}.out"), f"{at}.norm")
    at = f"{prefix}transformer"
    text = layer_norm(text + linear(cross(*linear(text, f"{at}.qkv").chunk(3, 2)), f"{at}.out"), f"{at}.norm1")
    text = layer_norm(text + linear(F.gelu(linear(text, f"{at}.up")), f"{at}.down"), f"{at}.norm2")
    at = f"{prefix}bottleneck"
    hidden = F.relu6(batch_norm(F.conv2d(image, p[f"{at}.expand.weight"]), f"{at}.norm1"), inplace=True)
    hidden = F.conv2d(hidden, p[f"{at}.depthwise.weight"], padding=1, groups=hidden.shape[1])
    hidden = F.relu6(batch_norm(hidden, f"{at}.norm2"), inplace=True)
    image = image + batch_norm(F.conv2d(hidden, p[f"{at}.project.weight"]), f"{at}.norm3")
    at = f"{prefix}text_to_image"
    gathered = cross(peers.rows(image), linear(text, f"{at}.key"), linear(text, f"{at}.value"))
    return image + gathered.transpose(1, 2).unflatten(2, image.shape[2:]), text


CASES = (Training(), Inference())

if __name__ == "__main__":
    sys.exit(main(CASES))
