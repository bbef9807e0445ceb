"""`python bench/evidence_table.py STUDY/evidence.json`: a study of bench/evidence.py as Markdown tables.

Percent, the mean over seeds with [lowest, highest] behind it; `--md FILE` writes the tables there instead of printing
them. Nothing but the JSON is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcr.config import tyro
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, one_line_errors, parse

Run = dict[str, Any]
Column = tuple[Any, ...]  # where a run has a figure, and how many decimals it is shown with
RETRIEVAL: dict[str, Column] = {
    f"{shown}, {pooling}": (*place, 1)
    for shown, section, key in (
        *(("rank-1", "retrieval", "rank1"), ("rank-5", "retrieval", "rank5")),
        *(("mAP", "retrieval", "mAP"), ("kNN", "knn", "top1")),
    )
    for pooling, place in (("mean", (section, "mean", key)), ("attention", (section, "rationale", key)))
}
OTHERS: dict[str, Column] = {
    f"{shown}, {name}": (*place, key, 1)
    for shown, key in (("rank-1", "rank1"), ("mAP", "mAP"))
    for name, place in (
        ("mean, mean subtracted", ("retrieval_centred", "mean")),
        ("GeM, mean subtracted", ("retrieval_centred", "gem")),
        ("DDT", ("retrieval", "ddt")),
        ("DDT, mean subtracted", ("retrieval_centred", "ddt")),
        ("attention, mean subtracted", ("retrieval_centred", "rationale")),
        ("best pooling", ("best", "trained")),
        ("best without training", ("best", "baseline")),
    )
}
ATTENTION: dict[str, Column] = {
    "in the box": ("localisation", "attention", "inside", 1),
    "average map": ("localisation", "average", "inside", 1),
    "Gaussian": ("localisation", "gaussian", "inside", 1),
    "uniform": ("localisation", "uniform", "inside", 1),
    "peak in the box": ("localisation", "attention", "pointing", 1),
    "average map's peak": ("localisation", "average", "pointing", 1),
    "Gaussian's peak": ("localisation", "gaussian", "pointing", 1),
}
TRAINING: dict[str, Column] = {
    "contrast loss": ("last", "contrast_loss", 3),
    "fit loss, nats": ("last", "fit_loss", 4),
    "attention entropy, nats": ("last", "attention_entropy", 3),
    "effective detectors": ("last", "effective_detectors", 1),
    "effective rank": ("last", "effective_rank", 0),
    "neighbours kept": ("last", "kept_neighbours", 2),
    "seconds": ("seconds", 0),
}
TABLES = (  # title, columns, legend
    (
        "Retrieval and weighted kNN",
        RETRIEVAL,
        "Leave-one-out on the test images; kNN votes among the training images.",
    ),
    (
        "Retrieval by other poolings",
        OTHERS,
        "Mean subtracted: the mean over the test images is subtracted from each embedding. The best pooling is chosen "
        "among all that `fastcr evaluate` measures, by rank-1 in the runs of November 2026 and by mAP since; the best "
        "without training is that of the initial weights, the trained branch's own poolings excepted.",
    ),
    (
        "Share of the attention in the object's box",
        ATTENTION,
        "Average map: the average of the attention to all pictures, laid on each of them. Gaussian: centred, with the "
        "entropy of each picture's own map; it does not look at the picture.",
    ),
    ("End of the training", TRAINING, "Of the last batch that was logged; for the initial weights, of the first."),
)


def value_of(run: Run, place: Sequence[Any]) -> float | None:
    """What a run has at a place, e.g. `("retrieval", "mean", "rank1")`; None if it has not."""
    found: Any = run
    for key in place:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def spread(values: Sequence[float], decimals: int) -> str:
    """`12.3 [11.9, 12.8]`: mean and range; without a range if there is one value, empty if there is none."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{decimals}f}, {max(values):.{decimals}f}]"


def by_row(study: Run) -> dict[str, list[Run]]:
    """The finished runs of each row, in the order in which the rows were first run."""
    finished = [run for run in study["runs"].values() if run["status"] == "finished"]
    return {
        row: [run for run in finished if run["row"] == row] for row in dict.fromkeys(run["row"] for run in finished)
    }


def values_of(runs: Iterable[Run], place: Sequence[Any]) -> list[float]:
    """What the runs that have it have at a place."""
    return [value for run in runs if (value := value_of(run, place)) is not None]


def table(study: Run, columns: Mapping[str, Column]) -> list[str]:
    """Markdown lines, a row of the study a line, without columns that are empty."""
    rows = by_row(study)
    cells = {
        heading: [spread(values_of(runs, place), decimals) for runs in rows.values()]
        for heading, (*place, decimals) in columns.items()
    }
    cells = {heading: column for heading, column in cells.items() if any(column)}
    if not cells:
        return []
    lines = [f"| row | seeds | {' | '.join(cells)} |", f"|---|---:|{'---:|' * len(cells)}"]
    for i, (row, runs) in enumerate(rows.items()):
        seeds = str(len(runs))
        lines.append(f"| `{row}` | {seeds} | {' | '.join(column[i] for column in cells.values())} |")
    return lines


def heading(study: Run) -> str:
    """The data, what the runs were made with, and the flags they share."""
    runs = [run for run in study["runs"].values() if run["status"] == "finished"]
    facts = [{"images": run["images"], **run["facts"]} for run in runs]
    every = {key: ", ".join(dict.fromkeys(str(each[key]) for each in facts)) for key in next(iter(facts), {})}
    made = "; ".join(f"{key} {value}" for key, value in every.items())
    common = f" Every run: `{' '.join(study['common'])}`" if study["common"] else ""
    return f"# {study['data']}\n\nMeasured with {made}.{common}"


def tables(study: Run) -> str:
    """All of a study: what was run on what, four tables, what each row is, which runs failed."""
    parts, runs = [[heading(study)]], study["runs"]
    for title, columns, legend in TABLES:
        if lines := table(study, columns):
            parts.append([f"**{title}**", "", *lines, "", legend])
    rows = {
        run["row"]: f"- `{run['row']}`: {run['meaning']}" + (f" (`{' '.join(run['flags'])}`)" if run["flags"] else "")
        for run in runs.values()
    }
    failed = [f"- {name}: {run['status']}: {run['error']}" for name, run in runs.items() if run["status"] != "finished"]
    parts += [[*rows.values()], failed]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def read(path: Path) -> Run:
    """An evidence.json; `UsageError` for what is none."""
    try:
        study: Run = json.loads(path.read_text())
        _ = [study[key] for key in ("data", "common")], [run["status"] for run in study["runs"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is not the evidence.json of a study") from None
    return study


@dataclass(frozen=True)
class TableConfig:
    """Which study to show, and how."""

    study: tyro.conf.Positional[Path]
    """The evidence.json of a study."""
    md: Path | None = None
    """Write the tables into this file instead of printing them."""


def main(args: Sequence[str]) -> None:
    """Show the study that `args` name."""
    with one_line_errors("bench/evidence_table.py"):
        config = parse(TableConfig, args, prog=called("bench/evidence_table.py"), description=__doc__)
        study = read(config.study)
        text = tables(study)
        if config.md:
            write_whole(config.md, lambda file: file.write_text(text))
        else:
            print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
