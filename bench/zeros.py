"""What share of what ReLU6 hands to the last product of an inverted bottleneck is zero, block by block.

    python -m bench.zeros RUN IMAGES

RUN is the folder of a training run, whose weights label the pictures of the folder IMAGES. The CPU kernels pass over
these zeros, so that their speed depends on the share: the benchmarks tell it of their own inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench import report

OUT = report.ROOT / "bench" / "results" / "zeros.json"


class Zeros(TorchFunctionMode):
    """Looks at what comes out of ``F.relu6``, which a bottleneck calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.relu6:
            self.shares.append((out == 0).double().mean().item())
        return out

    def before_products(self) -> list[float]:
        """Of each bottleneck the second."""
        return self.shares[1::2]


def table(rows: Sequence[dict]) -> list[str]:
    lines = ["| run | blocks | least | mean | most |", "|---|---|---|---|---|"]
    for row in rows:
        shares = row["shares"]
        numbers = (min(shares), sum(shares) / len(shares), max(shares))
        lines.append(f"| {row['run']} | {len(shares)} | {' | '.join(f'{100 * share:.0f} %' for share in numbers)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    from fusekern import use_backend
    from fusekern.data.folder import read_image
    from fusekern.engine.checkpoint import load_segmenter
    from fusekern.engine.predict import predict_label

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_segmenter(options.run)
    files = sorted(file for file in options.images.iterdir() if file.suffix in (".png", ".jpg"))
    if not files:
        parser.error(f"{options.images} holds no PNG or JPEG")
    pictures = []
    with use_backend("reference"):  # the kernels call no ReLU6
        for file in files:
            with Zeros() as seen, torch.no_grad():
                predict_label(loaded.model, read_image(file), loaded.recipe.eval, device="cpu")
            pictures.append(seen.before_products())
    if not pictures[0]:
        parser.error(f"{options.run}: this model has no inverted bottleneck in a fusion layer")
    shares = torch.tensor(pictures).mean(0).tolist()
    rows = [{"run": f"{options.run.name}, step {loaded.step}", "images": len(files), "shares": shares}]
    report.publish("zeros", arguments, rows, options.out)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
