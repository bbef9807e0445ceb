"""Two views of 500x375 JPEGs through each loader, from the files and from the cache.

Images (pairs) and views a second of the second epoch are in the report's extra_info, with the seconds that filling the
cache and the whole first epoch took, filling included; `test_step.py` says what a training step asks for.
FASTCR_BENCH_PHOTOS sets the number of JPEGs (256).
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastcr.config import Config, DataConfig, OptimConfig
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views

BATCH = 64
DRAWN = 256  # different pictures; further files are links to these


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """JPEGs of the size and weight of photographs."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(max(int(os.environ.get("FASTCR_BENCH_PHOTOS", DRAWN)), DRAWN)):
        if i >= DRAWN:
            os.link(root / f"{i % DRAWN}.jpg", root / f"{i}.jpg")
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i}.jpg", quality=90)
    return read_splits(root).train


@pytest.mark.parametrize(
    ("loader", "cache"),
    [
        *(("torch", "off"), ("dali", "off"), ("torch", "host"), ("torch", "disk")),
        *(("fused", "device"), ("fused", "host"), ("fused", "disk")),
    ],
)
def test_loader(
    benchmark: Any, finished: Any, device: torch.device, photos: ImageList, tmp_path: Path, loader: str, cache: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    if loader == "fused" and device.type == "cpu":
        pytest.skip("the fused loader is made for a GPU")
    data = DataConfig(loader=loader, cache=cache, cache_dir=tmp_path)  # type: ignore[arg-type]
    config = Config(data=data, optim=OptimConfig(batch_size=BATCH))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.perf_counter()
    views, _ = make_views(config, photos, device, dtype, Console(file=io.StringIO()))
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
