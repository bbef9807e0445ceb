"""What a run watches: losses that are not finite, signals, and a console whose reader may go away."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.distributed import ALONE, Processes

BAD_BATCH = "bad_batch.json"


class LossWatch:
    """Notices a loss, gradient or weight that is not finite, without waiting for the device at every step."""

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
        """Take note of the next step's loss, a scalar, and of its gradient's norm (None where it is not checked)."""
        self.losses.append(loss)
        self.gradient_norms.append(torch.zeros_like(loss) if gradient_norm is None else gradient_norm)

    def check(self) -> None:
        """Raise `UsageError`, naming the step and the last good checkpoint, if anything since the last check is bad.

        The files of that step's images (`files_of`) are written to `bad_batch.json`, for the user to inspect.
        """
        if not self.losses:
            return
        losses = self.processes.total(torch.stack(self.losses))
        good = torch.stack([losses, torch.stack(self.gradient_norms).to(losses)]).isfinite().all(0)
        weights_are_good = torch.stack([p.isfinite().all() for p in self.parameters]).all()
        if good.all() and weights_are_good:
            self.step += len(self.losses)
            self.losses, self.gradient_norms = [], []
            return
        if good.all():
            what, first = "weights", len(losses) - 1
        else:
            first = int((~good).nonzero()[0])
            what = "gradient" if losses[first].isfinite() else "loss"
        step = self.step + 1 + first
        listed = self.folder / BAD_BATCH
        if self.processes.first:
            content = json.dumps({"step": step, "files": list(self.files_of(step))}, indent=2)
            write_whole(listed, lambda file: file.write_text(content))
        resume = self.folder / "resume.pt"
        last_good = f"the last good checkpoint is {resume}" if resume.exists() else "nothing had been saved yet"
        raise UsageError(
            f"the {what} is not a finite number from step {step} on (try a lower --optim.lr); {last_good}; "
            f"the step's images are listed in {listed}"
        )


class StopSignal:
    """Notes a signal in `received`, so that the loop ends after its step; used as a context manager.

    SIGTERM, SIGUSR1 (a scheduler's early warning), SIGINT, SIGHUP (the terminal was closed), and SIGPIPE (nobody reads
    stdout any more).
    """

    def __init__(self) -> None:
        self.received = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            to_nobody(stat.S_ISCHR)
        if not self.received:  # SIGTERM may come from a scheduler and from torchrun as well
            self.received = signal.SIGTERM if number == signal.SIGUSR1 else number

    def __enter__(self) -> StopSignal:
        """Listen, if this is the main thread: others get no signals. SIGHUP stays ignored where nohup ignores it."""
        numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGPIPE, signal.SIGHUP}
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
    """A console whose reader may go away (`| head`): the run is asked to stop, as by a signal."""

    def on_broken_pipe(self) -> None:
        """Print no more. `SystemExit` 141, as of SIGPIPE, where nothing has to be saved."""
        self.quiet = True
        to_nobody(stat.S_ISFIFO)
        if signal.getsignal(signal.SIGPIPE) in (signal.SIG_IGN, signal.SIG_DFL):
            raise SystemExit(128 + signal.SIGPIPE)


def to_nobody(gone: Callable[[int], bool]) -> None:
    """Send stdout and stderr to /dev/null where `gone` says yes to their file mode: a terminal's, or a pipe's."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with suppress(OSError):
            if gone(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
    os.close(nowhere)
