"""Prediction: the class of every pixel by the test protocol; label PNGs and overlays of a user's own pictures."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fusekern import viz
from fusekern._version import __version__
from fusekern.config import EvalConfig
from fusekern.data.folder import read_image
from fusekern.data.spec import DatasetSpec
from fusekern.data.transforms import resize_for_test
from fusekern.engine.checkpoint import LoadedSegmenter, load_segmenter, read_recipe
from fusekern.errors import FusekernError

MANIFEST = "predictions.json"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BAND = 2**22  # values of full-size logits held at once


def predict(checkpoint: str | Path, input: str | Path, out: Path, *, config: EvalConfig | None = None) -> list[Path]:
    """Label one image, or every image of a folder in the order of their names.

    Writes ``out/labels/NAME.png``, a palette PNG whose values are the data set's own ids, so that it loads again as a
    label, and ``out/overlays/NAME.png`` with a legend of the classes found. NAME is the image's name without its
    suffix, or with it where two images differ in the suffix alone. ``out/predictions.json`` says of what they are; only
    a folder that has it is written over.

    Args:
        checkpoint: checkpoint or run folder.
        input: image file, or folder whose images (not those of subfolders) are taken.
        out: folder for the results; made where it is missing.
        config: test protocol; default: that of the checkpoint's recipe.

    Returns:
        The label PNGs.

    Raises:
        FusekernError: no image to read, results that would land on the input or on files that are no predictions, or
            unreadable images; of a folder, all others are done first.
    """
    images = _images(Path(input))
    labels, overlays = out / "labels", out / "overlays"
    if images[0].parent.resolve() in (labels.resolve(), overlays.resolve()):
        raise FusekernError(f"{input}: the results would be written over the input; choose another out than {out}")
    names = _names(images)
    taken = [file for name in names for file in (labels / f"{name}.png", overlays / f"{name}.png") if file.exists()]
    if taken and not (out / MANIFEST).is_file():
        raise FusekernError(
            f"{taken[0]} is there already ({len(taken)} such files), and without {MANIFEST} beside its folder it is no "
            f"earlier prediction: choose another --out than {out}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, config = load_for_test(checkpoint, config, device)
    try:
        for folder in (labels, overlays):
            folder.mkdir(parents=True, exist_ok=True)
        _write_manifest(out / MANIFEST, checkpoint, input, loaded, config)
    except OSError as error:
        raise FusekernError(f"--out must be a folder that can be written: {error}") from error
    written, failures = [], []
    for path, name in tqdm(list(zip(images, names, strict=True)), "predict", leave=False, disable=None):
        try:
            image = read_image(path)
        except FusekernError as error:
            failures.append(str(error))
            continue
        label = predict_label(loaded.model, image, config, device=device).cpu().numpy()
        write_label(label, labels / f"{name}.png", loaded.spec)
        present = np.unique(label).tolist()
        picture = viz.overlay(image.permute(1, 2, 0).numpy(), label, loaded.spec.palette)
        picture = viz.with_legend(picture, loaded.spec.names, loaded.spec.palette, present)
        Image.fromarray(picture).save(overlays / f"{name}.png")
        written.append(labels / f"{name}.png")
    if failures:
        done = f"{len(written)} of {len(images)} images labelled in {labels}; not these:\n" if len(images) > 1 else ""
        raise FusekernError(done + "\n".join(failures))
    return written


def _write_manifest(
    path: Path, checkpoint: str | Path, input: str | Path, loaded: LoadedSegmenter, config: EvalConfig
) -> None:
    content = {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "weights": loaded.weights_used,
        "dataset": loaded.spec.name,
        "input": str(input),
        "protocol": dataclasses.asdict(config),
        "versions": {"fusekern": __version__, "torch": torch.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_label(label: np.ndarray, path: Path, spec: DatasetSpec) -> None:
    """Write class indices, uint8 [H, W], as a palette PNG in the data set's own ids and colours."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[spec.to_ids(np.arange(len(spec.names), dtype=np.uint8))] = spec.palette
    picture = Image.fromarray(spec.to_ids(label).astype(np.uint8))
    picture.putpalette(colours.tobytes())
    picture.save(path)


@torch.inference_mode()
def predict_label(model: nn.Module, image: Tensor, config: EvalConfig, *, device: torch.device | str) -> Tensor:
    """The class of every pixel of one image.

    The image is fitted into ``config.scale`` times each ratio, aspect kept; logits are resized to the image's own size
    (bilinear, align_corners=False) before the argmax. Several ratios, or the flip, are averaged as probabilities.

    Args:
        model: in eval mode; as in ``evaluate``.
        image: uint8 [3, H, W], RGB.
        config: test protocol.
        device: where the model is.

    Returns:
        uint8 [H, W] on ``device``, class indices.

    Raises:
        FusekernError: no ratio, or windows further apart than they are large.
    """
    device = torch.device(device)
    check_protocol(config)
    views = []
    for ratio, flipped in product(config.ratios, (False, True) if config.flip else (False,)):
        resized = resize_for_test(image, config.scale, ratio).to(device)
        with torch.autocast(device.type, _DTYPES[config.precision], enabled=config.precision != "fp32"):
            logits = _logits(model, resized.flip(-1) if flipped else resized, config)
        views.append(logits.flip(-1) if flipped else logits)
    height, width = image.shape[-2:]
    label = torch.empty(height, width, dtype=torch.uint8, device=device)
    # Full-size logits of a large photograph and 150 classes take gigabytes: a band of rows at a time.
    rows = max(1, _BAND // (len(views[0]) * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        bands = [_resize_rows(logits, (height, width), top, bottom) for logits in views]
        band = bands[0] if len(bands) == 1 else sum(logits.softmax(0) for logits in bands)
        label[top:bottom] = band.argmax(0)
    return label


def check_protocol(config: EvalConfig) -> None:
    """Raises FusekernError for a protocol without a ratio, or with windows further apart than they are large."""
    if not config.ratios or min(config.ratios) <= 0:
        raise FusekernError(f"eval.ratios must hold one or more positive factors, found {list(config.ratios)}")
    if config.mode == "slide" and not all(0 < s <= c for s, c in zip(config.stride, config.crop, strict=True)):
        raise FusekernError(
            f"eval.stride must lie in 1..eval.crop, found {config.stride} with windows of {config.crop}"
        )


def load_for_test(
    path: str | Path, config: EvalConfig | None, device: torch.device
) -> tuple[LoadedSegmenter, EvalConfig]:
    """A checkpoint with the weights that the protocol asks for; the protocol defaults to that of its recipe."""
    config = config or read_recipe(path).eval
    return load_segmenter(path, config.weights, device, config.backend), config


def _images(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FusekernError(f"{path}: no such image or folder")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise FusekernError(f"{path}: no images in this folder; looked for {', '.join(SUFFIXES)}")
    return found


def _names(images: list[Path]) -> list[str]:
    """A name for each image that no other has."""
    stems, files = Counter(image.stem for image in images), {image.name for image in images}
    return [image.stem if stems[image.stem] == 1 and image.stem not in files else image.name for image in images]


def _logits(model: nn.Module, image: Tensor, config: EvalConfig) -> Tensor:
    """fp32 [K, h, w] of an image [3, H, W]: the model's own grid, or with windows the size of the image."""
    if config.mode == "whole":
        return model(image[None]).logits[0].float()
    height, width = image.shape[-2:]
    total, hits = None, image.new_zeros(height, width)
    for top, left in product(
        _starts(height, config.crop[0], config.stride[0]), _starts(width, config.crop[1], config.stride[1])
    ):
        window = image[:, top : top + config.crop[0], left : left + config.crop[1]]
        size = window.shape[-2:]
        logits = F.interpolate(model(window[None]).logits.float(), size, mode="bilinear", align_corners=False)[0]
        if total is None:
            total = logits.new_zeros(len(logits), height, width)
        total[:, top : top + size[0], left : left + size[1]] += logits
        hits[top : top + size[0], left : left + size[1]] += 1
    return total.div_(hits)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin: every ``stride``, the last one flush with the border; 0 alone if the crop covers all."""
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def _resize_rows(logits: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows top..bottom of ``F.interpolate(logits, size, mode="bilinear")`` for logits [K, h, w]."""
    height = logits.shape[-2]
    y = torch.arange(top, bottom, device=logits.device, dtype=torch.float32)
    y = ((y + 0.5) * (height / size[0]) - 0.5).clamp_min(0)
    upper = y.long().clamp_max(height - 1)
    weight = (y - upper)[:, None]
    rows = torch.lerp(logits[:, upper], logits[:, (upper + 1).clamp_max(height - 1)], weight)
    return F.interpolate(rows[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]
