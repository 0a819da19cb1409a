"""Small layers, known ceilings, and the process as it was."""

from __future__ import annotations

import pytest
import torch

from bench import common, layer
from bench.timing import Ceilings


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(common, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(layer, "BLOCKS", 1)
    forget_layers()
    known = Ceilings("cpu", {1: 1e10}, {"float32": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr(known, "measure", lambda *_: None)
    monkeypatch.setattr(common, "Ceilings", lambda device: known)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    benchmark, tf32 = cudnn.benchmark, cudnn.allow_tf32
    yield
    forget_layers()
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32


def forget_layers() -> None:
    layer.parameters_of.cache_clear()
    for case in layer.CASES:
        case.layers.clear()
