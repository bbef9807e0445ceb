"""Where a run's records go besides its own files: TensorBoard, and Weights & Biases or MLflow with `--run.track`.

Where the trackers keep them is said by their own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastcr.config import Config
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

IDS = "tracker.json"  # of a run folder: the run's id by tracker
SECONDS = 30  # that a tracker may take to begin or to end: training must not wait for a network that is gone


class Sink(NamedTuple):
    """One place that records go to; each part may raise whatever its library does."""

    name: str
    where: str  # for people; "" for the run folder
    scalars: Callable[[dict[str, float], int], object]  # numbers by name, step
    image: Callable[[str, Image.Image, int], object]  # name, image, step
    close: Callable[[bool], object]  # whether the run came to its end


def check_tracker(name: str) -> None:
    """`UsageError` where the package of a tracker is not installed."""
    if name != "none":
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, as wandb leaves it, is no package
            raise UsageError(f'--run.track {name} needs {name}: pip install "fastcr[{name}]"')


def tensorboard(folder: Path, config: Config, start: int) -> Sink:
    """TensorBoard's events in the run folder, those after step `start` taken back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about its dependencies
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def scalars(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def image(name: str, picture: Image.Image, step: int) -> None:
        writer.add_image(name, np.array(picture), step, dataformats="HWC")

    return Sink("TensorBoard", "", scalars, image, lambda ended: writer.close())


def wandb(folder: Path, config: Config, start: int) -> Sink:
    """A run of Weights & Biases, the same one after `--resume`; it leaves out steps that it has had before."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    ids = read_ids(folder)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fastcr"),
        name=folder.absolute().name,
        id=ids.get("wandb"),
        resume="allow",
        dir=str(folder),
        config=settings(config),
        allow_val_change=True,
        settings=wandb.Settings(silent=True, console="off", init_timeout=SECONDS, finish_timeout=SECONDS),
    )
    write_ids(folder, ids | {"wandb": run.id})
    where = f"{folder / 'wandb'} (offline)" if run.offline else str(run.url)
    return Sink(
        "wandb",
        where,
        lambda values, step: run.log(values, step=step),
        lambda name, picture, step: run.log({name: wandb.Image(picture)}, step=step),
        lambda ended: run.finish(exit_code=0 if ended else 1),
    )


def mlflow(folder: Path, config: Config, start: int) -> Sink:
    """A run of MLflow, the same one after `--resume`."""
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(SECONDS // 3)}
    for name, value in {**patience, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.entities import Metric, Param

    for name in ("mlflow", "alembic"):  # how they make their tables
        logging.getLogger(name).setLevel(logging.WARNING)
    client, ids = mlflow.MlflowClient(), read_ids(folder)
    if run := ids.get("mlflow"):
        client.update_run(run, status="RUNNING")
    else:
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastcr"))
        run = client.create_run(experiment.experiment_id, run_name=folder.absolute().name).info.run_id
        client.log_batch(run, params=[Param(name, str(value)) for name, value in settings(config).items()])
        write_ids(folder, ids | {"mlflow": run})

    def scalars(values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    return Sink(
        "mlflow",
        mlflow.get_tracking_uri().rpartition("@")[2],  # a password may stand before it
        scalars,
        lambda name, picture, step: client.log_image(run, picture, key=name, step=step, synchronous=True),
        lambda ended: client.set_terminated(run, "FINISHED" if ended else "KILLED"),
    )


SINKS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


def settings(config: Config) -> dict[str, Any]:
    """Every setting by its flag, a path as text."""
    sections = {name: each for name, each in dataclasses.asdict(config).items() if isinstance(each, dict)}
    flags = {f"{name}.{key}": value for name, each in sections.items() for key, value in each.items()}
    return {"preset": config.preset} | {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}


def read_ids(folder: Path) -> dict[str, str]:
    """The ids this run has at trackers; none where the file is missing or broken."""
    try:
        found = json.loads((folder / IDS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_ids(folder: Path, ids: dict[str, str]) -> None:
    """Keep them for `--resume`."""
    write_whole(folder / IDS, lambda file: file.write_text(json.dumps(ids) + "\n"))
