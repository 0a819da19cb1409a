"""What the inverted bottleneck and the layer keep for their backward, beside PyTorch's modules.

    python -m bench.memory

Bytes of all tensors that a forward saves, parameters and buffers left out: a property of the program, not a time.
``eager`` runs the modules' functions one by one, activations in place where PyTorch can.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import inverted_bottleneck, layer, peers, report
from bench.case import Shape, lay_out, make
from bench.common import saved
from fusekern import ConvFormer
from fusekern.ops import inverted_bottleneck as op

OUT = report.ROOT / "bench" / "results" / "memory-cpu.json"
# Expansion, memory, and the share of eager's that may be kept.
GOALS = ((6, "default", 0.40), (2, "default", 0.45), (6, "low", 0.25), (2, "low", 0.30))


def kept_bytes(call: Callable[[], Tensor], skip: Iterable[Tensor] = ()) -> int:
    """What a call saves for its backward, once where several tensors share their memory; without that of ``skip``."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in skip}
    out, kept = saved(call)
    assert out.requires_grad
    return sum(size for where, size in kept.items() if where not in skipped)


def of_the_op(expansion: int, memory: str) -> tuple[int, int]:
    """Ours and eager's, of one bottleneck."""
    case, shape = inverted_bottleneck.CASES[0], Shape(1, 256, 32, expansion)
    tensors = [lay_out(tensor, "channels_last") for tensor in make(case, shape, torch.float32, "cpu").values()]
    image, *parameters = (tensor.requires_grad_() for tensor in tensors)
    norms = case.norms(*parameters[3:])
    skip = [*parameters, *(part for norm in norms for part in norm[:4] if part is not None)]
    ours = kept_bytes(lambda: op(image, *parameters[:3], norms, memory=memory)[0], skip)
    return ours, kept_bytes(lambda: case.eager(shape, image, *parameters), skip)


def of_the_layer(expansion: int, memory: str) -> tuple[int, int]:
    """The same of six blocks, without the score map."""
    torch.manual_seed(0)
    fuse = ConvFormer(256, bridge_heads=4, text_heads=4, expansion=expansion, memory=memory)
    image = lay_out(torch.randn(1, 256, 32, 32), "channels_last").requires_grad_()
    text, skip = torch.randn(19, 256), [*fuse.parameters(), *fuse.buffers()]
    named = dict(fuse.named_parameters())

    def eager() -> Tensor:
        wide, tokens = image, text.expand(1, -1, -1)
        for i in range(len(fuse.blocks)):
            wide, tokens = layer.eager_block(named, f"blocks.{i}.", wide, tokens, 4, peers.attend, True)
        return wide

    return kept_bytes(lambda: fuse(image, text).image, skip), kept_bytes(eager, skip)


def table(rows: Sequence[dict]) -> list[str]:
    lines = ["| | expansion | `memory` | kept, MB | eager, MB | share | goal | |", "|" + "---|" * 8]
    for row in rows:
        share = row["bytes"] / row["eager_bytes"]
        cells = [row["subject"], str(row["expansion"]), row["memory"], f"{row['bytes'] / 1e6:.3g}"]
        cells += [f"{row['eager_bytes'] / 1e6:.3g}", f"{share:.3f}", f"{row['goal']:.2f}"]
        lines.append(f"| {' | '.join([*cells, 'met' if share <= row['goal'] else 'missed'])} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rows = []
    for subject, measure in (("inverted_bottleneck", of_the_op), ("six blocks", of_the_layer)):
        for expansion, memory, goal in GOALS:
            ours, eager = measure(expansion, memory)
            row = {"subject": subject, "expansion": expansion, "memory": memory, "goal": goal}
            rows.append({**row, "bytes": ours, "eager_bytes": eager})
    report.publish("memory", arguments, rows, options.out)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
