"""Which backend runs an op on these tensors, and in words why another cannot.

``reference`` is plain PyTorch: it runs every op everywhere. An op that has a kernel in another backend registers a
function ``why_not(*arguments) -> list[str]``, which gets the op's own arguments and returns the reasons why that kernel
cannot take them; an empty list means that it can run. Another, ``why_slow``, says where ``auto`` does better without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from fusekern.errors import FusekernError
from fusekern.extensions import NAMES as MODULES
from fusekern.extensions import load

OPS = ("downsample", "conv2former", "inverted_bottleneck", "former", "text_path", "former2conv", "score_map")
NAMES = ("auto", "reference", "cpp", "triton", "cuda")

# Why a compiled module is absent from this installation; empty for one that is there.
EXTENSIONS = {name: load(name) for name in MODULES}

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
    return EXTENSIONS[extension] and f"{extension} is not there: {EXTENSIONS[extension]}"


# Fastest first: the order in which `auto` tries them.
BACKENDS = {
    "cuda": Backend("CUDA", "cuda", _not_built("_C_cuda")),
    "triton": Backend("Triton", "cuda", "" if find_spec("triton") else "triton is not installed"),
    "cpp": Backend("C++", "cpu", _not_built("_C")),
}

Reasons = Callable[..., list[str]]

_kernels: dict[str, dict[str, tuple[Reasons, Reasons]]] = {op: {} for op in OPS}
_default = "auto"


def _never(*arguments: Any) -> list[str]:
    return []


def register(op: str, backend: str, why_not: Reasons, why_slow: Reasons = _never) -> None:
    """Say that ``op`` has a kernel in ``backend``, and which arguments that kernel refuses.

    Both functions get the op's arguments. They are traced by ``torch.compile``, so they may look at shapes, strides,
    dtypes and devices, and at nothing else.

    Args:
        op: one of ``OPS``.
        backend: ``"cpp"``, ``"triton"`` or ``"cuda"``.
        why_not: returns the reasons, in words, why the kernel cannot take them.
        why_slow: returns the reasons why ``auto`` should not take the kernel although it can run.
    """
    _kernels[op][backend] = why_not, why_slow


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
        reasons.extend(kernel[0](*arguments))
    return reasons


def why_slow(op: str, backend: str, *arguments: Any) -> list[str]:
    """Why ``auto`` passes over a backend that can run ``op`` on these arguments; empty if nothing speaks against it."""
    return _kernels[op][backend][1](*arguments) if backend in _kernels[op] else []


def resolve(op: str, backend: str, *arguments: Any) -> str:
    """The backend that runs ``op`` on these arguments.

    Args:
        op: one of ``OPS``.
        backend: the op's keyword. ``"auto"`` stands for the default that ``use_backend`` has set, and if that is
            ``"auto"`` too, for the fastest backend that can run, which never fails. Under ``torch.export``,
            ``torch.jit.trace``, ``torch.func`` transforms and forward-mode derivatives that is the reference: the first
            two for programs that run where fusekern is not installed and on other sizes, the others because kernels
            have neither batching rules nor tangents.
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
        if name != "reference" and (transform := _transform()):
            reasons = [*reasons, f"it does not work under {transform}"]
        if reasons:
            raise FusekernError(f"backend {name!r} cannot run {op}: {'; '.join(reasons)}")
        return name
    chosen = "reference"
    # Not is_exporting(): torch 2.11 compiles it to a yes, export or not.
    if not torch.compiler._is_exporting_flag and not _transform():
        device = arguments[0].device.type
        for candidate, traits in BACKENDS.items():
            # What why_not says, without the words.
            if traits.device != device or traits.missing or candidate not in _kernels[op]:
                continue
            cannot, slow = _kernels[op][candidate]
            if not cannot(*arguments) and not slow(*arguments):
                chosen = candidate
                break
    # A log call would break the graph of a trace.
    if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
        for other in BACKENDS:
            if other != chosen:
                reasons = why_not(op, other, *arguments) or why_slow(op, other, *arguments)
                reasons = "; ".join(reasons) or "it is slower"
                log.debug("%s runs on %s, not on %s: %s", op, chosen, other, reasons)
    return chosen


def is_reference(backend: str) -> bool:
    """Is plain PyTorch asked for by name, in the keyword or by ``use_backend``?"""
    return (_default if backend == "auto" else backend) == "reference"


def _transform() -> str:
    """What this call is inside of that kernels have no part in; empty for nothing."""
    if torch.compiler.is_compiling():
        return ""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    return "" if torch._C._get_tracing_state() is None else "torch.jit.trace"


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
