"""The centre crops of a list of images as `fastcr.evaluate` cuts them, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.measures.embeddings import BATCH_SIZE, load_crops


def centre_crops(
    images: ImageList, size: int, device: torch.device, workers: int, console: Console
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Normalised crops `[B,3,size,size]` on `device`, sizes `[B,2]` of their images in pixels, and their indices.

    Images that cannot be read are skipped.
    """
    numbers = list(range(len(images)))
    batches = [numbers[start : start + BATCH_SIZE] for start in numbers[::BATCH_SIZE]]
    loader = load_crops([images], batches, image_size=size, workers=workers, pin=False)
    shown = track(
        loader, images.root.name, len(batches), console=console, transient=True, disable=not console.is_terminal
    )
    for batch, (pixels, sizes, readable) in zip(batches, shown, strict=True):
        if readable:
            yield normalise(pixels.to(device), torch.float32), sizes, [batch[i] for i in readable]
