"""Where a run's records go besides its own files: TensorBoard always, and Weights & Biases with `--run.track wandb`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
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
    """The TensorBoard events of a run, and its run at Weights & Biases where that is asked for.

    A failure of either ends that sink with one line of warning, never the training.
    """

    def __init__(self, folder: Path, config: Config, context: Context, start: int) -> None:
        """Take back the events after step `start`, which are of the run before it was resumed."""
        self.context, self.open = context, dict[str, Any]()
        with suppress(ImportError, UnicodeError), warnings.catch_warnings():  # it takes no folder of any bytes
            warnings.simplefilter("ignore")  # TensorBoard's own, about its dependencies
            from torch.utils.tensorboard import SummaryWriter

            self.open["TensorBoard"] = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        if config.run.track == "wandb":
            self.open["wandb"] = None
            self._attempt("wandb", lambda _: self._open_wandb(folder, config))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        self._attempt("TensorBoard", lambda writer: [writer.add_scalar(*each, step) for each in values.items()])
        self._attempt("wandb", lambda run: run.log(values, step=step))

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture."""
        pixels = np.array(picture)
        self._attempt("TensorBoard", lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))
        self._attempt("wandb", lambda run: run.log({name: import_module("wandb").Image(picture)}, step=step))

    def close(self, ended: bool) -> None:
        """Write what is left; `ended` says whether the run came to its end."""
        self._attempt("TensorBoard", lambda writer: writer.close())
        self._attempt("wandb", lambda run: run.finish(exit_code=int(not ended)))

    def _attempt(self, name: str, act: Callable[[Any], object]) -> None:
        if name in self.open:
            try:
                act(self.open[name])
            except Exception as error:  # whatever the library raises
                del self.open[name]
                self.context.say(f"warning: {name} failed, so nothing more is logged there: {one_line(error)}")

    def _open_wandb(self, folder: Path, config: Config) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        id_file = folder / WANDB_ID
        self.open["wandb"] = run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastcr"),
            name=folder.absolute().name,
            id=id_file.read_text() if id_file.exists() else None,
            resume="allow",  # it leaves out steps that it has had before
            dir=str(folder),
            config=json.loads(json.dumps(dataclasses.asdict(config), default=str)),  # paths as text
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", init_timeout=SECONDS, finish_timeout=SECONDS),
        )
        write_whole(id_file, lambda file: file.write_text(run.id))
        self.context.say(f"wandb: {folder / 'wandb'} (offline)" if run.offline else f"wandb: {run.url}")
