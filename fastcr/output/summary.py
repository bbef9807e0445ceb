"""What a report says of a run in numbers, and of several beside each other."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import shlex
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastcr.config import Config
from fastcr.output.charts import Chart, Points, chart
from fastcr.output.gallery import Gallery
from fastcr.output.tables import best_line
from fastcr.presets import PRESETS
from fastcr.runs.command_line import called

SECTIONS = ("retrieval", "retrieval_centred", "knn", "linear", "few_label", "localisation")  # of results.json
CURVES = {  # of metrics.jsonl: title, scale, whether the axis begins at 0
    "contrast_loss": ("contrast loss", 1, False),
    "fit_loss": ("fit loss (unweighted)", 1, False),
    "pooled_contrast_loss": ("contrast loss of the attention-pooled query (unweighted)", 1, False),
    "lr": ("learning rate", 1, True),
    "images_per_second": ("images/s", 1, True),
    "data_wait": ("waiting for data, % of the step", 100, True),
    "attention_entropy": ("attention entropy, nats", 1, False),
    "effective_detectors": ("effective detectors", 1, True),
    "effective_rank": ("effective rank of the embeddings", 1, True),
    "kept_neighbours": ("nearest neighbours kept of those at the start, %", 100, True),
}
Key = tuple[str, str, str]  # section of results.json, embedding or map, measure
Scores = dict[Key, float]


def is_number(value: Any) -> bool:
    """Whether a value from a run's files can be counted and drawn: no NaN, and of a size that means something."""
    return isinstance(value, (int, float)) and (value == 0 or 1e-15 < abs(value) < 1e15)


def scores_of(part: Any) -> Scores:
    """Every score in a part of `results.json`, whatever else it holds, in the order of the page."""

    def items(value: Any) -> list[tuple[str, Any]]:
        return list(value.items()) if isinstance(value, dict) else []

    named = [(section, *each) for section in SECTIONS for each in items(dict(items(part)).get(section))]
    return {(section, name, key): value for section, name, scores in named for key, value in items(scores)
            if is_number(value)}  # fmt: skip


def by_name(value: Any) -> str:
    """A setting without the folders of the machine it was made on."""
    return os.path.basename(os.path.normpath(value)) if os.sep in str(value) else str(value)


def data_name(root: Path | None) -> str:
    """The data set, by the name of its folder."""
    return by_name(root.absolute()) if root else "drawn birds (synthetic)"


def settings(config: Config) -> dict[str, str]:
    """Every setting by its flag, but where the run lies."""
    sections = {name: value for name, value in dataclasses.asdict(config).items() if name != "preset"}
    flags = {f"{name}.{key}": by_name(value) for name, keys in sections.items() for key, value in keys.items()}
    return {"preset": config.preset} | {flag: value for flag, value in flags.items() if flag != "run.dir"}


def duration(seconds: float) -> str:
    """For people."""
    (minutes, rest), hours = divmod(round(seconds), 60), round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


class Run(NamedTuple):
    """All that a report says of a run."""

    name: str
    config: Config
    records: list[dict[str, float]]  # of a step each
    results: dict[str, Any]  # empty before the evaluation
    gallery: Gallery

    @property
    def progress(self) -> str:
        """How far the run has come."""
        last, epochs = self.records[-1] if self.records else {}, self.config.optim.epochs
        if not (epochs or self.records):
            return "no training (0 epochs)"
        if not last.get("epoch"):
            return "no step is logged yet"
        planned = round(last["step"] / last["epoch"]) * epochs
        wanted = min(planned, self.config.run.steps or planned)
        ended = "" if last["step"] >= wanted else " (in progress, or stopped)"
        return f"{last['step']:,} of {wanted:,} steps, {last['epoch']:.4g} of {epochs} epochs{ended}"

    @property
    def time(self) -> str:
        """How long the logged steps took; evaluations and saving are not counted."""
        speeds = [record.get("images_per_second") or math.inf for record in self.records]
        steps = [after - before for before, after in pairwise([0, *(record["step"] for record in self.records)])]
        return duration(self.config.optim.batch_size * sum(map(operator.truediv, steps, speeds)))

    @property
    def measured_on(self) -> str:
        """The images the results are of."""
        found = [self.results.get(key, 0) for key in ("images", "classes", "unreadable", "skipped")]
        images, classes, unreadable, skipped = (f"{n:,}" if isinstance(n, int) else str(n) for n in found)
        folder = Path(str(self.results.get("folder", "")))
        within = f"{folder.parent.name}/" * (folder.name in ("train", "test"))  # says more than the split alone
        lost = f", {unreadable} unreadable left out" if unreadable != "0" else ""
        alone = f", {skipped} alone in their class and no queries" if skipped != "0" else ""
        return f"{within}{folder.name}: {images} images of {classes} classes{lost}{alone}"

    @property
    def scores(self) -> dict[str, Scores]:
        """Of the frozen initialisation, if it was measured, and of the trained encoder."""
        frozen = {"frozen init": scores_of(self.results["frozen_init"])} if "frozen_init" in self.results else {}
        return frozen | {"trained": scores_of(self.results)}

    @property
    def best(self) -> str | None:
        """The best pooling of the trained encoder beside the best without training; None where they are unknown."""
        try:
            return best_line(self.results)
        except (KeyError, TypeError, ValueError, AttributeError):  # in a file that a bad disk spoilt
            return None

    def layout(self, sections: Sequence[str]) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
        """Of a table of these sections: rows (section, measure); columns (embeddings or maps), under their headings."""
        parts = {title: [key for key in part if key[0] in sections] for title, part in self.scores.items()}
        rows = list(dict.fromkeys((section, measure) for part in parts.values() for section, _, measure in part))
        return rows, {title: list(dict.fromkeys(name for _, name, _ in part)) for title, part in parts.items() if part}

    def points(self, metric: str, across: str, scale: float = 1) -> Points:
        """A metric over steps or epochs."""
        pairs = [(record.get(across), record.get(metric)) for record in self.records]
        return [(x, y * scale) for x, y in pairs if x is not None and y is not None]

    @property
    def charts(self) -> list[Chart | None]:
        """What the run logged."""
        return [
            chart(title, [(title, self.points(metric, "step", scale))], "step", from_zero=from_zero)
            for metric, (title, scale, from_zero) in CURVES.items()
        ]

    @property
    def settings(self) -> dict[str, tuple[str, str]]:
        """Every setting by its flag: its value in the run, and in the preset."""
        preset = settings(PRESETS.get(self.config.preset, Config)()) | {"preset": self.config.preset}
        return {flag: (value, preset[flag]) for flag, value in settings(self.config).items()}

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        changed = {f"--{flag}": value for flag, (value, usual) in self.settings.items() if value != usual}
        return f"{called('train')} {shlex.join([self.config.preset, *chain.from_iterable(changed.items())])}"


def compare(runs: Sequence[Run]) -> tuple[list[tuple[str, str, Scores]], list[Key], Scores]:
    """Rows of name, images measured on and scores; the columns; and the best of each, if all saw the same images.

    A row is a run that was measured, or a frozen initialisation, which runs that began alike share.
    """
    measured, frozen = [run for run in runs if run.results], dict[Any, list[str]]()
    for run in measured:
        if scores := run.scores.get("frozen init"):
            frozen.setdefault((run.measured_on, tuple(scores.items())), []).append(run.name)
    rows = [(run.name, run.measured_on, run.scores["trained"]) for run in measured]
    rows += [(f"frozen init of {', '.join(names)}", where, dict(found)) for (where, found), names in frozen.items()]
    every = dict.fromkeys(key for *_, scores in rows for key in scores)
    groups = list(dict.fromkeys((section, measure) for section, _, measure in every))
    blind = {("localisation", name) for name in ("average", "gaussian", "uniform")}  # maps that do not look
    columns = [key for key in every if key[:2] not in blind and key[0] != "retrieval_centred"]
    columns.sort(key=lambda key: groups.index((key[0], key[2])))
    ranked = len(rows) > 1 and len({where for _, where, _ in rows}) == 1
    best = {key: max(scores[key] for *_, scores in rows if key in scores) for key in columns if ranked}
    return rows, columns, best


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, by their flags: the value in each run."""
    every = [settings(run.config) for run in runs]
    values = {flag: [each[flag] for each in every] for flag in every[0]}
    return {flag: found for flag, found in values.items() if len(set(found)) > 1}


def losses(runs: Sequence[Run]) -> list[Chart | None]:
    """The losses of all runs over each other."""
    return [
        chart(CURVES[loss][0], [(run.name, run.points(loss, "epoch")) for run in runs], "epoch")
        for loss in ("contrast_loss", "fit_loss")
    ]
