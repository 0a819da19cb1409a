"""The confusion matrix over a whole data set, and every score that follows from it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fusekern.config import IGNORE


class ConfusionMatrix:
    """Counts of pixels by ground truth and prediction.

    Scores are shares in [0, 1]; one that is undefined, such as the IoU of a class without a pixel, is nan.

    Args:
        classes: number of classes K, at most 255: the label 255 means ignored.
        device: where the counts live; collectives run there.

    Attributes:
        counts: int64 [K, K]; rows are the ground truth, columns the prediction.

    Raises:
        ValueError: K out of range.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= classes <= IGNORE:
            raise ValueError(f"classes must lie in 1..{IGNORE}, got {classes}")
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count the pixels of one or more images.

        Args:
            pred: integer tensor of any shape, class indices.
            label: integer tensor of the same shape, class indices or 255 for ignored.

        Raises:
            ValueError: shapes differ, a dtype is not integral, or a value is neither a class nor an ignored label.
        """
        if pred.shape != label.shape:
            raise ValueError(f"pred and label must have one shape, got {list(pred.shape)} and {list(label.shape)}")
        for name, values in (("pred", pred), ("label", label)):
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise ValueError(f"{name} must hold integers, got {values.dtype}")
        pred, label = pred.to(self.counts.device, torch.int64), label.to(self.counts.device, torch.int64)
        kept = label != IGNORE
        self._check("pred", pred)
        self._check("label", label[kept])
        cell = label[kept] * self.classes + pred[kept]
        self.counts += torch.bincount(cell, minlength=self.classes**2).view(self.classes, self.classes)

    def _check(self, name: str, values: Tensor) -> None:
        wrong = values[(values < 0) | (values >= self.classes)].unique()
        if len(wrong):
            shown = ", ".join(str(value) for value in wrong[:8].tolist()) + (", ..." if len(wrong) > 8 else "")
            ignored = f" or {IGNORE}" if name == "label" else ""
            raise ValueError(f"{name} has values {shown}; classes are 0..{self.classes - 1}{ignored}")

    def all_reduce(self) -> None:
        """Sum the counts of all processes into each of them: one collective, none without a process group."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)

    @property
    def iou(self) -> Tensor:
        """float64 [K]: intersection over union; nan where the union is empty, 0 if predicted but never in the truth."""
        counts = self.counts.cpu()
        hit = counts.diagonal()
        return hit.double() / (counts.sum(0) + counts.sum(1) - hit).double()

    @property
    def class_accuracy(self) -> Tensor:
        """float64 [K]: share of a class's pixels that are right; nan for a class that is not in the ground truth."""
        counts = self.counts.cpu()
        return counts.diagonal().double() / counts.sum(1).double()

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that are in the ground truth or predicted (mmseg's definition)."""
        return self.iou.nanmean().item()

    @property
    def miou_present(self) -> float:
        """Mean IoU over the classes that are in the ground truth (detectron2's definition)."""
        return self.iou[(self.counts.sum(1) > 0).cpu()].mean().item()

    @property
    def accuracy(self) -> float:
        """Share of the labelled pixels that are right."""
        counts = self.counts.cpu()
        return (counts.diagonal().sum().double() / counts.sum().double()).item()

    def rows(self, names: Sequence[str]) -> list[dict]:
        """One dict a class: its name, IoU and accuracy (None where undefined), and its pixels in truth and prediction.

        Raises:
            ValueError: another number of names than of classes.
        """
        if len(names) != self.classes:
            raise ValueError(f"names must have {self.classes} entries, got {len(names)}")
        columns = (self.iou, self.class_accuracy, self.counts.sum(1), self.counts.sum(0))
        return [
            {"name": name, "iou": _defined(iou), "accuracy": _defined(right), "pixels": pixels, "predicted": predicted}
            for name, iou, right, pixels, predicted in zip(names, *(c.tolist() for c in columns), strict=True)
        ]

    def to_dict(self, names: Sequence[str]) -> dict:
        """All scores as JSON values, undefined ones as None; the classes are those of ``rows``."""
        return {
            "miou": _defined(self.miou),
            "miou_present": _defined(self.miou_present),
            "accuracy": _defined(self.accuracy),
            "mean_class_accuracy": _defined(self.class_accuracy.nanmean().item()),
            "pixels": self.counts.sum().item(),
            "classes": self.rows(names),
        }

    def table(self, names: Sequence[str], note: str = "") -> str:
        """The scores in per cent, a line a class, for people; ``note`` stands beside every summary."""
        end = f"  {note}" if note else ""
        width = max(len("class"), *(len(name) for name in names))
        total = max(self.counts.sum().item(), 1)
        lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc':>6}  {'pixels':>7}{end}", "-" * (width + 25)]
        for row in self.rows(names):
            share = f"{100 * row['pixels'] / total:.2f}%"
            lines.append(f"{row['name']:<{width}}  {_percent(row['iou'])}  {_percent(row['accuracy'])}  {share:>7}")
        scores = self.to_dict(names)
        lines += [
            "-" * (width + 25),
            f"mIoU            {_percent(scores['miou'])}  (classes in the ground truth or predicted){end}",
            f"mIoU, present   {_percent(scores['miou_present'])}  (classes in the ground truth){end}",
            f"pixel accuracy  {_percent(scores['accuracy'])}{end}",
        ]
        return "\n".join(lines)

    def write_csv(self, path: str | Path, names: Sequence[str], note: str = "") -> None:
        """Write ``rows`` as CSV with a header; undefined scores are empty, and a ``note`` becomes the last column."""
        rows = [{**row, "note": note} if note else row for row in self.rows(names)]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def write_counts_csv(self, path: str | Path, names: Sequence[str]) -> None:
        """Write the counts as CSV: a row a class of the ground truth, a column a predicted class, names at both."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["truth \\ predicted", *names])
            writer.writerows([name, *row] for name, row in zip(names, self.counts.tolist(), strict=True))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:6.2f}"
