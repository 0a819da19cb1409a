"""What the inverted bottleneck and the layer keep for their backward and take in training, beside PyTorch's modules.

    python -m bench.memory

Bytes of all tensors that a forward saves, parameters and buffers left out: a property of the program, not a time. The
peak is of a forward and backward, above what is there before, the gradients of image and parameters among it.
``eager`` runs the modules' functions one by one, activations in place where PyTorch can.

Planned for a GPU is the peak of the launchers of Triton and CUDA, which take their memory on the CPU, while no kernel
runs; eager's beside it is that of PyTorch on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.runtime.jit import JITFunction

from bench import inverted_bottleneck, layer, peers, report
from bench.case import Shape, lay_out, make
from bench.common import saved
from fusekern import ConvFormer, extensions
from fusekern.backends import BACKENDS
from fusekern.ops import inverted_bottleneck as op

OUT = report.ROOT / "bench" / "results" / "memory-cpu.json"
# Expansion, memory, and the share of eager's that may be kept.
GOALS = ((6, "default", 0.40), (2, "default", 0.45), (6, "low", 0.25), (2, "low", 0.30))
PEAK_GOAL = 0.45  # with expansion 6
SMALL = Shape(1, 256, 32, 19)
# Of a peak the gradients of the weights are the larger a share the smaller the map.
PEAKS = {6: SMALL, 2: Shape(1, 256, 64, 19)}
PLANNED = Shape(16, 512, 32, 150)


def kept_bytes(call: Callable[[], Tensor], skip: Iterable[Tensor] = ()) -> int:
    """What a call saves for its backward, once where several tensors share their memory; without that of ``skip``."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in skip}
    out, kept = saved(call)
    assert out.requires_grad
    return sum(size for where, size in kept.items() if where not in skipped)


def of_the_op(expansion: int, memory: str) -> tuple[int, int]:
    """Ours and eager's, of one bottleneck."""
    case, shape = inverted_bottleneck.CASES[0], replace(SMALL, tokens=expansion)
    tensors = [lay_out(tensor, "channels_last") for tensor in make(case, shape, torch.float32, "cpu").values()]
    image, *parameters = (tensor.requires_grad_() for tensor in tensors)
    norms = case.norms(*parameters[3:])
    skip = [*parameters, *(part for norm in norms for part in norm[:4] if part is not None)]
    ours = kept_bytes(lambda: op(image, *parameters[:3], norms, memory=memory)[0], skip)
    return ours, kept_bytes(lambda: case.eager(shape, image, *parameters), skip)


class Layers:
    """Six blocks without the score map, as ``ConvFormer`` and as PyTorch's functions, on the same weights."""

    def __init__(self, shape: Shape, expansion: int, memory: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.heads = shape.heads
        self.layer = ConvFormer(
            shape.channels, bridge_heads=self.heads, text_heads=self.heads, expansion=expansion, memory=memory
        )
        self.layer = self.layer.to(dtype, memory_format=torch.channels_last)
        image = torch.randn(shape.batch, shape.channels, shape.size, shape.size, dtype=dtype)
        self.image = lay_out(image, "channels_last").requires_grad_()
        self.text = torch.randn(shape.tokens, shape.channels, dtype=dtype)

    def fused(self) -> Tensor:
        return self.layer(self.image, self.text).image

    def eager(self) -> Tensor:
        named, image = dict(self.layer.named_parameters()), self.image
        tokens = self.text.expand(image.shape[0], -1, -1)
        for i in range(len(self.layer.blocks)):
            image, tokens = layer.eager_block(named, f"blocks.{i}.", image, tokens, self.heads, peers.attend, True)
        return image

    def kept(self) -> tuple[int, int]:
        """What a forward keeps, ours and eager's."""
        skip = [*self.layer.parameters(), *self.layer.buffers()]
        return kept_bytes(self.fused, skip), kept_bytes(self.eager, skip)

    def peak(self, planned: bool = False) -> tuple[int, int]:
        """What a forward and backward take at most, ours and eager's; ours as planned for a GPU, or as it is here."""
        leaves, grad = [self.image, *self.layer.parameters()], torch.ones_like(self.image)

        def of(forward: Callable[[], Tensor]) -> int:
            return peak_bytes(lambda: torch.autograd.grad(forward(), leaves, grad, allow_unused=True))

        with on_a_gpu_without_kernels() if planned else nullcontext():
            ours = of(self.fused)
        return ours, of(self.eager)


def peak_bytes(call: Callable[[], object]) -> int:
    """What PyTorch's allocator for the CPU has handed out at most during a call, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    return max(accumulate(size for _, size in changes))


@contextmanager
def on_a_gpu_without_kernels() -> Iterator[None]:
    """Tensors on the CPU go to the launchers for a GPU, which take what memory they need and launch nothing.

    The CUDA extension declares the depthwise ops: without it there are none to stand in for.
    """
    here = {name: replace(BACKENDS[name], device="cpu", missing="") for name in ("cuda", "triton")}
    library = torch.library.Library("fusekern_cuda", "IMPL", "CPU")
    for depthwise in ("bn_relu6_dw_fwd", "bn_relu6_dw_bwd"):
        library.impl(depthwise, lambda *arguments: None)
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    try:
        with (
            patch.dict(BACKENDS, here),
            patch.object(torch.cuda, "get_device_properties", lambda device: hopper),
            patch.object(JITFunction, "run", lambda *arguments, **options: None),
        ):
            yield
    finally:
        library._destroy()


def table(rows: Sequence[dict]) -> list[str]:
    def megabytes(count: int) -> str:
        return f"{count / 1e6:.0f}" if count >= 1e9 else f"{count / 1e6:.3g}"

    lines = ["| | B,C,H,K | expansion | `memory` | fusekern, MB | eager, MB | share | goal | |", "|" + "---|" * 9]
    for row in rows:
        share, goal = row["bytes"] / row["eager_bytes"], row["goal"]
        cells = [row["subject"], row["shape"], str(row["expansion"]), row["memory"]]
        cells += [megabytes(row["bytes"]), megabytes(row["eager_bytes"]), f"{share:.3f}"]
        cells += ["-", ""] if goal is None else [f"{goal:.2f}", "met" if share <= goal else "missed"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rows = []

    def add(subject: str, shape: Shape, expansion: int, memory: str, goal: float | None, ours: int, eager: int) -> None:
        row = {"subject": subject, "shape": str(shape), "expansion": expansion, "memory": memory, "goal": goal}
        rows.append({**row, "bytes": ours, "eager_bytes": eager})

    for goals in GOALS:
        add("inverted_bottleneck, kept", replace(SMALL, tokens=0), *goals, *of_the_op(*goals[:2]))
    for goals in GOALS:
        add("six blocks, kept", SMALL, *goals, *Layers(SMALL, *goals[:2]).kept())
    for expansion, shape in PEAKS.items():
        for memory in ("default", "low"):
            goal = PEAK_GOAL if expansion == 6 else None
            add("six blocks, peak", shape, expansion, memory, goal, *Layers(shape, expansion, memory).peak())
    if reason := extensions.load("_C_cuda"):
        print(f"no peak planned for a GPU: {reason}", file=sys.stderr)
    else:
        for memory in ("default", "low"):
            found = Layers(PLANNED, 6, memory, torch.bfloat16).peak(planned=True)
            add("six blocks, peak planned for a GPU", PLANNED, 6, memory, PEAK_GOAL, *found)
    report.publish("memory", arguments, rows, options.out)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
