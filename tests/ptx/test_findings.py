"""What the executor finds wrong: each program is right as it stands, and one change makes it wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.programs import OWN, launched

NUMBERS = np.arange(128, dtype=np.int64)
# each thread hands its number to the thread 32 further on, through shared memory
SHARED = f"""{OWN}
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
COPIED = f"""{OWN}
    mul.lo.s32 %a, %t, 8;
    cp.async.ca.shared.global [%a], [%rd2], 8;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    add.s32 %u, %t, 32; and.b32 %u, %u, 127;
    mul.lo.s32 %b, %u, 8;
    ld.shared.b64 %y, [%b];
    st.global.b64 [%rd3], %y;
"""
# each thread hands its number to another through the output's own memory
GLOBAL = f"""{OWN}
    ld.global.b64 %x, [%rd2];
    st.global.b64 [%rd3], %x;
    bar.sync 0;
    add.s32 %u, %t, 32; and.b32 %u, %u, 127;
    mul.wide.u32 %rd5, %u, 8; add.s64 %rd5, %rd1, %rd5;
    ld.global.b64 %y, [%rd5];
    bar.sync 0;
    st.global.b64 [%rd3], %y;
"""
# each block of 128 threads copies its own part
BLOCKS = """
    mov.u32 %i, %ctaid.x; mul.lo.s32 %i, %i, 128; add.s32 %i, %i, %t;
    mul.wide.u32 %rd4, %i, 8; add.s64 %rd2, %rd0, %rd4; add.s64 %rd3, %rd1, %rd4;
    ld.global.b64 %x, [%rd2];
    st.global.b64 [%rd3], %x;
"""


def findings(body: str, *, blocks: int = 1, written: bool = True, shared: int = 1024) -> set[str]:
    """What is found, without the places where; the results are right where nothing is."""
    given = np.arange(128 * blocks, dtype=np.int64)
    result, out = launched(body, given, given.nbytes, threads=128, grid=(blocks,), shared=shared, written=written)
    if not result.findings:
        expected = given if blocks > 1 else np.roll(given, -32)
        np.testing.assert_array_equal(np.frombuffer(out, np.int64), expected)
    assert all("kernel.py:7)" in finding for finding in result.findings)
    return {finding.partition(" (")[0] for finding in result.findings}


@pytest.mark.parametrize(("body", "blocks"), [(SHARED, 1), (COPIED, 1), (GLOBAL, 1), (BLOCKS, 3)])
def test_nothing_is_found_in_a_right_program(body: str, blocks: int) -> None:
    assert findings(body, blocks=blocks) == set()


READ = "race: read of what another warp writes, without a barrier between them"
WRITE = "race: write to what another warp reads, without a barrier between them"


@pytest.mark.parametrize(
    ("body", "old", "new", "expected"),
    [
        (SHARED, "bar.sync 0;", "", READ),  # the first barrier
        (SHARED, "bar.sync 0;\n    st", "st", WRITE),
        (SHARED, "st.shared.b64 [%a], %x;", "", "read of memory that nobody wrote"),
        (SHARED, "mul.lo.s32 %a, %t, 8", "mul.lo.s32 %a, %t, 9", "misaligned write"),
        (SHARED, "[%b]", "[%b+4]", "misaligned read"),
        (SHARED, "[%b]", "[%b+1024]", "read out of bounds"),
        (SHARED, "st.shared.b64 [%a]", "st.shared.b64 [%a+512]", "write out of bounds"),
        (SHARED, "mul.lo.s32 %a, %t, 8", "and.b32 %a, %t, 8", "race: threads write different values to one address"),
        (COPIED, "bar.sync 0;", "", READ),
        (COPIED, "cp.async.wait_group 0;", "", "read of bytes that a cp.async may still write"),
        (COPIED, "cp.async.commit_group;", "", "read of bytes that a cp.async may still write"),
        (COPIED, "cp.async.wait", "st.shared.b64 [%a], 0; cp.async.wait",
         "write to bytes that a cp.async may still write"),
        (GLOBAL, "bar.sync 0;", "", READ),
        (GLOBAL, "bar.sync 0;\n    st", "st", WRITE),
        (GLOBAL, "ld.global.b64 %x, [%rd2]", "ld.global.b64 %x, [%rd2+8]", "read out of bounds"),
        (GLOBAL, "[%rd3], %y", "[%rd3+8], %y", "write out of bounds"),
        (GLOBAL, "[%rd3], %y", "[%rd3+-4096], %y", "write out of bounds"),
        (GLOBAL, "[%rd3], %y", "[%rd3+123456789], %y", "write out of bounds"),
        (GLOBAL, "[%rd3], %y", "[%rd3+4], %y", "misaligned write"),
        (GLOBAL, "[%rd3], %y", "[%rd1], %y", "race: threads write different values to one address"),
        (GLOBAL, "st.global.b64 [%rd3], %x;", "", "read of memory that nobody wrote"),
    ],
)  # fmt: skip
def test_one_change_is_found(body: str, old: str, new: str, expected: str) -> None:
    changed = body.replace(old, new, 1)
    assert changed != body
    assert expected in findings(changed)


def test_warps_may_write_the_same_value_to_shared_memory_but_no_other() -> None:
    same = SHARED.replace("%a, %t, 8;", "%a, %t, 8;\n    st.shared.b64 [0], 7;", 1)
    other = same.replace("[0], 7", "[0], %x")
    assert "race: threads write different values to one address" in findings(other)
    assert not {each for each in findings(same) if "one address" in each}


@pytest.mark.parametrize("reads", ["ld.shared.b64 %y, [0];", "@%f ld.shared.b64 %y, [0]; @%l ld.shared.b64 %y, [0];"])
def test_a_write_after_reads_of_several_warps_is_found_whichever_read_last(reads: str) -> None:
    body = f"""
        setp.lt.s32 %f, %t, 32; setp.ge.s32 %l, %t, 96;
        @%f st.shared.b64 [0], 5;
        bar.sync 0;
        {reads}
        bar.sync 0;
        @%l st.shared.b64 [0], 6;"""
    right, _ = launched(body, NUMBERS, 8, threads=128, shared=8)
    wrong, _ = launched(body.replace("bar.sync 0;\n        @%l st", "@%l st"), NUMBERS, 8, threads=128, shared=8)
    assert (right.executed["bar.sync"], wrong.executed["bar.sync"]) == (2, 1)
    assert [finding.partition(" (")[0] for result in (right, wrong) for finding in result.findings] == [WRITE]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("%i, %i, 128", "%i, %i, 64", "race: two blocks write to one address"),
        ("ld.global.b64 %x, [%rd2]", "ld.global.b64 %x, [%rd1]", "race: read of what another block writes"),
        ("st.global.b64 [%rd3], %x;", "st.global.b64 [%rd3], %x; ld.global.b64 %y, [%rd1+2048];",
         "race: write to what another block reads"),
    ],
)  # fmt: skip
def test_blocks_that_depend_on_each_other_are_found(old: str, new: str, expected: str) -> None:
    assert expected in findings(BLOCKS.replace(old, new), blocks=3)


def test_reading_an_input_without_contents_is_found() -> None:
    assert "read of memory that nobody wrote" in findings(BLOCKS, written=False)


# a [64,16] and an [8,16] matrix of ones, in rows of 32 bytes, multiplied by the four warps: 16 everywhere.
# the descriptors: 32 bytes in which 16 bytes change places (0xC0), 256 bytes between 8 rows and the next (0x10)
WGMMA = """
    mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0;
    mul.wide.u32 %rd4, %t, 16; add.s64 %rd3, %rd1, %rd4;
    mul.lo.s32 %a, %t, 16;
    st.shared.v4.b32 [%a], {1065369472, 1065369472, 1065369472, 1065369472};
    setp.lt.s32 %p, %t, 16;
    @%p st.shared.v4.b32 [%a+2048], {1065369472, 1065369472, 1065369472, 1065369472};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %da, 0xC000001000010000;
    mov.b64 %db, 0xC000001000010080;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0, %c1, %c2, %c3}, %da, %db, 0, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0, %c1, %c2, %c3}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 0;
    st.shared.b32 [%a], 0;
    st.global.v4.b32 [%rd3], {%c0, %c1, %c2, %c3};
"""


def test_a_right_wgmma_gives_the_product_and_no_finding() -> None:
    result, out = launched(WGMMA, NUMBERS, 2048, threads=128, shared=2304)
    assert result.findings == {}
    assert set(np.frombuffer(out, np.float32)) == {32.0}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("fence.proxy.async.shared::cta;", "", "wgmma reads what threads wrote, without fence.proxy.async"),
        ("bar.sync 0;", "", "race: wgmma reads what was written since the last barrier"),  # the first barrier
        ("bar.sync 0;\n    st", "st", WRITE),
        ("wgmma.wait_group.sync.aligned 0;", "", "write to bytes that a wgmma may still read"),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;",
         "read of a register that a wgmma may still write"),
        ("[%a+2048], {1065369472, 1065369472, 1065369472, 1065369472}", "[%a+2048], {0, 0, 0, 0}", ""),
        ("@%p st.shared.v4.b32", "@!%p st.shared.v4.b32", "write out of bounds"),
        ("0xC000001000010080", "0xC0000010000100F0", "read out of bounds"),
        ("mov.b64 %da", "cp.async.ca.shared.global [%a], [%rd0], 16; mov.b64 %da",
         "wgmma reads bytes that a cp.async may still write"),
    ],
)  # fmt: skip
def test_one_change_to_a_wgmma_is_found(old: str, new: str, expected: str) -> None:
    changed = WGMMA.replace(old, new, 1)
    assert changed != WGMMA
    result, out = launched(changed, NUMBERS, 2048, threads=128, shared=2304)
    if expected:
        assert expected in {finding.partition(" (")[0] for finding in result.findings}
    else:
        assert set(np.frombuffer(out, np.float32)) == {0.0}


def test_a_register_that_a_later_group_writes_is_not_ready() -> None:
    between = WGMMA.replace("0, 1, 1, 0, 0;", "0, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;", 1)
    early = between.replace("wgmma.wait_group.sync.aligned 0", "wgmma.wait_group.sync.aligned 1")
    right, wrong = (launched(body, NUMBERS, 2048, threads=128, shared=2304)[0].findings for body in (between, early))
    assert right == {}
    assert "read of a register that a wgmma may still write" in {finding.partition(" (")[0] for finding in wrong}
