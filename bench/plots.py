"""Pictures of a benchmark's JSON: times by contender, and the roofline.

    python -m bench.plots bench/results/former2conv-cpu.json ... [--out docs/performance]

Everything in them was measured: the roof too, as copy bandwidth and GEMM rate in the same run. Only the position along
the roofline's axis, FLOP per byte, comes from the formulas of ``bench/<op>.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.peers import FUSED, GRAPHED, WIDE

COLOURS = {
    FUSED: "#d55e00",
    WIDE: "#d9a679",
    "reference": "#999999",
    "eager": "#0072b2",
    "onnxruntime": "#009e73",
    "openvino": "#cc79a7",
    "sdpa-flash": "#56b4e9",
    "sdpa-cudnn": "#009e73",
    "sdpa-efficient": "#cc79a7",
    "flex": "#e69f00",
    "compile": "#000000",
    "compile-reference": "#666666",
    "compile-max-autotune": "#8b4513",
    "compile-reduce-overhead": "#6a3d9a",
}
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}


def draw(file: Path, folder: Path) -> list[Path]:
    """Draws the pictures of one file, per case and dtype one of the times and one of the roofline.

    Returns:
        Where they are.
    """
    found = json.loads(file.read_text())
    rows = [row for row in found["rows"] if not row["wrong"]]
    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        chosen = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        for kind, paint in (("time", _times), ("roofline", _roofline)):
            figure = paint(chosen, found)
            figure.suptitle(f"{case}, {dtype}, {found['device']}", fontsize=11)
            drawn.append(folder / f"{case.replace(' ', '-')}-{found['slug']}-{dtype}-{kind}.png")
            figure.savefig(drawn[-1], dpi=110, metadata={"Software": None})
    return drawn


def _times(rows: list[dict], found: dict) -> Figure:
    """A line for each shape, a mark for each contender; forward left, forward + backward right, layouts below."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    tall = 0.32 * sum(1 + sum(row["layout"] == layout for row in rows) for layout in layouts)
    figure = Figure(figsize=(11, 1.9 + 0.5 * len(layouts) + tall), layout="constrained")
    axes = figure.subplots(len(layouts), 2, squeeze=False)
    marks = {}
    for i, layout in enumerate(layouts):
        chosen = [row for row in rows if row["layout"] == layout]
        for j, which in enumerate(TITLES):
            axis = axes[i][j]
            for y, row in enumerate(chosen):
                axis.axhline(y, color="#dddddd", linewidth=0.8, zorder=0)
                for name, times in sorted(row[which].items(), key=lambda item: item[0].startswith(FUSED)):
                    marks[name] = _mark(axis, name, 1e3 * times[row["statistic"]], y)
            axis.set_yticks(range(len(chosen)), [row["shape"] for row in chosen] if j == 0 else [""] * len(chosen))
            axis.set_ylim(len(chosen) - 0.5, -0.5)
            _logarithmic(axis, "x")
            axis.set_title(f"{TITLES[which]}, {layout}", fontsize=10)
        axes[i][0].set_ylabel("B,C,H,K", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel(f"ms, {rows[0]['statistic'].removesuffix('_s')} round", fontsize=9)
    names = sorted(marks, key=lambda name: (name.endswith(GRAPHED), not name.startswith(FUSED)))
    figure.legend([marks[name] for name in names], names, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _mark(axis, name: str, x: float, y: float):
    colour = COLOURS.get(name.removesuffix(GRAPHED), "#333333")
    ours = name.startswith(FUSED)
    return axis.scatter(
        x,
        y,
        s=70 if ours else 34,
        marker="D" if ours else "o",
        facecolors="none" if name.endswith(GRAPHED) else colour,
        edgecolors=colour,
        zorder=3 if ours else 2,
    )


def _roofline(rows: list[dict], found: dict) -> Figure:
    """Rate over FLOP per byte: fusekern, and the fastest other contender of each row."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    peak = found["ceilings"]["gemm_flop_per_s"][rows[0]["dtype"]]
    copies = {int(size): rate for size, rate in found["ceilings"]["copy_bytes_per_s"].items()}
    for axis, which in zip(figure.subplots(1, 2, sharey=True), TITLES, strict=True):
        points = [point for row in rows for point in _points(row, which)]
        xs = [x for x, *_ in points] + [peak / max(copies.values()), peak / min(copies.values())]
        low, high = min(xs) / 2, max(xs) * 2
        for size, style in ((max(copies), "-"), (min(copies), ":")):
            rate = copies[size]
            label = f"copy of {_bytes(size)}: {rate / 1e9:.3g} GB/s"
            axis.plot([low, peak / rate], [low * rate / 1e9, peak / 1e9], style, color="#333333", label=label)
            if len(copies) == 1:
                break
        flat, label = [peak / max(copies.values()), high], f"GEMM: {peak / 1e9:.4g} GFLOP/s"
        axis.plot(flat, [peak / 1e9] * 2, "--", color="#333333", label=label)
        for x, rate, ours, layout in points:
            marker = "D" if layout == "channels_last" else "s"
            label = f"{FUSED if ours else 'fastest other'}, {layout}"
            colour = COLOURS[FUSED] if ours else COLOURS["eager"]
            axis.scatter(x, rate / 1e9, s=40, marker=marker, color=colour, label=label, zorder=3 if ours else 2)
        _logarithmic(axis, "x")
        _logarithmic(axis, "y")
        axis.set(xlim=(low, high), xlabel="FLOP per byte (least bytes)")
        axis.set_title(TITLES[which], fontsize=10)
        labels = {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        axis.legend(labels.values(), labels.keys(), fontsize=7, loc="lower right")
        if which == "forward":
            axis.set_ylabel("GFLOP/s")
    return figure


def _points(row: dict, which: str):
    """FLOP per byte, FLOP/s, whether it is fusekern's, layout."""
    work, times = row["roofline"][which], row[which]
    for ours in (True, False):
        seconds = [found[row["statistic"]] for name, found in times.items() if name.startswith(FUSED) == ours]
        if seconds:
            yield work["flops"] / work["bytes"], work["flops"] / min(seconds), ours, row["layout"]


def _logarithmic(axes, which: str) -> None:
    """With plain numbers at 1, 2 and 5."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _bytes(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 2**30 else f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "performance")
    options = parser.parse_args(arguments)
    for file in options.files:
        for picture in draw(file, options.out):
            print(picture)


if __name__ == "__main__":
    main()
