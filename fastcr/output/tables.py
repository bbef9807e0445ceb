"""The tables and the verdict that people see of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from fastcr.measures.poolings import SHOWN
from fastcr.measures.results import best_pooling
from fastcr.output import sheets

CHANCE = 0.05  # p value below which, and
ERRORS = 2  # standard errors above which, a difference is said to be more than chance


def results_tables(results: dict[str, Any], *, every: bool = False) -> Iterator[Table | str]:
    """The results for people: mean, attention and best pooling, the verdict, whatever else was measured.

    With `every`, retrieval by each pooling too.
    """
    yield retrieval_table(results)
    if line := best_line(results):
        yield line
    if every:
        yield from poolings_tables(results)
    others = others_table(results)
    if others.row_count:
        yield others


def text_of(table: Table) -> sheets.Table:
    """A table of the terminal for a page."""
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return sheets.Table(str(table.title or ""), [str(column.header) for column in table.columns], list(rows))


def name_of(best: dict[str, Any]) -> str:
    """A pooling in words, from what `best_pooling` gives."""
    name = SHOWN.get(best["pooling"], best["pooling"])
    return f"{name} (mean subtracted)" if best["centred"] else name


def _sides(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Title and scores of the encoder before and after training; a single one is not told apart."""
    if "frozen_init" not in results:
        return [("", results)]
    before = ("before", results["frozen_init"])
    untrained = results["retrieval"] == results["frozen_init"]["retrieval"]  # after no epoch both are one
    return [before] if untrained else [before, ("after", results)]


def _cells(found: dict[str, Any], *keys: str) -> list[str]:
    return [f"{found[key]:.2f}" if key in found else "" for key in keys]


def retrieval_table(results: dict[str, Any]) -> Table:
    """Rank-1 and mAP by the mean, the attention and the best pooling, before and after training."""
    sides, title = _sides(results), f"{results['images']} images of {results['classes']} classes: retrieval, percent"
    caption = "best: the pooling with the highest mAP on these images\nfastcr evaluate RUN --all shows every measure"
    table = Table(title=title, caption="before and after training; " * (len(sides) > 1) + caption)
    table.add_column("pooling", no_wrap=True)
    for title, _ in sides:
        for measure in ("rank-1", "mAP"):
            table.add_column(f"{title}\n{measure}".strip(), justify="right")
    for name in ("mean", "rationale"):
        if name in results["retrieval"]:
            cells = [cell for _, part in sides for cell in _cells(part["retrieval"][name], "rank1", "mAP")]
            table.add_row(SHOWN.get(name, name), *cells)
    best = [best_pooling(part) for _, part in sides]
    names = list(dict.fromkeys(map(name_of, best)))
    label = f"best: {names[0]}" if len(names) == 1 else f"best: {names[0]},\nthen {names[1]}"
    table.add_row(label, *(cell for each in best for cell in _cells(each, "rank1", "mAP")))
    return table


def best_line(results: dict[str, Any]) -> str | None:
    """What training has changed at the best pooling, and whether chance would do as much; None without a comparison."""
    if "frozen_init" not in results:
        return None
    before, after = best_pooling(results["frozen_init"]), best_pooling(results)
    if len(_sides(results)) == 1:
        return f"best pooling: {name_of(before)}; the encoder is as it was before training"
    rank1 = f"rank-1 {after['rank1']:.1f} after training, {before['rank1']:.1f} before"
    precision = f"mAP {after['mAP']:.1f}, before {before['mAP']:.1f}"
    if found := results.get("comparison"):
        moved = f"{found['gained']} of {found['queries']} pictures gained, {found['lost']} lost"
        rank1 += f" ({moved}: {_judged(found['p_value'] < CHANCE)})"
        difference, error = found["mAP_difference"], found["mAP_standard_error"]
        precision += f" ({difference:+.1f}, standard error {error:.1f}: {_judged(abs(difference) > ERRORS * error)})"
    return f"best pooling, {name_of(before)} before and {name_of(after)} after: {rank1}; {precision}"


def _judged(differs: bool) -> str:
    return "more than chance" if differs else "no difference that can be told apart from chance"


def poolings_tables(results: dict[str, Any]) -> Iterator[Table]:
    """Every pooling, as it is and with the mean subtracted: rank-1, rank-5 and mAP; a star marks the best mAP."""
    for section, title in (("retrieval", "every pooling"), ("retrieval_centred", "every pooling, mean subtracted")):
        if section not in results:
            continue
        table, sides = Table(title=f"{title}: retrieval, percent"), _sides(results)
        table.add_column("pooling", no_wrap=True)
        for side, _ in sides:
            for measure in ("rank-1", "rank-5", "mAP"):
                table.add_column(f"{side}\n{measure}".strip(), justify="right")
        for name in results[section]:
            row, cells = {"pooling": name, "centred": section == "retrieval_centred"}, []
            for _, part in sides:
                *ranks, precision = _cells(part.get(section, {}).get(name, {}), "rank1", "rank5", "mAP")
                best = row.items() <= best_pooling(part).items()
                cells += [*ranks, "* " * best + precision]
            table.add_row(SHOWN.get(name, name), *cells)
        yield table


def others_table(results: dict[str, Any]) -> Table:
    """Every measure but retrieval, a row each; an embedding a column."""
    table = Table(title="other measures, percent")
    table.add_column("measure")
    columns = [
        (title, part, name) for title, part in _sides(results) for name in ("mean", "rationale")
        if name in part["retrieval"]
    ]  # fmt: skip
    for title, _, name in columns:
        table.add_column(f"{title}\n{SHOWN.get(name, name)}".strip(), justify="right")

    def row(section: str, key: str) -> tuple[str, ...]:
        return tuple(f"{part[section][name][key]:.2f}" for _, part, name in columns)

    for section, key, shown in (
        ("knn", "top1", "kNN top-1"), ("linear", "top1", "linear top-1"), ("linear", "top5", "linear top-5"),
    ):  # fmt: skip
        if section in results:
            table.add_row(shown, *row(section, key))
    for percent in results.get("few_label", {}).get("mean", {}):
        table.add_row(f"linear, {percent} % of labels", *row("few_label", percent))
    table.add_section()
    maps = {"attention": "attention", "average": "average map", "gaussian": "Gaussian", "uniform": "uniform map"}
    for kind in results.get("localisation", {}):
        for key, what in (("inside", "in the box"), ("pointing", "peak in the box")):
            found = [part["localisation"][kind] if name == "rationale" else {} for _, part, name in columns]
            table.add_row(f"{maps[kind]}, {what}", *(cell for each in found for cell in _cells(each, key)))
    return table
