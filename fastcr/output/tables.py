"""The tables and the verdict that people see of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Column, Table

from fastcr.measures.poolings import SHOWN
from fastcr.measures.results import best_pooling
from fastcr.output import sheets

CHANCE = 0.05  # p value below which, and
ERRORS = 2  # standard errors above which, a difference is said to be more than chance
WAYS = {"expanded": "query expansion", "whitened": "whitened, expanded", "reciprocal": "k-reciprocal"}  # of re-ranking
MAPS = {"attention": "attention", "average": "average map", "gaussian": "Gaussian", "uniform": "uniform map"}
Sides = list[tuple[str, dict[str, Any]]]  # title and scores of the encoder before and after training


def results_tables(results: dict[str, Any], *, every: bool = False) -> Iterator[Table | str]:
    """The results for people: mean, attention and best pooling, the verdict, whatever else was measured.

    With `every`, retrieval by each pooling too.
    """
    if "ranking" in results or "pairs" in results:
        yield from ranking(results) if "ranking" in results else by_pairs(results)
        return
    table = retrieval_table(results)
    table.caption = f"{table.caption}" + "\nfastcr evaluate RUN --all shows every measure" * (not every)
    yield table
    if line := best_line(results):
        yield line
    if every:
        yield poolings_table(results)
    if (others := others_table(results)).row_count:
        yield others


def ranking(results: dict[str, Any]) -> Iterator[Table | str]:
    """Frozen encoders, the best by mAP first."""
    rows, knn = results["ranking"], ["kNN"] * any("knn" in row for row in results["ranking"])
    title = f"{results['images']} images of {results['classes']} classes: retrieval, percent"
    table = Table(Column("encoder", overflow="fold"), Column("px", justify="right"), "pooling", title=title)
    for name in ("rank-1", "mAP", *knn, "s / 1,000"):
        table.add_column(name, justify="right")
    table.caption = "s / 1,000: seconds of the encoder for a thousand pictures, without reading them"
    for row in rows:
        figures = (*_cells(row, "rank1", "mAP", *map(str.lower, knn)), f"{row['seconds']:.1f}")
        table.add_row(row["encoder"], str(row["image_size"]), SHOWN.get(row["pooling"], row["pooling"]), *figures)
    yield table
    best = rows[0]
    yield f"to search with the best one: fastcr embed {best['encoder']} DIR --data.image_size {best['image_size']}"


def by_pairs(results: dict[str, Any]) -> Iterator[Table | str]:
    """What pairs of images say of encoders, each figure with its confidence range."""
    counts = results["pairs"]
    table = Table(Column("encoder", overflow="fold"), "pooling", "AUC", "accuracy")
    table.title = "pairs: {same} the same, {different} different, {left_out} left out as unreadable".format(**counts)
    table.caption = "percent, and the range that holds 95 % of 2,000 random draws of the pairs"
    for row in results["encoders"]:
        figures = ("{:.1f} [{:.1f}, {:.1f}]".format(*row[name]) for name in ("auc", "accuracy"))
        table.add_row(row["encoder"], SHOWN.get(row["pooling"], row["pooling"]), *figures)
    yield table
    if "gained" in results:
        figure, low, high = results["gained"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference that can be told apart from chance"
        said = f"the last row's AUC is {figure:+.1f} [{low:+.1f}, {high:+.1f}] from the best of the encoder before it"
        yield f"{said}: {verdict}"


def text_of(table: Table) -> sheets.Table:
    """A table of the terminal for a page."""
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return sheets.Table(str(table.title or ""), [str(column.header) for column in table.columns], list(rows))


def _sides(results: dict[str, Any]) -> Sides:
    """A single side has no title; after no epoch both are one."""
    if "frozen_init" not in results:
        return [("", results)]
    before = ("before", results["frozen_init"])
    if results["retrieval"] == results["frozen_init"]["retrieval"]:
        return [before]
    return [before, ("after", results), *([("end", results["end"])] if "end" in results else [])]


def _table(title: str, first: str, sides: Sides, columns: Sequence[str], caption: str | None = None) -> Table:
    """A table without rows, with the columns of each side."""
    table = Table(title=title, caption=caption)
    table.add_column(first, no_wrap=True)
    for side, _ in sides:
        for column in columns:
            table.add_column(f"{side}\n{column}".strip(), justify="right")
    return table


def _cells(found: dict[str, Any], *keys: str) -> list[str]:
    return [f"{found[key]:.2f}" if key in found else "" for key in keys]


def _name_of(best: dict[str, Any]) -> str:
    """A pooling in words, from what `best_pooling` gives."""
    name = SHOWN.get(best["pooling"], best["pooling"])
    return f"{name} (mean subtracted)" if best["centred"] else name


def retrieval_table(results: dict[str, Any]) -> Table:
    """Rank-1 and mAP by the mean, the attention and the best pooling, before and after training."""
    sides = _sides(results)
    caption = "best: the pooling with the highest mAP on these images"
    if len(sides) > 1:
        end = " (the encoder that was saved, which lies before the end)" if len(sides) > 2 else ""
        caption = f"before and after training{end}; {caption}"
    title = f"{results['images']} images of {results['classes']} classes: retrieval, percent"
    table = _table(title, "pooling", sides, ("rank-1", "mAP"), caption)
    for name in ("mean", "rationale"):
        if name in results["retrieval"]:
            cells = [cell for _, part in sides for cell in _cells(part["retrieval"][name], "rank1", "mAP")]
            table.add_row(SHOWN.get(name, name), *cells)
    best = [best_pooling(part) for _, part in sides]
    names = list(dict.fromkeys(map(_name_of, best)))
    label = ",\nthen ".join([f"best: {names[0]}", *names[1:]])
    table.add_row(label, *(cell for each in best for cell in _cells(each, "rank1", "mAP")))
    return table


def best_line(results: dict[str, Any]) -> str | None:
    """What training has changed at the best pooling, and whether chance would do as much; None without a comparison."""
    if "frozen_init" not in results:
        return None
    before, after = best_pooling(results["frozen_init"]), best_pooling(results)
    if len(_sides(results)) == 1:
        return f"best pooling: {_name_of(before)}; the encoder is as it was before training"
    rank1 = f"rank-1 {after['rank1']:.1f} after training, {before['rank1']:.1f} before"
    precision = f"mAP {after['mAP']:.1f}, before {before['mAP']:.1f}"
    if found := results.get("comparison"):
        moved = f"{found['gained']} of {found['queries']} pictures gained, {found['lost']} lost"
        rank1 += f" ({moved}: {_judged(found['p_value'] < CHANCE)})"
        difference, error = found["mAP_difference"], found["mAP_standard_error"]
        precision += f" ({difference:+.1f}, standard error {error:.1f}: {_judged(abs(difference) > ERRORS * error)})"
    return f"best pooling, {_name_of(before)} before and {_name_of(after)} after: {rank1}; {precision}"


def _judged(differs: bool) -> str:
    return "more than chance" if differs else "no difference that can be told apart from chance"


def poolings_table(results: dict[str, Any]) -> Table:
    """Every pooling, as it is and with the mean subtracted: rank-1, rank-5 and mAP; a star marks the best mAP."""
    sides = _sides(results)
    table = _table("every pooling: retrieval, percent", "pooling", sides, ("rank-1", "rank-5", "mAP"))
    for section, title in (("retrieval", "as they are:"), ("retrieval_centred", "mean subtracted:")):
        table.add_row(title)
        for name in results.get(section, {}):
            row, cells = {"pooling": name, "centred": section == "retrieval_centred"}, list[str]()
            for _, part in sides:
                *ranks, precision = _cells(part.get(section, {}).get(name, {}), "rank1", "rank5", "mAP")
                best = row.items() <= best_pooling(part).items()
                cells += [*ranks, "* " * best + precision]
            table.add_row(SHOWN.get(name, name), *cells)
        table.add_section()
    for name, ways in results.get("reranked", {}).items():  # of embeddings whose mean is subtracted
        table.add_row(f"{SHOWN.get(name, name)}, re-ranked:")
        for way in ways:
            found = [part.get("reranked", {}).get(name, {}).get(way, {}) for _, part in sides]
            cells = [cell for each in found for cell in _cells(each, "rank1", "rank5", "mAP")]
            table.add_row(WAYS[way], *cells)
        table.add_section()
    return table


def others_table(results: dict[str, Any]) -> Table:
    """Every measure but retrieval, a row each; an embedding a column."""
    sides, classified = _sides(results), "knn" in results or "linear" in results
    names = [name for name in ("mean", "rationale")[not classified :] if name in results["retrieval"]]
    table = _table("other measures, percent", "measure", sides, [SHOWN.get(name, name) for name in names])
    rows = [("kNN top-1", "knn", "top1"), ("linear top-1", "linear", "top1"), ("linear top-5", "linear", "top5")]
    few = results.get("few_label", {}).get("mean", {})
    for title, section, key in [*rows, *((f"linear, {percent} % of labels", "few_label", percent) for percent in few)]:
        if section in results:
            found = [part[section][name] for _, part in sides for name in names]
            table.add_row(title, *(cell for each in found for cell in _cells(each, key)))
    table.add_section()
    for kind in results.get("localisation", {}):
        for key, what in (("inside", "in the box"), ("pointing", "peak in the box")):
            found = [part["localisation"][kind] if name == "rationale" else {} for _, part in sides for name in names]
            table.add_row(f"{MAPS[kind]}, {what}", *(cell for each in found for cell in _cells(each, key)))
    return table
