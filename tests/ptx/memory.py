"""Memory that remembers who touched each byte since the last barrier, and says what must not be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
SEVERAL = -2  # warps or blocks, where one alone would be its number
NOBODY = -1
RED_ZONE = 4096  # bytes that belong to nobody on either side of a tensor


class Memory:
    """Bytes at addresses from `base` on. Each has the warps that last read and wrote it, and when.

    `epoch` counts barriers: of two accesses in one epoch by different warps neither is known to be the first.
    The last byte of all arrays stands for every address outside.
    """

    def __init__(self, size: int, base: int = 0) -> None:
        self.size, self.base, self.epoch = size, base, 0
        self.report: Callable[[str], None] = lambda finding: None
        self.data = np.zeros(size + 1, np.uint8)
        self.inside, self.written = np.ones(size + 1, bool), np.zeros(size + 1, bool)
        self.inside[size] = False
        self.read_epoch, self.write_epoch = (np.full(size + 1, NOBODY, np.int32) for _ in range(2))
        self.read_warp, self.write_warp = (np.full(size + 1, NOBODY, np.int16) for _ in range(2))

    def bytes_at(self, at: Numbers, width: int) -> Numbers:
        """Indices `[n,width]` of the bytes from each address on."""
        index = (at - self.base)[:, None] + np.arange(width)
        return np.where((index >= 0) & (index < self.size), index, self.size)

    def load(self, at: Numbers, width: int, warp: Numbers) -> Bytes:
        """Bytes `[n,width]` from each address on, read by threads of these warps."""
        index = self.bytes_at(at, width)
        if (at % width).any():
            self.report("misaligned read")
        self.check_read(index, warp)
        return self.data[index]

    def store(self, at: Numbers, values: Bytes, warp: Numbers) -> None:
        """Write `values [n,width]` from each address on."""
        index = self.bytes_at(at, values.shape[1])
        if (at % values.shape[1]).any():
            self.report("misaligned write")
        self.check_write(index, warp)
        # several warps may write the same value, as Triton lets them
        recent = (self.write_epoch[index] == self.epoch) & (self.write_warp[index] != warp[:, None])
        if (recent & (self.data[index] != values)).any():
            self.report("race: warps write different values without a barrier between them")
        self.put(index, values, warp)
        if (self.data[index] != values).any() and self.clash(index, values, warp):
            self.report("race: threads write different values to one address")

    def clash(self, index: Numbers, values: Bytes, warp: Numbers) -> bool:
        """Whether it matters that threads write different values to one address in one instruction."""
        return True

    def put(self, index: Numbers, values: Bytes, warp: Numbers) -> None:
        """Write without any check."""
        self.data[index], self.written[index] = values, True
        self.write_epoch[index], self.write_warp[index] = self.epoch, np.broadcast_to(warp[:, None], index.shape)

    def check_read(self, index: Numbers, warp: Numbers) -> None:
        """Report what is wrong with a read of the bytes `[n,width]`, and remember it."""
        if not self.inside[index].all():
            self.report("read out of bounds")
        elif not self.written[index].all():
            self.report("read of memory that nobody wrote")
        warps = np.broadcast_to(warp[:, None], index.shape)
        if ((self.write_epoch[index] == self.epoch) & (self.write_warp[index] != warps)).any():
            self.report("race: read of what another warp writes, without a barrier between them")
        others = (self.read_epoch[index] == self.epoch) & (self.read_warp[index] != warps)
        self.note(self.read_warp, index, np.where(others, SEVERAL, warps))
        self.read_epoch[index] = self.epoch

    def note(self, array: NDArray, index: Numbers, values: Numbers) -> None:
        """Put `values` into the array, and SEVERAL where different ones go to one place."""
        array[index] = values
        array[index[array[index] != values]] = SEVERAL

    def check_write(self, index: Numbers, warp: Numbers) -> None:
        """Report what is wrong with a write of the bytes `[n,width]`."""
        if not self.inside[index].all():
            self.report("write out of bounds")
        if ((self.read_epoch[index] == self.epoch) & (self.read_warp[index] != warp[:, None])).any():
            self.report("race: write to what another warp reads, without a barrier between them")


class GlobalMemory(Memory):
    """The memory of all blocks of a launch, which nothing orders: none may touch what another writes."""

    def __init__(self, size: int) -> None:
        super().__init__(size, base=1 << 20)
        self.inside[:] = False
        self.end, self.block = RED_ZONE, 0
        self.read_block, self.write_block = (np.full(size + 1, NOBODY, np.int32) for _ in range(2))

    @staticmethod
    def room(sizes: list[int]) -> int:
        """Bytes that tensors of these sizes need."""
        return RED_ZONE + sum(size + -size % 256 + RED_ZONE for size in sizes)

    def place(self, data: Bytes, written: NDArray[np.bool_]) -> int:
        """The address of a copy of `data`, of which some bytes count as written."""
        start, stop = self.end, self.end + len(data)
        self.data[start:stop], self.written[start:stop], self.inside[start:stop] = data, written, True
        self.end = stop + -len(data) % 256 + RED_ZONE
        return self.base + start

    def contents(self, address: int, size: int) -> Bytes:
        return self.data[address - self.base :][:size]

    def check_read(self, index: Numbers, warp: Numbers) -> None:
        super().check_read(index, warp)
        if ((self.write_block[index] != NOBODY) & (self.write_block[index] != self.block)).any():
            self.report("race: read of what another block writes")
        others = (self.read_block[index] != NOBODY) & (self.read_block[index] != self.block)
        self.read_block[index] = np.where(others, SEVERAL, self.block)

    def check_write(self, index: Numbers, warp: Numbers) -> None:
        super().check_write(index, warp)
        if ((self.read_block[index] != NOBODY) & (self.read_block[index] != self.block)).any():
            self.report("race: write to what another block reads")
        if ((self.write_block[index] != NOBODY) & (self.write_block[index] != self.block)).any():
            self.report("race: two blocks write to one address")
        self.write_block[index] = self.block


class SharedMemory(Memory):
    """The memory of one block, which copies (`cp.async`) and tensor cores (`wgmma`) use while the threads go on."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.in_flight, self.in_use, self.unfenced = (np.zeros(size + 1, bool) for _ in range(3))
        self.groups: list[list[tuple[Numbers, Bytes, Numbers]]] = [[]]  # of copies; the last is still open

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

    def clash(self, index: Numbers, values: Bytes, warp: Numbers) -> bool:
        """Between warps only: Triton's copies of a sum differ by a rounding, and of one warp one thread always wins."""
        remains = self.data[index]
        for number in np.unique(warp):
            mine = warp == number
            self.data[index[mine]] = values[mine]
            if (self.data[index[mine]] != remains[mine]).any():
                return True
        return False

    def put(self, index: Numbers, values: Bytes, warp: Numbers) -> None:
        super().put(index, values, warp)
        self.unfenced[index] = True

    def copy(self, at: Numbers, values: Bytes, warp: Numbers) -> None:
        """Begin to write `values [n,width]` from each address on; they arrive when their group is waited for."""
        index = self.bytes_at(at, values.shape[1])
        if (at % values.shape[1]).any():
            self.report("misaligned write")
        self.check_write(index, warp)
        self.in_flight[index] = True
        self.groups[-1].append((index, values, warp))

    def commit(self) -> None:
        self.groups.append([])

    def wait(self, groups: int) -> None:
        """Let all copies arrive but those of the last groups."""
        while len(self.groups) > groups + 1:
            for index, values, warp in self.groups.pop(0):
                self.in_flight[index] = False
                self.put(index, values, warp)

    def fence(self) -> None:
        """`fence.proxy.async`: what threads have written can now be read by tensor cores."""
        self.unfenced[:] = False

    def operand(self, index: Numbers) -> Bytes:
        """The bytes of a wgmma's operand, which it reads until `release`."""
        if not self.inside[index].all():
            self.report("read out of bounds")
        elif self.in_flight[index].any():
            self.report("wgmma reads bytes that a cp.async may still write")
        elif not self.written[index].all():
            self.report("read of memory that nobody wrote")
        elif (self.write_epoch[index] == self.epoch).any():
            self.report("race: wgmma reads what was written since the last barrier")
        if self.unfenced[index].any():
            self.report("wgmma reads what threads wrote, without fence.proxy.async")
        self.in_use[index] = True
        return self.data[index]

    def release(self, index: Numbers) -> None:
        """A wgmma has read its operand; other warps know so after the next barrier."""
        self.in_use[index] = False
        self.read_epoch[index], self.read_warp[index] = self.epoch, SEVERAL
