"""`python bench/report.py FILE.json ...`: pytest-benchmark reports as Markdown tables, one a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """The report in `path` as a heading that names the machine, and a table of medians in milliseconds."""
    report = json.loads(path.read_text())
    machine = report["machine_info"]
    facts = machine.get("fastcr", {})
    where = facts.get("gpu") or f"CPU {machine['cpu'].get('brand_raw', '')}, {facts.get('threads')} threads"
    lines = [
        f"**{where}**, torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {facts.get('commit')}",
        "",
        "| benchmark | median, ms | interquartile range, ms | images/s |",
        "|---|---:|---:|---:|",
    ]
    for entry in report["benchmarks"]:
        stats = entry["stats"]
        rate = entry["extra_info"].get("images_per_second")
        shown = f"{rate:.0f}" if rate else ""
        lines.append(f"| {entry['name']} | {stats['median'] * 1e3:.3f} | {stats['iqr'] * 1e3:.3f} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
