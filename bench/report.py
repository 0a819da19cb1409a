"""What a benchmark says: where and with what it ran, its table, its JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("fusekern", "kernels", "csrc", "bench", "tests", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".toml")
PACKAGES = ("fusekern", "torch", "triton", "numpy", "onnxruntime", "openvino")


def describe(device: str) -> dict:
    """Device, driver, versions, commit and date, as every file under ``bench/results`` carries them."""
    facts = {
        "device": device_name(device),
        "slug": slug(device),
        "driver": _driver() if device == "cuda" else None,
        "threads": 1,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit(),
        "source": source(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        cudnn = torch.backends.cudnn.version()
        facts["versions"] |= {"cuda": torch.version.cuda, "cudnn": cudnn}
    return facts


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, 1 thread"


def slug(device: str) -> str:
    """``"cpu"``, or the name of the CUDA device for a file name."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The working tree's commit, ``-dirty`` if sources differ from it; ``FUSEKERN_COMMIT`` where there is no git."""
    if "FUSEKERN_COMMIT" in os.environ:
        return os.environ["FUSEKERN_COMMIT"]
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = [line for line in _git("status", "--porcelain", "--", *SOURCES).splitlines() if line.endswith(SUFFIXES)]
    return head.strip() + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        return ""


def source() -> str:
    """A fingerprint of the sources: it tells whether a result is of these, in a dirty tree and without git too."""
    found = hashlib.sha256()
    for top in SOURCES:
        path = ROOT / top
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in SUFFIXES and file.is_file():
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def is_of(earlier: dict, device: str, sources: str) -> bool:
    """Was an earlier result measured on this device and with these sources?"""
    return earlier["source"] == sources and earlier["device"] == device_name(device)


def kept(out: Path, device: str) -> dict | None:
    """An earlier file, for a run that goes on; none if it is of another device or other sources."""
    earlier = json.loads(out.read_text()) if out.exists() else None
    return earlier if earlier is not None and is_of(earlier, device, source()) else None


def write(report: dict, out: Path) -> None:
    """Whole or not at all: a run that is killed leaves the rows before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    part.replace(out)


def publish(op: str, arguments: Sequence[str] | None, rows: list[dict], out: Path) -> None:
    """Writes what ``python -m bench.OP`` found on a CPU with these arguments, none for those of the process."""
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", f"bench.{op}", *map(str, words)])
    write({"op": op, **describe("cpu"), "command": command, "rows": rows}, out)


def _rounded(value):
    """Floats at four digits: the others are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def short(dtype: torch.dtype) -> str:
    """``"bf16"``"""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def head(contenders: Iterable[str]) -> list[str]:
    """The table's head; times in ms, those of others with their ratio to fusekern's."""
    titles = ["case", "B,C,H,K", "heads", "dtype", "layout", "pass", "auto", "fusekern", "of roofline"]
    titles += [name for name in contenders if name != "fusekern"]
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]


def lines(row: dict, contenders: Iterable[str]) -> list[str]:
    """A row's lines of the table, and below them why a contender is missing."""
    first = [row["case"], row["shape"], str(row["heads"]), row["dtype"], row["layout"]]
    if row["wrong"]:
        return [f"| {' | '.join(first)} | RED, no speed: {'; '.join(row['wrong'])} |"]
    found = []
    for which in ("forward", "forward_backward"):
        times, roofline = row[which], row["roofline"][which]
        cells = [*first, which.replace("_", "+"), row["auto"]]
        if "fusekern" in times:
            cells += [_ms(times["fusekern"][row["statistic"]])]
            cells += [f"{100 * roofline['share']['fusekern']:.0f} % ({roofline['bound']})"]
        else:
            cells += ["-", "-"]
        for name in contenders:
            if name == "fusekern":
                continue
            ratio = row["ratio"][which].get(name)
            time = _ms(times[name][row["statistic"]]) if name in times else "-"
            cells.append(time + (f" ({ratio:.2f}x)" if ratio else ""))
        found.append(f"| {' | '.join(cells)} |")
    return found + [f"  {name}: {reason}" for name, reason in row["not"].items()]


def memory_lines(rows: Iterable[dict]) -> list[str]:
    """Bytes saved for backward, with the inputs, and peak memory above the inputs, in MB."""
    found = ["| case | B,C,H,K | dtype | layout | contender | saved | saved beyond inputs | peak |", "|" + "---|" * 8]
    for row in rows:
        for name, memory in row["memory"].items():
            figures = [memory["saved_bytes"], memory["saved_beyond_inputs_bytes"], memory.get("peak_bytes")]
            cells = [row["case"], row["shape"], row["dtype"], row["layout"], name]
            cells += ["-" if figure is None else f"{figure / 1e6:.2f}" for figure in figures]
            found.append(f"| {' | '.join(cells)} |")
    return found


def model_lines(rows: Iterable[dict]) -> list[str]:
    """Of ``bench.model``: images a second, and how many times as fast the fast layer makes the guided model."""
    names = ("vanilla", "reference", "auto")
    titles = ["batch", "size", "", "pass", *names, "auto over reference", "auto over vanilla"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        for which in ("inference", "training"):
            rates = {name: row["batch"] / row[which][name][row["statistic"]] for name in names}
            cells = [str(row["batch"]), str(row["size"]), row["dtype"], which]
            cells += [f"{rate:.3g}/s" for rate in rates.values()]
            cells += [f"{rates['auto'] / rates[other]:.2f}x" for other in ("reference", "vanilla")]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def launch_lines(rows: Iterable[dict]) -> list[str]:
    """Of ``bench.launches``: how many launches each op has, and which; PyTorch's own are not called kernels."""

    def short(op: str, name: str) -> str:
        return f"`{name.removeprefix(op + '_').removesuffix('_kernel')}`" if name.endswith("_kernel") else name

    lines = ["| op | B,C,H,K | dtype | layout | pass | launches | which | |", "|" + "---|" * 8]
    for row in rows:
        place = [row["op"], row["shape"], row["dtype"], row["layout"]]
        for which, names in row["planned"].items():
            verdict = "RED: " + "; ".join(row["wrong"]) if row["wrong"] else row["state"]
            cells = [*place, which, str(len(names)), ", ".join(short(row["op"], name) for name in names), verdict]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def slower_than_reference(rows: Iterable[dict]) -> list[str]:
    """Where ``auto`` takes the kernel and the plain PyTorch is faster: it should not."""
    return [
        f"slower than the reference: {row['case']} {row['shape']} {row['dtype']} {row['layout']} {which} {ratio:.2f}x"
        for row in rows
        for which in ("forward", "forward_backward")
        if row["auto"] == row["backend"] and (ratio := row.get("ratio", {}).get(which, {}).get("reference", 1)) < 1
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def main() -> None:
    """``python -m bench.report``: the facts about this machine's CUDA device, or its CPU."""
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    print(json.dumps(describe("cuda" if torch.cuda.is_available() else "cpu"), indent=1))


if __name__ == "__main__":
    main()
