"""InvertedBottleneck with nn.SyncBatchNorm, on a CPU: two processes with unequal batches are one with both."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fusekern import use_backend
from fusekern.backends import BACKENDS
from fusekern.nn import InvertedBottleneck, inverted_bottleneck

SPLIT = (3, 1)
BACKEND = pytest.param("cpp", marks=pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing))


def make():
    torch.manual_seed(0)
    block = InvertedBottleneck(8, 3)
    block.norm2.momentum = None
    return block, torch.randn(2, sum(SPLIT), 8, 6, 7) + 1


def train(block, images):
    for image in images:
        result = block(image)
        (result * torch.arange(result[0].numel(), dtype=result.dtype).view(result[0].shape).sin()).sum().backward()
    return result.detach()


def work(rank, backend, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    block, images = make()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert isinstance(synced.norm1, nn.SyncBatchNorm)
    with use_backend(backend):
        result = train(synced, [image.split(SPLIT)[rank] for image in images])
    gradients = [parameter.grad for parameter in synced.parameters()]
    torch.save((result, gradients, list(synced.buffers())), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_two_processes_are_one(tmp_path, backend):
    torch.multiprocessing.spawn(work, (backend, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    block, images = make()
    whole = copy.deepcopy(block).double()
    with use_backend("reference"):
        wanted = train(whole, images.double())
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]]).double(), wanted, **close)
    # Those of the first norm nearly cancel: the second takes a common scale away.
    scale = max(parameter.grad.norm() for parameter in whole.parameters())
    for index, parameter in enumerate(whole.parameters()):
        total = found[0][1][index].double() + found[1][1][index].double()  # DDP adds them up, and divides
        assert (total - parameter.grad).norm() <= 1e-5 * scale
    for rank in (0, 1):
        for mine, right in zip(found[rank][2], whole.buffers(), strict=True):
            torch.testing.assert_close(mine.double(), right.double(), **close)


def test_norms_of_different_groups_run_themselves(monkeypatch):
    """The op has one group for all three."""
    block, images = make()
    alone = copy.deepcopy(block)
    fused = Mock(wraps=inverted_bottleneck.with_recipe)
    monkeypatch.setattr(inverted_bottleneck, "with_recipe", fused)
    copy.deepcopy(block)(images[0])
    fused.assert_called_once()  # with one group, so a call is noticed
    fused.reset_mock()
    monkeypatch.setattr("fusekern.nn.inverted_bottleneck._own_group", lambda norm: str(id(norm)))
    result = block(images[0])
    fused.assert_not_called()
    hidden = F.relu6(alone.norm1(alone.expand(images[0])))
    hidden = F.relu6(alone.norm2(alone.depthwise(hidden)))
    assert torch.equal(result, images[0] + alone.norm3(alone.project(hidden)))
    assert all(map(torch.equal, block.buffers(), alone.buffers()))
