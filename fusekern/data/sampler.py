"""Which image goes where: every batch is a function of the seed and the step alone.

So a run that stops and resumes sees what it would have seen, with any number of loader processes, and the global batch
is the same over any number of training processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fusekern.config import DataConfig
from fusekern.data.folder import SegmentationFolder
from fusekern.data.transforms import TrainTransform
from fusekern.errors import FusekernError


class Key(NamedTuple):
    """Training step, place in its global batch, index in the data set."""

    step: int
    slot: int
    index: int


def draws(n: int, *, batch: int, seed: int, step: int) -> list[int]:
    """Indices of the global batch of a step.

    Epochs follow one another without a gap, each a new permutation: slot s of a step is at position
    step * batch + s of that stream.

    Args:
        n: size of the data set, 1 or more.
        batch: images in a global batch.
        seed: 0 or more.
        step: 0 or more.

    Returns:
        ``batch`` indices from 0 to n - 1.
    """
    positions = range(step * batch, (step + 1) * batch)
    return [int(_permutation(n, seed, position // n)[position % n]) for position in positions]


class StepBatchSampler(Sampler):
    """Keys of the micro-batches of one process, from ``first_step`` up to and without ``last_step``.

    Process r of w takes the r-th of w equal parts of each global batch, in ``accumulate`` micro-batches.

    Raises:
        FusekernError: ``batch`` is no positive multiple of ``world * accumulate``, or ``seed`` is negative.
    """

    def __init__(
        self, n: int, *, batch: int, accumulate: int, seed: int, first_step: int, last_step: int, rank: int, world: int
    ):
        for key, value in (("batch", batch), ("accumulate", accumulate)):
            if value < 1:
                raise FusekernError(f"train.{key} must be 1 or more, found {value}")
        if batch % (world * accumulate):
            raise FusekernError(
                f"train.batch {batch} is the global batch: it must be a multiple of {world * accumulate} "
                f"({world} processes times train.accumulate {accumulate})"
            )
        if seed < 0:
            raise FusekernError(f"train.seed must be 0 or more, found {seed}")
        self.n, self.batch, self.seed = n, batch, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch // self.world
        micro = share // self.accumulate
        for step in self.steps:
            indices = draws(self.n, batch=self.batch, seed=self.seed, step=step)
            keys = [Key(step, slot, index) for slot, index in enumerate(indices)]
            for first in range(self.rank * share, (self.rank + 1) * share, micro):
                yield keys[first : first + micro]


class TrainStream(Dataset):
    """Transformed training samples, addressed by ``Key``."""

    def __init__(self, folder: SegmentationFolder, transform: TrainTransform, *, seed: int):
        self.folder, self.transform, self.seed = folder, transform, seed

    def __getitem__(self, key: Key) -> dict | FusekernError:
        """image float32 [3, h, w], label int64 [h, w], name, step; or what was wrong with a file (see ``_Loader``)."""
        try:
            sample = self.folder[key.index]
        except FusekernError as error:
            return error
        image, label = self.transform(sample, seed=self.seed, step=key.step, slot=key.slot)
        return {"image": image, "label": label, "name": sample.name, "step": key.step}


def train_loader(
    folder: SegmentationFolder,
    data: DataConfig,
    *,
    batch: int,
    accumulate: int,
    seed: int,
    first_step: int,
    last_step: int,
    rank: int,
    world: int,
) -> DataLoader:
    """The micro-batches of one process.

    Args:
        folder: training split.
        data: transforms, and how many loader processes.
        batch: images in a global batch, over all processes and accumulation rounds.
        accumulate: micro-batches per step.
        seed: 0 or more.
        first_step: step to begin with.
        last_step: step to end before.
        rank: this process.
        world: number of processes.

    Returns:
        a loader of dictionaries: image float32 [b, 3, h, w] in [0, 1], label int64 [b, h, w] with 255 ignored,
        names list[str], step int.

    Raises:
        FusekernError: ``batch`` does not divide; while it runs: an image or a label is bad.
    """
    sampler = StepBatchSampler(
        len(folder),
        batch=batch,
        accumulate=accumulate,
        seed=seed,
        first_step=first_step,
        last_step=last_step,
        rank=rank,
        world=world,
    )
    return _Loader(
        TrainStream(folder, TrainTransform(data), seed=seed),
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each iter() would advance the global one
    )


class _Loader(DataLoader):
    """Raises a worker's FusekernError here as it was: torch would put the worker's traceback into its message."""

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, FusekernError):
                # A copy: a frame that raised its own variable keeps itself alive, and the workers with it.
                raise type(batch)(*batch.args)
            yield batch


def _collate(samples: list[dict | FusekernError]) -> dict | FusekernError:
    for sample in samples:
        if isinstance(sample, FusekernError):
            return sample
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "label": torch.stack([sample["label"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "step": samples[0]["step"],
    }


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((2, seed, epoch)).permutation(n)  # 2: see TrainTransform
