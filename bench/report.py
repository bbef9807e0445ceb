"""`python bench/report.py FILE.json ...`: pytest-benchmark's reports as Markdown tables, one report after the other.

`--png FILE` also draws the reports' steps and ops in one figure; `--keep True` also writes each report, without the raw
samples, into bench/results/, under a name that says what was measured where and when.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.report_tables import Entry, floor_of, keep, machine, rate_of, read, sorted_out, tables
from fastcr.config import tyro
from fastcr.errors import UsageError
from fastcr.runs.command_line import called, one_line_errors, parse

COLOURS = {"op": "#1b6ca8", "eager": "#c9822b", "compiled": "#7a7a7a"}


def draw(reports: Sequence[Entry], picture: Path) -> None:
    """Every way's pairs/s, every op's bytes/s beside those of a copy; `UsageError` where the reports hold neither."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--png needs matplotlib: pip install 'fastcr[report]'") from None
    panels: list[tuple[Any, Entry, list[Entry]]] = []
    for report in reports:
        kinds = sorted_out(report)
        steps = sorted(kinds["step"], key=lambda step: (-step["setting"]["batch"], rate_of(step)))
        panels += [(bars, report, steps)] if steps else []
        panels += [(roofline, report, kinds["ops"])] if kinds["ops"] else []
    if not panels:
        raise UsageError("--png: the reports hold neither steps nor ops")
    heights = [1.3 + 0.27 * len({(e.get("step"), e.get("work"), str(e.get("setting"))) for e in each})
               for _, _, each in panels]  # fmt: skip
    figure = Figure(figsize=(8, sum(heights)), dpi=200, layout="constrained", facecolor="white")
    every = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (make, report, entries) in zip(every, panels, strict=True):
        make(axes, entries)
        what = "Training step" if make is bars else "Fused ops"
        axes.set_title(
            f"{what}: {machine(report)}, torch {report['machine_info']['fastcr']['torch']}", fontsize=10, loc="left"
        )
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def bars(axes: Any, steps: list[Entry]) -> None:
    """One bar a way and batch, its whiskers from p20 to p80; a way that went wrong is hatched and says so."""
    labels = [f"{step['step']}{', compiled' * step['compiled']}  B {step['setting']['batch']}" for step in steps]
    colours = ["#1b6ca8" if step["step"].startswith("ours") else "#b8c4ce" for step in steps]
    rates = [rate_of(step) for step in steps]
    batches = [step["setting"]["batch"] for step in steps]
    whiskers = [
        [
            max(rate - batch / step["seconds"]["p80"], 0)
            for rate, batch, step in zip(rates, batches, steps, strict=True)
        ],
        [
            max(batch / step["seconds"]["p20"] - rate, 0)
            for rate, batch, step in zip(rates, batches, steps, strict=True)
        ],
    ]
    drawn = axes.barh(range(len(steps)), rates, color=colours, xerr=whiskers, error_kw={"elinewidth": 1, "capsize": 2})
    for i, (step, rate, bar) in enumerate(zip(steps, rates, drawn, strict=True)):
        wrong = step["correct"] is not True
        bar.set_hatch("///" if wrong else None)
        end = rate + whiskers[1][i]
        axes.annotate("wrong results" if wrong else f"{rate:.0f}", (end, i), (4, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(steps)), labels)
    axes.set_xlabel("pairs/s (a supervised step: images/s), median; whiskers from p20 to p80", fontsize=9)
    axes.margins(x=0.12)


def roofline(axes: Any, infos: list[Entry]) -> None:
    """One line a workload: the least bytes over the time of the op, of eager and of compiled, and over the floor's."""
    works = list(dict.fromkeys(info["work"] for info in infos))[::-1]
    for way, colour in COLOURS.items():
        mine = [info for info in infos if info["way"] == way]
        rates = [info["floor_bytes"] / info["seconds"]["median"] / 1e9 for info in mine]
        places = [works.index(info["work"]) for info in mine]
        axes.scatter(rates, places, color=colour, s=28, zorder=3, label=way)
        for info, rate, place in zip(mine, rates, places, strict=True):
            if way == "op" and info["correct"] is not True:
                axes.annotate("wrong results", (rate, place), (6, 0), textcoords="offset points", fontsize=9)
    if floors := [(info, floor) for info in infos if (floor := floor_of(info))]:  # of a copy, or of a product
        rates = [info["floor_bytes"] / floor / 1e9 for info, floor in floors]
        places = [works.index(info["work"]) for info, _ in floors]
        axes.scatter(rates, places, color="black", marker="|", s=160, label="floor")
    axes.set_yticks(range(len(works)), works)
    axes.set_xlim(left=0)
    axes.set_xlabel("GB/s: the least bytes the op can move, over its median", fontsize=9)
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


@dataclass(frozen=True)
class ReportConfig:
    """Which reports, and what to make of them beside the tables."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Reports of pytest-benchmark (--benchmark-json)."""
    png: Path | None = None
    """Also draw a figure of steps and ops into this file; needs matplotlib."""
    keep: bool = False
    """Also write each report, without the raw samples, under its proper name into bench/results/."""


def main(args: Sequence[str]) -> None:
    """Print the tables of the reports named in `args`."""
    with one_line_errors("bench/report.py"):
        config = parse(ReportConfig, args, prog=called("bench/report.py"), description=__doc__)
        if not config.files:
            raise UsageError("name the files to report on (pytest bench --benchmark-json FILE.json writes them)")
        print("\n\n".join(tables(path) for path in config.files))
        if config.png:
            draw([read(path) for path in config.files], config.png)
        if config.keep:
            for path in config.files:
                print(f"kept as {keep(path)}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
