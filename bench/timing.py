"""How long a call takes on the GPU: CUDA-graph replays over inputs that together exceed the L2 cache."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

SECONDS, FEWEST, MOST = 0.3, 10, 500  # of one measurement: what it aims at, and its samples

How = Literal["graph", "events", "wall", "cpu"]


class Ceilings(NamedTuple):
    """What the device reached in the same run: bytes a second of a copy, FLOP a second of a matrix product."""

    copy: float
    matmul: float


class Work(NamedTuple):
    """Bytes moved and floating-point operations."""

    bytes: int = 0
    flops: int = 0

    @classmethod
    def total(cls, parts: Iterable[Work]) -> Work:
        """All parts together."""
        return cls(*map(sum, zip((0, 0), *parts, strict=True)))

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds it takes at least: the bytes at the rate of a copy or the FLOPs at that of a product."""
        return max(self.bytes / ceilings.copy, self.flops / ceilings.matmul)


class Timing(NamedTuple):
    """Seconds of one call, and how they were measured."""

    median: float
    p20: float
    p80: float
    how: How


def summary(samples: Sequence[float], how: How) -> Timing:
    """Median, 20th and 80th percentile of samples in seconds."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], how)
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(tenths[4], tenths[1], tenths[7], how)


def sets_beyond_cache(bytes_a_set: int, cache: int, free: int) -> int:
    """Sets of inputs that exceed the cache four times, within a quarter of the free memory; two at least."""
    return max(min(math.ceil(4 * cache / bytes_a_set), free // (4 * bytes_a_set)), 2)


def rotation(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of inputs a measurement on this GPU rotates over; one where there is no GPU."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return sets_beyond_cache(bytes_a_set, torch.cuda.get_device_properties(device).L2_cache_size, free)


def time_on_gpu(calls: Sequence[Callable[[], Any]]) -> Timing:
    """Time one call: `calls` do the same work on different memory, and are captured, one after the other, in one graph.

    A call that cannot be captured is launched from Python instead, and the timing says "events".
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and initialises what may not be initialised in a capture
        for call in (calls[0], *calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = [call() for call in calls]  # alive until the end: else all would be written to the same memory
    except RuntimeError:
        torch.cuda.synchronize()
        return summary([each / len(calls) for each in _samples(lambda: [call() for call in calls])], "events")
    timing = summary([each / len(calls) for each in _samples(graph.replay)], "graph")
    del results
    return timing


def _samples(run: Callable[[], Any]) -> list[float]:
    """Seconds of each of several runs, launched without a pause; how many depends on how long one takes."""

    def several(rounds: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    first = statistics.median(several(3))
    return several(min(max(round(SECONDS / max(first, 1e-9)), FEWEST), MOST))


def time_on_cpu(call: Callable[[], Any]) -> Timing:
    """Time one call that has no device to wait for, by the clock on the wall."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    first = min(seconds() for _ in range(2))
    return summary([seconds() for _ in range(min(max(round(SECONDS / max(first, 1e-9)), 3), MOST))], "wall")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on this device, read and written bytes both counted."""
    cuda = device.type == "cuda"
    size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 8) if cuda else 1 << 28  # far beyond the CPU's caches
    # ones, for memory that was never written to is not there to be read
    source, copy = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _fast(lambda: copy.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product on this device, a multiplication and an addition counted as two.

    In fp32 on CUDA as `torch.backends.cuda.matmul` says: PyTorch's convolutions may take TF32 where products do not.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b, product = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return 2 * side**3 / _fast(lambda: torch.mm(a, b, out=product), device)


def _fast(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call that others do not slow down: a GPU is the user's own, a CPU's cores rarely are."""
    return time_on_gpu([call]).median if device.type == "cuda" else time_on_cpu(call).p20
