"""`python bench/resources.py [--every] [--target 90]`: what each kernel takes, and what that lets one expect.

It needs Triton's compiler and no GPU. The ops run on CPU tensors of the usual sizes (`--every`: of all sizes that have
launch settings of their own) while a recorder takes the place of the launch; each recorded call is then compiled for
every target, with the types, alignments and settings it was made with. The last columns are a prediction of the share
of a copy's bandwidth (`predict.py` has its model), for capability 9.0.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.predict import COPY, Work, loops_of, share_of_a_copy, work_of
from fastcr.config import tyro
from fastcr.errors import UsageError
from fastcr.kernels import (  # noqa: F401  (they register ops)
    common_weights,
    info_nce,
    launch,
    neighbour,
    rationale_fit,
    rationale_pool,
    relational,
    two_views,
)
from fastcr.runs.command_line import called, one_line_errors, parse

BATCH, CHANNELS, QUEUE = 256, 2048, 65536  # ResNet-50
TENSOR_CORE = re.compile(r"\b(?:[HIQO]G?MMA|UTC[A-Z]*MMA)\b")  # FP64's DMMA is left out
WIDTHS = (torch.bfloat16, torch.float16, torch.float32)
TYPES = dict(zip(WIDTHS, ("bf16", "fp16", "fp32"), strict=True))
TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


# of a multiprocessor with its 65,536 registers: resident warps, blocks, KB shared (CUDA C++ Programming Guide)
LIMITS = {
    80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228), 120: (48, 24, 100)
}  # fmt: skip


class Maps(NamedTuple):
    """Sizes of a call of the ops on feature maps."""

    positions: int
    detectors: int = 32
    dtype: torch.dtype = torch.bfloat16
    target: str = "max-softmax"

    def __str__(self) -> str:
        return f"S {self.positions}, K {self.detectors}, {TYPES[self.dtype]}"


class Weights(NamedTuple):
    """Sizes of a call of `common_weights`."""

    channels: int = CHANNELS
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"S 49, C {self.channels}, {TYPES[self.dtype]}"


class Contrast(NamedTuple):
    """Sizes of a call of the ops over a queue."""

    batch: int = BATCH
    dim: int = 256
    dtype: torch.dtype = torch.bfloat16
    neighbours: int = 1

    def __str__(self) -> str:
        return f"B {self.batch}, D {self.dim}, {TYPES[self.dtype]}"


class Views(NamedTuple):
    """Sizes of a call of `two_views`."""

    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"224 px, {TYPES[self.dtype]}"


Sizes = Maps | Weights | Contrast | Views
COMMON: list[Sizes] = [Maps(49), Maps(196), Weights(), Contrast(), Views()]  # 224 and 448 px
MAPS = ((49, 32, "max-softmax"), (196, 64, "sum"), (784, 32, "sum"), (1600, 128, "max-softmax"), (4096, 5, "sum"))
CHANNELS_OF_WEIGHTS = (64, 511, 512, 1280, 2047, CHANNELS, 4095, 4096)  # odd ones are read by single numbers
CONTRASTS = tuple((batch, dim) for batch in (8, 16, 64, BATCH) for dim in (128, 256, 384, 512))
EVERY: list[Sizes] = [
    *COMMON,
    *(Maps(positions, detectors, dtype, target) for dtype in WIDTHS for positions, detectors, target in MAPS),
    *(Weights(channels, dtype) for dtype in WIDTHS for channels in CHANNELS_OF_WEIGHTS),
    *(Contrast(batch, dim, dtype) for dtype in WIDTHS for batch, dim in CONTRASTS),
    *(Contrast(batch, 256, dtype, neighbours=5) for dtype in WIDTHS for batch in (16, BATCH)),
    *map(Views, WIDTHS),
]


class Call(NamedTuple):
    """Of a kernel: what decides its code, as Triton's runtime would choose it."""

    kernel: Any
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]
    shape: str
    work: Work | None


class Resources(NamedTuple):
    """What one kernel takes on one target: registers and spilled bytes a thread, shared bytes a block."""

    kernel: str
    shape: str
    target: int
    warps: int
    registers: int
    spills: int
    shared: int
    tensor_core: int  # instructions in the machine code
    occupancy: float  # bound on the resident warps, of the most the target holds; 0: a block does not fit
    instructions: int  # of each warp, in one trip of every innermost loop
    barriers: int  # in the machine code
    copy: dict[str, float]  # predicted share of a copy's bandwidth by GPU; empty where nothing is predicted


def specialise(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any], shape: str) -> Call:
    """The call of `kernel` with these arguments: 1 becomes a constant, multiples of 16 are marked."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {k: values[k] for k in ("num_warps", "num_stages") if k in values}
    call = Call(kernel, {}, {}, {}, options, shape, work_of(kernel.__name__, values, kwargs["grid"]))
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or (isinstance(value, int) and value == 1):
            call.types[param.name], call.constants[param.name] = "constexpr", value
            continue
        if isinstance(value, tuple):
            call.types[param.name] = ("fp32",) * len(value)
            continue
        pointer = isinstance(value, torch.Tensor)
        call.types[param.name] = "*" + TYPES[value.dtype] if pointer else "fp32" if isinstance(value, float) else "i32"
        if pointer or (isinstance(value, int) and value % 16 == 0):  # the allocator aligns to more than 16 bytes
            call.attributes[i,] = [["tt.divisibility", 16]]
    return call


def run_op(sizes: Sizes) -> None:
    """Forward and backward of the ops that take these sizes."""
    ops = torch.ops.fastcr
    if isinstance(sizes, Contrast):
        query, queue = (torch.empty(rows, sizes.dim, dtype=sizes.dtype) for rows in (sizes.batch, QUEUE))
        key, images = query.clone(), [torch.zeros(rows, dtype=torch.int64) for rows in (sizes.batch, QUEUE)]
        ops.info_nce(query, key, queue, 0.2)
        ops.relational(query, key, queue, *images, 0.1, 0.04)
        ops.neighbour(query, key, queue, *images, 0.1, sizes.neighbours)
        return
    if isinstance(sizes, Weights):
        features = torch.empty(BATCH, 7, 7, sizes.channels, dtype=sizes.dtype).permute(0, 3, 1, 2)
        ops.common_weights(features, torch.zeros(BATCH, sizes.channels), "match")
        return
    if isinstance(sizes, Views):
        starts = torch.zeros(2, dtype=torch.int64)
        pixels, table = torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 2, 16)
        ops.two_views(pixels, starts, starts.clone(), table, 224, [0.5] * 3, [0.5] * 3, sizes.dtype)
        return
    side = math.isqrt(sizes.positions)
    batch = BATCH if side <= 14 else BATCH // 4  # memory
    features = torch.empty(batch, side, side, CHANNELS, dtype=sizes.dtype).permute(0, 3, 1, 2)
    detectors, bias = torch.zeros(sizes.detectors, CHANNELS), torch.zeros(sizes.detectors)
    gradient = torch.zeros(batch, CHANNELS)
    pooled, attention, winners = ops.rationale_pool(features, detectors, bias, 0.4)
    ops.rationale_pool_backward(pooled, attention, features, detectors, attention, winners, 0.4)
    loss, *maps = ops.rationale_fit(features, gradient, detectors, bias, 0.4, sizes.target, "match", 0.0, True)
    for write_features in (True, False):
        ops.rationale_fit_backward(loss, features, gradient, detectors, *maps, 0.4, 0.0, write_features)


def calls(every: bool = False) -> list[Call]:
    """Every call the ops make at the sizes of `COMMON` or `EVERY`; what gives the same code is listed once."""
    found: list[Call] = []
    for sizes in EVERY if every else COMMON:

        def record(kernel: Any, *args: Any, _shape: str = str(sizes), **kwargs: Any) -> None:
            call = specialise(kernel, args, kwargs, _shape)
            if all(call[:5] != other[:5] for other in found):
                found.append(call)

        with mock.patch("triton.runtime.jit.JITFunction.run", record):
            run_op(sizes)
    return sorted(found, key=lambda call: call.kernel.__name__)


def occupancy(target: int, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that blocks of `warps` can fill, by registers and shared memory."""
    most_warps, most_blocks, most_shared = LIMITS[target]
    by_registers = 65536 // (math.ceil(registers / 8) * 256) // 4 * 4 // warps  # warps: units of 256, by fours
    by_shared = most_shared * 1024 // (math.ceil(shared / 128) * 128 + 1024)
    return min(most_blocks, by_registers, by_shared, most_warps // warps) * warps / most_warps


def compiled(call: Call, target: int) -> Resources:
    """Compile one call for compute capability `target` (90 for 9.0) and read what it takes."""
    triton: Any = launch.triton
    source = triton.compiler.ASTSource(call.kernel, call.types, call.constants, call.attributes)
    gpu = triton.backends.compiler.GPUTarget("cuda", target, 32)
    with warnings.catch_warnings(record=True), tempfile.NamedTemporaryFile(buffering=0, suffix=".cubin") as file:
        binary = triton.compile(source, target=gpu, options=call.options)
        file.write(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    name = call.kernel.__name__ + (" (features)" if call.constants.get("WRITE_FEATURES") else "")
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    facts = (warps, usage["REG"], usage["STACK"] + usage["LOCAL"], shared, len(TENSOR_CORE.findall(dump)))
    share, loops, copy = occupancy(target, warps, usage["REG"], shared), loops_of(dump), dict[str, float]()
    if call.work and target == 90 and share:
        stages = call.constants.get("STAGES", call.options.get("num_stages", 1))
        copy = share_of_a_copy(call.work, loops, warps, round(share * LIMITS[target][0] / warps), stages)
    once = sum(loop.instructions for loop in loops)
    return Resources(name, call.shape, target, *facts, share, once, dump.count("BAR.SYNC"), copy)


def resources(targets: Sequence[int] | None = None, every: bool = False) -> list[Resources]:
    """What every kernel takes on each of `targets` (default: all that the installed Triton compiles for)."""
    if launch.triton is None:
        raise UsageError("Triton is not installed, so there are no kernels to compile")
    if launch.INTERPRET:
        raise UsageError("TRITON_INTERPRET=1 takes the place of Triton's compiler: unset it")
    version = tuple(int(part) for part in launch.triton.__version__.split(".")[:2])
    able = tuple(LIMITS) if version >= (3, 8) else (80, 90)  # 3.6 crashes on some layouts for the newest
    if wrong := set(targets or ()).difference(able):
        raise UsageError(f"--target {min(wrong)}: this Triton's are {', '.join(map(str, able))}")
    return [compiled(call, target) for call in calls(every) for target in targets or able]


def resources_table(rows: Sequence[Resources]) -> Table:
    """The resources for people; registers and spilled bytes are a thread's, shared memory a block's."""
    table = Table(title=f"kernels at B {BATCH}, C {CHANNELS}, N {QUEUE}", caption="* predicted, not measured")
    predicted = [f"of a copy, {gpu}*" for gpu in COPY]
    names = ("sm", "warps", "registers", "spilled", "shared KB", "tensor ops", "occupancy", "in a trip", "barriers")
    for name in ("kernel", "shape", *names, *predicted):
        table.add_column(name, justify="left" if name in ("kernel", "shape") else "right", no_wrap=True)
    for row in rows:
        cells = [*row[:6], f"{row.shared / 1024:.1f}", row.tensor_core, f"{row.occupancy:.0%}", *row[9:11]]
        shares = [f"{row.copy[gpu]:.0%}" if row.copy else "–" for gpu in COPY]
        table.add_row(*map(str, cells), *shares, end_section=row.target == rows[-1].target != rows[0].target)
    return table


@dataclass(frozen=True)
class ResourcesConfig:
    """What to compile."""

    every: tyro.conf.UseCounterAction[int] = 0
    """Compile for every row of the launch settings and every dtype, not only for the usual sizes; minutes a target."""
    target: tuple[int, ...] = ()
    """Compute capabilities to compile for, 90 for 9.0. Default: all that the installed Triton compiles for."""


def main(args: Sequence[str]) -> None:
    """Print the resources of the kernels for the sizes and targets that `args` name."""
    with one_line_errors("bench/resources.py"):
        config = parse(ResourcesConfig, args, prog=called("bench/resources.py"), description=__doc__)
        table = resources_table(resources(config.target, bool(config.every)))
        Console(width=max(Console().width, 200)).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
