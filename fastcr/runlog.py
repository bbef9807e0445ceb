"""What a run shows, keeps and watches: progress bar, metrics.jsonl, TensorBoard, speed, bad losses, signals."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from fastcr.checkpoint import write_whole
from fastcr.config import Config, UsageError
from fastcr.distributed import ALONE, Processes

BAD_BATCH = "bad_batch.json"
SHOWN = {  # metric: its name on the bar's second line, and format
    "images_per_second": ("images/s", "{:.0f}"),
    "data_wait": ("waiting for data", "{:.0%}"),
    "contrast_loss": ("contrast", "{:.3f}"),
    "fit_loss": ("fit", "{:.4f}"),
    "pooled_contrast_loss": ("pooled", "{:.3f}"),
    "attention_entropy": ("entropy", "{:.2f}"),
    "effective_detectors": ("detectors", "{:.1f}"),
}


class RunLog:
    """Shows a run's progress and appends its records; used as a context manager. With `writes` False it does nothing.

    `metrics.jsonl` holds one JSON object a logged step. A resumed run first drops the records after `start_step`, which
    it will write again.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        start_step: int,
        last_step: int,
        steps_per_epoch: int,
        writes: bool = True,
    ) -> None:
        self.console, self.steps_per_epoch = console, steps_per_epoch
        self.writer: Any = None
        self.file: TextIO | None = None
        if writes:
            with warnings.catch_warnings(), suppress(ImportError):  # a run does without TensorBoard
                warnings.simplefilter("ignore")  # its own, about its dependencies
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
            path = folder / "metrics.jsonl"
            keep_records(path, "step", start_step)
            self.file = path.open("a")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=last_step, completed=start_step)
        self.status = Text("", no_wrap=True, overflow="ellipsis")
        self.live = Live(Group(self.progress, self.status), console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> RunLog:
        """Start the bar, where there is a terminal to show it on."""
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar and close the files, whatever happened."""
        self.live.stop()
        if self.writer:
            self.writer.close()
        if self.file:
            self.file.close()

    def advance(self, step: int, epochs: int) -> None:
        """Move the bar to `step` completed steps."""
        epoch = min((step - 1) // self.steps_per_epoch + 1, epochs)
        self.progress.update(self.task, completed=step, description=f"epoch {epoch}/{epochs}")

    def record(self, record: dict[str, Any]) -> None:
        """Append one step's metrics, and show them."""
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        for name, value in record.items():
            if self.writer and name not in ("step", "epoch"):
                self.writer.add_scalar(name, value, record["step"])
        self.status.plain = describe(record)

    def epoch_done(self, record: dict[str, Any], epoch: int, epochs: int) -> None:
        """Leave a line behind for a finished epoch."""
        self.console.print(f"epoch {epoch}/{epochs}  {describe(record)}", highlight=False, soft_wrap=True)


def describe(record: dict[str, Any]) -> str:
    """One line of the metrics worth watching."""
    return "  ".join(f"{label} {form.format(record[key])}" for key, (label, form) in SHOWN.items() if key in record)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, without what a kill or a bad disk left half; none if there is no file."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            if isinstance(record := json.loads(line), dict):
                records.append(record)
    return records


def keep_records(path: Path, key: str, last: float) -> None:
    """Drop from a JSONL file the records whose `key` is beyond `last`, and a line cut off by a kill."""
    if path.exists():
        numbered = [record for record in read_records(path) if isinstance(record.get(key), int | float)]
        kept = [record for record in numbered if record[key] <= last]
        write_whole(path, lambda file: file.write_text("".join(json.dumps(record) + "\n" for record in kept)))


class Meter:
    """Images a second and share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """`images_per_second` and `data_wait`, and start over."""
        elapsed = time.perf_counter() - self.start
        values = {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}
        self.reset()
        return values


class LossWatch:
    """Notices a loss, gradient or weight that is no number, without waiting for the device at every step."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        step: int,
        folder: Path,
        files_of: Callable[[int], Sequence[str]],
        processes: Processes = ALONE,
    ) -> None:
        self.parameters, self.step = parameters, step
        self.losses, self.gradient_norms = list[Tensor](), list[Tensor]()
        self.folder, self.files_of, self.processes = folder, files_of, processes

    def add(self, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Take note of the next step's loss, a scalar, and of its gradient's norm (None: need not be a number)."""
        self.losses.append(loss)
        self.gradient_norms.append(torch.zeros_like(loss) if gradient_norm is None else gradient_norm)

    def check(self) -> None:
        """Raise `UsageError`, naming the step and the last good checkpoint, if anything since the last check is bad.

        The files of that step's images (`files_of`) are written to `bad_batch.json`, to look at or to train on again.
        """
        if not self.losses:
            return
        what, losses = "loss", self.processes.total(torch.stack(self.losses))
        bad = ~torch.stack([losses, torch.stack(self.gradient_norms).to(losses)]).isfinite()
        if bad.any():
            step = self.step + 1 + int(bad.any(0).nonzero()[0])
            what = "loss" if bad[0, step - self.step - 1] else "gradient"
        elif not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            step, what = self.step + len(self.losses), "weights"
        else:
            self.step += len(self.losses)
            self.losses, self.gradient_norms = [], []
            return
        if self.processes.first:
            content = json.dumps({"step": step, "files": list(self.files_of(step))}, indent=2)
            write_whole(self.folder / BAD_BATCH, lambda file: file.write_text(content))
        resume = self.folder / "resume.pt"
        last_good = f"the last good checkpoint is {resume}" if resume.exists() else "nothing had been saved yet"
        raise UsageError(
            f"the {what} is not a finite number from step {step} on (try a lower --optim.lr); {last_good}; "
            f"the step's images are listed in {self.folder / BAD_BATCH}"
        )


class HealthWatch:
    """Warns, once each, of what makes further training pointless."""

    def __init__(self, console: Console, config: Config) -> None:
        self.console, self.detectors, self.said = console, config.rationale.detectors, set[str]()

    def look(self, record: dict[str, float], positions: int) -> None:
        """Print what is wrong with a step's metrics; attention maps have `positions` cells."""
        entropy = record.get("attention_entropy", 0.5 * math.log(positions)) / max(math.log(positions), 1e-9)
        warnings = {
            "the embeddings have collapsed: all images get nearly the same": record["embedding_spread"] < 0.1,
            "the attention has collapsed to a single place": positions > 1 and entropy < 0.1,
            "the attention is the same everywhere: it pools as the mean does": positions > 1 and entropy > 0.9999,
            f"fewer than 2 of {self.detectors} detectors are in use": record.get("effective_detectors", 2) < 2,
        }
        for warning in [text for text, holds in warnings.items() if holds and text not in self.said]:
            self.said.add(warning)
            self.console.print(f"warning: {warning}", highlight=False, soft_wrap=True)


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a wish the loop looks at between steps; used as a context manager."""

    def __init__(self) -> None:
        self.received = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        if not self.received:  # SIGTERM may come from a scheduler and from torchrun as well
            self.received = number if number == signal.SIGINT else signal.SIGTERM  # USR1 is sent ahead of time

    def __enter__(self) -> StopSignal:
        """Listen, where signals can be (the main thread)."""
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back the handlers that were there."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
