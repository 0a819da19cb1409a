"""How the errors of the whole layer scatter over draws of its input in bf16, fusekern's and PyTorch's.

    python -m bench.scatter

By the rule of parity a result of 16 bits may have 1.1 times the relative error of the worst of PyTorch's ways. Behind
six blocks one draw does not tell: here each way is also held to the rule against the others. ``bench.layer`` judges
several draws as one for that reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import report
from bench.case import Case, Shape, Truth, columns, lay_out, with_gradients
from bench.common import FUSED
from bench.layer import CASES

OUT = report.ROOT / "bench" / "results" / "scatter.json"
SHAPES = (Shape(1, 256, 16, 19), Shape(1, 256, 64, 19))
ALLOWED = 1.1


def errors(truth: Truth) -> dict[str, dict[str, float]]:
    """Relative L2 errors by contender and group of results or gradients."""
    case, groups = truth.case, {}
    for name in truth.named(truth.exact):
        groups.setdefault(case.judged_with(name), []).append(name)

    def ours(*leaves: torch.Tensor) -> torch.Tensor:
        return case.fused(truth.shape, "auto", *leaves)

    layout = "channels_last"
    fused = with_gradients(ours, truth.laid_out(layout), lay_out(truth.grad, layout))
    found = {}
    for group, names in groups.items():
        mine, exact, *others = columns(truth, fused, names, len(truth.peers))
        ways = {FUSED: mine, **{f"PyTorch {i}": other for i, other in enumerate(others, 1)}}
        for way, values in ways.items():
            error = (values.double() - exact).norm() / exact.norm()
            found.setdefault(way, {})[group] = error.item()
    return found


def rows_of(case: Case, shape: Shape, draws: int) -> list[dict]:
    """A row for each group."""
    found = [errors(Truth(case, shape, torch.bfloat16, "cpu", draw=draw)) for draw in range(draws)]
    return [
        {
            "case": case.name,
            "shape": str(shape),
            "of": group,
            "errors": {way: [draw[way][group] for draw in found] for way in found[0]},
        }
        for group in found[0][FUSED]
    ]


def broken(errors: dict[str, Sequence[float]], way: str) -> int:
    """In how many draws a way is worse than the rule allows, by the worst of PyTorch's others."""
    others = [of for name, of in errors.items() if name not in (way, FUSED)]
    return sum(mine > ALLOWED * max(worst) for mine, worst in zip(errors[way], zip(*others, strict=True), strict=True))


def table(rows: Sequence[dict]) -> list[str]:
    """Of each way the root mean square of its errors, the least and the most, and how often it broke the rule."""
    ways = list(rows[0]["errors"])
    lines = [f"| case | B,C,H,K | of | {' | '.join(ways)} |", "|" + "---|" * (3 + len(ways))]
    for row in rows:
        cells = [row["case"], row["shape"], row["of"]]
        for way, of in row["errors"].items():
            mean = (sum(error**2 for error in of) / len(of)) ** 0.5
            cells.append(f"{mean:.4f}, {min(of):.4f} to {max(of):.4f}, {broken(row['errors'], way)} of {len(of)}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for case in CASES for shape in SHAPES for row in rows_of(case, shape, options.draws)]
    report.publish("scatter", arguments, rows, options.out)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
