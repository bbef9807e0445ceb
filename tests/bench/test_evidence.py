"""Studies over choices and seeds: what is run, what is not run again, and the tables made of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import spearmanr

from bench import evidence, evidence_table
from fastcr import evaluate, train
from fastcr.errors import UsageError
from fastcr.runs.command_line import read_command_line

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = (
    "--data.image_size", "32", "--data.loader", "torch", "--data.workers", "0", "--run.device", "cpu",
    "--run.log_every", "1", "--run.steps", "2", "--model.backbone", "resnet18", "--model.last_stage", "layer3",
    "--model.weights", "none", "--optim.batch_size", "8", "--moco.queue_size", "20", "--moco.embedding_dim", "16",
    "--rationale.detectors", "4",
)  # fmt: skip
ROWS = ("bad", "untrained", "match-256-k1")
RESULTS = evidence.ROOT / "bench" / "results"


def settings(birds: Path, out: Path, *rows: str, boxes: Path | None = None) -> evidence.StudyConfig:
    return evidence.StudyConfig(out, evidence.StudyData(birds, boxes, classes=3), rows=rows)


def in_process(command: Sequence[str], log: Path) -> int:
    """What a process of its own would do, without the seconds it takes to import torch."""
    mains = {"fastcr.train": train.main, "fastcr.evaluate": evaluate.main}
    main, args = mains[command[1]], command[2:]
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            main(args)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evidence.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three rows, one of which cannot be trained, with boxes; not to be changed."""
    out = tmp_path_factory.mktemp("study")
    names = [f"test/{file.parent.name}/{file.name}" for file in (birds / "test").glob("*/*.jpg")]
    boxes = "path,left,top,right,bottom\n" + "".join(f"{name},0,0,0.5,1\n" for name in names)  # the left halves
    (out / "boxes.csv").write_text(boxes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evidence.ROWS, "bad", ("no number", "--optim.lr 1e30"))
        patch.setattr(evidence, "carry_out", in_process)
        evidence.study(settings(birds, out, *ROWS, boxes=out / "boxes.csv"), TINY, Console(quiet=True))
    return out


def test_every_row_is_a_run_of_its_own_with_its_figures(finished: Path) -> None:
    bad, untrained, matched = content(finished)["runs"].values()
    assert bad["status"] == "training failed"
    assert "the weights are not finite" in bad["error"]
    results = json.loads((finished / "match-256-k1-seed0" / "results.json").read_text())
    for section in ("retrieval", "knn"):
        for pooling, scores in results[section].items():
            assert matched[section][pooling] == pytest.approx(scores, abs=1e-3)
    assert matched["localisation"]["uniform"]["inside"] == pytest.approx(50, abs=1)
    assert matched["last"]["step"] == 2
    assert matched["facts"].keys() == {"torch", "commit", "device"}
    assert untrained["last"] == {}
    assert str(finished) not in (finished / "evidence.json").read_text()


def test_what_is_there_is_not_run_again(
    finished: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evidence.ROWS, "bad", ("no number", "--optim.lr 1e30"))
    out = shutil.copytree(finished, tmp_path / "study", symlinks=True)
    began = list[str]()

    def make(job: evidence.Job) -> dict[str, Any]:
        began.append(job.folder.name)
        return {"row": job.row, "status": "measuring failed", "flags": []}

    monkeypatch.setattr(evidence, "make", make)
    again = settings(birds, out, *ROWS, boxes=out / "boxes.csv")
    evidence.study(again, TINY, Console(quiet=True))
    assert began == []
    assert content(out) == content(finished)
    # a failed training is made again once its folder is gone; a run that was stopped is in no evidence.json
    shutil.rmtree(out / "bad-seed0")
    study = content(out)
    del study["runs"]["match-256-k1-seed0"]
    (out / "evidence.json").write_text(json.dumps(study))
    evidence.study(again, TINY, Console(quiet=True))
    assert began == ["bad-seed0", "match-256-k1-seed0"]
    with pytest.raises(UsageError, match="begun with other common"):
        evidence.study(again, (*TINY, "--optim.lr", "1"), Console(quiet=True))
    monkeypatch.setitem(evidence.ROWS, "untrained", ("", "--run.steps 2"))
    with pytest.raises(UsageError, match="untrained-seed0 was made with other flags"):
        evidence.study(again, TINY, Console(quiet=True))


def test_a_stopped_training_is_resumed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = list[Sequence[str]]()

    def carry_out(command: Sequence[str], log: Path) -> int:
        log.write_text("stopped")
        commands.append(command)
        return 2

    monkeypatch.setattr(evidence, "carry_out", carry_out)
    half_done = shutil.copytree(finished / "match-256-k1-seed0", tmp_path / "match-256-k1-seed0")
    for folder in (tmp_path / "new", half_done):
        evidence.make(evidence.Job("match-256-k1", 3, folder, finished, None, TINY))
    assert list(commands[0])[:3] == ["-m", "fastcr.train", "folder"]
    assert commands[1] == ["-m", "fastcr.train", "--resume", str(half_done)]


def test_a_process_that_a_signal_ended_is_no_failed_run(tmp_path: Path) -> None:
    log = tmp_path / "row-seed0.log"
    assert evidence.carry_out(["-c", "print('said'); raise SystemExit(3)"], log) == 3
    assert log.read_text().splitlines()[-1] == "said"
    with pytest.raises(UsageError, match="row-seed0 was stopped by a signal"):
        evidence.carry_out(["-c", "import os; os.kill(os.getpid(), 15)"], log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "relationall"], "no row 'relationall'"),
        (["--rows", "relational", "--", "--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["--data.boxes", "nowhere.csv"], "no file nowhere.csv"),
    ],
)
def test_mistakes_cost_one_line(
    arguments: list[str], message: str, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evidence.main(["--data.root", str(birds), "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_classes_can_be_skipped(birds: Path, tmp_path: Path) -> None:
    names = sorted(each.name for each in (birds / "train").iterdir())
    folder = evidence.some_classes(evidence.StudyData(birds, classes=2, skip=3), tmp_path)
    for split in ("train", "test"):
        assert sorted(each.name for each in (folder / split).iterdir()) == names[3:5]
        assert all(any(each.glob("*.jpg")) for each in (folder / split).iterdir())


def test_the_flags_of_every_row_are_known(tmp_path: Path) -> None:
    for row in evidence.ROWS:
        read_command_line(evidence.training(evidence.Job(row, 0, tmp_path, tmp_path, None, ())))


def test_the_table_has_means_and_ranges() -> None:
    figures = [("frozen", 0, 12.0), ("moco", 0, 10.0), ("moco", 1, 14.05), ("moco", 2, 12.2)]
    runs = {
        f"{row}-seed{seed}": {
            "row": row, "seed": seed, "meaning": f"what {row} is", "flags": [], "status": "finished", "images": 99,
            "facts": {"torch": "2.15"}, "retrieval": {"mean": {"rank1": rank1}},
        }
        for row, seed, rank1 in figures
    }  # fmt: skip
    broken = {"row": "moco", "meaning": "what moco is", "flags": [], "status": "training failed", "error": "no number"}
    study = {"data": "birds", "common": ["--optim.epochs", "2"], "runs": runs | {"moco-seed3": broken}}
    text = evidence_table.tables(study)
    assert "| row | seeds | rank-1, mean |\n" in text  # columns that nobody measured are left out
    assert "| `moco` | 3 | 12.1 [10.0, 14.1] |\n" in text  # (10 + 14.05 + 12.2) / 3 = 12.083
    assert "- moco-seed3: training failed: no number" in text
    assert "Every run: `--optim.epochs 2`" in text


@pytest.mark.parametrize("study", sorted(RESULTS.glob("evidence_*.json")), ids=lambda study: study.stem)
def test_the_committed_tables_are_those_of_their_runs(study: Path) -> None:
    assert study.with_suffix(".md").read_text() == evidence_table.tables(evidence_table.read(study))


def test_what_the_documentation_says_of_figures_without_labels() -> None:
    found = list[tuple[str, float, float, float]]()
    for study in sorted(RESULTS.glob("evidence_*.json")):
        for run in json.loads(study.read_text())["runs"].values():
            if "kept_neighbours" in (last := run.get("last") or {}):
                gained = run["best"]["trained"]["mAP"] - run["best"]["baseline"]["mAP"]
                found.append((study.stem, gained, last["kept_neighbours"], last["effective_rank"]))
    page = (RESULTS.parents[1] / "docs" / "evaluation.md").read_text()
    names = {"all": "", "EfficientNet-Lite0 at 112 px": "evidence_lite_", "ResNet-18 up to layer3": "evidence_trunk_"}
    for name, start in names.items():
        _, gained, *figures = zip(*(row for row in found if row[0].startswith(start)), strict=True)
        kept, rank = (spearmanr(each, gained).statistic for each in figures)
        assert f"| {name} | {len(gained)} | {kept:+.2f} | {rank:+.2f} |" in page
    assert sorted(round(kept, 2) for _, gained, kept, _ in found if gained < 0) == [0.31, 0.35, 0.55]
