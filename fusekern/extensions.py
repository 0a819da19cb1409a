"""The compiled modules: which are here, and why another is not."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch  # noqa: F401, its library must be loaded before a module that is linked against it

NAMES = ("_C", "_C_cuda")

_FOLDER = Path(__file__).parent


def load(name: str) -> str:
    """Import ``fusekern.<name>``, which registers its ops.

    Args:
        name: ``"_C"`` or ``"_C_cuda"``.

    Returns:
        Why that cannot be, in one line; empty if the module is loaded.
    """
    try:
        reason = json.loads((_FOLDER / "_build.json").read_text())[name]
    except FileNotFoundError:
        reason = "this copy of fusekern was never installed"
    if reason:
        return reason
    try:
        import_module(f"fusekern.{name}")
    except ImportError as error:
        files = ", ".join(path.name for path in sorted(_FOLDER.glob(f"{name}.*")))
        return f"it does not load: {error} (found: {files or 'no such file'})"
    return ""
