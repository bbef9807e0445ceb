"""Images as evaluation sees them, with the attention over them, as tiles of a page or a grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.crops import centre_crop, enough
from fastcr.data.images import SUFFIXES, ImageList
from fastcr.data.layouts import read_splits
from fastcr.encoders.encoder import Encoder
from fastcr.measures.poolings import pooled
from fastcr.output.sheets import Tile, grid_of
from fastcr.runs.context import Context

FIXED = 12  # images whose attention is drawn during a training
COLD, WARM, HOT = "#1b1044", "#e0483e", "#fdf3a0"  # colours of an attention map
STRENGTH = 0.75  # how far the most attended position is covered
Place = tuple[ImageList, int]  # an image of a list
T = TypeVar("T")


class Picture(NamedTuple):
    """An image that could be read."""

    name: str  # of its class, or else its file
    crop: Image.Image  # what evaluation sees of it


def as_evaluated(image: Image.Image, image_size: int) -> Image.Image:
    """What evaluation sees of an RGB image: a square of `image_size` pixels from its centre."""
    return Image.fromarray(centre_crop(image, image_size).contiguous().numpy())


def overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """`image` with a map `[H,W]` of the same crop over it: warm where the map is high, bare where it is low.

    The map is scaled to its own maximum, so that flat maps look flat and warm throughout.
    """
    scaled = attention.detach().cpu().double() / attention.max().clamp_min(1e-12).item()
    heat = Image.fromarray((scaled * 255).round().byte().numpy())
    heat = heat.resize(image.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(heat, black=COLD, mid=WARM, white=HOT)
    return Image.composite(colours, image.convert("RGB"), heat.point(lambda value: round(value * STRENGTH)))


def list_images(sources: Sequence[Path]) -> list[Place]:
    """Images of files and of roots, of these the test split if there is one. `UsageError` where there are none."""
    found = list[Place]()
    for source in sources:
        if source.suffix.lower() in SUFFIXES and not source.is_dir():
            found.append((ImageList(source.parent, (source.name,), None, ()), 0))
        else:
            splits = read_splits(source)
            images = splits.test or splits.train
            found += [(images, index) for index in range(len(images))]
    return found


def spread(items: Sequence[T], count: int) -> list[T]:
    """Up to `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def read_pictures(places: Sequence[Place], image_size: int) -> tuple[dict[str, Picture], list[str]]:
    """Images as evaluation sees them, by their paths; and why the others cannot be read."""
    found, reasons = dict[str, Picture](), list[str]()
    for images, index in places:
        name = images.classes[images.labels[index]] if images.labels else os.path.basename(images.files[index])
        try:
            crop = as_evaluated(images.rgb(index, enough(image_size)), image_size)
        except OSError as error:
            reasons.append(str(error))
        else:
            found[images.path(index)] = Picture(name, crop)
    return found, reasons


def encode(
    pictures: Sequence[Picture], encoder: Encoder, context: Context, pooling: str = "mean"
) -> tuple[Tensor, Sequence[Tensor] | Sequence[None]]:
    """Unit embeddings `[N,C]`, by a `pooling` of `poolings.pooled`, and the attention `[h,w]` of each, on the CPU.

    Without a branch the attention is None.
    """
    vectors, maps = list[Tensor](), list[Tensor]()
    pixels = torch.stack([torch.from_numpy(np.array(picture.crop)) for picture in pictures])  # uint8 [N,S,S,3]
    for part in pixels.split(BATCH_SIZE):
        features, token = encoder.of_crops(part.to(context.device), context.dtype)
        vectors.append(pooled(features, encoder, pooling, token).cpu())
        if (attention := encoder.pooled(features).attention) is not None:
            maps += attention.cpu().unbind()
    return torch.cat(vectors), maps or [None] * len(pictures)


def tile(caption: str, crop: Image.Image, attention: Tensor | None = None) -> Tile:
    """An image, and beside it the attention over it if there is one."""
    return Tile(caption, [crop] if attention is None else [crop, overlay(crop, attention)])


def attended(pictures: Sequence[Picture], encoder: Encoder, context: Context) -> list[Tile]:
    """Each image, and beside it the attention of an encoder with a branch."""
    maps = encode(pictures, encoder, context)[1]
    return [tile(each.name, each.crop, attention) for each, attention in zip(pictures, maps, strict=True)]


@torch.inference_mode()
def fixed_attention(encoder: Encoder, images: ImageList, context: Context) -> Image.Image | None:
    """The attention over `FIXED` images, the same ones of a list each time; None without a branch or an image."""
    # the evaluation names what cannot be read
    pictures, _ = read_pictures([(images, index) for index in spread(range(len(images)), FIXED)], encoder.image_size)
    if encoder.branch is None or not pictures:
        return None
    with torch.compiler.set_stance("force_eager"), encoder.evaluating():
        tiles = attended(list(pictures.values()), encoder, context)
    return grid_of(tiles)
