"""Weights are never taken from a pickle: opening one runs whatever code lies in it."""

from __future__ import annotations

from pathlib import Path

from fusekern.errors import FusekernError

_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar"}


def refuse_pickle(path: Path) -> None:
    """Raises FusekernError if the file is a pickle or a zip of pickles, by its name or its first bytes."""
    with path.open("rb") as file:
        head = file.read(9)
    zipped, pickled = head[:4] == b"PK\x03\x04", head[:1] == b"\x80" and head[8:9] != b"{"
    if path.suffix.lower() in _SUFFIXES or zipped or pickled:
        raise FusekernError(
            f"{path} is a pickle (as torch.save writes), refused: opening one runs whatever code lies in it; "
            "weights are taken from .safetensors files"
        )
