"""Times and memory of callables: interleaved, medians, with a warm-up, waiting for the GPU.

Peak memory is what torch allocates beyond what was there before: the allocator's own count on a GPU, the profiler's
allocations and releases on a CPU, where the resident memory of the process would say what was never given back.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from .floor import synchronize


@dataclass
class Measurement:
    """Seconds of every repeat, and bytes.

    Attributes:
        times_s: seconds, one a repeat.
        extra_bytes: peak memory beyond what was there before.
    """

    times_s: list[float] = field(default_factory=list)
    extra_bytes: int = 0

    @property
    def median_s(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.times_s)


def extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a call beyond what was allocated before it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Its library writes a line to stderr at every start and stop; it reads this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def measure(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, *, has_grad: bool = False
) -> dict[str, Measurement]:
    """Measure callables in turn (A B C A B C ...), so that a machine that slows down does so for all of them.

    Args:
        runs: what to call, by name.
        repeats: times that count; one more, which measures memory, warms up.
        device: what they run on.
        has_grad: gradients are wanted; otherwise all runs in inference mode.
    """
    found = {name: Measurement() for name in runs}
    with torch.inference_mode(not has_grad):
        for name, run in runs.items():
            found[name].extra_bytes = extra_bytes(run, device)
        for _ in range(repeats):
            for name, run in runs.items():
                synchronize(device)
                start = time.perf_counter()
                run()
                synchronize(device)
                found[name].times_s.append(time.perf_counter() - start)
    return found
