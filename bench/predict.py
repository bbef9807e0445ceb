"""A prediction of how near a kernel comes to the bandwidth of a copy on an H100 or H200; nothing here is a measurement.

A call takes as long as the longest of: its least bytes at the rate of a copy; the issue slots of its innermost loops, 4
a cycle and multiprocessor; the loops' products on tensor cores; and a wait for memory in each trip, shared by the trips
loaded ahead and by the blocks that registers and shared memory let run side by side. What is before and after the loops
(softmaxes, the last sums), caches, bank conflicts and the end of the last blocks are left out: kernels will be slower.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

COPY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, read and written
MULTIPROCESSORS, CLOCK = 132, 1.755e9  # of both
PRODUCTS = 2048  # multiply-adds of 16 bits a cycle and multiprocessor
WAIT = 800  # cycles from a load to its data with the memory busy: assumed

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;")
BRANCH = re.compile(r"\bBRA\S*\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)")
PRODUCT = re.compile(r"\b(?:HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(\d+))\.")


class Work(NamedTuple):
    """What a call does: the least bytes it moves; its blocks, and in each the trips of every innermost loop."""

    bytes: int
    blocks: int
    trips: int


class Loop(NamedTuple):
    """An innermost loop of the machine code, of each warp and trip."""

    instructions: int
    products: int  # multiply-adds on tensor cores
    ahead: bool  # loads trips to come into shared memory


def work_of(kernel: str, values: dict[str, Any], grid: tuple[int, ...]) -> Work | None:
    """The work of a call with these arguments; None where it depends on the images, or is little."""
    blocks = math.prod(grid)
    if kernel in ("attend_kernel", "_nearest_kernel"):
        return Work(values["queue"].nbytes, blocks, -(-values["share"] // values["BLOCK_N"]))
    features = values.get("features")
    if features is None:
        return None
    tiles = -(-values["S"] // values.get("BLOCK_S", 1))
    chunks = -(-values["C"] // values["BLOCK_C"])
    trips = {"_pairs_kernel": chunks, "_common_kernel": tiles, "_spread_kernel": tiles}.get(kernel, tiles * chunks)
    moved = features.nbytes * (2 if values.get("WRITE_FEATURES") else 1)
    return Work(moved, blocks, trips * values.get("images", 1))


def loops_of(sass: str) -> list[Loop]:
    """The innermost loops in a dump of machine code, in its order."""
    lines = [(int(at, 16), text) for at, text in LINE.findall(sass)]
    jumps = [(int(found[1], 16), at) for at, text in lines if (found := BRANCH.search(text))]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [
        (start, end)
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    bodies = [[text for at, text in lines if start <= at <= end] for start, end in sorted(inner)]
    return [Loop(len(body), sum(map(_products, body)), any("LDGSTS" in text for text in body)) for body in bodies]


def _products(instruction: str) -> int:
    if not (found := PRODUCT.search(instruction)):
        return 0
    size = math.prod(int(side) for side in found.groups() if side)
    return size // 4 if "HGMMA" in instruction else size  # four warps share one


def share_of_a_copy(work: Work, loops: list[Loop], warps: int, resident: int, stages: int) -> dict[str, float]:
    """The predicted share for each GPU of `COPY`, of a kernel of which `resident` blocks fit on a multiprocessor."""
    blocks = -(-work.blocks // MULTIPROCESSORS)
    trips = blocks * work.trips
    issue = trips * warps * sum(loop.instructions for loop in loops) / 4
    products = trips * warps * sum(loop.products for loop in loops) / PRODUCTS
    waits = trips / min(resident, blocks) * sum(WAIT / max(stages - 1 if loop.ahead else 1, 1) for loop in loops)
    moved = {gpu: work.bytes / rate * CLOCK for gpu, rate in COPY.items()}
    return {gpu: cycles / max(cycles, issue, products, waits) for gpu, cycles in moved.items()}
