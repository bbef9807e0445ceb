"""`python bench/on_gpu.py --out DIR --minutes 8`: all that a machine with a GPU can tell, in one command.

In this order: facts of the machine, the kernels' tests compiled for its GPU, the benchmarks of ops, step and loaders,
a trace, a short training and a search for better launch settings. Needs torch, torchvision, Triton, pytest and
pytest-benchmark, neither tyro nor an installed fastcr. Each stage is a process of its own, has a share of the minutes
and is stopped at its end; what a stage does not use goes to the later ones. Every result lies in DIR as soon as it is
there, summary.json says how each stage ended, log.txt what it printed. Exits with 1 if a stage failed, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
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
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # what imports torch is imported by the stages: this process only waits for them
    from fastcr.config import Config

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds from SIGINT to SIGKILL: pytest writes its report in between
LEAST = 5.0  # seconds below which a stage is not begun
SHARES = {"tests": 4, "ops": 4, "steps": 3, "loaders": 2, "trace": 2, "training": 5, "tune": 0}  # tune: what is left
PACKAGES = (
    *("torchvision", "numpy", "pillow", "pytest", "pytest-benchmark", "timm"),
    *("tyro", "tensorboard", "hypothesis", "nvidia-dali-cuda130"),  # may be absent
)
KINDS = ("failures", "errors", "skipped")  # of tests, in pytest's report
NAMED = 20  # of the failures
EPOCHS, IMAGES, DRAWN = 100, 5994, 256  # the recipe on CUB-200-2011; different pictures, further files are links
FIRST_STEP = re.compile(r"first step done ([\d.]+) s after the start")  # train() says so


class Stage(NamedTuple):
    """One process, and what it leaves behind."""

    name: str
    command: list[str]
    file: Path | None = None  # its result
    junit: Path | None = None  # pytest's report
    lines: Path | None = None  # one finished benchmark a line, until pytest-benchmark writes `file`
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)


class Outcome(NamedTuple):
    """How a stage ended."""

    stage: str
    status: str  # passed, failed, cut off, interrupted or skipped
    seconds: float
    file: str | None
    note: str
    failures: list[str]
    interrupted: bool = False  # nothing more is to be run


def share(name: str, waiting: Sequence[str], left: float) -> float:
    """Seconds of the `left` ones that stage `name` may take while `waiting` come after it."""
    total = SHARES[name] + sum(SHARES[other] for other in waiting)
    return left * SHARES[name] / total if total else left


def run(
    command: Sequence[str], limit: float, log: io.BufferedWriter, environment: dict[str, str]
) -> int | Literal["cut off", "interrupted"]:
    """Run in a process group of its own; the exit status, or why it was stopped: `limit` seconds, or this one's SIGINT.

    It gets a SIGINT, to write what it has, and its whole group SIGKILL `GRACE` seconds later.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "interrupted" if isinstance(why, KeyboardInterrupt) else "cut off"
    finally:
        with suppress(ProcessLookupError):  # a loader's or a compiler's processes too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_junit(path: Path | None) -> tuple[str, list[str]]:
    """`12 passed, 1 failed, 3 skipped`, and a line for each failure; empty without a whole report."""
    try:
        suites = list(ElementTree.parse(path or "").iter("testsuite"))
    except (OSError, ElementTree.ParseError):  # not written, or not to its end
        return "", []
    # by its own count: a test that was interrupted is listed like one that passed
    tests, *others = (sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", *KINDS))
    counts = f"{tests - sum(others)} passed, {others[0] + others[1]} failed, {others[2]} skipped"
    cases = [case for suite in suites for case in suite]
    bad = [(case, at) for case in cases for kind in ("failure", "error") for at in case.iterfind(kind)]
    return counts, [f"{case.get('name')}: {' '.join(at.get('message', '').split())[:200]}" for case, at in bad[:NAMED]]


def salvage(stage: Stage, facts: dict[str, Any]) -> None:
    """Where pytest-benchmark could not write its report, write one of the benchmarks that had finished."""
    if stage.lines is None or stage.file is None or not stage.lines.exists():
        return
    try:
        json.loads(stage.file.read_text())
    except (OSError, ValueError):
        entries = []
        for line in stage.lines.read_text().splitlines():
            with suppress(ValueError):  # the last one may be cut off
                entries.append(json.loads(line))
        machine = {"cpu": {}, "fastcr": facts}
        write(stage.file, {"machine_info": machine, "benchmarks": entries})
    stage.lines.unlink()


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def run_stage(stage: Stage, limit: float, out: Path, facts: dict[str, Any]) -> Outcome:
    """Run a stage for at most `limit` seconds and judge it by its exit status and its report."""
    if limit < LEAST:
        return Outcome(stage.name, "skipped", 0.0, None, "no time was left", [])
    for path in (stage.file, stage.junit, stage.lines):  # of an earlier run
        if path is not None:
            path.unlink(missing_ok=True)
    start = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n== {stage.name}: at most {limit:.0f} s\n".encode())
        log.flush()
        before = log.tell()
        environment = {**os.environ, **stage.environment, "FASTCR_STAGE_SECONDS": f"{limit:.1f}"}
        ending = run(stage.command, limit, log, environment)
    seconds = time.monotonic() - start
    salvage(stage, facts)
    note, failures = read_junit(stage.junit)
    status = "passed"
    if isinstance(ending, str):
        note, status = f"{note or 'stopped'} after {seconds:.0f} s", "failed" if failures else ending
    elif ending:
        text = (out / "log.txt").read_bytes()[before:].decode(errors="replace")
        note, status = note or last_line(text), "failed"
    file = stage.file.name if stage.file and stage.file.exists() else None
    return Outcome(stage.name, status, round(seconds, 1), file, note, failures, ending == "interrupted")


def run_all(
    stages: Sequence[Stage], out: Path, deadline: float, facts: dict[str, Any], console: Console
) -> list[Outcome]:
    """Run the stages one after the other until `deadline` (of `time.monotonic`), keeping summary.json up to date."""
    outcomes: list[Outcome] = []
    for i, stage in enumerate(stages):
        limit = share(stage.name, [other.name for other in stages[i + 1 :]], deadline - GRACE - time.monotonic())
        if outcomes and outcomes[-1].interrupted:
            outcome = Outcome(stage.name, "skipped", 0.0, None, "interrupted", [], True)
        else:
            if limit >= LEAST:
                console.print(f"{stage.name}: at most {limit:.0f} s", highlight=False)
            outcome = run_stage(stage, limit, out, facts)
        outcomes.append(outcome)
        write(out / "summary.json", {"facts": facts, "stages": [each._asdict() for each in outcomes]})
    return outcomes


def summary_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """How the stages ended, for people."""
    table = Table(title=title)
    for name in ("stage", "status", "seconds", "file", "note"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for each in outcomes:
        note = "; ".join((each.note, *each.failures[:1]))
        table.add_row(each.stage, each.status, f"{each.seconds:.0f}", each.file or "", note)
    return table


def make_stages(out: Path, scratch: Path, *, rehearse: bool) -> list[Stage]:
    """All stages after the facts, in the order they run in; `rehearse`: their small forms for the CPU."""
    python = [sys.executable, "-u"]
    inside = [*python, str(Path(__file__).resolve()), "--out", str(out), *["--rehearse"] * rehearse, "--inside"]

    def pytest(junit: Path, few: str, *args: str) -> list[str]:
        command = [*python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}", *args]
        return [*command, "--benchmark-max-time=0.1", "--benchmark-min-rounds=2", "-k", few] if rehearse else command

    def bench(name: str, file: str, path: str, *, few: str) -> Stage:
        result, junit = out / file, scratch / f"{name}.xml"
        lines = result.with_suffix(".jsonl")
        command = pytest(junit, few, path, f"--benchmark-json={result}")
        return Stage(name, command, result, junit, lines, {"FASTCR_BENCH_LINES": str(lines)})

    # On a GPU these run the compiled kernels on CUDA tensors (tests/conftest.py). What stays on the CPU there: all of
    # test_ops.py, which is about the references, and of the other two the tests of arguments and of impl="auto"
    # ("..._on_the_cpu", "..._the_cpu_...", "..._refused", "..._are_named") and torchvision's side of each comparison.
    kernel_tests = [f"tests/kernels/test_{name}.py" for name in ("two_views", "kernels", "ops")]
    few = "(bias_may_be_absent and pool) or no_images_give or any_size or auto_serves"
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    # what other stages have compiled must not shorten the start-up that the training reports
    cold = {name: str(scratch / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    return [
        Stage("tests", pytest(out / "tests.xml", few, *kernel_tests), out / "tests.xml", out / "tests.xml"),
        bench("ops", "ops.json", "bench/test_ops.py", few="contrast and not compiled"),
        bench("steps", "steps.json", "bench/test_step.py", few="not compiled"),
        bench("loaders", "loader.json", "bench/test_loader.py", few="torch-host"),
        Stage("trace", [*inside, "trace"], out / "phases.json"),
        Stage("training", [*inside, "training"], out / "training.json", environment=cold),
        Stage("tune", [*inside, "tune"], out / "tune.json", environment=interpreted),
    ]


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
    import torch

    from fastcr.kernels.launch import triton

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
    """The paper's recipe with a batch of 256, ResNet-50 from random weights, on drawn birds written into `folder`.

    As many as CUB-200-2011 has, of the size of its pictures, and without labels, so that nothing is evaluated.
    """
    import numpy as np

    from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RunConfig
    from fastcr.data.synthetic import CLASSES, draw_bird

    folder.mkdir()
    for i in range(32 if rehearse else IMAGES):
        path = folder / f"{i:04d}.jpg"
        if i < DRAWN:
            picture = draw_bird(CLASSES[i % len(CLASSES)], np.random.default_rng([1, i]))
            (picture if rehearse else picture.resize((500, 375))).save(path, quality=90)
        else:
            os.link(folder / f"{i % DRAWN:04d}.jpg", path)
    if rehearse:
        return Config(
            preset="folder",
            run=RunConfig(steps=4, log_every=1),
            data=DataConfig(root=folder, image_size=64, workers=0),
            model=ModelConfig(backbone="resnet18", last_stage="layer3", weights="none"),
            optim=OptimConfig(epochs=EPOCHS, batch_size=16),
            moco=MocoConfig(queue_size=32),
        )
    return Config(
        preset="folder",
        run=RunConfig(save_minutes=1e6),  # at the end only
        data=DataConfig(root=folder),
        model=ModelConfig(weights="none"),
        optim=OptimConfig(epochs=EPOCHS, batch_size=256),
    )


def trace_steps(out: Path, rehearse: bool) -> None:
    """Record a few steps of the recipe; phases.json says where their time goes, trace.json.gz is for a viewer."""
    from fastcr.trace import TRACE, TraceConfig, trace

    (out / TRACE).unlink(missing_ok=True)  # of an earlier run
    with tempfile.TemporaryDirectory() as scratch:
        config = TraceConfig(**vars(recipe(Path(scratch) / "photos", rehearse)), steps=2 if rehearse else 5, out=out)
        trace(config, Console(markup=False, width=132))


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


def train_for(seconds: float, out: Path, rehearse: bool) -> str | None:
    """Train the recipe for about `seconds` of this process and write training.json; what went wrong, or None.

    The batch is halved until it fits.
    """
    import torch
    import yaml

    from fastcr.errors import UsageError
    from fastcr.runs.log import read_records
    from fastcr.runs.machine import process_age
    from fastcr.train import train

    started = process_age()
    with tempfile.TemporaryDirectory() as scratch:
        config = recipe(Path(scratch) / "photos", rehearse)
        # a run answers SIGINT by saving and ending after the step; the grace is for what it saves
        timer = threading.Timer(max(seconds - process_age() - GRACE, 1), os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
        fits, problem = False, None
        while not fits:
            batch = config.optim.batch_size
            run = Path(scratch) / f"batch{batch}"
            console, fits = Console(markup=False, record=True), True
            try:
                train(replace(config, run=replace(config.run, dir=run)), console, started=started)
            except torch.OutOfMemoryError:
                problem, fits = f"out of GPU memory at a batch of {batch}", batch <= 32
                print(problem, flush=True)
            except (SystemExit, KeyboardInterrupt):  # the time is over
                pass
            except UsageError as error:
                problem = str(error)
            if not fits:
                problem, started = None, 0.0
                config = replace(config, optim=replace(config.optim, batch_size=batch // 2))
                torch.compiler.reset()
                torch.cuda.empty_cache()
        timer.cancel()
        settled, cuda = run / "config.yaml", torch.cuda.is_available()
        results = {
            "device": torch.cuda.get_device_name() if cuda else "CPU, a rehearsal",
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "problem": problem,
            **training_results(read_records(run / "metrics.jsonl"), console.export_text()),
            "settings": yaml.safe_load(settled.read_text()) if settled.exists() else None,
        }
    write(out / "training.json", results)
    return problem or (None if results["steps"] else "the time was over before the first record")


def tune(out: Path, rehearse: bool) -> str | None:
    """Search launch settings for the rows of 16 bits; tune.json holds what is found so far. Ends with the last row."""
    import torch

    from bench import tune as search
    from bench.timing import time_on_gpu
    from bench.workloads import Workload
    from fastcr.kernels import settings

    device, rows = torch.device("cuda"), search.chosen_rows("16 bits")
    timer: Callable[[Sequence[Callable[[], Any]]], float] = lambda calls: time_on_gpu(calls).median  # noqa: E731
    if rehearse:
        device, rows = torch.device("cpu"), search.chosen_rows("info_nce: 32 bits")[:1]
        search.CHOICES["info_nce"] = {name: (value,) for name, value in settings.TABLE["info_nce"][rows[0][1]].items()}
        search.CHOICES["info_nce"]["num_warps"] = (4, 8)

        def timer(calls: Sequence[Callable[[], Any]]) -> float:
            start = time.perf_counter()
            calls[0]()
            return time.perf_counter() - start

    best = {kernel: dict(table) for kernel, table in settings.TABLE.items()}
    found: list[dict[str, Any]] = []
    for kernel, row in rows:
        sizes = search.workloads(kernel, row)
        if rehearse:
            sizes = [Workload("contrast", "training", 3, 100, 24, dtype=torch.float32)]
        outcome = search.search(kernel, row, sizes, device, timer, lambda: None)
        best[kernel][row] = outcome.best
        finite = {name: None for name in ("before", "after") if not math.isfinite(getattr(outcome, name))}
        found.append({**outcome._asdict(), **finite})
        write(out / "tune.json", {"rows": found, "table": best})
        print(f"{kernel}: {row}: {search.shown(outcome.best)}, {outcome.before:.3g} s, now {outcome.after:.3g} s")
    return None


def read_arguments(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python bench/on_gpu.py",
        usage="%(prog)s --out DIR [--minutes M] [--only STAGE,STAGE] [--rehearse]",
        description="Tests and benchmarks on the GPU at hand, and a short training, within so many minutes.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="time for everything (8)")
    parser.add_argument("--only", metavar="STAGE,STAGE", help=f"some of {', '.join(SHARES)} (all)")
    parser.add_argument("--rehearse", action="store_true", help="every stage in its small form, on the CPU")
    parser.add_argument("--inside", choices=("facts", "trace", "training", "tune"), help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    given.only = given.only.split(",") if given.only else list(SHARES)
    mistake = ""
    if unknown := [name for name in given.only if name not in SHARES]:
        mistake = f"--only: no stage {unknown[0]!r}; there are {', '.join(SHARES)}"
    elif not 0 < given.minutes < math.inf:
        mistake = "--minutes must be above 0"
    else:
        try:
            given.out = given.out.resolve()
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            mistake = f"cannot write into --out {given.out}: {error.strerror}"
    if mistake:
        parser.exit(2, f"on_gpu: error: {mistake}\n")
    return given


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGINT and SIGTERM end the stage at hand and then the whole; set here, so that no stage inherits them ignored."""
    raise KeyboardInterrupt


def main(args: Sequence[str] | None = None) -> None:
    """Command line of this file."""
    began, given = time.monotonic(), read_arguments(args)
    if given.inside:
        seconds = float(os.environ["FASTCR_STAGE_SECONDS"])
        inside: dict[str, Callable[[], str | None]] = {
            "facts": lambda: write_facts(given.out, given.rehearse),
            "trace": lambda: trace_steps(given.out, given.rehearse),
            "training": lambda: train_for(seconds, given.out, given.rehearse),
            "tune": lambda: tune(given.out, given.rehearse),
        }
        raise SystemExit(inside[given.inside]())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.pop("TRITON_INTERPRET", None)  # what runs on a GPU is compiled
    if given.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    console, deadline = Console(), began + 60 * given.minutes
    with tempfile.TemporaryDirectory() as scratch:
        stages = make_stages(given.out, Path(scratch), rehearse=given.rehearse)
        looks = [*stages[-1].command[:-1], "facts"]
        (given.out / "log.txt").unlink(missing_ok=True)
        look = run_stage(Stage("facts", looks, given.out / "facts.json"), 60 * given.minutes, given.out, {})
        if look.status != "passed":
            console.print(f"facts {look.status}: {look.note}", highlight=False)
            raise SystemExit(1)
        facts = json.loads((given.out / "facts.json").read_text())
        if facts["gpu"] is None and not given.rehearse:
            error = "there is no GPU here; --rehearse runs every stage in its small form on the CPU"
            print(f"on_gpu: error: {error}", file=sys.stderr)
            raise SystemExit(2)
        chosen = [stage for stage in stages if stage.name in given.only]
        outcomes = [look, *run_all(chosen, given.out, deadline, facts, console)]
    where = f"{facts['gpu'] or 'rehearsal on the CPU'}, torch {facts['torch']}, Triton {facts['triton']}"
    console.print(summary_table(outcomes, where))
    console.print(f"results: {given.out}", highlight=False, soft_wrap=True)
    if any(outcome.interrupted for outcome in outcomes):
        raise SystemExit(130)
    raise SystemExit(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # a second one does not wait for the stage
        raise SystemExit(130) from None
