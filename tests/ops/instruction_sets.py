"""The tests of a C++ kernel once more for the other instruction sets that this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_again(file: str, isa: str) -> None:
    """All tests of ``file`` but ``test_other_instruction_sets``, in a process of their own: the choice is made once."""
    import fusekern._C as extension

    isas = extension.build_info()["isas"]
    if "FUSEKERN_CPU_CAPABILITY" in os.environ or isas.index(isa) >= isas.index(extension.cpu_capability()):
        pytest.skip("it is tested in this process, or this CPU lacks it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = {**os.environ, "FUSEKERN_CPU_CAPABILITY": isa}
    done = subprocess.run(
        [*command, "-k", "not other_instruction_sets"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
