"""Two views of an image: their parameters against torchvision's, both loaders against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fastcr.config import ViewsConfig
from fastcr.data.crops import centre_crop
from fastcr.data.cutting import cut_image
from fastcr.data.images import BadFiles, ImageList
from fastcr.data.loaders import loader_of
from fastcr.data.views import (
    CROP_RATIO,
    DEFAULT,
    MEAN,
    STD,
    Loading,
    Views,
    draw_parameters,
    epoch_order,
    normalise,
)
from fastcr.errors import UsageError
from fastcr.runs.context import Context

DRAWS = 2000
Make = Callable[..., Any]


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours with an edge: something every augmentation changes visibly."""
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 :] //= 3
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    names = tuple(f"{i:02d}.jpg" for i in range(20))
    for i, name in enumerate(names):
        photo(rng, 90 + 7 * i, 120 - 2 * i).save(root / name, quality=92)
    return ImageList(root, names, None, ())


def make_dali(images: ImageList, on_corrupt: str = "skip", **settings: Any) -> Views:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return make("dali", images, on_corrupt, **settings)


def make(loader: str, images: ImageList, on_corrupt: str = "skip", **settings: Any) -> Views:
    bad = BadFiles(images, on_corrupt)
    return Views(images, bad, partial(loader_of(loader), images, replace(LOADING, **settings), bad))


make_torch = partial(make, "torch")
LOADING = Loading(sizes=(48, 48), batch_size=6, seed=3, context=Context())
BOTH = pytest.mark.parametrize("make", [make_torch, make_dali], ids=["torch", "dali"])


def take(views: Any, start: int, count: int) -> list[Tensor]:
    return [torch.stack(batch[:2]) for batch in islice(views.batches(start), count)]


def test_parameters_depend_on_image_epoch_and_seed_only() -> None:
    indices, sizes = np.arange(9), np.full((9, 2), 100)
    all_nine = draw_parameters(5, 1, indices, sizes)
    alone = draw_parameters(5, 1, indices[4:5], sizes[4:5])
    for whole, single in zip(all_nine, alone, strict=True):
        np.testing.assert_array_equal(whole[4:5], single)
    for other in (draw_parameters(6, 1, indices, sizes), draw_parameters(5, 2, indices, sizes)):
        assert not np.array_equal(other.factors, all_nine.factors)
    assert not np.array_equal(all_nine.factors[:, 0], all_nine.factors[:, 1])


@pytest.mark.parametrize("size", [(100, 100), (64, 400), (1, 1)])
def test_crop_boxes_have_torchvisions_distribution(size: tuple[int, int]) -> None:
    drawn = draw_parameters(0, 0, np.arange(DRAWS), np.tile(size, (DRAWS, 1))).crop[:, 0].astype(float)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=(DEFAULT.crop, 1.0), ratio=CROP_RATIO)
    image = torch.zeros(3, *size)
    oracle = [transform.make_params([image]) for _ in range(DRAWS)]
    theirs = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in oracle], dtype=float)
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] <= size).all()
    assert (drawn[:, 2:] >= 1).all()
    for column in range(4):
        for quantile in (0.1, 0.5, 0.9):
            ours, expected = (np.quantile(values[:, column], quantile) for values in (drawn, theirs))
            assert abs(ours - expected) <= 0.04 * max(size) + 1e-9


def test_jitter_and_flags_have_moco_v2s_distribution() -> None:
    p = draw_parameters(1, 0, np.arange(DRAWS), np.full((DRAWS, 2), 50))
    for flags, chance in ((p.jitter, 0.8), (p.grey, 0.2), (p.blur, 0.5), (p.flip, 0.5)):
        assert abs(flags.mean() - chance) < 0.03
    low, high = p.factors.min((0, 1)), p.factors.max((0, 1))
    np.testing.assert_allclose(low, [0.6, 0.6, 0.6, -0.1], atol=2e-3)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.4, 0.1], atol=2e-3)
    np.testing.assert_allclose([p.sigma.min(), p.sigma.max(), p.sigma.mean()], [0.1, 2.0, 1.05], atol=0.03)
    assert (np.sort(p.order, axis=2) == np.arange(4)).all()
    _, counts = np.unique(p.order.reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 0.5 * 2 * DRAWS / 24


def test_settings_of_the_views_do_what_they_say() -> None:
    sizes = np.full((DRAWS, 2), 100)
    settings = ViewsConfig(crop=0.4, jitter=0.5, grey=0.7, blur=0.0, key="weak", key_crop=0.8)
    p, plain = (draw_parameters(1, 0, np.arange(DRAWS), sizes, each) for each in (settings, DEFAULT))
    share = p.crop[..., 2:].prod(2) / 1e4
    for view, smallest in ((0, 0.4), (1, 0.8)):
        assert smallest - 0.02 <= share[:, view].min() < smallest + 0.02
        assert share[:, view].max() <= 1
    np.testing.assert_allclose(p.factors.max((0, 1)), [1.2, 1.2, 1.2, 0.05], atol=2e-3)
    assert abs(p.grey[:, 0].mean() - 0.7) < 0.03
    assert not p.blur.any()
    assert not p.jitter[:, 1].any()  # the view of the key is weak
    assert not p.grey[:, 1].any()
    np.testing.assert_array_equal(p.jitter[:, 0], plain.jitter[:, 0])
    np.testing.assert_array_equal(p.flip, plain.flip)
    assert not draw_parameters(1, 0, np.arange(9), sizes[:9], ViewsConfig(jitter=0.0)).jitter.any()


@pytest.mark.parametrize(("width", "height"), [(91, 133), (300, 70)])
def test_a_central_key_is_the_crop_of_evaluation(width: int, height: int) -> None:
    image, settings = photo(np.random.default_rng(2), width, height), ViewsConfig(key="centre")
    sizes = np.array([[height, width]])
    p, plain = (draw_parameters(1, 0, np.arange(1), sizes, each) for each in (settings, DEFAULT))
    for mine, other in zip(p, plain, strict=True):
        np.testing.assert_array_equal(mine[:, 0], other[:, 0])  # the query's view is drawn as ever
    assert not any(flags[:, 1].any() for flags in (p.jitter, p.grey, p.blur, p.flip))
    size = max(round(min(width, height) * 7 / 8), 1)  # nothing is resized, so that only the cut can differ
    ours = cut_image(image, p, (size, size))[1]
    assert (ours.int() - centre_crop(image, size).int()).abs().float().mean() <= 1


def test_first_epoch_is_shuffled_and_each_epoch_differs() -> None:
    orders = [epoch_order(50, 0, epoch) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert not np.array_equal(orders[0], np.arange(50))
    assert not np.array_equal(*orders)
    assert not np.array_equal(orders[0], epoch_order(50, 1, 0))
    loading = replace(LOADING, batch_size=8, seed=0)
    epoch, indices = next(loading.steps(50, 6))  # 6 steps an epoch, two images left over
    assert epoch == 1
    np.testing.assert_array_equal(indices, orders[1][:8])


def test_normalise_is_torchvisions() -> None:
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = v2.functional.normalize(pixels.permute(0, 3, 1, 2) / 255, list(MEAN), list(STD))
    ours = normalise(pixels, torch.float32)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert normalise(pixels, torch.bfloat16).dtype == torch.bfloat16


def test_dali_and_torchvision_give_the_same_views(photos: ImageList) -> None:
    """The same pixels but for rounding between operations; and so the same statistics."""
    levels = torch.tensor(STD)[:, None, None] * 255
    ours, theirs = (torch.cat(take(make(photos), 0, 12), dim=1) * levels for make in (make_dali, make_torch))
    difference = (ours - theirs).abs()
    assert difference.mean() < 0.6
    assert difference.mean((2, 3, 4)).max() < 2  # no single view goes astray: same box, order, flags
    torch.testing.assert_close(ours.mean((0, 1, 3, 4)), theirs.mean((0, 1, 3, 4)), atol=0.1, rtol=0)
    torch.testing.assert_close(ours.std((0, 1, 3, 4)), theirs.std((0, 1, 3, 4)), atol=0.2, rtol=0)


def _scrambled(data: bytes) -> bytes:
    """Sound ends, broken insides: the header says JPEG of that size, the tables are gone."""
    at = data.index(b"\xff\xc4")
    return data[: at + 4] + b"\xff" * 60 + data[at + 64 :]


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "scrambled": _scrambled,
}


def copy_of(photos: ImageList, folder: Path) -> ImageList:
    for name in photos.files:
        (folder / name).write_bytes((photos.root / name).read_bytes())
    return ImageList(folder, photos.files, None, ())


@BOTH
@pytest.mark.parametrize("kind", BREAK)
def test_unreadable_images_are_named_and_passed_over(
    photos: ImageList, make: Make, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = copy_of(photos, tmp_path)
    file = tmp_path / broken.files[7]
    file.write_bytes(BREAK[kind](file.read_bytes()))
    views = make(broken)
    take(views, 0, 7)
    assert views.bad.files == [str(file)]
    assert capfd.readouterr().err.count(str(file)) == 1
    with pytest.raises(UsageError, match=r"unreadable image .*07\.jpg"):
        take(make(broken, on_corrupt="fail"), 0, 3)


def test_what_dali_refuses_is_decoded_by_pil(photos: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    dali = pytest.importorskip("fastcr.data.dali_views", reason="NVIDIA DALI is not installed")
    whole, no = dali.pipeline_from, SimpleNamespace(run=MagicMock(side_effect=RuntimeError("no")))
    (expected,) = islice(make_dali(photos).batches(0), 1)
    monkeypatch.setattr(dali, "pipeline_from", lambda *args: whole(*args) if args[-1] else no)
    views = make_dali(photos)
    (batch,) = islice(views.batches(0), 1)
    assert (batch.first - expected.first).abs().mean() < 0.03  # two decoders
    assert views.bad.files == []
    monkeypatch.setattr(dali, "pipeline_from", lambda *args: no)
    with pytest.raises(RuntimeError, match="no"):  # not for want of a decoder
        take(views, 0, 1)
