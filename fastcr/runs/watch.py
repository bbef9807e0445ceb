"""What a run watches: losses that are not finite, signals, and a console whose reader may go away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor

from fastcr.errors import UsageError
from fastcr.runs.distributed import ALONE, Processes


class LossWatch:
    """Notices a loss or a weight that is not finite, without waiting for the device at every step."""

    def __init__(self, parameters: Sequence[Tensor], step: int, folder: Path, processes: Processes = ALONE) -> None:
        self.parameters, self.step, self.folder, self.processes = parameters, step, folder, processes
        self.losses = list[Tensor]()

    def add(self, loss: Tensor) -> None:
        """Take note of the next step's loss, a scalar."""
        self.losses.append(loss)

    def check(self) -> None:
        """Raise `UsageError`, naming the step and the last good checkpoint, if anything since the last check is bad."""
        if not self.losses:
            return
        finite = self.processes.total(torch.stack(self.losses)).isfinite()
        weights_are_finite = torch.stack([p.isfinite().all() for p in self.parameters]).all()
        if finite.all() and weights_are_finite:
            self.step += len(self.losses)
            self.losses = []
            return
        what = "weights are" if finite.all() else "loss is"
        step = self.step + (len(self.losses) if finite.all() else 1 + int((~finite).nonzero()[0]))
        resume = self.folder / "resume.pt"
        last_good = f"the last good checkpoint is {resume}" if resume.exists() else "nothing had been saved yet"
        raise UsageError(f"the {what} not finite from step {step} on (try a lower --optim.lr); {last_good}")


class StopSignal:
    """Notes a signal in `received`, so that the loop ends after its step; used as a context manager.

    SIGTERM, SIGUSR1 (a scheduler's early warning), SIGINT, and SIGHUP (the terminal was closed).
    """

    def __init__(self) -> None:
        self.received = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # whatever is printed from here on would be an error
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not self.received:  # SIGTERM may come from a scheduler and from torchrun as well
            self.received = signal.SIGTERM if number == signal.SIGUSR1 else number

    def __enter__(self) -> StopSignal:
        """Listen, if this is the main thread: others get no signals. SIGHUP stays ignored where nohup ignores it."""
        numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            numbers.clear()
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        """Put back the handlers that were there."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class RunConsole(Console):
    """A console whose reader may go away (`| head`): the run is then asked to stop, as by SIGTERM."""

    def on_broken_pipe(self) -> None:
        """Print no more, and stop."""
        with suppress(SystemExit):
            super().on_broken_pipe()
        signal.raise_signal(signal.SIGTERM)
