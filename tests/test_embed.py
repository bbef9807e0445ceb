"""Embeddings in files: the numbers evaluation computes, each row the image the table names; kills cost nothing."""

import csv
import hashlib
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import fastcr
from fastcr import embed as command
from fastcr.data import crop_loader
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.measures.embeddings import Embeddings, embed
from fastcr.measures.poolings import OF_FEATURES
from fastcr.output import embeddings
from fastcr.output.embeddings import read_stored
from fastcr.runs.context import Context
from tests.runs.test_distributed import finish, launch
from tests.runs.test_folder import HOLD
from tests.shared import start, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu", "--data.workers", "0")


@pytest.fixture(scope="module", autouse=True)
def batches_of_8() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (crop_loader, command):
            patch.setattr(module, "BATCH_SIZE", 8)
        patch.setattr(command, "PART_SECONDS", 0.0)
        yield


def run(*args: object) -> None:
    command.main([*map(str, args), *CPU])


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [str(i) for i in range(len(rows))]
    return rows


def arrays(folder: Path) -> dict[str, torch.Tensor]:
    return {file.stem: torch.from_numpy(np.load(file)) for file in folder.glob("*.npy")}


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def computed(weights: Path, images: ImageList) -> Embeddings:
    poolings = {name: pool for name, pool in OF_FEATURES.items() if name != "mean"}
    context = Context(console=Console(file=io.StringIO()))
    return embed(fastcr.load(weights), images, context, title="", poolings=poolings)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def half(weights: Path, birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was killed in its sixth batch; not to be changed."""
    out, left = tmp_path_factory.mktemp("half") / "out", iter(range(5))

    def save(*args: Any) -> None:
        if next(left, None) is None:
            raise Killed
        embeddings.save_part(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "save_part", save)
        with pytest.raises(Killed):
            run(weights, birds, "--out", out)
    return out


@pytest.mark.parametrize("released", [False, True])
def test_rows_are_what_evaluation_computes_of_the_images_the_table_names(
    released: bool, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_weights(tmp_path / "weights.safetensors", released=released)
    run(weights, birds, "--out", tmp_path / "out")
    assert "96 images embedded (" in capsys.readouterr().out
    names = {"encoder.json", "images.csv", "mean.npy", "rationale.npy"}
    assert contents(tmp_path / "out").keys() == names
    found, rows, first = arrays(tmp_path / "out"), table(tmp_path / "out"), 0
    for split, images in (("train", read_splits(birds).train), ("test", read_splits(birds).test)):
        assert images
        assert images.labels
        expected, part = computed(weights, images), slice(first, first + len(images))
        assert torch.equal(found["mean"][part], expected.mean)
        assert torch.equal(found["rationale"][part], expected.rationale)
        assert {row["split"] for row in rows[part]} == {split}
        assert [row["path"] for row in rows[part]] == [f"{split}/{file}" for file in images.files]
        assert [row["label"] for row in rows[part]] == [images.classes[label] for label in images.labels]
        first += len(images)
    assert first == len(rows)
    for row in rows[::10]:
        assert Image.open(birds / row["path"]).size == (int(row["width"]), int(row["height"]))
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert (facts["backbone"], facts["image_size"]) == ("resnet18", 32)


def test_files_of_worker_processes_are_the_same(
    weights: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(weights, birds)
    command.main([str(weights), str(birds), "--out", "out", "--run.device", "cpu", "--data.workers", "2"])
    assert contents(tmp_path / "out") == contents(tmp_path / f"{birds.name}-embeddings")  # the default of --out


def test_killed_command_goes_on_and_gives_the_same_bytes(
    weights: Path, birds: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(half, tmp_path / "out"))
    assert {entry.name for entry in out.iterdir()} == {"partial"}
    run(weights, birds, "--out", out)
    said = capsys.readouterr().out
    assert "40 of 96 images are embedded already" in said
    assert "96 images embedded, 56 of them now" in said
    run(weights, birds, "--out", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    before = (out / "encoder.json").stat()
    run(weights, birds, "--out", out)
    assert (out / "encoder.json").stat() == before  # nothing is written where nothing has changed


def changed(birds: Path, root: Path) -> Path:
    """A copy of the pictures: one is gone, one another, one is new, and one has another label."""
    shutil.copytree(birds / "test", root)
    files = sorted(root.glob("*/*.jpg"))
    files[0].unlink()
    shutil.copyfile(files[9], files[3])
    shutil.copyfile(files[12], files[5].with_name("new.jpg"))
    (root / "other").mkdir()
    files[20].rename(root / "other" / "0.jpg")
    return root


@pytest.mark.parametrize("options", [[], ["--whiten", "--expand"], ["--centre", "--pooling", "gem"]])
def test_an_index_is_brought_up_to_date(
    options: list[str], weights: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, root = tmp_path / "out", tmp_path / "birds"
    shutil.copytree(birds / "test", root)
    run(weights, root, "--out", out, *options)
    (out / "mine.txt").write_text("a note")
    shutil.rmtree(root)
    changed(birds, root)
    capsys.readouterr()
    run(weights, root, "--out", out, *options)
    said = capsys.readouterr().out
    assert "29 of 32 images are embedded already" in said
    assert "32 images embedded, 3 of them now, 2 gone" in said
    run(weights, root, "--out", tmp_path / "anew", *options)
    assert table(out) == table(tmp_path / "anew")
    for name, expected in arrays(tmp_path / "anew").items():
        torch.testing.assert_close(arrays(out)[name], expected, atol=1e-4, rtol=0)
    assert contents(out).keys() - contents(tmp_path / "anew").keys() == {"mine.txt"}
    moved = root.rename(tmp_path / "moved")
    run(weights, moved, "--out", out, *options)
    assert "32 images embedded, 0 of them now\n" in capsys.readouterr().out
    assert json.loads((out / "encoder.json").read_text())["root"] == str(moved)


def unless_killed(left: Iterator[int], move: Callable[..., None], *args: Any) -> None:
    if next(left, None) is None:
        raise Killed
    move(*args)


def test_a_kill_at_any_write_leaves_the_old_index_or_the_new_one(
    weights: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(weights, birds / "test", "--out", tmp_path / "old")
    root = changed(birds, tmp_path / "birds")
    run(weights, root, "--out", tmp_path / "new")
    ends = [read_stored(tmp_path / name) for name in ("old", "new")]
    seen = list[bool]()
    for step in count():
        out, left = Path(shutil.copytree(tmp_path / "old", tmp_path / str(step))), iter(range(step))
        with pytest.MonkeyPatch.context() as patch:
            for move in (os.replace, os.rename):
                patch.setattr(os, move.__name__, partial(unless_killed, left, move))
            try:
                run(weights, root, "--out", out)
                break
            except Killed:
                pass
        found = read_stored(out)
        new = found.rows == ends[1].rows
        torch.testing.assert_close(found.vectors, ends[new].vectors, atol=1e-5, rtol=0)
        assert found.rows == ends[new].rows
        seen.append(new)
        if step % 4 == 0:
            run(weights, root, "--out", out)  # goes on from there
            assert table(out) == table(tmp_path / "new")
            assert not {"next", "partial"} & {entry.name for entry in out.iterdir()}
    assert seen == sorted(seen)
    assert len(seen) > 8
    assert 0 < sum(seen) < len(seen)


def test_two_processes_share_the_work_and_write_the_same_bytes(weights: Path, birds: Path, tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    for index, file in enumerate(sorted((birds / "train").glob("*/*.jpg")) * 5):  # three batches
        shutil.copyfile(file, tmp_path / "birds" / f"{index}.jpg")
    (tmp_path / "birds" / "7.jpg").write_bytes(b"no picture")
    args = ["-m", "fastcr.embed", weights, tmp_path / "birds", *CPU, "--out"]
    (first, said, _), second, alone = finish([*launch(*args, tmp_path / "two"), start(*args, tmp_path / "one")])
    assert (first, second, alone[0]) == (0, (0, "", ""), 0)
    assert "319 images embedded, 1 unreadable left out" in said
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_index_that_was_made_otherwise_is_refused(
    weights: Path, birds: Path, half: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = write_weights(tmp_path / "other.safetensors", seed=1)
    finished = tmp_path / "finished"
    run(weights, birds / "test", "--out", finished)
    for out in (finished, Path(shutil.copytree(half, tmp_path / "begun"))):
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        assert "was made with other weights (" in refused(command.main, other, birds, "--out", out, *CPU)
        line = refused(command.main, weights, birds, "--out", out, "--pooling", "gem", *CPU)
        assert "was made with other settings (pooling mean and rationale, tuned 1.0, float32, 32 px, 8 im" in line
        assert "not pooling gem, tuned 1.0, float32, 32 px, 8 images a batch): name another --out" in line
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mean.npy").write_bytes(b"mine")
    line = refused(command.main, weights, birds, "--out", tmp_path / "mine", *CPU)
    assert "mean.npy is there already, but no index" in line


def test_a_full_disk_is_one_line_and_costs_nothing(
    weights: Path, birds: Path, half: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = Path(shutil.copytree(half, tmp_path / "out"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(file.stat().st_size for file in out.rglob("*")) + 1000, hard))
    try:  # there is room for each part, but not for the arrays
        assert "File too large" in refused(command.main, weights, birds, "--out", out, *CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(weights, birds, "--out", out)
    run(weights, birds, "--out", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_another_process_at_it_is_noticed(
    weights: Path, birds: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "partial").mkdir()
    holder = start("-c", HOLD, tmp_path / "partial", fresh=False)
    assert holder.stdout.readline() == "held\n"
    assert "another process" in refused(command.main, weights, birds, "--out", tmp_path, *CPU)
    holder.kill()
    holder.communicate(timeout=30)


def test_unreadable_images_are_named_counted_and_left_out(
    weights: Path, birds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    root = Path(shutil.copytree(birds / "test", tmp_path / "birds"))
    files = read_splits(root).train.files
    broken = [0, 5, *range(16, 24)]  # the last eight are a whole batch
    for index in broken:
        (root / files[index]).write_bytes(b"no picture")
    run(weights, root, "--out", tmp_path / "out")
    out = capfd.readouterr().out
    assert "22 images embedded, 10 unreadable left out" in out
    assert all(repr(str(root / files[index])) in out for index in broken)
    kept = [index for index in range(32) if index not in broken]
    assert [row["path"] for row in table(tmp_path / "out")] == [files[index] for index in kept]
    expected = computed(weights, read_splits(birds / "test").train)
    found = arrays(tmp_path / "out")
    torch.testing.assert_close(found["mean"], expected.mean[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["rationale"], expected.rationale[kept], atol=1e-5, rtol=0)

    for file in files:
        (root / file).write_bytes(b"")
    message = refused(command.main, weights, root, "--out", tmp_path / "none", *CPU)
    assert f"none of the 32 images under {root} can be read" in message
    assert not (tmp_path / "none" / "partial").exists()


def test_table_survives_any_name(weights: Path, flat: Path, tmp_path: Path) -> None:
    picture = next(flat.iterdir()).read_bytes()
    labels = ["plain", 'a, "b"', "two\nlines", "carriage\rreturn", "  ", "鳥", os.fsdecode(b"\xff\xfe"), "=1+1", "'"]
    names = [f"{label}.jpg" for label in labels]
    for label, name in zip(labels, reversed(names), strict=True):
        (tmp_path / "root" / label).mkdir(parents=True)
        (tmp_path / "root" / label / name).write_bytes(picture)
    run(weights, tmp_path / "root", "--out", tmp_path / "out")
    rows = table(tmp_path / "out")
    assert {row["path"]: row["label"] for row in rows} == {
        f"{label}/{name}": label for label, name in zip(labels, reversed(names), strict=True)
    }
    assert all((tmp_path / "root" / row["path"]).is_file() for row in rows)


@pytest.mark.parametrize(("asked", "name"), [("feature-strength", "norm"), ("attention", "rationale")])
def test_the_pooling_that_is_asked_for_is_written_alone_and_its_mean_subtracted(
    asked: str, name: str, weights: Path, birds: Path, tmp_path: Path
) -> None:
    run(weights, birds / "test", "--out", tmp_path / "plain", "--pooling", asked)
    found = arrays(tmp_path / "plain")
    assert found.keys() == {name}
    expected = computed(weights, read_splits(birds / "test").train)
    plain = {"rationale": expected.rationale, **expected.others}[name]
    torch.testing.assert_close(found[name], plain, atol=1e-6, rtol=0)
    run(weights, birds / "test", "--out", tmp_path / "out", "--pooling", asked, "--centre")
    mean = plain.double().mean(0)
    expected_rows = (plain - mean) / (plain - mean).norm(dim=1, keepdim=True)
    torch.testing.assert_close(arrays(tmp_path / "out")[name], expected_rows.float(), atol=1e-5, rtol=0)
    facts, before = (json.loads((tmp_path / folder / "encoder.json").read_text()) for folder in ("out", "plain"))
    assert facts["subtracted"] == pytest.approx(mean.tolist(), abs=1e-6)
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (facts["pooling"], facts["weights"], facts["root"]) == (name, str(weights), str(birds / "test"))
    assert "subtracted" not in before
