"""What a run tells: metrics.jsonl, TensorBoard, the log, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fusekern.config import TrainConfig
from fusekern.engine.metrics import ConfusionMatrix
from fusekern.engine.run_folder import append_metrics
from fusekern.models.text import TextEmbeddings, mean_token_cosine

log = logging.getLogger(__name__)


class Reports:
    """Collects the losses of a run and writes every report, on rank 0; all ranks must call its methods alike.

    Args:
        out: run folder.
        accelerator: of this process.
        settings: the recipe's ``train``.
        text: the class names' embeddings, or None without guidance; a score without a language prior says so.
        step: steps taken before.
        score: last and best mIoU before, changed in place.
    """

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        settings: TrainConfig,
        text: TextEmbeddings | None,
        step: int,
        score: dict,
    ):
        self.out, self.accelerator, self.settings, self.text, self.score = out, accelerator, settings, text, score
        self.main = accelerator.is_main_process
        hidden = not (self.main and sys.stderr.isatty())
        self.bar = tqdm(total=settings.steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True)
        self.sums: dict[str, Tensor] = {}
        self.since, self.clock = step, time.perf_counter()
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def add(self, rounds: Sequence[Mapping[str, Tensor]]) -> None:
        """Counts the losses of one step, given by micro-batch."""
        for losses in rounds:
            for name, loss in losses.items():
                self.sums[name] = self.sums.get(name, 0) + loss / len(rounds)
        self.bar.update()

    def step(self, step: int, rate: float, norm: Tensor | None, tokens: Tensor | None) -> None:
        """Reports the means over the steps since the last report.

        Args:
            step: steps taken.
            rate: learning rate, the largest of the groups.
            norm: gradient norm before clipping, or None.
            tokens: text tokens `[B, K, C]` of the last batch, or None.
        """
        steps, seconds = step - self.since, time.perf_counter() - self.clock
        means = self.accelerator.reduce(torch.stack([*self.sums.values()]) / steps, reduction="mean").tolist()
        parts = dict(zip(self.sums, means, strict=True))
        record = {"step": step, "loss": sum(means), **parts, "lr": rate}
        if norm is not None:
            record["grad_norm"] = float(norm)
        if tokens is not None:
            record["token_cosine"] = float(mean_token_cosine(tokens))
        record["images_per_second"] = self.settings.batch * steps / seconds
        self._write(record, "train")
        shown = f"loss {record['loss']:.4g}{self._score()}  lr {rate:.3g}  {record['images_per_second']:.1f} img/s"
        self.bar.set_postfix_str(shown)
        details = "".join(f"  {name} {value:.4g}" for name, value in record.items() if name in (*parts, "grad_norm"))
        collapse = f"  token cosine {record['token_cosine']:.3f}" if tokens is not None else ""
        left = timedelta(seconds=round((self.settings.steps - step) * seconds / steps))
        log.info("step %d/%d  %s%s%s  ETA %s", step, self.settings.steps, shown, details, collapse, left)
        self.sums.clear()
        self.since, self.clock = step, time.perf_counter()

    def evaluation(self, step: int, matrix: ConfusionMatrix, weights: str) -> None:
        """Reports an evaluation and keeps the best.

        Args:
            step: steps taken.
            matrix: counts over the validation split.
            weights: ``model`` or ``ema``, what was evaluated.
        """
        scores = matrix.to_dict([str(k) for k in range(matrix.classes)])
        miou = scores["miou"]
        self.score["last"] = miou
        if miou is not None and (self.score["best"] is None or miou > self.score["best"]):
            self.score["best"], self.score["best_step"] = miou, step
        prior = None if self.text is None else self.text.language_prior
        record = {"step": step, "miou": miou, "accuracy": scores["accuracy"]}
        self._write({**record, "weights": weights, "language_prior": prior}, "val")
        best = f", best {100 * self.score['best']:.2f} at step {self.score['best_step']}" if self.score["best"] else ""
        log.info("step %d/%d%s of the %s%s", step, self.settings.steps, self._score(), weights, best)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count for images per second."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def _score(self) -> str:
        if self.score["last"] is None:
            return ""
        prior = " (no language prior)" if self.text and not self.text.language_prior else ""
        return f"  mIoU {100 * self.score['last']:.2f}{prior}"

    def _write(self, record: dict, group: str) -> None:
        if self.main:
            append_metrics(self.out, record)
        if record.get("language_prior") is False:
            group = f"{group}, no language prior"
        numbers = {f"{group}/{key}": value for key, value in record.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=record["step"])
