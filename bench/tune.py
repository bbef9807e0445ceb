"""`python bench/tune.py [--only TEXT] [--out FILE]`: look for faster launch settings of the kernels on this GPU.

Every candidate for a row of a kernel's settings runs the op at examples of that row. A candidate that does not compile,
does not fit or gives other results than the fp64 reference is left out; the rest are timed like the benchmarks.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.timing import rotation, time_on_gpu
from bench.workloads import OPS, Workload
from fastcr.errors import UsageError
from fastcr.kernels.settings import TABLE, Settings
from fastcr.runs.command_line import called, one_line_errors, parse

# what a kernel may be launched with, of the settings that it has
CHOICES: dict[str, tuple[int, ...]] = {
    "BLOCK_S": (32, 64), "BLOCK_C": (32, 64, 128), "BLOCK_B": (16, 32, 64, 128), "BLOCK_N": (32, 64),
    "BLOCK": (4096, 8192, 16384), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4), "programs": (132, 264, 528),
}  # fmt: skip
Timer = Callable[[Sequence[Callable[[], Any]]], float]


class Outcome(NamedTuple):
    """What the search found for one row: seconds of the sum over its sizes."""

    kernel: str
    row: str
    today: Settings
    before: float
    best: Settings
    after: float
    out: int  # candidates that did not compile, did not fit or gave wrong results


def workloads(kernel: str, row: str) -> list[Workload]:
    """Two calls that use the row: forward where the kernel is the op's first, else forward and backward."""
    dtype = torch.float32 if row.startswith("32 bits") else torch.bfloat16
    return [
        Workload(name, example.sizes, dtype, kernel != name, example.options)
        for name, spec in OPS.items()
        for example in (*spec.usual, *spec.others)
        if spec.rows(example.sizes, dtype).get(kernel) == row
    ][:2]


def candidates(today: Settings) -> list[Settings]:
    """All combinations of the choices, and before them today's settings."""
    values = itertools.product(*(CHOICES[name] for name in today))
    every = [dict(zip(today, each, strict=True)) for each in values]
    return [today, *(candidate for candidate in every if candidate != today)]


@contextmanager
def launched_with(kernel: str, row: str, candidate: Settings) -> Iterator[None]:
    """Put the candidate in the place of today's settings."""
    today = TABLE[kernel][row]
    TABLE[kernel][row] = candidate
    try:
        yield
    finally:
        TABLE[kernel][row] = today


def search(
    kernel: str, row: str, sizes: Sequence[Workload], device: torch.device, timer: Timer, tick: Callable[[], Any]
) -> Outcome:
    """Time every candidate for one row, after a look at its results; `tick` is called after each."""
    work = []
    for each in sizes:
        sets = [each.inputs(device, seed) for seed in range(rotation(each.input_bytes, device))]
        work.append((each, sets, each.exact(sets[0])))

    def seconds(candidate: Settings) -> float:
        total = 0.0
        with launched_with(kernel, row, candidate):
            for each, sets, exact in work:

                def call(inputs: dict[str, Any], each: Workload = each) -> tuple[torch.Tensor, ...]:
                    return each.run(lambda **given: each.spec.op(**given, impl="triton"), inputs)

                try:
                    if each.error(call(sets[0]), exact) > each.tolerance:
                        return math.inf
                    total += timer([lambda inputs=inputs: call(inputs) for inputs in sets])  # type: ignore[misc]
                except Exception as error:  # Triton has no one class for what does not compile or fit
                    if isinstance(error, torch.cuda.OutOfMemoryError):
                        raise UsageError("not enough GPU memory to time the kernels") from None
                    return math.inf
        return total

    times: list[tuple[float, Settings]] = []
    today = TABLE[kernel][row]
    for candidate in candidates(today):
        times.append((seconds(candidate), candidate))
        tick()
    after, best = min(times, key=lambda pair: pair[0])
    return Outcome(kernel, row, today, times[0][0], best, after, sum(math.isinf(each) for each, _ in times))


def chosen_rows(only: str) -> list[tuple[str, str]]:
    """The rows that this device uses and whose name, as `rationale_fit: 16 bits, K <= 32`, holds the text."""
    rows = [(kernel, row) for kernel, table in TABLE.items() for row in table if workloads(kernel, row)]
    found = [(kernel, row) for kernel, row in rows if only in f"{kernel}: {row}"]
    if not found:
        raise UsageError(f"--only {only!r}: no such row; rows are {', '.join(': '.join(row) for row in rows[:2])}, ...")
    return found


def shown(row: Settings) -> str:
    """Settings in a few letters: `S 64, C 64, warps 8, stages 3`."""
    return ", ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')} {value}" for name, value in row.items())


def outcome_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """Today's setting, the best and the gain, for people."""
    table = Table(title=title)
    for name in ("kernel", "row", "today", "us", "best", "us", "gain", "out"):
        table.add_column(name, justify="right" if name in ("us", "gain", "out") else "left")
    for o in outcomes:
        gain = f"{o.before / o.after - 1:.0%}" if math.isfinite(o.before) and math.isfinite(o.after) else ""
        times = [f"{each * 1e6:.1f}" if math.isfinite(each) else "fails" for each in (o.before, o.after)]
        table.add_row(o.kernel, o.row, shown(o.today), times[0], shown(o.best), times[1], gain, str(o.out))
    return table


@dataclass(frozen=True)
class TuneConfig:
    """Settings of a search."""

    only: str = "16 bits"
    """Rows whose name holds this text; a name is `kernel: row` as in the ops' files. Empty: all."""
    out: Path | None = None
    """Write all rows with the best settings here, as JSON by kernel."""


def main(args: Sequence[str]) -> None:
    """Time the rows that `args` name, print and write the best settings."""
    with one_line_errors("bench/tune.py"):
        config = parse(TuneConfig, args, prog=called("bench/tune.py"), description=__doc__)
        rows = chosen_rows(config.only)
        if not torch.cuda.is_available():
            raise UsageError("there is no GPU to time kernels on")
        device, console, outcomes = torch.device("cuda"), Console(), list[Outcome]()
        with Progress(console=console) as progress:
            bar = progress.add_task("", total=sum(len(candidates(TABLE[kernel][row])) for kernel, row in rows))
            for kernel, row in rows:
                progress.update(bar, description=f"{kernel}: {row}")
                timer: Timer = lambda calls: time_on_gpu(calls).median  # noqa: E731
                found = search(kernel, row, workloads(kernel, row), device, timer, lambda: progress.advance(bar))
                outcomes.append(found)
        console.print(outcome_table(outcomes, f"{torch.cuda.get_device_name()}, sum over two calls"))
        if config.out:
            best = {kernel: dict(table) for kernel, table in TABLE.items()}
            for outcome in outcomes:
                best[outcome.kernel][outcome.row] = outcome.best
            config.out.write_text(json.dumps(best, indent=4) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
