"""`python -m fastcr.visualize RUN|WEIGHTS IMAGE|FOLDER...`: where the attention lies, what each detector answers to.

Both sheets show pictures as evaluation sees them. The released branch scales its attention over a whole batch: there, a
map depends on which other pictures are shown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastcr.config import DeviceConfig, number, tyro
from fastcr.data.crops import centre_crop
from fastcr.data.images import SUFFIXES, ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.data.views import normalise
from fastcr.errors import UsageError
from fastcr.measures.embeddings import BATCH_SIZE
from fastcr.measures.overlays import Tile, contact_sheet, overlay
from fastcr.method.encoder import Encoder, find_weights, load
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse
from fastcr.runs.machine import pick_device

DETECTOR_IMAGES, TOP = 240, 5  # images a detector's share is of, and that stand for it


class Picture(NamedTuple):
    """An image as evaluation sees it."""

    crop: Image.Image
    name: str  # its class, else its file


def crop_picture(picture: Image.Image, image_size: int) -> Image.Image:
    """What evaluation sees of an RGB picture: a square of `image_size` pixels."""
    return Image.fromarray(centre_crop(picture, image_size).contiguous().numpy())


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


def choose_pictures(
    images: Sequence[tuple[ImageList, int]], limit: int, image_size: int, unreadable: dict[str, str]
) -> list[Picture]:
    """Up to `limit` pictures, evenly spread over the list; those that cannot be read go to `unreadable`, and why.

    Raises `UsageError` if none can be read.
    """
    pictures, count = [], min(limit, len(images))
    for source, index in (images[i * len(images) // count] for i in range(count)):
        try:
            crop = crop_picture(source.rgb(index), image_size)
        except OSError as error:
            unreadable[source.path(index)] = str(error)
            continue
        name = Path(source.files[index]).name if source.labels is None else source.classes[source.labels[index]]
        pictures.append(Picture(crop, name))
    if not pictures:
        raise UsageError(f"none of the {count} images can be read: {next(iter(unreadable.values()))}")
    return pictures


def features_of(encoder: Encoder, pictures: Sequence[Picture], device: torch.device) -> Tensor:
    """Features `[N,C,H,W]` of pictures, encoder in eval mode."""
    pixels = torch.stack([torch.from_numpy(np.array(each.crop)) for each in pictures])
    parts = [normalise(part.to(device), torch.float32) for part in pixels.split(BATCH_SIZE)]
    return torch.cat([encoder.backbone(part) for part in parts])


def attention_sheet(pictures: Sequence[Picture], attention: Tensor, columns: int) -> Image.Image:
    """Each picture beside its overlay; `attention` `[N,H,W]`."""
    pairs = zip(pictures, attention, strict=True)
    tiles = [Tile(each.name, [each.crop, overlay(each.crop, map_)]) for each, map_ in pairs]
    return contact_sheet([("", tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def detector_sheet(pictures: Sequence[Picture], answers: Tensor, maps: Tensor) -> Image.Image:
    """The detectors that win a place, by their share of all places; each on the pictures it answers to most.

    `answers` and `maps` are `[N,K,H,W]`.
    """
    shares = torch.bincount(answers.argmax(1).flatten(), minlength=answers.shape[1]).double() / answers[:, 0].numel()
    peaks, rows = answers.amax((2, 3)), []
    for detector in shares.argsort(descending=True, stable=True).tolist():
        if not shares[detector]:
            break
        best = peaks[:, detector].argsort(descending=True, stable=True)[:TOP].tolist()
        tiles = [Tile(pictures[i].name, [pictures[i].crop, overlay(pictures[i].crop, maps[i, detector])]) for i in best]
        rows.append((f"detector {detector}: wins {100 * shares[detector].item():.1f} % of the places", tiles))
    return contact_sheet(rows)


@torch.inference_mode()
def visualize(
    weights: Path,
    sources: Sequence[Path],
    folder: Path,
    *,
    limit: int,
    columns: int,
    detectors: bool,
    device: torch.device,
    console: Console,
) -> None:
    """Write `attention.png`, and `detectors.png` if wanted, into `folder`; see the module's first lines.

    Raises `UsageError` for weights without a branch, or if there is no image to show.
    """
    encoder = load(weights, device)
    branch, side = encoder.branch, encoder.image_size
    if branch is None:
        raise UsageError(f"{weights} has no rationale branch, so there is no attention to show")
    images, unreadable = list_images(sources), dict[str, str]()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = choose_pictures(images, limit, side, unreadable)
    features = features_of(encoder, pictures, device)
    attention = branch.pool(features).attention.view(-1, *features.shape[2:])
    save(attention_sheet(pictures, attention, columns), folder / "attention.png", console)
    if detectors:
        pictures = choose_pictures(images, DETECTOR_IMAGES, side, unreadable)
        answers = branch.responses(features_of(encoder, pictures, device)).cpu()
        save(detector_sheet(pictures, answers, branch.alone(answers)), folder / "detectors.png", console)
    for reason in unreadable.values():
        console.print(f"left out: {reason}", soft_wrap=True, highlight=False)


def save(sheet: Image.Image, file: Path, console: Console) -> None:
    """Write a PNG, whole or not at all, and say where it is."""
    write_whole(file, lambda beside: sheet.save(beside, "PNG"))
    console.print(f"{file}", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class VisualizeConfig:
    """What to show, and how."""

    source: tyro.conf.Positional[Path]
    """A run folder, or one of fastcr's weights files."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, or whatever --data.root of the training takes (its test images). Default: the run's own."""
    out: Path | None = None
    """Folder to write. Default: that of the weights."""
    limit: int = number(24, 1)
    """Images shown, evenly spread over those there are."""
    columns: int = number(6, 1)
    """Images side by side."""
    detectors: bool = False
    """Also write detectors.png: each detector's share of the places, and its own map where it answers most."""
    run: DeviceConfig = field(default_factory=DeviceConfig)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.visualize`."""
    with one_line_errors("visualize"):
        config = parse(
            VisualizeConfig,
            sys.argv[1:] if args is None else args,
            prog=called("visualize"),
            description="Contact sheets of the attention and of the detectors.",
        )
        weights, images = find_weights(config.source), config.images
        if not images and not config.source.is_dir():
            raise UsageError("a weights file needs an IMAGE or a FOLDER of them after it")
        images = images or (load_config(config.source / "config.yaml").data.root or write_synthetic(),)
        visualize(
            weights,
            images,
            config.out or weights.parent,
            limit=config.limit,
            columns=config.columns,
            detectors=config.detectors,
            device=pick_device(config.run.device),
            console=Console(markup=False),
        )


if __name__ == "__main__":
    main()
