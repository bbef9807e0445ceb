"""The ops on maps and on a queue: the public function, its eager reference, and that under torch.compile.

On a GPU: CUDA-graph replays over inputs that exceed the L2 cache, at the sizes of ResNet-50. Without one: a smoke test
at small sizes, timed by the wall clock. `bench/report.py` turns the JSON into a table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.timing import Timing, rotation, summary, time_on_gpu
from bench.workloads import OPS, QUEUED, REFERENCES, Workload

BATCHES = (256, 128, 1024)
GPU = [
    *(
        Workload(op, way, batch, positions, 2048)  # type: ignore[arg-type]
        for op, way in (("fit", "forward"), ("fit", "training"), ("pool", "forward"), ("common", "forward"))
        for batch in BATCHES
        for positions in (49, 196)
    ),
    *(Workload("contrast", "training", batch, keys, 256) for batch in BATCHES for keys in (4096, 65536)),
    *(
        Workload(op, "training", batch, keys, 256, dtype=dtype)  # type: ignore[arg-type]
        for op in QUEUED[1:]
        for batch, keys, dtype in (
            (128, 4096, torch.float32),  # as in training, whose head and queue are fp32
            (256, 65536, torch.float32),
            (256, 65536, torch.bfloat16),
        )
    ),
]
GPU.sort(key=lambda work: BATCHES.index(work.batch))
CPU = [
    Workload("fit", "forward", 16, 49, 256, dtype=torch.float32),
    Workload("fit", "training", 16, 49, 256, dtype=torch.float32),
    Workload("pool", "forward", 16, 49, 256, dtype=torch.float32),
    Workload("common", "forward", 16, 49, 256, dtype=torch.float32),
    *(Workload(op, "training", 64, 4096, 256, dtype=torch.float32) for op in QUEUED),  # type: ignore[arg-type]
]


def needed_bytes(work: Workload, way: str) -> int:
    """Memory a measurement takes at most: two sets of inputs with their gradients, and what the way holds in fp32."""
    fp32 = 4 * work.input_bytes // work.dtype.itemsize
    logits = 4 * work.batch * work.positions if work.op in QUEUED else 0
    return 4 * work.input_bytes + (0 if way == "op" else 5 * (fp32 + logits))


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory a call takes beside its inputs; None without a GPU."""
    if device.type != "cuda":
        call()
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def wall(benchmark: Any, call: Callable[[], Any]) -> Timing:
    """pytest-benchmark's own samples of one call on the CPU."""
    benchmark(call)
    return summary(benchmark.stats.stats.data, "wall") if benchmark.stats else Timing(0.0, 0.0, 0.0, "wall")


@pytest.mark.parametrize("work", GPU if torch.cuda.is_available() else CPU, ids=str)
@pytest.mark.parametrize("way", ["op", "eager", "compiled"])  # all ops before what they are held against
def test_op(
    benchmark: Any, device: torch.device, copy_rate: float | None, product_rate: float | None, work: Workload, way: str
) -> None:
    """The figures are in the report's extra_info; red where the op's results are not those of the fp64 reference."""
    gpu = device.type == "cuda"
    if gpu and needed_bytes(work, way) > 0.9 * torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs about {needed_bytes(work, way) / 2**30:.0f} GiB of GPU memory")
    torch.compiler.reset()  # a compiled function keeps but a few shapes
    function = OPS[work.op] if way == "op" else REFERENCES[work.op]
    if way == "compiled":
        function = torch.compile(function, dynamic=False)
    sets = [work.inputs(device, seed) for seed in range(rotation(work.input_bytes, device))]
    calls = [partial(work.run, function, inputs) for inputs in sets]
    error = work.error(calls[0](), work.exact(sets[0])) if way == "op" else None
    extra = extra_bytes(calls[0], device)
    if gpu and benchmark.enabled:
        timing = time_on_gpu(calls)
        benchmark.pedantic(calls[0], rounds=1)  # the harness records nothing without a run of its own
    else:
        timing = wall(benchmark, calls[0])
    benchmark.extra_info |= {
        "work": str(work),
        "way": way,
        "correct": None if error is None else error <= work.tolerance,
        "seconds": timing._asdict(),
        "floor_bytes": work.floor.bytes,
        "floor_flops": work.floor.flops,
        "copy_bytes_per_second": copy_rate,
        "matmul_flops_per_second": product_rate,
        "extra_bytes": extra,
    }
    assert error is None or error <= work.tolerance, f"the op is {error:.1e} off"
