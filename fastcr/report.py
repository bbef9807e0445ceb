"""`python -m fastcr.report RUN [RUN ...]`: a run, or several compared, as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console

import fastcr
from fastcr.config import Config, tyro
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.measures.gallery import Pictures, Thumbnails, attended, neighbours
from fastcr.method.encoder import load
from fastcr.report_html import Html, Line, chart, heading, is_report, page, table, tag
from fastcr.report_page import (
    CURVES,
    Key,
    Run,
    by_name,
    data_name,
    is_number,
    measure,
    measured_on,
    points,
    run_sections,
    scores_of,
    settings,
)
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse
from fastcr.runs.log import read_records
from fastcr.runs.machine import pick_device, pick_workers


@dataclass(frozen=True)
class ReportData:
    """The images to show."""

    root: Path | None = None
    """Folder of images. Default: the one each run was trained on."""
    workers: int | None = None
    """Loader processes. Default: one per core."""


@dataclass(frozen=True)
class ReportRun:
    """How the images are embedded."""

    device: str = "auto"
    """auto (CUDA when there is one, else the CPU), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """The page. Default: report.html in the run's folder; of several runs, in this one."""
    gallery: int = 12
    """Test images shown with their attention; 0: none."""
    queries: int = 6
    """Test images shown with their nearest neighbours; 0: none. Without either, no image is read."""
    data: ReportData = field(default_factory=ReportData)
    run: ReportRun = field(default_factory=ReportRun)


def validate(config: ReportConfig) -> None:
    """Raise `UsageError` naming the first flag whose value cannot work."""
    checks = {
        "name a run folder": len(config.runs) > 0,
        "a run is named twice": len({run.resolve() for run in config.runs}) == len(config.runs),
        "--gallery must be at least 0": config.gallery >= 0,
        "--queries must be at least 0": config.queries >= 0,
        "--data.workers must be at least 0": config.data.workers is None or config.data.workers >= 0,
    }
    for message, holds in checks.items():
        if not holds:
            raise UsageError(message)


def check_out(out: Path) -> None:
    """`UsageError` where a page at `out` would destroy something else, or cannot be."""
    if not out.parent.is_dir():
        raise UsageError(f"no folder {out.parent} to write {out.name} into")
    if out.exists() or out.is_symlink():
        if not out.is_file():
            raise UsageError(f"{out} is no file")
        with out.open("rb") as file:
            if not is_report(file.read(1000)):
                raise UsageError(f"{out} is not a report of fastcr, so it is left as it is: name another --out")


def pictures_of(folder: Path, name: str, trained: Config, config: ReportConfig, console: Console) -> Pictures:
    """The run's images, embedded by its weights as they are now."""
    weights, root = folder / "weights.safetensors", config.data.root or trained.data.root
    if not (config.gallery or config.queries):
        return Pictures("None were asked for (--gallery 0 --queries 0).")
    if not weights.exists():
        return Pictures("The run has not saved weights yet, so no images are shown.")
    of = by_name(config.data.root.absolute()) if config.data.root else data_name(trained)
    try:
        splits = read_splits(root or write_synthetic())
    except UsageError as error:
        if config.data.root:
            raise
        console.print(f"no images of {name} at hand: {error}", soft_wrap=True, highlight=False)
        return Pictures(f"The images ({of}) were not at hand when this page was made; --data.root says where they are.")
    device, images = pick_device(config.run.device), splits.test or splits.train
    encoder = load(weights, device)
    found = embed(
        encoder,
        images,
        device=device,
        workers=pick_workers(config.data.workers),
        console=console,
        title=name,
    )
    thumbnails = Thumbnails(images, encoder.image_size)
    lost = f"; {len(found.unreadable)} cannot be read" if found.unreadable else ""
    return Pictures(
        f"{'Test' if splits.test else 'Training'} images of {of}, evenly spread over {len(images):,}{lost}."
        + ("" if images.labels else " They have no labels."),
        attended(found, thumbnails, config.gallery),
        neighbours(found, thumbnails, config.queries),
        "mean" if encoder.branch is None else "rationale",
    )


def read_run(folder: Path, name: str, config: ReportConfig, console: Console) -> Run:
    """All that a report says of the run in `folder`. `UsageError` if it is no run folder or holds broken files."""
    own = load_config(folder / "config.yaml")
    path, results = folder / "results.json", {}
    if path.exists():
        try:
            results = json.loads(path.read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise UsageError(f"{path} is broken: {error}") from None
        if not isinstance(results, dict):
            raise UsageError(f"{path} is broken: it holds no results")
    found = [record for record in read_records(folder / "metrics.jsonl") if isinstance(record, dict)]
    records = [{key: value for key, value in record.items() if is_number(value)} for record in found]
    records = [record for record in records if "step" in record]
    return Run(name, own, records, results, pictures_of(folder, name, own, config, console))


def run_names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, told apart by a number where they are the same."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def comparison(runs: Sequence[Run]) -> list[Html]:
    """One table of all results, the settings that differ, the losses over each other."""
    parts = [tag("h2", "Results"), *compared_results([run for run in runs if run.results])]
    if lacking := [run.name for run in runs if not run.results]:
        parts.append(tag("p", f"Not measured yet (python -m fastcr.evaluate RUN): {', '.join(lacking)}."))
    every = [settings(run.config) for run in runs]
    rows = [[flag, *(tag("td", each[flag], class_="plain") for each in every)]
            for flag in every[0] if len({each[flag] for each in every}) > 1]  # fmt: skip
    head = [[heading("setting"), *(heading(run.name, class_="plain") for run in runs)]]
    parts += [
        tag("h2", "Settings that differ"),
        table(head, rows, "All others are the same") if rows else tag("p", "None."),
    ]
    losses = ("contrast_loss", "fit_loss")
    drawn = [chart(CURVES[name][0], [Line(run.name, points(run, name, "epoch")) for run in runs], "epoch")
             for name in losses]  # fmt: skip
    return [
        *parts,
        tag("h2", "Losses"),
        tag("div", *drawn, class_="charts") if any(drawn) else tag("p", "None logged."),
    ]


def compared_results(runs: Sequence[Run]) -> list[Html]:
    """A row a run and a row a frozen initialisation; the best of a column is marked where all saw the same images."""
    if not runs:
        return [tag("p", "No run has been measured.")]
    rows = [(run.name, measured_on(run), scores_of(run.results), list[str]()) for run in runs]
    for run in runs:  # those that began alike share a row
        frozen = scores_of(run.results.get("frozen_init"))
        alike = next((row for row in rows if row[3] and row[1:3] == (measured_on(run), frozen)), None)
        if alike:
            alike[3].append(run.name)
        elif frozen:
            rows.append(("frozen init", measured_on(run), frozen, [run.name]))
    columns: dict[tuple[str, str], list[str]] = {}
    for section, name, key in dict.fromkeys(key for _, _, scores, _ in rows for key in scores):
        if name not in ("average", "gaussian", "uniform"):  # these maps do not look
            columns.setdefault((section, key), []).append(name)
    keys = [(section, name, key) for (section, key), names in columns.items() for name in names]
    same = len({where for _, where, _, _ in rows}) == 1
    best = {key: max(scores[key] for _, _, scores, _ in rows if key in scores) for key in keys}

    def cell(scores: dict[Key, float], key: Key) -> Html:
        if key not in scores:
            return tag("td", "–")
        wins = same and len(rows) > 1 and scores[key] == best[key]
        return tag("td", f"{'★ ' * wins}{scores[key]:.2f}", class_="best" if wins else None)

    cells = [
        [
            f"frozen init of {', '.join(of)}" if of else name,
            *(cell(scores, key) for key in keys),
            *([tag("td", where, class_="plain")] * (not same)),
        ]
        for name, where, scores, of in rows
    ]
    above = [heading(measure(*column), len(names)) for column, names in columns.items()]
    head = [[tag("td", ""), *above], [heading("run"), *(heading(name) for _, name, _ in keys)]]
    if not same:
        head = [[*head[0], tag("td", "")], [*head[1], heading("measured on", class_="plain")]]
    caption = f"{rows[0][1]}; percent; ★ is the best of its column" if same else "percent"
    other = "These were not measured on the same images: no best is marked, and differences may be of the images."
    return [table(head, cells, caption), *([] if same else [tag("p", other, class_="warning")])]


def versions(device: str) -> Html:
    """Of what made the page; runs do not record their own."""
    found = {"fastcr": fastcr.__version__, "Python": platform.python_version()}
    for name in ("torch", "triton", "torchvision"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    where = pick_device(device)
    found["device"] = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU ({platform.machine()})"
    caption = "Where this page was made; a run does not record its own"
    return table(
        [[heading("what"), heading("version", class_="plain")]],
        [(name, tag("td", each, class_="plain")) for name, each in found.items()],
        caption,
    )


def write_report(config: ReportConfig, console: Console) -> Path:
    """Write the page and return where. `UsageError` for runs, images or a place that cannot be used."""
    validate(config)
    out = config.out or (config.runs[0] if len(config.runs) == 1 else Path()) / "report.html"
    for folder in config.runs:
        load_config(folder / "config.yaml")  # a wrong name is noticed before anything is embedded
    check_out(out)
    names = run_names(config.runs)
    runs = [read_run(folder, name, config, console) for folder, name in zip(config.runs, names, strict=True)]
    if len(runs) == 1:
        title, parts = f"{names[0]}: training on {data_name(runs[0].config)}", run_sections(runs[0], 2)
    else:
        folded = [tag("details", tag("summary", tag("h2", run.name)), *run_sections(run, 3)) for run in runs]
        title, parts = f"{len(runs)} runs compared", [*comparison(runs), tag("h2", "Each run"), *folded]
    content = page(title, *parts, tag("h2", "Versions"), versions(config.run.device))
    write_whole(out, lambda file: file.write_text(content, encoding="utf-8"))
    return out


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.report`."""
    with one_line_errors("report"):
        config = parse(
            ReportConfig,
            sys.argv[1:] if args is None else args,
            prog=called("report"),
            description="A run, or several compared, as one HTML page.",
        )
        console = Console(markup=False)
        console.print(f"report: {write_report(config, console)}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
