"""Embeddings in files: the numbers evaluation computes, each row the image the table names; kills cost nothing."""

import csv
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import fastcr
from fastcr import embed as command
from fastcr.config import RationaleConfig
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.measures.embeddings import Embeddings, embed
from fastcr.measures.poolings import OF_FEATURES
from fastcr.output import embeddings
from fastcr.output.embeddings import Job
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.context import Context
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu", "--data.workers", "0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="module", autouse=True)
def batches_of_8() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "BATCH_SIZE", 8)
        patch.setattr(embeddings, "PART_SECONDS", 0.0)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcr.measures.embeddings.BATCH_SIZE", 8)
        return embed(fastcr.load(weights), images, context, title="", poolings=poolings)


class Killed(BaseException):
    """Stands for a kill."""


def raising(error: BaseException) -> Callable[..., None]:
    def call(*args: object, **more: object) -> None:
        raise error

    return call


@pytest.fixture(scope="module")
def half(weights: Path, birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was killed in its sixth batch; not to be changed."""
    out, save = tmp_path_factory.mktemp("half") / "out", Job.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "save", lambda job: save(job) if job.images <= 40 else raising(Killed())())
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


def test_without_a_branch_there_is_the_mean_alone(birds: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    plain = write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False))
    run(plain, birds / "test", "--out", tmp_path / "out")
    assert arrays(tmp_path / "out").keys() == {"mean"}
    assert {row["split"] for row in table(tmp_path / "out")} == {""}
    message = refused(command.main, plain, birds, "--out", tmp_path / "out", *CPU)
    assert "images.csv is there already: remove it, or name another --out" in message


def test_killed_command_goes_on_and_gives_the_same_bytes(
    weights: Path, birds: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(half, tmp_path / "out"))
    assert {entry.name for entry in out.iterdir()} == {"partial"}

    def all_but_the_last(path: Path, write: Callable[[Path], object]) -> None:
        if path.name == "encoder.json":
            raise Killed
        write_whole(path, write)

    # again, when all is embedded but the files are not all in place
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "write_whole", all_but_the_last)
        with pytest.raises(Killed):
            run(weights, birds, "--out", out)
    assert "resuming after 40 of 96 images" in capsys.readouterr().out
    run(weights, birds, "--out", out)
    assert "resuming after 96 of 96 images" in capsys.readouterr().out
    run(weights, birds, "--out", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_job_that_cannot_go_on_says_why_and_stays_as_it_is(
    weights: Path, birds: Path, half: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out, root = Path(shutil.copytree(half, tmp_path / "out")), Path(shutil.copytree(birds, tmp_path / "birds"))

    def said(weights: Path = weights, root: Path = birds) -> str:
        before = contents(out / "partial")
        line = refused(command.main, weights, root, "--out", out, *CPU)
        assert contents(out / "partial") == before
        return line

    other = write_weights(tmp_path / "other.safetensors", seed=1)
    assert f"{out}/partial was begun with other weights: remove that folder" in said(weights=other)
    next((root / "test").glob("*/*.jpg")).touch()
    assert f"{out}/partial was begun with other images: remove that folder" in said(root=root)
    first = out / "partial" / "mean"
    whole = first.read_bytes()
    first.write_bytes(whole[: 39 * len(whole) // 48])  # 40 images are done, the rows of 8 more are written
    assert f"{out}/partial is broken" in said()
    first.unlink()
    assert f"{out}/partial is broken" in said()


def test_a_full_disk_is_one_line_and_costs_nothing(
    weights: Path, birds: Path, half: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = Path(shutil.copytree(half, tmp_path / "out"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    row = (out / "partial" / "mean").stat().st_size // 48  # the rows of 8 images after the 40 that count are there too
    resource.setrlimit(resource.RLIMIT_FSIZE, (60 * row, hard))
    try:
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
    code = f"import fcntl; f = open({str(tmp_path / 'partial' / '.lock')!r}, 'w'); fcntl.lockf(f, 2); input(print(1))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        other.stdout.read(1)
        assert "another process" in refused(command.main, weights, birds, "--out", tmp_path, *CPU)
        other.stdin.close()


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
def test_the_pooling_that_is_asked_for_is_written_alone(
    asked: str, name: str, weights: Path, birds: Path, tmp_path: Path
) -> None:
    run(weights, birds / "test", "--out", tmp_path / "out", "--pooling", asked)
    found = arrays(tmp_path / "out")
    assert found.keys() == {name}
    expected = computed(weights, read_splits(birds / "test").train)
    by_name = {"rationale": expected.rationale, **expected.others}
    torch.testing.assert_close(found[name], by_name[name], atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "out" / "encoder.json").read_text())["pooling"] == name


def test_the_mean_of_the_folder_is_subtracted_and_kept(weights: Path, birds: Path, tmp_path: Path) -> None:
    run(weights, birds, "--out", tmp_path / "plain", "--pooling", "gem")
    run(weights, birds, "--out", tmp_path / "out", "--pooling", "gem", "--centre")
    plain = np.load(tmp_path / "plain" / "gem.npy").astype(np.float64)
    mean = plain.mean(0)
    expected = (plain - mean) / np.linalg.norm(plain - mean, axis=1, keepdims=True)
    found = arrays(tmp_path / "out")["gem"].numpy()
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-5)
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert np.allclose(facts["subtracted"], mean, atol=1e-6)
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (facts["weights"], facts["root"]) == (str(weights), str(birds))
    assert "subtracted" not in json.loads((tmp_path / "plain" / "encoder.json").read_text())
