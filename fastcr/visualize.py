"""`fastcr visualize RUN|WEIGHTS IMAGE|FOLDER...`: where the attention lies, what each detector answers to.

Both sheets show images as evaluation sees them. The released branch scales its attention over a whole batch: there, a
map depends on which other images are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcr.arguments import VisualizeConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.crops import enough
from fastcr.data.images import SUFFIXES, ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.data.views import normalise
from fastcr.encoders.encoder import find_weights, folder_of, load
from fastcr.errors import UsageError
from fastcr.output.overlays import Named, Tile, as_evaluated, attention_sheet, contact_sheet, overlay
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import load_config, one_line_errors
from fastcr.runs.context import Context

DETECTOR_IMAGES, TOP = 240, 5  # images a detector's share is of, and that stand for it


def list_images(sources: Sequence[Path]) -> list[tuple[ImageList, int]]:
    """Images of files and of roots, of these the test split if there is one. `UsageError` where there are none."""
    found: list[tuple[ImageList, int]] = []
    for source in sources:
        if source.suffix.lower() in SUFFIXES and not source.is_dir():
            found.append((ImageList(source.parent, (source.name,), None, ()), 0))
        else:
            splits = read_splits(source)
            images = splits.test or splits.train
            found += [(images, index) for index in range(len(images))]
    return found


def choose(
    images: Sequence[tuple[ImageList, int]], limit: int, image_size: int, unreadable: dict[str, str]
) -> list[Named]:
    """Up to `limit` images, evenly spread over the list; those that cannot be read go to `unreadable`, and why.

    Raises `UsageError` if none can be read.
    """
    chosen, count = list[Named](), min(limit, len(images))
    for source, index in (images[i * len(images) // count] for i in range(count)):
        name = Path(source.files[index]).name if source.labels is None else source.classes[source.labels[index]]
        try:
            chosen.append((name, as_evaluated(source.rgb(index, enough(image_size)), image_size)))
        except OSError as error:
            unreadable[source.path(index)] = str(error)
    if not chosen:
        raise UsageError(f"none of the {count} images can be read: {next(iter(unreadable.values()))}")
    return chosen


def detector_sheet(images: Sequence[Named], answers: Tensor, maps: Tensor) -> Image.Image:
    """The detectors that win a position, by their share of all positions; each on the images it answers to most.

    `answers` and `maps` are `[N,K,H,W]`.
    """
    shares = torch.bincount(answers.argmax(1).flatten(), minlength=answers.shape[1]).double() / answers[:, 0].numel()
    peaks, rows = answers.amax((2, 3)), []
    for detector in shares.argsort(descending=True, stable=True).tolist():
        if not shares[detector]:
            break
        best = peaks[:, detector].argsort(descending=True, stable=True)[:TOP].tolist()
        tiles = [Tile(images[i][0], [images[i][1], overlay(images[i][1], maps[i, detector])]) for i in best]
        rows.append((f"detector {detector}: wins {100 * shares[detector].item():.1f} % of the positions", tiles))
    return contact_sheet(rows)


@torch.inference_mode()
def visualize(config: VisualizeConfig, context: Context) -> None:
    """Write `attention.png`, and `detectors.png` if wanted; see the module's first lines.

    Raises `UsageError` for weights without a branch, or if there is no image to show.
    """
    weights, sources = find_weights(config.source), config.images
    if not sources and not config.source.is_dir():
        raise UsageError("a weights file needs an IMAGE or a FOLDER of them after it")
    sources = sources or (load_config(config.source / "config.yaml").data.root or write_synthetic(),)
    encoder, folder = load(weights, context.device), config.out or folder_of(config.source)
    if (branch := encoder.branch) is None:
        raise UsageError(f"{weights} has no rationale branch, so there is no attention to show")
    listed, unreadable = list_images(sources), dict[str, str]()
    folder.mkdir(parents=True, exist_ok=True)

    def features_of(images: Sequence[Named]) -> Tensor:
        pixels = torch.stack([torch.from_numpy(np.array(image)) for _, image in images])
        parts = [normalise(part.to(context.device), torch.float32) for part in pixels.split(BATCH_SIZE)]
        return torch.cat([encoder.backbone(part) for part in parts])

    def save(sheet: Image.Image, name: str) -> None:
        write_whole(folder / name, lambda beside: sheet.save(beside, "PNG"))
        context.say(folder / name)

    images = choose(listed, config.limit, encoder.image_size, unreadable)
    features = features_of(images)
    attention = branch.pool(features).attention.unflatten(1, features.shape[2:])
    save(attention_sheet(images, attention, config.columns), "attention.png")
    if config.detectors:
        images = choose(listed, DETECTOR_IMAGES, encoder.image_size, unreadable)
        answers = branch.responses(features_of(images)).cpu()
        save(detector_sheet(images, answers, branch.alone(answers)), "detectors.png")
    for reason in unreadable.values():
        context.say(f"left out: {reason}")


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr visualize`."""
    with one_line_errors("visualize"):
        config: VisualizeConfig = read_arguments("visualize", args)
        visualize(config, Context.of(config.run.device, "fp32"))


if __name__ == "__main__":
    main()
