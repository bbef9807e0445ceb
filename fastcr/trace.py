"""`fastcr trace [PRESET] [--section.field value ...]`: where the time of a training step goes.

PyTorch's profiler records a few steps of the run that `fastcr train` would make. The times are added up by phase (the
ranges that the step names with `record_function`), and by kernel or operator.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastcr.arguments import TraceConfig, read_arguments
from fastcr.config import Config
from fastcr.data.loaders import make_views
from fastcr.data.synthetic import splits_of
from fastcr.errors import UsageError
from fastcr.method.build import Schedule, build, check_settings, fit_sizes
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context

TRACE, SUMMARY = "trace.json.gz", "phases.json"
SHOWN = 20  # kernels or operators
PLANNED = 5  # steps that an estimate is made of
WAITING = "waiting for data"
PHASES = (WAITING, "key forward", "query forward", "contrast", "fit", "backward", "optimiser", "EMA", "queue")
Row = dict[str, Any]


def prepare_step(config: Config, context: Context) -> Callable[[], None]:
    """A function that does one training step on the run's own batches; what only the first steps do is done."""
    images = splits_of(config).train
    config = fit_sizes(config, images, context)
    training = build(config, context)
    views, _ = make_views(config, images, context)
    batches = views.batches(0)

    def one_step() -> None:
        with record_function(WAITING):
            batch = next(batches)
        training.step(batch)

    repeat(one_step, 5 if config.run.cuda_graph else 2)
    return one_step


def plan(config: Config, context: Context) -> None:
    """Say what a run would take, by a few of its steps, of which nothing is left. `UsageError` as `train` has it."""
    images = splits_of(config).train
    schedule = Schedule.of(fit_sizes(config, images, context), len(images))
    ms = repeat(prepare_step(config, context), PLANNED)
    cuda = context.device.type == "cuda"
    used = torch.cuda.max_memory_reserved() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rest, pairs = timedelta(seconds=round(schedule.last * ms / 1e3)), config.optim.batch_size
    context.say(f"{len(images):,} training images: {schedule.last:,} steps of {pairs} in {config.optim.epochs} epochs")
    context.say(f"memory: {used / 2**30:.1f} GiB on {context.device}, besides what loader processes take")
    context.say(f"all steps: about {rest} ({ms / 1e3:.2f} s each); the start and the measuring at the end come on top")


def repeat(one_step: Callable[[], object], times: int) -> float:
    """Milliseconds of each of so many steps, until the device has done them."""
    start = time.perf_counter()
    for _ in range(times):
        one_step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3


def phase_rows(events: Sequence[Any], steps: int, step_ms: float) -> list[Row]:
    """Milliseconds a step of each phase and of the whole step, on the host and on the device.

    A phase's device time is that of the kernels whose launch began in it, for backward runs on a thread of its own.
    Kernels that no operator launched, those of the loader or of a replayed CUDA graph, count for the whole step only.
    """
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    operators = [event for event in on_host if not event.is_user_annotation]
    rows = list[Row]()
    for name in PHASES:
        spans = [event.time_range for event in on_host if event.is_user_annotation and event.name == name]
        begun = [event for event in operators if any(s.start <= event.time_range.start < s.end for s in spans)]
        device_us = sum(kernel.duration for event in begun for kernel in event.kernels)
        host_us = sum(span.elapsed_us() for span in spans)
        if spans:  # without a branch there is no fit
            rows.append({"name": name, "host_ms": host_us / steps / 1e3, "device_ms": device_us / steps / 1e3})
    device_us = sum(kernel.time_range.elapsed_us() for kernel in kernels)
    return [*rows, {"name": "whole step", "host_ms": step_ms, "device_ms": device_us / steps / 1e3}]


def trace(config: TraceConfig, context: Context) -> None:
    """Record a few steps of the run `config` describes; print and write where their time goes.

    Raises `UsageError` as `train` does, and where `--out` holds a trace already.
    """
    device, cuda = context.device, context.device.type == "cuda"
    check_settings(config, context)
    folder = config.out or Path("runs") / f"trace-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / TRACE).exists():
        raise UsageError(f"{folder} already holds a {TRACE}: name another --out")
    one_step = prepare_step(config, context)
    folder.mkdir(parents=True, exist_ok=True)
    step_ms = repeat(one_step, config.steps)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it begins, and that there is no GPU
    for steps in (1, config.steps):  # the first time the profiler itself takes its time
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
            recorded_ms = repeat(one_step, steps)
    profiler.export_chrome_trace(str(folder / TRACE))
    rows = phase_rows(profiler.events(), config.steps, recorded_ms)
    name = torch.cuda.get_device_name(device) if cuda else f"CPU (threads: {torch.get_num_threads()})"
    facts = {"device": name, "torch": torch.__version__, "dtype": str(context.dtype), "step_ms": step_ms}
    facts |= {"phases": rows, "settings": asdict(config)}
    (folder / SUMMARY).write_text(json.dumps(facts, indent=1, default=str) + "\n")
    phases = Table("phase", "host ms", *["device ms"] * cuda)
    for row in rows:
        phases.add_row(row["name"], f"{row['host_ms']:10,.3f}", *[f"{row['device_ms']:10,.3f}"] * cuda)
    took = f"{step_ms:.3g} ms; {recorded_ms:.3g} ms while recorded"
    context.say(f"{name}: a step of {config.optim.batch_size} pairs takes {took}")
    context.show(phases)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    context.say(profiler.key_averages().table(order, row_limit=SHOWN, max_name_column_width=64))
    context.say(f"{folder / TRACE}: open it in https://ui.perfetto.dev\n{folder / SUMMARY}: the phases")


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr trace`."""
    with one_line_errors("trace"):
        config: TraceConfig = read_arguments("trace", args)
        try:
            trace(config, Context.of(config.run.device, config.run.precision, config.data.workers))
        except torch.OutOfMemoryError:
            raise UsageError(f"out of GPU memory at --optim.batch_size {config.optim.batch_size}") from None


if __name__ == "__main__":
    main()
