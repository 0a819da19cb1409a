"""Backbones: any timm network with four NCHW levels, behind one small contract (``channels``, ``strides``)."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusekern.config import BackboneConfig
from fusekern.errors import FusekernError
from fusekern.models.pickles import refuse_pickle

log = logging.getLogger(__name__)

_PROBE = (96, 160)


class Backbone(nn.Module):
    """Image encoder: the last four levels of a feature extractor.

    Args:
        net: module from an image `[B, 3, H, W]` to four levels `[B, Ci, Hi, Wi]`, finest first.
        channels: widths Ci of the levels.
        strides: nominal strides of the levels; sizes may be off by a few pixels, so users resize by size.
    """

    def __init__(self, net: nn.Module, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.strides = strides

    def forward(self, image: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` (normalised) -> C2..C5, `[B, Ci, ~H / si, ~W / si]` each."""
        return self.net(image)


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build a timm network as feature extractor and load its weights.

    Args:
        config: name, weights (``none``, a timm tag, or a safetensors file of the classifier or of the extractor, with
            timm's names), output stride.

    Returns:
        backbone with levels at strides 4, 8, 16, 32, the last ones capped at ``config.output_stride``.

    Raises:
        FusekernError: timm lacks the name, the architecture gives no such levels or takes one image size only, the
            weights are missing, incomplete, pickled or cannot be downloaded.
    """
    timm = _timm()
    if not timm.is_model(config.name) or "." in config.name:
        nearest = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=3, cutoff=0.4)
        raise FusekernError(
            f"model.backbone.name: timm has no architecture {config.name!r}; nearest: {', '.join(nearest) or 'none'} "
            "(a tag of weights goes into model.backbone.weights)"
        )
    file = None if config.weights == "none" else _weights_file(config.weights)
    tag = None if config.weights == "none" or file else config.weights
    net = _create(timm, config, tag)
    channels, strides = tuple(net.feature_info.channels()), tuple(net.feature_info.reduction())
    _check_levels(config, net, channels, strides)
    if file:
        _load(net, file)
    return Backbone(net, channels, strides)


def _timm():
    try:
        import timm
    except ImportError as error:
        raise FusekernError(f"model.backbone: needs timm (install fusekern[seg]): {error}") from error
    return timm


def _weights_file(weights: str) -> Path | None:
    path = Path(weights)
    if path.is_file():
        refuse_pickle(path)
    if path.suffix != ".safetensors" and not path.exists():
        return None
    if path.suffix != ".safetensors" or not path.is_file():
        state = "is not a .safetensors file" if path.exists() else "not found"
        raise FusekernError(f"model.backbone.weights: {weights} {state}")
    return path


def _create(timm, config: BackboneConfig, tag: str | None) -> nn.Module:
    name = config.name
    if tag is not None:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        if tag not in tags:
            raise FusekernError(
                f"model.backbone.weights: {tag!r} is neither `none`, a file, nor a tag of {name}; "
                f"tags: {', '.join(tags) or 'none'}; local weights: FILE.safetensors"
            )
        name = f"{name}.{tag}"
    stride = {} if config.output_stride == 32 else {"output_stride": config.output_stride}
    try:
        return timm.create_model(
            name, pretrained=tag is not None, features_only=True, out_indices=range(-4, 0), **stride
        )
    except Exception as error:  # timm raises what its architectures, the hub client and urllib raise
        if tag is None:
            raise FusekernError(
                f"model.backbone: timm cannot build {name} as a four-level extractor with output_stride "
                f"{config.output_stride}: {error!r}"
            ) from error
        raise FusekernError(
            f"model.backbone.weights: timm cannot load {name}: {error!r}. Without network give the local option: "
            "`model.backbone.weights: FILE.safetensors`"
        ) from error


def _check_levels(config: BackboneConfig, net: nn.Module, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Run a small image: declared levels are not always what comes out."""
    needed = tuple(min(stride, config.output_stride) for stride in (4, 8, 16, 32))
    problem = f"model.backbone.name: {config.name} does not fit: "
    if strides != needed:
        raise FusekernError(f"{problem}its last levels have strides {strides}, needed {needed}")
    try:
        with torch.no_grad():
            levels = net.eval()(torch.zeros(1, 3, *_PROBE))
    except Exception as error:  # an assertion or a shape error from inside the architecture
        raise FusekernError(f"{problem}it must take any image size, failed at {_PROBE}: {error}") from error
    net.train()
    shapes = [tuple(level.shape) for level in levels]
    if any(len(shape) != 4 or shape[1] != width for shape, width in zip(shapes, channels, strict=True)):
        raise FusekernError(f"{problem}needed NCHW levels of width {channels}, found {shapes} for {_PROBE}")


def _load(net: nn.Module, file: Path) -> None:
    """Load by name, blind to timm's wrappers: extractors write ``stages.0`` as ``stages_0`` or prepend ``model.``."""

    def plain(key: str) -> str:
        return key.removeprefix("model.").removeprefix("body.").replace(".", "_")

    try:
        found = {plain(key): value for key, value in load_file(file).items()}
    except Exception as error:  # safetensors has an exception type of its own
        raise FusekernError(f"model.backbone.weights: {file} is no readable safetensors file: {error}") from error
    state = {key: found.pop(plain(key)) for key in net.state_dict() if plain(key) in found}
    try:
        missing = net.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise FusekernError(f"model.backbone.weights: {file} is of another architecture: {error}") from error
    if missing:
        raise FusekernError(
            f"model.backbone.weights: {file} lacks {len(missing)} of {len(net.state_dict())} tensors: "
            f"{', '.join(missing[:5])}"
        )
    log.info("backbone weights from %s; not used: %s", file.name, ", ".join(found) or "none")
