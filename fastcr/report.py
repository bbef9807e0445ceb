"""`fastcr report RUN [RUN ...]`: a run, or several compared, as one HTML page that needs nothing else.

The words and the looks of the page, and that every name is escaped, are up to `report.html.jinja`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastcr
from fastcr.arguments import ReportConfig, read_arguments
from fastcr.config import Config
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.encoder import load
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.output.charts import can_draw
from fastcr.output.gallery import Gallery, Thumbnails, attended, neighbours
from fastcr.output.pages import check_out, render
from fastcr.output.summary import SECTIONS, Run, by_name, compare, data_name, differing, is_number, losses, scores_of
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.log import read_records
from fastcr.runs.machine import cache_folder, pick_device

GENERATOR = '<meta name="generator" content="fastcr.report">'


def gallery_of(folder: Path, name: str, trained: Config, config: ReportConfig, context: Context) -> Gallery:
    """The run's images, embedded by its weights as they are now."""
    weights, root = folder / "weights.safetensors", config.data.root or trained.data.root
    if not (config.gallery or config.queries):
        return Gallery("None were asked for (--gallery 0 --queries 0).")
    if not weights.exists():
        return Gallery("The run has not saved weights yet, so no images are shown.")
    of = data_name(root)
    try:
        splits = read_splits(root or write_synthetic())
    except UsageError as error:
        if config.data.root:
            raise
        context.say(f"no images of {name} at hand: {error}")
        return Gallery(f"The images ({of}) were not at hand when this page was made; --data.root says where they are.")
    images, encoder = splits.test or splits.train, load(weights, context.device)
    found = embed(encoder, images, context, title=name)
    thumbnails = Thumbnails(images, encoder.image_size)
    lost = f"; {len(found.unreadable)} cannot be read" if found.unreadable else ""
    note = f"{'Test' if splits.test else 'Training'} images of {of}, evenly spread over {len(images):,}{lost}."
    return Gallery(
        note if images.labels else f"{note} They have no labels.",
        attended(found, thumbnails, config.gallery),
        neighbours(found, thumbnails, config.queries),
        "mean" if encoder.branch is None else "rationale",
    )


def read_run(folder: Path, name: str, trained: Config, config: ReportConfig, context: Context) -> Run:
    """All that a report says of the run in `folder`, whose settings are `trained`. `UsageError` for a broken file."""
    path, results = folder / "results.json", {}
    if path.exists():
        try:
            results = json.loads(path.read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise UsageError(f"{path} is broken: {error}") from None
        if not isinstance(results, dict):
            raise UsageError(f"{path} is broken: it holds no results")
    every = read_records(folder / "metrics.jsonl")
    numbers = [{key: value for key, value in record.items() if is_number(value)} for record in every]
    records = [record for record in numbers if "step" in record]
    return Run(name, trained, records, results, gallery_of(folder, name, trained, config, context))


def versions(device: str) -> dict[str, str]:
    """Of what made the page; runs do not record their own."""
    found = {"fastcr": fastcr.__version__, "Python": platform.python_version()}
    for name in ("torch", "triton", "torchvision"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    where = pick_device(device)
    found["device"] = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU ({platform.machine()})"
    return found


def page(runs: Sequence[Run], device: str = "cpu") -> str:
    """The whole page. It says who made it, so that a report is only ever written over another report."""
    helpers = {"by_name": by_name, "called": called, "can_draw": can_draw(), "compare": compare,
               "data_name": data_name, "differing": differing, "losses": losses,
               "quote": shlex.quote, "scores_of": scores_of, "sections": SECTIONS}  # fmt: skip
    return render("report.html.jinja", helpers, runs=runs, versions=versions(device))


def write_report(config: ReportConfig, context: Context) -> Path:
    """Write the page and return where. `UsageError` for runs, images or a path that cannot be used."""
    if not config.runs:
        raise UsageError("name a run folder")
    if len({run.resolve() for run in config.runs}) < len(config.runs):
        raise UsageError("a run is named twice")
    out = config.out or (config.runs[0] if len(config.runs) == 1 else Path()) / "report.html"
    trained = [load_config(folder / "config.yaml") for folder in config.runs]
    check_out(out, GENERATOR)
    names = [Path(os.path.abspath(folder)).name for folder in config.runs]
    numbers = [f" ({names[: i + 1].count(name)})" if names.count(name) > 1 else "" for i, name in enumerate(names)]
    names = [name + number for name, number in zip(names, numbers, strict=True)]
    runs = [read_run(*run, config, context) for run in zip(config.runs, names, trained, strict=True)]
    content = page(runs, config.run.device)
    write_whole(out, lambda file: file.write_text(content, encoding="utf-8"))
    return out


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr report`."""
    with one_line_errors("report"):
        config: ReportConfig = read_arguments("report", args)
        context = Context.of(config.run.device, config.run.precision, config.data.workers)
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))  # its list of fonts, made only once
        context.say(f"report: {write_report(config, context)}")


if __name__ == "__main__":
    main()
