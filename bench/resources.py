"""`python bench/resources.py [--every] [--target 90]`: registers, spills, shared memory and occupancy of each kernel.

It needs Triton's compiler and no GPU. The ops run on CPU tensors of the usual sizes (`--every`: of all sizes that have
launch settings of their own) while a recorder takes the place of the launch; each recorded call is then compiled for
every target, with the types, alignments and settings it was made with.
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

from bench.workloads import OPS, Workload
from fastcr.config import tyro
from fastcr.errors import UsageError
from fastcr.kernels import launch, queue
from fastcr.runs.command_line import called, one_line_errors, parse

TENSOR_CORE = re.compile(r"\b(?:[HIQO]G?MMA|UTC[A-Z]*MMA)\b")  # FP64's DMMA is left out
WIDTHS = (torch.bfloat16, torch.float16, torch.float32)
TYPES = dict(zip(WIDTHS, ("bf16", "fp16", "fp32"), strict=True))
TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
# of a multiprocessor with its 65,536 registers: resident warps, blocks, KB shared (CUDA C++ Programming Guide)
LIMITS = {
    80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228), 120: (48, 24, 100)
}  # fmt: skip


class Call(NamedTuple):
    """Of a kernel: what decides its code, as Triton's runtime would choose it."""

    kernel: Any
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]
    shape: str


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


def specialise(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any], shape: str) -> Call:
    """The call of `kernel` with these arguments: 1 becomes a constant, multiples of 16 are marked."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {k: values[k] for k in ("num_warps", "num_stages") if k in values}
    call = Call(kernel, {}, {}, {}, options, shape)
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


def calls(every: bool = False) -> list[Call]:
    """Every launch of the ops' examples; what gives the same code is listed once."""
    found: list[Call] = []
    works = [
        Workload(name, example.sizes, dtype, bool(spec.learns), example.options)
        for name, spec in OPS.items()
        for dtype in (WIDTHS if every else WIDTHS[:1])
        for example in (*spec.usual, *(spec.others if every else ()))
    ]
    for work in works:
        sizes = ", ".join(f"{letter} {size}" for letter, size in work.sizes.items())

        def record(kernel: Any, *args: Any, _shape: str = f"{sizes}, {TYPES[work.dtype]}", **kwargs: Any) -> None:
            call = specialise(kernel, args, kwargs, _shape)
            if all(call[:5] != other[:5] for other in found):
                found.append(call)

        with (
            mock.patch("triton.runtime.jit.JITFunction.run", record),
            mock.patch.object(launch, "INTERPRET", True),  # the ops then take CPU tensors
        ):
            work.run(lambda _op=work.spec.op, **given: _op(**given, impl="triton"), work.drawn(torch.empty))
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
    return Resources(name, call.shape, target, *facts, occupancy(target, warps, usage["REG"], shared))


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
    found = list[Resources]()
    for target in targets or able:
        with mock.patch.object(queue, "has_wgmma", return_value=target in (90, 100)):
            found += [compiled(call, target) for call in calls(every)]
    return sorted(found, key=lambda row: (row.kernel, row.shape))


def resources_table(rows: Sequence[Resources]) -> Table:
    """The resources for people; registers and spilled bytes are a thread's, shared memory a block's."""
    table = Table(title="kernels as compiled")
    names = ("sm", "warps", "registers", "spilled", "shared KB", "tensor ops", "occupancy")
    for name in ("kernel", "sizes", *names):
        table.add_column(name, justify="left" if name in ("kernel", "sizes") else "right", no_wrap=True)
    for row in rows:
        cells = [*row[:6], f"{row.shared / 1024:.1f}", row.tensor_core, f"{row.occupancy:.0%}"]
        table.add_row(*map(str, cells), end_section=row.target == rows[-1].target != rows[0].target)
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
        Console(width=max(Console().width, 160)).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
