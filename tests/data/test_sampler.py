"""Batches are functions of (seed, step): the same over processes, workers and restarts."""

import dataclasses
import gc
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusekern.config import DataConfig
from fusekern.data.folder import SegmentationFolder
from fusekern.data.sampler import Key, StepBatchSampler, draws, train_loader
from fusekern.data.spec import load_spec
from fusekern.errors import FusekernError

DATA = DataConfig(scale=(16, 12), crop=(8, 8), workers=0)


def keys(n=10, batch=8, accumulate=1, seed=0, first=0, last=5, rank=0, world=1):
    return list(
        StepBatchSampler(
            n, batch=batch, accumulate=accumulate, seed=seed, first_step=first, last_step=last, rank=rank, world=world
        )
    )


@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_every_epoch_has_every_image_once(n, batch, seed):
    epochs = 3
    steps = -(-epochs * n // batch)
    stream = [index for step in range(steps) for index in draws(n, batch=batch, seed=seed, step=step)]
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return tuple(draws(50, batch=50, seed=seed, step=number))

    assert len({epoch(seed, number) for seed in range(4) for number in range(4)}) == 16
    assert epoch(1, 2) == epoch(1, 2)


def test_draws_leave_the_global_generators_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws(1000, batch=8, seed=3, step=123)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 4), (8, 1), (4, 2)])
def test_processes_and_rounds_split_the_same_batches(world, accumulate):
    whole = keys()
    parts = [keys(accumulate=accumulate, rank=rank, world=world) for rank in range(world)]
    for part in parts:
        assert len(part) == 5 * accumulate and {len(micro) for micro in part} == {8 // world // accumulate}
    for step in range(5):
        rounds = slice(step * accumulate, (step + 1) * accumulate)
        assert [key for part in parts for micro in part[rounds] for key in micro] == whole[step]


def test_length():
    sampler = StepBatchSampler(3, batch=8, accumulate=2, seed=0, first_step=2, last_step=7, rank=1, world=2)
    assert len(sampler) == len(list(sampler)) == 10
    assert keys(first=3, last=3) == []


def test_a_later_start_is_the_rest_of_the_stream():
    assert keys(first=3, last=9) == keys(last=9)[3:]
    assert keys()[4][2] == Key(4, 2, draws(10, batch=8, seed=0, step=4)[2])


def test_batch_that_does_not_divide():
    with pytest.raises(FusekernError) as error:
        keys(batch=12, accumulate=2, world=4)
    assert str(error.value) == (
        "train.batch 12 is the global batch: it must be a multiple of 8 (4 processes times train.accumulate 2)"
    )
    with pytest.raises(FusekernError, match="train.batch must be 1 or more, found 0"):
        keys(batch=0)
    with pytest.raises(FusekernError, match="train.accumulate must be 1 or more, found 0"):
        keys(accumulate=0)
    with pytest.raises(FusekernError, match="train.seed must be 0 or more, found -1"):
        keys(seed=-1)


@pytest.fixture
def folder(small, picture):
    image, label = picture
    return SegmentationFolder(load_spec(small(**{f"p{k}": (image // (k + 1), label) for k in range(5)})), "train")


def load(folder, *, workers=0, accumulate=1, first=0, last=3, rank=0, world=1):
    data = dataclasses.replace(DATA, workers=workers)
    return train_loader(
        folder, data, batch=4, accumulate=accumulate, seed=7, first_step=first, last_step=last, rank=rank, world=world
    )


def bits(batches):
    return [(b["step"], b["names"], b["image"].numpy().tobytes(), b["label"].numpy().tobytes()) for b in batches]


def test_what_a_batch_is(folder):
    batch = next(iter(load(folder)))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert batch["label"].shape == (4, 8, 8) and batch["label"].dtype == torch.int64
    assert batch["step"] == 0
    assert batch["names"] == [folder.names[index] for index in draws(5, batch=4, seed=7, step=0)]


def test_number_of_workers_does_not_show(folder):
    assert bits(load(folder)) == bits(load(folder, workers=2))


def test_processes_and_restarts_do_not_show(folder):
    whole = list(load(folder))
    for rank in range(2):
        for batch, part in zip(whole, load(folder, rank=rank, world=2), strict=True):
            assert torch.equal(part["image"], batch["image"][2 * rank : 2 * rank + 2])
            assert torch.equal(part["label"], batch["label"][2 * rank : 2 * rank + 2])
    rounds = list(load(folder, accumulate=2))
    assert [batch["step"] for batch in rounds] == [0, 0, 1, 1, 2, 2]
    assert torch.equal(torch.cat([batch["image"] for batch in rounds[2:4]]), whole[1]["image"])
    assert bits(load(folder, first=1)) == bits(whole)[1:]


def test_an_image_twice_in_a_batch_is_distorted_twice(folder):
    for batch in load(folder, last=5):
        twice = [k for k, name in enumerate(batch["names"]) if batch["names"].index(name) < k]
        for k in twice:
            assert not torch.equal(batch["image"][k], batch["image"][batch["names"].index(batch["names"][k])])
        if twice:
            return
    raise AssertionError("no batch of four out of five images had one twice")


def test_loader_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    for _ in load(folder, workers=1, last=1):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_can_travel_to_a_spawned_worker(folder):
    loader = load(folder)
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    key = Key(0, 1, 2)
    assert torch.equal(dataset[key]["image"], loader.dataset[key]["image"])
    assert collate([dataset[key]])["names"] == ["p2"]


def failure(loader):
    """Type and text of what the loader raises, without its traceback: that would keep the workers alive."""
    try:
        list(loader)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_file_reaches_the_user_as_it_was_found(folder, workers):
    folder.pairs[3][1].write_bytes(b"not a picture")
    kind, text = failure(load(folder, workers=workers))
    assert kind is FusekernError and text.startswith(f"{folder.pairs[3][1]}: does not decode as a picture")
    assert "Traceback" not in text


def test_bad_file_leaves_no_workers_behind(folder):
    folder.pairs[3][1].write_bytes(b"not a picture")
    before = set(multiprocessing.active_children())
    gc.disable()  # workers that only the collector can end hold up the exit for ten seconds
    try:
        failure(load(folder, workers=2))
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()
