"""The segmenter: backbone, text, guidance and head in one module; every method of a comparison is one of these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from fusekern.config import IGNORE, DataConfig, ModelConfig
from fusekern.errors import FusekernError
from fusekern.models.backbones import Backbone, build_backbone
from fusekern.models.guidance import ConvFormerGuidance, NoGuidance
from fusekern.nn import FeaturePyramid, SemanticFPN


class SegmenterOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: `[B, K, h4, w4]` at the resolution of the first backbone level (stride 4).
        score: score map `[B, K, h, w]` at the resolution of the last level, or None without guidance.
        text: text tokens after the layer `[B, K, C]`, or None without guidance.
    """

    logits: Tensor
    score: Tensor | None
    text: Tensor | None


# torch.export.save refuses a named tuple without a name to write; torch.export.load then wants fusekern imported.
_pytree._register_namedtuple(SegmenterOutput, serialized_type_name="fusekern.models.SegmenterOutput")


class Segmenter(nn.Module):
    """Semantic segmentation, guided by text or not.

    Args:
        backbone: image encoder with four levels.
        text: embeddings `[K, D]` of the class names, kept as a buffer and saved with the weights, or None.
        guidance: ``NoGuidance`` or ``ConvFormerGuidance``, applied to the last level.
        head: decoder from four levels to logits.
        mean: three channel means that the image in [0, 1] is shifted by.
        std: three channel standard deviations that it is divided by.
    """

    def __init__(
        self,
        backbone: Backbone,
        text: Tensor | None,
        guidance: NoGuidance | ConvFormerGuidance,
        head: SemanticFPN,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.guidance = guidance
        self.head = head
        self.register_buffer("text", None if text is None else text.detach().clone().float())
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, image: Tensor) -> SegmenterOutput:
        """Segment RGB images.

        Args:
            image: `[B, 3, H, W]`, floating point, values in [0, 1], not yet normalised; H and W need no divisor.

        Raises:
            ValueError: the image has another shape or is not floating point.
        """
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"image must be [B, 3, H, W], floating point, values in [0, 1]; got {list(image.shape)}, {image.dtype}"
            )
        *levels, last = self.backbone((image - self.mean) / self.std)
        guided = self.guidance(last, self.text)
        return SegmenterOutput(self.head([*levels, guided.feature]), guided.score, guided.text)

    def predict_logits(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`, float32, of an image as in :meth:`forward`: bilinear, corners not aligned."""
        return _resize(self(image).logits, size)

    def loss(self, output: SegmenterOutput, label: Tensor) -> dict[str, Tensor]:
        """Cross entropy at the size of the labels, in float32; the loss to minimise is the sum of the values.

        Args:
            output: of :meth:`forward`.
            label: `[B, H, W]`, int64, class indices, 255 ignored.

        Returns:
            ``decode``: mean over labelled pixels, exactly 0 without any. ``aux``, where there is a score map and its
            weight is positive: the same for score / tau, times the weight.
        """
        losses = {"decode": _cross_entropy(output.logits, label)}
        if output.score is not None and self.guidance.aux_weight > 0:
            score = output.score.float() / self.guidance.aux_tau
            losses["aux"] = self.guidance.aux_weight * _cross_entropy(score, label)
        return losses


def build_segmenter(model: ModelConfig, data: DataConfig, classes: int, text: Tensor | None, *, seed: int) -> Segmenter:
    """Build a segmenter with initial weights that depend on the seed and the name of each layer alone.

    So the layers that two variants share by name and shape start equal, whatever else is built, and the global random
    state is left as it was.

    Args:
        model: backbone, guidance and head.
        data: whose mean and standard deviation the model normalises images with.
        classes: number of classes K.
        text: embeddings `[K, D]`; needed by ``convformer``, dropped by ``none``.
        seed: seed of the initial weights.

    Raises:
        FusekernError: a backbone, weights or settings of the guidance that cannot be used.
        ValueError: text missing or not `[K, D]`.
    """
    with _stream(seed, "backbone"):
        backbone = build_backbone(model.backbone)
    if model.guidance.kind == "none":
        text = None
        guidance = NoGuidance(backbone.channels[-1])
    else:
        if text is None or text.ndim != 2 or len(text) != classes:
            found = None if text is None else list(text.shape)
            raise ValueError(f"text must be [K, D] with K = {classes} classes for guidance convformer, got {found}")
        try:
            with _stream(seed, "guidance"):
                guidance = ConvFormerGuidance(backbone.channels[-1], text.shape[1], classes, model.guidance)
        except ValueError as error:
            raise FusekernError(f"model.guidance: {error}") from error
        for name, module in guidance.named_modules(prefix="guidance"):
            if hasattr(module, "reset_parameters"):
                with _stream(seed, name):
                    module.reset_parameters()
    with _stream(seed, "head"):
        head = SemanticFPN(
            backbone.channels,
            classes,
            strides=backbone.strides,
            neck_channels=model.head.neck_channels,
            channels=model.head.channels,
            dropout=model.head.dropout,
        )
    # The vanilla head first, then the one layer that guidance widens, so that all others draw the same numbers.
    with _stream(seed, "head.neck.lateral"):
        head.neck.lateral[-1] = FeaturePyramid([guidance.out_channels], model.head.neck_channels).lateral[0]
    return Segmenter(backbone, text, guidance, head, mean=data.mean, std=data.std)


@contextmanager
def _stream(seed: int, name: str) -> Iterator[None]:
    """The CPU random stream of one named part; CUDA's is not touched."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    # Contiguous while it is small: log_softmax over a large channels_last map copies it first.
    return F.interpolate(logits.float().contiguous(), size=size, mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    # The softmax over dim 1, which is many times faster on a CPU than over a short last one. The loss over a flat list:
    # the two-dimensional one has no deterministic form on CUDA. Summed: a mean over no pixel is NaN.
    logs = F.log_softmax(_resize(logits, label.shape[-2:]), 1).movedim(1, -1).flatten(0, 2)
    total = F.nll_loss(logs, label.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)
