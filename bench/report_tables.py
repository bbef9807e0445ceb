"""pytest-benchmark's reports as Markdown tables: one each for ops, steps, loaders, and whatever else was timed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.timing import Ceilings, Work
from fastcr.errors import UsageError

Entry = dict[str, Any]
HOW = {"graph": "CUDA graph", "events": "events, not capturable", "wall": "wall clock", "cpu": "CPU time of a thread"}
RESULTS = Path(__file__).parent / "results"
PEERS = ("released", "lightly", "lightly-tuned", "lightly-tuned-compile")
MOCO_ONLY = PEERS[1:]  # plain MoCo v2: they do less than `ours`


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


def floor_of(info: Entry) -> float | None:
    """Seconds an op takes at least on the device it was timed on; None where the ceilings were not measured."""
    if not info["copy_bytes_per_second"]:
        return None
    ceilings = Ceilings(info["copy_bytes_per_second"], info["matmul_flops_per_second"])
    return Work(info["floor_bytes"], info["floor_flops"]).floor(ceilings)


def ops_table(infos: list[Entry]) -> list[str]:
    """Each op beside its eager and its compiled reference, at each size."""
    ways = {(info["work"], info["way"]): info for info in infos}
    lines = [
        "| workload | way | median, µs | p20 to p80, µs | floor, MB | floor, GFLOP | floor, µs | of the floor "
        "| over eager | over compiled | extra memory, MB | timed by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for info in infos:
        seconds, floor = info["seconds"], floor_of(info)
        cells = [
            info["work"],
            info["way"],
            f"{seconds['median'] * 1e6:.1f}",
            f"{seconds['p20'] * 1e6:.1f} to {seconds['p80'] * 1e6:.1f}",
            f"{info['floor_bytes'] / 1e6:.1f}",
            f"{info['floor_flops'] / 1e9:.2f}" if info["floor_flops"] else "",
            f"{floor * 1e6:.1f}" if floor else "",
            f"{floor / seconds['median']:.0%}" if floor else "",
            ratio(info, ways.get((info["work"], "eager"))),
            ratio(info, ways.get((info["work"], "compiled"))),
            "" if info["extra_bytes"] is None else f"{info['extra_bytes'] / 1e6:.1f}",
            HOW[seconds["how"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    legend = "Floor, µs: the least bytes the op can move at the rate of a copy, or its FLOPs at that of a product."
    copy, product = (infos[0][rate] for rate in ("copy_bytes_per_second", "matmul_flops_per_second"))
    rates = f" A large copy: {copy / 1e9:.0f} GB/s; a bf16 product: {product / 1e12:.0f} TFLOP/s." if copy else ""
    return [*lines, "", legend + rates]


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


def folded_table(infos: list[Entry]) -> list[str]:
    """Steps with frozen BatchNorm, folded beside not folded, and what each keeps for the backward pass."""
    ways = {(str(info["setting"]), info["frozen_step"]): info for info in infos}
    rows = []
    for info in (info for info in infos if info["frozen_step"] == "folded"):
        plain, setting = ways[str(info["setting"]), "norms"], info["setting"]
        times, kept = info["norms_over_folded"], (plain["kept_bytes"], info["kept_bytes"])
        right = "{median:.3f}|{p20:.3f} to {p80:.3f}".format(**times) if info["correct"] is True else "wrong results|"
        rows.append(
            [
                f"{setting['backbone']} up to {setting['last_stage']}, {setting['frozen_stages']} stages kept",
                f"{setting['batch']} x {setting['image_size']} px",
                setting["precision"],
                *(f"{each['seconds']['median'] * 1e3:.1f}" for each in (plain, info)),
                *right.split("|"),
                *("" if each is None else f"{each / 2**20:.0f}" for each in kept),
            ]
        )
    columns = ["encoder", "batch", "precision", "BatchNorm, ms", "folded, ms", "times as fast", "p20 to p80",
               "kept with BatchNorm, MiB", "kept folded, MiB"]  # fmt: skip
    legend = f"Steps in turn, {HOW[infos[0]['seconds']['how']]}, {infos[0]['rounds']} of each; ratios of neighbours."
    return [*table(columns, rows, left=3), "", legend]


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
    """The entries by what they are: `ops`, `step`, `folded` (their extra_info), `loader`, `views`, `rest` (whole)."""
    kinds: dict[str, list[Entry]] = {"ops": [], "step": [], "folded": [], "loader": [], "views": [], "rest": []}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        if "work" in info:
            kinds["ops"].append(info)
        elif "step" in info:
            kinds["step"].append(info)
        elif "frozen_step" in info:
            kinds["folded"].append(info)
        elif "torchvision_views_per_second" in info:
            kinds["views"].append(entry)
        else:
            kinds["loader" if "first_epoch_seconds" in info else "rest"].append(entry)
    return kinds


def tables(path: Path) -> str:
    """The report in `path`: heading, tables of the ops, the steps, the loaders, the views, and the rest."""
    report = read(path)
    kinds = sorted_out(report)
    makers = {"ops": ops_table, "step": steps_table, "folded": folded_table, "loader": loaders_table}
    makers |= {"views": views_table, "rest": plain_table}
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
