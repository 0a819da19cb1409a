"""How far results lie from float64: every op, backend and dtype that runs here, beside PyTorch's own error.

    python -m bench.numerics [--device cpu|cuda] [--quick] [--out FILE]

Writes ``bench/results/numerics-DEVICE.json`` and prints the table of ``docs/numerics.md``: the largest error and the
relative L2 error of output and gradients, the worst over the shapes and both layouts, and the same of the worst of
PyTorch's ways to compute it. The exit code is 1 if one breaks the rule of ``fusekern.testing``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from bench import conv2former, downsample, former, former2conv, inverted_bottleneck, report, score_map, text_path
from bench.case import LAYOUTS, Case, Truth, lay_out, shapes, with_gradients
from bench.common import DTYPES, in_one_line
from fusekern.backends import BACKENDS, why_not

MODULES = (former2conv, conv2former, score_map, downsample, inverted_bottleneck, former, text_path)
CASES = tuple(module.CASES[0] for module in MODULES)
SHAPES = {
    "attention": shapes("2,256,32,19", "2,256,32,150", "1,512,16,150", "1,128,24,847"),
    "downsample": shapes("2,256,32", "1,512,16", "1,64,65"),
    "inverted_bottleneck": shapes("2,128,24,2", "1,128,16,6"),
    "former": shapes("2,256,0,19", "1,512,0,150", "1,128,0,301"),
    "text_path": shapes("2,256,0,19", "1,512,0,150", "1,128,0,301"),
    "quick": shapes("2,128,12,19"),
}


def errors(case: Case, shape, dtype: str, device: str, backends: list[str]) -> list[dict]:
    """One row for each backend that can run and each tensor."""
    truth = Truth(case, shape, DTYPES[dtype], device)
    peers = [truth.errors(peer) for peer in truth.peers]
    rows = []
    for backend in backends:
        if why_not(case.op, backend, *case.arguments(shape, *truth.tensors.values())):
            continue
        for layout in LAYOUTS:
            tensors, grad = truth.laid_out(layout), lay_out(truth.grad, layout)

            def fused(*leaves, backend=backend):
                return case.fused(shape, backend, *leaves)

            row = {"op": case.op, "backend": backend, "dtype": dtype, "shape": str(shape), "layout": layout}
            try:
                found = with_gradients(fused, tensors, grad)
            except Exception as error:  # the others' figures are wanted all the same
                rows.append({**row, "tensor": "out", "wrong": [in_one_line(error)]})
                continue
            wrong = truth.judge(found)
            for name, (largest, relative) in truth.errors(found).items():
                rows.append(
                    {
                        **row,
                        "tensor": name,
                        "max_error": largest,
                        "relative_l2": relative,
                        "peer_max_error": max(peer[name][0] for peer in peers),
                        "peer_relative_l2": max(peer[name][1] for peer in peers),
                        "wrong": [fault for fault in wrong if fault.startswith(f"{name}:")],
                    }
                )
    return rows


def table(rows: list[dict]) -> list[str]:
    """The worst over shapes and layouts, as Markdown."""
    figures = ("max_error", "peer_max_error", "relative_l2", "peer_relative_l2")
    lines = [
        "| op | dtype | backend | of | max error | PyTorch's | relative L2 | PyTorch's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"], row["backend"], row["tensor"]), []).append(row)
    for names, group in groups.items():
        if any(row["wrong"] for row in group):
            reasons = {f"{row['shape']} {row['layout']}: {fault}" for row in group for fault in row["wrong"]}
            lines.append(f"| {' | '.join(names)} | RED: {'; '.join(sorted(reasons))} |")
            continue
        cells = [f"{max(row[figure] for row in group):.2g}" for figure in figures]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/numerics-DEVICE.json")
    parser.add_argument("--backends", nargs="+", default=["reference", *BACKENDS], help="of those that run here")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device\n")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for case in CASES:
        chosen = SHAPES.get(case.op, SHAPES["attention"])
        for dtype in options.dtypes:
            for shape in SHAPES["quick"] if options.quick else chosen:
                rows += errors(case, shape, dtype, options.device, options.backends)
    out = options.out or report.ROOT / "bench" / "results" / f"numerics-{report.slug(options.device)}.json"
    command = shlex.join(["python", "-m", "bench.numerics", *(sys.argv[1:] if arguments is None else arguments)])
    report.write({"op": "numerics", **report.describe(options.device), "command": command, "rows": rows}, out)
    print("\n".join(table(rows)))
    red = sum(bool(row["wrong"]) for row in rows)
    print(f"\n{len(rows)} figures in {out}, {red} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
