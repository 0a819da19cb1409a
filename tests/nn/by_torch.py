"""A block of the layer out of torch's own modules and functions, as one would write it in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


def attend(query, key, value, heads):
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def block_by_torch(block, image, text):
    """The block out of torch's own modules and functions."""
    bridge = block.image_to_text
    tokens = F.conv2d(image, bridge.downsample.weight, bridge.downsample.bias, stride=3).flatten(2).transpose(1, 2)
    text = bridge.norm(text + bridge.out(attend(bridge.query(text), tokens, tokens, bridge.heads)))

    former = block.transformer
    layer = nn.TransformerEncoderLayer(
        former.up.in_features,
        former.heads,
        former.up.out_features,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        device=text.device,
        dtype=text.dtype,
    )
    state = {"self_attn.in_proj_weight": former.qkv.weight, "self_attn.in_proj_bias": former.qkv.bias}
    names = {"self_attn.out_proj": "out", "linear1": "up", "linear2": "down", "norm1": "norm1", "norm2": "norm2"}
    for theirs, ours in names.items():
        state |= {f"{theirs}.{key}": value for key, value in getattr(former, ours).state_dict().items()}
    layer.load_state_dict(state)
    text = layer(text)

    bottleneck = block.bottleneck
    image = image + nn.Sequential(
        bottleneck.expand,
        bottleneck.norm1,
        nn.ReLU6(),
        bottleneck.depthwise,
        bottleneck.norm2,
        nn.ReLU6(),
        bottleneck.project,
        bottleneck.norm3,
    )(image)

    back = block.text_to_image
    pixels = image.flatten(2).transpose(1, 2)
    gathered = attend(pixels, back.key(text), back.value(text), back.heads)
    return image + gathered.transpose(1, 2).reshape(image.shape), text
