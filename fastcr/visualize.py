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

DETECTOR_IMAGES, TOP = 240, 5  # images a detector's share is of, and that stand for it
ALIKE = 0.95  # correlation over all positions from which two detectors count as alike


def detector_sections(pictures: Sequence[Picture], answers: Tensor, maps: Tensor) -> tuple[str, list[Section]]:
    """What is drawn, in a line; and the detectors that win a position, by their share of all positions.

    Of detectors that answer alike only the one that wins most is drawn, with the share of all of them, on the images it
    answers to most. `answers` and `maps` are `[N,K,H,W]`.
    """
    count = answers.shape[1]
    wins = torch.bincount(answers.argmax(1).flatten(), minlength=count)
    similar = torch.corrcoef(answers.transpose(0, 1).flatten(1).double()).view(count, count)
    groups = dict[int, list[int]]()  # by the detector that is drawn
    for detector in wins.argsort(descending=True, stable=True).tolist():
        if wins[detector]:
            drawn = next((first for first in groups if similar[first, detector] > ALIKE), detector)
            groups.setdefault(drawn, []).append(detector)
    sections = list[Section]()
    for detector, alike in sorted(groups.items(), key=lambda group: -int(wins[group[1]].sum())):
        best = answers[:, detector].amax((1, 2)).argsort(descending=True, stable=True)[:TOP].tolist()
        tiles = [tile(pictures[i].name, pictures[i].crop, maps[i, detector]) for i in best]
        share = 100 * int(wins[alike].sum()) / answers[:, 0].numel()
        more = f" and {len(alike) - 1} like it" if len(alike) > 1 else ""
        verb = "win" if more else "wins"
        sections.append(Section(f"detector {detector}{more}: {verb} {share:.1f} % of the positions", rows=[tiles]))
    winners = sum(map(len, groups.values()))
    said = f"{len(groups)} of {count} detectors are drawn; {winners - len(groups)} others answer like one of these"
    return f"{said} (correlation above {ALIKE}), {count - winners} win no position.", sections


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
    listed, unreadable = list_images(sources), dict[str, None]()

    def read(count: int) -> list[Picture]:
        pictures, reasons = read_pictures(chosen := spread(listed, count), encoder.image_size)
        unreadable.update(dict.fromkeys(reasons))
        if not pictures:
            raise UsageError(f"none of the {len(chosen)} images can be read: {reasons[0]}")
        return list(pictures.values())

    pictures = read(config.limit)
    tiles = attended(pictures, encoder, context)
    text = "Each map is warm where the attention is high, and is scaled to its own maximum."
    columns = len(tiles) if out.suffix.lower() == PAGE else config.columns  # a page breaks its lines itself
    sections = [Section(text=text, rows=in_rows(tiles, columns))]
    if config.detectors:
        pictures = read(DETECTOR_IMAGES)
        parts = pixels_of(pictures).split(BATCH_SIZE)
        answers = torch.cat([branch.responses(encoder.of_crops(part.to(context.device))[0]).cpu() for part in parts])
        said, detectors = detector_sections(pictures, answers, branch.alone(answers))
        context.say(said)
        sections += [Section("Detectors", said), *detectors]
    write_sheet(out, f"Attention of {weights.name}", sections)
    for reason in unreadable:
        context.say(f"left out: {reason}")
    context.say(out)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr visualize`."""
    with one_line_errors("visualize"):
        config: VisualizeConfig = read_arguments("visualize", args)
        visualize(config, Context.of(config.run.device, "fp32"))


if __name__ == "__main__":
    main()
