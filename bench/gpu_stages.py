"""The stages of `on_gpu.py` that are not pytest's: facts of the machine, a trace, a short training, launch settings.

`python bench/gpu_stages.py DIR [--rehearse] STAGE` runs one of them within FASTCR_STAGE_SECONDS.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench import tune as search
from bench.on_gpu import GRACE, ROOT, write
from bench.timing import time_on_gpu
from bench.workloads import Workload
from fastcr.arguments import TraceConfig
from fastcr.config import Config, DataConfig, RunConfig
from fastcr.data.synthetic import CLASSES, draw_bird
from fastcr.errors import UsageError
from fastcr.kernels.launch import triton
from fastcr.kernels.settings import TABLE
from fastcr.presets import tuned
from fastcr.runs.context import Context
from fastcr.runs.log import read_records
from fastcr.runs.machine import process_age
from fastcr.trace import TRACE, trace
from fastcr.train import train

PACKAGES = (
    *("torchvision", "numpy", "pillow", "pytest", "pytest-benchmark", "timm"),
    *("tyro", "tensorboard", "hypothesis", "nvidia-dali-cuda130"),  # may be absent
)
EPOCHS, IMAGES, DRAWN = 100, 5994, 256  # the recipe on CUB-200-2011; different images, further files are links to them
FIRST_STEP = re.compile(r"first step done ([\d.]+) s after the start")  # train() says so


def first_line(*command: str) -> str | None:
    """What a command prints first; None where it cannot."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_facts(out: Path, rehearse: bool) -> None:
    """Write facts.json: the GPU, the driver, versions, the commit."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    write(
        out / "facts.json",
        {
            "gpu": gpu and gpu.name,
            "gpus": torch.cuda.device_count(),
            "capability": gpu and f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu and gpu.total_memory,
            "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton and triton.__version__,
            "commit": first_line("git", "describe", "--always", "--dirty", "--exclude=*"),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "system": platform.platform(),
            "packages": {name: version(name) for name in PACKAGES},
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rehearsal": rehearse,
        },
    )


def recipe(folder: Path, rehearse: bool) -> Config:
    """The presets' recipe with a batch of 256, ResNet-50 from random weights, on drawn birds written into `folder`.

    As many as CUB-200-2011 has, of the size of its images, and without labels, so that nothing is evaluated.
    """
    folder.mkdir()
    for i in range(32 if rehearse else IMAGES):
        path = folder / f"{i:04d}.jpg"
        if i < DRAWN:
            picture = draw_bird(CLASSES[i % len(CLASSES)], np.random.default_rng([1, i]))
            (picture if rehearse else picture.resize((500, 375))).save(path, quality=90)
        else:
            os.link(folder / f"{i % DRAWN:04d}.jpg", path)
    config = tuned("folder")
    frozen = replace(config.model, weights="none", batchnorm="frozen")
    if rehearse:
        return replace(
            config,
            run=RunConfig(steps=4, log_every=1),
            data=DataConfig(root=folder, image_size=64, workers=0),
            model=replace(frozen, backbone="resnet18", last_stage="layer3"),
            optim=replace(config.optim, epochs=EPOCHS, batch_size=16),
            moco=replace(config.moco, queue_size=32),
        )
    return replace(
        config,
        run=RunConfig(save_minutes=1e6),  # at the end only
        data=DataConfig(root=folder),
        model=frozen,
        optim=replace(config.optim, epochs=EPOCHS, batch_size=256),
    )


def trace_steps(out: Path, rehearse: bool) -> None:
    """Record a few steps of the recipe; phases.json says where their time goes, trace.json.gz is for a viewer."""
    (out / TRACE).unlink(missing_ok=True)  # of an earlier run
    with tempfile.TemporaryDirectory() as scratch:
        config = TraceConfig(**vars(recipe(Path(scratch) / "photos", rehearse)), steps=2 if rehearse else 5, out=out)
        trace(config, Context.of(console=Console(markup=False, width=132)))


def training_results(records: Sequence[dict[str, Any]], printed: str) -> dict[str, Any]:
    """What training.json says of the records in metrics.jsonl and of what `train` printed; None: not reached.

    The steady rate is the median of the records after the first, which holds the compilation.
    """
    match, steady = FIRST_STEP.search(printed), records[1:]
    first = float(match.group(1)) if match else None
    rate = statistics.median(record["images_per_second"] for record in steady) if steady else None
    return {
        "steps": records[-1]["step"] if records else 0,
        "seconds_to_first_step": first,  # from the start of Python, nothing compiled before
        "pairs_per_second": rate,
        "data_wait": statistics.median(record["data_wait"] for record in steady) if steady else None,
        "extrapolation": {
            "what": f"seconds to the first step, and {EPOCHS} epochs of {IMAGES} images at the steady rate after it",
            "seconds": first + EPOCHS * IMAGES / rate if first and rate else None,
        },
        "records": list(records),
    }


def train_what_fits(config: Config, scratch: Path, started: float) -> tuple[Path, str, str | None]:
    """Train with the batch halved until it fits the memory: the run folder, what was printed, what went wrong."""
    while True:
        batch = config.optim.batch_size
        run, console, problem = scratch / f"batch{batch}", Console(markup=False, record=True), None
        try:
            train(replace(config, run=replace(config.run, dir=run)), console=console, started=started)
        except torch.OutOfMemoryError:
            problem = f"out of GPU memory at a batch of {batch}"
            print(problem, flush=True)
        except (SystemExit, KeyboardInterrupt):  # the time is over
            pass
        except UsageError as error:
            return run, console.export_text(), str(error)
        if not problem or batch <= 32:
            return run, console.export_text(), problem
        config, started = replace(config, optim=replace(config.optim, batch_size=batch // 2)), 0.0
        torch.compiler.reset()
        torch.cuda.empty_cache()


def train_for(seconds: float, out: Path, rehearse: bool) -> str | None:
    """Train the recipe for about `seconds` of this process and write training.json; what went wrong, or None."""
    started = process_age()
    with tempfile.TemporaryDirectory() as scratch:
        config = recipe(Path(scratch) / "photos", rehearse)
        # a run answers SIGINT by saving and ending after the step; the grace is for what it saves
        timer = threading.Timer(max(seconds - process_age() - GRACE, 1), os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
        run, printed, problem = train_what_fits(config, Path(scratch), started)
        timer.cancel()
        settled, cuda = run / "config.yaml", torch.cuda.is_available()
        results = {
            "device": torch.cuda.get_device_name() if cuda else "CPU, a rehearsal",
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "problem": problem,
            **training_results(read_records(run / "metrics.jsonl"), printed),
            "settings": yaml.safe_load(settled.read_text()) if settled.exists() else None,
        }
    write(out / "training.json", results)
    return problem or (None if results["steps"] else "the time was over before the first record")


def tune(out: Path, rehearse: bool) -> str | None:
    """Search launch settings for the rows of 16 bits; tune.json holds what is found so far. Ends with the last row."""
    device, rows = torch.device("cuda"), search.chosen_rows("16 bits")
    timer: Callable[[Sequence[Callable[[], Any]]], float] = lambda calls: time_on_gpu(calls).median  # noqa: E731
    if rehearse:
        device, rows = torch.device("cpu"), search.chosen_rows("info_nce: 32 bits")[:1]
        search.CHOICES |= {name: (value,) for name, value in TABLE["info_nce"][rows[0][1]].items()}
        search.CHOICES["num_warps"] = (4, 8)

        def timer(calls: Sequence[Callable[[], Any]]) -> float:
            start = time.perf_counter()
            calls[0]()
            return time.perf_counter() - start

    best = {kernel: dict(table) for kernel, table in TABLE.items()}
    found: list[dict[str, Any]] = []
    for kernel, row in rows:
        sizes = search.workloads(kernel, row)
        if rehearse:
            sizes = [Workload("info_nce", {"B": 3, "D": 24, "N": 100}, torch.float32)]
        outcome = search.search(kernel, row, sizes, device, timer, lambda: None)
        best[kernel][row] = outcome.best
        finite = {name: None for name in ("before", "after") if not math.isfinite(getattr(outcome, name))}
        found.append({**outcome._asdict(), **finite})
        write(out / "tune.json", {"rows": found, "table": best})
        print(f"{kernel}: {row}: {search.shown(outcome.best)}, {outcome.before:.3g} s, now {outcome.after:.3g} s")
    return None


def main(args: Sequence[str]) -> None:
    """Run the stage that `args` end with; exits with a line for what went wrong."""
    out, rehearse, seconds = Path(args[0]), "--rehearse" in args, float(os.environ["FASTCR_STAGE_SECONDS"])
    stages: dict[str, Callable[[], str | None]] = {
        "facts": lambda: write_facts(out, rehearse),
        "trace": lambda: trace_steps(out, rehearse),
        "training": lambda: train_for(seconds, out, rehearse),
        "tune": lambda: tune(out, rehearse),
    }
    raise SystemExit(stages[args[-1]]())


if __name__ == "__main__":
    main(sys.argv[1:])
