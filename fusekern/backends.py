"""Which backend runs an op on these tensors, and in words why another cannot.

``reference`` is plain PyTorch: it runs every op everywhere. An op that has a kernel in another backend registers a
function ``why_not(*arguments) -> list[str]``, which gets the op's own arguments and returns the reasons against that
kernel; an empty list means that it can run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from fusekern.errors import FusekernError

OPS = ("downsample", "conv2former", "inverted_bottleneck", "former", "former2conv", "score_map")
NAMES = ("auto", "reference", "cpp", "triton", "cuda")

# Why a compiled module is absent from this installation; empty for one that is there.
EXTENSIONS = {
    "_C": "this version has no C++ sources",
    "_C_cuda": "this version has no CUDA sources",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A backend other than the reference.

    Args:
        label: its name in a sentence.
        device: type of the device that its kernels run on.
        missing: why nothing of it can run in this installation; empty where it can.
    """

    label: str
    device: str
    missing: str


def _not_built(extension: str) -> str:
    return EXTENSIONS[extension] and f"{extension} is not built: {EXTENSIONS[extension]}"


# Fastest first: the order in which `auto` tries them.
BACKENDS = {
    "cuda": Backend("CUDA", "cuda", _not_built("_C_cuda")),
    "triton": Backend("Triton", "cuda", "" if find_spec("triton") else "triton is not installed"),
    "cpp": Backend("C++", "cpu", _not_built("_C")),
}

_kernels: dict[str, dict[str, Callable[..., list[str]]]] = {op: {} for op in OPS}
_default = "auto"


def register(op: str, backend: str, why_not: Callable[..., list[str]]) -> None:
    """Say that ``op`` has a kernel in ``backend``, and which arguments that kernel refuses.

    Args:
        op: one of ``OPS``.
        backend: ``"cpp"``, ``"triton"`` or ``"cuda"``.
        why_not: gets the op's arguments; returns the reasons, in words, why the kernel cannot take them. It is traced
            by ``torch.compile``, so it may look at shapes, strides, dtypes and devices, and at nothing else.
    """
    _kernels[op][backend] = why_not


def why_not(op: str, backend: str, *arguments: Any) -> list[str]:
    """All reasons why ``backend`` cannot run ``op`` on these arguments; empty if it can.

    The first argument of every op is a tensor, whose device counts for all.
    """
    if backend == "reference":
        return []
    traits = BACKENDS[backend]
    reasons = [traits.missing] if traits.missing else []
    device = arguments[0].device.type
    if device != traits.device:
        reasons.append(f"it runs on {traits.device} and the tensors are on {device}")
    kernel = _kernels[op].get(backend)
    if kernel is None:
        reasons.append(f"this version has no {traits.label} kernel of it")
    elif not reasons:
        reasons.extend(kernel(*arguments))
    return reasons


def resolve(op: str, backend: str, *arguments: Any) -> str:
    """The backend that runs ``op`` on these arguments.

    Args:
        op: one of ``OPS``.
        backend: the op's keyword. ``"auto"`` stands for the default that ``use_backend`` has set, and if that is
            ``"auto"`` too, for the fastest backend that can run, which never fails.
        arguments: the op's own arguments, a tensor first.

    Returns:
        ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: no backend has this name.
        FusekernError: the backend was asked for by name and cannot run; the message holds all reasons.
    """
    name = _default if check_name(backend) == "auto" else backend
    if name != "auto":
        reasons = why_not(op, name, *arguments)
        if reasons:
            raise FusekernError(f"backend {name!r} cannot run {op}: {'; '.join(reasons)}")
        return name
    chosen = "reference"
    for candidate in BACKENDS:
        if candidate in _kernels[op] and not why_not(op, candidate, *arguments):
            chosen = candidate
            break
    # A log call would break the graph of a trace.
    if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
        for other in BACKENDS:
            if other != chosen:
                reasons = "; ".join(why_not(op, other, *arguments)) or "it is slower"
                log.debug("%s runs on %s, not on %s: %s", op, chosen, other, reasons)
    return chosen


def check_name(backend: str) -> str:
    """The name itself, or a ``ValueError`` that lists the names there are."""
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")
    return backend


class use_backend:
    """Set the default backend of every op and module of this process, for a block of code or from now on.

    A keyword ``backend=`` other than ``"auto"`` goes before it.

    >>> use_backend("reference")         # from now on
    >>> with use_backend("reference"):   # here only
    ...     layer(image, text)

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: no backend has this name.
    """

    def __init__(self, name: str) -> None:
        global _default
        self._previous = _default
        _default = check_name(name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _default
        _default = self._previous
