"""Small programs in PTX for tests of the executor."""

from __future__ import annotations

import numpy as np
import torch

from tests.ptx.run import NOBODY_WROTE, Launch, execute

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
    number: int = 0,
) -> tuple[Launch, np.ndarray]:  # fmt: skip
    """Run a program on an array: what was found, and the `size` bytes of its output, which begins unwritten."""
    data, out = torch.from_numpy(given.copy()), torch.full((size // 2,), NOBODY_WROTE, dtype=torch.int16)
    result = execute(HEAD.format(threads=threads, body=body), grid, [data, out, number], shared)
    return result, out.numpy().view(np.uint8)


def kinds(result: Launch) -> set[str]:
    """What was found, without the places where."""
    assert all("kernel.py:7)" in finding for finding in result.findings)
    return {finding.partition(" (")[0] for finding in result.findings}
