"""Where records go besides the run's own files: the same numbers everywhere, one run through a resume, and failures."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcr import train
from tests.shared import SHORT, TINY, records

pytestmark = pytest.mark.usefixtures("one_thread")
SHEET = (8 + 6 * (2 * 32 + 8), 8 + 2 * (32 + 8))  # two rows of six pairs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb may leave files in the working folder, and must not reach a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # what a run sets is taken back
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    if "wandb" in sys.modules:  # it reads its variables once
        sys.modules["wandb"].teardown()


def run(root: Path, folder: Path, *more: str) -> dict[tuple[str, int], float]:
    """Train to step 9, then resume to step 17, with an evaluation after 8 and 16 and at each end.

    Returns every number of the run folder's own files, by name and step.
    """
    args = [*TINY, *SHORT, "--run.eval_every", "1", "--data.root", root, "--run.dir", folder, "--run.steps", "9", *more]
    train.main(list(map(str, args)))
    train.main(["--resume", str(folder), "--run.steps", "17"])
    found = {
        (name, round(record["step"])): value
        for record in records(folder)
        for name, value in record.items()
        if name not in ("step", "epoch")
    }
    for entry in map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines()):
        for section in ("retrieval", "knn"):
            for pooling, scores in entry[section].items():
                for measure, value in scores.items():
                    found[f"{section}/{pooling}/{measure}", 8 * entry["epoch"]] = value
    assert len({step for _, step in found}) == 17
    return found


def test_tensorboard_has_every_number_and_the_attention_of_each_evaluation(birds: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = run(birds, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = {(tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)  # events hold fp32
    pictures = events.Images("attention")
    assert [each.step for each in pictures] == [8, 9, 16, 17]
    assert {(each.width, each.height) for each in pictures} == {SHEET}
    assert pictures[0].encoded_image_string != pictures[2].encoded_image_string


def offline_records(folder: Path) -> Iterator[Any]:
    """What wandb wrote: protobuf messages in LevelDB's log format: blocks of 32 KiB, parts with a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # the whole of a message, or its end
                yield Record.FromString(whole)
                whole = b""


def test_wandb_offline_has_every_number_in_one_run(birds: Path, tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    expected = run(birds, folder, "--run.track", "wandb")
    said, errors = capfd.readouterr()
    assert said.count(f"wandb: {folder / 'wandb'} (offline)\n") == 2
    assert "wandb" not in errors
    ids, settings, found = set(), {}, {}
    for record in offline_records(folder):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        found |= {(name, record.history.step.num): value for name, value in row.items()}
    assert ids == {(folder / "wandb-id.txt").read_text()}
    assert (settings["optim"]["batch_size"], settings["data"]["root"]) == (8, str(birds))
    assert {key: found[key] for key in expected} == expected
    assert {step for name, step in found if name == "attention/width"} == {8, 9, 16, 17}


def test_a_missing_extra_is_one_line_and_nothing_begins(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()  # as a run leaves it in its working folder: it is not the package
    args = [*TINY, "--data.root", flat, "--run.dir", tmp_path / "run", "--run.track", "wandb"]
    assert 'wandb needs wandb: pip install "fastcr[wandb]"' in refused(train.main, *args)
    assert not (tmp_path / "run").exists()


def test_a_sink_that_fails_is_one_line_and_the_run_continues(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    args = [*TINY, "--data.root", flat, "--run.dir", tmp_path / "run", "--run.steps", "3"]
    train.main(list(map(str, args)))
    said, errors = capfd.readouterr()
    warnings = [line for line in said.splitlines() if "warning" in line]
    assert warnings == ["warning: TensorBoard failed, so nothing more is logged there: no route to anywhere"]
    assert errors == ""
    assert len(records(tmp_path / "run")) == 3
