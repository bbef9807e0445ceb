"""The decoded data set: the same pixels wherever they lie, whatever is broken, and every loader's views of them."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastcr.config import Config
from fastcr.data import loaders
from fastcr.data.crop_loader import load_crops
from fastcr.data.cutting import cached_views, torch_views
from fastcr.data.images import BadFiles, ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import choose_place, loader_of, make_views, prefetched
from fastcr.data.pixel_cache import CachedImages, bounded_size, fill, measure
from fastcr.data.views import STD, Loading
from fastcr.errors import UsageError
from fastcr.runs.command_line import parse
from fastcr.runs.context import CPU, Context
from fastcr.runs.distributed import Processes

CONTEXT = Context(workers=2, console=Console(quiet=True))
ALONE = replace(CONTEXT, workers=0)
LOADING = Loading(sizes=(32, 32), batch_size=4, seed=3, context=CONTEXT, impl="torch")


@pytest.fixture
def photos(tmp_path: Path) -> ImageList:
    """Twelve pictures of different sizes; one is broken."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((40 + 9 * i, 120 - 7 * i), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i:02d}.png")
    (tmp_path / "photos" / "05.png").write_bytes((tmp_path / "photos" / "05.png").read_bytes()[:400])
    return read_splits(tmp_path / "photos").train


def cached(images: ImageList, side: int = 500) -> CachedImages:
    return fill(images, measure(images, side, CONTEXT), "host", CONTEXT, side)


def picture(cache: CachedImages, index: int) -> np.ndarray:
    return np.asarray(cache.rgb(index))


def settings_of(*flags: str) -> Config:
    flags = ("--optim.batch_size", "4", "--data.image_size", "32", *flags)
    return parse(Config, flags, prog="test", description=None)


def take(images: ImageList, *flags: str) -> list[Tensor]:
    views, _ = make_views(settings_of(*flags), images, ALONE)
    return [torch.stack(batch[:2]) for batch in islice(views.batches(0), 4)]


def test_the_cache_holds_what_the_files_hold(photos: ImageList) -> None:
    cache = cached(photos)
    for index in range(12):
        np.testing.assert_array_equal(picture(cache, index), np.array(photos.rgb(6 if index == 5 else index)))
    assert cache.broken.tolist() == [5]
    views, _ = make_views(settings_of("--data.cache", "host"), photos, ALONE)
    assert views.bad.files == [photos.path(5)]


def test_large_images_are_reduced_and_no_others(photos: ImageList) -> None:
    assert bounded_size(375, 500, 448) == (375, 500)
    assert bounded_size(600, 900, 448) == (448, 672)
    cache = cached(photos, side=64)
    for index in (0, 11):
        expected = photos.rgb(index)
        height, width = bounded_size(expected.height, expected.width, 64)
        assert cache.sizes[index].tolist() == [height, width]
        reduced = np.array(expected.resize((width, height), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(picture(cache, index).astype(int), reduced.astype(int), rtol=0, atol=1)
    assert cache.sizes.min(1).max() == 64


def test_crops_of_decoded_images_need_neither_files_nor_processes(photos: ImageList) -> None:
    (batch,) = load_crops([photos], [[0, 4, 6, 11]], 32, ALONE)
    cache = cached(photos)
    for index in range(12):
        (photos.root / f"{index:02d}.png").unlink()
    (again,) = load_crops([cache], [[0, 4, 6, 11]], 32, replace(CONTEXT, workers=-1))  # an error if it were used
    assert torch.equal(batch[0], again[0])
    assert torch.equal(batch[1], again[1])
    assert batch[2] == again[2] == [0, 1, 2, 3]


def test_views_of_cached_pixels_are_those_of_the_files_but_for_rounding(photos: ImageList) -> None:
    flags = ("--data.image_size", "64")  # so that none of them is reduced
    host = take(photos, *flags, "--data.cache", "host")
    assert host[0][0].is_contiguous(memory_format=torch.channels_last)
    for ours, plain in zip(host, take(photos, *flags, "--data.loader", "torch"), strict=True):
        assert (ours - plain).abs().mean() < 0.6 / 255 / min(STD)


def test_rows_are_brought_to_a_device_that_lacks_them(photos: ImageList) -> None:
    cache = cached(photos)
    elsewhere = replace(cache, pixels=_Elsewhere(cache.pixels))
    whole, parts = (cached_views(images, LOADING, BadFiles(photos, "skip"), 0) for images in (cache, elsewhere))
    for a, b in zip(islice(whole, 4), islice(parts, 4), strict=True):
        assert torch.equal(torch.stack(a[:2]), torch.stack(b[:2]))


class _Elsewhere:
    """Pixels that say they are not on the CPU and hand out slices only."""

    device = "another"

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __getitem__(self, part: slice) -> Tensor:
        return self.pixels[part]


@pytest.mark.parametrize("loader", ["torch", "dali", "cache"])
def test_each_loader_resumes_anywhere_and_two_processes_share_the_batches_of_one(
    photos: ImageList, loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    alone = sharded(photos, loader, 1, 0, 8, batch_size=4)[0]  # 3 steps an epoch
    for start in (0, 5):  # 5: in the middle of the second epoch
        for one, *parts in zip(alone[start:], *sharded(photos, loader, 2, start, 8 - start), strict=True):
            assert torch.equal(torch.cat(parts, dim=1), one)


def sharded(
    images: ImageList, loader: str, ranks: int, start: int, count: int, batch_size: int = 2
) -> list[list[Tensor]]:
    """Batches of each rank."""
    found = []
    for rank in range(ranks):
        context = replace(CONTEXT, processes=Processes(rank, ranks), workers=2 * (loader != "torch"))
        loading = replace(LOADING, batch_size=batch_size, context=context)
        source = cached(images) if loader == "cache" else images
        batches = loader_of(loader)(source, loading, BadFiles(images, "skip"), start)
        taken = [*islice(batches, count)]
        steps = islice(loading.steps(len(images), start), count)
        assert [batch.images.tolist() for batch in taken] == [indices.tolist() for _, indices in steps]
        found.append([torch.stack(batch[:2]) for batch in taken])
    return found


def test_prefetched_batches_are_the_same_and_errors_come_through(photos: ImageList) -> None:
    plain = partial(cached_views, cached(photos), LOADING, BadFiles(photos, "skip"))
    for ours, theirs in zip(islice(prefetched(plain, CPU, 1), 4), islice(plain(1), 4), strict=True):
        assert torch.equal(ours.first, theirs.first)
    failing = partial(torch_views, photos, replace(LOADING, context=ALONE), BadFiles(photos, "fail"))
    with pytest.raises(UsageError, match=r"unreadable image .*05\.png"):
        list(islice(prefetched(failing, CPU, 0), 4))


def test_a_thread_that_prefetches_takes_one_core_from_the_step_and_no_more() -> None:
    def watched(start: int) -> Any:
        while True:
            yield threading.current_thread().name, torch.get_num_threads()

    cores = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        seen: list[Any] = list(islice(prefetched(watched, CPU, 0), 2))
        assert {threads for _, threads in seen} == {1}
        assert threading.current_thread().name not in {name for name, _ in seen}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(cores)


def test_auto_is_settled_and_said(photos: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    context = replace(ALONE, console=Console(file=io.StringIO(), width=200))
    _, config = make_views(settings_of(), photos, context)
    assert (config.data.loader, config.data.cache) == ("auto", "host")
    monkeypatch.setattr(loaders, "free_memory", lambda: 1000)
    _, config = make_views(settings_of(), photos, context)
    assert (config.data.loader, config.data.cache) == ("torch", "off")
    said = context.console.file.getvalue()  # type: ignore[attr-defined]
    assert "cache: host; device: cpu, fp32; 12 training images" in said
    assert "too much to keep: they are decoded anew in each epoch" in said


CUDA = replace(CONTEXT, device=torch.device("cuda", 0))


def test_where_the_pixels_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    monkeypatch.setattr(loaders, "free_memory", lambda: 10_000)

    found = [choose_place("auto", size, CUDA) for size in (200, 201, 5000, 5001)]
    assert found == ["device", "host", "host", "off"]
    assert choose_place("auto", 200, CONTEXT) == "host"
    assert choose_place("device", 800, CUDA) == "device"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.loader", "dali", "--data.cache", "host"), "--data.loader dali .* goes with --data.cache off"),
        (("--data.cache", "device"), r"--data\.cache device: .* and there is no CUDA device: try --data.cache off"),
        (
            ("--data.cache", "host"),
            r"--data\.cache host: the decoded images take .* GiB, and 0\.0 are free there: try --data.cache off",
        ),
    ],
)
def test_what_cannot_be_had_is_one_line(
    photos: ImageList, flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "free_memory", lambda: 1000)
    with pytest.raises(UsageError, match=message):
        take(photos, *flags)
