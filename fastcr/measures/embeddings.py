"""The images of a list to their embeddings, both kinds and the attention, from one pass of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from fastcr.data.crops import centre_crop
from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.errors import UsageError
from fastcr.method.encoder import Encoder
from fastcr.runs.distributed import ALONE, Processes
from fastcr.runs.log import progress
from fastcr.runs.machine import leave_signals

BATCH_SIZE = 128
Crop = tuple[Tensor, tuple[int, int]]


class Embeddings(NamedTuple):
    """Unit embeddings of the images that could be read, on the CPU."""

    mean: Tensor  # [N,C] fp32
    rationale: Tensor | None  # [N,C] fp32; None without a branch
    attention: Tensor | None  # [N,S] fp32
    sizes: Tensor  # [N,2] height and width of the images, pixels
    kept: Tensor  # [N] indices into the image list
    unreadable: list[str]  # files left out


class _Crops(Dataset[Crop | None]):
    """Index to the centre crop, uint8 `[S,S,3]`, and the image's (height, width); None for an unreadable image."""

    def __init__(self, images: ImageList, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> Crop | None:
        try:
            image = self.images.rgb(index)
        except OSError:
            return None
        return centre_crop(image, self.size), (image.height, image.width)

    def __len__(self) -> int:
        return len(self.images)


def collate(crops: list[Crop | None]) -> tuple[Tensor, Tensor, list[int]]:
    """The readable crops in one tensor (one shared-memory file a batch); their sizes and indices in the batch."""
    readable = [i for i, crop in enumerate(crops) if crop is not None]
    found = [crop for crop in crops if crop is not None]
    pixels = torch.stack([crop for crop, _ in found]) if found else torch.empty(0)
    return pixels, torch.tensor([size for _, size in found], dtype=torch.int64).view(-1, 2), readable


def load_crops(
    parts: Sequence[ImageList], batches: Sequence[list[int]], *, image_size: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """What `collate` gives of each batch, decoded by `workers` processes; the indices count through `parts`."""
    dataset: ConcatDataset[Crop | None] = ConcatDataset([_Crops(images, image_size) for images in parts])
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=leave_signals,
    )


@torch.inference_mode()
def embed(
    encoder: Encoder,
    images: ImageList,
    *,
    device: torch.device,
    workers: int,
    console: Console,
    title: str,
    processes: Processes = ALONE,
) -> Embeddings:
    """Both embeddings and the attention of each image from one pass, the encoder in eval mode.

    Several processes share the batches, which are the same however many there are; the first one gets everything, the
    others their own share. `UsageError` if no image can be read.
    """
    numbers = range(processes.rank, -(-len(images) // BATCH_SIZE), processes.ranks)
    batches = [list(range(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(images)))) for number in numbers]
    loader = load_crops([images], batches, image_size=encoder.image_size, workers=workers, pin=device.type == "cuda")
    # filled in place: the embeddings of 100,000 images are too large to be held twice
    columns: list[Tensor] = []
    sizes, kept = [torch.empty(0, 2, dtype=torch.int64)], list[int]()
    with encoder.evaluating():
        shown = progress(loader, f"embedding, {title}", console=console)
        for indices, (pixels, sizes_here, readable) in zip(batches, shown, strict=True):
            sizes.append(sizes_here)
            kept += [indices[i] for i in readable]
            if readable:
                found = encoder.both(normalise(pixels.to(device), torch.float32))
                rows = [each.flatten(1) for each in found if each is not None]
                columns = columns or [torch.empty(sum(map(len, batches)), each.shape[1]) for each in rows]
                for column, part in zip(columns, rows, strict=True):
                    column[len(kept) - len(readable) : len(kept)] = part
    if not processes.most(len(kept))[0]:
        raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
    columns = columns or [torch.empty(0, 0)] * (3 if encoder.branch else 1)
    return _gathered([each[: len(kept)] for each in columns], torch.cat(sizes), kept, images, processes)


def _gathered(
    columns: list[Tensor], sizes: Tensor, kept: list[int], images: ImageList, processes: Processes
) -> Embeddings:
    """The rows of all processes in the order of the images, in the first process."""
    shares = processes.gather(kept) or [kept]
    # where the rows of each share go, once they are in the order of the images
    places = torch.tensor([i for share in shares for i in share]).argsort().argsort().split([*map(len, shares)])

    def together(rows: Tensor) -> Tensor:
        parts = processes.gather_rows(rows) or [rows]
        if len(parts) == 1:
            return rows
        whole = rows.new_empty(sum(map(len, parts)), max(part.shape[1] for part in parts))
        for part, where in zip(parts, places, strict=True):
            if len(part):
                whole[where] = part
        return whole

    mean, *others = map(together, columns)
    rationale, attention = others or (None, None)
    read = sorted(i for share in shares for i in share)
    unreadable = [images.path(i) for i in sorted(set(range(len(images))) - set(read))]
    return Embeddings(mean, rationale, attention, together(sizes), torch.tensor(read), unreadable)
