"""Bad input, item by item: what each gets from the command line. Nothing is lost, and nobody is shown a traceback."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fastcr import evaluate, train
from fastcr.method import build as training
from tests.shared import TINY, Trap

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 16
NO_PROBES = ["--linear.enabled", "False"]
Args = Sequence[object]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
with_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed",
)


class Scene(NamedTuple):
    """What a row has to work with."""

    tmp: Path
    images: Path  # 16 sound pictures without labels, the row's own to spoil
    run: Path  # where a new run goes; is not there yet
    finished: Path  # where a copy of `one_step` goes, the row's own to spoil; is not there yet
    one_step: Path  # a run of one step on 64 pictures; not to be changed
    birds: Path  # labelled; not to be changed
    patch: pytest.MonkeyPatch

    def training(self, *more: object) -> list[object]:
        """Arguments of a new run on `images`; what is named again counts."""
        return [*TINY, "--run.steps", 1, "--data.root", self.images, "--run.dir", self.run, *more]

    def copied(self) -> Path:
        """`finished`, made at its first use."""
        return self.finished if self.finished.exists() else Path(shutil.copytree(self.one_step, self.finished))

    def measuring(self, *more: object) -> list[object]:
        """Arguments of an evaluation of `finished` on the birds."""
        return [self.copied(), "--data.root", self.birds, "--data.workers", 0, *NO_PROBES, *more]

    def resumed(self, *more: object) -> list[object]:
        """Arguments that let `finished` go on to its second step."""
        return ["--resume", self.copied(), "--run.steps", 2, *more]

    def step_fails(self, act: Callable[[tuple[torch.Tensor, Any]], tuple[torch.Tensor, Any]]) -> None:
        """Hand what a step gives to `act`."""
        original = training.train_step
        self.patch.setattr(training, "train_step", lambda *args, **kwargs: act(original(*args, **kwargs)))


class Row(NamedTuple):
    """Bad input, and what is to come of it."""

    prepare: Callable[[Scene], Args]  # makes it, returns the arguments
    words: tuple[str, ...] = ()  # of the error line; or in a line each of stderr where the command works
    status: int = 2
    says: tuple[str, ...] = ()  # words on stdout
    main: Callable[[Sequence[str]], None] = train.main
    begun: bool = False  # the run has begun: its folder is there
    after: Callable[[Scene], object] = lambda scene: None  # more that must hold


def works(prepare: Callable[[Scene], Args], *words: str, **more: Any) -> Row:
    return Row(prepare, words, status=0, begun=True, **more)


def command(main: Callable[[Sequence[str]], None], args: Iterable[object]) -> int:
    """Exit status."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def goes_on(scene: Scene) -> None:
    """The run resumes from its last good checkpoint and saves again."""
    scene.patch.undo()
    folder = scene.finished if scene.finished.exists() else scene.run
    before = torch.load(folder / "resume.pt", weights_only=True)["step"]
    assert command(train.main, ["--resume", folder, "--run.steps", before + 1]) == 0
    assert torch.load(folder / "resume.pt", weights_only=True)["step"] == before + 1
    assert not list(folder.glob(".*.tmp"))


# folders


def emptied(scene: Scene) -> Path:
    shutil.rmtree(scene.images)
    scene.images.mkdir()
    return scene.images


def odd_classes(scene: Scene) -> Path:
    picture = next(scene.images.iterdir()).read_bytes()
    root = emptied(scene)
    for name in ("train/crow", "train/robin", "test/crow", "test/wren"):
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(picture)
    return root


# images

BROKEN = {"truncated": "000.jpg", "empty": "001.jpg", "text": "002.jpg", "link": "003.jpg", "too large": "004.jpg"}


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


def spoiled(scene: Scene, *more: object) -> Args:
    spoil(scene.images)
    return scene.training("--optim.batch_size", IMAGES, *more)


def spoiled_test_images(scene: Scene) -> Args:
    root = Path(shutil.copytree(scene.birds, scene.tmp / "birds"))
    for i, file in enumerate(sorted((root / "test").glob("*/*.jpg"))[:3]):
        file.write_bytes((b"", b"\xff\xd8 cut off", b"<html>")[i])
    return scene.measuring("--data.root", root)


def all_spoiled(scene: Scene) -> Args:
    for file in scene.images.iterdir():
        file.write_bytes(b"")
    return scene.training()


def random_pixels(*shape: int, dtype: type = np.uint8) -> Any:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def of_every_mode(scene: Scene, *more: object) -> Args:
    root, rgb = emptied(scene), Image.fromarray(random_pixels(40, 50, 3))
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("RGBA", "png"),
                         ("L", "png"), ("P", "gif"), ("RGB", "webp"), ("CMYK", "tif"), ("RGBA", "webp")):  # fmt: skip
        rgb.convert(mode).save(root / f"{mode} {suffix}.{suffix}")
    deep = Image.fromarray(random_pixels(40, 50, dtype=np.uint16))
    deep.save(root / "16 bits.png")
    deep.save(root / "16 bits.tif")
    Image.new("RGB", (1, 1), "red").save(root / "dot.png")
    Image.new("L", (1, 1)).save(root / "dot.jpg")
    Image.new("RGB", (1, 300)).save(root / "line.png")
    assert len(list(root.iterdir())) == IMAGES
    return scene.training("--optim.batch_size", IMAGES, *more)


def of_100_megapixels(scene: Scene) -> Args:
    Image.new("L", (12_000, 9_000), 90).save(scene.images / "000.jpg")
    return scene.training("--optim.batch_size", IMAGES)


# checkpoints


def trapped(file: Path, scene: Scene, **more: object) -> Path:
    """`file` with code that would make the folder `trap`; without the refusal it does."""
    for write in (pickle.dump, torch.save):
        with open(file, "wb") as opened:
            write({"a": Trap(scene.tmp / "trap"), **more}, opened)
        if write is pickle.dump:
            with open(file, "rb") as opened:
                pickle.load(opened)
            (scene.tmp / "trap").rmdir()
    torch.load(file, weights_only=False)
    (scene.tmp / "trap").rmdir()
    return file


def code_did_not_run(scene: Scene) -> None:
    assert not (scene.tmp / "trap").exists()


def foreign(file: Path) -> Path:
    torch.save({"encoder.weight": torch.ones(2)}, file)
    return file


def foreign_resume(scene: Scene) -> Args:
    content = torch.load(scene.copied() / "resume.pt", weights_only=True)
    content["model"] = {f"other.{key}": value for key, value in content["model"].items()}
    torch.save(content, scene.finished / "resume.pt")
    return scene.resumed()


def other_shape(scene: Scene) -> Args:
    return scene.resumed("--rationale.detectors", 5)


def trapped_resume(scene: Scene) -> Args:
    trapped(scene.copied() / "resume.pt", scene, step=1, model={})
    return scene.resumed()


# what befalls a run


def full_disk(scene: Scene) -> Args:
    replace = os.replace

    def full(old: Any, new: Any) -> None:
        if Path(new).name == "resume.pt":
            raise OSError(28, os.strerror(28))
        replace(old, new)

    scene.patch.setattr(os, "replace", full)
    return scene.resumed()


def killed_half_way(scene: Scene) -> Args:
    whole = (scene.copied() / "resume.pt").read_bytes()
    (scene.finished / ".resume.pt.tmp").write_bytes(whole[: len(whole) // 2])
    return scene.resumed()


def nothing_half_written(scene: Scene) -> None:
    assert not list(scene.finished.glob(".*.tmp"))
    assert torch.load(scene.finished / "resume.pt", weights_only=True)["step"] == 2


def terminated(scene: Scene) -> Args:
    def act(result: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return result

    scene.step_fails(act)
    return scene.training("--run.steps", 5)


def no_number(scene: Scene) -> Args:
    scene.step_fails(lambda result: (result[0] * torch.nan, result[1]))
    return scene.resumed("--run.steps", 3)


def out_of_memory(scene: Scene) -> Args:
    def act(result: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of")

    scene.step_fails(act)
    return scene.training()


def runs_with_the_batch_it_names(scene: Scene) -> None:
    scene.patch.undo()
    assert command(train.main, scene.training("--optim.batch_size", 4)) == 0


# what is not there


def no_dali(scene: Scene) -> None:
    scene.patch.setitem(sys.modules, "nvidia.dali", None)
    scene.patch.delitem(sys.modules, "fastcr.data.dali_views", raising=False)
    scene.patch.delattr("nvidia.dali", raising=False)


def dali_by_name(scene: Scene) -> Args:
    no_dali(scene)
    return scene.training("--data.loader", "dali")


def dali_not_asked_for(scene: Scene) -> Args:
    no_dali(scene)
    return scene.training("--data.loader", "auto")


def triton_by_name(scene: Scene) -> Args:
    scene.patch.setattr("fastcr.kernels.launch.triton", None)
    return scene.training("--run.kernels", "triton")


def triton_without_gpu(scene: Scene) -> Args:
    scene.patch.setattr("fastcr.kernels.launch.INTERPRET", False)
    return scene.training("--run.kernels", "triton")


NAMED = tuple(f"unreadable image '{{images}}/{name}': its neighbour is used instead" for name in BROKEN.values())
COUNTED = f"{len(BROKEN)} unreadable training images were skipped"
ROWS = {
    "missing folder": Row(lambda s: s.training("--data.root", s.tmp / "none"), ("no folder {tmp}/none",)),
    "empty folder": Row(lambda s: s.training("--data.root", emptied(s)), ("no images under {images}", ".jpg")),
    "class folders that differ": works(
        lambda s: s.training("--data.root", odd_classes(s), "--optim.batch_size", 2, "--moco.queue_size", 2),
        says=("no class of two images: retrieval is not measured",),
    ),
    "unreadable images, cache": works(spoiled, *NAMED, says=(COUNTED,)),
    "unreadable images, dali": works(lambda s: spoiled(s, "--data.loader", "dali"), *NAMED, says=(COUNTED,)),
    "unreadable images, evaluate": works(
        spoiled_test_images, says=("unreadable image", "left out", "29 images"), main=evaluate.main
    ),
    "unreadable images, fail": Row(
        lambda s: spoiled(s, "--data.on_corrupt", "fail"), ("unreadable image '{images}/000.jpg'", "--data.on_corrupt")
    ),
    "none but unreadable images": Row(all_spoiled, ("none of the 16 images under {images} can be read",)),
    "images of every mode": works(of_every_mode),
    "image of 108 megapixels": works(of_100_megapixels),
    "fewer images than a batch": Row(
        lambda s: s.training("--optim.batch_size", 17), ("{images} has 16 training images", "--optim.batch_size")
    ),
    "queue no multiple of the batch": works(lambda s: s.training("--moco.queue_size", 13, "--run.steps", 2)),
    "foreign weights": Row(
        lambda s: s.training("--model.weights", foreign(s.tmp / "w.pt")), ("{tmp}/w.pt", "encoder.weight")
    ),
    "foreign checkpoint, resume": Row(foreign_resume, ("{finished}/resume.pt does not fit", "moco.")),
    "wrong checkpoint, resume": Row(other_shape, ("{finished}/resume.pt does not fit", "branch.weight")),
    "code in weights": Row(
        lambda s: s.training("--model.weights", trapped(s.tmp / "w.pt", s)), ("{tmp}/w.pt is refused", "pickled code"),
        after=code_did_not_run,
    ),
    "code in a checkpoint, resume": Row(
        trapped_resume, ("{finished}/resume.pt is refused", "pickled code"), after=code_did_not_run
    ),
    "disk full while saving": Row(
        full_disk, ("cannot save {finished}/resume.pt", "No space left on device"), after=goes_on
    ),
    "killed while saving": works(killed_half_way, after=nothing_half_written),
    "SIGTERM": Row(
        terminated, status=143, says=("resume with: python -m fastcr.train --resume {run}",), begun=True,
        after=goes_on,
    ),
    "loss that is no number": Row(
        no_number, ("not a finite number from step 2 on", "the last good checkpoint is {finished}/resume.pt"),
        after=goes_on,
    ),
    "out of GPU memory": Row(
        out_of_memory, ("out of GPU memory at --optim.batch_size 8: try 4",), begun=True,
        after=runs_with_the_batch_it_names,
    ),
    "cuda without a device": Row(
        lambda s: s.training("--run.device", "cuda"), ("--run.device cuda: this machine has 0 CUDA devices",)
    ),
    "DALI asked for and absent": Row(
        dali_by_name, ('--data.loader dali needs NVIDIA DALI: pip install "fastcr[dali]"',)
    ),
    "DALI absent": works(dali_not_asked_for, says=("loader: fused; cache: host; device: cpu",)),
    "Triton asked for and absent": Row(triton_by_name, ("--run.kernels triton", "Triton is not installed")),
    "Triton asked for without a GPU": Row(triton_without_gpu, ("--run.kernels triton", "the tensors are on cpu")),
}  # fmt: skip
NEEDS = {"dali": with_dali, "cuda without": without_cuda, "DALI absent": without_cuda, "without a GPU": without_cuda}


def row(name: str) -> Any:
    return pytest.param(ROWS[name], id=name, marks=[mark for part, mark in NEEDS.items() if part in name])


@pytest.fixture(scope="module")
def one_step(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "one step"
    assert command(train.main, [*TINY, "--run.steps", 1, "--data.root", flat, "--run.dir", folder]) == 0
    return folder


@pytest.fixture
def scene(flat: Path, birds: Path, one_step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    (tmp_path / "images").mkdir()
    for file in sorted(flat.iterdir())[:IMAGES]:
        shutil.copyfile(file, tmp_path / "images" / file.name)
    places = (tmp_path / name for name in ("images", "run", "finished"))
    return Scene(tmp_path, *places, one_step, birds, monkeypatch)


@pytest.mark.parametrize("row", map(row, ROWS))
def test_bad_input(row: Row, scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    args, checkpoint = row.prepare(scene), scene.finished / "resume.pt"
    before = checkpoint.read_bytes() if checkpoint.exists() else None
    capfd.readouterr()
    status = command(row.main, args)
    out, err = capfd.readouterr()
    lines, places = err.splitlines(), scene._asdict()
    words, says = ([text.format(**places) for text in texts] for texts in (row.words, row.says))
    assert status == row.status, err
    assert "Traceback" not in err + out
    if status == 2:
        (line,) = lines
        assert line.startswith("fastcr.")
        assert ": error: " in line
        assert all(word in line for word in words), line
        assert before is None or checkpoint.read_bytes() == before
    else:
        assert len(lines) == len(words), lines
        assert all(any(word in line for line in lines) for word in words), lines
    assert all(word in out for word in says), out
    if row.main is train.main and not row.begun:
        assert not scene.run.exists()
    row.after(scene)
