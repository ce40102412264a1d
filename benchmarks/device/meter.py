"""Times, launches, syncs and memory of a call. On a CPU only wall time, for the dry run."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ikd_fast.kernels.triton_ops.launch import trace

Run = Callable[[Any], Any]
# Cycles a second at which the sleep kernel counts, at most; a slower clock only sleeps longer.
SLEEP_CLOCK = 2e9
MAX_SLEEP = 0.25
# Launches that may wait before the host does.
QUEUE = 800


@dataclass(frozen=True)
class Spread:
    """Seconds."""

    median: float
    q1: float
    q3: float
    min: float
    rounds: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """At least two times.

        >>> Spread.of([3.0, 1.0, 2.0, 4.0, 5.0])
        Spread(median=3.0, q1=2.0, q3=4.0, min=1.0, rounds=5)
        """
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, q1, q3, min(times), len(times))


class Meter:
    """``rounds`` and ``seconds`` bound each measurement."""

    def __init__(self, device: torch.device, rounds: int = 15, seconds: float = 0.6) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds
        self.cuda = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0

    def sets_for(self, input_bytes: int) -> int:
        """How many input sets exceed three times the L2 cache, so that none is found there on its next turn."""
        return max(2, min(32, -(-3 * self.cache_bytes // max(input_bytes, 1)))) if self.cuda else 2

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def warm(self, run: Run, sets: Sequence[Any], calls: int = 3) -> None:
        for i in range(calls if self.cuda else 1):
            run(sets[i % len(sets)])
        self.synchronize()

    def _enough(self, times: list[float], start: float) -> bool:
        return len(times) >= self.rounds or (len(times) >= 5 and time.perf_counter() - start > self.seconds)

    def wall(self, run: Run, sets: Sequence[Any]) -> Spread:
        """Seconds from the call to the end of its work on the device."""
        times: list[float] = []
        begin = time.perf_counter()
        while not self._enough(times, begin):
            inputs = sets[len(times) % len(sets)]
            self.synchronize()
            start = time.perf_counter()
            out = run(inputs)
            self.synchronize()
            times.append(time.perf_counter() - start)
            del out
        return Spread.of(times)

    def host(self, run: Run, sets: Sequence[Any]) -> float | None:
        """Median seconds until the call returns, its work still going on. On a CPU that is the whole of it."""
        if not self.cuda:
            return None
        times: list[float] = []
        begin = time.perf_counter()
        while not self._enough(times, begin):
            inputs = sets[len(times) % len(sets)]
            self.synchronize()
            start = time.perf_counter()
            out = run(inputs)
            times.append(time.perf_counter() - start)
            del out
        self.synchronize()
        return statistics.median(times)

    def gpu(self, run: Run, sets: Sequence[Any], host: float | None, launches: int | None) -> Spread | None:
        """Seconds of device time a call: events around calls that were queued behind a sleep, so that the host's
        time, ``host`` a call, is hidden. A call that waits for the device, or that makes more launches than the
        queue holds, cannot be hidden: its host time counts."""
        if not self.cuda or host is None:
            return None
        calls = max(1, min(20, int(MAX_SLEEP / 2 / max(host, 1e-6)), QUEUE // (launches or 1)))
        sleep = min(MAX_SLEEP, 1.5 * calls * host + 1e-3)
        times: list[float] = []
        begin = time.perf_counter()
        turn = 0
        while not self._enough(times, begin):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(sleep * SLEEP_CLOCK))
            start.record()
            for _ in range(calls):
                out = run(sets[turn % len(sets)])
                turn += 1
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
            del out
        return Spread.of(times)

    def syncs(self, run: Run, inputs: Any) -> int | None:
        """How often the host waits for the device in a call."""
        if not self.cuda:
            return None
        self.synchronize()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message).lower() for w in found)

    def peak(self, run: Run, inputs: Any) -> int | None:
        """Bytes allocated at the highest point of a call beyond those before it, its results included."""
        if not self.cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        out = run(inputs)
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del out
        return peak

    def launches(self, run: Run, inputs: Any) -> int | None:
        """Kernels on the device, by the profiler; without one, those that our launchers start."""
        with trace() as record:
            run(inputs)
        ours = len(record.launches)
        if not self.cuda:
            return ours or None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            run(inputs)
            self.synchronize()
        on_device = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset", "Activity"))]
        return len(kernels) or ours or None

    def copy_bandwidth(self, size: int = 2**31) -> float | None:
        """Bytes read and written a second by a copy of ``size`` bytes."""
        if not self.cuda:
            return None
        source = torch.empty(size // 2, dtype=torch.bfloat16, device=self.device).normal_()
        target = torch.empty_like(source)

        def run(x: torch.Tensor) -> None:
            target.copy_(x)

        self.warm(run, [source])
        spread = self.gpu(run, [source], 2e-5, 1)
        assert spread is not None
        return 2 * size / spread.median
