"""Recipes: the frozen dataclasses that a YAML recipe and the command line fill.

A field whose metadata says ``resume=True`` does not alter what a training run computes; only such fields may differ
between a checkpoint and the run that resumes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

IGNORE = 255  # label value, in memory, of a pixel that counts neither in training nor in evaluation

_NEUTRAL = {"resume": True}


@dataclass(frozen=True)
class BackboneConfig:
    """Image encoder.

    Args:
        name: timm architecture, such as ``mobilenetv2_100``.
        weights: ``none``, a timm tag such as ``ra_in1k`` (downloaded), or the path of a local safetensors file.
        output_stride: stride of the last level, 32 or 16 (8 where the architecture allows it).
    """

    name: str = "mobilenetv2_100"
    weights: str = "none"
    output_stride: int = 32


@dataclass(frozen=True)
class GuidanceConfig:
    """What text does to the last backbone level; the fields of ``ConvFormer`` and of the auxiliary loss.

    Args:
        kind: ``none`` (vanilla) or ``convformer``.
        channels: width C of the fusion layer.
        blocks: number of Conv-Former blocks.
        bridge_heads: attention heads of both bridges.
        text_heads: attention heads among the text tokens.
        expansion: expansion of the inverted bottleneck.
        ffn_ratio: expansion of the feed-forward network on the text tokens.
        downsample: 3x3 convolution with stride 3 before the image-to-text bridge: full (the paper's) or depthwise.
        pad: what happens to rows and columns beyond a multiple of 3: dropped (the paper's) or completed.
        bridge: softmax attention (the paper's) or the inner product of its ablation.
        outer_residual: the skip of equation 1 around the whole stack.
        normalize: cosine score map; false is the literal equation 2.
        text_scale: factor on the text embeddings as they enter the layer.
        memory: "low" keeps less for the backward and computes each block's expansion twice.
        backend: backend of the layer's ops.
        aux_weight: weight of the cross entropy on the score map; 0 turns it off.
        aux_tau: temperature of that loss.
    """

    kind: Literal["none", "convformer"] = "convformer"
    channels: int = 512
    blocks: int = 6
    bridge_heads: int = 8
    text_heads: int = 8
    expansion: int = 6
    ffn_ratio: int = 2
    downsample: Literal["conv", "depthwise"] = "conv"
    pad: Literal["floor", "ceil"] = "floor"
    bridge: Literal["attention", "inner_product"] = "attention"
    outer_residual: bool = True
    normalize: bool = True
    text_scale: float = 1.0
    memory: Literal["default", "low"] = "default"
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    aux_weight: float = 0.4
    aux_tau: float = 0.07


@dataclass(frozen=True)
class HeadConfig:
    """Semantic FPN.

    Args:
        neck_channels: width of the feature pyramid.
        channels: width of the head's convolutions.
        dropout: probability of the 2-d dropout before the classifier.
    """

    neck_channels: int = 256
    channels: int = 256
    dropout: float = 0.1


@dataclass(frozen=True)
class ModelConfig:
    """A segmenter: backbone, guidance, head."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass(frozen=True)
class TextConfig:
    """Where the embeddings of the class names come from.

    Args:
        source: ``open_clip`` (a text tower), ``file`` (ready embeddings), or ``hash`` (no language prior).
        model: open_clip model name, or ``local-dir:FOLDER``.
        pretrained: open_clip tag or weights file; ignored for ``local-dir:``.
        prompt: template; ``{}`` stands for the class name.
        file: ``.npy`` or ``.safetensors`` file with one row per name, for ``source: file``.
        names: text file with the names of the rows, one a line, for ``source: file``.
        width: width of the vectors for ``source: hash``.
    """

    source: Literal["open_clip", "file", "hash"] = "open_clip"
    model: str = "ViT-B-16"
    pretrained: str = "openai"
    prompt: str = "a photo of a {}."
    file: str | None = None
    names: str | None = None
    width: int = 512


@dataclass(frozen=True)
class DataConfig:
    """Data set and training transforms.

    Args:
        dataset: ``ade20k``, ``camvid``, ``scenes`` (built in), or the path of a data set YAML.
        root: folder of the data; overrides the YAML's own.
        scale: longest and shortest side that an image is fitted into before the random ratio.
        ratio: range of the random resize ratio.
        crop: height and width of the training crop.
        cat_max_ratio: largest share of one class that a crop may have (ten tries).
        flip: probability of the horizontal flip.
        photometric: photometric distortion on or off.
        mean: channel means of the image in [0, 1] that the model subtracts.
        std: channel standard deviations that the model divides by.
        workers: loader processes per rank.
    """

    # Its name or path: what is in it is compared by itself.
    dataset: str = field(default="ade20k", metadata=_NEUTRAL)
    root: str | None = field(default=None, metadata=_NEUTRAL)
    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: int = field(default=2, metadata=_NEUTRAL)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        name: ``adamw`` or ``sgd``.
        lr: base learning rate.
        weight_decay: decay of every parameter but norms and biases of norms.
        momentum: momentum of SGD.
        backbone_lr_mult: factor on the backbone's learning rate; unset: 0.1 with pretrained weights, 1 without.
        warmup: steps of linear warm-up.
        warmup_ratio: factor on the learning rate at the first step.
        power: exponent of the polynomial decay.
        min_lr: learning rate that the decay ends at.
        clip: largest gradient norm; unset: no clipping.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    momentum: float = 0.9
    backbone_lr_mult: float | None = None
    warmup: int = 1500
    warmup_ratio: float = 1e-6
    power: float = 0.9
    min_lr: float = 1e-6
    clip: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        steps: optimizer steps.
        batch: images per optimizer step over all processes and accumulation rounds (the global batch).
        accumulate: forward and backward rounds per optimizer step.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast; fp16 needs CUDA).
        ema: decay of the exponential moving average of the weights; unset: no average.
        seed: seed of weights, batches and transforms.
        deterministic: deterministic algorithms on CUDA, at a cost in speed.
        log_every: steps between two lines of metrics.jsonl; 0: only after the last step.
        eval_every: steps between two evaluations; 0: only after the last step.
        save_every: steps between two checkpoints; 0: only after the last step, as always.
        keep: how many checkpoints are kept.
    """

    steps: int = 80000
    batch: int = 32
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    seed: int = 0
    deterministic: bool = False
    log_every: int = field(default=50, metadata=_NEUTRAL)
    eval_every: int = field(default=8000, metadata=_NEUTRAL)
    save_every: int = field(default=8000, metadata=_NEUTRAL)
    keep: int = field(default=3, metadata=_NEUTRAL)


@dataclass(frozen=True)
class EvalConfig:
    """Test protocol.

    Args:
        mode: ``whole`` image or ``slide`` (overlapping windows, logits averaged).
        scale: longest and shortest side that an image is fitted into; the labels are never resized.
        crop: height and width of a window.
        stride: vertical and horizontal step between windows.
        ratios: factors on ``scale``; more than one is multi-scale testing, softmax averaged.
        flip: also the mirrored image.
        weights: ``auto`` takes the moving average where the checkpoint has one.
        precision: ``fp32`` or autocast.
        backend: backend of the fusion layer's ops for ``eval`` and ``predict``; ``trained`` is the one of the recipe,
            which may need another machine than this one if it was asked for by name.
    """

    mode: Literal["whole", "slide"] = field(default="whole", metadata=_NEUTRAL)
    scale: tuple[int, int] = field(default=(2048, 512), metadata=_NEUTRAL)
    crop: tuple[int, int] = field(default=(512, 512), metadata=_NEUTRAL)
    stride: tuple[int, int] = field(default=(341, 341), metadata=_NEUTRAL)
    ratios: tuple[float, ...] = field(default=(1.0,), metadata=_NEUTRAL)
    flip: bool = field(default=False, metadata=_NEUTRAL)
    weights: Literal["auto", "model", "ema"] = field(default="auto", metadata=_NEUTRAL)
    precision: Literal["fp32", "bf16", "fp16"] = field(default="fp32", metadata=_NEUTRAL)
    backend: Literal["trained", "auto", "reference", "cpp", "triton", "cuda"] = field(
        default="trained", metadata=_NEUTRAL
    )


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
