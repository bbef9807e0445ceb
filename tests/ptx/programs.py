"""Small programs in PTX for tests of the executor."""

from __future__ import annotations

import numpy as np

from tests.ptx.memory import GlobalMemory
from tests.ptx.run import Launch, execute

HEAD = """
.visible .entry f(.param .u64 .ptr .global .align 1 f_param_0, .param .u64 f_param_1, .param .u32 f_param_2)
.reqntid {threads}
{{
    .loc 1 7 20 // kernel.py:7:20
    ld.param.b64 %rd0, [f_param_0];
    ld.param.b64 %rd1, [f_param_1];
    ld.param.b32 %n, [f_param_2];
    mov.u32 %t, %tid.x;
    mul.wide.u32 %rd4, %t, 8;
    add.s64 %rd2, %rd0, %rd4;  // this thread's own 8 bytes of the input, and of the output
    add.s64 %rd3, %rd1, %rd4;
    {body}
    ret;
}}
"""


def launched(
    body: str, given: np.ndarray, size: int, *, threads: int = 128, grid: tuple[int, ...] = (1,), shared: int = 1024,
    number: int = 0, written: bool = True,
) -> tuple[Launch, np.ndarray]:  # fmt: skip
    """Run a program on an array: what was found, and the `size` bytes of its output."""
    data = np.ascontiguousarray(given).view(np.uint8).reshape(-1)
    memory = GlobalMemory([(data, np.full(len(data), written)), (np.zeros(size, np.uint8), np.zeros(size, bool))])
    arguments = [*memory.addresses, number]
    result = execute(HEAD.format(threads=threads, body=body), grid, arguments, memory, shared)
    return result, memory.contents(memory.addresses[1], size)


def kinds(result: Launch) -> set[str]:
    """What was found, without the places where."""
    assert all("kernel.py:7)" in finding for finding in result.findings)
    return {finding.partition(" (")[0] for finding in result.findings}
