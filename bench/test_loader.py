"""Two views of 500x375 JPEGs through each loader, from the files and from the cache.

Images (pairs) and views a second of the second epoch are in the report's extra_info, with the seconds that filling the
cache and the whole first epoch took, filling included; `test_step.py` says what a training step asks for.
FASTCR_BENCH_PHOTOS sets the number of JPEGs (256). `test_views` is of one CPU core: views of decoded pixels beside
torchvision's of the same, by processor time, so that other processes count little.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.end_to_end import draw_photos
from bench.torchvision_views import torchvision_view
from fastcr.config import Config, DataConfig, OptimConfig
from fastcr.data.cutting import cut_views, view_table
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.data.views import DEFAULT, STD, Loading, ViewParameters, draw_parameters, normalise
from fastcr.presets import tuned
from fastcr.runs.context import Context
from fastcr.runs.machine import pick_workers

BATCH = 64
FEW = 16  # images whose views are timed on one core
KINDS = {"MoCo v2": DEFAULT, "tuned": tuned("folder").views}
DRAWN = 256  # different pictures; further files are links to these


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """JPEGs of the size and weight of photographs."""
    root = tmp_path_factory.mktemp("photos") / "all"
    draw_photos(root, DRAWN)
    for i in range(DRAWN, int(os.environ.get("FASTCR_BENCH_PHOTOS", DRAWN))):
        os.link(root / f"{i % DRAWN:05d}.jpg", root / f"{i:05d}.jpg")
    return read_splits(root).train


@pytest.mark.parametrize(("loader", "cache"), [("torch", "off"), ("dali", "off"), ("auto", "device"), ("auto", "host")])
def test_loader(
    benchmark: Any,
    finished: Any,
    device: torch.device,
    photos: ImageList,
    loader: str,
    cache: str,
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    if cache == "device" and device.type == "cpu":
        pytest.skip("needs a GPU")
    data = DataConfig(loader=loader, cache=cache)  # type: ignore[arg-type]
    config = Config(data=data, optim=OptimConfig(batch_size=BATCH))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.perf_counter()
    views, _ = make_views(config, photos, Context(device, dtype, pick_workers(None), Console(quiet=True)))
    benchmark.extra_info["fill_seconds"] = time.perf_counter() - start
    batches, epoch = views.batches(0), len(photos) // BATCH
    for _ in range(epoch):
        next(batches)
    benchmark.extra_info["first_epoch_seconds"] = time.perf_counter() - start
    benchmark.pedantic(finished(lambda: next(batches)), rounds=max(epoch, 16))
    if benchmark.stats:
        seconds = benchmark.stats.stats.mean  # of loaders that work ahead in bursts the median says little
        rates = {"images_per_second": BATCH / seconds, "views_per_second": 2 * BATCH / seconds}
        benchmark.extra_info |= rates | {"second_epoch_seconds": epoch * seconds}


@pytest.mark.parametrize(("height", "width", "size"), [(128, 170, 112), (375, 500, 224)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(timer=time.process_time)
def test_views(benchmark: Any, kind: str, height: int, width: int, size: int) -> None:
    loading = Loading((size, size), FEW, seed=0, context=Context(), views=KINDS[kind])
    coarse = torch.rand(FEW, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).mul(255).byte()
    pixels, indices = images.permute(0, 2, 3, 1).flatten(), np.arange(FEW)
    starts, sizes = indices * 3 * height * width, np.tile((height, width), (FEW, 1))

    def drawn() -> ViewParameters:
        return draw_parameters(loading.seed, 0, indices, sizes, loading.views)

    def ours() -> torch.Tensor:
        batch = cut_views(pixels, starts, sizes[:, 1], view_table(drawn()), indices, loading)
        return torch.stack([batch.first, batch.second])

    def theirs() -> torch.Tensor:
        alone = [ViewParameters(*(values[i : i + 1] for values in drawn())) for i in range(FEW)]
        whole = pixels.view(FEW, height, width, 3).permute(0, 3, 1, 2)
        views = [
            torch.stack([torchvision_view(image, p, view, size) for image, p in zip(whole, alone, strict=True)])
            for view in (0, 1)
        ]
        return torch.stack([normalise(each, torch.float32) for each in views])

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert ((ours() - theirs()) * torch.tensor(STD)[:, None, None] * 255).abs().max() < 0.502  # the last rounding
        seconds = [-time.process_time()]
        for _ in range(5):
            theirs()
        seconds.append(time.process_time())
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(cores)
    benchmark.extra_info["torchvision_views_per_second"] = 5 * 2 * FEW / sum(seconds)
    if benchmark.stats:
        benchmark.extra_info["views_per_second"] = 2 * FEW / benchmark.stats.stats.mean
