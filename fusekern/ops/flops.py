"""What the ops with kernels cost, for ``torch.utils.flop_counter.FlopCounterMode``, which cannot look into them.

    import fusekern.ops.flops
    with FlopCounterMode() as counter: ...

Its own import is what makes the counter count: ``import fusekern`` leaves it out, because the counter imports Triton. A
multiplication and an addition count one each; what a backward computes again is not counted, nor are norms and softmax.
"""

from __future__ import annotations

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

_fusekern = torch.ops.fusekern


@register_flop_formula([_fusekern.former2conv, _fusekern.conv2former])
def attention(first, second, *rest, **keywords) -> int:
    """4 B N K C: similarities and weighted sum."""
    image, tokens = (first, second) if len(first) == 4 else (second, first)
    return 4 * prod(image) * tokens[1]


@register_flop_formula([_fusekern.former2conv_backward, _fusekern.conv2former_backward])
def attention_backward(grad, first, second, *rest, **keywords) -> int:
    """8 B N K C: two products for each of the forward's."""
    image, tokens = (first, second) if len(first) == 4 else (second, first)
    return 8 * prod(image) * tokens[1]


@register_flop_formula(_fusekern.former)
def former(tokens, *rest, **keywords) -> int:
    """2 B K (4 C^2 + 2 C F) of the linear layers and 4 B K^2 C of the attention."""
    batch, count, channels = tokens
    hidden = rest[6][0]
    return batch * count * channels * (8 * channels + 4 * hidden + 4 * count)


@register_flop_formula(_fusekern.former_backward)
def former_backward(grad, *rest, **keywords) -> int:
    """Twice the forward's."""
    return 2 * former(*rest)


@register_flop_formula(_fusekern.text_path)
def text_path(tokens, gathered, *rest, **keywords) -> int:
    """Those of former and 2 B K C^2 for each of the three or four linear layers around it."""
    batch, count, channels = tokens
    linears = 3 if rest[20] is None else 4
    return former(tokens, *rest[4:]) + 2 * linears * batch * count * channels**2


@register_flop_formula(_fusekern.text_path_backward)
def text_path_backward(grad, dkey, dvalue, dquery, gathered, *rest, **keywords) -> int:
    """Twice the forward's."""
    return 2 * text_path(grad, gathered, *rest)


@register_flop_formula(_fusekern.score_map)
def score_map(image, text, *rest, **keywords) -> int:
    """2 B N K C."""
    return 2 * prod(image) * text[1]


@register_flop_formula(_fusekern.score_map_backward)
def score_map_backward(grad, image, text, *rest, **keywords) -> int:
    """4 B N K C: the gradients of pixels and text."""
    return 4 * prod(image) * text[1]


@register_flop_formula(_fusekern.downsample)
def downsample(image, weight, bias, h, w, *rest, **keywords) -> int:
    """18 B n C^2 with n = h w tokens: nine products of matrices."""
    batch, channels = image[:2]
    return 18 * batch * h * w * channels**2


@register_flop_formula(_fusekern.downsample_backward)
def downsample_backward(grad, *rest, **keywords) -> int:
    """36 B n C^2: the gradients of image and weight."""
    return 36 * prod(grad) * grad[1]


def _bottleneck(image, depthwise, project, stride: int) -> int:
    batch, channels, height, width = image
    before = batch * height * width
    after = batch * -(-height // stride) * -(-width // stride)
    hidden, _, size, _ = depthwise
    return 2 * hidden * (before * channels + after * (size**2 + project[0]))


@register_flop_formula(_fusekern.inverted_bottleneck)
def inverted_bottleneck(image, expand, depthwise, project, *rest, **keywords) -> int:
    """2 (N C E + M E k^2 + M E O) with N pixels before and M after the depthwise convolution."""
    return _bottleneck(image, depthwise, project, rest[14])


@register_flop_formula(_fusekern.inverted_bottleneck_infer)
def inverted_bottleneck_infer(image, expand, depthwise, project, *rest, **keywords) -> int:
    """The same."""
    return _bottleneck(image, depthwise, project, rest[13])


@register_flop_formula(_fusekern.inverted_bottleneck_backward)
def inverted_bottleneck_backward(grad, image, expand, depthwise, project, y1, y2, *rest, **keywords) -> int:
    """Twice the forward's."""
    batch, channels, height, width = image
    hidden, _, size, _ = depthwise
    before, after = batch * height * width, prod(grad) // grad[1]
    return 4 * hidden * (before * channels + after * (size**2 + project[0]))
