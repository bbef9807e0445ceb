"""`fastcr train [PRESET] [--section.field value ...]`, `fastcr train --resume RUN`: train an encoder.

In several processes: `torchrun --nproc-per-node N -m fastcr.train ...`. In Python: `train(preset("cub200"))`.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from fastcr.config import Config
from fastcr.data.images import ImageList, Splits
from fastcr.data.loaders import make_views
from fastcr.data.synthetic import BOXES, splits_of, write_synthetic
from fastcr.data.views import Views
from fastcr.encoders.encoder import between, describe
from fastcr.encoders.weights import with_own_colours
from fastcr.errors import UsageError, one_line
from fastcr.measures.health import EncoderHealth, HealthWarnings
from fastcr.method.build import Schedule, Training, build, check_settings, fit_sizes, trained
from fastcr.method.start import begin
from fastcr.method.step import Losses
from fastcr.output.evaluations import HISTORY, TrainingEvaluation
from fastcr.runs.checkpoint import (
    INITIAL,
    RESUME,
    Saver,
    check_unused,
    load_resume,
    random_states,
    save_weights,
    set_random_states,
    write_whole,
)
from fastcr.runs.command_line import called, one_line_errors, read_command_line, save_config
from fastcr.runs.context import Context
from fastcr.runs.distributed import ALONE, Processes, processes_of_torchrun
from fastcr.runs.folder import claim_folder
from fastcr.runs.log import RunLog, keep_records
from fastcr.runs.machine import process_age
from fastcr.runs.validate import validate
from fastcr.runs.watch import RunConsole, StopSignal, check_weights
from fastcr.trace import plan


@dataclass(frozen=True)
class Run:
    """A run that is about to begin, or to be resumed."""

    config: Config
    folder: Path
    start: int  # steps it has done before
    sample: Tensor | None  # embeddings of some of its images before training; None where it is resumed
    schedule: Schedule
    splits: Splits
    views: Views
    training: Training
    context: Context


class Due(NamedTuple):
    """What is due after a step; the same in every process."""

    signal: int  # that ends the run after this step, or 0
    log: bool
    save: bool
    evaluate: bool


def train(
    config: Config,
    *,
    resume: str | Path | None = None,
    console: Console | None = None,
    started: float = 0.0,
    processes: Processes = ALONE,
) -> Path:
    """Train as `config` says, or resume the run in the folder `resume`; returns the run folder.

    `started` is how many seconds ago the command began, for the time to the first step. Of several processes only the
    first prints and writes.
    Raises `UsageError` for settings, data or files that cannot work; `SystemExit` 128 + its number after a signal of
    `StopSignal`, with everything saved.
    """
    began = time.monotonic() - started
    config = validate(config)
    with ExitStack() as folders:
        context = Context.of(config.run.device, config.run.precision, config.data.workers, console, processes)
        run = open_run(config, Path(resume) if resume else None, context, folders)
        config, schedule = run.config, run.schedule
        boxes = None if config.data.root else write_synthetic() / BOXES
        evaluation = TrainingEvaluation(run.folder, run.splits, context, bool(config.run.eval_every), boxes)
        logged = {"start": run.start, "last": schedule.last, "steps_per_epoch": schedule.steps_per_epoch}
        with RunLog(run.folder, config, context, **logged) as log:
            if stopped := run_steps(run, evaluation, log, began):
                raise SystemExit(128 + stopped)
            if bad := set().union(*processes.gather(run.views.bad.files)):
                context.say(f"{len(bad)} unreadable training images were skipped")
            with log.paused():
                log.evaluated(schedule.last, *evaluation.at_the_end(run.training.encoder))
        context.say(f"run folder: {run.folder}")
    return run.folder


def run_steps(run: Run, evaluation: TrainingEvaluation, log: RunLog, began: float) -> int:
    """The training loop; returns the number of the signal that ended it early, or 0."""
    config, training, schedule, processes = run.config, run.training, run.schedule, run.context.processes
    # where somebody has removed the initial weights there is no way to go back on: a save must not fail for that
    on_the_way = schedule.last and config.optim.tuned < 1 and (run.folder / INITIAL).is_file()
    facts = describe(config) | ({"tuned": config.optim.tuned} if on_the_way else {})
    saver = Saver(run.folder, facts, config.run.save_minutes)
    health = RunHealth(run)
    due = Due(0, False, False, False)
    with StopSignal() as stop, closing(run.views.batches(run.start)) as batches:
        log.meter.reset()
        ready = time.monotonic()
        for step in range(run.start + 1, schedule.last + 1):
            with log.meter.waiting():
                batch = next(batches)
            training.set_learning_rates(step, schedule)
            loss, losses = training.step(batch)
            log.advance(step, len(batch.first) * processes.ranks)
            if step == run.start + 1:
                loss.item()  # waits for the device
                now = time.monotonic()
                took = f"{now - ready:.1f} s of it the step"
                run.context.say(f"first step done {now - began:.1f} s after the start, {took}")
            due = due_after(run, step, stop, saver)
            if due.log or due.save:
                check_weights(trained(training.optimizer), step, run.folder)
            if due.log:
                health.record(step, loss, losses, log)
            if due.save:
                save(run, saver, step)
            if due.signal:
                run.context.say(f"stopped at step {step}; resume with: {called('train')} --resume {run.folder}")
                break
            if due.evaluate:
                with log.paused():
                    epoch = step // schedule.steps_per_epoch
                    log.evaluated(step, *evaluation.during(training.encoder, epoch))
        if run.start == schedule.last == 0:  # nothing to train: the start is what is saved
            save(run, saver, 0)
    return due.signal


def due_after(run: Run, step: int, stop: StopSignal, saver: Saver) -> Due:
    """What is due after `step`.

    All processes agree on it at each step, before any of them waits for its device: this is where a process notices
    that another has died.
    """
    config, schedule, processes = run.config.run, run.schedule, run.context.processes
    time_to_save: int = processes.first and saver.due()
    signal, time_to_save = processes.most(stop.received, time_to_save)
    epoch, into_epoch = divmod(step, schedule.steps_per_epoch)
    last = step == schedule.last
    evaluate = bool(config.eval_every) and not into_epoch and epoch % config.eval_every == 0 and not last
    log = step % config.log_every == 0 or not into_epoch or last
    return Due(signal, log, bool(signal or time_to_save or evaluate or last), evaluate)


class RunHealth:
    """The figures that a run logs, and warnings where they say that it goes badly."""

    def __init__(self, run: Run) -> None:
        initial = run.folder / INITIAL
        pretrained = run.config.model.weights != "none" and run.schedule.last
        watched = pretrained and run.context.processes.first and initial.is_file()
        self.run = run
        before = initial if run.sample is None else run.sample
        self.encoder = (
            EncoderHealth(run.views.images, before, run.config.data.image_size, run.context) if watched else None
        )
        self.warnings = HealthWarnings(run.context, self.encoder.first_rank if self.encoder else 0.0)

    def record(self, step: int, loss: Tensor, losses: Losses, log: RunLog) -> None:
        """Log a step's figures; at the end of an epoch those of the encoder too. Waits for the device."""
        run, training, schedule = self.run, self.run.training, self.run.schedule
        epoch, into_epoch = divmod(step, schedule.steps_per_epoch)
        figures = training.figures(loss, losses) | log.meter.read()
        lr = run.config.optim.lr * schedule.share_of_rate(step)
        record = {"step": step, "epoch": step / schedule.steps_per_epoch, "lr": lr}
        record |= run.context.processes.mean(figures)
        if not into_epoch and self.encoder:
            record |= self.encoder.measure(training.encoder)
            log.meter.reset()
        log.record(record)
        if not into_epoch:
            log.epoch_done(record, epoch)
            self.warnings.look(record, losses.features[0, 0].numel())


def open_run(config: Config, resume: Path | None, context: Context, folders: ExitStack) -> Run:
    """Everything the loop needs; makes the run folder, or puts back what the run in `resume` last saved.

    The run folder is this run's alone until `folders` is closed.
    """
    processes = context.processes
    check_settings(config, context)
    if resume is None and config.run.dir:
        processes.once(partial(check_unused, config.run.dir))
    splits = splits_of(config)
    config = fit_sizes(config, splits.train, context)
    images = fingerprint(splits.train)
    if processes.most(images, -images) != [images, -images]:
        raise UsageError(f"{splits.train.root} holds other training images on one machine than on another")
    schedule = Schedule.of(config, len(splits.train))
    if resume is None:
        config = replace(config, model=with_own_colours(config.model, context.say))

    training = build(config, context, initial_weights=resume is None)
    views, config = make_views(config, splits.train, context)
    folder = processes.once(partial(claim_folder, config, resume, folders))
    context.say(f"run folder: {folder}")
    start = restore(folder, training, images, context) if resume else 0
    sample = begin(training, views.images, config, context) if resume is None else None
    training.moco.keep_frozen(context.dtype)
    if processes.first:
        if resume is None:
            save_weights(folder / INITIAL, training.encoder.state_dict(), describe(config))
        write_whole(folder / "config.yaml", partial(save_config, config))
        keep_records(folder / HISTORY, "epoch", start / schedule.steps_per_epoch)
    return Run(config, folder, start, sample, schedule, splits, views, training, context)


def fingerprint(images: ImageList) -> int:
    """A number of the list of files: another list is another order of the images."""
    return zlib.crc32("\n".join(images.files).encode(errors="surrogateescape"))


def restore(folder: Path, training: Training, images: int, context: Context) -> int:
    """Restore the newest whole save; returns the step after which it was made.

    `images` is the fingerprint of today's images. Only the first process reads the file. The number of processes may
    differ from before; then random draws of the model itself, such as dropout, differ too.
    """
    processes = context.processes
    state, file = processes.once(partial(load_resume, folder))
    if file.name != RESUME[0]:
        context.say(f"{folder / RESUME[0]} is missing or broken: resuming from {file.name}, step {state['step']}")
    if state.get("images") != images:
        raise UsageError(f"{file}: the training images are not those of this run: files came, went or moved")
    try:
        training.load_state(state)
        if processes.rank < len(state["random"]):
            set_random_states(state["random"][processes.rank])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} does not fit the settings of this run: {one_line(error)}") from None
    return state["step"]


def save(run: Run, saver: Saver, step: int) -> None:
    """Save weights.safetensors and resume.pt, as they are after `step`; no process goes on before."""
    processes, training = run.context.processes, run.training
    processes.share_statistics(training.encoder)
    random = processes.gather(random_states())

    def write() -> None:
        state = {"step": step, **training.state(), "random": random, "images": fingerprint(run.splits.train)}
        tuned = saver.facts.get("tuned", 1.0)
        saver.save(between(run.folder / INITIAL, training.encoder.state_dict(), tuned), state)

    processes.once(write)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr train`."""
    args = sys.argv[1:] if args is None else args
    with one_line_errors("train"), processes_of_torchrun(called("train")) as processes:
        config, resume = processes.once(partial(read_command_line, args))
        try:
            console = RunConsole(markup=False, emoji=False, quiet=not processes.first)
            if "--plan" in args:
                return plan(config, Context.of(config.run.device, config.run.precision, config.data.workers, console))
            train(config, resume=resume, console=console, started=process_age(), processes=processes)
        except torch.OutOfMemoryError:
            half = max(config.optim.batch_size // 2, 2)
            raise UsageError(f"out of GPU memory at --optim.batch_size {config.optim.batch_size}: try {half}") from None


if __name__ == "__main__":
    main()
