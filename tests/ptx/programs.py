"""Small programs in PTX for tests of the executor."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.memory import GlobalMemory
from tests.ptx.run import Launch, execute

HEAD = """
.version 8.0
.visible .entry f(.param .u64 .ptr .global .align 1 f_param_0, .param .u64 f_param_1, .param .u32 f_param_2)
.reqntid {threads}
{{
    .loc 1 7 20 // kernel.py:7:20
    ld.param.b64 %rd0, [f_param_0];
    ld.param.b64 %rd1, [f_param_1];
    ld.param.b32 %n, [f_param_2];
    mov.u32 %t, %tid.x;
    {body}
    ret;
}}
.section .debug_abbrev {{ .b8 1 }}
"""
# %rd2 and %rd3 point to 8 bytes of the input and of the output that are this thread's own
OWN = """
    mul.wide.u32 %rd4, %t, 8;
    add.s64 %rd2, %rd0, %rd4;
    add.s64 %rd3, %rd1, %rd4;
"""


def launched(
    body: str, given: Any, size: int, *, threads: int = 32, grid: tuple[int, ...] = (1,), shared: int = 0,
    number: int = 0, written: bool = True,
) -> tuple[Launch, bytes]:  # fmt: skip
    """Run a program on the bytes of an array: what was found, and the `size` bytes of its output."""
    data = np.ascontiguousarray(given).view(np.uint8).reshape(-1)
    memory = GlobalMemory(GlobalMemory.room([len(data), size]))
    source = memory.place(data, np.full(len(data), written))
    target = memory.place(np.zeros(size, np.uint8), np.zeros(size, bool))
    result = execute(HEAD.format(threads=threads, body=body), grid, [source, target, number], memory, shared)
    return result, memory.contents(target, size).tobytes()
