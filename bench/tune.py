"""`python bench/tune.py [--only TEXT] [--out FILE]`: look for faster launch settings of the kernels on this GPU.

Every candidate for a row of `kernels/settings.py` runs the op at the sizes of that row. A candidate that does not
compile, does not fit or gives other results than the fp64 reference is left out; the rest are timed like the
benchmarks.
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
from fastcr.kernels import settings
from fastcr.kernels.settings import Settings
from fastcr.runs.command_line import called, one_line_errors, parse

MAP_CHOICES = {"BLOCK_S": (32, 64), "BLOCK_C": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
QUEUE_CHOICES = {
    "BLOCK_B": (16, 32, 64, 128), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3),
    "programs": (132, 264, 528),
}  # fmt: skip
QUEUE_OPS = {"info_nce": "contrast", "relational": "relational", "neighbour": "neighbour"}
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "rationale_fit": MAP_CHOICES,
    "fit_pairs": {"BLOCK_C": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "rationale_pool": MAP_CHOICES,
    "attention_gradient": {"BLOCK_S": (32, 64), "BLOCK_C": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "common_weights": {
        "BLOCK": (4096, 8192, 16384), "num_warps": (2, 4, 8, 16), "num_stages": (2, 3, 4), "programs": (132, 264, 528),
    },
    "spread_gradients": {
        "BLOCK_S": (32, 64), "BLOCK_C": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3),
        "programs": (264, 528, 1056),
    },
    "info_nce": QUEUE_CHOICES,
    "relational": QUEUE_CHOICES,
    "neighbour": QUEUE_CHOICES,
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
    """The sizes a row is timed at: those of ResNet-50 at 224 and 448 px, or queues of 4,096 and 65,536 keys."""
    dtype = torch.float32 if row.startswith("32 bits") else torch.bfloat16
    if kernel in QUEUE_OPS:
        rows, dim = 16 if "B <= 16" in row else 256, 256 if "D <= 256" in row else 512
        op, batch = QUEUE_OPS[kernel], rows // 2 if kernel == "relational" else rows  # whose rows are queries and keys
        return [Workload(op, "training", batch, keys, dim, dtype=dtype) for keys in (4096, 65536)]  # type: ignore[arg-type]
    if kernel == "common_weights":
        channels = next((most for most in (512, 2048) if f"C <= {most}" in row), 4096)
        return [Workload("common", "forward", 256, positions, channels, dtype=dtype) for positions in (49, 196)]
    op, way = {
        "rationale_fit": ("fit", "forward"),
        "fit_pairs": ("fit", "forward"),
        "rationale_pool": ("pool", "forward"),
        "attention_gradient": ("pool", "training"),
        "spread_gradients": ("fit", "training"),
    }[kernel]
    detectors = 128 if "K > 32" in row else 32
    sides = (49,) if kernel == "fit_pairs" else (49, 196)
    return [Workload(op, way, 256, positions, 2048, detectors, dtype) for positions in sides]  # type: ignore[arg-type]


def candidates(kernel: str, today: Settings) -> list[Settings]:
    """All combinations of the choices, and before them today's settings."""
    choices = CHOICES[kernel]
    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [today, *(candidate for candidate in every if candidate != today)]


@contextmanager
def launched_with(kernel: str, row: str, candidate: Settings) -> Iterator[None]:
    """Put the candidate in the place of today's settings."""
    today = settings.TABLE[kernel][row]
    settings.TABLE[kernel][row] = candidate
    try:
        yield
    finally:
        settings.TABLE[kernel][row] = today


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

                def call(inputs: dict[str, torch.Tensor], each: Workload = each) -> tuple[torch.Tensor, ...]:
                    return each.run(lambda **given: OPS[each.op](**given, impl="triton"), inputs)

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
    today = settings.TABLE[kernel][row]
    for candidate in candidates(kernel, today):
        times.append((seconds(candidate), candidate))
        tick()
    after, best = min(times, key=lambda pair: pair[0])
    return Outcome(kernel, row, today, times[0][0], best, after, sum(math.isinf(each) for each, _ in times))


def chosen_rows(only: str) -> list[tuple[str, str]]:
    """The rows whose name, as `rationale_fit: 16 bits, K <= 32`, holds the text."""
    rows = [(kernel, row) for kernel, table in settings.TABLE.items() for row in table]
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
    """Rows whose name holds this text; a name is `kernel: row` as in kernels/settings.py. Empty: all."""
    out: Path | None = None
    """Write the whole table with the best settings here, as JSON that TABLE in kernels/settings.py takes as it is."""


def main(args: Sequence[str]) -> None:
    """Time the rows that `args` name, print and write the best settings."""
    with one_line_errors("bench/tune.py"):
        config = parse(TuneConfig, args, prog=called("bench/tune.py"), description=__doc__)
        rows = chosen_rows(config.only)
        if not torch.cuda.is_available():
            raise UsageError("there is no GPU to time kernels on")
        device, console = torch.device("cuda"), Console()
        outcomes = []
        total = sum(len(candidates(kernel, settings.TABLE[kernel][row])) for kernel, row in rows)
        with Progress(console=console) as progress:
            bar = progress.add_task("", total=total)
            for kernel, row in rows:
                progress.update(bar, description=f"{kernel}: {row}")
                tick = lambda: progress.advance(bar)  # noqa: E731
                outcomes.append(
                    search(kernel, row, workloads(kernel, row), device, lambda calls: time_on_gpu(calls).median, tick)
                )
        console.print(outcome_table(outcomes, f"{torch.cuda.get_device_name()}, sum over two sizes"))
        if config.out:
            best = {kernel: dict(table) for kernel, table in settings.TABLE.items()}
            for outcome in outcomes:
                best[outcome.kernel][outcome.row] = outcome.best
            config.out.write_text(json.dumps(best, indent=4) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
