"""The images of a list to their embeddings, both kinds and the attention, from one pass of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from fastcr.data.crops import centre_crop, enough
from fastcr.data.images import ImageList, full_size
from fastcr.data.pixel_cache import CachedImages
from fastcr.errors import UsageError
from fastcr.measures.poolings import Pooling
from fastcr.method.ddt import Axis, Moments, detectors_like
from fastcr.method.encoder import Encoder
from fastcr.method.rationale import RationaleHead
from fastcr.runs.distributed import ALONE, Processes
from fastcr.runs.log import progress
from fastcr.runs.machine import batches_of, free_memory, leave_signals, workers_that_fit

BATCH_SIZE = 128
AXIS_IMAGES = 2048  # whose positions DDT's axis is of: far more than it takes
START_IMAGES = 512  # to whose DDT the branch's detectors are fitted
NO_POOLINGS: Mapping[str, Pooling] = {}
Crop = tuple[Tensor, tuple[int, int]]


class Embeddings(NamedTuple):
    """Unit embeddings of the images that could be read, on the CPU."""

    mean: Tensor  # [N,C] fp32
    rationale: Tensor | None  # [N,C] fp32; None without a branch
    attention: Tensor | None  # [N,S] fp32
    sizes: Tensor  # [N,2] height and width of the images, pixels
    kept: Tensor  # [N] indices into the image list
    unreadable: list[str]  # files left out
    others: dict[str, Tensor] = {}  # noqa: RUF012  # [N,C'] fp32: by the further poolings that were asked for


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
    parts: Sequence[ImageList], batches: Sequence[list[int]], *, image_size: int, workers: int, pin: bool
) -> Iterator[Any]:
    """What `collate` gives of each batch, decoded by `workers` processes; the indices count through `parts`.

    Images that are decoded already need no processes.
    """
    most = max(map(len, batches), default=1)
    workers = 0 if all(isinstance(images, CachedImages) for images in parts) else workers
    dataset: ConcatDataset[Crop | None] = ConcatDataset([_Crops(images, image_size) for images in parts])
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers_that_fit(workers, 3 * most * image_size**2),
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=leave_signals,
    )
    return batches_of(loader)


class KeptCrops:
    """`load_crops` for several encoders: what it gave once is kept, where memory has ample room for it."""

    def __init__(self) -> None:
        self.kept = dict[Any, list[Any]]()

    def __call__(self, parts: Sequence[ImageList], batches: Sequence[list[int]], **how: Any) -> Iterator[Any]:
        """As `load_crops`."""
        key = *map(id, parts), how["image_size"], tuple(map(tuple, batches))
        if key in self.kept:
            return iter(self.kept[key])
        crops, size = load_crops(parts, batches, **how), 3 * how["image_size"] ** 2 * sum(map(len, batches))
        return self._keep(key, crops) if size <= free_memory() // 8 else crops

    def _keep(self, key: Any, crops: Iterator[Any]) -> Iterator[Any]:
        found = []
        for pixels, sizes, readable in crops:
            found.append((pixels.clone(), sizes.clone(), readable))  # out of the memory shared with loader processes
            yield found[-1]
        self.kept[key] = found


@torch.inference_mode()
def embed(
    encoder: Encoder,
    images: ImageList,
    *,
    device: torch.device,
    workers: int,
    console: Console,
    title: str,
    dtype: torch.dtype = torch.float32,
    processes: Processes = ALONE,
    poolings: Mapping[str, Pooling] = NO_POOLINGS,
    load: Callable[..., Iterator[Any]] = load_crops,
) -> Embeddings:
    """Both embeddings, the attention and `poolings` of each image from one pass, the encoder in eval mode and `dtype`.

    With `poolings` comes the class token too, as "cls", where the encoder has one.
    Several processes share the batches, which are the same however many there are; the first one gets everything, the
    others their own share. `UsageError` if no image can be read.
    """
    numbers = range(processes.rank, -(-len(images) // BATCH_SIZE), processes.ranks)
    batches = [list(range(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(images)))) for number in numbers]
    loader = load([images], batches, image_size=encoder.image_size, workers=workers, pin=device.type == "cuda")
    # filled in place: the embeddings of 100,000 images are too large to be held twice
    columns: list[Tensor] = []
    names = [*poolings, *(["cls"] if poolings and encoder.has_class_token else [])]
    sizes, kept = [torch.empty(0, 2, dtype=torch.int64)], list[int]()
    with encoder.evaluating():
        shown = progress(loader, f"embedding, {title}", len(batches), console=console)
        for indices, (pixels, sizes_here, readable) in zip(batches, shown, strict=True):
            sizes.append(sizes_here)
            kept += [indices[i] for i in readable]
            if readable:
                features, token = encoder.of_crops(pixels.to(device), dtype)
                rows = [each.flatten(1) for each in encoder.pooled(features) if each is not None]
                others = [*(pool(features) for pool in poolings.values()), token]
                rows += [F.normalize(each.float(), dim=1) for each in others[: len(names)] if each is not None]
                columns = columns or [torch.empty(sum(map(len, batches)), each.shape[1]) for each in rows]
                for column, part in zip(columns, rows, strict=True):
                    column[len(kept) - len(readable) : len(kept)] = part
    if not processes.most(len(kept))[0]:
        raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
    columns = columns or [torch.empty(0, 0)] * ((3 if encoder.branch else 1) + len(names))
    rows = [each[: len(kept)] for each in columns]
    return _gathered(rows, names, torch.cat(sizes), kept, images, processes)


@torch.inference_mode()
def ddt_axis(
    encoder: Encoder,
    images: ImageList,
    *,
    device: torch.device,
    workers: int,
    console: Console,
    dtype: torch.dtype = torch.float32,
    processes: Processes = ALONE,
    load: Callable[..., Iterator[Any]] = load_crops,
) -> Axis:
    """DDT's axis of an encoder's features of `images`, or of `AXIS_IMAGES` of them taken evenly."""
    moments: Moments | None = None
    for _, features in _axis_features(encoder, images, device, workers, console, dtype, processes, load):
        moments = moments or Moments(features.shape[1], device)
        moments.add(features)
    if not (channels := processes.most(len(moments.products) if moments else 0)[0]):
        raise images.none_readable()
    moments = moments or Moments(channels, device)
    for name in ("inside", "border", "products"):
        setattr(moments, name, processes.total(getattr(moments, name)))
    return moments.axis()


def ddt_detectors(
    encoder: Encoder,
    images: ImageList,
    seed: int,
    *,
    device: torch.device,
    workers: int,
    console: Console,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The branch's `weight [K,C]` and `bias [K]` with which it pools these images nearly as DDT does, on the CPU.

    `ValueError` for another branch than the rationale branch, `UsageError` if no image can be read.
    """
    if not isinstance(encoder.branch, RationaleHead):
        raise ValueError("only the rationale branch has such detectors")
    moments: Moments | None = None
    wanted, found = set(_evenly(images, START_IMAGES)), list[Tensor]()  # some of those whose axis it is
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for indices, features in _axis_features(encoder, images, device, workers, console, dtype):
            moments = moments or Moments(features.shape[1], device)
            moments.add(features)
            found.append(features[[i for i, index in enumerate(indices) if index in wanted]].cpu())
        if not moments:
            raise images.none_readable()
        axis = moments.axis()
    on_cpu = Axis(axis.direction.cpu(), axis.centre.cpu())
    weight, bias = detectors_like(on_cpu, torch.cat(found), len(encoder.branch.bias), seed)
    temperature = encoder.branch.config.temperature
    return {"weight": temperature * weight, "bias": temperature * bias}


def _evenly(images: ImageList, most: int) -> list[int]:
    """The indices of all images, or of `most` taken evenly."""
    count = min(len(images), most)
    return (torch.arange(count) * len(images) // count).tolist()


def _axis_features(
    encoder: Encoder,
    images: ImageList,
    device: torch.device,
    workers: int,
    console: Console,
    dtype: torch.dtype,
    processes: Processes = ALONE,
    load: Callable[..., Iterator[Any]] = load_crops,
) -> Iterator[tuple[list[int], Tensor]]:
    """Readable images of those DDT's axis is of, this process's share in batches: indices and features fp32."""
    batches = [part.tolist() for part in torch.tensor(_evenly(images, AXIS_IMAGES)).split(BATCH_SIZE)]
    own = batches[processes.rank :: processes.ranks]
    loader = load([images], own, image_size=encoder.image_size, workers=workers, pin=device.type == "cuda")
    with encoder.evaluating():
        shown = progress(loader, "axis of DDT", len(own), console=console)
        for indices, (pixels, _, readable) in zip(own, shown, strict=True):
            if readable:
                features = encoder.of_crops(pixels.to(device), dtype)[0].float()
                yield [indices[i] for i in readable], features


def _gathered(
    columns: list[Tensor], poolings: list[str], sizes: Tensor, kept: list[int], images: ImageList, processes: Processes
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

    own = len(columns) - len(poolings)
    mean, *others = map(together, columns[:own])
    rationale, attention = others or (None, None)
    further = dict(zip(poolings, map(together, columns[own:]), strict=True))
    read = sorted(i for share in shares for i in share)
    unreadable = [images.path(i) for i in sorted(set(range(len(images))) - set(read))]
    return Embeddings(mean, rationale, attention, together(sizes), torch.tensor(read), unreadable, further)
