"""`fastcr trace [PRESET] [--section.field value ...]`: where the time of a training step goes.

PyTorch's profiler records a few steps of the run that `fastcr train` would make. The times are added up by phase (the
ranges that the step names with `record_function`) and by kernel, on the CPU by operator. `--nvtx` marks the same phases
for Nsight instead.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastcr.arguments import TraceConfig, read_arguments
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.data.synthetic import write_synthetic
from fastcr.errors import UsageError
from fastcr.kernels.launch import triton
from fastcr.method.build import build, check_settings, fit_sizes
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context

TRACE, SUMMARY = "trace.json.gz", "phases.json"
KERNELS = 20  # listed
WAITING, BETWEEN, ELSEWHERE, WHOLE = "waiting for data", "between", "loader or CUDA graph", "whole step"
FORWARD = ("key forward", "query forward")
PHASES = (WAITING, *FORWARD, "contrast", "fit", "backward", "optimiser", "EMA", "queue")
Row = dict[str, Any]


def prepare_step(config: TraceConfig, context: Context) -> Callable[[], None]:
    """A function that does one training step on the run's own batches; what only the first steps do is done."""
    images = read_splits(config.data.root or write_synthetic()).train
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


def repeat(one_step: Callable[[], object], times: int) -> float:
    """Milliseconds of each of so many steps, until the device has done them."""
    start = time.perf_counter()
    for _ in range(times):
        one_step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3


def record(one_step: Callable[[], object], steps: int, cuda: bool, path: Path) -> profile:
    """Record `steps` steps, after one that is thrown away; the trace for a viewer goes to `path`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it begins, and that there is no GPU
    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda,
        schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for index in range(steps + 1):
            one_step() if 0 < index < steps else repeat(one_step, 1)
            profiler.step()
    return profiler


def phase_rows(events: Sequence[Any], steps: int, cuda: bool) -> list[Row]:
    """Milliseconds a step of each phase, of what lies between them, and of the whole step, from the profiler's events.

    A phase's device time is that of the kernels launched in it; on the CPU its operators' own time, without what Python
    adds. An operator belongs to the phase in which it begins, for backward runs on a thread of its own. Kernels that no
    operator launched are those of the loader or of a replayed CUDA graph.
    """
    host, device = Counter[str](), Counter[str]()
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    marks = [event.time_range for event in on_cpu if event.name.startswith("ProfilerStep")]
    ranges = [event for event in on_cpu if event.is_user_annotation and event.name in PHASES]
    for event in ranges:
        host[event.name] += event.time_range.elapsed_us()
    span = marks[-1].end - marks[0].start
    host[BETWEEN] = span - host.total()
    for event in on_cpu:
        if not event.is_user_annotation:
            at = event.time_range.start
            phase = next((r.name for r in ranges if r.time_range.start <= at < r.time_range.end), BETWEEN)
            device[phase] += sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    device[ELSEWHERE] = max(sum(event.time_range.elapsed_us() for event in kernels) - device.total(), 0)
    host[WHOLE], device[WHOLE] = span, device.total()

    names = [*(name for name in PHASES if host[name]), BETWEEN, *([ELSEWHERE] if device[ELSEWHERE] > 1 else []), WHOLE]
    return [
        {
            "name": name,
            "host_ms": host[name] / steps / 1e3,
            "device_ms": device[name] / steps / 1e3,
            "share": (device if cuda else host)[name] / span,
        }
        for name in names
    ]


def kernel_rows(profiler: profile, steps: int, step_ms: float, cuda: bool) -> list[Row]:
    """The kernels, on the CPU the operators, by the milliseconds a step that they take themselves."""
    rows = []
    for each in profiler.key_averages():
        if not each.is_user_annotation and (each.device_type != DeviceType.CPU) == cuda:
            ms = (each.self_device_time_total if cuda else each.self_cpu_time_total) / steps / 1e3
            rows.append({"name": each.key, "calls": each.count / steps, "device_ms": ms, "share": ms / step_ms})
    return sorted(rows, key=lambda row: -row["device_ms"])


def table(rows: Sequence[Row], what: str) -> Table:
    """Rows for people: a column for each of their keys, the name as `what`."""
    shown = Table(what, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    keys = [key for key in rows[0] if key != "name"]
    for key in keys:
        shown.add_column(key.replace("_", " "), justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row[key]:.1%}" if key == "share" else f"{row[key]:,.3f}" for key in keys]
        shown.add_row(row["name"][:64], *cells)
    return shown


def trace(config: TraceConfig, context: Context) -> None:
    """Record a few steps of the run `config` describes; print and write where their time goes.

    Raises `UsageError` as `train` does, and where `--out` holds a trace already.
    """
    device, cuda = context.device, context.device.type == "cuda"
    if config.nvtx and not cuda:
        raise UsageError(f"--nvtx needs CUDA, and this run is on {device}")
    if config.data.root is None and config.preset != "synthetic":
        raise UsageError(f"preset {config.preset} needs --data.root, the folder of its images")
    check_settings(config, context)
    folder = config.out or Path("runs") / f"trace-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / TRACE).exists():
        raise UsageError(f"{folder} already holds a {TRACE}: name another --out")
    one_step = prepare_step(config, context)
    if config.nvtx:  # between the marks that `nsys --capture-range=cudaProfilerApi` waits for
        with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx():
            repeat(one_step, config.steps)
        return
    folder.mkdir(parents=True, exist_ok=True)
    step_ms = repeat(one_step, config.steps)
    profiler = record(one_step, config.steps, cuda, folder / TRACE)
    phases = phase_rows(profiler.events(), config.steps, cuda)
    recorded_ms = phases[-1]["host_ms"]
    kernels = kernel_rows(profiler, config.steps, recorded_ms, cuda)
    name = torch.cuda.get_device_name(device) if cuda else f"CPU (threads: {torch.get_num_threads()})"
    facts = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "dtype": str(context.dtype).removeprefix("torch."),
        "step_ms": step_ms,
        "recorded_step_ms": recorded_ms,
        "phases": phases,
        "kernels": kernels,
        "settings": asdict(config),
    }
    (folder / SUMMARY).write_text(json.dumps(facts, indent=1, default=str) + "\n")
    took = f"{step_ms:.3g} ms; {recorded_ms:.3g} ms while recorded"
    context.say(f"{name}: a step of {config.optim.batch_size} pairs takes {took}\n")
    context.console.print(table(phases, "phase"))
    context.say(f"\ndevice ms: {'of the kernels' if cuda else 'in operators, without what Python adds'}\n")
    context.console.print(table(kernels[:KERNELS], "kernel" if cuda else "operator"))
    context.say(f"\n{folder / TRACE}: open it in https://ui.perfetto.dev\n{folder / SUMMARY}: these figures")


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
