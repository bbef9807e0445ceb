"""Embeddings in files: the numbers evaluation computes, each row the image the table names; kills cost nothing."""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import fastcr
from fastcr import embed as command
from fastcr.config import RationaleConfig
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.measures import embedding_files
from fastcr.measures.embeddings import Embeddings, embed
from fastcr.output.embedding_files import Partial
from fastcr.output.embedding_formats import PACKAGES
from fastcr.runs.checkpoint import write_whole
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu", "--data.workers", "0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture
def batches_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "BATCH_SIZE", 8)
    monkeypatch.setattr(embedding_files, "COMMIT_SECONDS", 0.0)


def run(*args: object) -> None:
    command.main([*map(str, args), *CPU])


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line a command ends with."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [str(i) for i in range(len(rows))]
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def computed(weights: Path, images: ImageList) -> Embeddings:
    console = Console(file=io.StringIO())
    return embed(fastcr.load(weights), images, device=torch.device("cpu"), workers=0, console=console, title="")


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def killed_after_5_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The sixth batch is written, but not yet counted, when the end comes; `undo` of what it gives lets it pass."""
    add = Partial.add

    def until(partial: Partial, *args: object) -> None:
        if partial.images == 40:
            monkeypatch.setattr(partial, "commit", lambda: None)
            add(partial, *args)
            raise Killed
        add(partial, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "add", until)
        yield patch


@pytest.mark.parametrize("released", [False, True])
def test_rows_are_what_evaluation_computes_of_the_images_the_table_names(
    released: bool, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_weights(tmp_path / "weights.safetensors", released=released)
    run(weights, birds, "--out", tmp_path / "out", "--attention", "True")
    assert "96 images embedded (" in capsys.readouterr().out
    assert contents(tmp_path / "out").keys() == {"embeddings.safetensors", "encoder.json", "images.csv"}
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # not the owner's alone
    found, rows, first = load_file(tmp_path / "out" / "embeddings.safetensors"), table(tmp_path / "out"), 0
    assert (found["attention"].shape, found["attention"].dtype) == ((96, 2, 2), torch.float16)
    for split, images in (("train", read_splits(birds).train), ("test", read_splits(birds).test)):
        assert images
        assert images.labels
        expected, part = computed(weights, images), slice(first, first + len(images))
        assert torch.equal(found["mean"][part], expected.mean)
        assert torch.equal(found["rationale"][part], expected.rationale)
        assert torch.equal(found["attention"][part].flatten(1), expected.attention.half())
        assert {row["split"] for row in rows[part]} == {split}
        assert [row["path"] for row in rows[part]] == [f"{split}/{file}" for file in images.files]
        assert [row["label"] for row in rows[part]] == [images.classes[label] for label in images.labels]
        first += len(images)
    assert first == len(rows)
    for row in rows[::10]:
        assert Image.open(birds / row["path"]).size == (int(row["width"]), int(row["height"]))
    with safe_open(tmp_path / "out" / "embeddings.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fastcr"])
    assert (facts["backbone"], facts["image_size"]) == ("resnet18", 32)


def test_numpy_files_hold_the_same_and_so_do_those_of_worker_processes(
    weights: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(weights, birds, "--attention", "True")
    more = ["--out", str(tmp_path / "npy"), "--format", "npy", "--attention", "True", "--data.workers", "2"]
    command.main([str(weights), str(birds), "--run.device", "cpu", *more])
    expected = load_file(tmp_path / f"{birds.name}-embeddings" / "embeddings.safetensors")  # the default of --out
    assert contents(tmp_path / "npy").keys() == {f"{name}.npy" for name in expected} | {"encoder.json", "images.csv"}
    for name, array in expected.items():
        mapped = np.load(tmp_path / "npy" / f"{name}.npy", mmap_mode="r")
        assert mapped.dtype == array.numpy().dtype
        assert np.array_equal(mapped, array.numpy())


def test_without_a_branch_there_is_the_mean_alone(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False))
    run(plain, birds / "test", "--out", tmp_path / "out")
    assert load_file(tmp_path / "out" / "embeddings.safetensors").keys() == {"mean"}
    assert {row["split"] for row in table(tmp_path / "out")} == {""}
    message = fails(capsys, plain, birds, "--out", tmp_path / "more", "--attention", "True")
    assert "no rationale branch" in message
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("format", ["safetensors", "npy", "parquet", "faiss"])
@pytest.mark.usefixtures("batches_of_8")
def test_killed_command_goes_on_and_gives_the_same_bytes(
    format: str,
    weights: Path,
    birds: Path,
    tmp_path: Path,
    killed_after_5_batches: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if format in PACKAGES:
        pytest.importorskip(PACKAGES[format])
    more = [] if format == "faiss" else ["--attention", "True", "--patches", "True"]
    how = [*more, "--format", format]
    with pytest.raises(Killed):
        run(weights, birds, "--out", tmp_path / "out", *how)
    begun = tmp_path / "out" / "partial" / "mean.npy"
    assert np.load(begun)[40:48].any(axis=1).all()  # the sixth batch too
    assert begun.stat().st_blocks * 512 >= begun.stat().st_size  # of what is still to come, too
    assert not (tmp_path / "out" / "images.csv").exists()
    killed_after_5_batches.undo()

    def all_but_the_table(path: Path, write: Callable[[Path], object]) -> None:
        if path.name == "images.csv":
            raise Killed
        write_whole(path, write)

    # again, when all is embedded but the files are not all in place
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_files, "write_whole", all_but_the_table)
        with pytest.raises(Killed):
            run(weights, birds, "--out", tmp_path / "out", *how)
    assert "resuming after 40 of 96 images" in capsys.readouterr().out
    run(weights, birds, "--out", tmp_path / "out", *how)
    assert "resuming after 96 of 96 images" in capsys.readouterr().out
    run(weights, birds, "--out", tmp_path / "whole", *how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_kill_by_the_system_costs_nothing_either(weights: Path, birds: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
from fastcr import embed
from fastcr.measures import embedding_files
embed.BATCH_SIZE, embedding_files.COMMIT_SECONDS = 8, 0
add = embedding_files.Partial.add
def until(partial, *args):
    add(partial, *args)
    if partial.images == 24:
        os.kill(os.getpid(), signal.SIGKILL)
embedding_files.Partial.add = until
embed.main({[str(weights), str(birds), "--out", str(tmp_path / "out"), *CPU, "--run.precision", "fp32"]!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")  # no warning of a library either
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "BATCH_SIZE", 8)
        run(weights, birds, "--out", tmp_path / "out")
        run(weights, birds, "--out", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_full_disk_is_noticed_before_any_work(
    weights: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        message = fails(capsys, weights, birds, "--out", tmp_path / "out")
    assert f"cannot write {tmp_path}/out/partial/mean.npy: No space left on device" in message
    assert not list((tmp_path / "out").iterdir())
    run(weights, birds, "--out", tmp_path / "out")
    assert len(table(tmp_path / "out")) == 96


@pytest.mark.parametrize("other", ["weights", "images", "settings"])
@pytest.mark.usefixtures("batches_of_8")
def test_what_was_begun_with_something_else_is_refused(
    other: str,
    weights: Path,
    birds: Path,
    tmp_path: Path,
    killed_after_5_batches: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, more = Path(shutil.copytree(birds, tmp_path / "birds")), []
    with pytest.raises(Killed):
        run(weights, root, "--out", tmp_path / "out")
    killed_after_5_batches.undo()
    if other == "weights":
        weights = write_weights(tmp_path / "other.safetensors", seed=1)
    elif other == "images":
        next((root / "test").glob("*/*.jpg")).touch()
    else:
        more = ["--attention", "True"]
    before = contents(tmp_path / "out" / "partial")
    message = fails(capsys, weights, root, "--out", tmp_path / "out", *more)
    assert f"{tmp_path}/out/partial was begun with other {other}" in message
    assert "remove that folder" in message
    assert "--out" in message
    assert contents(tmp_path / "out" / "partial") == before
    shutil.rmtree(tmp_path / "out" / "partial")
    run(weights, root, "--out", tmp_path / "out", *more)
    assert len(table(tmp_path / "out")) == 96


@pytest.mark.usefixtures("batches_of_8")
def test_broken_partial_folder_is_refused(
    weights: Path,
    birds: Path,
    tmp_path: Path,
    killed_after_5_batches: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Killed):
        run(weights, birds, "--out", tmp_path / "out")
    os.truncate(tmp_path / "out" / "partial" / "rationale.npy", 1000)
    message = fails(capsys, weights, birds, "--out", tmp_path / "out")
    assert f"{tmp_path}/out/partial/rationale.npy is broken: remove that folder" in message
    state = tmp_path / "out" / "partial" / "state.json"
    before, count = state.read_text(), '"images": 40'
    assert count in before
    for content in ("[]", before.replace(count, '"images": 41'), before.replace(count, '"images": "40"')):
        state.write_text(content)
        assert "state.json is broken" in fails(capsys, weights, birds, "--out", tmp_path / "out")


@pytest.mark.usefixtures("batches_of_8")
def test_a_changed_count_of_images_is_noticed_or_harmless(
    weights: Path,
    birds: Path,
    tmp_path: Path,
    killed_after_5_batches: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Killed):
        run(weights, birds, "--out", tmp_path / "out")
    killed_after_5_batches.undo()
    state = tmp_path / "out" / "partial" / "state.json"
    before = state.read_text()
    count = '"images": 40'
    assert count in before
    state.write_text(before.replace(count, '"images": 64'))
    assert "state.json is broken" in fails(capsys, weights, birds, "--out", tmp_path / "out")
    state.write_text(before.replace(count, '"images": 24'))
    run(weights, birds, "--out", tmp_path / "out")
    run(weights, birds, "--out", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_process_at_it_is_noticed(
    weights: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "partial").mkdir()
    code = f"import fcntl; f = open({str(tmp_path / 'partial' / 'lock')!r}, 'w'); fcntl.lockf(f, 2); input(print(1))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        other.stdout.read(1)
        assert "another process" in fails(capsys, weights, birds, "--out", tmp_path)
        other.stdin.close()
    run(weights, birds, "--out", tmp_path)
    assert len(table(tmp_path)) == 96


def test_finished_files_are_not_overwritten(
    weights: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(weights, birds / "test", "--out", tmp_path)
    before = contents(tmp_path)
    for more in (["--format", "npy"], ["--format", "parquet"], []):
        if "parquet" in more:
            pytest.importorskip("pyarrow")
        message = fails(capsys, weights, birds / "test", "--out", tmp_path, *more)
        assert "images.csv is there already: remove it, or name another --out" in message
        assert contents(tmp_path) == before
    (tmp_path / "images.csv").unlink()
    assert "embeddings.safetensors is there already" in fails(capsys, weights, birds / "test", "--out", tmp_path)


@pytest.mark.usefixtures("batches_of_8")
def test_unreadable_images_are_named_counted_and_left_out(
    weights: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(birds / "test", tmp_path / "birds"))
    files = read_splits(root).train.files
    broken = [0, 5, *range(16, 24)]  # the last eight are a whole batch
    for index in broken:
        (root / files[index]).write_bytes(b"no picture")
    run(weights, root, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "22 images embedded, 10 unreadable left out" in out
    assert all(repr(str(root / files[index])) in out for index in broken)
    kept = [index for index in range(32) if index not in broken]
    assert [row["path"] for row in table(tmp_path / "out")] == [files[index] for index in kept]
    expected = computed(weights, read_splits(birds / "test").train)
    found = load_file(tmp_path / "out" / "embeddings.safetensors")
    torch.testing.assert_close(found["mean"], expected.mean[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["rationale"], expected.rationale[kept], atol=1e-5, rtol=0)

    for file in files:
        (root / file).write_bytes(b"")
    message = fails(capsys, weights, root, "--out", tmp_path / "none")
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


def test_encoder_json_says_which_encoder_it_was(weights: Path, birds: Path, tmp_path: Path) -> None:
    run(weights, birds, "--out", tmp_path / "out", "--format", "npy")
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert (facts["weights"], facts["root"]) == (str(weights), str(birds))
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (facts["backbone"], facts["image_size"]) == ("resnet18", 32)


def test_parquet_holds_a_row_an_image_and_a_row_a_patch(weights: Path, birds: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run(weights, birds, "--out", tmp_path / "plain", "--attention", "True", "--patches", "True")
    run(weights, birds, "--out", tmp_path / "out", "--format", "parquet", "--patches", "True")
    assert contents(tmp_path / "out").keys() == {"embeddings.parquet", "patches.parquet", "encoder.json", "images.csv"}
    expected, rows = load_file(tmp_path / "plain" / "embeddings.safetensors"), table(tmp_path / "out")
    assert rows == table(tmp_path / "plain")
    found = parquet.read_table(tmp_path / "out" / "embeddings.parquet")
    assert json.loads(found.schema.metadata[b"fastcr"]) == json.loads((tmp_path / "out" / "encoder.json").read_text())
    images = found.to_pylist()
    assert np.array_equal(np.float32([each["embedding"] for each in images]), expected["rationale"].numpy())
    assert [each["label"] for each in images] == [row["label"] for row in rows]
    for each, row in zip(images, rows, strict=True):
        assert [each["path"], str(each["width"])] == [row["path"], row["width"]]
        assert np.float32([row["peak_x"], row["peak_y"]]).tolist() == [each["peak_x"], each["peak_y"]]

    features = fastcr.load(weights).features
    patches = parquet.read_table(tmp_path / "out" / "patches.parquet").to_pylist()
    assert len(patches) == 4 * 96
    vectors = torch.tensor([each["embedding"] for each in patches]).view(96, 4, 256)
    assert torch.equal(vectors, expected["patches"])
    picture = fastcr.load(weights).transform(Image.open(birds / rows[7]["path"]))
    with torch.inference_mode():
        alone = torch.nn.functional.normalize(features(picture[None]), dim=1).flatten(2)[0].T
    torch.testing.assert_close(vectors[7], alone, atol=1e-5, rtol=0)
    for i, row in enumerate(rows):
        own = patches[4 * i : 4 * i + 4]
        assert {each["path"] for each in own} == {row["path"]}
        assert all(a["x"] < b["x"] and a["y"] == b["y"] for a, b in (own[:2], own[2:]))
        assert own[0]["y"] < own[2]["y"]
        assert [each["attention"] for each in own] == expected["attention"][i].flatten().tolist()
        most = max(own, key=lambda each: each["attention"])
        near = [each for each in own if each["attention"] == most["attention"]]  # fp16 may make two alike
        peak = float(row["peak_x"]), float(row["peak_y"])
        assert min(abs(each["x"] - peak[0]) + abs(each["y"] - peak[1]) for each in near) < 2e-4


def test_parquet_without_labels_branch_or_utf8(flat: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False))
    (tmp_path / "root").mkdir()
    for name, file in zip([b"a.jpg", b"\xff.jpg"], flat.iterdir(), strict=False):
        shutil.copyfile(file, tmp_path / "root" / os.fsdecode(name))
    run(plain, tmp_path / "root", "--out", tmp_path / "out", "--format", "parquet", "--patches", "True")
    found = parquet.read_table(tmp_path / "out" / "embeddings.parquet").to_pylist()
    assert [each["path"] for each in found] == ["a.jpg", "\\xff.jpg"]
    assert {(each["label"], each["peak_x"], each["peak_y"]) for each in found} == {(None, None, None)}
    assert [row["peak_x"] for row in table(tmp_path / "out")] == ["", ""]
    patches = parquet.read_table(tmp_path / "out" / "patches.parquet").to_pylist()
    assert {each["attention"] for each in patches} == {None}
    mean = np.mean([each["embedding"] for each in patches[:4]], axis=0)
    assert np.dot(mean, found[0]["embedding"]) > 0.9 * np.linalg.norm(mean)


def test_faiss_finds_what_a_product_finds(weights: Path, birds: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    run(weights, birds, "--out", tmp_path / "plain")
    run(weights, birds, "--out", tmp_path / "out", "--format", "faiss")
    assert contents(tmp_path / "out").keys() == {"embeddings.faiss", "encoder.json", "images.csv"}
    assert table(tmp_path / "out") == table(tmp_path / "plain")
    index = faiss.read_index(str(tmp_path / "out" / "embeddings.faiss"))
    expected = load_file(tmp_path / "plain" / "embeddings.safetensors")["rationale"].numpy()
    assert isinstance(index, faiss.IndexFlatIP)
    assert np.array_equal(index.reconstruct_n(0, 96), expected)


@pytest.mark.parametrize("format", PACKAGES)
def test_a_missing_extra_is_named_before_any_work(
    format: str,
    weights: Path,
    birds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[format], None)
    message = fails(capsys, weights, birds, "--out", tmp_path / "out", "--format", format)
    assert f'needs {PACKAGES[format]}: pip install "fastcr[{format}]"' in message
    assert not (tmp_path / "out").exists()


def test_text_files_that_list_images_are_roots_too(weights: Path, flat: Path, tmp_path: Path) -> None:
    files = sorted(file.name for file in flat.iterdir())[:5]
    (tmp_path / "list.txt").write_text("".join(f"{flat / file}\tlabel {file}\n" for file in files))
    run(weights, tmp_path / "list.txt", "--out", tmp_path / "out")
    found = [(row["path"], row["split"], row["label"]) for row in table(tmp_path / "out")]
    assert found == [(str(flat / file), "", f"label {file}") for file in files]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "ROOT"], "no run folder or weights file nowhere"),
        (["ROOT", "ROOT"], "is not a run folder"),
        (["WEIGHTS", "nowhere"], "no folder nowhere"),
        (["WEIGHTS"], "missing"),
        (["WEIGHTS", "ROOT", "--format", "csv"], "format"),
        (["WEIGHTS", "ROOT", "--format", "faiss", "--attention", "True"], "need another --format"),
        (["WEIGHTS", "ROOT", "--format", "faiss", "--patches", "True"], "need another --format"),
        (["WEIGHTS", "ROOT", "--data.workers", "-1"], "--data.workers must be at least 0"),
        (["WEIGHTS", "ROOT", "--run.device", "tpu"], "--run.device must be"),
        (["WEIGHTS", "ROOT", "--out", "WEIGHTS"], "weights.safetensors"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str],
    message: str,
    weights: Path,
    birds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    stands_for = {"ROOT": str(birds), "WEIGHTS": str(weights)}
    with pytest.raises(SystemExit) as stop:
        command.main([stands_for.get(each, each) for each in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.lower() in line.lower()


def test_encoder_may_run_in_bf16(weights: Path) -> None:
    encoder = fastcr.load(weights)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, rounded = encoder.both(images), encoder.both(images, torch.bfloat16)
    for a, b in zip(exact, rounded, strict=True):
        assert a is not None
        assert b is not None
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.03, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_nearly_the_same(weights: Path, birds: Path, tmp_path: Path) -> None:
    run(weights, birds, "--out", tmp_path / "cpu")
    command.main([str(weights), str(birds), "--out", str(tmp_path / "cuda"), "--run.device", "cuda"])
    cpu, cuda = (load_file(tmp_path / name / "embeddings.safetensors") for name in ("cpu", "cuda"))
    for name in ("mean", "rationale"):
        assert (cpu[name] * cuda[name]).sum(1).min() > 0.99


def test_command_works_as_a_module(weights: Path, flat: Path, tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "fastcr.embed",
        str(weights),
        str(flat),
        "--out",
        str(tmp_path / "out"),
        *CPU,
        "--run.precision",
        "fp32",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"embeddings: {tmp_path}/out"
    assert done.stderr == ""
