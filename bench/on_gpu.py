"""`python bench/on_gpu.py --out DIR [--only STAGE ...]`: test and measure on a machine with a GPU, in two commands.

    python bench/on_gpu.py --out DIR/first --only tests steps
    python bench/on_gpu.py --out DIR/second --only ops training trace loaders tune

Without --only all of it, in this order: facts of the machine, the tests of the kernels as compiled for its GPU and of
the step, the benchmarks of whole steps and of ops, a short training, a trace, the loaders and a search for better
launch settings. The most telling comes first, and each of the two commands takes six minutes at most.

It needs torch, torchvision, Triton, pytest and pytest-benchmark, but neither tyro nor an installed fastcr. Each stage
runs in a process of its own (the last ones in `gpu_stages.py`), has a share of the minutes and is stopped when they are
over; time that a stage does not use goes to the later ones. What one stage has compiled serves the others, except the
training, whose start-up is measured. DIR gets at most seven files: summary.json says how each stage ended and holds
short results, log.txt what all of them printed. Exits with 1 if a stage failed or was cut off (the search excepted,
which takes whatever time is left), with 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds from SIGINT to SIGKILL: pytest writes its report in between
LEAST = 5.0  # seconds below which a stage is not begun
SHARES = {"tests": 3, "steps": 6, "ops": 4, "training": 3, "trace": 2, "loaders": 2, "tune": 0}  # tune: what is left
KINDS = ("failures", "errors", "skipped")  # of tests, in pytest's report


class Stage(NamedTuple):
    """One process, and what it leaves behind."""

    name: str
    command: list[str]
    file: Path | None = None  # its result
    junit: Path | None = None  # pytest's report
    lines: Path | None = None  # one finished benchmark a line, until pytest-benchmark writes `file`
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)
    short: bool = False  # its result goes into summary.json


class Outcome(NamedTuple):
    """How a stage ended."""

    stage: str
    status: str  # passed, failed, cut off or skipped
    seconds: float
    file: str | None
    note: str
    failures: list[str]


def share(name: str, waiting: Sequence[str], left: float) -> float:
    """Seconds of the `left` ones that stage `name` may take while `waiting` come after it."""
    total = SHARES[name] + sum(SHARES[other] for other in waiting)
    return left * SHARES[name] / total if total else left


def run(command: Sequence[str], limit: float, log: io.BufferedWriter, environment: dict[str, str]) -> int | None:
    """Run in a process group of its own; the exit status, or None after `limit` seconds.

    It gets a SIGINT, to write what it has, and its whole group SIGKILL `GRACE` seconds later.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
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
    return counts, [f"{case.get('name')}: {' '.join(at.get('message', '').split())[:200]}" for case, at in bad[:20]]


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
    if ending is None:
        note, status = f"{note or 'stopped'} after {seconds:.0f} s", "failed" if failures else "cut off"
    elif ending:
        text = (out / "log.txt").read_bytes()[before:].decode(errors="replace")
        note, status = note or last_line(text), "failed"
    file = stage.file.name if stage.file and stage.file.exists() else None
    return Outcome(stage.name, status, round(seconds, 1), file, note, failures)


def run_all(
    stages: Sequence[Stage], out: Path, deadline: float, facts: dict[str, Any], console: Console
) -> list[Outcome]:
    """Run the stages one after the other until `deadline` (of `time.monotonic`), keeping summary.json up to date."""
    outcomes, results = list[Outcome](), dict[str, Any]()
    for i, stage in enumerate(stages):
        limit = share(stage.name, [other.name for other in stages[i + 1 :]], deadline - GRACE - time.monotonic())
        outcome = run_stage(stage, limit, out, facts)
        console.print(described(outcome), highlight=False, soft_wrap=True)
        if stage.short and stage.file and outcome.file:
            results[stage.name], outcome = json.loads(stage.file.read_text()), outcome._replace(file="summary.json")
        outcomes.append(outcome)
        write(out / "summary.json", {"facts": facts, "stages": [o._asdict() for o in outcomes], "results": results})
        if stage.short and stage.file:
            stage.file.unlink(missing_ok=True)
    return outcomes


def described(outcome: Outcome) -> str:
    """How a stage ended, in a line for people."""
    said = "; ".join(filter(None, (outcome.file, outcome.note, *outcome.failures[:1])))
    return f"{outcome.stage}: {outcome.status} after {outcome.seconds:.0f} s" + f": {said}" * bool(said)


def make_stages(out: Path, scratch: Path, *, rehearse: bool) -> list[Stage]:
    """All stages after the facts, in the order they run in; `rehearse`: their small forms for the CPU."""
    python = [sys.executable, "-u"]
    inside = [*python, str(ROOT / "bench" / "gpu_stages.py"), str(out), *["--rehearse"] * rehearse]
    shared = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}

    def pytest(junit: Path, few: str, *args: str) -> list[str]:
        command = [*python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}", *args]
        return [*command, "--benchmark-max-time=0.1", "--benchmark-min-rounds=2", "-k", few] if rehearse else command

    def bench(name: str, file: str, path: str, *, few: str) -> Stage:
        result, junit = out / file, scratch / f"{name}.xml"
        lines = result.with_suffix(".jsonl")
        command = pytest(junit, few, path, f"--benchmark-json={result}")
        return Stage(name, command, result, junit, lines, {"FASTCR_BENCH_LINES": str(lines), **shared})

    # on a GPU they run the compiled kernels on CUDA tensors (tests/conftest.py), each in a process of its own core
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") and not rehearse else []
    own_tests = ["tests/kernels/test_launch.py"] if rehearse else ["tests/kernels", "tests/method", *parallel]
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    # what other stages have compiled must not shorten the start-up that the training reports
    cold = {name: str(scratch / "cold" / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    return [
        Stage("tests", pytest(out / "tests.xml", "", *own_tests), out / "tests.xml", out / "tests.xml"),
        bench("steps", "steps.json", "bench/test_step.py", few="not compiled"),
        bench("ops", "ops.json", "bench/test_ops.py", few="(contrast or info_nce) and not compiled"),
        Stage("training", [*inside, "training"], out / "training.json", environment=cold, short=True),
        Stage("trace", [*inside, "trace"], out / "phases.json", environment=shared, short=True),
        bench("loaders", "loader.json", "bench/test_loader.py", few="torch-host"),
        Stage("tune", [*inside, "tune"], out / "tune.json", environment=interpreted, short=True),
    ]


def read_arguments(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 for a mistake."""
    about = "Tests and benchmarks on the GPU at hand, and a short training, within so many minutes."
    parser = argparse.ArgumentParser(prog="python bench/on_gpu.py", description=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=6.0, metavar="M", help="time for everything (6)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", default=SHARES, help=f"of {', '.join(SHARES)} (all)")
    parser.add_argument("--rehearse", action="store_true", help="every stage in its small form, on the CPU")
    given = parser.parse_args(args)
    if unknown := [name for name in given.only if name not in SHARES]:
        mistake(f"--only: no stage {unknown[0]!r}; there are {', '.join(SHARES)}")
    if not 0 < given.minutes < math.inf:
        mistake("--minutes must be above 0")
    given.out = given.out.resolve()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        mistake(f"cannot write into --out {given.out}: {error.strerror}")
    return given


def mistake(message: str) -> NoReturn:
    """Say in one line why nothing can be run, and exit with status 2."""
    print(f"on_gpu: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of this file."""
    began, given = time.monotonic(), read_arguments(args)
    for number in (signal.SIGINT, signal.SIGTERM):  # set here, so that no stage inherits them ignored
        signal.signal(number, lambda number, _: sys.exit(128 + number))
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
            mistake("there is no GPU here; --rehearse runs every stage in its small form on the CPU")
        (given.out / "facts.json").unlink()  # they are in summary.json
        chosen = [stage for stage in stages if stage.name in given.only]
        outcomes = run_all(chosen, given.out, deadline, facts, console)
    where = f"{facts['gpu'] or 'rehearsal on the CPU'}, torch {facts['torch']}, Triton {facts['triton']}"
    console.print(f"{where}; results: {given.out}", highlight=False, soft_wrap=True)
    raise SystemExit(any(outcome.status in ("failed", "cut off") and outcome.stage != "tune" for outcome in outcomes))


if __name__ == "__main__":
    main()
