"""The tables that people see of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from fastcr.measures.results import best_pooling


def results_tables(results: dict[str, Any]) -> Iterator[Table | str]:
    """The results for people: retrieval by each pooling, the best of them, and every other measure."""
    yield retrieval_table(results)
    if line := best_line(results):
        yield line
    others = _others_table(results)
    if others.row_count:
        yield others


def _untrained(results: dict[str, Any]) -> bool:
    """Whether both encoders are one: after no epoch."""
    return "retrieval" in results and results["retrieval"] == results.get("frozen_init", {}).get("retrieval")


def _parts(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if _untrained(results):
        return [("frozen init", results)]
    frozen = [("frozen init", results["frozen_init"])] if "frozen_init" in results else []
    return [*frozen, ("frozen" if "encoder" in results else "trained", results)]


def retrieval_table(results: dict[str, Any]) -> Table:
    """A pooling a row; rank-1, rank-5 and mAP of each encoder, the best rank-1 of it marked with a star."""
    table = Table(title=f"{results['images']} images of {results['classes']} classes: retrieval, percent")
    table.add_column("pooling", no_wrap=True)
    table.caption = "(c), centred: less the mean over these images"
    parts = _parts(results)
    for title, _ in parts:
        for shown in ("rank-1", "rank-5", "mAP"):
            table.add_column(f"{title}\n{shown}", justify="right")
    for section, suffix in (("retrieval", ""), ("retrieval_centred", " (c)")):
        for name in results.get(section, {}):
            cells = []
            for _, part in parts:
                found, best = part.get(section, {}).get(name, {}), best_pooling(part)
                marked = (name, bool(suffix)) == (best["pooling"], best["centred"])
                rank1, *others = (f"{found[key]:.2f}" if key in found else "" for key in ("rank1", "rank5", "mAP"))
                cells += ["* " * marked + rank1, *others]
            table.add_row(f"{name}{suffix}", *cells)
        table.add_section()
    return table


def best_line(results: dict[str, Any]) -> str | None:
    """One line: the best of the trained encoder, if it is one, beside the best that needs no training, if there is."""
    best = results.get("best", {})
    if "baseline" not in best:
        return None

    def said(found: dict[str, Any]) -> str:
        return f"{found['pooling']}{' centred' * found['centred']} {found['rank1']:.2f} / {found['mAP']:.2f}"

    if "trained" not in best:
        return f"best (rank-1 / mAP): {said(best['baseline'])}"
    if _untrained(results):
        return f"best (rank-1 / mAP): {said(best['trained'])}, of the initial encoder"
    gain = best["trained"]["rank1"] - best["baseline"]["rank1"]
    verdict = f"training {'loses' if gain < 0 else 'gains'} {abs(gain):.2f} points"
    return (
        f"best (rank-1 / mAP): trained: {said(best['trained'])}; without training: {said(best['baseline'])}; {verdict}"
    )


def _others_table(results: dict[str, Any]) -> Table:
    """A measure a row, an embedding a column."""
    table = Table(title="other measures, percent")
    table.add_column("measure")
    parts = _parts(results)
    columns = [(part, name) for _, part in parts for name in ("mean", "rationale") if name in part["retrieval"]]
    for title, part in parts:
        for name in ("mean", "rationale"):
            if name in part["retrieval"]:
                table.add_column(f"{title}\n{name}", justify="right")
    few = results.get("few_label", {}).get("mean", {})
    rows = [
        ("knn", "top1", "kNN top-1"),
        *(("linear", key, f"linear {shown}") for key, shown in (("top1", "top-1"), ("top5", "top-5"))),
        *(("few_label", percent, f"linear, {percent} % of labels") for percent in few),
    ]
    for section, key, shown in rows:
        if section in results:
            table.add_row(shown, *(f"{part[section][name][key]:.2f}" for part, name in columns))
    if "localisation" in results:
        table.add_section()
        maps = {"attention": "attention", "average": "average map", "gaussian": "Gaussian", "uniform": "uniform"}
        for kind, shown in maps.items():
            for key, what in (("inside", "in the box"), ("pointing", "pointing"), ("parts", "at a part")):
                if key not in results["localisation"].get(kind, {}):  # a results.json of before has fewer maps
                    continue
                found = [part["localisation"][kind][key] if name == "rationale" else None for part, name in columns]
                table.add_row(f"{shown} {what}", *("" if each is None else f"{each:.2f}" for each in found))
    return table
