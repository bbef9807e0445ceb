"""What a report says of a run, and of several beside each other, as sections of a sheet."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import rich.table

from fastcr.config import Config
from fastcr.errors import UsageError
from fastcr.output.charts import Points, can_draw, chart
from fastcr.output.sheets import Section, Table
from fastcr.output.tables import results_tables
from fastcr.presets import PRESETS
from fastcr.runs.command_line import called
from fastcr.runs.log import read_records

LOSSES = {
    "contrast_loss": "contrast loss",
    "fit_loss": "fit loss (unweighted)",
    "pooled_contrast_loss": "contrast loss of the attention-pooled query (unweighted)",
}  # of metrics.jsonl
HEALTH = {
    "attention_entropy": "entropy of the attention, nats",
    "effective_detectors": "effective number of detectors",
    "effective_rank": "effective rank of the embeddings",
    "kept_neighbours": "share of the initial nearest neighbours that are kept",
}
COMPARED = {
    "mean\nrank-1": ("retrieval", "mean", "rank1"),
    "mean\nmAP": ("retrieval", "mean", "mAP"),
    "attention\nrank-1": ("retrieval", "rationale", "rank1"),
    "attention\nmAP": ("retrieval", "rationale", "mAP"),
    "mean\nkNN": ("knn", "mean", "top1"),
    "attention\nkNN": ("knn", "rationale", "top1"),
    "attention\nin the box": ("localisation", "attention", "inside"),
}  # of results.json
NO_CHARTS = 'Curves are drawn by matplotlib, which is not installed: pip install "fastcr[report]"'
Scores = dict[str, float]  # by the keys of COMPARED


class Run(NamedTuple):
    """All that a report says of a run."""

    name: str
    config: Config
    records: Sequence[Mapping[str, float]]  # of a step each
    images: Sequence[Section]  # those that show its images
    results: Sequence[Table | str]  # as evaluate prints them; empty before an evaluation
    measured_on: str  # the images that the results are of
    before: Scores  # of the initial encoder
    after: Scores  # of the trained one


def read_run(folder: Path, name: str, config: Config, images: Sequence[Section] = ()) -> Run:
    """A run from the files in its folder; values that cannot be drawn are left out of its records.

    `UsageError` for a `results.json` that is broken.
    """
    records = read_records(folder / "metrics.jsonl")
    steps = [{key: value for key, value in record.items() if is_number(value)} for record in records]
    run = Run(name, config, [record for record in steps if "step" in record], images, [], "", {}, {})
    path = folder / "results.json"
    if not path.exists():
        return run
    try:
        results = json.loads(path.read_text())
        found = [each if isinstance(each, str) else plain(each) for each in results_tables(results)]
        root = Path(results["folder"])
        split = f"{root.parent.name}/" if root.name in ("train", "test") else ""
        measured_on = f"{split}{root.name}: {results['images']} images of {results['classes']} classes"
        before, after = scores_of(results.get("frozen_init", {})), scores_of(results)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{path} is broken: {type(error).__name__} {error}") from None
    return run._replace(results=found, measured_on=measured_on, before=before, after=after)


def is_number(value: Any) -> bool:
    """Whether a value can be drawn: no NaN, and of a size that means something."""
    return isinstance(value, (int, float)) and (value == 0 or 1e-15 < abs(value) < 1e15)


def plain(table: rich.table.Table) -> Table:
    """A table of the terminal for a sheet."""
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return Table(str(table.title or ""), [str(column.header) for column in table.columns], list(rows))


def scores_of(results: Mapping[str, Any]) -> Scores:
    """The compared scores that are in a part of `results.json`."""
    found = {title: results.get(part, {}).get(name, {}).get(key) for title, (part, name, key) in COMPARED.items()}
    return {title: float(score) for title, score in found.items() if score is not None}


def by_name(value: Any) -> str:
    """A setting without the folders of the machine it was made on."""
    return os.path.basename(os.path.normpath(value)) if os.sep in str(value) else str(value)


def data_name(root: Path | None) -> str:
    """The data set, by the name of its folder."""
    return by_name(root.absolute()) if root else "drawn birds (synthetic)"


def settings(config: Config) -> dict[str, str]:
    """Every setting by its flag, but where the run lies."""
    sections = {name: value for name, value in dataclasses.asdict(config).items() if name != "preset"}
    flags = {f"--{name}.{key}": by_name(value) for name, keys in sections.items() for key, value in keys.items()}
    return {flag: value for flag, value in flags.items() if flag != "--run.dir"}


def run_sections(run: Run, heading: str = "") -> list[Section]:
    """A run, its headings after `heading`: settings, results, curves and images."""
    usual = settings(PRESETS.get(run.config.preset, Config)())
    own = {flag: value for flag, value in settings(run.config).items() if value != usual[flag]}
    command = f"{called('train')} {shlex.join([run.config.preset, *chain.from_iterable(own.items())])}"
    rows = [(flag, value, usual[flag]) for flag, value in own.items()]
    changed = [Table("Settings that differ from the preset", ["setting", "value", "preset"], rows)] if rows else []
    optim = run.config.optim
    steps = "no step is logged yet" if optim.epochs else "no training (0 epochs)"
    if run.records:
        last = run.records[-1]
        epochs = f"epoch {last.get('epoch', 0):.3g} of {optim.epochs}"
        steps = f"{last['step']:,} steps of {optim.batch_size} images, {epochs}"
    paths = "This command repeats the run. Folders and files go by their names: put your paths in."
    about = f"The preset {run.config.preset} on {data_name(run.config.data.root)}: {steps}. {paths}"
    said = " ".join(each for each in run.results if isinstance(each, str))
    if not run.results:
        said = f"The run is not measured yet: {called('evaluate')} {shlex.quote(run.name)}"
    curves = [(title, {title: points(run, metric, "step")}) for metric, title in (LOSSES | HEALTH).items()]
    return [
        Section(f"{heading}Settings", about, command, changed),
        Section(f"{heading}Results", said, tables=[each for each in run.results if isinstance(each, Table)]),
        drawn(f"{heading}Curves", curves, "step"),
        *(section._replace(heading=f"{heading}{section.heading}") for section in run.images),
    ]


def points(run: Run, metric: str, across: str) -> Points:
    """A metric over steps or epochs."""
    return [(record[across], record[metric]) for record in run.records if across in record and metric in record]


def drawn(heading: str, curves: Sequence[tuple[str, Mapping[str, Points]]], across: str) -> Section:
    """A chart for each title, of its curves by their names."""
    if not can_draw():
        return Section(heading, NO_CHARTS)
    charts = [made for title, lines in curves if (made := chart(title, lines, across))]
    return Section(heading, "" if charts else "Nothing is logged yet.", charts=charts)


def comparison(runs: Sequence[Run]) -> list[Section]:
    """Several runs: their results in one table, the settings that differ, and the losses over each other."""
    every = [settings(run.config) | {"preset": run.config.preset} for run in runs]
    differing = [(flag, *(each[flag] for each in every)) for flag in every[0] if len({s[flag] for s in every}) > 1]
    settled = Table("All others are the same", ["setting", *(run.name for run in runs)], differing)
    losses = [(title, {run.name: points(run, key, "epoch") for run in runs}) for key, title in LOSSES.items()]
    return [
        compared_results([run for run in runs if run.results]),
        Section("Settings that differ", "" if differing else "None.", tables=[settled] if differing else []),
        drawn("Losses", losses, "epoch"),
    ]


def compared_results(runs: Sequence[Run]) -> Section:
    """A row for each run after training, and one for those that began alike; a star marks the best of each column."""
    if not runs:
        return Section("Results", "No run is measured yet.")
    rows = [(run.name, run.measured_on, run.after) for run in runs]
    starts = dict[tuple[Any, ...], list[Run]]()
    for run in runs:
        starts.setdefault((run.measured_on, *run.before.items()), []).append(run)
    rows += [
        (f"before training: {', '.join(run.name for run in alike)}", alike[0].measured_on, alike[0].before)
        for alike in starts.values()
        if alike[0].before
    ]
    columns = [title for title in COMPARED if any(title in scores for *_, scores in rows)]
    best = {title: max(scores.get(title, 0.0) for *_, scores in rows) for title in columns}
    same = len({where for _, where, _ in rows}) == 1

    def cell(title: str, scores: Scores) -> str:
        star = "★ " if same and scores.get(title) == best[title] else ""
        return f"{star}{scores[title]:.2f}" if title in scores else ""

    cells = [(name, *(cell(title, scores) for title in columns), where) for name, where, scores in rows]
    table = Table("Percent; ★ is the best of its column", ["run", *columns, "measured on"], cells)
    said = "" if same else "These were not measured on the same images, so no best is marked."
    return Section("Results", said, tables=[table])
