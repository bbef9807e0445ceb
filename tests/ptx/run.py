"""Run Triton kernels as compiled: `with executed(90) as launches` a launch on CPU tensors executes its PTX.

The kernel is compiled for a target that need not be there, and its blocks are executed one after the other on the
launch's tensors. This takes Triton's compiler, so `TRITON_INTERPRET=1` must not be set.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor

from tests.ptx import instructions, tensor_cores  # noqa: F401  (they register what they serve)
from tests.ptx.block import Block
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import parse

NOBODY_WROTE = 0x7FA7  # 16 bits that tensors without contents are made of: NaN in every dtype, and far out as indices


class Launch(NamedTuple):
    """What one launch did."""

    kernel: str
    findings: Counter[str]  # what is wrong and where, and how many instructions found it
    executed: Counter[str]  # instructions by opcode, of all blocks


def octets(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's storage, which may hold more than the tensor; writing to them changes it."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def written(tensor: Tensor) -> np.ndarray:
    """Of the bytes of its storage, those that something has been put into."""
    data = octets(tensor)
    known = np.ones(len(data), bool)
    if tensor.itemsize > 1:
        whole = len(data) // tensor.itemsize * tensor.itemsize
        values = data[:whole].view(np.uint16).reshape(-1, tensor.itemsize // 2)
        known[:whole] = np.repeat((values != NOBODY_WROTE).any(1), tensor.itemsize)
    return known


def flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from flat(value) if isinstance(value, tuple) else (value,)


def execute(ptx: str, grid: Sequence[int], arguments: Sequence[Any], shared: int) -> Launch:
    """Run every block of a grid on tensors and numbers, with `shared` bytes of memory each.

    Raises `ExecutionError` for an instruction that nothing here serves, and where it cannot go on.
    """
    storages = {each.untyped_storage().data_ptr(): each for each in arguments if isinstance(each, Tensor)}
    memory = GlobalMemory([(octets(each), written(each)) for each in storages.values()])
    at = dict(zip(storages, memory.addresses, strict=True))

    def bits(value: Any) -> int:
        if isinstance(value, Tensor):
            return at[value.untyped_storage().data_ptr()] + value.storage_offset() * value.itemsize
        return int(np.float32(value).view(np.uint32) if isinstance(value, float) else value)

    program = parse(ptx)
    given = [bits(each) for each in arguments]
    given += [0] * (len(program.parameters) - len(given))  # Triton's own scratch memory
    sizes = tuple(grid) + (1,) * (3 - len(grid))
    result = Launch(program.name, Counter(), Counter())
    for z, y, x in np.ndindex(sizes[::-1]):
        block = Block(program, given, (x, y, z), sizes, memory, shared)
        with np.errstate(all="ignore"):
            block.run()
        result.findings.update(block.findings)
        result.executed.update(block.executed)
    for pointer, each in storages.items():
        octets(each)[:] = memory.contents(at[pointer], len(octets(each)))
    return result


def _unwritten(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "cpu" and tensor.itemsize > 1 and tensor.is_contiguous():
            octets(tensor).view(np.uint16)[:] = NOBODY_WROTE
        return tensor

    return made


@contextlib.contextmanager
def executed(target: int, change: Callable[[str], str] = lambda ptx: ptx) -> Iterator[list[Launch]]:
    """Execute launches on CPU tensors as compiled for `target`, 80 or 90; `change` may alter the PTX first.

    The list grows by one a launch. Raises `RuntimeError` where Triton is the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 takes the place of Triton's compiler: unset it")
    launches: list[Launch] = []
    compile_only = triton.runtime.jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> None:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constant = [name for name, kind in compiled.src.signature.items() if kind == "constexpr"]
        arguments = list(flat(values[name] for name in self.arg_names if name not in constant))
        launches.append(execute(change(compiled.asm["ptx"]), grid, arguments, compiled.metadata.shared))

    device = SimpleNamespace(  # stands in for a GPU's driver: what Triton's launcher asks before it compiles
        get_current_device=lambda: target,  # Triton keeps what it has compiled by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", target, 32),
    )
    driver = triton.runtime.driver
    with contextlib.ExitStack() as patches:
        patches.callback(setattr, driver, "_active", driver._active)
        driver.set_active(device)
        patches.enter_context(mock.patch.object(triton.runtime.jit.JITFunction, "run", run))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, _unwritten(getattr(owner, name))))
        yield launches
