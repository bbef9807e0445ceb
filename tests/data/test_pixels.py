"""How files become pixels by every loader, and no more memory than the picture is worth."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from fastcr.data.crop_loader import load_crops
from fastcr.data.crops import centre_crop, enough
from fastcr.data.images import BadFiles, ImageList, full_size, read_rgb
from fastcr.data.loaders import loader_of
from fastcr.data.pixel_cache import fill, measure
from fastcr.data.views import Loading
from fastcr.runs.context import Context
from tests.data.test_grid import STORED

CONTEXT = Context()


def scene(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x > width // 2) * 200], 2).astype(np.uint8)


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera stores an upright picture under an EXIF orientation."""
    image, turn = Image.fromarray(upright), STORED[orientation]
    return np.asarray(image if turn is None else image.transpose(turn))


def save(file: Path, pixels: np.ndarray, orientation: int, **options: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif, **options)


def first_views(loader: str, images: ImageList, sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both views `[B,3,S,S]` of all images, in one batch."""
    source = fill(images, measure(images, 64, CONTEXT), "host", CONTEXT, 64) if loader == "cache" else images
    loading = Loading(sizes, len(images), 0, CONTEXT)
    batch = next(loader_of(loader)(source, loading, BadFiles(images, "fail"), 0))
    return batch.first, batch.second


@pytest.mark.parametrize("loader", ["torch", "cache", "dali"])
def test_every_loader_makes_the_keys_views_in_a_size_of_their_own(tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    for number in range(3):
        save(tmp_path / f"{number}.png", np.roll(scene(), 9 * number, axis=1), 1)
    images = ImageList(tmp_path, tuple(f"{number}.png" for number in range(3)), None, ())
    small, large, both = (first_views(loader, images, sizes) for sizes in ((16, 16), (40, 40), (16, 40)))
    assert torch.equal(both[0], small[0])
    assert torch.equal(both[1], large[1])
    assert both[1].shape == (3, 3, 40, 40)
    assert both[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("loader", ["torch", "cache", "dali"])
def test_every_loader_turns_them(tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    upright = scene()
    for orientation in range(1, 9):
        save(tmp_path / f"{orientation}.jpg", as_stored(upright, orientation), orientation, quality=100, subsampling=0)
    images = ImageList(tmp_path, tuple(f"{orientation}.jpg" for orientation in range(1, 9)), None, ())
    upright_ones = tmp_path / "upright"
    upright_ones.mkdir()
    for name in images.files:
        Image.fromarray(upright).save(upright_ones / name, quality=100, subsampling=0)
    turned, plain = (
        torch.stack(first_views(loader, each, (32, 32))) for each in (images, replace(images, root=upright_ones))
    )
    assert ((turned - plain).abs().mean((0, 2, 3, 4)) < 0.03).all()  # 2 levels of 255


def test_loaders_agree_on_odd_files(tmp_path: Path) -> None:
    """Encodings that cameras, servers and editors write: most are JPEGs, some by their name alone."""
    pytest.importorskip("nvidia.dali")
    image = Image.fromarray(scene(96, 128))
    for name, options in {
        "rgb": {"keep_rgb": True}, "s411": {"subsampling": "4:1:1"}, "s422": {"subsampling": 1}, "q5": {"quality": 5},
        "progressive": {"progressive": True}, "restart": {"restart_marker_rows": 1},
    }.items():  # fmt: skip
        image.save(tmp_path / f"{name}.jpg", **options)
    for mode in ("L", "CMYK"):
        image.convert(mode).save(tmp_path / f"{mode}.jpg")
    image.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[image.rotate(180)])
    image.crop((0, 0, 97, 63)).save(tmp_path / "odd.jpg")
    image.convert("P").save(tmp_path / "palette.png")
    for name in ("a.webp", "b.jpg"):
        image.save(tmp_path / name, format="WEBP")
    images = ImageList(tmp_path, tuple(sorted(file.name for file in tmp_path.iterdir())), None, ())
    torch_s, dali_s = (torch.stack(first_views(name, images, (64, 64))) for name in ("torch", "dali"))
    assert ((torch_s - dali_s).abs().mean((0, 2, 3, 4)) * 0.226 * 255).max() < 1.5  # levels of 255


@pytest.mark.parametrize(("width", "height", "size"), [(61, 40, 32), (300, 451, 57), (37, 37, 32), (33, 500, 112)])
def test_the_crop_is_torchvisions(width: int, height: int, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = TF.resize(torch.from_numpy(noise).permute(2, 0, 1), [round(size * 8 / 7)], antialias=True)
    wanted = TF.center_crop(resized, [size, size]).permute(1, 2, 0)
    assert torch.equal(centre_crop(Image.fromarray(noise), size), wanted)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path: Path, orientation: int) -> None:
    upright, file = scene(601, 903), tmp_path / "a.jpg"
    save(file, as_stored(upright, orientation), orientation, quality=95)
    images = ImageList(tmp_path, ("a.jpg",), None, ())
    whole, halved, least = images.rgb(0), images.rgb(0, 150), images.rgb(0, 302)
    assert (whole.size, halved.size, least.size) == ((903, 601), (226, 151), (903, 601))
    assert full_size(whole) == full_size(halved) == full_size(least) == (601, 903)
    assert full_size(Image.new("RGB", (7, 5))) == (5, 7)
    side = 60
    crops = [centre_crop(each, side).int() for each in (whole, images.rgb(0, enough(side)))]
    assert images.rgb(0, enough(side)).size == (226, 151)
    assert (crops[0] - crops[1]).abs().max() <= 16  # at an edge of 200 levels
    assert (crops[0] - crops[1]).abs().float().mean() < 0.5
    ((pixels, sizes, _),) = load_crops([images], [[0]], side, CONTEXT)
    assert torch.equal(pixels[0].int(), crops[1])
    assert sizes.tolist() == [[601, 903]]
    for bound, size in ((60, [60, 90]), (700, [601, 903])):
        cache = fill(images, measure(images, bound, CONTEXT), "host", CONTEXT, bound)
        assert cache.sizes.tolist() == [size]


def test_a_broken_orientation_is_none(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(scene()).save(data, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_rgb(io.BytesIO(data.getvalue())).size == (64, 48)


@pytest.mark.parametrize(("width", "height"), [(1, 3000), (2000, 7)])
def test_the_crop_of_a_thin_picture_is_its_middle(width: int, height: int) -> None:
    """Compared with the resize of the whole, for which these are small enough; but for a shift below a pixel."""
    image = Image.fromarray(scene(height, width))
    whole = TF.center_crop(TF.resize(TF.pil_to_tensor(image), [37], antialias=True), [32, 32]).permute(1, 2, 0)
    assert (centre_crop(image, 32).float() - whole.float()).abs().max() <= 40
