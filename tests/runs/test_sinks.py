"""Where records go besides the run's own files: the same numbers everywhere, one run through a resume, and failures."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastcr import evaluate, train
from fastcr.config import Config
from fastcr.runs import sinks
from fastcr.runs.sinks import SINKS, Sink
from tests.shared import SHORT, TINY, records

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = [*TINY, *SHORT, "--run.eval_every", "1"]
SHEET = (8 + 4 * (2 * 112 + 8), 8 + 2 * (112 + 20 + 8))  # two rows of four pairs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers may leave files in the working folder; none may reach a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # whatever a run sets is taken back
        monkeypatch.delenv(name)
    if "wandb" in sys.modules:  # it reads its variables once
        sys.modules["wandb"].teardown()


def run(root: Path, folder: Path, *more: str) -> None:
    """From nothing to step 9, and then to step 17: an evaluation after 8 and 16, and one at each end."""
    train.main([*RUN, "--data.root", str(root), "--run.dir", str(folder), "--run.steps", "9", *more])
    train.main(["--resume", str(folder), "--run.steps", "17"])


def numbers(folder: Path) -> set[tuple[str, int, float]]:
    """Every number of metrics.jsonl."""
    every = ((name, round(record["step"]), each) for record in records(folder) for name, each in record.items())
    return {each for each in every if each[0] not in ("step", "epoch")}


def evaluations(folder: Path) -> set[tuple[str, int, float]]:
    """The scores of evaluations.jsonl, by the names and the steps they are logged with."""
    entries = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    return {
        (f"{section}/{pooling}/{measure}", 8 * entry["epoch"], value)
        for entry in entries
        for section in ("retrieval", "knn")
        for pooling, scores in entry[section].items()
        for measure, value in scores.items()
    }


def test_tensorboard_has_every_number_and_the_attention_of_each_evaluation(birds: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(birds, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = {(tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)}
    expected = {(tag, step): value for tag, step, value in numbers(tmp_path / "run") | evaluations(tmp_path / "run")}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)  # events hold fp32
    assert {tag for tag, step in found if step == 17} >= {"retrieval/mean/rank1", "knn/rationale/top1", "loss"}
    pictures = events.Images("attention")
    assert [each.step for each in pictures] == [8, 9, 16, 17]
    assert {(each.width, each.height) for each in pictures} == {SHEET}
    assert pictures[0].encoded_image_string != pictures[2].encoded_image_string


def test_knn_during_training_is_that_of_evaluate(
    birds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train.main([*RUN, "--data.root", str(birds), "--run.dir", str(folder), "--run.steps", "9"])
    said = capfd.readouterr().out
    (entry,) = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    best = tmp_path / "best"  # the weights it is of
    best.mkdir()
    (best / "weights.safetensors").write_bytes((folder / "best.safetensors").read_bytes())
    (best / "init.safetensors").write_bytes((folder / "init.safetensors").read_bytes())
    (best / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    evaluate.main([str(best), "--linear.enabled", "False", "--run.device", "cpu", "--data.workers", "0"])
    results = json.loads((best / "results.json").read_text())
    assert entry["knn"] == results["knn"]
    for name in ("mean", "rationale"):
        now, before = entry["knn"][name]["top1"], results["frozen_init"]["knn"][name]["top1"]
        assert f"  kNN {name} {now:.2f} (frozen init {before:.2f})" in said


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


def test_wandb_offline_has_every_number_in_one_run(
    birds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    run(birds, folder, "--run.track", "wandb")
    said, errors = capfd.readouterr()
    assert said.count(f"wandb: {folder / 'wandb'} (offline)\n") == 2
    assert "wandb" not in errors
    runs, found = [], {}
    for record in offline_records(folder):
        if record.HasField("run"):
            runs.append(record.run)
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            found[name, record.history.step.num] = json.loads(item.value_json)
    assert {each.run_id for each in runs} == set(json.loads((folder / "tracker.json").read_text()).values())
    assert {(each.project, each.display_name) for each in runs} == {("fastcr", "run")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["optim.batch_size"], config["data.root"]) == (8, str(birds))
    expected = {(name, step): value for name, step, value in numbers(folder) | evaluations(folder)}
    assert {key: found[key] for key in expected} == expected
    widths = {step: width for (name, step), width in found.items() if name == "attention/width"}
    assert widths == dict.fromkeys((8, 9, 16, 17), SHEET[0])


def test_mlflow_in_a_file_has_every_number_in_one_run(
    birds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path / "run"
    run(birds, folder, "--run.track", "mlflow")
    said, errors = capfd.readouterr()
    assert said.count(f"mlflow: sqlite:///{tmp_path}/mlflow.db\n") == 2
    assert errors == ""
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'fastcr'")
    (only,) = client.search_runs([experiment.experiment_id])
    assert (only.info.run_name, only.info.status) == ("run", "FINISHED")
    assert {"mlflow": only.info.run_id} == json.loads((folder / "tracker.json").read_text())
    assert (only.data.params["optim.batch_size"], only.data.params["preset"]) == ("8", "synthetic")
    histories = (client.get_metric_history(only.info.run_id, name) for name in only.data.metrics)
    found = {(each.key, each.step, each.value) for history in histories for each in history}
    assert found >= numbers(folder) | evaluations(folder)
    pictures = [Path(file.path) for file in client.list_artifacts(only.info.run_id, "images")]
    sheets = [file for file in pictures if file.suffix == ".png"]
    assert sorted(int(file.name.split("step")[1][1:].split("+")[0]) for file in sheets) == [8, 9, 16, 17]
    assert Image.open(client.download_artifacts(only.info.run_id, str(sheets[0]), str(tmp_path))).size == SHEET


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_extra_is_one_line_and_nothing_begins(
    name: str, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    args = [*TINY, "--data.root", flat, "--run.dir", tmp_path / "run", "--run.track", name]
    monkeypatch.setitem(sys.modules, name, None)
    assert f'--run.track {name} needs {name}: pip install "fastcr[{name}]"' in refused(train.main, *args)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_wandb_left_is_not_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(sinks.UsageError, match=r"fastcr\[wandb\]"):
        sinks.check_tracker("wandb")


@pytest.mark.parametrize("fails", ["opening", "scalars", "image", "close"])
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(
    fails: str, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def part(name: str) -> Callable[..., None]:
        def call(*args: object) -> None:
            calls.append(name)
            if name == fails:
                raise ConnectionError("no route\nto anywhere")

        return call

    def open_sink(folder: Path, config: Config, start: int) -> Sink:
        part("opening")()
        return Sink("mlflow", "nowhere", part("scalars"), part("image"), part("close"))

    monkeypatch.setitem(SINKS, "mlflow", open_sink)
    monkeypatch.setattr(train, "check_tracker", lambda name: None)
    folder = tmp_path / "run"
    args = [*RUN, "--data.root", birds, "--run.dir", folder, "--run.track", "mlflow", "--run.steps", "9"]
    train.main([*map(str, args)])
    said, errors = capfd.readouterr()
    warnings = [line for line in said.splitlines() if "mlflow" in line and "warning" in line]
    assert warnings == ["warning: mlflow failed, so nothing more is logged there: no route to anywhere"]
    assert errors == ""
    assert calls.count(fails) == 1
    assert calls[-1] == fails  # nothing more is asked of it
    assert len(records(folder)) == 9
    assert (folder / "results.json").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_without_a_network_a_run_is_trained_without_its_tracker(
    name: str, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(name)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", nobody)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    monkeypatch.setattr(sinks, "SECONDS", 3)
    train.main([*TINY, "--data.root", str(flat), "--run.dir", str(tmp_path / "run"), "--run.steps", "2",
                "--run.track", name])  # fmt: skip
    said = capfd.readouterr().out
    (line,) = [line for line in said.splitlines() if "warning" in line and name in line]
    assert line.startswith(f"warning: {name} failed, so nothing more is logged there: ")
    assert len(records(tmp_path / "run")) == 2
