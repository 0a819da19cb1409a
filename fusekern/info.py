"""What is installed, what is built, and which backend each op gets on each device here: ``fusekern info``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fusekern._version import __version__
from fusekern.backends import BACKENDS, EXTENSIONS, OPS, resolve, use_backend, why_not, why_slow
from fusekern.ops import BatchNorm

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "timm",
    "open_clip_torch",
    "torchvision",
    "accelerate",
    "jsonargparse",
    "pillow",
    "tensorboard",
    "matplotlib",
    "safetensors",
)


def collect() -> dict:
    """Everything that ``render`` shows, as plain values that JSON takes.

    Returns:
        ``version``, ``python``, ``platform``; ``packages``: version, or none if not installed; ``extensions``: why a
        compiled module is not built, or none if it is; ``devices``: description; ``ops``: for each device and op the
        ``backend`` that ``"auto"`` takes for fp32 tensors of the paper's shape, and for each other one, under ``not``,
        the reasons why it cannot run or is not taken.
    """
    devices = _devices()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extensions": {name: reason or None for name, reason in EXTENSIONS.items()},
        "devices": devices,
        "ops": {device: _ops(device) for device in devices},
    }


def render(info: dict) -> str:
    """The same for people."""
    lines = [f"fusekern {info['version']}, Python {info['python']}, {info['platform']}", "", "Packages"]
    lines += [f"  {name:<18} {found or 'not installed'}" for name, found in info["packages"].items()]
    lines += ["", "Compiled modules"]
    lines += [
        f"  {name:<18} {f'not built: {reason}' if reason else 'built'}" for name, reason in info["extensions"].items()
    ]
    lines += ["", "Devices"]
    lines += [f"  {device:<18} {description}" for device, description in info["devices"].items()]
    for device, ops in info["ops"].items():
        lines += ["", f"Ops on {device} under backend='auto'"]
        # A reason that holds for every op is said once, below them.
        shared = {name: _shared([row["not"].get(name, []) for row in ops.values()]) for name in BACKENDS}
        for op, row in ops.items():
            lines.append(f"  {op:<20} {row['backend']}")
            for name, reasons in row["not"].items():
                own = [reason for reason in reasons if reason not in shared.get(name, [])]
                if own or not reasons:
                    lines.append(f"    not {name}: {'; '.join(own) or 'it is slower'}")
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in shared.items() if reasons]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        for index in range(torch.accelerator.device_count()):
            found[f"{kind}:{index}"] = torch.cuda.get_device_name(index) if kind == "cuda" else kind
    return found


def _ops(device: str) -> dict[str, dict]:
    table = {}
    with use_backend("auto"):
        for op, arguments in _examples(device).items():
            chosen = resolve(op, "auto", *arguments)
            others = {
                name: why_not(op, name, *arguments) or why_slow(op, name, *arguments)
                for name in (*BACKENDS, "reference")
                if name != chosen
            }
            table[op] = {"backend": chosen, "not": others}
    return table


def _examples(device: str) -> dict[str, tuple]:
    """Arguments of every op at the paper's shape: C = 512, expansion 6, a 16x16 map, K = 150, 8 heads."""
    c, e, k, heads = 512, 3072, 150, 8

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device)

    image, text = empty(1, c, 16, 16), empty(1, k, c)
    norms = tuple(BatchNorm(*(empty(width) for _ in range(4)), 1e-5, False) for width in (e, e, c))
    linears = [(empty(rows, columns), empty(rows)) for rows, columns in ((3 * c, c), (c, c), (2 * c, c), (c, 2 * c))]
    norm, square = (empty(c), empty(c)), (empty(c, c), empty(c))
    former = (*linears[:2], norm, *linears[2:], norm)
    examples = {
        "downsample": (image, empty(c, c, 3, 3), empty(c), "floor"),
        "conv2former": (text, empty(1, c, 5, 5), heads, None),
        "inverted_bottleneck": (image, empty(e, c, 1, 1), empty(e, 1, 3, 3), empty(c, e, 1, 1), norms, 1, ""),
        "former": (text, *former, heads, 1e-5),
        "text_path": (text, text, square, norm, former, square, square, square, heads, 1e-5),
        "former2conv": (image, text, text, heads, None),
        "score_map": (image, text, True, False),
    }
    return {op: examples[op] for op in OPS}


def _shared(reasons: list[list[str]]) -> list[str]:
    return [reason for reason in reasons[0] if all(reason in others for others in reasons)]
