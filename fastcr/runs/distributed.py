"""Several processes that train one model as if they were one: `torchrun --nproc-per-node N -m fastcr.train ...`.

NCCL carries what lies on GPUs, gloo the rest: votes, figures, checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcr.errors import UsageError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; alone, each method hands back what it is given.

    Methods that exchange something must be called by all of them, in the same order.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0  # among those of this machine
    local_ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def once(self, do: Callable[[], T]) -> T:
        """What `do` returns, called by the first process only; a mistake it finds ends all of them."""
        if self.ranks == 1:
            return do()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = do()
            except (UsageError, OSError, SystemExit) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:  # the first has said it
            raise outcome[1] if self.first or isinstance(outcome[1], SystemExit) else SystemExit(2)
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """The value of each process, in the first one; elsewhere nothing."""
        if self.ranks == 1:
            return [value]
        values: Any = [None] * self.ranks if self.first else None
        dist.gather_object(value, values)
        return values or []

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes."""
        largest = torch.tensor(numbers, dtype=torch.int64)
        if self.ranks > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each figure over the processes."""
        means = self.total(torch.tensor(list(values.values()), dtype=torch.float64)) / self.ranks
        return dict(zip(values, means.tolist(), strict=True))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on the tensor's device."""
        if self.ranks > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def share_statistics(self, module: nn.Module) -> None:
        """Give all processes the mean of their buffers, BatchNorm's statistics: they measure and save one encoder."""
        for buffer in filter(torch.is_floating_point, module.buffers()):
            buffer.copy_(self.total(buffer) / self.ranks)

    @contextlib.contextmanager
    def local_first(self) -> Iterator[None]:
        """Let the first process of each machine go first; the others then find what it leaves in a cache."""
        if self.ranks > 1 and self.local_rank:
            dist.barrier()
        try:
            yield
        finally:  # after an error too: the others will find it themselves
            if self.ranks > 1 and not self.local_rank:
                dist.barrier()

    def gather_keys(self, keys: Tensor) -> Tensor:
        """Keys `[B,D]` of each process to those of all `[B*ranks,D]`, in the order of the processes."""
        if self.ranks == 1:
            return keys
        everyones = keys.new_empty(len(keys) * self.ranks, keys.shape[1])
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name in newer versions of torch
        gather(everyones, keys.contiguous())
        return everyones


ALONE = Processes()


@contextlib.contextmanager
def processes_of_torchrun(command: str, timeout: timedelta | None = None) -> Iterator[Processes]:
    """The processes that torchrun started, connected for as long as this lasts; `ALONE` without torchrun.

    An error that all of them find is printed by one of them, with exit status 2. If a process ends early, the others
    notice it at their next exchange on the CPU (every step has one), say so as `<command>: error: ...`, and end with
    status 1. `timeout` is how long an exchange waits for the others (torch's default: 30 minutes).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    store, rank, ranks = next(dist.rendezvous("env://"))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torchrun keeps one store through its restarts, with the addresses of the processes that were there before
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        yield Processes(rank, ranks, local_rank, local_ranks)
    except (UsageError, OSError) as error:
        with contextlib.suppress(RuntimeError):  # the store was in a process that ended
            if store.add(f"said/{error}", 1) > 1:
                raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        reason = one_line(error, 300)
        if not isinstance(error, dist.DistError) and "gloo" not in reason:  # gloo has no class of its own
            raise
        program = command.removeprefix("python -m ")  # as other mistakes are signed
        print(f"{program}: error: the processes of this job lost each other: {reason}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()  # however it ends: gloo's threads could abort an interpreter that shuts down
