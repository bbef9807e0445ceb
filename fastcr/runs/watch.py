"""What a run watches: weights that are not finite, signals, and a console whose reader may go away."""

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


def check_weights(weights: Sequence[Tensor], step: int, folder: Path) -> None:
    """Raise `UsageError` if the weights after `step` are not finite, and so no later ones will be."""
    if not torch.stack([each.isfinite().all() for each in weights]).all():
        resume = folder / "resume.pt"
        last_good = f"the last good checkpoint is {resume}" if resume.exists() else "nothing had been saved yet"
        raise UsageError(f"the weights are not finite after step {step} (try a lower --optim.lr); {last_good}")


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
