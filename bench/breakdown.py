"""Where the time of the whole layer goes in inference on a CPU, op by op, beside what its multiplications need at best.

    python -m bench.breakdown

Every op is timed where it stands, in calls of the layer, with whatever its predecessors left in the caches; the best of
many calls counts. The rate of products is measured in the same run, in the caches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

from bench import report
from bench.case import Shape, lay_out
from bench.layer import flops_of_ops, layer_of
from bench.timing import Ceilings, keep_freed_memory
from fusekern import ops
from fusekern.nn import bridges, inverted_bottleneck

OUT = report.ROOT / "bench" / "results" / "breakdown-cpu.json"
SHAPE = Shape(1, 512, 16, 150)
DTYPES = ("float32", "bfloat16")
# Where the layer finds each op.
PLACES = {
    "inverted_bottleneck": (inverted_bottleneck, "with_recipe"),
    "downsample": (ops, "downsample"),
    "conv2former": (ops, "conv2former"),
    "text_path": (ops, "text_path"),
    "former2conv": (bridges, "by_recipe"),
    "score_map": (ops, "score_map"),
}


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Meanwhile the seconds that each op takes are added up."""

    def clocked(op: str, function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **keywords: object) -> object:
            start = perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[op] += perf_counter() - start

        return run

    true = {op: getattr(*place) for op, place in PLACES.items()}
    for op, (module, name) in PLACES.items():
        setattr(module, name, clocked(op, true[op]))
    try:
        yield
    finally:
        for op, (module, name) in PLACES.items():
            setattr(module, name, true[op])


def rows_of(dtype: torch.dtype, shape: Shape, calls: int, ceilings: Ceilings) -> list[dict]:
    """A row for each op, and one for what is left of the layer."""
    torch.manual_seed(0)
    fuse = layer_of(shape).eval().to(dtype)
    image = torch.randn(shape.batch, shape.channels, shape.size, shape.size, dtype=dtype)
    image, text = lay_out(image, "channels_last"), torch.randn(shape.tokens, shape.channels, dtype=dtype)
    best = dict.fromkeys([*PLACES, "all"], float("inf"))
    for _ in range(calls):
        spent = dict.fromkeys(PLACES, 0.0)
        with torch.no_grad(), timed(spent):
            start = perf_counter()
            fuse(image, text)
        spent["all"] = perf_counter() - start
        best = {name: min(seconds, spent[name]) for name, seconds in best.items()}
    best["between"] = best["all"] - sum(best[op] for op in PLACES)
    flops, name = flops_of_ops(shape), str(dtype).removeprefix("torch.")
    flops["all"] = sum(flops.values())
    return [
        {"op": op, "shape": str(shape), "dtype": name, "seconds": best[op], "flops": flops.get(op, 0)}
        | {"gemm_flop_per_s": ceilings.gemm[name]}
        for op in (*PLACES, "between", "all")
    ]


def table(rows: Sequence[dict]) -> list[str]:
    lines = ["| | dtype | ms | share | GFLOP | GFLOP/s | of the rate of products |", "|" + "---|" * 7]
    whole = {row["dtype"]: row["seconds"] for row in rows if row["op"] == "all"}
    for row in rows:
        rate, share = row["flops"] / row["seconds"], row["seconds"] / whole[row["dtype"]]
        cells = [
            row["op"],
            report.short(getattr(torch, row["dtype"])),
            f"{1e3 * row['seconds']:.1f}",
            f"{100 * share:.0f} %",
        ]
        of_best = [f"{row['flops'] / 1e9:.2f}", f"{rate / 1e9:.0f}", f"{100 * rate / row['gemm_flop_per_s']:.0f} %"]
        lines.append(f"| {' | '.join([*cells, *(of_best if row['flops'] else ['-'] * 3)])} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    ceilings = Ceilings("cpu")
    dtypes = [getattr(torch, name) for name in options.dtypes]
    ceilings.measure(dtypes, 1.0, quick=True)
    rows = [row for dtype in dtypes for row in rows_of(dtype, SHAPE, options.calls, ceilings)]
    report.publish("breakdown", arguments, rows, options.out)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
