"""`python bench/evidence_table.py STUDY/evidence.json`: a study of bench/evidence.py as Markdown tables.

Percent, the mean over seeds with [lowest, highest] behind it. `--md FILE` writes them there instead; `--png FILE` draws
rank-1 of both poolings for every row, beside that of the frozen initial weights, and `--box_png FILE` the share of the
attention in the object's box, beside that of a Gaussian of its entropy. Nothing but the JSON is read.
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
FROZEN = "frozen"
POOLINGS = {"mean": "#7a7a7a", "rationale": "#1b6ca8"}
# what a picture shows of each row: where a run has it, and its colour
Series = dict[str, tuple[tuple[str, ...], str]]
RANK1: Series = {
    f"{pooling} pooling": (("retrieval", pooling, "rank1"), colour) for pooling, colour in POOLINGS.items()
}
INSIDE: Series = {
    "attention": (("localisation", "attention", "inside"), POOLINGS["rationale"]),
    "average of all attention": (("localisation", "average", "inside"), "#3a8f5c"),
    "Gaussian of its entropy": (("localisation", "gaussian", "inside"), POOLINGS["mean"]),
    "GradCAM target": (("gradcam", "target", "inside"), "#c8641b"),
}
# heading: where a run has it, and its decimals
RETRIEVAL = {
    f"{shown}, {pooling}": (section, pooling, key, 1)
    for shown, section, key in (
        *(("rank-1", "retrieval", "rank1"), ("rank-5", "retrieval", "rank5")),
        *(("mAP", "retrieval", "mAP"), ("kNN", "knn", "top1")),
    )
    for pooling in POOLINGS
} | {"rank-1, average map": ("gradcam", "average map", "rank1", 1)}
# the same of every pooling, plain and less the mean over the images
OTHERS = {
    f"{shown}, {name}": (*place, key, 1)
    for shown, key in (("rank-1", "rank1"), ("mAP", "mAP"))
    for name, place in (
        ("mean (c)", ("retrieval_centred", "mean")),
        ("GeM (c)", ("retrieval_centred", "gem")),
        ("DDT", ("retrieval", "ddt")),
        ("DDT (c)", ("retrieval_centred", "ddt")),
        ("rationale (c)", ("retrieval_centred", "rationale")),
        ("the head's output", ("gradcam", "head")),
        ("best pooling", ("best", "trained")),
        ("best without training", ("best", "baseline")),
    )
}
ATTENTION = {
    "in the box": ("localisation", "attention", "inside", 1),
    "average map": ("localisation", "average", "inside", 1),
    "Gaussian": ("localisation", "gaussian", "inside", 1),
    "uniform": ("localisation", "uniform", "inside", 1),
    "GradCAM target": ("gradcam", "target", "inside", 1),
    "its average": ("gradcam", "target", "average inside", 1),
    "its Gaussian": ("gradcam", "target", "gaussian inside", 1),
    "GradCAM of the score": ("gradcam", "score", "inside", 1),
    "of the loss": ("gradcam", "loss", "inside", 1),
    "peak in the box": ("localisation", "attention", "pointing", 1),
    "average map's peak": ("localisation", "average", "pointing", 1),
    "Gaussian's peak": ("localisation", "gaussian", "pointing", 1),
}
TRAINING = {
    "contrast loss": ("last", "contrast_loss", 3),
    "fit loss": ("last", "fit_loss", 4),
    "contrast loss, pooled": ("last", "pooled_contrast_loss", 3),
    "attention entropy, nats": ("last", "attention_entropy", 3),
    "effective detectors": ("last", "effective_detectors", 1),
    "effective rank": ("last", "effective_rank", 0),
    "neighbours kept": ("last", "kept_neighbours", 2),
    "seconds": ("seconds", 0),
}
LEGENDS = {
    "Retrieval and weighted kNN": "Average map: every picture pooled with the average of the attention to all of them.",
    "Retrieval by other poolings": "(c): less the mean over the test images. Best: of all that `fastcr evaluate` "
    "measures, by rank-1; without training: of the initial weights, less what the branch pools.",
    "Share of the attention in the object's box": "Average map: the average of the attention to all pictures, laid on "
    "each; attention exchanged among the pictures holds as much. Gaussian: centred, of each map's own entropy; it does "
    "not look. GradCAM: of the trained encoder's contrast loss on the test images (of the own key's logit in rows with "
    "`--rationale.cam_of logit`), each half divided by its sum; the target is what the branch is fitted to.",
    "End of the training": "Of the last batch that was logged; for the frozen weights, of the first.",
}


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


def table(study: Run, columns: Mapping[str, tuple[Any, ...]]) -> list[str]:
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
    first = f"**{study['data']}**" + "".join(f", {key} {value}" for key, value in every.items())
    return f"{first}. Every run: `{' '.join(study['common'])}`" if study["common"] else first


def tables(study: Run) -> str:
    """All of a study: what was run on what, four tables, what each row is, which runs failed."""
    parts, runs = [[heading(study)]], study["runs"]
    kinds: tuple[Mapping[str, tuple[Any, ...]], ...] = (RETRIEVAL, OTHERS, ATTENTION, TRAINING)
    for (title, legend), columns in zip(LEGENDS.items(), kinds, strict=True):
        if lines := table(study, columns):
            parts.append([f"**{title}**", "", *lines, *(["", legend] if legend else [])])
    rows = {
        run["row"]: f"- `{run['row']}`: {run['meaning']}" + (f" (`{' '.join(run['flags'])}`)" if run["flags"] else "")
        for run in runs.values()
    }
    failed = [f"- {name}: {run['status']}: {run['error']}" for name, run in runs.items() if run["status"] != "finished"]
    parts += [[*rows.values()], failed]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def draw(study: Run, picture: Path, series: Series, title: str) -> None:
    """A dot a row and series, with its range over seeds; the frozen weights' as lines. `UsageError` without runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a picture needs matplotlib: pip install 'fastcr[report]'") from None
    rows = by_row(study)
    frozen = rows.pop(FROZEN, [])
    rows = {row: runs for row, runs in rows.items() if any(values_of(runs, place) for place, _ in series.values())}
    if not rows:
        raise UsageError("a picture needs a trained run, and the study has none yet that was measured so")
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(rows)), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for i, (name, (place, colour)) in enumerate(series.items()):
        for y, runs in enumerate(rows.values()):
            if values := values_of(runs, place):
                mean, height = sum(values) / len(values), y + 0.48 * (i / (len(series) - 1) - 0.5)
                axes.plot([min(values), max(values)], [height] * 2, color=colour, linewidth=2, alpha=0.5)
                axes.plot(mean, height, "o", color=colour, markersize=5, label=name)
        if values := values_of(frozen, place):
            mean = sum(values) / len(values)
            axes.axvline(mean, color=colour, linewidth=1, linestyle="--", label=f"frozen, {name}")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel(f"{title}, percent: mean over seeds, lowest to highest", fontsize=9)
    axes.set_title(study["data"], fontsize=10, loc="left")
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once, fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    write_whole(picture, lambda file: figure.savefig(file, format=picture.suffix[1:] or "png"))


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
    png: Path | None = None
    """Also draw rank-1 of every row into this picture; needs matplotlib."""
    box_png: Path | None = None
    """Also draw the share of the attention in the box into this picture; needs matplotlib."""
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
        if config.png:
            draw(study, config.png, RANK1, "rank-1")
        if config.box_png:
            draw(study, config.box_png, INSIDE, "share in the object's box")


if __name__ == "__main__":
    main(sys.argv[1:])
