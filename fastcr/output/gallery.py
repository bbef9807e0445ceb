"""Images of a report and of a training: with the attention over them, and with the images most similar to them."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fastcr.data.crops import enough
from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.encoders.encoder import Encoder
from fastcr.errors import UsageError
from fastcr.measures.embeddings import Embeddings
from fastcr.output.overlays import Named, as_evaluated, attention_sheet, overlay
from fastcr.runs.context import Context

FIXED = 8  # images whose attention is drawn during a training
SIDE, QUALITY, NEIGHBOURS = 144, 82, 5  # pixels and JPEG quality of the images on the page; found of each query


class Shown(NamedTuple):
    """An image on the page."""

    source: str  # data URI
    file: str
    label: str  # name of its class; "" without labels


class Query(NamedTuple):
    """An image and those most similar to it."""

    shown: Shown
    found: list[tuple[Shown, bool | None, float]]  # whether it is of the query's class (None: no labels), cosine
    alone: bool  # in its class: no neighbour can be right


class Gallery(NamedTuple):
    """The images shown of a run; none where they cannot be had, for the reason in `note`."""

    note: str
    attended: Sequence[tuple[Shown, str]] = ()  # image, overlay as a data URI
    queries: Sequence[Query] = ()
    embedding: str = ""  # by which the neighbours are the most similar


def spread(count: int, of: int) -> list[int]:
    """Up to `count` positions among `of`, evenly spread."""
    count = min(count, of)
    return [(2 * number + 1) * of // (2 * count) for number in range(count)]


def data_uri(image: Image.Image) -> str:
    """The image as a JPEG that needs no file."""
    image.save(held := io.BytesIO(), "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


class Thumbnails:
    """The centre crops that were embedded, all of one size."""

    def __init__(self, images: ImageList, image_size: int) -> None:
        self.images, self.image_size = images, image_size

    def image(self, index: int) -> Image.Image:
        """Image `index`, which could be read before. `UsageError` if it no longer can."""
        try:
            crop = as_evaluated(self.images.rgb(index, enough(self.image_size)), self.image_size)
            return crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        except OSError as error:
            raise UsageError(str(error)) from None

    def shown(self, index: int) -> Shown:
        """Image `index` on the page."""
        label = self.images.classes[self.images.labels[index]] if self.images.labels else ""
        return Shown(data_uri(self.image(index)), os.path.basename(self.images.files[index]), label)


def attended(found: Embeddings, thumbnails: Thumbnails, count: int) -> list[tuple[Shown, str]]:
    """Images evenly spread over the list, each with its overlay; none without a branch."""
    if found.attention is None:
        return []
    maps = found.attention.unflatten(1, (math.isqrt(found.attention.shape[1]), -1))
    rows = [(row, int(found.kept[row])) for row in spread(count, len(maps))]
    return [(thumbnails.shown(i), data_uri(overlay(thumbnails.image(i), maps[row]))) for row, i in rows]


def neighbours(found: Embeddings, thumbnails: Thumbnails, count: int) -> list[Query]:
    """Queries evenly spread over the list, each with the images most similar to it."""
    vectors = found.mean if found.rationale is None else found.rationale
    kept, labels, queries = found.kept.tolist(), thumbnails.images.labels, []
    classes = [labels[index] for index in kept] if labels else []
    for row in spread(count, len(vectors)):
        similarity = vectors @ vectors[row]
        similarity[row] = -torch.inf
        near = []
        for other in similarity.topk(min(NEIGHBOURS, len(vectors) - 1)).indices.tolist():
            right = classes[other] == classes[row] if classes else None
            near.append((thumbnails.shown(kept[other]), right, similarity[other].item()))
        queries.append(Query(thumbnails.shown(kept[row]), near, bool(classes) and classes.count(classes[row]) == 1))
    return queries


@torch.inference_mode()
def fixed_attention(encoder: Encoder, images: ImageList, context: Context) -> Image.Image | None:
    """The attention over `FIXED` images, the same ones of a list each time; None without a branch or an image."""
    shown, size = list[Named](), encoder.image_size
    for index in spread(FIXED, len(images)):
        name = images.classes[images.labels[index]] if images.labels else os.path.basename(images.files[index])
        with suppress(OSError):  # the evaluation names what cannot be read
            shown.append((name, as_evaluated(images.rgb(index, enough(size)), size)))
    if encoder.branch is None or not shown:
        return None
    pixels = torch.stack([torch.from_numpy(np.array(image)) for _, image in shown]).to(context.device)
    with torch.compiler.set_stance("force_eager"), encoder.evaluating():
        attention = encoder.both(normalise(pixels, torch.float32), context.dtype).attention
    assert attention is not None
    return attention_sheet(shown, attention, FIXED // 2)
