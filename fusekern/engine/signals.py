"""Ctrl-C and SIGTERM: a request to stop after the step, so that nothing is lost."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path

from fusekern.errors import FusekernError

log = logging.getLogger(__name__)

# A Ctrl-C reaches a worker of torchrun twice, from the terminal and from torchrun; only a later one is a second Ctrl-C.
_ECHO = 1.0  # seconds


class Interrupted(FusekernError):
    """A signal stopped the run after ``step`` steps; ``checkpoint`` is where it goes on from, unless all are done."""

    exit_code = 130  # as a shell says of SIGINT

    def __init__(self, step: int, checkpoint: Path, ended: bool = False):
        rest = "continue with --resume auto"
        if ended:
            rest = f"all steps are done: score it with fusekern eval {checkpoint}"
        super().__init__(f"interrupted at step {step}; saved {checkpoint}; {rest}")
        self.step, self.checkpoint = step, checkpoint


class StopSignals:
    """While the block runs, SIGINT and SIGTERM set ``requested``; a second Ctrl-C raises KeyboardInterrupt at once.

    Outside of the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._since is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
            log.warning("stopping after this step; Ctrl-C again quits at once and loses what is not saved")
        elif number == signal.SIGINT and now - self._since > _ECHO:
            raise KeyboardInterrupt


def leave_signals_to_trainer(worker: int) -> None:
    """For loader processes, which a Ctrl-C reaches too: they end when the training process says so, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
