"""Semantic FPN: the decoder of the paper's light systems, as DenseCLIP and mmsegmentation have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Every level gets what the coarser levels know.

    Source: "Feature Pyramid Networks for Object Detection" (arXiv 1612.03144), section 3: 1x1 convolutions to one
    width, nearest-neighbour top-down sums, a 3x3 convolution per level; no norm, no activation.

    Args:
        in_channels: channels of each level, finest first.
        channels: channels of every level on the way out.

    Shape: a list of ``[B, Ci, Hi, Wi]`` to a list of ``[B, channels, Hi, Wi]``.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for convolution in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for finer in reversed(range(len(levels) - 1)):
            coarser = F.interpolate(levels[finer + 1], size=levels[finer].shape[2:], mode="nearest")
            levels[finer] = levels[finer] + coarser
        return [output(level) for output, level in zip(self.output, levels, strict=True)]


class SemanticFPN(nn.Module):
    """Feature pyramid, then every level is brought to the finest one's size and all are summed and classified.

    Source: "Panoptic Feature Pyramid Networks" (arXiv 1901.02446), section 3.1, with the widths and norms of DenseCLIP
    (256 channels; batch norm). A level whose stride is 2^n times the finest has n stages of 3x3 convolution, batch
    norm, ReLU and bilinear doubling (``align_corners=False``); the finest has one stage without doubling. The last
    doubling of a level goes to the finest level's own size, so that sizes need not be divisible by anything.

    The pyramid starts from Xavier's uniform distribution, the stages from He's normal one, the classifier from
    N(0, 0.01), all biases from 0.

    Args:
        in_channels: channels of each level, finest first.
        classes: channels of the logits.
        strides: stride of each level; each a power of 2 times the first.
        neck_channels: channels of the feature pyramid.
        channels: channels of the stages.
        dropout: probability of the 2-d dropout before the classifier.

    Raises:
        ValueError: ``strides`` do not fit ``in_channels`` or are no powers of 2 times the first.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        classes: int,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        neck_channels: int = 256,
        channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(strides) != len(in_channels):
            raise ValueError(f"strides must have one entry a level: got {len(strides)} for {len(in_channels)} levels")
        doublings = [(stride // strides[0]).bit_length() - 1 for stride in strides]
        if [strides[0] << n for n in doublings if n >= 0] != list(strides):
            raise ValueError(f"strides must be powers of 2 times the first, got {tuple(strides)}")
        self.neck = FeaturePyramid(in_channels, neck_channels)
        self.stages = nn.ModuleList(
            nn.ModuleList(_stage(channels if i else neck_channels, channels) for i in range(max(1, n)))
            for n in doublings
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.doublings = tuple(doublings)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits at the size of the finest level.

        Args:
            features: one ``[B, Ci, Hi, Wi]`` a level, finest first.

        Returns:
            ``[B, classes, H0, W0]``.

        Raises:
            ValueError: the number of features is not the number of levels.
        """
        if len(features) != len(self.doublings):
            raise ValueError(f"features must be {len(self.doublings)} levels, got {len(features)}")
        levels = self.neck(features)
        size = levels[0].shape[2:]
        total = 0
        for level, stages, doublings in zip(levels, self.stages, self.doublings, strict=True):
            for i, stage in enumerate(stages, start=1):
                level = stage(level)
                if doublings:
                    target = size if i == doublings else (2 * level.shape[2], 2 * level.shape[3])
                    level = F.interpolate(level, size=target, mode="bilinear", align_corners=False)
            total = total + level
        return self.classifier(self.dropout(total))


def _stage(in_channels: int, channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
