"""What a run shows and logs: progress bar, metrics.jsonl, TensorBoard, trackers, speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

from PIL import Image
from rich.console import Group
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

from fastcr.config import Config
from fastcr.errors import one_line
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.context import Context
from fastcr.runs.sinks import SINKS, Sink

T = TypeVar("T")
SHOWN = {  # metric: its name on the bar's second line, and format
    "images_per_second": ("images/s", "{:.0f}"),
    "data_wait": ("waiting for data", "{:.0%}"),
    "contrast_loss": ("contrast", "{:.3f}"),
    "fit_loss": ("fit", "{:.4f}"),
    "rank1": ("rank-1", "{:.1f} %"),
    "knn": ("kNN", "{:.1f} %"),
    "attention_entropy": ("entropy", "{:.2f}"),
    "effective_detectors": ("detectors", "{:.1f}"),
    "effective_rank": ("rank", "{:.0f}"),
    "kept_neighbours": ("neighbours kept", "{:.0%}"),
}


class RunLog:
    """Shows a run's progress and logs its records; used as a context manager. Only the first process writes.

    `metrics.jsonl` holds one JSON object a logged step; the same numbers go to TensorBoard and to the tracker, if there
    is one. A resumed run first drops the records after step `start`, which it will write again.
    """

    def __init__(
        self, folder: Path, config: Config, context: Context, *, start: int, last: int, steps_per_epoch: int
    ) -> None:
        self.context, self.steps_per_epoch, self.epochs = context, steps_per_epoch, config.optim.epochs
        self.meter = Meter()
        self.shown: dict[str, Any] = {}  # the latest of each metric: some come once an epoch
        self.sinks: list[Sink] = []
        self.file: TextIO | None = None
        if context.processes.first:
            path = folder / "metrics.jsonl"
            keep_records(path, "step", start)
            self.file = path.open("a")
            with suppress(ImportError, UnicodeError):  # TensorBoard takes no folder of any bytes
                self.sinks.append(SINKS["tensorboard"](folder, config, start))
            if config.run.track != "none":
                self._works(config.run.track, lambda: self._open(SINKS[config.run.track](folder, config, start)))
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=context.console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=last, completed=start)
        self.status = Text("", no_wrap=True, overflow="ellipsis")
        self.live = Live(
            Group(self.progress, self.status), console=context.console, transient=True, refresh_per_second=4
        )

    def __enter__(self) -> RunLog:
        """Start the bar, where there is a terminal to show it on."""
        if self.context.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar and close the files, whatever happened."""
        self.live.stop()
        if self.file:
            self.file.close()
        self._each(lambda sink: sink.close(error is None))

    def _works(self, name: str, act: Callable[[], object]) -> bool:
        """Do something with a sink; one line where that fails, in whatever way: it must not end a training."""
        try:
            act()
        except Exception as error:
            self.context.say(f"warning: {name} failed, so nothing more is logged there: {one_line(error)}")
            return False
        return True

    def _open(self, sink: Sink) -> None:
        self.sinks.append(sink)
        self.context.say(f"{sink.name}: {sink.where}")

    def _each(self, act: Callable[[Sink], object]) -> None:
        """Do something with each sink that still works."""
        self.sinks = [sink for sink in self.sinks if self._works(sink.name, partial(act, sink))]

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
        self.progress.update(self.task, completed=step, description=f"epoch {epoch}/{self.epochs}")

    def record(self, record: dict[str, Any]) -> None:
        """Append one step's metrics, and show them."""
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        numbers = {name: value for name, value in record.items() if name not in ("step", "epoch")}
        self._each(lambda sink: sink.scalars(numbers, record["step"]))
        self._show(record)

    def evaluated(self, step: int, scores: dict[str, float], attention: Image.Image | None) -> None:
        """Log an evaluation's scores, by names such as `knn/rationale/top1`, and the attention drawn over images."""
        if scores:
            self._each(lambda sink: sink.scalars(scores, step))
        if attention:
            self._each(lambda sink: sink.image("attention", attention, step))
        for pooling in ("mean", "rationale"):  # the latter is shown where there is one
            names = {"rank1": f"retrieval/{pooling}/rank1", "knn": f"knn/{pooling}/top1"}
            self._show({shown: scores[name] for shown, name in names.items() if name in scores})

    def _show(self, record: dict[str, Any]) -> None:
        self.shown |= record
        self.status.plain = describe(self.shown)

    def epoch_done(self, record: dict[str, Any], epoch: int) -> None:
        """Leave a line behind for a finished epoch."""
        self.context.say(f"epoch {epoch}/{self.epochs}  {describe(record)}")


def describe(record: dict[str, Any]) -> str:
    """One line of the metrics worth watching."""
    return "  ".join(f"{label} {form.format(record[key])}" for key, (label, form) in SHOWN.items() if key in record)


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
