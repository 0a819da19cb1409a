"""Multiply-accumulates and parameters of a recipe's model, part by part. Needs neither network nor text tower."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from fusekern.config import GuidanceConfig, Recipe
from fusekern.data.spec import load_spec
from fusekern.errors import FusekernError
from fusekern.models.segmenter import build_segmenter
from fusekern.models.text import text_width


def count_flops(recipe: Recipe, size: tuple[int, int]) -> dict:
    """Count one forward pass on one image.

    Convolutions and matrix products count, one multiply-accumulate (MAC) as one; norms, activations, additions and
    resizing do not, as in the tools that the field quotes. "CLIP for Lightweight Semantic Segmentation" (arXiv
    2310.07394, table 1) leaves the final 1x1 classifier out and calls the rest GFLOPs: that is ``gmac_paper``.

    Args:
        recipe: its weights are not loaded.
        size: height and width of the image in pixels.

    Returns:
        ``size``, ``classes``; ``gmac_full`` and ``gmac_paper``, in 1e9 MACs to the paper's one decimal; ``parts``, 1e9
        MACs by dotted name; ``parameters``, their number by the same names and ``total``, the text buffer left out.

    Raises:
        FusekernError: a size below 32 pixels, or a recipe whose model or data set description cannot be used.
    """
    if min(size) < 32:
        raise FusekernError(f"size: {list(size)} is too small, each side needs 32 pixels")
    classes = len(load_spec(recipe.data.dataset).names)
    config = dataclasses.replace(
        recipe.model,
        backbone=dataclasses.replace(recipe.model.backbone, weights="none"),
        # the plain operators, which the counter knows
        guidance=dataclasses.replace(recipe.model.guidance, backend="reference"),
    )
    text = None if config.guidance.kind == "none" else torch.zeros(classes, text_width(recipe.text))
    # On the CPU the counter is blind to fused attention; on meta tensors nothing is computed, and all is counted.
    model = build_segmenter(config, recipe.data, classes, text, seed=0).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings(), torch.no_grad(), counter:
        warnings.simplefilter("ignore")  # a size with one image token is counted like any other
        model(torch.empty(1, 3, *size, device="meta"))
    macs = Counter()
    for name, ops in counter.get_flop_counts().items():
        name = name.removeprefix(f"{type(model).__name__}.")
        macs[name] = sum(ops.values()) // 2
        if name.endswith(".image_to_text"):  # runs its child's convolution itself, and no other
            macs[f"{name}.downsample"] = ops[torch.ops.aten.convolution] // 2
    parts = _by_part(macs, config.guidance)
    weights = Counter({name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()})
    full = sum(parts.values())
    return {
        "size": list(size),
        "classes": classes,
        "gmac_full": round(full / 1e9, 1),
        "gmac_paper": round((full - parts["classifier"]) / 1e9, 1),
        "parts": {name: count / 1e9 for name, count in parts.items()},
        "parameters": {"total": weights[""], **_by_part(weights, config.guidance)},
    }


def render(report: dict) -> str:
    """The report of :func:`count_flops` as a table; the blocks of the fusion layer are summed."""
    rows: dict[str, list[float]] = {}
    for name, gmac in report["parts"].items():
        row = rows.setdefault(re.sub(r"\.blocks\.\d+", ".blocks", name), [0.0, 0])
        row[0] += gmac
        row[1] += report["parameters"][name]
    rows["total"] = [sum(report["parts"].values()), report["parameters"]["total"]]
    height, width = report["size"]
    lines = [f"{height} x {width} pixels, {report['classes']} classes", f"{'part':<30}{'GMAC':>10}{'parameters':>14}"]
    lines += [f"{name:<30}{gmac:>10.3f}{parameters:>14,}" for name, (gmac, parameters) in rows.items()]
    lines.append(f"{report['gmac_full']} GMAC in all, {report['gmac_paper']} as the paper counts (without classifier)")
    return "\n".join(lines)


def _by_part(inclusive: Counter[str], guidance: GuidanceConfig) -> dict[str, int]:
    """Disjoint parts from sums over modules with all that they contain."""
    parts = {"backbone": inclusive["backbone"]}
    if guidance.kind == "convformer":
        parts["guidance.projection"] = inclusive["guidance.projection"]
        parts["guidance.text"] = inclusive["guidance.text"]
        score = inclusive["guidance.layer"]
        for i in range(guidance.blocks):
            block, part = f"guidance.layer.blocks.{i}", f"guidance.blocks.{i}"
            downsample = inclusive[f"{block}.image_to_text.downsample"]
            parts[f"{part}.conv"] = inclusive[f"{block}.bottleneck"]
            parts[f"{part}.downsample"] = downsample
            parts[f"{part}.image_to_text"] = inclusive[f"{block}.image_to_text"] - downsample
            parts[f"{part}.former"] = inclusive[f"{block}.transformer"]
            parts[f"{part}.text_to_image"] = inclusive[f"{block}.text_to_image"]
            score -= inclusive[block]
        parts["guidance.score"] = score
    parts["neck"] = inclusive["head.neck"]
    parts["head"] = inclusive["head"] - inclusive["head.neck"] - inclusive["head.classifier"]
    parts["classifier"] = inclusive["head.classifier"]
    return parts
