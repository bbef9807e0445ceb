"""What every part of a command shares: where it computes, how it loads, and where it speaks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.segment import Segments
from rich.table import Table

from fastcr.runs.distributed import ALONE, Processes
from fastcr.runs.machine import pick_device, pick_dtype, pick_workers

T = TypeVar("T")
CPU = torch.device("cpu")
SECONDS = 10.0  # between two lines where there is no bar


@dataclass(frozen=True)
class Context:
    """Device, precision, workers, console and processes of a command; the defaults suit a call from Python."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32  # in which encoders run (autocast)
    workers: int = 0  # processes or threads that load images
    console: Console = field(default_factory=partial(Console, markup=False, emoji=False))
    processes: Processes = ALONE  # that share the work; only the first one speaks and writes

    @classmethod
    def of(
        cls,
        device: str = "auto",
        precision: str = "auto",
        workers: int | None = None,
        console: Console | None = None,
        processes: Processes = ALONE,
    ) -> Context:
        """The context that `--run.device`, `--run.precision` and `--data.workers` ask for on this machine.

        `UsageError` if the device is not there.
        """
        where = pick_device(device, processes.local_rank, processes.local_ranks)
        console = console or Console(markup=False, emoji=False, quiet=not processes.first)
        share = pick_workers(workers, processes.local_ranks)
        return cls(where, pick_dtype(precision, where), share, console, processes)

    def say(self, line: object) -> None:
        """Print one line, as it is: never folded, never coloured."""
        self.console.out(line, highlight=False)

    def show(self, table: Table) -> None:
        """Print a table at its full width, even in a narrower terminal; in a pipe, rich would take 80 columns."""
        options = self.console.options.update(max_width=10_000)
        options = options.update(width=self.console.measure(table, options=options).maximum)
        self.console.print(Segments(self.console.render(table, options)), crop=False, end="")

    def progress(self, items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
        """The items, with a bar that disappears at the end, or lines, as `progress` shows it."""
        return progress(items, title, total, self.console)


def progress(items: Iterable[T], title: str, total: int | None = None, console: Console | None = None) -> Iterator[T]:
    """The items, with a bar on the console (by default on stderr), or without a terminal lines, which `Pace` times."""
    console, pace = console or Console(stderr=True), Pace()
    if console.is_terminal:
        yield from track(items, title, total, console=console, transient=True)
        return
    if total:
        console.print(title, soft_wrap=True, highlight=False)
    for done, item in enumerate(items, start=1):
        yield item
        if pace.due():
            so_far = f"{done:,}"
            if total:
                left = timedelta(seconds=round((time.monotonic() - pace.began) / done * (total - done)))
                so_far = f"{done / total:.0%}, time left {left}"
            console.print(f"{title}: {so_far}", soft_wrap=True, highlight=False)


class Pace:
    """When a line is due of how far some work has come: every ten seconds, and in a long time ever more rarely."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def due(self) -> bool:
        """Whether one is due now; then the next one comes later."""
        now = time.monotonic()
        if now - self.said < max(SECONDS, (now - self.began) / 100):
            return False
        self.said = now
        return True
