from datetime import timedelta

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from fusekern.config import BackboneConfig
from fusekern.engine.distributed import any_rank, broadcast_buffers, broadcast_files, gather_tensor, gather_text
from fusekern.models.backbones import build_backbone

CPU = torch.device("cpu")


def test_one_process_needs_no_group():
    norm = nn.BatchNorm2d(2)
    broadcast_buffers(norm.buffers())
    assert any_rank(True, False, device=CPU) == [True, False]
    assert [part.tolist() for part in gather_tensor(torch.arange(3), device=CPU)] == [[0, 1, 2]]
    assert gather_text("größer", device=CPU) == ["größer"]
    assert broadcast_files({"a": b"1", "b": b""}, device=CPU) == {"a": b"1", "b": b""}


def worker(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(minutes=1))
    assert any_rank(rank == 1, False, device=CPU) == [True, False]
    parts = gather_tensor(torch.full((3,), rank, dtype=torch.uint8), device=CPU)
    assert [part.tolist() for part in parts] == [[0, 0, 0], [1, 1, 1]]
    assert gather_text("" if rank == 0 else "x" * 5000, device=CPU) == ["", "x" * 4096]
    files = {"state.json": b'{"a": "\xc3\xa4"}', "empty": b"", "tensors": bytes(range(256)) * 1000}
    assert broadcast_files(files if rank == 0 else None, device=CPU) == files
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 1)
    norm.running_var.fill_(rank + 5)
    broadcast_buffers(norm.buffers())
    assert norm.running_mean.tolist() == [1, 1] and norm.running_var.tolist() == [5, 5]
    dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path / "meeting"),), nprocs=2)


def test_synchronised_norms_keep_timms_activations():
    """Why training converts with timm: torch's own conversion turns a norm with activation into a bare norm."""
    net = build_backbone(BackboneConfig("mobilenetv2_035"))
    before = [type(m.act) for m in net.modules() if isinstance(m, BatchNormAct2d)]
    after = [type(m.act) for m in convert_sync_batchnorm(net).modules() if isinstance(m, nn.SyncBatchNorm)]
    assert before == after and nn.ReLU6 in after
