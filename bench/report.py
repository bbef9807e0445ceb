"""`python bench/report.py FILE.json ...`: pytest-benchmark reports as Markdown tables, one report after the other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
HOW = {"graph": "CUDA graph", "events": "events, not capturable", "wall": "wall clock"}


def heading(report: dict[str, Any]) -> str:
    """The machine and the versions a report was made with."""
    machine = report["machine_info"]
    facts = machine.get("fastcr", {})
    where = facts.get("gpu") or f"CPU {machine['cpu'].get('brand_raw', '')}, {facts.get('threads')} threads"
    if facts.get("driver") and facts.get("gpu"):
        where += f", driver {facts['driver']}"
    return f"**{where}**, torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {facts.get('commit')}"


def plain_table(entries: Iterable[Entry]) -> list[str]:
    """Wall-clock medians in milliseconds, as pytest-benchmark measured them."""
    lines = ["| benchmark | median, ms | interquartile range, ms | images/s |", "|---|---:|---:|---:|"]
    for entry in entries:
        stats = entry["stats"]
        rate = entry["extra_info"].get("images_per_second")
        shown = f"{rate:.0f}" if rate else ""
        lines.append(f"| {entry['name']} | {stats['median'] * 1e3:.3f} | {stats['iqr'] * 1e3:.3f} | {shown} |")
    return lines


def ratio(of: Entry, other: Entry | None) -> str:
    """How many times as fast as the other way an op is; only of one whose results were right in the same run.

    None on a CPU, where the op is the reference.
    """
    if of["way"] != "op" or of["seconds"]["how"] == "wall":
        return ""
    if of["correct"] is not True:
        return "wrong results"
    return f"{other['seconds']['median'] / of['seconds']['median']:.2f}" if other else ""


def ops_table(infos: list[Entry]) -> list[str]:
    """Each op beside its eager and its compiled reference, at each size."""
    ways = {(info["work"], info["way"]): info for info in infos}
    copy = next((info["copy_bytes_per_second"] for info in infos if info["copy_bytes_per_second"]), None)
    lines = [
        "| workload | way | median, µs | p20 to p80, µs | floor, MB | GB/s | of a copy | over eager | over compiled "
        "| extra memory, MB | timed by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for info in infos:
        seconds = info["seconds"]
        rate = info["floor_bytes"] / seconds["median"]
        cells = [
            info["work"],
            info["way"],
            f"{seconds['median'] * 1e6:.1f}",
            f"{seconds['p20'] * 1e6:.1f} to {seconds['p80'] * 1e6:.1f}",
            f"{info['floor_bytes'] / 1e6:.1f}",
            f"{rate / 1e9:.0f}",
            f"{rate / copy:.0%}" if copy else "",
            ratio(info, ways.get((info["work"], "eager"))),
            ratio(info, ways.get((info["work"], "compiled"))),
            "" if info["extra_bytes"] is None else f"{info['extra_bytes'] / 1e6:.1f}",
            HOW[seconds["how"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    legend = "GB/s: floor, the least bytes the op can move, over the median."
    return [*lines, "", legend + (f" A large copy: {copy / 1e9:.0f} GB/s." if copy else "")]


def tables(path: Path) -> str:
    """The report in `path`: heading, table of the ops, table of the rest."""
    report = json.loads(path.read_text())
    ops = [entry["extra_info"] for entry in report["benchmarks"] if "work" in entry["extra_info"]]
    rest = [entry for entry in report["benchmarks"] if "work" not in entry["extra_info"]]
    parts = [[heading(report)], ops_table(ops) if ops else [], plain_table(rest) if rest else []]
    return "\n\n".join("\n".join(part) for part in parts if part)


if __name__ == "__main__":
    print("\n\n".join(tables(Path(name)) for name in sys.argv[1:]))
