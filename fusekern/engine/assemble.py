"""What a training run is made of: data, text, model, moving average and optimizer, new or from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim import Optimizer

from fusekern._version import __version__
from fusekern.config import Recipe
from fusekern.data.folder import SegmentationFolder
from fusekern.data.scenes import ensure_built_in
from fusekern.data.spec import DatasetSpec, load_spec
from fusekern.engine import checkpoint as checkpoints
from fusekern.engine import optim
from fusekern.engine.checkpoint import Checkpoint
from fusekern.errors import FusekernError
from fusekern.models.segmenter import Segmenter, build_segmenter
from fusekern.models.text import TextEmbeddings, embed_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The data set; ``images`` tells its list of training images from another."""

    spec: DatasetSpec
    train: SegmentationFolder
    val: SegmentationFolder | None
    images: dict


def open_data(recipe: Recipe, accelerator: Accelerator) -> Data:
    """Finds the files of both splits; draws the built-in scenes first where they are asked for.

    Raises:
        FusekernError: the data set or its files cannot be used.
    """
    with accelerator.local_main_process_first():
        ensure_built_in(recipe.data.dataset, recipe.data.root)
    spec = load_spec(recipe.data.dataset)
    train = SegmentationFolder(spec, "train", recipe.data.root)
    val = SegmentationFolder(spec, "val", recipe.data.root) if spec.val else None
    digest = hashlib.sha256("\n".join(train.names).encode()).hexdigest()
    return Data(spec, train, val, {"count": len(train), "sha256": digest})


def surroundings() -> dict:
    """What the last bits of a result depend on besides recipe and data."""
    versions = {"fusekern": __version__, "torch": torch.__version__}
    return {"versions": versions, "threads": torch.get_num_threads()}


def refuse_other_data(checkpoint: Checkpoint, data: Data, *, world: int, device: str) -> None:
    """Raises FusekernError if what the recipe only points to has changed, or the processes or the type of device.

    Other versions or threads get a warning: they may change the last bits.
    """
    path, state = checkpoint.path, checkpoint.state
    saved = state["dataset"]
    if len(saved["names"]) != len(data.spec.names):
        raise FusekernError(
            f"{path} is made for {len(saved['names'])} classes and the data set has {len(data.spec.names)}"
        )
    now = json.loads(json.dumps(checkpoints.spec_to_dict(data.spec)))
    changed = [key for key in now if key not in ("root", "palette") and now[key] != saved.get(key)]
    if changed:
        raise FusekernError(f"{path}: the data set {data.spec.name} has changed since, in {', '.join(changed)}")
    if state["images"] != data.images:
        raise FusekernError(
            f"the training images are not those of {path}: {state['images']['count']} then, {data.images['count']} "
            "now, or other names; the batches would differ"
        )
    if state["device"] != device:
        raise FusekernError(
            f"{path} is from a run on {state['device']} and this one is on {device}: the result would differ; "
            "use --init to start anew from its weights"
        )
    if state["world"] != world:
        raise FusekernError(
            f"{path} is from a run of {state['world']} processes, this one has {world}: each process has its own "
            "random numbers and batch statistics, so it would not be the same run; --init starts a new one from these "
            "weights"
        )
    if any(state[key] != value for key, value in surroundings().items()):
        log.warning(
            "%s was written under %s with %d threads, this is %s with %d: the weights may differ in their last bits "
            "from those of a run never stopped",
            *(path, state["versions"], state["threads"], *surroundings().values()),
        )


def embed(recipe: Recipe, spec: DatasetSpec, checkpoint: Checkpoint | None) -> TextEmbeddings | None:
    """The class names' embeddings, from the checkpoint where there is one; None for a model without guidance."""
    if recipe.model.guidance.kind == "none":
        return None
    if checkpoint:
        text = checkpoint.state["text"]
        return TextEmbeddings(spec.names, checkpoint.model["text"], text["source"], text["language_prior"])
    return embed_names(spec.names, recipe.text)


def build_model(
    recipe: Recipe,
    spec: DatasetSpec,
    text: TextEmbeddings | None,
    checkpoint: Checkpoint | None,
    initial: tuple[Path, dict[str, Tensor]] | None,
) -> Segmenter:
    """The segmenter with the weights of the checkpoint, of ``--init`` (a file and its tensors), or of the recipe.

    Raises:
        FusekernError: weights that do not fit.
    """
    if checkpoint:
        model = checkpoints.rebuild(recipe, len(spec.names), checkpoint.model)
        checkpoints.load_weights(model, checkpoint.model, checkpoint.path / "model.safetensors")
        return model
    vectors = text.vectors if text else None
    model = build_segmenter(recipe.model, recipe.data, len(spec.names), vectors, seed=recipe.train.seed)
    if initial:
        path, tensors = initial
        checkpoints.load_weights(model, tensors, path, skip=("text", "mean", "std"))  # those are the recipe's
        log.info("initial weights from %s", path)
    return model


def place(model: Segmenter, accelerator: Accelerator) -> Segmenter:
    """Moves the model to the device, channels last, with synchronised batch norm over several GPUs."""
    model = model.to(accelerator.device, memory_format=torch.channels_last).train()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return convert_sync_batchnorm(model)  # timm's: torch's would drop the activations in timm's norms
    if accelerator.num_processes > 1:
        log.warning("batch norm sees the images of its own process alone: synchronised batch norm needs CUDA")
    return model


def average(model: Segmenter, recipe: Recipe, checkpoint: Checkpoint | None) -> ModelEmaV3 | None:
    """The moving average of the weights, where the recipe wants one."""
    if recipe.train.ema is None:
        return None
    ema = ModelEmaV3(model, decay=recipe.train.ema, use_warmup=True)
    if checkpoint:
        checkpoints.load_weights(ema.module, checkpoint.ema or {}, checkpoint.path / "ema.safetensors")
    return ema


def make_optimizer(
    model: Segmenter, recipe: Recipe, checkpoint: Checkpoint | None, *, trained: bool
) -> tuple[Optimizer, float]:
    """The optimizer without its state, and the factor on the backbone's learning rate.

    Args:
        model: whose parameters it updates.
        recipe: the recipe.
        checkpoint: a resumed run keeps its factor.
        trained: whether ``--init`` brought weights for the backbone.
    """
    if checkpoint:
        multiplier = checkpoint.state["backbone_mult"]
    else:
        multiplier = optim.backbone_multiplier(
            recipe.optim, pretrained=trained or recipe.model.backbone.weights != "none"
        )
    return optim.build_optimizer(model, recipe.optim, backbone_mult=multiplier), multiplier
