"""The layer under DistributedDataParallel: two processes have the gradients of one that sees both halves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fusekern.backends import BACKENDS, use_backend
from fusekern.nn import ConvFormer


def make():
    torch.manual_seed(0)
    layer = ConvFormer(32, blocks=2, bridge_heads=2, text_heads=2, expansion=2).eval()  # batch norm sees no batch
    image = torch.randn(4, 32, 7, 8).contiguous(memory_format=torch.channels_last)
    return layer, image, torch.randn(5, 32)


def gradients(layer, image, text):
    result = layer(image, text)
    (result.image.square().mean() + result.score.square().mean()).backward()
    return [parameter.grad for parameter in layer.parameters()]


def work(rank, backend, where, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{where}", rank=rank, world_size=2)
    with use_backend(backend):
        layer, image, text = make()
        found = gradients(DistributedDataParallel(layer), image[2 * rank : 2 * rank + 2], text)
    if rank == 0:
        queue.put([gradient.numpy() for gradient in found])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing)
def test_two_processes_have_the_gradients_of_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        work, ("auto", str(tmp_path / "rendezvous"), queue), nprocs=2, join=False, start_method="spawn"
    )
    found = queue.get()
    processes.join()
    layer, image, text = make()
    with use_backend("reference"):
        wanted = gradients(copy.deepcopy(layer).double(), image.double(), text.double())
    scale = max(gradient.abs().max() for gradient in wanted)
    for mine, right in zip(found, wanted, strict=True):
        assert (torch.from_numpy(mine).double() - right).abs().max() < 1e-5 * scale
