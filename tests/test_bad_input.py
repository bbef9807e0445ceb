"""Bad input, item by item: what each gets from the command line. Nothing is lost, and nobody is shown a traceback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastcr import train
from fastcr.method import build as training
from tests.shared import TINY, Trap

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 16
BROKEN = {"truncated": "000.jpg", "empty": "001.jpg", "text": "002.jpg", "link": "003.jpg", "too large": "004.jpg"}
Args = Sequence[object]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
with_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed",
)


@pytest.fixture
def images(flat: Path, tmp_path: Path) -> Path:
    """16 sound pictures without labels, the test's own to spoil."""
    (tmp_path / "images").mkdir()
    for file in sorted(flat.iterdir())[:IMAGES]:
        shutil.copyfile(file, tmp_path / "images" / file.name)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def one_step(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "one step"
    train.main([*TINY, "--run.steps", "1", "--data.root", str(flat), "--run.dir", str(folder)])
    return folder


def run_of(images: Path, *more: object) -> list[str]:
    """Arguments of a new run of one step beside the images, with all of them in its batch; what is named again counts.

    The folder of the run is `run` beside that of the images.
    """
    args = [*TINY, "--run.steps", 1, "--optim.batch_size", IMAGES, "--data.root", images]
    return [str(each) for each in (*args, "--run.dir", images.parent / "run", *more)]


def spoil(root: Path) -> Path:
    """One image of each kind that cannot be read."""
    first = root / BROKEN["truncated"]
    first.write_bytes(first.read_bytes()[:500])
    (root / BROKEN["empty"]).write_bytes(b"")
    (root / BROKEN["text"]).write_text("<!DOCTYPE html><html>404</html>")
    (root / BROKEN["link"]).unlink()
    (root / BROKEN["link"]).symlink_to(root / "nowhere.jpg")
    (root / BROKEN["too large"]).write_bytes(b"P6 60000 60000 255\n")  # 3,600 megapixels, says the header
    return root


# what is refused: a function of the images' folder that makes the bad input and returns further arguments


def fail_on_corrupt(images: Path, patch: pytest.MonkeyPatch) -> Args:
    spoil(images)
    return ["--data.on_corrupt", "fail"]


def all_empty(images: Path, patch: pytest.MonkeyPatch) -> Args:
    for file in images.iterdir():
        file.write_bytes(b"")
    return []


def no_dali(images: Path, patch: pytest.MonkeyPatch) -> Args:
    patch.setitem(sys.modules, "nvidia.dali", None)
    patch.delitem(sys.modules, "fastcr.data.dali_views", raising=False)
    patch.delattr("nvidia.dali", raising=False)
    return ["--data.loader", "dali"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda images, _: ["--data.root", images / "none"], ("no folder {images}/none",)),
        (fail_on_corrupt, ("unreadable image '{images}/000.jpg'", "--data.on_corrupt")),
        (all_empty, ("none of the 16 images under {images} can be read",)),
        (lambda *_: ["--optim.batch_size", 17], ("{images} has 16 training images", "--optim.batch_size")),
        pytest.param(
            lambda *_: ["--run.device", "cuda"],
            ("--run.device cuda: this machine has 0 CUDA devices",),
            marks=without_cuda,
        ),
        pytest.param(no_dali, ('--data.loader dali needs NVIDIA DALI: pip install "fastcr[dali]"',), marks=with_dali),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(
    prepare: Callable[[Path, pytest.MonkeyPatch], Args],
    words: tuple[str, ...],
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    line = refused(train.main, *run_of(images, "--data.loader", "auto", *prepare(images, monkeypatch)))
    assert all(word.format(images=images) in line for word in words), line
    assert not (images.parent / "run").exists()


# what is taken


def trained(args: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """What a run that comes to its end has said: on stdout, and the lines of stderr."""
    capfd.readouterr()
    train.main(args)
    out, err = capfd.readouterr()
    return out, err.splitlines()


def test_unreadable_images_are_named_and_counted(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, errors = trained(run_of(spoil(images)), capfd)
    assert len(errors) == len(BROKEN)
    for name in BROKEN.values():
        assert any(f"unreadable image '{images}/{name}': its neighbour is used instead" in line for line in errors)
    assert f"{len(BROKEN)} unreadable training images were skipped" in out


def random_pixels(*shape: int, dtype: type = np.uint8) -> Any:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def test_images_of_every_mode_and_size_are_trained_on(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in sorted(images.iterdir()):
        file.unlink()
    rgb, deep = Image.fromarray(random_pixels(40, 50, 3)), Image.fromarray(random_pixels(40, 50, dtype=np.uint16))
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("RGBA", "png"),
                         ("P", "gif"), ("RGB", "webp"), ("CMYK", "tif"), ("RGBA", "webp")):  # fmt: skip
        rgb.convert(mode).save(images / f"{mode} {suffix}.{suffix}")
    deep.save(images / "16 bits.png")
    deep.save(images / "16 bits.tif")
    Image.new("RGB", (1, 1), "red").save(images / "dot.png")
    Image.new("L", (1, 1)).save(images / "dot.jpg")
    Image.new("RGB", (1, 300)).save(images / "line.png")
    Image.new("L", (12_000, 9_000), 90).save(images / "108 megapixels.jpg")
    assert len(list(images.iterdir())) == IMAGES
    assert trained(run_of(images), capfd)[1] == []


def test_out_of_gpu_memory_names_the_batch_to_try(
    images: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of")

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", fails)
        assert "out of GPU memory at --optim.batch_size 16: try 8" in refused(train.main, *run_of(images))
    train.main(run_of(images, "--optim.batch_size", 8))  # the folder is free again


# checkpoints


def trapped(file: Path, trap: Path, **more: object) -> Path:
    """`file` with code that would make the folder `trap`; without the refusal it does."""
    torch.save({"a": Trap(trap), **more}, file)
    torch.load(file, weights_only=False)
    trap.rmdir()
    return file


def test_foreign_checkpoints_are_not_resumed_from(one_step: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder, trap = shutil.copytree(one_step, tmp_path / "run"), tmp_path / "trap"
    file = folder / "resume.pt"
    content = torch.load(file, weights_only=True)
    content["model"] = {f"other.{key}": value for key, value in content["model"].items()}
    torch.save(content, file)
    line = refused(train.main, "--resume", folder, "--run.steps", 2)
    assert f"{file} does not fit" in line
    assert "moco." in line
    trapped(file, trap, step=1, model={})
    before = file.read_bytes()
    line = refused(train.main, "--resume", folder, "--run.steps", 2)
    assert f"{file} is refused" in line
    assert "pickled code" in line
    assert not trap.exists()
    assert file.read_bytes() == before
    assert not [each for each in os.listdir(folder) if each.endswith(".tmp")]
