"""`fastcr train [PRESET] [--section.field value ...]`, `fastcr train --resume RUN`: train an encoder.

In several processes: `torchrun --nproc-per-node N -m fastcr.train ...`. In Python: `train(preset("cub200"))`.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastcr.config import Config
from fastcr.data.images import ImageList, Splits
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.data.synthetic import write_synthetic
from fastcr.data.views import Views, step_indices
from fastcr.errors import UsageError, one_line
from fastcr.measures.embeddings import ddt_detectors
from fastcr.measures.evaluation import HISTORY, TrainingEvaluation
from fastcr.measures.health import EncoderHealth
from fastcr.method.build import Schedule, Training, build, check_settings, compiles, fit_sizes, trained
from fastcr.method.cached_features import CachedFeatures
from fastcr.method.encoder import describe
from fastcr.method.objectives import QUEUED
from fastcr.method.rationale import attention_entropy
from fastcr.method.step import Losses, cosine_lr
from fastcr.runs.checkpoint import (
    Saver,
    check_unused,
    load_resume,
    random_states,
    save_weights,
    set_random_states,
    write_whole,
)
from fastcr.runs.command_line import called, one_line_errors, read_command_line, save_config
from fastcr.runs.distributed import ALONE, Processes, processes_of_torchrun
from fastcr.runs.folder import claim_folder
from fastcr.runs.log import Meter, RunLog, keep_records
from fastcr.runs.machine import pick_device, pick_dtype, pick_workers, process_age
from fastcr.runs.sinks import check_tracker
from fastcr.runs.validate import validate
from fastcr.runs.watch import HealthWatch, LossWatch, RunConsole, StopSignal


@dataclass(frozen=True)
class Run:
    """A run that is about to begin, or to be resumed."""

    config: Config
    folder: Path
    start: int  # steps it has done before
    schedule: Schedule
    splits: Splits
    views: Views
    training: Training
    device: torch.device
    dtype: torch.dtype  # of the encoders
    console: Console
    processes: Processes


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
    began, console = time.monotonic() - started, console or Console(markup=False)
    with ExitStack() as folders:
        run = open_run(validate(config), Path(resume) if resume else None, console, processes, folders)
        return carry_out(run, began)


def carry_out(run: Run, began: float) -> Path:
    """Train and evaluate; returns the run folder."""
    config, console, processes = run.config, run.console, run.processes
    workers = pick_workers(config.data.workers, processes.local_ranks)
    how = (run.folder, run.splits, run.device, run.dtype, workers, console, processes)
    evaluation = TrainingEvaluation(*how, knn=bool(config.run.eval_every))
    last, epoch_steps = run.schedule.last, run.schedule.steps_per_epoch
    logged = {"start": run.start, "last": last, "steps_per_epoch": epoch_steps}
    with RunLog(run.folder, config, console, **logged, writes=processes.first) as log:
        if stopped := run_steps(run, evaluation, log, began):
            raise SystemExit(128 + stopped)
        if bad := set().union(*processes.gather(run.views.bad.files)):
            console.print(f"{len(bad)} unreadable training images were skipped", highlight=False)
        with log.paused():
            log.evaluated(last, *evaluation.at_the_end(run.training.encoder))
    console.print(f"run folder: {run.folder}", soft_wrap=True, highlight=False)
    return run.folder


def run_steps(run: Run, evaluation: TrainingEvaluation, log: RunLog, began: float) -> int:
    """The training loop; returns the number of the signal that ended it early, or 0."""
    config, training, schedule, processes = run.config, run.training, run.schedule, run.processes
    stopped, every, epoch_steps = 0, config.run.eval_every, schedule.steps_per_epoch
    files_of = partial(files_of_step, config, run.splits.train)
    watch = LossWatch(trained(training.optimizer), run.start, run.folder, files_of, processes)
    health, saver = HealthWatch(run.console), Saver(run.folder, describe(config), config.run.keep)
    initial, pretrained = run.folder / "init.safetensors", config.model.weights != "none" and schedule.last
    watched = pretrained and processes.first and initial.is_file()
    before = EncoderHealth(run.views.images, initial, run.device, run.dtype) if watched else None
    with StopSignal() as stop, closing(run.views.batches(run.start)) as batches:
        if not run.start and schedule.last and config.moco.objective in QUEUED:  # with views that no step will see
            with closing(run.views.batches(schedule.total)) as unseen:
                training.fill_queue(unseen)
        meter, ready = Meter(), time.monotonic()
        for step in range(run.start + 1, schedule.last + 1):
            with meter.waiting():
                batch = next(batches)
            training.set_learning_rates(step, schedule, config.optim.backbone_warmup)
            loss, losses = training.step(batch)
            meter.images += len(batch.first) * processes.ranks

            # in every process, and before anything waits for the device: there a lost process would not be noticed
            due: int = processes.first and saver.due(config.run.save_minutes)
            stopped, due = processes.most(stop.received, due)
            watch.add(loss, training.gradient_norm())
            if step == run.start + 1:
                say_first_step(run, loss, began, ready)
            log.advance(step)

            epoch, epoch_ends = step // epoch_steps, step % epoch_steps == 0
            if step % config.run.log_every == 0 or epoch_ends or step == schedule.last:
                watch.check()
                measured = processes.mean({"loss": loss.item()} | metrics_of(losses, training) | meter.read())
                lr = cosine_lr(config.optim.lr, step - 1, schedule.total)
                record = {"step": step, "epoch": step / epoch_steps, "lr": lr} | measured
                if epoch_ends and before:
                    record |= before.measure(training.encoder)
                    meter.reset()
                log.record(record)
                if epoch_ends:
                    log.epoch_done(record, epoch)
                    health.look(record, losses.features[0, 0].numel(), before.first_rank if before else 0.0)

            saver.check()
            evaluates = every and epoch_ends and epoch % every == 0 and step < schedule.last
            if stopped or due or evaluates or step == schedule.last:
                processes.share_statistics(training.encoder)
                watch.check()
                save(run, saver, step)
            if stopped:
                break
            if evaluates:
                with log.paused():
                    log.evaluated(step, *evaluation.during(training.encoder, epoch))
                meter.reset()
        if run.start == schedule.last == 0:  # nothing to train: the start is what is saved
            save(run, saver, 0)
        processes.once(saver.wait)  # before signals end the process again, and before the others go
    if stopped:
        how = f"stopped at step {step}; resume with: {called('train')} --resume {run.folder}"
        run.console.print(how, soft_wrap=True, highlight=False)
    return stopped


def open_run(config: Config, resume: Path | None, console: Console, processes: Processes, folders: ExitStack) -> Run:
    """Everything the loop needs; makes the run folder, or puts back what the run in `resume` last saved.

    The run folder is this run's alone until `folders` is closed.
    """
    device = pick_device(config.run.device, processes.local_rank, processes.local_ranks)
    if config.data.root is None and config.preset != "synthetic":
        raise UsageError(f"preset {config.preset} needs --data.root, the folder of its images")
    check_tracker(config.run.track)
    check_settings(config, device, console, processes)
    if resume is None and config.run.dir:
        processes.once(partial(check_unused, Path(config.run.dir)))
    splits = read_splits(config.data.root or write_synthetic())
    config = fit_sizes(config, splits.train, console)
    images = fingerprint(splits.train)
    if processes.most(images, -images) != [images, -images]:
        raise UsageError(f"{splits.train.root} holds other training images on one machine than on another")
    schedule = Schedule.of(config, len(splits.train))

    training = build(config, device, console, initial_weights=resume is None, processes=processes)
    dtype = pick_dtype(config.run.precision, device)
    views, config = make_views(config, splits.train, device, dtype, console, processes)
    folder = processes.once(partial(claim_folder, config, resume, folders))
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
    start = restore(folder / "resume.pt", training, images, processes, console) if resume else 0
    if (branch := training.encoder.branch) and resume is None and config.rationale.init == "ddt":
        detectors = partial(ddt_detectors, training.encoder, views.images, config.run.seed, device=device, dtype=dtype)
        workers = pick_workers(config.data.workers)
        found = processes.once(lambda: detectors(workers=workers, console=console))
        branch.load_state_dict(found)
    if config.optim.cached_views and start < schedule.last:
        views = CachedFeatures(views, training.moco, config, training.autocast, console)
    if processes.first:
        if resume is None:
            save_weights(folder / "init.safetensors", training.encoder.state_dict(), describe(config))
        write_whole(folder / "config.yaml", partial(save_config, config))
        keep_records(folder / HISTORY, "epoch", start / schedule.steps_per_epoch)
    return Run(config, folder, start, schedule, splits, views, training, device, dtype, console, processes)


def fingerprint(images: ImageList) -> int:
    """A number of the list of files: another list is another order of the images."""
    return zlib.crc32("\n".join(images.files).encode(errors="surrogateescape"))


def restore(path: Path, training: Training, images: int, processes: Processes, console: Console) -> int:
    """Restore the newest whole save; returns the step it was made after.

    `images` is the fingerprint of today's images. Only the first process reads the file. With another number of
    processes than before, the run continues with the same images, order, augmentation, queue and schedule; what changes
    are the groups of `--model.batchnorm local`, and random draws of the model itself, such as dropout.
    """
    state, file = processes.once(partial(load_resume, path))
    if file != path:
        console.print(f"{path} is missing or broken: resuming from {file.name}, step {state['step']}", soft_wrap=True)
    if state.get("images") != images:
        raise UsageError(f"{path}: the training images are not those of this run: files came, went or moved")
    try:
        training.load_state(state)
        random = state["random"] if isinstance(state["random"], list) else [state["random"]]
        if processes.rank < len(random):
            set_random_states(random[processes.rank])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} does not fit the settings of this run: {one_line(error)}") from None
    return state["step"]


def save(run: Run, saver: Saver, step: int) -> None:
    """Begin to save weights.safetensors and resume.pt, as they are after `step`."""
    random = run.processes.gather(random_states())
    if run.processes.first:
        state = {"step": step, **run.training.state(), "random": random, "images": fingerprint(run.splits.train)}
        saver.save(run.training.encoder.state_dict(), state)


def files_of_step(config: Config, images: ImageList, step: int) -> list[str]:
    """The files of the images that `step` (from 1) trains on, in their order."""
    _, indices = step_indices(len(images), config.optim.batch_size, config.run.seed, step - 1)
    return [images.path(int(index)) for index in indices]


def say_first_step(run: Run, loss: Tensor, began: float, ready: float) -> None:
    """Print how long the first step took; waits for the device."""
    loss.item()
    compiled = " and its compilation" * compiles(run.config, run.device)
    since, step = time.monotonic() - began, time.monotonic() - ready
    took = f"first step done {since:.1f} s after the start, {step:.1f} s of it the step{compiled}"
    run.console.print(took, highlight=False, soft_wrap=True)


def metrics_of(losses: Losses, training: Training) -> dict[str, float]:
    """Losses and the state of health of embeddings and branch, read from the device."""
    # unit vectors that lie everywhere have a variance of nearly 1 in all; those of a collapsed encoder 0
    spread = losses.key.var(0, correction=0).sum().sqrt()
    metrics = {"contrast_loss": losses.contrast.item(), "embedding_spread": spread.item()}
    branch = training.encoder.branch
    if losses.fit is not None:
        metrics["fit_loss"] = losses.fit.item()
    if branch is not None:  # one that is not fitted has not been asked where it looks
        attention = branch.pool(losses.features).attention if losses.attention is None else losses.attention
        metrics["attention_entropy"] = attention_entropy(attention).item()
        metrics["effective_detectors"] = branch.effective_detectors(losses.features).item()
    return metrics


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr train`."""
    with one_line_errors("train"), processes_of_torchrun(called("train")) as processes:
        config, resume = processes.once(partial(read_command_line, sys.argv[1:] if args is None else args))
        try:
            console = RunConsole(markup=False, quiet=not processes.first)
            train(config, resume=resume, console=console, started=process_age(), processes=processes)
        except torch.OutOfMemoryError:
            half = max(config.optim.batch_size // 2, 2)
            raise UsageError(f"out of GPU memory at --optim.batch_size {config.optim.batch_size}: try {half}") from None


if __name__ == "__main__":
    main()
