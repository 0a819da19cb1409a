"""Puts the figures of ``bench/results`` into the pages that quote them.

    python -m bench.page            # writes them
    python -m bench.page --check    # exit code 1 if a page says something else

A page holds a block for each result, between ``<!-- figures: FILE -->`` and ``<!-- end of figures -->``, where FILE is
that of ``bench/results`` without its ending, ``goals`` or ``headlines``. What stands between them is made here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import breakdown, learning, memory, numerics, report, scatter, zeros
from bench.peers import WIDE

RESULTS = report.ROOT / "bench" / "results"
PAGES = tuple(report.ROOT / name for name in ("README.md", "docs/performance.md", "docs/numerics.md"))
BLOCK = re.compile(r"(<!-- figures: ([\w.-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
PEERS = {
    "reference": "reference",
    "eager": "eager",
    "eager-linear": "eager, 1x1 as products",
    "native": "convolution without cuDNN",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    WIDE: "fusekern in fp32",
}
WIDTHS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


FIRST, BOTH = "forward", "forward_backward"
# What a CPU is to reach in channels_last: file, case, shape, pass, peer, how many times as fast. In fp32, but beside
# fusekern's own fp32 in bf16.
GOALS = (
    ("former2conv-cpu", "former2conv", "1,256,64,19", FIRST, "eager", 2.0),
    ("former2conv-cpu", "former2conv", "1,256,64,19", FIRST, "onnxruntime", 1.6),
    ("former2conv-cpu", "former2conv", "1,256,64,150", FIRST, "eager", 1.15),
    ("former2conv-cpu", "former2conv", "1,256,64,19", BOTH, "eager", 1.5),
    ("inverted_bottleneck-cpu", "inverted_bottleneck", "1,512,16,6", BOTH, "eager", 1.3),
    ("inverted_bottleneck-cpu", "inverted_bottleneck", "1,256,64,2", BOTH, "eager", 1.4),
    ("inverted_bottleneck-cpu", "inverted_bottleneck inference", "1,512,16,6", FIRST, "eager", 1.3),
    ("inverted_bottleneck-cpu", "inverted_bottleneck inference", "1,512,16,6", FIRST, "onnxruntime", 0.97),
    ("inverted_bottleneck-cpu", "inverted_bottleneck inference", "1,256,128,2", FIRST, "onnxruntime", 1.3),
    ("layer-cpu", "layer inference", "1,512,16,150", FIRST, "eager", 1.3),
    ("layer-cpu", "layer inference", "1,512,16,150", FIRST, "onnxruntime", 1.0),
    ("layer-cpu", "layer inference", "1,512,16,150", FIRST, "openvino", 1.0),
    ("layer-cpu", "layer", "1,512,16,150", BOTH, "eager", 1.25),
    ("layer-cpu", "layer inference", "1,512,16,150", FIRST, WIDE, 1.6),
    ("layer-cpu", "layer", "1,512,16,150", BOTH, WIDE, 1.6),
)
# What the README shows: words, file, cases of inference and of training, shape.
HEADLINES = (
    ("the layer, six blocks, C = 512, 16x16, 150 classes", "layer-cpu", "layer inference", "layer", "1,512,16,150"),
    ("the layer, six blocks, C = 256, 64x64, 19 classes", "layer-cpu", "layer inference", "layer", "1,256,64,19"),
    (
        "`inverted_bottleneck`, C = 512, 16x16, expansion 6",
        "inverted_bottleneck-cpu",
        "inverted_bottleneck inference",
        "inverted_bottleneck",
        "1,512,16,6",
    ),
    ("`former2conv`, C = 256, 64x64, 19 classes", "former2conv-cpu", "former2conv", "former2conv", "1,256,64,19"),
    ("`former`, C = 512, 150 classes", "former-cpu", "former", "former", "1,512,0,150"),
)


def ratio_of(name: str, case: str, shape: str, which: str, peer: str) -> float:
    """How many times as long a peer takes in channels_last, in fp32; fusekern in fp32, as in bf16.

    Raises:
        SystemExit: the result does not tell.
    """
    wanted = (case, shape, "channels_last")
    rows = {row["dtype"]: row for row in load(name)["rows"] if (row["case"], row["shape"], row["layout"]) == wanted}
    found = rows.get("bfloat16" if peer == WIDE else "float32", {}).get("ratio", {}).get(which, {}).get(peer)
    if not found:
        raise SystemExit(f"{name}.json does not tell {case} {shape} from {peer}")
    return found


def goals() -> list[str]:
    """What was aimed at beside what was measured."""
    lines = ["| case | B,C,H,K | pass | peer | goal | measured | |", "|---|---|---|---|---|---|---|"]
    for name, case, shape, which, peer, goal in GOALS:
        found = ratio_of(name, case, shape, which, peer)
        met = "met" if found >= goal else "missed"
        cells = [case, shape, which.replace("_", "+"), PEERS[peer], f"{goal:.2f}x", f"{found:.2f}x", met]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def headlines() -> list[str]:
    """What the README shows a newcomer."""
    cpu, vectors, _ = load("layer-cpu")["device"].split(", ")
    lines = [f"One thread of an {cpu} with {vectors}, fp32, one image. How many times as long the others take:", ""]
    lines += ["| | inference: eager | ONNX Runtime | OpenVINO | training: eager |", "|---|---|---|---|---|"]
    for words, name, inference, training, shape in HEADLINES:
        ratios = [ratio_of(name, inference, shape, FIRST, peer) for peer in ("eager", "onnxruntime", "openvino")]
        ratios.append(ratio_of(name, training, shape, BOTH, "eager"))
        lines.append(f"| {' | '.join([words, *(f'{ratio:.2f}x' for ratio in ratios)])} |")
    dates = sorted({load(name)["date"][:10] for _, name, *_ in HEADLINES})
    return [*lines, "", f"Measured on {', '.join(dates)}; commands and versions stand in docs/performance.md."]


def launches(result: dict) -> list[str]:
    """The launches of the first shape, and whether a device was seen to make them."""
    rows = [row for row in result["rows"] if row["shape"] == result["rows"][0]["shape"]]
    words = f"Planned, not measured: what the launchers decide for {result['processor']}. "
    if all(row["state"] == "measured" for row in rows):
        words = f"Measured: what the profiler saw, with {result['processor']}. "
    total = ", ".join(
        f"{which} {result['planned'][which]} of at most {most}" for which, most in result["budget"].items()
    )
    others = ", ".join(f"{which} {', '.join(names) or 'nothing'}" for which, names in result["between"].items())
    words += f"A block in channels_last: {total}. Of that, besides its five ops: {others}. "
    return [words + origin(result), "", *report.launch_lines(rows)]


def origin(result: dict) -> str:
    """Command, device, versions, commit and date."""
    versions = ", ".join(f"{name} {of}" for name, of in result["versions"].items() if of)
    return f"`{result['command']}` on {result['device']}, {result['date']}, commit {result['commit'][:9]}; {versions}."


def speeds(result: dict) -> list[str]:
    """A line for each case, shape, dtype and layout: our time, and how many times as long the others take."""
    names = [name for name in PEERS if any(name in row.get("forward", {}) for row in result["rows"])]
    trained = [name for name in names if any(name in row.get("forward_backward", {}) for row in result["rows"])]
    titles = ["case", "B,C,H,K", "dtype", "layout", "`auto`", "forward, ms", *(PEERS[name] for name in names)]
    titles += ["of roofline", "fwd+bwd, ms", *(PEERS[name] for name in trained), "of roofline"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in result["rows"]:
        cells = [row["case"], row["shape"], WIDTHS[row["dtype"]], row["layout"]]
        if row["wrong"]:
            lines.append(f"| {' | '.join(cells)} | red: {'; '.join(row['wrong'])} |")
            continue
        cells.append(row["auto"])
        for which, others in (("forward", names), ("forward_backward", trained)):
            ratios = row["ratio"][which]
            cells.append(f"{1e3 * row[which]['fusekern'][row['statistic']]:.3g}")
            cells += [f"{ratios[name]:.2f}x" if name in ratios else "-" for name in others]
            cells.append(f"{100 * row['roofline'][which]['share']['fusekern']:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def load(name: str) -> dict:
    """
    Raises:
        SystemExit: there is no such result, or one that was stopped before its end.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: a page quotes it")
    result = json.loads(path.read_text())
    if not result.get("complete", True):
        raise SystemExit(f"{path} is not complete: go on with `{result['command']} --resume`")
    return result


def figures(name: str) -> str:
    """What belongs into the block of a result, of the goals or of the headlines."""
    if name in ("goals", "headlines"):
        return "\n".join(["", *{"goals": goals, "headlines": headlines}[name](), ""])
    result = load(name)
    if result["op"] == "launches":
        return "\n".join([*launches(result), ""])
    tables = {"numerics": numerics.table, "model": report.model_lines, "learning": learning.table}
    tables |= {"memory": memory.table, "zeros": zeros.table, "scatter": scatter.table}
    tables |= {"breakdown": breakdown.table}
    lines = tables[result["op"]](result["rows"]) if result["op"] in tables else speeds(result)
    return "\n".join([origin(result), "", *lines, ""])


def filled(text: str) -> str:
    """A page's text with its blocks as they should be."""
    return BLOCK.sub(lambda block: block[1] + figures(block[2]) + block[3], text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="default: all that have blocks")
    options = parser.parse_args(arguments)
    stale = [page for page in options.pages if filled(page.read_text()) != page.read_text()]
    for page in stale:
        if options.check:
            print(f"{page} does not say what bench/results says: run python -m bench.page", file=sys.stderr)
        else:
            page.write_text(filled(page.read_text()))
            print(page)
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
