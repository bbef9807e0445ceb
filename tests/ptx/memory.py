"""Memory that remembers who touched each byte since the last barrier, and reports what must not happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
RED_ZONE = 4096  # bytes that belong to nobody on either side of a tensor
# A stamp says when a byte was touched and by which warp: epoch * WARPS + warp.
NEVER, BEFORE = -1, 0  # stamps of what nobody touched, and of what the launch was given
WARPS = 64
SEVERAL = WARPS - 1  # in place of a warp: more than one of them


class Memory:
    """Bytes at addresses from `base` on, each with stamps of its last write and read.

    `epoch` counts barriers, of all blocks together; the block that runs began at epoch `began`. Of two accesses in one
    epoch by different warps neither is known to be the first, nor of two by different blocks.
    The last byte of all arrays stands for every address outside.
    """

    one_thread_wins = False  # whether threads of one warp may write different values to one address

    def __init__(self, size: int, base: int = 0) -> None:
        self.size, self.base = size, base
        self.epoch = self.began = 1
        self.report: Callable[[str], None] = print
        self.data = np.zeros(size + 1, np.uint8)
        self.inside = np.arange(size + 1) < size
        self.writer, self.reader, self.first_reader = (np.full(size + 1, NEVER) for _ in range(3))

    def located(self, at: Numbers, width: int, access: str) -> Numbers:
        """Indices `[n,width]` of the bytes from each address on."""
        if (at % width).any():
            self.report(f"misaligned {access}")
        index = (at - self.base)[:, None] + np.arange(width)
        index = np.where((index >= 0) & (index < self.size), index, self.size)
        if not self.inside[index].all():
            self.report(f"{access} out of bounds")
        return index

    def unordered(self, stamps: Numbers, warp: Numbers) -> NDArray[np.bool_]:
        """Whether these stamps are of other warps since the last barrier."""
        return (stamps // WARPS == self.epoch) & (stamps % WARPS != warp)

    def of_other_blocks(self, stamps: Numbers) -> bool:
        return bool(((stamps > BEFORE) & (stamps < self.began * WARPS)).any())

    def load(self, at: Numbers, width: int, warp: Numbers) -> Bytes:
        """Bytes `[n,width]` from each address on, read by threads of the warps `[n]`."""
        index = self.located(at, width, "read")
        self.check_read(index, warp[:, None])
        return self.data[index]

    def check_read(self, index: Numbers, warp: Numbers) -> None:
        """Report what is wrong with a read of the bytes `[n,width]` by warps `[n,1]`, and remember it."""
        writer, reader = self.writer[index], self.reader[index]
        if (self.inside[index] & (writer == NEVER)).any():
            self.report("read of memory that nobody wrote")
        if self.unordered(writer, warp).any():
            self.report("race: read of what another warp writes, without a barrier between them")
        if self.of_other_blocks(writer):
            self.report("race: read of what another block writes")
        stamps = self.epoch * WARPS + np.where(self.unordered(reader, warp), SEVERAL, warp)
        self.reader[index] = stamps
        self.reader[index[self.reader[index] != stamps]] = self.epoch * WARPS + SEVERAL
        self.first_reader[index] = np.where(self.first_reader[index] == NEVER, stamps, self.first_reader[index])

    def check_write(self, index: Numbers, warp: Numbers) -> None:
        """Report what is wrong with a write of the bytes `[n,width]` by warps `[n,1]`, whatever their values."""
        if self.unordered(self.reader[index], warp).any():
            self.report("race: write to what another warp reads, without a barrier between them")
        if self.of_other_blocks(self.first_reader[index]):
            self.report("race: write to what another block reads")
        if self.of_other_blocks(self.writer[index]):
            self.report("race: two blocks write to one address")

    def store(self, at: Numbers, values: Bytes, warp: Numbers) -> None:
        """Write `values [n,width]` from each address on."""
        index = self.located(at, values.shape[1], "write")
        self.check_write(index, warp[:, None])
        for number in np.unique(warp):  # each sees what others wrote: Triton lets several write the same value
            mine = warp == number
            others, before = self.unordered(self.writer[index[mine]], number), self.data[index[mine]]
            self.put(index[mine], values[mine], warp[mine])
            if (others & (self.data[index[mine]] != before)).any():
                self.report("race: warps write different values to one address, without a barrier between them")
            if not self.one_thread_wins and (self.data[index[mine]] != values[mine]).any():
                self.report("race: threads of a warp write different values to one address")

    def put(self, index: Numbers, values: Bytes, warp: Numbers) -> None:
        """Write without any check."""
        self.data[index], self.writer[index] = values, self.epoch * WARPS + warp[:, None]


class GlobalMemory(Memory):
    """The memory of all blocks of a launch: `tensors` are bytes, and which of them something has been put into."""

    def __init__(self, tensors: Sequence[tuple[Bytes, NDArray[np.bool_]]]) -> None:
        super().__init__(RED_ZONE + sum(len(data) + -len(data) % 256 + RED_ZONE for data, _ in tensors), base=1 << 20)
        self.inside[:] = False
        self.addresses: list[int] = []
        start = RED_ZONE
        for data, written in tensors:
            part = slice(start, start + len(data))
            self.data[part], self.writer[part], self.inside[part] = data, np.where(written, BEFORE, NEVER), True
            self.addresses.append(self.base + start)
            start = part.stop + -len(data) % 256 + RED_ZONE

    def begin_block(self) -> None:
        self.epoch += 1
        self.began = self.epoch

    def contents(self, address: int, size: int) -> Bytes:
        return self.data[address - self.base :][:size]


def ended(groups: list[list[Any]], remaining: int) -> list[Any]:
    """What must have ended once all groups but the last ones have, and the one that is not committed."""
    count = max(len(groups) - 1 - remaining, 0)
    done = [each for group in groups[:count] for each in group]
    del groups[:count]
    return done


class SharedMemory(Memory):
    """The memory of one block, which copies (`cp.async`) and tensor cores (`wgmma`) use while the threads go on."""

    one_thread_wins = True  # Triton's copies of a sum differ by a rounding between threads

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.in_flight, self.unfenced = (np.zeros(size + 1, bool) for _ in range(2))
        self.in_use = np.zeros(size + 1, np.int16)  # by how many operands of a wgmma
        self.copies: list[list[Any]] = [[]]  # by group: a commit begins the next

    def check_read(self, index: Numbers, warp: Numbers) -> None:
        super().check_read(index, warp)
        if self.in_flight[index].any():
            self.report("read of bytes that a cp.async may still write")

    def check_write(self, index: Numbers, warp: Numbers) -> None:
        super().check_write(index, warp)
        if self.in_flight[index].any():
            self.report("write to bytes that a cp.async may still write")
        if self.in_use[index].any():
            self.report("write to bytes that a wgmma may still read")

    def put(self, index: Numbers, values: Bytes, warp: Numbers) -> None:
        super().put(index, values, warp)
        self.unfenced[index] = True

    def copy(self, at: Numbers, values: Bytes, warp: Numbers) -> None:
        """Begin to write `values [n,width]` from each address on; they arrive when their group is waited for."""
        index = self.located(at, values.shape[1], "write")
        self.check_write(index, warp[:, None])
        self.in_flight[index] = True
        self.copies[-1].append((index, values, warp))

    def wait_for_copies(self, remaining: int) -> None:
        for index, values, warp in ended(self.copies, remaining):
            self.in_flight[index] = False
            self.put(index, values, warp)

    def fence(self) -> None:
        """`fence.proxy.async`: what threads have written can now be read by tensor cores."""
        self.unfenced[:] = False

    def operand(self, at: Numbers) -> tuple[Bytes, Numbers]:
        """The two bytes at each address, which a wgmma reads until `release`, and their indices."""
        index = self.located(at, 2, "read")
        if self.in_flight[index].any():
            self.report("wgmma reads bytes that a cp.async may still write")
        elif (self.inside[index] & (self.writer[index] == NEVER)).any():
            self.report("read of memory that nobody wrote")
        elif (self.writer[index] // WARPS == self.epoch).any():
            self.report("race: wgmma reads what was written since the last barrier")
        if self.unfenced[index].any():
            self.report("wgmma reads what threads wrote, without fence.proxy.async")
        self.in_use[index] += 1
        return self.data[index], index

    def release(self, index: Numbers) -> None:
        """A wgmma has read its operand; other warps know so after the next barrier."""
        self.in_use[index] -= 1
        self.reader[index] = self.epoch * WARPS + SEVERAL
