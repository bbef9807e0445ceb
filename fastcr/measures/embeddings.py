"""The images of a list to their embeddings, both kinds and the attention, from one pass of the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.data.copies import thumbnails
from fastcr.data.crop_loader import in_batches, load_crops
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder
from fastcr.errors import UsageError
from fastcr.measures.poolings import Pooling
from fastcr.runs.context import Context
from fastcr.runs.distributed import Processes

NO_POOLINGS: Mapping[str, Pooling] = {}


class Embeddings(NamedTuple):
    """Unit embeddings of the images that could be read, on the CPU."""

    mean: Tensor  # [N,C] fp32
    rationale: Tensor | None  # [N,C] fp32; None without a branch
    attention: Tensor | None  # [N,S] fp32
    sizes: Tensor  # [N,2] height and width of the images, pixels
    kept: Tensor  # [N] indices into the image list
    looks: Tensor  # [N,192] mean colours of the crops, as of `fastcr.data.copies`
    unreadable: list[str]  # files left out
    others: dict[str, Tensor] = {}  # noqa: RUF012  # [N,C'] fp32: by the further poolings that were asked for
    seconds: float = 0.0  # that the encoder took for a thousand images, without reading them


@torch.inference_mode()
def embed(
    encoder: Encoder,
    images: ImageList,
    context: Context,
    *,
    title: str,
    poolings: Mapping[str, Pooling] = NO_POOLINGS,
    load: Callable[..., Iterator[Any]] = load_crops,
) -> Embeddings:
    """Both embeddings, the attention and `poolings` of each image from one pass, the encoder in eval mode.

    With `poolings` comes the class token too, as "cls", where the encoder has one.
    Several processes share the batches, which are the same however many there are; the first one gets everything, the
    others their own share. `UsageError` if no image can be read.
    """
    processes = context.processes
    batches = in_batches(range(len(images)))[processes.rank :: processes.ranks]
    loader = load([images], batches, encoder.image_size, context)
    # filled in place: the embeddings of 100,000 images are too large to be held twice
    columns: list[Tensor] = []
    names = [*poolings, *(["cls"] if poolings and encoder.has_class_token else [])]
    sizes, kept, seconds = [torch.empty(0, 2, dtype=torch.int64)], list[int](), 0.0
    with encoder.evaluating():
        shown = context.progress(loader, f"embedding, {title}", len(batches))
        for indices, (pixels, sizes_here, readable) in zip(batches, shown, strict=True):
            sizes.append(sizes_here)
            kept += [indices[i] for i in readable]
            if readable:
                began, paths = time.perf_counter(), [images.path(indices[i]) for i in readable]
                features, token = encoder.of_crops(pixels.to(context.device), context.dtype, paths)
                rows = [thumbnails(pixels)]
                rows += [each.flatten(1) for each in encoder.pooled(features) if each is not None]
                others = [*(pool(features) for pool in poolings.values()), token]
                rows += [F.normalize(each.float(), dim=1) for each in others[: len(names)] if each is not None]
                columns = columns or [torch.empty(sum(map(len, batches)), each.shape[1]) for each in rows]
                for column, part in zip(columns, rows, strict=True):
                    column[len(kept) - len(readable) : len(kept)] = part  # on the CPU: a GPU has done its work
                seconds += time.perf_counter() - began
    if not processes.most(len(kept))[0]:
        raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
    columns = columns or [torch.empty(0, 0)] * ((4 if encoder.branch else 2) + len(names))
    rows = [each[: len(kept)] for each in columns]
    found = _gathered(rows, names, torch.cat(sizes), kept, images, processes)
    return found._replace(seconds=1000 * seconds / max(len(kept), 1))


def _gathered(
    columns: list[Tensor], poolings: list[str], sizes: Tensor, kept: list[int], images: ImageList, processes: Processes
) -> Embeddings:
    """The rows of all processes in the order of the images, in the first process."""
    shares = processes.gather(kept) or [kept]
    read, order = torch.tensor([i for share in shares for i in share]).sort()

    def together(rows: Tensor) -> Tensor:
        parts = [part for part in processes.gather(rows) if len(part)] or [rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[order]

    own = len(columns) - len(poolings)
    looks, mean, *others = map(together, columns[:own])
    rationale, attention = others or (None, None)
    further = dict(zip(poolings, map(together, columns[own:]), strict=True))
    unreadable = [images.path(i) for i in sorted({*range(len(images))} - {*read.tolist()})]
    return Embeddings(mean, rationale, attention, together(sizes), read, looks, unreadable, further)
