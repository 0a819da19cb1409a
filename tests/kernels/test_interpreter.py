"""Runs the launchers' tests, ``interpreted_*.py``, in Triton's interpreter: in a process of their own, because the
decorator decides at import. With a CUDA device the same files run on it, compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))

# Before 3.7 the interpreter takes an array of one element for an integer, which NumPy no longer does from 2.4 on.
TRITON, NUMPY = ([int(part) for part in module.__version__.split(".")[:2]] for module in (triton, numpy))
needs_interpreter = pytest.mark.skipif(
    TRITON < [3, 7] and NUMPY >= [2, 4], reason="the interpreter of this Triton needs NumPy below 2.4"
)


def run(file: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 0 and "skipped" not in done.stdout, done.stdout[-2000:]


@needs_interpreter
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("interpreted_"))
def test_in_the_interpreter(file):
    run(file, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("interpreted_"))
def test_on_the_device(file):
    run(file, TRITON_INTERPRET="0")
