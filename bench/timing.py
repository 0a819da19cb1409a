"""How long calls take, on a CPU and on a CUDA device, and what the device can do at best.

Contenders are timed round by round, so that what disturbs the machine disturbs them all. A CPU runs one thread; the
best round counts. On CUDA, events stand around bursts of calls whose inputs rotate past the cache; the median counts.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from time import perf_counter

import torch

SHORTEST = {"cpu": 0.2e-3, "cuda": 2e-3}  # seconds: a shorter burst drowns in the clock's and the events' own time
STATISTIC = {"cpu": "best_s", "cuda": "median_s"}


def keep_freed_memory() -> bool:
    """Has glibc keep what tensors free instead of giving it back and faulting it in again, page by page, at the next
    call, which would cost a contender twice its time or nothing, by how the heap happens to lie.

    Returns:
        Whether the C library could be told.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # The last is the most that glibc allows; greater tensors are mapped anew at each call, whosever they are.
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 2**26) and mallopt(mmap_threshold, 2**25))


@dataclass(frozen=True)
class Burst:
    """``run`` makes ``calls`` calls, within ``context``, which is entered outside the timed region."""

    run: Callable[[], object]
    calls: int = 1
    context: Callable[[], AbstractContextManager] = nullcontext


def interleaved(
    bursts: dict[str, Burst], device: str, seconds: float, least: int = 5, most: int = 300
) -> dict[str, dict[str, float]]:
    """Times all bursts in turn for about ``seconds``, in at least ``least`` and at most ``most`` rounds.

    Returns:
        For each name ``best_s`` and ``median_s``, seconds a call; ``noise``, their ratio; ``rounds``.
    """
    timer = _cuda_time if device == "cuda" else _cpu_time
    repeats = {}
    for name, burst in bursts.items():
        with burst.context():
            timer(burst.run, 2)
            repeats[name] = max(1, ceil(SHORTEST[device] / max(timer(burst.run, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in bursts}
    start = perf_counter()
    rounds = 0
    order, shuffle = list(bursts), random.Random(0).shuffle
    while bursts and rounds < most and (rounds < least or perf_counter() - start < seconds):
        shuffle(order)  # a fixed order would favour whoever comes after a contender that leaves caches and heap alike
        for name in order:
            burst = bursts[name]
            with burst.context():
                if device == "cpu":
                    burst.run()  # untimed: the caches are its own
                times[name].append(timer(burst.run, repeats[name]) / repeats[name] / burst.calls)
        rounds += 1
    return {name: _summary(found) for name, found in times.items()}


def _summary(times: list[float]) -> dict[str, float]:
    best, middle = min(times), median(times)
    return {"best_s": best, "median_s": middle, "noise": middle / best, "rounds": len(times)}


def _cpu_time(run: Callable[[], object], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        run()
    return perf_counter() - start


def _cuda_time(run: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``run``, warmed up on a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def rotation(device: str, bytes_of_inputs: int, most: int = 64) -> int:
    """How many sets of inputs fill the device's cache twice, at most ``most``; on a CPU one."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(most, max(1, ceil(2 * cache / max(bytes_of_inputs, 1))))


@dataclass
class Ceilings:
    """What the device was seen to do at best: ``copy`` in bytes/s, read and written, by bytes moved; ``gemm`` in FLOP/s
    by dtype. Measuring again keeps the better figure."""

    device: str
    copy: dict[int, float] = field(default_factory=dict)
    gemm: dict[str, float] = field(default_factory=dict)

    def measure(self, dtypes: list[torch.dtype], seconds: float, quick: bool = False) -> None:
        """Spends about ``seconds`` on each size and dtype; ``quick`` leaves out what takes long by itself."""
        # A CPU's small tensors stay in its caches, which are faster than its memory; CUDA inputs rotate past the cache.
        sizes = [4 << 30] if self.device == "cuda" else [2**20, 2**22, 2**24] + ([] if quick else [2**26, 2**28])
        for size in sizes:
            source = torch.ones(size // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            rate = size / self._best(lambda s=source, t=target: t.copy_(s), seconds)
            self.copy[size] = max(rate, self.copy.get(size, 0.0))
        side = 8192 if self.device == "cuda" else 256 if quick else 1024
        for dtype in dtypes:
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            rate = 2 * side**3 / self._best(lambda a=a, b=b: a @ b, seconds)
            name = str(dtype).removeprefix("torch.")
            self.gemm[name] = max(rate, self.gemm.get(name, 0.0))

    def _best(self, run: Callable[[], object], seconds: float) -> float:
        with torch.no_grad():
            return interleaved({"": Burst(run)}, self.device, seconds)[""]["best_s"]

    def copy_rate(self, moved: int) -> float:
        """The copy rate at the largest measured size that is not above ``moved`` bytes."""
        return self.copy[max((size for size in self.copy if size <= moved), default=min(self.copy))]

    def floor(self, flops: int, moved: int, dtype: str) -> tuple[float, str]:
        """The least seconds for so many operations and bytes at these ceilings, and which of the two it is."""
        compute, memory = flops / self.gemm[dtype], moved / self.copy_rate(moved)
        return max(compute, memory), "compute" if compute > memory else "memory"

    def as_json(self) -> dict:
        return {
            "copy_bytes_per_s": {str(size): rate for size, rate in self.copy.items()},
            "gemm_flop_per_s": dict(self.gemm),
        }

    def include(self, earlier: dict) -> None:
        """Takes over what ``as_json`` has written."""
        for size, rate in earlier["copy_bytes_per_s"].items():
            self.copy[int(size)] = max(rate, self.copy.get(int(size), 0.0))
        for dtype, rate in earlier["gemm_flop_per_s"].items():
            self.gemm[dtype] = max(rate, self.gemm.get(dtype, 0.0))
