"""Where a run's records go besides its own files: TensorBoard always, and Weights & Biases with `--run.track wandb`."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastcr.config import Config
from fastcr.errors import UsageError, one_line
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.context import Context

WANDB_ID = "wandb-id.txt"  # of a run folder: its run at Weights & Biases, for `--resume`
SECONDS = 30  # that wandb may take to begin or to end: training must not wait for a network that is gone


def check_tracker(name: str) -> None:
    """`UsageError` where the package of a tracker is not installed."""
    if name != "none":
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb leaves a folder of its own name behind, which is no package
            raise UsageError(f'--run.track {name} needs {name}: pip install "fastcr[{name}]"')


class Sinks:
    """The TensorBoard events of a run; wandb, where it is asked for, copies them as they are written.

    A failure of either ends that sink with one line of warning, never the training.
    """

    def __init__(self, folder: Path, config: Config, context: Context, start: int) -> None:
        """Events after step `start`, of the run before it was resumed, are taken back."""
        self.context = context
        self.writer: Any = None
        self.wandb: Any = None
        if config.run.track == "wandb":  # first, so that it notices TensorBoard's writer
            self._attempt("wandb", lambda: self._open_wandb(folder, config))
        with suppress(ImportError, UnicodeError), warnings.catch_warnings():  # it takes no folder of any bytes
            warnings.simplefilter("ignore")  # TensorBoard's own, about its dependencies
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        self._write(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture."""
        self._write(lambda writer: writer.add_image(name, np.array(picture), step, dataformats="HWC"))

    def close(self, ended: bool) -> None:
        """Write what is left; `ended` says whether the run came to its end."""
        self._write(lambda writer: writer.close())
        if self.wandb:
            self._attempt("wandb", lambda: self._close_wandb(ended))

    def _write(self, act: Callable[[Any], object]) -> None:
        if self.writer and not self._attempt("TensorBoard", lambda: act(self.writer)):
            self.writer = None

    def _attempt(self, name: str, act: Callable[[], object]) -> bool:
        try:
            act()
        except Exception as error:  # whatever the library raises
            self.context.say(f"warning: {name} failed, so nothing more is logged there: {one_line(error)}")
            return False
        return True

    def _open_wandb(self, folder: Path, config: Config) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        id_file = folder / WANDB_ID
        try:
            self.wandb = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastcr"),
                name=folder.absolute().name,
                id=id_file.read_text() if id_file.exists() else None,
                resume="allow",
                dir=str(folder),
                config=settings(config),
                allow_val_change=True,
                sync_tensorboard=True,
                settings=wandb.Settings(silent=True, console="off", init_timeout=SECONDS, finish_timeout=SECONDS),
            )
        except Exception:
            wandb.tensorboard.unpatch()
            raise
        write_whole(id_file, lambda file: file.write_text(self.wandb.id))
        self.context.say(f"wandb: {folder / 'wandb'} (offline)" if self.wandb.offline else f"wandb: {self.wandb.url}")

    def _close_wandb(self, ended: bool) -> None:
        import wandb

        self.wandb.finish(exit_code=0 if ended else 1)
        wandb.tensorboard.unpatch()  # another run of this process may go without it


def settings(config: Config) -> dict[str, Any]:
    """Every setting by its flag, a path as text."""
    sections = {name: each for name, each in dataclasses.asdict(config).items() if isinstance(each, dict)}
    flags = {f"{name}.{key}": value for name, each in sections.items() for key, value in each.items()}
    return {"preset": config.preset} | {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}
