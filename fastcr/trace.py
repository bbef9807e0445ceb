"""`python -m fastcr.trace [PRESET] [--section.field value ...]`: where the time of a training step goes.

A few steps of the run that `fastcr.train` would make are recorded by PyTorch's profiler, and each phase is held against
the least it could take (`budget.py`). On CUDA a phase's device time is that of the kernels launched in it, also those
that autograd's own thread launches meanwhile; on the CPU it is the operators' own time, without what Python adds.

`--nvtx` marks the same ranges for Nsight (nsys, ncu) instead; `--resources` is in `resources.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from bench.budget import Ceilings, step_work
from bench.profiled import WAITING, Row, kernel_rows, phase_rows, take_apart
from bench.resources import resources, resources_table
from bench.timing import copy_bandwidth, matmul_rate
from fastcr.config import Config, tyro, validate
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.data.synthetic import write_synthetic
from fastcr.errors import UsageError
from fastcr.kernels.launch import triton
from fastcr.method.build import build, check_settings, pick_dtype
from fastcr.runs.command_line import one_line_errors, parse, read_command_line
from fastcr.runs.machine import pick_device
from fastcr.train import check_sizes

TRACE, SUMMARY = "trace.json.gz", "phases.json"
KERNELS = 20  # listed


@dataclass(frozen=True)
class TraceConfig(Config):
    """Settings of a trace, and of the training run it records."""

    steps: int = 5
    """Steps to record, after the first ones."""
    out: Path | None = None
    """Folder of trace.json.gz and phases.json. Default: runs/trace-<date>-<time>."""
    nvtx: tyro.conf.UseCounterAction[int] = 0
    """Mark the phases and operators for Nsight Systems and Nsight Compute, and record nothing here."""
    resources: tyro.conf.UseCounterAction[int] = 0
    """Compile every kernel; print registers, spills, shared memory, tensor-core instructions and occupancy."""
    every: tyro.conf.UseCounterAction[int] = 0
    """Compile for every row of the launch settings and every dtype, not only for the usual sizes; minutes a target."""
    target: tuple[int, ...] = ()
    """Compute capabilities to compile for, 90 for 9.0. Default: all that the installed Triton compiles for."""


def phase_table(rows: Sequence[Row], ceilings: Ceilings, cuda: bool) -> Table:
    """The phases for people."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    device = "device ms" if cuda else "in ops ms"
    for name in ("phase", "host ms", device, "GB", "GFLOP", "floor ms", "x floor", "share"):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    for row in rows:
        cells = [row.name, "" if row.host_ms is None else number(row.host_ms), number(row.device_ms)]
        if row.work and (least := row.floor_ms(ceilings)):
            values = row.work.bytes / 1e9, row.work.flops / 1e9, least, row.device_ms / least
            cells += [number(value) for value in values]
        else:
            cells += [""] * 4
        table.add_row(*cells, f"{row.share:.1%}", end_section=row is rows[-2])
    return table


def kernel_table(rows: Sequence[Row], ceilings: Ceilings, cuda: bool) -> Table:
    """The longest kernels for people; the rate is the one of bytes and FLOPs that is nearer to its ceiling."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, expand=True)
    table.add_column("kernel" if cuda else "operator", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ("calls", "ms", "share", "rate", "of ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:KERNELS]:
        rate, reached, least = "", "", row.floor_ms(ceilings)
        if row.work and least:
            of_bytes = row.work.bytes / ceilings.copy >= row.work.flops / ceilings.matmul
            amount, unit = (row.work.bytes, "B/s") if of_bytes else (row.work.flops, "FLOP/s")
            rate, reached = per_second(amount / row.timed_ms * 1e3) + unit, f"{least / row.timed_ms:.0%}"
        table.add_row(row.name, f"{row.calls:g}", number(row.device_ms), f"{row.share:.1%}", rate, reached)
    return table


def number(value: float) -> str:
    """Three digits, more before the point."""
    if 0 < value < 0.001:
        return "<.001"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def per_second(rate: float) -> str:
    """A rate with the prefix of its unit: `3.2 T`."""
    return f"{number(rate / 1e12)} T" if rate >= 1e12 else f"{number(rate / 1e9)} G"


def as_json(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    """A row for `phases.json`; times in milliseconds a step, work of a step."""
    least = row.floor_ms(ceilings)
    facts = {**row._asdict(), "floor_ms": least, "times_floor": row.timed_ms / least if least else None}
    return facts | {"work": row.work._asdict() if row.work else None}


def record(one_step: Callable[[], Any], steps: int, device: torch.device, path: Path) -> None:
    """Run and record `steps` steps, and one before them that is thrown away; the Chrome trace goes to `path`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports on stderr that it begins, and that there is no GPU
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
        record_shapes=True,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for index in range(steps + 1):
            one_step()
            if index in (0, steps):
                finish(device)
            profiler.step()


def mark(one_step: Callable[[], Any], steps: int, device: torch.device) -> None:
    """Run `steps` steps with NVTX ranges, between the marks that `nsys --capture-range=cudaProfilerApi` waits for."""
    finish(device)
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx():
        for _ in range(steps):
            one_step()
        finish(device)


def milliseconds(one_step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Of one of `steps` steps that nothing records."""
    finish(device)
    start = time.perf_counter()
    for _ in range(steps):
        one_step()
    finish(device)
    return (time.perf_counter() - start) / steps * 1e3


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare_step(config: TraceConfig, device: torch.device, dtype: torch.dtype, console: Console) -> Callable[[], None]:
    """What a training step calls, on its own batches, with everything done that only the first steps do."""
    images = read_splits(config.data.root or write_synthetic()).train
    check_sizes(config, images, console)
    step_on = build(config, device, console).step
    views, _ = make_views(config, images, device, dtype, console)
    batches = views.batches(0)

    def one_step() -> None:
        with record_function(WAITING):
            batch = next(batches)
        step_on(batch)

    for _ in range(5 if config.run.cuda_graph else 2):
        one_step()
    return one_step


def trace(config: TraceConfig, console: Console) -> None:
    """Record a few steps of the run `config` describes; print and write where their time goes.

    Raises `UsageError` as `train` does, and where `--out` holds a trace already.
    """
    device = pick_device(config.run.device)
    cuda, dtype = device.type == "cuda", pick_dtype(config.run.precision, device)
    if config.nvtx and not cuda:
        raise UsageError(f"--nvtx needs CUDA, and this run is on {device}")
    if config.data.root is None and config.preset != "synthetic":
        raise UsageError(f"preset {config.preset} needs --data.root, the folder of its images")
    check_settings(config, device, console)
    if config.nvtx:
        mark(prepare_step(config, device, dtype, console), config.steps, device)
        return
    folder = config.out or Path("runs") / f"trace-{time.strftime('%Y%m%d-%H%M%S')}"
    if taken := [name for name in (TRACE, SUMMARY) if (folder / name).exists()]:
        raise UsageError(f"{folder} already holds a {taken[0]}: name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    work = step_work(config, dtype)
    ceilings = Ceilings(copy_bandwidth(device), matmul_rate(device, dtype))
    one_step = prepare_step(config, device, dtype, console)
    plain_ms = milliseconds(one_step, config.steps, device)
    record(one_step, config.steps, device, folder / TRACE)

    with gzip.open(folder / TRACE) as file:
        recorded = take_apart(json.load(file)["traceEvents"], [WAITING, *work])
    phases, kernels = phase_rows(recorded, work, graph=config.run.cuda_graph), kernel_rows(recorded)
    facts = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU (threads: {torch.get_num_threads()})",
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": config.steps,
        "step_ms": plain_ms,
        "recorded_step_ms": recorded.span / recorded.steps / 1e3,
        "ceilings": {"copy_bytes_per_second": ceilings.copy, "matmul_flops_per_second": ceilings.matmul},
        "phases": [as_json(row, ceilings) for row in phases],
        "kernels": [as_json(row, ceilings) for row in kernels],
        "settings": asdict(Config(**{field.name: getattr(config, field.name) for field in fields(Config)})),
    }
    (folder / SUMMARY).write_text(json.dumps(facts, indent=1, default=str) + "\n")

    say = partial(console.print, highlight=False)
    copies, products = per_second(ceilings.copy), per_second(ceilings.matmul)
    say(f"\n{facts['device']}: {copies}B/s in a copy, {products}FLOP/s in a {facts['dtype']} product")
    took = f"{number(plain_ms)} ms; {number(recorded.span / recorded.steps / 1e3)} ms while recorded"
    say(f"a step of {config.optim.batch_size} pairs: {took}\n")
    console.print(phase_table(phases, ceilings, cuda))
    say("\nfloor: the least bytes at the copy's rate, or the FLOPs at the product's")
    say("waiting: until the next batch is there")
    console.print("", kernel_table(kernels, ceilings, cuda), "", sep="\n")
    say(f"{folder / TRACE}: open it in https://ui.perfetto.dev", soft_wrap=True)
    say(f"{folder / SUMMARY}: these figures", soft_wrap=True)


def read_settings(args: Sequence[str]) -> TraceConfig:
    """`[PRESET] [--section.field value ...]` and the flags of a trace to settings."""
    preset = list(args[: bool(args and not args[0].startswith("-"))])
    default, _ = read_command_line(preset)
    config = parse(
        TraceConfig,
        args[len(preset) :],
        default=TraceConfig(**vars(default)),
        prog="python -m fastcr.trace [PRESET]",
        description="Where the time of a training step goes, phase by phase and kernel by kernel.",
    )
    validate(config)
    if config.steps < 1:
        raise UsageError("--steps must be at least 1")
    if (config.every or config.target) and not config.resources:
        raise UsageError("--every and --target go with --resources")
    return config


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.trace`."""
    with one_line_errors("trace"):
        config = read_settings(sys.argv[1:] if args is None else args)
        if config.resources:
            table = resources_table(resources(config.target, bool(config.every)))
            Console(width=max(Console().width, 132)).print(table)
            return
        try:
            trace(config, Console(markup=False))
        except torch.OutOfMemoryError:
            raise UsageError(f"out of GPU memory at --optim.batch_size {config.optim.batch_size}") from None


if __name__ == "__main__":
    main()
