"""`fastcr visualize RUN|WEIGHTS IMAGE|FOLDER...`: where the attention lies, what each detector answers to.

Images are shown as evaluation sees them. The released branch scales its attention over a whole batch: there, a map
depends on which other images are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcr.arguments import VisualizeConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.encoder import find_weights, folder_of, load
from fastcr.errors import UsageError
from fastcr.output.gallery import Picture, attended, in_rows, list_images, pixels_of, read_pictures, spread, tile
from fastcr.output.sheets import PAGE, Section, check_out, write_sheet
from fastcr.runs.command_line import load_config, one_line_errors
from fastcr.runs.context import Context

DETECTORS, TOP = 8, 5  # detectors that are drawn, at most, and images of each


def detector_sections(pictures: Sequence[Picture], answers: Tensor, maps: Tensor) -> list[Section]:
    """The detectors that win most positions, on the images they answer to most; `answers` and `maps`: `[N,K,H,W]`."""
    wins = torch.bincount(answers.argmax(1).flatten(), minlength=answers.shape[1])
    first = [detector for detector in wins.argsort(descending=True, stable=True).tolist() if wins[detector]][:DETECTORS]
    text = f"{len(first)} of {len(wins)} detectors are drawn, {int((wins == 0).sum())} win no position."
    sections = [Section("Detectors", text)]
    for detector in first:
        best = answers[:, detector].amax((1, 2)).argsort(descending=True, stable=True)[:TOP].tolist()
        tiles = [tile(pictures[i].name, pictures[i].crop, maps[i, detector]) for i in best]
        heading = f"detector {detector} wins {wins[detector] / wins.sum():.1%} of the positions"
        sections.append(Section(heading, rows=[tiles]))
    return sections


@torch.inference_mode()
def visualize(config: VisualizeConfig, context: Context) -> None:
    """Write the sheet or the page; see the module's first lines.

    Raises `UsageError` for weights without a branch, or if there is no image to show.
    """
    weights, sources = find_weights(config.source), config.images
    if not sources and not config.source.is_dir():
        raise UsageError("a weights file needs an IMAGE or a FOLDER of them after it")
    out = config.out or folder_of(config.source) / "attention.png"
    check_out(out)
    sources = sources or (load_config(config.source / "config.yaml").data.root or write_synthetic(),)
    encoder = load(weights, context.device)
    if (branch := encoder.branch) is None:
        raise UsageError(f"{weights} has no attention branch, so there is no attention to show")
    found, reasons = read_pictures(spread(list_images(sources), config.limit), encoder.image_size)
    if not found:
        raise UsageError(f"none of the {len(reasons)} images can be read: {reasons[0]}")
    pictures = list(found.values())
    tiles = attended(pictures, encoder, context)
    text = "Each map is warm where the attention is high, and is scaled to its own maximum."
    columns = len(tiles) if out.suffix.lower() == PAGE else config.columns  # a page breaks its lines itself
    sections = [Section(text=text, rows=in_rows(tiles, columns))]
    if config.detectors:
        parts = pixels_of(pictures).split(BATCH_SIZE)
        answers = torch.cat([branch.responses(encoder.of_crops(part.to(context.device))[0]).cpu() for part in parts])
        sections += detector_sections(pictures, answers, branch.alone(answers))
    write_sheet(out, f"Attention of {weights.name}", sections)
    for reason in reasons:
        context.say(f"left out: {reason}")
    context.say(out)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr visualize`."""
    with one_line_errors("visualize"):
        config: VisualizeConfig = read_arguments("visualize", args)
        visualize(config, Context.of(config.run.device, "fp32"))


if __name__ == "__main__":
    main()
