"""Which loader feeds a run, and where the decoded pixels lie."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fastcr.config import Config
from fastcr.data.cached_views import CachedViews
from fastcr.data.images import BadFiles, ImageList
from fastcr.data.pixel_cache import Place, fill, measure
from fastcr.data.torch_views import TorchViews
from fastcr.data.views import Batch, Loading, Views
from fastcr.errors import UsageError
from fastcr.runs.context import Context
from fastcr.runs.machine import cache_folder, free_memory

GIB = 2**30
Loader = Literal["dali", "torch", "fused"]
# the loaders that can read each cache
READERS = {"device": ("fused",), "host": ("fused", "torch"), "disk": ("fused", "torch"), "off": ("dali", "torch")}


def make_views(config: Config, images: ImageList, context: Context) -> tuple[Views, Config]:
    """The loader the settings ask for, its cache filled; and the settings with every `auto` of it settled.

    Each of several processes loads its share of a batch. A resumed run keeps the loader it began with. Raises
    `UsageError` for what is not installed or has no room.
    """
    data, bad, processes = config.data, BadFiles(images, config.data.on_corrupt), context.processes
    loading = Loading(
        image_size=data.image_size,
        batch_size=config.optim.batch_size // processes.ranks,
        seed=config.run.seed,
        context=context,
        impl=config.run.kernels,
        views=config.views,
    )
    if not config.optim.epochs:  # no view will be asked for: nothing is decoded, and nothing settled
        return TorchViews(images, loading, bad), config
    place: Place | Literal["off"] = "off"
    if data.loader != "dali" and data.cache != "off":
        side = data.cache_side or 2 * data.image_size
        sizes = measure(images, side, context)
        place = choose_place(config, 3 * int(sizes.prod(1).sum()), context)
    cache = place if data.cache == "auto" else data.cache
    if data.loader not in ("auto", *READERS[cache]):
        able = " or ".join(READERS[cache])
        raise UsageError(f"--data.loader {data.loader} does not go with --data.cache {cache}: take {able}")
    loader = choose_loader(config, place, context)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[context.dtype]
    where = f"loader: {loader}; cache: {place}; device: {context.device}, {precision}"
    context.say(f"{where}; {len(images)} training images")
    if place != "off":
        start, folder = time.perf_counter(), data.cache_dir or cache_folder()
        with processes.local_first() if place == "disk" else nullcontext():  # the others find what one has written
            images = fill(images, sizes, place, context, side=side, folder=folder)
            for index in images.broken.tolist():
                bad.note(index)
        seconds = time.perf_counter() - start
        context.say(f"decoded once: {images.pixels.numel() / GIB:.2f} GiB in {seconds:.1f} s")
    views = Prefetched(images, loading, bad, loader_class(loader)(images, loading, bad))
    return views, replace(config, data=replace(data, loader=loader, cache=place))


def loader_class(loader: Loader) -> Any:
    """The class of a loader; DALI is imported only where it is asked for."""
    if loader == "dali":
        from fastcr.data.dali_views import DaliViews

        return DaliViews
    return {"torch": TorchViews, "fused": CachedViews}[loader]


def choose_place(config: Config, size: int, context: Context) -> Place | Literal["off"]:
    """Where `size` bytes of decoded images go, as `--data.cache` asks; auto leaves ample room for everything else.

    Each of the processes of a machine keeps its own.
    """
    device, processes = context.device, context.processes
    cuda = device.type == "cuda"
    room = {"device": torch.cuda.mem_get_info(device)[0] if cuda else 0, "host": free_memory() // processes.local_ranks}
    room = {where: -processes.most(-size)[0] for where, size in room.items()}  # all choose alike, before any fills
    asked = config.data.cache
    if asked == "auto":
        if cuda and config.data.loader != "torch" and size <= room["device"] / 4:
            return "device"
        if size <= room["host"] / 2:
            return "host"
        needs = f"the decoded images take {size / GIB:.1f} GiB, too much to keep in memory"
        context.say(f"{needs} (--data.cache disk keeps them in a file)")
        return "off"
    if asked == "device" and not cuda:
        raise UsageError("--data.cache device needs CUDA: take host or disk")
    if asked in room and size > room[asked]:
        raise UsageError(
            f"--data.cache {asked}: the decoded images take {size / GIB:.1f} GiB and {room[asked] / GIB:.1f} are free: "
            "take disk, or a smaller --data.cache_side"
        )
    return asked


def choose_loader(config: Config, place: str, context: Context) -> Loader:
    """The loader `--data.loader` asks for; auto takes the fastest that can serve."""
    asked, cuda = config.data.loader, context.device.type == "cuda"
    if asked in ("fused", "torch"):
        return asked
    if asked == "auto" and (place != "off" or not cuda):
        return "torch" if place == "off" else "fused"
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return "dali"
    if asked == "dali":
        raise UsageError('--data.loader dali needs NVIDIA DALI: pip install "fastcr[dali]"')
    context.say('DALI is not installed (pip install "fastcr[dali]"): loading with torchvision')
    return "torch"


@dataclass
class Prefetched(Views):
    """Makes each batch of `source` while the one before is used: in a thread, and with CUDA on a stream of its own.

    On a CPU that thread computes on one core: its operations are small, and the step needs the others.
    """

    source: Views

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        batches, device = self.source.batches(start_step), self.loading.context.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None

        def make() -> tuple[Batch, torch.cuda.Event | None]:
            with torch.cuda.stream(stream):
                return next(batches), stream.record_event() if stream else None

        with closing(batches), ThreadPoolExecutor(1) as thread:
            if stream:
                thread.submit(torch.cuda.set_device, device).result()  # a thread begins on the first device
            else:
                cores = torch.get_num_threads()
                thread.submit(torch.get_num_threads).result()  # the first call would undo what was set before
                thread.submit(torch.set_num_threads, 1).result()
                torch.set_num_threads(cores)  # what threads to come begin with
            future = thread.submit(make)
            while True:
                batch, made = future.result()
                future = thread.submit(make)
                if made:
                    user = torch.cuda.current_stream(device)
                    user.wait_event(made)
                    for tensor in batch.tensors():  # their memory may be used again only after the step
                        tensor.record_stream(user)
                yield batch
