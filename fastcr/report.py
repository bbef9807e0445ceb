"""`fastcr report RUN [RUN ...]`: a run, or several compared, as one HTML page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastcr.arguments import ReportConfig, read_arguments
from fastcr.config import Config
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.encoder import load
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.output.gallery import SIDE, attended, neighbours, read_pictures, spread
from fastcr.output.sheets import PAGE, Section, check_out, write_sheet
from fastcr.output.summary import Run, comparison, data_name, read_run, run_sections
from fastcr.runs.command_line import load_config, one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.machine import cache_folder


def images_of(folder: Path, name: str, trained: Config, config: ReportConfig, context: Context) -> list[Section]:
    """The attention over images and their nearest neighbours, embedded by the run's weights as they are now."""
    weights, root = folder / "weights.safetensors", config.data.root or trained.data.root
    if not (config.gallery or config.queries):
        return []
    if not weights.exists():
        return [Section("Images", "The run has not saved weights yet, so no images are shown.")]
    try:
        splits = read_splits(root or write_synthetic())
    except UsageError as error:
        if config.data.root:
            raise
        context.say(f"no images of {name} at hand: {error}")
        where = "were not at hand when this page was made; --data.root says where they are"
        return [Section("Images", f"The images ({data_name(root)}) {where}.")]
    images, encoder = splits.test or splits.train, load(weights, context.device)
    found = embed(encoder, images, context, title=name)
    shown = f"evenly spread over {len(images):,} {'test' if splits.test else 'training'} images of {data_name(root)}"
    lost = f" {len(found.unreadable)} of them cannot be read." if found.unreadable else ""
    sections = list[Section]()
    if encoder.branch and config.gallery:
        text = f"Images {shown}.{lost} Each map is warm where it is high, and is scaled to its own maximum."
        places = [(images, index) for index in spread(found.kept.tolist(), config.gallery)]
        pictures, _ = read_pictures(places, encoder.image_size)
        tiles = attended(list(pictures.values()), encoder, context, SIDE)
        sections.append(Section("Attention", text, rows=[tiles]))
    if config.queries:
        pooling = "mean" if encoder.branch is None else "attention"
        text = f"Queries {shown}, and the images that are most similar to each by the {pooling} embedding.{lost}"
        marks = " ✓ is of the query's class, ✗ of another." if images.labels else ""
        rows = neighbours(found, images, encoder.image_size, config.queries)
        sections.append(Section("Nearest neighbours", f"{text} Below each is its cosine.{marks}", rows=rows))
    return sections


def page_of(runs: Sequence[Run]) -> tuple[str, list[Section]]:
    """Title and sections of the page."""
    if len(runs) == 1:
        return f"{runs[0].name}: training on {data_name(runs[0].config.data.root)}", run_sections(runs[0])
    each = [section for run in runs for section in run_sections(run, f"{run.name}: ")]
    return f"{len(runs)} runs compared", [*comparison(runs), *each]


def write_report(config: ReportConfig, context: Context) -> Path:
    """Write the page and return where. `UsageError` for runs, images or a path that cannot be used."""
    if not config.runs:
        raise UsageError("name a run folder")
    if len({run.resolve() for run in config.runs}) < len(config.runs):
        raise UsageError("a run is named twice")
    out = config.out or (config.runs[0] if len(config.runs) == 1 else Path()) / "report.html"
    trained = [load_config(folder / "config.yaml") for folder in config.runs]
    check_out(out, [PAGE])
    names = [Path(os.path.abspath(folder)).name for folder in config.runs]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    runs = [
        read_run(folder, name, own, images_of(folder, name, own, config, context))
        for folder, name, own in zip(config.runs, names, trained, strict=True)
    ]
    write_sheet(out, *page_of(runs))
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
