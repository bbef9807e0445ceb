"""What every part of a command shares: where it computes, how it loads, and where it speaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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
        """The items, with a bar that disappears at the end; without a terminal there is no bar."""
        return progress(items, title, total, self.console)


def progress(items: Iterable[T], title: str, total: int | None = None, console: Console | None = None) -> Iterable[T]:
    """The items, with a bar on the console (by default on stderr) as `Context.progress` shows it."""
    console = console or Console(stderr=True)
    return track(items, title, total, console=console, transient=True, disable=not console.is_terminal)
