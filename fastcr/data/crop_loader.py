"""The centre crops of many images in batches, decoded by worker processes: what every evaluation looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from fastcr.data.crops import centre_crop, enough
from fastcr.data.images import ImageList, full_size
from fastcr.data.pixel_cache import CachedImages
from fastcr.runs.context import Context
from fastcr.runs.machine import free_memory, load_batches

BATCH_SIZE = 128
Crop = tuple[Tensor, tuple[int, int]]


def in_batches(indices: Sequence[int]) -> list[list[int]]:
    """Indices of images in batches of `BATCH_SIZE`; the last may be smaller."""
    return [[*indices[at : at + BATCH_SIZE]] for at in range(0, len(indices), BATCH_SIZE)]


class _Crops(Dataset[Crop | None]):
    """Index to the centre crop, uint8 `[S,S,3]`, and the image's (height, width); None for an unreadable image."""

    def __init__(self, images: ImageList, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> Crop | None:
        try:
            image = self.images.rgb(index, enough(self.size))
        except OSError:
            return None
        return centre_crop(image, self.size), full_size(image)

    def __len__(self) -> int:
        return len(self.images)


def collate(crops: list[Crop | None]) -> tuple[Tensor, Tensor, list[int]]:
    """The readable crops in one tensor (one shared-memory file a batch); their sizes and indices in the batch."""
    readable = [i for i, crop in enumerate(crops) if crop is not None]
    found = [crop for crop in crops if crop is not None]
    pixels = torch.stack([crop for crop, _ in found]) if found else torch.empty(0)
    return pixels, torch.tensor([size for _, size in found], dtype=torch.int64).view(-1, 2), readable


def load_crops(
    parts: Sequence[ImageList], batches: Sequence[list[int]], image_size: int, context: Context
) -> Iterator[Any]:
    """What `collate` gives of each batch, decoded by the context's workers; the indices count through `parts`.

    Images that are decoded already need no processes.
    """
    most = max(map(len, batches), default=1)
    workers = 0 if all(isinstance(images, CachedImages) for images in parts) else context.workers
    dataset: ConcatDataset[Crop | None] = ConcatDataset([_Crops(images, image_size) for images in parts])
    return load_batches(dataset, batches, collate, workers, 3 * most * image_size**2, context.device)


class KeptCrops:
    """`load_crops` for several encoders: what it gave once is kept, where memory has ample room for it."""

    def __init__(self) -> None:
        self.kept = dict[Any, list[Any]]()

    def __call__(
        self, parts: Sequence[ImageList], batches: Sequence[list[int]], image_size: int, context: Context
    ) -> Iterator[Any]:
        """As `load_crops`."""
        key = *map(id, parts), image_size, tuple(map(tuple, batches))
        if key in self.kept:
            yield from self.kept[key]
            return
        found, fits = [], 3 * image_size**2 * sum(map(len, batches)) <= free_memory() // 8
        for pixels, sizes, readable in load_crops(parts, batches, image_size, context):
            if fits:  # copied out of the memory shared with loader processes
                found.append((pixels.clone(), sizes.clone(), readable))
            yield pixels, sizes, readable
        if fits:
            self.kept[key] = found
