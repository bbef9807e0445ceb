"""`python bench/report.py FILE.json ...`: pytest-benchmark reports as Markdown tables, one report after the other.

`--png FILE` draws the reports' steps and ops in one picture as well; `--keep True` also writes each report, without the
raw samples, under its proper name into bench/results/.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcr.config import tyro
from fastcr.errors import UsageError
from fastcr.runs.command_line import one_line_errors, parse

Entry = dict[str, Any]
HOW = {"graph": "CUDA graph", "events": "events, not capturable", "wall": "wall clock"}
RESULTS = Path(__file__).parent / "results"
PEERS = ("released", "lightly", "lightly-tuned", "lightly-tuned-compile")
MOCO_ONLY = PEERS[1:]  # plain MoCo v2: they do less than `ours`
COLOURS = {"op": "#1b6ca8", "eager": "#c9822b", "compiled": "#7a7a7a"}


def machine(report: Entry) -> str:
    """The GPU, or the CPU, named so."""
    facts = report["machine_info"].get("fastcr", {})
    brand = report["machine_info"]["cpu"].get("brand_raw", "")
    return facts.get("gpu") or f"CPU {brand}, {facts.get('threads')} threads"


def heading(report: Entry) -> str:
    """The machine and the versions a report was made with."""
    facts = report["machine_info"].get("fastcr", {})
    where = machine(report)
    if facts.get("driver") and facts.get("gpu"):
        where += f", driver {facts['driver']}"
    return f"**{where}**, torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {facts.get('commit')}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Markdown lines without columns that are empty; all but the `left` first columns are right-aligned."""
    filled = [column for column in zip(columns, *rows, strict=True) if any(column[1:])]
    columns, *rows = zip(*filled, strict=True)
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return [f"| {' | '.join(columns)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]


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
    notes = [note for batch in sorted({b for _, b in ways}) for note in comparisons(ways, batch)]
    legend = f"{sizes}; {timed}, {first['rounds']} of each. TFLOP/s: the encoders' convolutions alone."
    return [*table(columns, rows), "", legend, *(f"- {note}" for note in notes)]


def comparisons(ways: dict[tuple[str, int], Entry], batch: int) -> list[str]:
    """What the branch costs over plain MoCo v2, and ours over the fastest peer, in words."""
    ours, moco = ways.get(("ours", batch)), ways.get(("ours-moco", batch))
    peers = [ways[peer, batch] for peer in PEERS if (peer, batch) in ways and ways[peer, batch]["correct"] is True]
    best = max(peers, key=rate_of, default=None)
    notes = []
    if ours and moco and ours["correct"] is True and moco["correct"] is True:
        cost = ours["seconds"]["median"] / moco["seconds"]["median"] - 1
        notes.append(f"batch {batch}: the rationale branch adds {cost:+.1%} to a step of plain MoCo v2")
    if ours and best:
        note = f"batch {batch}: ours over the fastest peer, {best['step']}: {times_as_fast(ours, best)}"
        if moco and best["step"] in MOCO_ONLY:
            note += f" (plain MoCo v2 in both: {times_as_fast(moco, best)})"
        notes.append(note)
    return notes


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


def sorted_out(report: Entry) -> dict[str, list[Entry]]:
    """The report's entries by what they are: `ops` and `step` (their extra_info), `loader` and `rest` (whole)."""
    kinds: dict[str, list[Entry]] = {"ops": [], "step": [], "loader": [], "rest": []}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        if "work" in info:
            kinds["ops"].append(info)
        elif "step" in info:
            kinds["step"].append(info)
        else:
            kinds["loader" if "first_epoch_seconds" in info else "rest"].append(entry)
    return kinds


def tables(path: Path) -> str:
    """The report in `path`: heading, tables of the ops, the steps, the loaders, and the rest."""
    report = read(path)
    kinds = sorted_out(report)
    makers = {"ops": ops_table, "step": steps_table, "loader": loaders_table, "rest": plain_table}
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


def draw(paths: Sequence[Path], picture: Path) -> None:
    """Every way's pairs/s, every op's bytes/s beside those of a copy; `UsageError` where the reports hold neither."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--png needs matplotlib: pip install 'fastcr[report]'") from None
    panels: list[tuple[Any, Entry, list[Entry]]] = []
    for path in paths:
        report = read(path)
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
    """One line a workload: the op, eager and compiled at the bytes/s of the floor, and the copy rate above them."""
    works = list(dict.fromkeys(info["work"] for info in infos))[::-1]
    for way, colour in COLOURS.items():
        mine = [info for info in infos if info["way"] == way]
        rates = [info["floor_bytes"] / info["seconds"]["median"] / 1e9 for info in mine]
        places = [works.index(info["work"]) for info in mine]
        axes.scatter(rates, places, color=colour, s=28, zorder=3, label=way)
        for info, rate, place in zip(mine, rates, places, strict=True):
            if way == "op" and info["correct"] is not True:
                axes.annotate("wrong results", (rate, place), (6, 0), textcoords="offset points", fontsize=9)
    copy = next((info["copy_bytes_per_second"] for info in infos if info["copy_bytes_per_second"]), None)
    if copy:
        axes.axvline(copy / 1e9, color="black", linewidth=1, linestyle="--", label=f"a copy, {copy / 1e9:.0f}")
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
    """Also draw steps and ops into this picture; needs matplotlib."""
    keep: bool = False
    """Also write each report, without the raw samples, under its proper name into bench/results/."""


def main(args: Sequence[str]) -> None:
    """Print the tables of the reports named in `args`."""
    with one_line_errors("report"):
        config = parse(ReportConfig, args, prog="python bench/report.py", description=__doc__)
        if not config.files:
            raise UsageError("name the files to report on (pytest bench --benchmark-json FILE.json writes them)")
        print("\n\n".join(tables(path) for path in config.files))
        if config.png:
            draw(config.files, config.png)
        if config.keep:
            for path in config.files:
                print(f"kept as {keep(path)}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
