"""`fastcr report RUN`: a run as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from fastcr.arguments import ReportConfig, read_arguments
from fastcr.config import Config
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.encoder import load
from fastcr.errors import UsageError
from fastcr.export import training_settings
from fastcr.output.gallery import attended, read_pictures, spread
from fastcr.output.sheets import PAGE, Section, check_out, write_page
from fastcr.output.tables import results_tables, text_of
from fastcr.runs.command_line import called, load_config, one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.log import read_records

ATTENDED = 12  # images shown with their attention


def settings_of(config: Config, folder: Path) -> Section:
    """How far the run has come, and its settings, without the paths of the machine it ran on."""
    said = "no step is logged yet" if config.optim.epochs else "no training (0 epochs)"
    if steps := [record for record in read_records(folder / "metrics.jsonl") if {"step", "epoch"} <= record.keys()]:
        epochs = f"epoch {steps[-1]['epoch']:.3g} of {config.optim.epochs}"
        said = f"{steps[-1]['step']:,} steps of {config.optim.batch_size} images, {epochs}"
    code = yaml.safe_dump(training_settings(config), sort_keys=False)
    return Section("Settings", f"The preset {config.preset}: {said}.", code)


def results_of(folder: Path, name: str) -> Section:
    """The tables and the verdict of evaluation. `UsageError` for a `results.json` that is broken."""
    path = folder / "results.json"
    if not path.exists():
        return Section("Results", f"The run is not measured yet: {called('evaluate')} {shlex.quote(name)}")
    try:
        found = list(results_tables(json.loads(path.read_text())))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{path} is broken: {type(error).__name__} {error}") from None
    said = " ".join(each for each in found if isinstance(each, str))
    return Section("Results", said, tables=[text_of(each) for each in found if not isinstance(each, str)])


@torch.inference_mode()
def images_of(name: str, trained: Config, config: ReportConfig, context: Context) -> Section:
    """The attention over images, by the run's weights as they are now."""
    weights, root = config.source / "weights.safetensors", config.data.root or trained.data.root
    if not weights.exists():
        return Section("Attention", "The run has not saved weights yet, so no images are shown.")
    try:
        splits = read_splits(root or write_synthetic())
    except UsageError as error:
        if config.data.root:
            raise
        context.say(f"no images of {name} at hand: {error}")
        return Section("Attention", "No images were at hand when this page was made; --data.root says where they are.")
    images, encoder = splits.test or splits.train, load(weights, context.device)
    if encoder.branch is None:
        return Section("Attention", "The encoder has no branch for it.")
    places = [(images, index) for index in spread(range(len(images)), ATTENDED)]
    tiles = attended([*read_pictures(places, encoder.image_size)[0].values()], encoder, context)
    text = f"Images evenly spread over {len(images):,} {'test' if splits.test else 'training'} images. "
    text += "Each map is warm where it is high, and is scaled to its own maximum."
    return Section("Attention", text, rows=[tiles])


def write_report(config: ReportConfig, context: Context) -> Path:
    """Write the page and return where. `UsageError` for a run, images or a path that cannot be used."""
    out = config.out or config.source / "report.html"
    trained = load_config(config.source / "config.yaml")
    check_out(out, PAGE)
    name = Path(os.path.abspath(config.source)).name
    images = images_of(name, trained, config, context)
    sections = [settings_of(trained, config.source), results_of(config.source, name), images]
    write_page(out, f"{name}: training on {training_settings(trained)['data']}", sections)
    return out


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr report`."""
    with one_line_errors("report"):
        config: ReportConfig = read_arguments("report", args)
        context = Context.of(config.run.device, "fp32")
        context.say(f"report: {write_report(config, context)}")


if __name__ == "__main__":
    main()
