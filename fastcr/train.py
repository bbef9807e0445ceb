"""`python -m fastcr.train [PRESET] [--section.field value ...]`, `python -m fastcr.train --resume RUN`.

In several processes: `torchrun --nproc-per-node N -m fastcr.train ...`.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastcr.checkpoint import (
    Saver,
    has_resume,
    load_resume,
    random_states,
    save_weights,
    set_random_states,
    write_whole,
)
from fastcr.cli import one_line_errors, save_config
from fastcr.config import Config, UsageError
from fastcr.distributed import ALONE, Processes, processes_of_torchrun
from fastcr.embed import Branch, weights_facts, weights_of
from fastcr.folders import ImageList, read_splits
from fastcr.loaders import make_views
from fastcr.machine import pick_device, pick_workers, process_age
from fastcr.measuring import HISTORY, TrainingEvaluation
from fastcr.presets import read_command_line
from fastcr.rationale import attention_entropy
from fastcr.runlog import HealthWatch, LossWatch, Meter, RunLog, StopSignal, keep_records
from fastcr.step import Losses, cosine_lr
from fastcr.synthetic import write_synthetic
from fastcr.training import Training, check_device, compiles, pick_dtype, prepare, trained
from fastcr.views import step_indices


def train(
    config: Config, console: Console, resume: Path | None = None, *, started: float = 0.0, processes: Processes = ALONE
) -> Path:
    """Train as `config` says, or go on with the run in the folder `resume`; returns the run folder.

    `started` is how many seconds ago the command began, for the time to the first step. Of several processes only the
    first prints and writes.
    Raises `UsageError` for settings, data or files that cannot work; `SystemExit` 143 or 130 after a SIGTERM or SIGINT,
    with everything saved.
    """
    began = time.monotonic() - started
    device = pick_device(config.run.device, processes.local_rank, processes.local_ranks)
    if config.data.root is None and config.preset != "synthetic":
        raise UsageError(f"preset {config.preset} needs --data.root, the folder of its images")
    check_device(config, device, console, processes)
    if resume is None and config.run.dir:
        processes.once(partial(check_unused, config.run.dir))
    splits = read_splits(config.data.root or write_synthetic())
    steps_per_epoch = check_sizes(config, splits.train, console)
    total_steps = config.optim.epochs * steps_per_epoch
    last_step = min(total_steps, config.run.steps or total_steps)
    images = fingerprint(splits.train)
    if processes.most(images, -images) != [images, -images]:
        raise UsageError(f"{splits.train.root} holds other training images on one machine than on another")

    training = prepare(config, device, console, initial_weights=resume is None, processes=processes)
    moco, branch, model, optimizer, rates, scaler, step_on = training
    dtype = pick_dtype(config.run.precision, device)
    views, config = make_views(config, splits.train, device, dtype, console, processes)
    facts = weights_facts(config.model, config.rationale, config.released, config.data.image_size)
    folder = resume or processes.once(partial(new_folder, config))
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
    start_step = restore(folder / "resume.pt", training, images, processes, console) if resume else 0
    if processes.first:
        if resume is None:
            save_weights(folder / "init.safetensors", weights_of(moco.backbone, branch), facts)
        write_whole(folder / "config.yaml", partial(save_config, config))
        keep_records(folder / HISTORY, "epoch", start_step / steps_per_epoch)
    workers = pick_workers(config.data.workers, processes.local_ranks)
    evaluation = TrainingEvaluation(folder, splits, device, workers, console, processes)
    saver = Saver(folder, facts, config.run.keep)

    def save(step: int) -> None:
        watch.check()
        random = processes.gather(random_states())
        if processes.first:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"scaler": scaler.state_dict(), "random": random, "images": images}
            saver.save(weights_of(moco.backbone, branch), state)

    log = RunLog(
        folder,
        console,
        start_step=start_step,
        last_step=last_step,
        steps_per_epoch=steps_per_epoch,
        writes=processes.first,
    )
    parameters, files_of = trained(optimizer), partial(files_of_step, config, splits.train)
    watch, health = LossWatch(parameters, start_step, folder, files_of, processes), HealthWatch(console, config)
    saved_at, stopped = time.monotonic(), 0
    with log, StopSignal() as stop:
        batches, meter, ready = views.batches(start_step), Meter(), time.monotonic()
        for step in range(start_step + 1, last_step + 1):
            with meter.waiting():
                batch = next(batches)
            lr = cosine_lr(config.optim.lr, step - 1, total_steps)
            for part, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
                held = part == 0 and step <= config.optim.backbone_warmup * steps_per_epoch
                group["lr"].fill_(0.0 if held else cosine_lr(rate, step - 1, total_steps))
            loss, losses = step_on(batch)
            due: int = time.monotonic() - saved_at >= 60 * config.run.save_minutes
            # all processes alike; before anything waits for the device, where a lost one would not be noticed
            stopped, due = processes.most(stop.received, due and processes.first)
            watch.add(loss, gradient_norm(parameters, scaler))
            if step == start_step + 1:
                loss.item()  # waits for the device
                since, compiled = time.monotonic() - began, " and its compilation" * compiles(config, device)
                took = f"{since:.1f} s after the start, {time.monotonic() - ready:.1f} s of it the step{compiled}"
                console.print(f"first step done {took}", highlight=False, soft_wrap=True)
            meter.images += len(batch.first) * processes.ranks
            log.advance(step, config.optim.epochs)

            epoch, epoch_ends = step // steps_per_epoch, step % steps_per_epoch == 0
            if step % config.run.log_every == 0 or epoch_ends or step == last_step:
                watch.check()
                measured = {"loss": loss.item()} | metrics_of(losses, branch) | meter.read()
                record = {"step": step, "epoch": step / steps_per_epoch, "lr": lr} | processes.mean(measured)
                log.record(record)
                if epoch_ends:
                    log.epoch_done(record, epoch, config.optim.epochs)
                    health.look(record, losses.features[0, 0].numel())
            saver.check()
            evaluates = epoch_ends and step < last_step and config.run.eval_every and epoch % config.run.eval_every == 0
            if stopped or step == last_step or due or evaluates:
                processes.share_statistics(moco.backbone, branch)
                save(step)
                saved_at = time.monotonic()
            if stopped:
                break
            if evaluates:
                evaluation.during(moco.backbone, branch, config.data.image_size, epoch)
                meter.reset()
        processes.once(saver.wait)  # before signals end the process again, and before the others go
    if stopped:
        go_on = f"stopped at step {step}; to go on: python -m fastcr.train --resume {folder}"
        console.print(go_on, soft_wrap=True, highlight=False)
        raise SystemExit(128 + stopped)
    del batches  # its processes and memory are not needed any more
    if bad := set().union(*processes.gather(views.bad.files)):
        console.print(f"{len(bad)} unreadable training images were passed over", highlight=False)
    evaluation.at_the_end()
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
    return folder


def check_sizes(config: Config, images: ImageList, console: Console) -> int:
    """Steps of an epoch. `UsageError` where a batch is larger than the data; a warning where the queue is."""
    batch_size = config.optim.batch_size
    if len(images) < batch_size:
        raise UsageError(f"{images.root} has {len(images)} training images: set --optim.batch_size to at most that")
    if config.moco.queue_size > len(images):
        console.print(
            f"warning: the queue ({config.moco.queue_size}) is larger than the data set ({len(images)} images): "
            "stale keys of the same images become negatives",
            highlight=False,
        )
    return len(images) // batch_size


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder already holds a run; asked before anything is loaded or decoded."""
    if has_resume(folder / "resume.pt"):
        raise UsageError(f"{folder} already holds a run: go on with --resume {folder}, or name another --run.dir")


def new_folder(config: Config) -> Path:
    """Make the run folder. `UsageError` if it cannot be made."""
    folder = config.run.dir or Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=config.run.dir is not None)
        save_config(config, folder / "config.yaml")  # here, to find out early that it can be written
    except OSError as error:
        raise UsageError(f"cannot write into --run.dir {folder}: {error.strerror}") from None
    return folder


def files_of_step(config: Config, images: ImageList, step: int) -> list[str]:
    """The files of the images that `step` (from 1) trains on, in their order."""
    _, indices = step_indices(len(images), config.optim.batch_size, config.run.seed, step - 1)
    return [images.path(int(index)) for index in indices]


def fingerprint(images: ImageList) -> int:
    """A number of the list of files: another list is another order of the images."""
    return zlib.crc32("\n".join(images.files).encode(errors="surrogateescape"))


def restore(path: Path, training: Training, images: int, processes: Processes, console: Console) -> int:
    """Put the newest whole save back; returns the step it was made after.

    `images` is the fingerprint of today's images. Only the first process reads the file. With another number of
    processes than before, the run goes on with the same images, order, augmentation, queue and schedule; what changes
    are the groups of `--model.batchnorm local`, and random draws of the model itself, such as dropout.
    """
    state, file = processes.once(partial(load_resume, path))
    if file != path:
        console.print(f"{path} is missing or broken: going on from {file.name}, step {state['step']}", soft_wrap=True)
    optimizer = training.optimizer
    if state.get("images") != images:
        raise UsageError(f"{path}: the training images are not those of this run: files came, went or moved")
    try:
        training.model.load_state_dict(state["model"])
        # momentum comes back; the settings are today's
        optimizer.load_state_dict({**state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
        training.scaler.load_state_dict(state["scaler"])
        random = state["random"] if isinstance(state["random"], list) else [state["random"]]
        if processes.rank < len(random):
            set_random_states(random[processes.rank])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} does not fit the settings of this run: {reason}") from None
    return state["step"]


def gradient_norm(parameters: Sequence[Tensor], scaler: torch.amp.GradScaler) -> Tensor | None:
    """Norm of the step's gradient, a scalar; None with loss scaling, whose gradients may be infinite now and then."""
    if scaler.is_enabled():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)


def metrics_of(losses: Losses, branch: Branch | None) -> dict[str, float]:
    """Losses and the state of health of embeddings and branch, read from the device."""
    # unit vectors that lie everywhere have a variance of nearly 1 in all; those of a collapsed encoder 0
    spread = losses.key.var(0, correction=0).sum().sqrt()
    metrics = {"contrast_loss": losses.contrast.item(), "embedding_spread": spread.item()}
    if branch is not None and losses.fit is not None and losses.attention is not None:
        metrics["fit_loss"] = losses.fit.item()
        if losses.pooled is not None:
            metrics["pooled_contrast_loss"] = losses.pooled.item()
        metrics["attention_entropy"] = attention_entropy(losses.attention).item()
        metrics["effective_detectors"] = branch.effective_detectors(losses.features).item()
    return metrics


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.train`."""
    with one_line_errors("fastcr.train"), processes_of_torchrun("fastcr.train") as processes:
        config, resume = processes.once(partial(read_command_line, sys.argv[1:] if args is None else args))
        try:
            console = Console(markup=False, quiet=not processes.first)
            train(config, console, resume, started=process_age(), processes=processes)
        except torch.OutOfMemoryError:
            half = max(config.optim.batch_size // 2, 2)
            raise UsageError(f"out of GPU memory at --optim.batch_size {config.optim.batch_size}: try {half}") from None


if __name__ == "__main__":
    main()
