"""What the executor finds: nothing in programs that are right, and each fault that is planted in one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.ptx.block import ExecutionError
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


# each thread hands its number to the thread 32 further on, through shared memory
SHARED = """
    ld.global.b64 %x, [%rd2];
    mul.lo.s32 %a, %t, 8;
    st.shared.b64 [%a], %x;
    bar.sync 0;
    add.s32 %u, %t, 32; and.b32 %u, %u, 127;
    mul.lo.s32 %b, %u, 8;
    ld.shared.b64 %y, [%b];
    bar.sync 0;
    st.shared.b64 [%a], %y;
    st.global.b64 [%rd3], %y;
"""
# the same by a copy that goes on while the threads do
COPIED = SHARED.replace("ld.global.b64 %x, [%rd2];", "").replace(
    "st.shared.b64 [%a], %x;",
    "cp.async.ca.shared.global [%a], [%rd2], 8;\n    cp.async.commit_group;\n    cp.async.wait_group 0;",
)
# and then what another thread has written is read from global memory
GLOBAL = SHARED + "bar.sync 0;\n    ld.global.b64 %y, [%rd1+256];\n"
# each block of 128 threads copies its own part
BLOCKS = """
    mov.u32 %i, %ctaid.x; mul.lo.s32 %i, %i, 128; add.s32 %i, %i, %t;
    mul.wide.u32 %rd4, %i, 8; add.s64 %rd2, %rd0, %rd4; add.s64 %rd3, %rd1, %rd4;
    ld.global.b64 %x, [%rd2];
    st.global.b64 [%rd3], %x;
"""
# a [64,16] and an [8,16] matrix of ones, in rows of 32 bytes, multiplied twice by the four warps: 32 everywhere.
# the descriptors: 32 bytes in which 16 bytes change places (0xC0), 256 bytes between 8 rows and the next (0x10)
PRODUCT = """
    mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0;
    mul.lo.s32 %a, %t, 16; mov.b32 %one, 1065369472;
    st.shared.v4.b32 [%a], {%one, %one, %one, %one};
    setp.lt.s32 %p, %t, 16;
    @%p st.shared.v4.b32 [%a+2048], {%one, %one, %one, %one};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %da, 0xC000001000010000;
    mov.b64 %db, 0xC000001000010080;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0, %c1, %c2, %c3}, %da, %db, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0, %c1, %c2, %c3}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 0;
    st.shared.b32 [%a], 0;
    add.s64 %rd3, %rd3, %rd4;
    st.global.v4.b32 [%rd3], {%c0, %c1, %c2, %c3};
"""
ROLLED = np.roll(np.arange(128), -32)


@pytest.mark.parametrize(
    ("body", "blocks", "expected"),
    [
        (SHARED, 1, ROLLED),
        (COPIED, 1, ROLLED),
        (GLOBAL, 1, ROLLED),
        (BLOCKS, 3, np.arange(384)),
        (PRODUCT, 1, np.full(512, 32, np.float32).view(np.int64)),
    ],
    ids=["shared", "copied", "global", "blocks", "product"],
)
def test_nothing_is_found_in_a_right_program(body: str, blocks: int, expected: np.ndarray) -> None:
    result, out = launched(body, np.arange(128 * blocks), expected.nbytes, grid=(blocks,), shared=2304)
    assert kinds(result) == set()
    np.testing.assert_array_equal(out.view(np.int64), expected)


READ = "race: read of what another warp writes, without a barrier between them"
WRITE = "race: write to what another warp reads, without a barrier between them"
CLASH = "race: threads of a warp write different values to one address"
WARPS_CLASH = "race: warps write different values to one address, without a barrier between them"
UNWRITTEN = "read of memory that nobody wrote"


@pytest.mark.parametrize(
    ("body", "old", "new", "expected"),
    [
        (SHARED, "bar.sync 0;", "", READ),  # the first barrier
        (SHARED, "bar.sync 0;\n    st", "st", WRITE),
        (SHARED, "st.shared.b64 [%a], %x;", "", UNWRITTEN),
        (SHARED, "[%b]", "[%b+4]", "misaligned read"),
        (SHARED, "[%b]", "[%b+1024]", "read out of bounds"),
        (SHARED, "st.shared.b64 [%a]", "st.shared.b64 [%a+512]", "write out of bounds"),
        (SHARED, "[%a], %x;", "[%a], %x; setp.ge.s32 %p, %t, 32; @%p st.shared.b64 [0], -1;", WARPS_CLASH),
        (SHARED, "[%rd3], %y", "[%rd3+-4096], %y", "write out of bounds"),
        (SHARED, "[%rd3], %y", "[%rd3+4], %y", "misaligned write"),
        (COPIED, "cp.async.wait_group 0;", "", "read of bytes that a cp.async may still write"),
        (COPIED, "cp.async.commit_group;", "", "read of bytes that a cp.async may still write"),
        (COPIED, "cp.async.wait", "st.shared.b64 [%a], 0; cp.async.wait",
         "write to bytes that a cp.async may still write"),
        (GLOBAL, "bar.sync 0;\n    ld.global", "ld.global", READ),
        (BLOCKS, "%i, %i, 128", "%i, %i, 64", "race: two blocks write to one address"),
        (BLOCKS, "ld.global.b64 %x, [%rd2]", "ld.global.b64 %x, [%rd1]", "race: read of what another block writes"),
        (BLOCKS, "%x;", "%x; ld.global.b64 %y, [%rd1+2048];", "race: write to what another block reads"),
        (PRODUCT, "fence.proxy.async.shared::cta;", "", "wgmma reads what threads wrote, without fence.proxy.async"),
        (PRODUCT, "bar.sync 0;", "", "race: wgmma reads what was written since the last barrier"),
        (PRODUCT, "bar.sync 0;\n    st", "st", WRITE),
        (PRODUCT, "wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;",
         "write to bytes that a wgmma may still read"),
        (PRODUCT, "wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;",
         "read of a register that a wgmma may still write"),
        (PRODUCT, "0xC000001000010080", "0xC0000010000100F0", "read out of bounds"),
        (PRODUCT, "%p, %t, 16", "%p, %t, 15", UNWRITTEN),
        (PRODUCT, "mov.b64 %da", "cp.async.ca.shared.global [%a], [%rd0], 16; mov.b64 %da",
         "wgmma reads bytes that a cp.async may still write"),
    ],
)  # fmt: skip
def test_one_change_is_found(body: str, old: str, new: str, expected: str) -> None:
    changed = body.replace(old, new, 1)
    assert changed != body
    blocks = 3 if body == BLOCKS else 1
    shared = 2304 if body == PRODUCT else 1024
    result, _ = launched(changed, np.arange(128 * blocks), 2048 * blocks, grid=(blocks,), shared=shared)
    assert expected in kinds(result)


@pytest.mark.parametrize("reads", ["ld.shared.b64 %y, [0];", "@%f ld.shared.b64 %y, [0]; @%l ld.shared.b64 %y, [0];"])
def test_a_write_after_reads_of_several_warps_is_found_whichever_read_last(reads: str) -> None:
    body = f"""
        setp.lt.s32 %f, %t, 32; setp.ge.s32 %l, %t, 96;
        @%f st.shared.b64 [0], 5;
        bar.sync 0;
        {reads}
        @%l st.shared.b64 [0], 6;"""
    assert kinds(launched(body, ROLLED, 8)[0]) == {WRITE}
    assert kinds(launched(body.replace("@%l st", "bar.sync 0; @%l st"), ROLLED, 8)[0]) == set()


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        ("shared.b64 [0], 7", set()),
        ("shared.b64 [0], %lane", set()),
        ("shared.b64 [0], %t", {WARPS_CLASH}),
        ("global.b64 [%rd1], %lane", {CLASH}),
    ],
)
def test_threads_may_write_one_address_of_shared_memory_where_all_warps_agree(store: str, expected: set[str]) -> None:
    assert kinds(launched(f"and.b32 %lane, %t, 31; st.{store};", ROLLED, 8)[0]) == expected


def test_reading_an_input_without_contents_is_found() -> None:
    assert kinds(launched(SHARED, np.full(512, NOBODY_WROTE, np.int16), 1024)[0]) == {UNWRITTEN}


def test_loops_tables_parameters_and_the_grid() -> None:
    body = """
        mov.b32 %sum, 0; mov.b32 %i, 0;
    $loop:
        add.s32 %sum, %sum, %i; add.s32 %i, %i, 1;
        setp.lt.s32 %p, %i, %n;
        @%p bra $loop;
        $table: .branchtargets
            $ten,
            $twenty;
        mov.u32 %x, %ctaid.x;
        brx.idx %x, $table;
    $twenty: { add.s32 %sum, %sum, 10; }
    $ten: add.s32 %sum, %sum, 10;
        mov.b64 %a, f_param_2; mov.b64 %b, f_param_1; setp.lt.u32 %p, %t, 7; selp.b64 %c, %a, %b, %p;
        ld.param.b32 %d, [%c];
        @%p add.s32 %sum, %sum, %d;
        mov.u32 %y, %ctaid.y;
        mul.wide.u32 %rd5, %x, 4; add.s64 %rd3, %rd3, %rd5;
        mul.wide.u32 %rd5, %y, 256; add.s64 %rd3, %rd3, %rd5;
        st.global.b32 [%rd3], %sum;"""
    result, out = launched(body, ROLLED, 3 * 256, threads=32, grid=(2, 3), number=5)
    assert kinds(result) == set()
    expected = np.array([20, 30]) + 5 * (np.arange(32) < 7)[:, None]
    np.testing.assert_array_equal(out.view(np.int32).reshape(3, 32, 2), np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ret; tanh.approx.f32 %c, %a;", "tanh.approx.f32: no function"),  # even where it is not reached
        ("setp.lt.s32 %p, %t, 5; @%p bra $a; $a: add.s32 %c, %t, 1;", "threads of a block part ways"),
        ("$a: bra $a;", "has not ended"),
        ("add.s32 %c, %t, %nothing;", "%nothing was never written"),
        ("bar.sync 1;", "barriers of some warps"),
        ("?!;", r"not an instruction: '\?!' \(kernel.py:7\)"),
    ],
)
def test_what_cannot_be_executed_ends_with_an_error(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.block.MOST", 1000)
    with pytest.raises((ExecutionError, ValueError), match=message):
        launched(body, ROLLED, 8)
