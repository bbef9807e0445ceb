"""The ops: the public function, its eager reference, and that under torch.compile.

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
from bench.workloads import OPS, Workload

CASES = [(name, example) for name, spec in OPS.items() if spec.kernels for example in spec.usual]
BATCHES = (256, 128, 1024)
GPU = [
    Workload(name, {**example.sizes, "B": batch}, dtype, training, example.options)
    for batch in BATCHES
    for name, example in CASES
    for dtype in ((torch.bfloat16, torch.float32) if "N" in example.sizes else (torch.bfloat16,))  # heads are in fp32
    for training in (False, True)
    if (training and OPS[name].learns) or (not training and (batch == BATCHES[0] or not OPS[name].learns))
]
SMALL = {"B": 16, "C": 256, "S": 49, "K": 32, "D": 256, "N": 4096}
CPU = [
    Workload(name, {letter: SMALL[letter] for letter in OPS[name].usual[0].sizes}, torch.float32, training)
    for name in dict(CASES)
    for training in (False, True)
    if OPS[name].learns or not training
]


def needed_bytes(work: Workload, way: str) -> int:
    """Memory a measurement takes at most: two sets of inputs with their gradients, and results in fp64 or in fp32."""
    wide = work.input_bytes // work.dtype.itemsize * (8 if way == "op" else 4)
    logits = work.sizes["B"] * work.sizes.get("N", 0) * (8 if way == "op" else 4)
    return 4 * work.input_bytes + 5 * (wide + logits)


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
    function = work.spec.op if way == "op" else work.spec.reference
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
