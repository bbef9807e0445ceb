"""`python bench/report.py FILE.json ...`: pytest-benchmark's reports as Markdown tables, one report after the other.

`--keep True` also writes each report, without the raw samples, into bench/results/, under a name that says what was
measured where and when.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.timing import Ceilings, Work
from fastcr.config import tyro
from fastcr.errors import UsageError
from fastcr.runs.command_line import called, one_line_errors, parse

Entry = dict[str, Any]
HOW = {"graph": "CUDA graph", "events": "events, not capturable", "wall": "wall clock", "cpu": "CPU time of a thread"}
RESULTS = Path(__file__).parent / "results"


def heading(report: Entry) -> str:
    """The machine and the versions a report was made with."""
    facts = report["machine_info"].get("fastcr", {})
    cpu = f"CPU {report['machine_info']['cpu'].get('brand_raw', '')}, {facts.get('threads')} threads"
    where = f"{facts['gpu']}, driver {facts.get('driver')}" if facts.get("gpu") else cpu
    return f"**{where}**, torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {facts.get('commit')}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Markdown lines without columns that are empty; all but the `left` first columns are right-aligned."""
    filled = [column for column in zip(columns, *rows, strict=True) if any(column[1:])]
    columns, *rows = zip(*filled, strict=True)
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return [f"| {' | '.join(columns)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def plain_table(entries: list[Entry]) -> list[str]:
    """Wall-clock medians in milliseconds, as pytest-benchmark measured them."""
    rows = []
    for entry in entries:
        stats, rate = entry["stats"], entry["extra_info"].get("images_per_second")
        times = (f"{stats[key] * 1e3:.3f}" for key in ("median", "iqr"))
        rows.append([entry["name"], *times, f"{rate:.0f}" if rate else ""])
    return table(["benchmark", "median, ms", "interquartile range, ms", "images/s"], rows)


def ratio(of: Entry, other: Entry | None) -> str:
    """How many times as fast as the other way an op is; only of one whose results were right in the same run.

    None on a CPU, where the op is the reference.
    """
    if of["way"] != "op" or of["seconds"]["how"] == "wall":
        return ""
    if of["correct"] is not True:
        return "wrong results"
    return f"{other['seconds']['median'] / of['seconds']['median']:.2f}" if other else ""


def floor_of(info: Entry) -> float | None:
    """Seconds an op takes at least on the device it was timed on; None where the ceilings were not measured."""
    if not info["copy_bytes_per_second"]:
        return None
    ceilings = Ceilings(info["copy_bytes_per_second"], info["matmul_flops_per_second"])
    return Work(info["floor_bytes"], info["floor_flops"]).floor(ceilings)


def ops_table(infos: list[Entry]) -> list[str]:
    """Each op beside its eager and its compiled reference, at each size."""
    ways = {(info["work"], info["way"]): info for info in infos}
    rows = []
    for info in infos:
        seconds, floor, extra = info["seconds"], floor_of(info), info["extra_bytes"]
        cells = [
            f"{seconds['median'] * 1e6:.1f}",
            f"{seconds['p20'] * 1e6:.1f} to {seconds['p80'] * 1e6:.1f}",
            f"{info['floor_bytes'] / 1e6:.1f}",
            f"{info['floor_flops'] / 1e9:.2f}" if info["floor_flops"] else "",
            f"{floor * 1e6:.1f}" if floor else "",
            f"{floor / seconds['median']:.0%}" if floor else "",
            *(ratio(info, ways.get((info["work"], way))) for way in ("eager", "compiled")),
            "" if extra is None else f"{extra / 1e6:.1f}",
        ]
        rows.append([info["work"], info["way"], *cells, HOW[seconds["how"]]])
    columns = [
        *("workload", "way", "median, µs", "p20 to p80, µs", "floor, MB", "floor, GFLOP", "floor, µs", "of the floor"),
        *("over eager", "over compiled", "extra memory, MB", "timed by"),
    ]
    legend = "Floor, µs: the least bytes the op can move at the rate of a copy, or its FLOPs at that of a product."
    copy, product = (infos[0][rate] for rate in ("copy_bytes_per_second", "matmul_flops_per_second"))
    rates = f" A large copy: {copy / 1e9:.0f} GB/s; a bf16 product: {product / 1e12:.0f} TFLOP/s." if copy else ""
    return [*table(columns, rows, left=2), "", legend + rates]


def rate_of(step: Entry) -> float:
    """Pairs of views a second."""
    return step["setting"]["batch"] / step["seconds"]["median"]


def times_as_fast(step: Entry | None, other: Entry | None) -> str:
    """How many times as fast a step is as another way's; nothing where either went wrong or is missing."""
    if not step or not other:
        return ""
    if step["correct"] is not True or other["correct"] is not True:
        return "wrong results"
    return f"{rate_of(step) / rate_of(other):.2f}"


def steps_table(steps: list[Entry]) -> list[str]:
    """Each way of doing a step beside ours at the same batch, and what the comparison says."""
    ways = {(step["step"], step["setting"]["batch"]): step for step in steps}
    rows = [
        [
            step["step"] + (" (compiled)" if step["compiled"] else ""),
            str(batch := step["setting"]["batch"]),
            f"{rate_of(step):.0f}" if rate_of(step) >= 100 else f"{rate_of(step):.1f}",
            f"{step['seconds']['median'] * 1e3:.1f}",
            f"{step['seconds']['p20'] * 1e3:.1f} to {step['seconds']['p80'] * 1e3:.1f}",
            "" if step["peak_bytes"] is None else f"{step['peak_bytes'] / 2**30:.2f}",
            f"{(flops := step['flops'] / step['seconds']['median']) / 1e12:.2f}",
            f"{flops / ceiling:.0%}" if (ceiling := step["matmul_flops_per_second"]) else "",
            "" if step["step"] == "ours" else times_as_fast(ways.get(("ours", batch)), step),
        ]
        for step in sorted(steps, key=lambda step: (step["setting"]["batch"], -rate_of(step)))
    ]
    columns = ["way", "batch", "pairs/s", "median, ms", "p20 to p80, ms", "peak memory, GiB", "TFLOP/s", "of a matmul",
               "ours over it"]  # fmt: skip
    first = steps[0]
    sizes = "{backbone} up to {last_stage}, {image_size} px, queue {queue_size}".format(**first["setting"])
    timed = "steps in turn, wall clock" if first["seconds"]["how"] == "wall" else "events around each step"
    legend = f"{sizes}; {timed}, {first['rounds']} of each. TFLOP/s: the encoders' convolutions alone."
    return [*table(columns, rows), "", legend]


def loaders_table(entries: list[Entry]) -> list[str]:
    """Each loader and cache, seconds of the first and the second epoch."""
    rows = []
    for entry in entries:
        info, params = entry["extra_info"], entry["params"]
        second = info.get("second_epoch_seconds")
        cells = [f"{info['first_epoch_seconds']:.1f}", f"{second:.1f}" if second else ""]
        rate = info.get("images_per_second")
        rows.append([params["loader"], params["cache"], *cells, f"{rate:.0f}" if rate else ""])
    columns = ["loader", "cache", "first epoch, filling included, s", "second epoch, s", "pairs/s"]
    return table(columns, rows, left=2)


def views_table(entries: list[Entry]) -> list[str]:
    """Views of decoded pixels a second on one CPU core, beside torchvision's of the same pixels."""
    rows = []
    for entry in entries:
        info, params = entry["extra_info"], entry["params"]
        ours, theirs = (info.get(f"{of}views_per_second") for of in ("", "torchvision_"))
        compared = [f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"] if ours else ["", f"{theirs:.0f}", ""]
        rows.append([params["kind"], f"{params['width']}x{params['height']}", str(params["size"]), *compared])
    return table(["views", "images, px", "to, px", "views/s", "torchvision's", "times as fast"], rows, left=2)


def sorted_out(report: Entry) -> dict[str, list[Entry]]:
    """The entries by what they are: `ops` and `step` (their extra_info), `loader`, `views` and `rest` (whole)."""
    kinds: dict[str, list[Entry]] = {"ops": [], "step": [], "loader": [], "views": [], "rest": []}
    marks = {"work": "ops", "step": "step", "torchvision_views_per_second": "views", "first_epoch_seconds": "loader"}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        kind = next((kind for mark, kind in marks.items() if mark in info), "rest")
        kinds[kind].append(info if kind in ("ops", "step") else entry)
    return kinds


def tables(path: Path) -> str:
    """The report in `path`: heading, tables of the ops, the steps, the loaders, the views, and the rest."""
    report = read(path)
    makers = {"ops": ops_table, "step": steps_table, "loader": loaders_table, "views": views_table, "rest": plain_table}
    kinds = sorted_out(report)
    parts = [[heading(report)], *(make(kinds[kind]) for kind, make in makers.items() if kinds[kind])]
    return "\n\n".join("\n".join(part) for part in parts)


def read(path: Path) -> Entry:
    """A pytest-benchmark report; `UsageError` for what is none."""
    try:
        report: Entry = json.loads(path.read_text())
        _ = report["machine_info"], report["benchmarks"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a report of pytest-benchmark") from None
    return report


def keep(path: Path, folder: Path = RESULTS) -> Path:
    """Write the report without its raw samples as `<what>_<gpu or cpu>_<torch>_<date>.json` into `folder`."""
    report = read(path)
    for entry in report["benchmarks"]:
        entry["stats"].pop("data", None)
    report["commit_info"] = {key: report.get("commit_info", {}).get(key) for key in ("id", "time", "dirty")}
    report["machine_info"] = {key: report["machine_info"].get(key) for key in ("cpu", "fastcr", "python_version")}
    report["machine_info"]["cpu"].pop("flags", None)
    facts = report["machine_info"]["fastcr"]
    what = "-".join(kind for kind, entries in sorted_out(report).items() if entries)
    where = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "cpu").lower()).strip("-")
    torch = facts["torch"].partition("+")[0]
    folder.mkdir(exist_ok=True)
    kept = folder / f"{what}_{where}_{torch}_{report['datetime'][:10]}.json"
    kept.write_text(json.dumps(report, indent=1) + "\n")
    return kept


@dataclass(frozen=True)
class ReportConfig:
    """Which reports to show."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Reports of pytest-benchmark (--benchmark-json)."""
    keep: bool = False
    """Also write each report, without the raw samples, under its proper name into bench/results/."""


def main(args: Sequence[str]) -> None:
    """Print the tables of the reports named in `args`."""
    with one_line_errors("bench/report.py"):
        config = parse(ReportConfig, args, prog=called("bench/report.py"), description=__doc__)
        if not config.files:
            raise UsageError("name the files to report on (pytest bench --benchmark-json FILE.json writes them)")
        print("\n\n".join(tables(path) for path in config.files))
        if config.keep:
            for path in config.files:
                print(f"kept as {keep(path)}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
