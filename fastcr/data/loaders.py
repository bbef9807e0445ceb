"""Which loader feeds a run, and where the decoded pixels lie."""

from __future__ import annotations

import importlib.util
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fastcr.config import Config
from fastcr.data.cached_views import CachedViews
from fastcr.data.images import ImageList
from fastcr.data.pixel_cache import CachedImages, Place, fill, measure
from fastcr.data.torch_views import TorchViews
from fastcr.data.views import BadFiles, Prefetched, Shard, Views
from fastcr.errors import UsageError
from fastcr.runs.distributed import ALONE, Processes
from fastcr.runs.machine import free_memory, pick_workers

GIB = 2**30


def make_views(
    config: Config,
    images: ImageList,
    device: torch.device,
    dtype: torch.dtype,
    console: Console,
    processes: Processes = ALONE,
) -> tuple[Views, Config]:
    """The loader the settings ask for, its cache filled; and the settings with every `auto` of it settled.

    Each of several processes loads its share of a batch. A run goes on with the loader it began with. Raises
    `UsageError` for what is not installed or has no room.
    """
    data, workers = config.data, pick_workers(config.data.workers, processes.local_ranks)
    bad = BadFiles(images, data.on_corrupt)
    place: Place | Literal["off"] = "off"
    if data.loader == "dali" and data.cache not in ("auto", "off"):
        raise UsageError(
            f"--data.loader dali decodes files, it does not read --data.cache {data.cache}: take fused or torch"
        )
    if data.loader != "dali" and data.cache != "off":
        side = data.cache_side or 2 * data.image_size
        sizes = measure(images, side, workers, console)
        place = choose_place(config, int(sizes.prod(1).sum()) * 3, device, console, processes)
    loader = choose_loader(config, place, device, console)
    console.print(
        f"loader: {loader}; cache: {place}; device: {device}; {len(images)} training images",
        highlight=False,
        soft_wrap=True,
    )
    settings: dict[str, Any] = {
        "image_size": data.image_size,
        "batch_size": config.optim.batch_size // processes.ranks,
        "seed": config.run.seed,
        "device": device,
        "dtype": dtype,
        "shard": Shard(processes.rank, processes.ranks),
    }
    if place != "off":
        folder = data.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastcr"
        start = time.perf_counter()
        with processes.local_first() if place == "disk" else nullcontext():  # the others find what one has written
            cache = fill(
                images, sizes, place, side=side, device=device, workers=workers, folder=folder, bad=bad, console=console
            )
        size, seconds = cache.pixels.numel() / GIB, time.perf_counter() - start
        console.print(f"decoded once: {size:.2f} GiB in {seconds:.1f} s", highlight=False)
        images = CachedImages(images.root, images.files, images.labels, images.classes, cache)
    views: Any
    if loader == "fused":
        views = CachedViews(cache, impl=config.run.kernels, bad=bad, **settings)
    elif loader == "dali":
        from fastcr.data.dali_views import DaliViews

        views = DaliViews(
            images,
            workers=workers,
            bad=bad,
            roi_decode=data.roi_decode,
            hw_decoder_load=data.hw_decoder_load,
            **settings,
        )
    else:
        views = TorchViews(images, workers=workers, bad=bad, **settings)
    if device.type == "cuda":
        views = Prefetched(views, device)
    return views, replace(config, data=replace(data, loader=loader, cache=place))


def choose_place(
    config: Config, size: int, device: torch.device, console: Console, processes: Processes = ALONE
) -> Place | Literal["off"]:
    """Where `size` bytes of decoded images go, as `--data.cache` asks; auto leaves ample room for everything else.

    Each of the processes of a machine keeps its own.
    """
    cuda = device.type == "cuda"
    room = {"device": torch.cuda.mem_get_info(device)[0] if cuda else 0, "host": free_memory() // processes.local_ranks}
    room = {where: -processes.most(-size)[0] for where, size in room.items()}  # all choose alike, before any fills
    asked, loader = config.data.cache, config.data.loader
    if asked == "auto":
        if cuda and loader != "torch" and size <= room["device"] / 4:
            return "device"
        if size <= room["host"] / 2:
            return "host"
        needs = f"the decoded images take {size / GIB:.1f} GiB, too much to keep in memory"
        console.print(f"{needs} (--data.cache disk keeps them in a file)", highlight=False, soft_wrap=True)
        return "off"
    if asked == "device" and not cuda:
        raise UsageError("--data.cache device needs CUDA: take host or disk")
    if asked == "device" and loader == "torch":
        raise UsageError("--data.cache device is read by --data.loader fused, not by torch")
    if asked in room and size > room[asked]:
        raise UsageError(
            f"--data.cache {asked}: the decoded images take {size / GIB:.1f} GiB and {room[asked] / GIB:.1f} are free: "
            "take disk, or a smaller --data.cache_side"
        )
    return asked


def choose_loader(
    config: Config, place: str, device: torch.device, console: Console
) -> Literal["dali", "torch", "fused"]:
    """The loader `--data.loader` asks for; auto takes the fastest that can serve."""
    asked, cuda = config.data.loader, device.type == "cuda"
    if asked == "fused" and place == "off":
        raise UsageError("--data.loader fused needs the decoded images: take --data.cache device, host or disk")
    if asked == "fused" or (asked == "auto" and cuda and place != "off"):
        return "fused"
    if asked == "torch" or (asked == "auto" and not cuda):  # on the CPU DALI is the slower one (bench/test_loader.py)
        return "torch"
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return "dali"
    if asked == "dali":
        raise UsageError('--data.loader dali needs NVIDIA DALI: pip install "fastcr[dali]"')
    console.print('DALI is not installed (pip install "fastcr[dali]"): loading with torchvision', soft_wrap=True)
    return "torch"
