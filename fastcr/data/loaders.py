"""Which loader feeds a run, and where the decoded pixels lie."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from fastcr.config import Config
from fastcr.data.cutting import cached_views, torch_views
from fastcr.data.images import BadFiles, ImageList
from fastcr.data.pixel_cache import Place, fill, measure
from fastcr.data.views import Batch, Batches, Loading, Views
from fastcr.errors import UsageError
from fastcr.runs.context import Context
from fastcr.runs.machine import free_memory

GIB = 2**30


def make_views(config: Config, images: ImageList, context: Context) -> tuple[Views, Config]:
    """The loader the settings ask for, its cache filled; and the settings with every `auto` of it settled.

    Each of several processes loads its share of a batch. A resumed run keeps the loader it began with. Raises
    `UsageError` for what is not installed or has no room.
    """
    data, bad = config.data, BadFiles(images, config.data.on_corrupt)
    batch_size = config.optim.batch_size // context.processes.ranks
    sides = data.image_size, config.key_size
    loading = Loading(sides, batch_size, config.run.seed, context, config.run.kernels, config.views)
    if not config.optim.epochs:  # no view will be asked for: nothing is decoded, and nothing settled
        return Views(images, bad, partial(torch_views, images, loading, bad)), config
    place: Place | Literal["off"] = "off"
    if data.loader == "auto" and data.cache != "off":
        side = max(2 * data.image_size, round(config.key_size * 8 / 7))  # of the latter the key's view is the centre
        sizes = measure(images, side, context)
        place = choose_place(data.cache, 3 * int(sizes.prod(1).sum()), context)
    loader: Any = choose_loader(data.loader, context) if place == "off" else "cache"
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[context.dtype]
    pixels = f"loader: {loader}" if place == "off" else f"cache: {place}"
    keys = f"; keys of {config.key_size} px" * (config.key_size > data.image_size)
    context.say(f"{pixels}; device: {context.device}, {precision}; {len(images)} training images{keys}")
    if place == "off":
        config = replace(config, data=replace(data, loader=loader, cache=place))
    else:
        config, start = replace(config, data=replace(data, cache=place)), time.perf_counter()
        images = fill(images, sizes, place, context, side)
        for index in images.broken.tolist():
            bad.note(index)
        seconds = time.perf_counter() - start
        context.say(f"decoded once: {images.pixels.numel() / GIB:.2f} GiB in {seconds:.1f} s")
    source = partial(loader_of(loader), images, loading, bad)
    return Views(images, bad, partial(prefetched, source, context.device)), config


def loader_of(name: str) -> Callable[..., Generator[Batch, None, None]]:
    """The function that makes the batches; DALI is imported only where it is asked for."""
    if name == "dali":
        from fastcr.data.dali_views import dali_views

        return dali_views
    return torch_views if name == "torch" else cached_views


def choose_place(asked: Any, size: int, context: Context) -> Place | Literal["off"]:
    """Where `size` bytes of decoded images go, as `--data.cache` asks; auto leaves ample room for everything else.

    Each of the processes of a machine keeps its own.
    """
    cuda, processes = context.device.type == "cuda", context.processes
    mine = torch.cuda.mem_get_info(context.device)[0] if cuda else 0, free_memory() // processes.local_ranks
    device, host = (-most for most in processes.most(*(-each for each in mine)))  # all choose alike, before any fills
    needs, room = f"the decoded images take {size / GIB:.1f} GiB", {"device": device, "host": host}
    if asked != "auto":
        if size > room[asked]:
            free = f"{room[asked] / GIB:.1f} are free there" if cuda or asked == "host" else "there is no CUDA device"
            raise UsageError(f"--data.cache {asked}: {needs}, and {free}: try --data.cache off")
        return asked
    if cuda and size <= device / 4:
        return "device"
    if size <= host / 2:
        return "host"
    context.say(f"{needs}, too much to keep: they are decoded anew in each epoch")
    return "off"


def choose_loader(asked: str, context: Context) -> Literal["dali", "torch"]:
    """What decodes images anew in each epoch, as `--data.loader` asks; auto: DALI on CUDA, where it is installed."""
    if asked == "torch" or (asked == "auto" and context.device.type != "cuda"):
        return "torch"
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return "dali"
    if asked == "dali":
        raise UsageError('--data.loader dali needs NVIDIA DALI: pip install "fastcr[dali]"')
    context.say('DALI is not installed (pip install "fastcr[dali]"): loading with torchvision')
    return "torch"


def prefetched(source: Batches, device: torch.device, start: int) -> Generator[Batch, None, None]:
    """Batches of `source`, each made while the one before is used: in a thread, and on CUDA on a stream of its own.

    On a CPU that thread computes on one core: its operations are small, and the step needs the others.
    """
    batches = source(start)
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
