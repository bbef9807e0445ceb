"""Two views of 500x375 JPEGs through each loader; images (pairs) a second are in the report's extra_info."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastcr.folders import ImageList, read_splits
from fastcr.machine import pick_workers
from fastcr.torch_views import TorchViews
from fastcr.views import BadFiles

BATCH = 64


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """A few hundred JPEGs of the size and weight of photographs."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(256):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i}.jpg", quality=90)
    return read_splits(root).train


@pytest.mark.parametrize("loader", ["torch", "dali-cpu", "dali-gpu"])
def test_loader(benchmark: Any, finished: Any, photos: ImageList, tmp_path: Path, loader: str) -> None:
    device = torch.device("cpu")
    views: Any = TorchViews
    if loader != "torch":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
        from fastcr.dali_views import DaliViews

        views = DaliViews
    if loader == "dali-gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        device = torch.device("cuda")
    batches = views(
        photos,
        image_size=224,
        batch_size=BATCH,
        seed=0,
        device=device,
        dtype=torch.float32,
        workers=pick_workers(None),
        bad=BadFiles(photos, "fail"),
    ).batches(0)
    for _ in range(4):  # past what is prefetched
        next(batches)
    benchmark.pedantic(finished(lambda: next(batches)), rounds=16)
    if benchmark.stats:
        benchmark.extra_info["images_per_second"] = BATCH / benchmark.stats.stats.median
