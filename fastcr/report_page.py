"""Sections of a report on one run: what it is, results, curves, pictures, settings."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastcr.config import Config
from fastcr.measures.gallery import Pictures, Shown
from fastcr.presets import PRESETS
from fastcr.report_html import Html, Line, broken_at_underscores, chart, heading, table, tag

Key = tuple[str, str, str]  # section of results.json, embedding or map, measure
SECTIONS = ("retrieval", "knn", "linear", "few_label", "localisation")
TITLES = {
    ("retrieval", "rank1"): "rank-1",
    ("retrieval", "rank5"): "rank-5",
    ("retrieval", "mAP"): "mAP",
    ("knn", "top1"): "kNN top-1",
    ("linear", "top1"): "linear probe top-1",
    ("linear", "top5"): "linear probe top-5",
    ("localisation", "inside"): "inside the box",
    ("localisation", "pointing"): "points into the box",
}
MISSING = {
    "retrieval": ("retrieval (needs labelled images)", ""),
    "knn": ("kNN (needs a labelled training and test split)", ""),
    "linear": ("linear probe (needs the same)", ""),
    "few_label": ("linear probes with few labels (need the same)", ""),
    "localisation": ("where the attention lies (needs the objects' boxes)", " --data.boxes FILE.csv"),
}
CURVES = {  # of metrics.jsonl: title, scale, whether the axis begins at 0
    "contrast_loss": ("contrast loss", 1, False),
    "fit_loss": ("fit loss (unweighted)", 1, False),
    "pooled_contrast_loss": ("contrast loss of the attention-pooled query (unweighted)", 1, False),
    "lr": ("learning rate", 1, True),
    "images_per_second": ("images/s", 1, True),
    "data_wait": ("waiting for data, % of the step", 100, True),
    "attention_entropy": ("attention entropy, nats", 1, False),
    "effective_detectors": ("effective detectors", 1, True),
}


class Run(NamedTuple):
    """All that a report says of a run."""

    name: str
    config: Config
    records: list[dict[str, float]]  # a step each
    results: dict[str, Any]  # empty before the evaluation
    pictures: Pictures


def is_number(value: Any) -> bool:
    """Whether a value from a run's files can be counted and drawn: no NaN, and of a size that means something."""
    return isinstance(value, (int, float)) and (value == 0 or 1e-15 < abs(value) < 1e15)


def scores_of(part: Any) -> dict[Key, float]:
    """Every score in a part of `results.json`, in the order of the page."""
    part = part if isinstance(part, dict) else {}
    found: dict[Key, float] = {}
    for section in SECTIONS:
        names = part.get(section)
        for name, scores in names.items() if isinstance(names, dict) else ():
            for key, value in scores.items() if isinstance(scores, dict) else ():
                if is_number(value):
                    found[section, name, key] = value
    return found


def measure(section: str, key: str) -> str:
    """What a score is called."""
    return f"linear probe, {key} % of labels" if section == "few_label" else TITLES.get((section, key), key)


def by_name(value: Any) -> str:
    """A setting without the folders of the machine it was made on."""
    return os.path.basename(os.path.normpath(value)) if os.sep in str(value) else str(value)


def settings(config: Config) -> dict[str, str]:
    """Every setting by its flag, but where the run lies."""
    sections = {name: value for name, value in dataclasses.asdict(config).items() if name != "preset"}
    flags = {f"{name}.{key}": by_name(value) for name, keys in sections.items() for key, value in keys.items()}
    return {"preset": config.preset} | {flag: value for flag, value in flags.items() if flag != "run.dir"}


def data_name(config: Config) -> str:
    """The data set, by the name of its folder."""
    return by_name(config.data.root.absolute()) if config.data.root else "drawn birds (synthetic)"


def seconds_of(run: Run) -> float:
    """Time the logged steps took; evaluations and saving are not in it."""
    steps = pairwise([0, *(record["step"] for record in run.records)])
    speeds = [record.get("images_per_second") or math.inf for record in run.records]
    each = zip(steps, speeds, strict=True)
    return sum((step - before) * run.config.optim.batch_size / speed for (before, step), speed in each)


def duration(seconds: float) -> str:
    """For people."""
    (minutes, rest), hours = divmod(round(seconds), 60), round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def progress(run: Run) -> str:
    """How far the run has come."""
    last = run.records[-1] if run.records else {}
    if not last.get("epoch"):
        return "no step is logged yet"
    planned = round(last["step"] / last["epoch"]) * run.config.optim.epochs
    wanted = min(planned, run.config.run.steps or planned)
    ended = "" if last["step"] >= wanted else " (in progress, or stopped)"
    return f"{last['step']:,} of {wanted:,} steps, {last['epoch']:.4g} of {run.config.optim.epochs} epochs{ended}"


def facts(run: Run) -> Html:
    """What the run is."""
    config = run.config
    branch = f"{'released variant, ' * config.released.enabled}{config.rationale.detectors} detectors"
    rows = {
        "preset": config.preset,
        "data": f"{data_name(config)}, views of {config.data.image_size} px",
        "encoder": f"{config.model.backbone} up to {config.model.last_stage}, "
        f"initial weights: {by_name(config.model.weights)}",
        "branch": branch if config.rationale.enabled else "none (plain MoCo v2)",
        "training": f"{progress(run)}, batch {config.optim.batch_size}",
        "time": f"{duration(seconds_of(run))} in the steps logged; evaluation and saving not counted",
    }
    pairs = [cell for name, value in rows.items() for cell in (tag("dt", name), tag("dd", value))]
    return tag("dl", *pairs, class_="facts")


def measured_on(run: Run) -> str:
    """The images the results are of."""
    keys = ("images", "classes", "unreadable", "skipped")
    images, classes, unreadable, skipped = (_count(run.results.get(key, 0)) for key in keys)
    left_out = f", {unreadable} unreadable left out" if unreadable != "0" else ""
    alone = f", {skipped} alone in their class and no queries" if skipped != "0" else ""
    folder = Path(str(run.results.get("folder", "")))
    within = f"{folder.parent.name}/" * (folder.name in ("train", "test"))  # says more than the split alone
    return f"{within}{folder.name}: {images} images of {classes} classes{left_out}{alone}"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def results_section(run: Run) -> list[Html]:
    """Every measure of both embeddings, trained and frozen; and what has not been measured, with how to."""
    parts = [("trained", scores_of(run.results))]
    if "frozen_init" in run.results:
        parts.insert(0, ("frozen init", scores_of(run.results["frozen_init"])))
    shown: list[Html] = []
    for wanted, caption in (
        (SECTIONS[:4], f"{measured_on(run)}; percent" if run.results else ""),
        (SECTIONS[4:], "Share of the attention, and of the images where its peak lies there; percent"),
    ):
        scored = [(title, {key: each for key, each in part.items() if key[0] in wanted}) for title, part in parts]
        rows = list(dict.fromkeys((section, key) for _, part in scored for section, _, key in part))
        columns = [(title, list(dict.fromkeys(name for _, name, _ in part)), part) for title, part in scored]
        if not rows:
            continue
        against = list(zip(columns, ({}, scored[0][1]), strict=False))  # what each part is shown beside
        cells = [
            [measure(*row), *(_score(part, base, row, name) for (_, names, part), base in against for name in names)]
            for row in rows
        ]
        above = [heading(title, len(names)) for title, names, _ in columns if names]
        names_row = [heading(name) for _, names, _ in columns for name in names]
        shown.append(table([[tag("td", ""), *above], [heading("measure"), *names_row]], cells, caption))
    if shown:
        note = "The frozen init is the encoder at step 0: its rationale embedding pools with random detectors. "
        none = "There is no frozen init beside these results (no init.safetensors): "
        shown.append(tag("p", (note + "Small: difference from it.") if len(parts) > 1 else none + "no comparison."))
    best = run.results.get("best_epoch")
    if isinstance(best, dict) and (found := scores_of(best)):
        last = list(found)[-1][1]
        told = f"{last} rank-1 {found.get(('retrieval', last, 'rank1'), float('nan')):.2f}"
        shown.append(tag("p", f"Best of the evaluations during training: epoch {best.get('epoch')}, {told}."))
    lacking = [section for section in SECTIONS if section not in run.results]
    lacking = [section for section in lacking if section != "localisation" or run.config.rationale.enabled]
    if lacking:
        command = f"python -m fastcr.evaluate {shlex.quote(run.name)}"
        rows = [(MISSING[section][0], tag("td", tag("code", command + MISSING[section][1]), class_="plain"))
                for section in lacking]  # fmt: skip
        shown.append(
            table([[heading("not measured"), heading("command that does", class_="plain")]], rows, "Missing measures")
        )
    return shown


def _score(part: dict[Key, float], frozen: dict[Key, float], row: tuple[str, str], name: str) -> Html:
    value, base = (scores.get((row[0], name, row[1])) for scores in (part, frozen))
    if value is None:
        return tag("td", "–")
    change = "" if base is None else tag("small", f" {value - base:+.2f}".replace("-", "−"))
    return tag("td", f"{value:.2f}", change)


def points(run: Run, metric: str, across: str, scale: float = 1) -> list[tuple[float, float]]:
    """A metric over steps or epochs."""
    pairs = [(record.get(across), record.get(metric)) for record in run.records]
    return [(x, y * scale) for x, y in pairs if x is not None and y is not None]


def curves_section(run: Run) -> list[Html]:
    """What the run logged."""
    drawn = [
        chart(title, [Line(title, points(run, metric, "step", scale))], "step", from_zero=from_zero)
        for metric, (title, scale, from_zero) in CURVES.items()
    ]
    return [tag("div", *drawn, class_="charts")] if any(drawn) else [tag("p", "Nothing is logged yet.")]


def _image(shown: Shown, alt: str, class_: str, *caption: object) -> Html:
    picture = tag("img", src=shown.source, alt=f"{alt}: {shown.label or shown.file}", title=shown.file)
    return tag("figure", picture, tag("figcaption", *caption), class_=class_)


def _named(shown: Shown) -> Html:
    return broken_at_underscores(shown.label or shown.file)


def attention_section(run: Run) -> list[Html]:
    """Images beside their attention."""
    if not run.config.rationale.enabled:
        return [tag("p", "Plain MoCo v2 has no branch, so there is no attention to show.")]
    pairs = []
    for shown, overlay in run.pictures.attended:
        sources = {"image": shown.source, "attention over the image": overlay}
        both = [tag("img", src=source, alt=f"{alt}: {shown.label or shown.file}") for alt, source in sources.items()]
        caption = tag("figcaption", _named(shown))
        pairs.append(tag("figure", tag("div", *both), caption, class_="pair", title=shown.file))
    batch = " The released attention depends on the batch an image is in." if run.config.released.enabled else ""
    note = f"Warm where the branch looks; each map is scaled to its own maximum, so flat maps are warm all over.{batch}"
    return [tag("p", note), tag("div", *pairs, class_="images")]


def neighbours_section(run: Run) -> list[Html]:
    """Queries and their nearest neighbours, right or wrong."""
    shown = [tag("p", f"Most similar by the {run.pictures.embedding} embedding, among the same images; cosine below.")]
    for query, found, alone in run.pictures.queries:
        about = [_named(query), tag("br") if alone else "", "alone in its class" if alone else ""]
        figures = [_image(query, "query", "image query", tag("span", "query", class_="mark"), " ", *about)]
        for number, (image, right, cosine) in enumerate(found, 1):
            mark = {True: "✓ right", False: "✗ wrong", None: f"{number}."}[right]
            class_ = {True: "image right", False: "image wrong", None: "image"}[right]
            told = [
                tag("span", mark, class_="mark"),
                " ",
                image.label or image.file,
                " ",
                tag("small", f"{cosine:.3f}"),
            ]
            figures.append(_image(image, f"neighbour {number}{', ' * (right is not None)}{mark[2:]}", class_, *told))
        shown.append(tag("div", *figures, class_="images"))
    return shown


def settings_section(run: Run) -> list[Html]:
    """config.yaml, beside the preset where it differs; the command that repeats the run."""
    own = settings(run.config)
    preset = settings(PRESETS[run.config.preset]() if run.config.preset in PRESETS else Config())
    changed = {flag: value for flag, value in own.items() if value != preset[flag] and flag != "preset"}
    beside = {flag: tag("small", f" (preset: {preset[flag]})") for flag in changed}
    rows = [(flag, tag("td", value, beside.get(flag, ""), class_="plain")) for flag, value in own.items()]
    flags = [part for flag, value in changed.items() for part in (f"--{flag}", value)]
    command = shlex.join(["python", "-m", "fastcr.train", run.config.preset, *flags])
    every = table([[heading("setting"), heading("value", class_="plain")]], rows, "config.yaml")
    return [
        tag("p", "Folders and files go by their names: put your paths in. Loader and cache are what the run chose."),
        tag("pre", tag("code", command)),
        tag("details", tag("summary", "Every setting"), every),
    ]


def run_sections(run: Run, level: int) -> list[Html]:
    """All of one run, under headings of this level."""
    pictures, above, below = run.pictures, f"h{level}", f"h{level + 1}"
    parts = [facts(run), tag(above, "Results"), *results_section(run), tag(above, "Curves"), *curves_section(run)]
    parts += [tag(above, "Images"), tag("p", pictures.note)]
    if pictures.attended or (pictures.queries and not run.config.rationale.enabled):
        parts += [tag(below, "Attention"), *attention_section(run)]
    if pictures.queries:
        parts += [tag(below, "Nearest neighbours"), *neighbours_section(run)]
    return [*parts, tag(above, "Settings, and the command that repeats the run"), *settings_section(run)]
