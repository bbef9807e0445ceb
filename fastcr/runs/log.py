"""What a run shows and logs: progress bar, metrics.jsonl, TensorBoard, speed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from rich.console import Group
from rich.live import Live
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastcr.config import Config
from fastcr.errors import one_line
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.context import Context, Pace

SHOWN = {  # metric: its name and format
    "images_per_second": ("images/s", "{:.0f}"),
    "data_wait": ("waiting for data", "{:.0%}"),
    "loss": ("loss", "{:.3f}"),
    "fit_loss": ("fit", "{:.4f}"),
    "attention_entropy": ("entropy", "{:.2f}"),
    "effective_detectors": ("detectors", "{:.1f}"),
    "effective_rank": ("dimensions in use", "{:.0f}"),
    "kept_neighbours": ("neighbours kept", "{:.0%}"),
}
PACE = 600  # seconds of a run, evaluations included, by whose pace the rest is estimated
TENTH = 10  # step after whose like the time of the rest can be told
OF_THE_MOMENT = ("images_per_second", "data_wait")  # worth a look while a run goes on, not a line of its log


class RunLog:
    """Shows a run's progress and logs its records; used as a context manager. Only the first process writes.

    `metrics.jsonl` holds one JSON object a logged step; the same numbers go to TensorBoard. A resumed run first drops
    the records after step `start`, which it will write again.
    """

    def __init__(
        self, folder: Path, config: Config, context: Context, *, start: int, last: int, steps_per_epoch: int
    ) -> None:
        self.context, self.steps_per_epoch, self.epochs = context, steps_per_epoch, config.optim.epochs
        self.meter, self.pace, self.start, self.last = Meter(), Pace(), start, last
        self.shown: dict[str, Any] = {}  # the latest of each metric: some come once an epoch
        self.writer: Any = None  # of TensorBoard's events; None after a failure too
        self.file: TextIO | None = None
        if context.processes.first:
            path = folder / "metrics.jsonl"
            keep_records(path, "step", start)
            self.file = path.open("a")
            with suppress(ImportError, UnicodeError), warnings.catch_warnings():  # it takes no folder of any bytes
                warnings.simplefilter("ignore")  # TensorBoard's own, about its dependencies
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        columns = (MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(), *Progress.get_default_columns())
        self.bar = Progress(*columns, console=context.console, speed_estimate_period=PACE)
        self.task = self.bar.add_task("", total=last, completed=start)
        self.status = Text("", no_wrap=True, overflow="ellipsis")
        self.live = Live(Group(self.bar, self.status), console=context.console, transient=True, refresh_per_second=4)

    def __enter__(self) -> RunLog:
        """Start the bar, where there is a terminal to show it on."""
        if self.context.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the bar and close the files, whatever happened."""
        self.live.stop()
        if self.file:
            self.file.close()
        self._to_tensorboard(lambda writer: writer.close())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No bar inside, where others are shown."""
        shown = self.live.is_started
        self.live.stop()
        yield
        if shown:
            self.live.start()
        self.meter.reset()

    def advance(self, step: int, images: int) -> None:
        """Move the bar to `step` completed steps, the last of so many images."""
        self.meter.images += images
        epoch = min((step - 1) // self.steps_per_epoch + 1, self.epochs)
        self.bar.update(self.task, completed=step, description=f"epoch {epoch}/{self.epochs}")
        if not self.context.console.is_terminal and (self.pace.due() or step == self.start + TENTH):
            self.context.say(f"step {step:,} of {self.last:,}  epoch {epoch}/{self.epochs}{self.time_left()}")

    def time_left(self) -> str:
        """What all other steps will take, by the pace of the last; nothing at the end."""
        seconds = self.bar.tasks[self.task].time_remaining
        return f"  time left {timedelta(seconds=round(seconds))}" if seconds else ""

    def record(self, record: dict[str, Any]) -> None:
        """Append one step's metrics, and show them."""
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        self._scalars({name: each for name, each in record.items() if name not in ("step", "epoch")}, record["step"])
        self.shown |= record
        self.status.plain = describe(self.shown)

    def evaluated(self, step: int, scores: dict[str, float], attention: Image.Image | None) -> None:
        """Log an evaluation's scores, by names such as `knn/rationale/top1`, and the attention drawn over images."""
        self._scalars(scores, step)
        if attention:
            pixels = np.array(attention)
            self._to_tensorboard(lambda writer: writer.add_image("attention", pixels, step, dataformats="HWC"))

    def _scalars(self, values: dict[str, float], step: int) -> None:
        self._to_tensorboard(lambda writer: [writer.add_scalar(*each, step) for each in values.items()])

    def _to_tensorboard(self, act: Callable[[Any], object]) -> None:
        """Let `act` do something with the writer; a failure ends the events with one line, never the training."""
        if self.writer:
            try:
                act(self.writer)
            except Exception as error:  # whatever the library raises
                self.writer = None
                self.context.say(f"warning: TensorBoard failed, so nothing more is logged there: {one_line(error)}")

    def epoch_done(self, record: dict[str, Any], epoch: int) -> None:
        """Leave a line behind for a finished epoch."""
        lasting = {name: value for name, value in record.items() if name not in OF_THE_MOMENT}
        self.context.say(f"epoch {epoch}/{self.epochs}  {describe(lasting)}{self.time_left()}")


def describe(record: dict[str, Any]) -> str:
    """One line of the metrics worth watching."""
    shown = {name: each for name, each in SHOWN.items() if name in record}
    return "  ".join(f"{label} {form.format(record[name])}" for name, (label, form) in shown.items())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, without incomplete or broken lines; none if there is no file."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            if isinstance(record := json.loads(line), dict):
                records.append(record)
    return records


def keep_records(path: Path, key: str, last: float) -> None:
    """Drop from a JSONL file the records whose `key` is beyond `last`, and a line cut off by a kill."""
    if path.exists():
        records = read_records(path)
        kept = [each for each in records if isinstance(each.get(key), int | float) and each[key] <= last]
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
