"""Guidance: what text does to the last backbone level. The methods of a comparison differ in this module alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusekern.config import GuidanceConfig
from fusekern.nn import ConvFormer, TextLinear


class Guided(NamedTuple):
    """Result of a guidance module.

    Attributes:
        feature: `[B, out_channels, h, w]`, takes the place of the last backbone level.
        score: score map `[B, K, h, w]`, or None.
        text: text tokens after the layer `[B, K, C]`, or None.
    """

    feature: Tensor
    score: Tensor | None
    text: Tensor | None


class NoGuidance(nn.Module):
    """The vanilla model: the last level passes unchanged.

    Args:
        in_channels: width of the last backbone level.
    """

    aux_weight = 0.0

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.out_channels = in_channels

    def forward(self, feature: Tensor, text: Tensor | None) -> Guided:
        """`[B, C5, h, w]` -> the same tensor, without score and text."""
        return Guided(feature, None, None)


class ConvFormerGuidance(nn.Module):
    """X = [I', S]: the last level corrected by text, with its score map appended (paper, section 3.1).

    The image reaches the width C of the layer by a 1x1 convolution with batch norm, the text by one linear map, or
    unchanged where it has that width already.

    Args:
        in_channels: width of the last backbone level.
        text_width: width D of the text embeddings.
        classes: number of classes K.
        config: settings of the layer and of the auxiliary loss. ``aux_tau`` divides the score map before its cross
            entropy: 0.07 suits cosines; with ``normalize=False`` the scores are raw inner products of order 100, which
            want a tau of 1 or more.

    Raises:
        ValueError: settings that the layer refuses, a tau that is not positive, or a negative weight.
    """

    def __init__(self, in_channels: int, text_width: int, classes: int, config: GuidanceConfig) -> None:
        super().__init__()
        if config.aux_tau <= 0 or config.aux_weight < 0:
            raise ValueError(f"needed aux_tau > 0 and aux_weight >= 0, got {config.aux_tau} and {config.aux_weight}")
        width = config.channels
        self.projection = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.text = nn.Identity() if text_width == width else TextLinear(text_width, width)
        self.layer = ConvFormer(
            width,
            blocks=config.blocks,
            bridge_heads=config.bridge_heads,
            text_heads=config.text_heads,
            expansion=config.expansion,
            ffn_ratio=config.ffn_ratio,
            downsample=config.downsample,
            pad=config.pad,
            bridge=config.bridge,
            outer_residual=config.outer_residual,
            normalize=config.normalize,
            text_scale=config.text_scale,
            memory=config.memory,
            backend=config.backend,
        )
        self.out_channels = width + classes
        self.aux_weight = config.aux_weight
        self.aux_tau = config.aux_tau

    def forward(self, feature: Tensor, text: Tensor) -> Guided:
        """Image `[B, C5, h, w]` and embeddings `[K, D]` -> feature `[B, C + K, h, w]`, score map and text tokens."""
        out = self.layer(self.projection(feature), self.text(text))
        return Guided(torch.cat([out.image, out.score], dim=1), out.score, out.text)
