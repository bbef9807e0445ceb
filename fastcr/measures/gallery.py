"""Images of a report: with the attention over them, and with the images most similar to them."""

from __future__ import annotations

import base64
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from fastcr.data.crops import centre_crop
from fastcr.data.images import ImageList
from fastcr.errors import UsageError
from fastcr.measures.embeddings import Embeddings
from fastcr.measures.overlays import overlay

SIDE, QUALITY, NEIGHBOURS = 144, 82, 5  # pixels and JPEG quality of the images on the page; found of each query


class Shown(NamedTuple):
    """An image on the page."""

    source: str  # data URI
    file: str
    label: str  # name of its class; "" without labels


class Neighbours(NamedTuple):
    """A query and what is most similar to it."""

    query: Shown
    found: list[tuple[Shown, bool | None, float]]  # of the query's class (None: no labels), cosine
    alone: bool  # in its class: no neighbour can be right


class Pictures(NamedTuple):
    """What a run's images show; all of it empty where they are not at hand, for the reason in `note`."""

    note: str = ""
    attended: Sequence[tuple[Shown, str]] = ()  # image, overlay as a data URI
    queries: Sequence[Neighbours] = ()
    embedding: str = ""  # that the neighbours are by


def spread(count: int, of: int) -> list[int]:
    """Up to `count` places among `of`, evenly spread."""
    count = min(count, of)
    return [(2 * number + 1) * of // (2 * count) for number in range(count)]


class Thumbnails:
    """The centre crops that were embedded, as data URIs of one size."""

    def __init__(self, images: ImageList, image_size: int) -> None:
        self.images, self.image_size = images, image_size

    def picture(self, index: int) -> Image.Image:
        """Image `index`, which could be read before. `UsageError` if it no longer can."""
        try:
            crop = centre_crop(self.images.rgb(index), self.image_size)
        except OSError as error:
            raise UsageError(str(error)) from None
        return Image.fromarray(crop.numpy()).resize((SIDE, SIDE), Image.Resampling.LANCZOS)

    def shown(self, index: int) -> Shown:
        """Image `index` on the page."""
        labels = self.images.labels
        label = self.images.classes[labels[index]] if labels else ""
        return Shown(data_uri(self.picture(index)), os.path.basename(self.images.files[index]), label)


def data_uri(picture: Image.Image) -> str:
    """The picture as a JPEG that needs no file."""
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def attended(found: Embeddings, thumbnails: Thumbnails, count: int) -> list[tuple[Shown, str]]:
    """Images evenly spread over the list, each with its overlay."""
    if found.attention is None:
        return []
    side, pairs = math.isqrt(found.attention.shape[1]), []
    for place in spread(count, len(found.kept)):
        index = int(found.kept[place])
        drawn = overlay(thumbnails.picture(index), found.attention[place].view(side, side))
        pairs.append((thumbnails.shown(index), data_uri(drawn)))
    return pairs


def neighbours(found: Embeddings, thumbnails: Thumbnails, count: int) -> list[Neighbours]:
    """Queries evenly spread over the list, each with the images most similar to it."""
    vectors = found.mean if found.rationale is None else found.rationale
    labels = thumbnails.images.labels
    sizes = Counter(labels[int(index)] for index in found.kept) if labels else Counter()
    queries = []
    for place in spread(count, len(vectors)):
        similarity = vectors @ vectors[place]
        similarity[place] = -torch.inf
        index, near = int(found.kept[place]), []
        for other in similarity.topk(min(NEIGHBOURS, len(vectors) - 1)).indices.tolist():
            at = int(found.kept[other])
            right = labels[at] == labels[index] if labels else None
            near.append((thumbnails.shown(at), right, similarity[other].item()))
        alone = labels is not None and sizes[labels[index]] == 1
        queries.append(Neighbours(thumbnails.shown(index), near, alone))
    return queries
