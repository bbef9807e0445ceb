"""Studies over choices and seeds: what is run, what is not run again, and the tables made of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import evidence, evidence_run, evidence_table, gradcam_inside
from fastcr import evaluate, train
from fastcr.runs.command_line import GONE, read_command_line, todays_flags

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = (
    "--data.image_size", "32", "--data.loader", "torch", "--data.workers", "0", "--run.device", "cpu",
    "--run.log_every", "1", "--run.steps", "2", "--model.backbone", "resnet18", "--model.last_stage", "layer3",
    "--model.weights", "none", "--optim.batch_size", "8", "--moco.queue_size", "20", "--moco.embedding_dim", "16",
    "--rationale.detectors", "4",
)  # fmt: skip
CLASSES = 3


def settings(birds: Path, out: Path, *rows: str, boxes: Path | None = None) -> evidence.StudyConfig:
    data = evidence.StudyData(birds, boxes, classes=CLASSES)
    return evidence.StudyConfig(out, data, rows=rows)


def in_process(self: evidence_run.Processes, command: Sequence[str], log: Path, threads: int) -> int:
    """What a process of its own would do, without the seconds it takes to import torch."""
    mains = {"fastcr.train": train.main, "fastcr.evaluate": evaluate.main}
    main, args = (mains[command[1]], command[2:]) if command[0] == "-m" else (gradcam_inside.main, command[1:])
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            main(args)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def write_boxes(birds: Path, path: Path) -> Path:
    """The left half of every test picture."""
    names = [f"test/{file.parent.name}/{file.name}" for file in (birds / "test").glob("*/*.jpg")]
    path.write_text("path,left,top,right,bottom\n" + "".join(f"{name},0,0,0.5,1\n" for name in names))
    return path


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evidence.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four rows, one of which cannot be trained; not to be changed."""
    out = tmp_path_factory.mktemp("study")
    boxes = write_boxes(birds, out / "boxes.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evidence.ROWS, "bad", ("no number", ("--optim.lr", "1e30")))
        patch.setattr(evidence_run.Processes, "run", in_process)
        rows = ("bad", "frozen", "moco", "sum-loss-stopped")
        evidence.study(settings(birds, out, *rows, boxes=boxes), TINY, Console(quiet=True))
    return out


def test_every_row_is_a_run_of_its_own_with_its_figures(finished: Path) -> None:
    study = content(finished)
    frozen, moco, fitted = (study["runs"][f"{row}-seed0"] for row in ("frozen", "moco", "sum-loss-stopped"))
    assert [run["status"] for run in (frozen, moco, fitted)] == ["finished"] * 3
    results = json.loads((finished / "sum-loss-stopped-seed0" / "results.json").read_text())
    assert results["classes"] == CLASSES
    for pooling, scores in results["retrieval"].items():
        assert fitted["retrieval"][pooling] == pytest.approx(scores, abs=1e-3)
    for pooling, scores in results["knn"].items():
        assert fitted["knn"][pooling] == pytest.approx(scores, abs=1e-3)
    assert fitted["localisation"]["uniform"]["inside"] == pytest.approx(50, abs=1)
    assert fitted["last"]["step"] == 2
    assert fitted["last"].keys() >= {"contrast_loss", "fit_loss", "attention_entropy", "effective_detectors"}
    assert fitted["facts"].keys() == {"torch", "commit", "device"}
    # the frozen row is step 0, whatever its one step did
    results = json.loads((finished / "frozen-seed0" / "results.json").read_text())
    assert frozen["localisation"]["attention"]["inside"] == pytest.approx(
        results["frozen_init"]["localisation"]["attention"]["inside"], abs=1e-3
    )
    assert "rationale" not in moco["retrieval"]
    assert "fit_loss" not in moco["last"]
    assert str(finished) not in (finished / "evidence.json").read_text()


def test_gradcam_is_that_of_the_run(finished: Path) -> None:
    runs = content(finished)["runs"]
    assert runs["moco-seed0"]["gradcam"].keys() == {"score", "loss", "head"}
    found = runs["sum-loss-stopped-seed0"]["gradcam"]
    assert found["target"] == found["loss"] != found["score"]  # its own sign, divided by its sum
    assert found["target"].keys() >= {"inside", "average inside", "gaussian inside"}
    for retrieved in (found.pop("head"), found.pop("average map")):
        assert 0 <= retrieved["rank1"] <= retrieved["rank5"] <= 100
        assert retrieved["mAP"] > 0
    assert all(0 <= value <= 100 for scores in found.values() for value in scores.values())


def test_a_run_that_fails_is_recorded_and_the_others_go_on(finished: Path) -> None:
    bad = content(finished)["runs"]["bad-seed0"]
    assert bad["status"] == "training failed"
    assert "the loss is not a finite number" in bad["error"]


def test_what_is_there_is_not_run_again(
    finished: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evidence.ROWS, "bad", ("no number", ("--optim.lr", "1e30")))
    out = shutil.copytree(finished, tmp_path / "study", symlinks=True)
    began = list[str]()

    def carry_out(job: evidence_run.Job, *_: Any) -> None:
        began.append(job.folder.name)

    monkeypatch.setattr(evidence, "carry_out", carry_out)
    again = settings(birds, out, "frozen", "moco", "bad", "sum-loss-stopped", boxes=out / "boxes.csv")
    evidence.study(again, TINY, Console(quiet=True))
    assert began == []
    assert content(out) == content(finished)
    # a failed training once its folder is gone; a run stopped half-way is in no evidence.json
    shutil.rmtree(out / "bad-seed0")
    study = content(out)
    del study["runs"]["moco-seed0"]
    (out / "evidence.json").write_text(json.dumps(study))
    evidence.study(again, TINY, Console(quiet=True))
    assert sorted(began) == ["bad-seed0", "moco-seed0"]
    with pytest.raises(evidence.UsageError, match="begun with other common"):
        evidence.study(again, (*TINY, "--optim.lr", "1"), Console(quiet=True))
    monkeypatch.setitem(evidence.ROWS, "frozen", ("", ("--run.steps", "2")))
    with pytest.raises(evidence.UsageError, match="frozen-seed0 was made with other flags"):
        evidence.study(again, TINY, Console(quiet=True))


def test_a_run_stopped_half_way_is_resumed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = list[list[str]]()

    def run(self: evidence_run.Processes, command: list[str], log: Path, threads: int) -> int:
        commands.append(command)
        return -15

    monkeypatch.setattr(evidence_run.Processes, "run", run)
    for name, there in (("new", False), ("moco-seed0", True)):
        folder = shutil.copytree(finished / name, tmp_path / name) if there else tmp_path / name
        job = evidence_run.Job("moco", 3, finished, None, TINY, folder, 1)
        assert evidence_run.carry_out(job, evidence_run.Processes(), lambda what: None) is None
    new, half_done = commands
    assert new[:3] == ["-m", "fastcr.train", "folder"]
    assert new[-8:-4] == ["--rationale.enabled", "False", "--run.seed", "3"]
    assert half_done == ["-m", "fastcr.train", "--resume", str(tmp_path / "moco-seed0")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "mocco"], "no row 'mocco'"),
        (["--rows", "moco", "--", "--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["--jobs", "0"], "--jobs"),
        (["--data.skip", "2"], "--data.skip"),
        (["--data.classes", "2", "--data.skip", "999"], "there are none"),
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
    assert line.startswith("bench/evidence.py: error: ")
    assert message in line
    assert not (tmp_path / "out" / "evidence.json").exists()


def test_classes_can_be_passed_over(birds: Path, tmp_path: Path) -> None:
    names = sorted(each.name for each in (birds / "train").iterdir())
    for skip, expected in ((0, names[:2]), (3, names[3:5])):
        folder = evidence.some_classes(birds, skip, 2, tmp_path)
        for split in ("train", "test"):
            assert sorted(each.name for each in (folder / split).iterdir()) == expected
            assert all(any(each.glob("*.jpg")) for each in (folder / split).iterdir())
    data = evidence.StudyData(birds, classes=2, skip=3)
    study = evidence.open_study(evidence.StudyConfig(tmp_path / "study", data, rows=("moco",)), ())
    assert study["data"].endswith(", classes 4 to 5")


def test_a_process_is_of_fastcr_and_its_words_are_kept(tmp_path: Path) -> None:
    log, processes = tmp_path / "log", evidence_run.Processes()
    code = "import os, sys; print('said'); print('wrong', os.environ['PYTHONPATH'], file=sys.stderr); sys.exit(3)"
    assert processes.run(["-c", code], log, 1) == 3
    said, wrong = log.read_text().splitlines()[-2:]
    assert said == "said"
    assert wrong.startswith(f"wrong {evidence_run.ROOT}")
    assert not processes.running


def test_stopping_ends_what_runs_and_what_would_begin(tmp_path: Path) -> None:
    processes, statuses = evidence_run.Processes(), list[int]()
    command = ["-c", "import time; print('here'); time.sleep(60)"]
    thread = threading.Thread(target=lambda: statuses.append(processes.run(command, tmp_path / "log", 1)))
    thread.start()
    while "\nhere" not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
        time.sleep(0.05)
    processes.stop()
    thread.join(20)
    statuses.append(processes.run(command, tmp_path / "later", 1))
    assert statuses == [-signal.SIGTERM] * 2


def test_a_released_row_begins_with_its_preset(tmp_path: Path) -> None:
    job = evidence_run.Job("released", 1, tmp_path, None, ("--optim.epochs", "3"), tmp_path / "run", 1)
    assert evidence_run.training(job)[:3] == ["cub200-released", "--optim.epochs", "3"]


def made(row: str, seed: int, rank1: float, rationale: float | None = None) -> dict[str, Any]:
    retrieval = {"mean": {"rank1": rank1, "rank5": 30.0, "mAP": 5.0}}
    retrieval |= {} if rationale is None else {"rationale": {"rank1": rationale, "rank5": 31.0, "mAP": 6.0}}
    return {
        "row": row, "seed": seed, "meaning": f"what {row} is", "flags": ["--optim.lr", "1"], "status": "finished",
        "seconds": 60.0, "images": 99, "facts": {"torch": "2.15", "commit": "abc", "device": "some"},
        "retrieval": retrieval, "last": {"contrast_loss": 7.0},
        "localisation": {"attention": {"inside": 60.0}, "gaussian": {"inside": 70.0}},
    }  # fmt: skip


def hand_written(path: Path) -> Path:
    runs = [made("frozen", 0, 12.0, 15.0), made("moco", 0, 10.0), made("moco", 1, 14.05), made("moco", 2, 12.2)]
    broken = {"row": "moco", "seed": 3, "meaning": "m", "flags": [], "status": "training failed", "error": "no number"}
    study = {"data": "birds", "boxes": None, "common": ["--optim.epochs", "2"]}
    path.write_text(json.dumps(study | {"runs": {f"{run['row']}-seed{run['seed']}": run for run in [*runs, broken]}}))
    return path


def test_the_table_has_means_and_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence_table.main([str(hand_written(tmp_path / "evidence.json"))])
    text = capsys.readouterr().out
    assert "| row | seeds | rank-1, mean | rank-1, rationale |" in text
    assert "| `frozen` | 1 | 12.0 | 15.0 |" in text
    assert "| `moco` | 3 | 12.1 [10.0, 14.1] |  |" in text  # (10 + 14.05 + 12.2) / 3 = 12.083
    assert "kNN, mean" not in text  # nobody measured it
    assert "- moco-seed3: training failed: no number" in text
    assert "Every run: `--optim.epochs 2`" in text


def test_runs_are_kept_in_the_order_of_the_rows() -> None:
    runs = [made("unknown", 0, 1.0), made("common-logit", 1, 1.0), made("common-logit", 0, 1.0), made("moco", 2, 1.0)]
    study = {"runs": {f"{run['row']}-seed{run['seed']}": run for run in runs}}
    names = list(json.loads(evidence.in_order(study))["runs"])
    assert names == ["moco-seed2", "common-logit-seed0", "common-logit-seed1", "unknown-seed0"]


DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[2] / "bench" / "results"
# a study's runs, and the file in docs/ with all its tables
STUDIES = {
    "evidence_cub50": "evidence-tables",
    "evidence_cub51-100": "evidence-tables-51-100",
    "evidence_cub200": "evidence-tables-200",
    "evidence_lite_1-50": "evidence-tables-lite-1-50",
    "evidence_lite_51-100": "evidence-tables-lite-51-100",
    "evidence_lite_101-200": "evidence-tables-lite-101-200",
    "evidence_lite160_51-100": "evidence-tables-lite160-51-100",
    "evidence_trunk_1-50": "evidence-tables-trunk-1-50",
    "evidence_trunk_51-100": "evidence-tables-trunk-51-100",
    "evidence_trunk_101-200": "evidence-tables-trunk-101-200",
}


@pytest.mark.parametrize(("document", "least"), [("evidence.md", 8), ("evidence-truncated.md", 20)])
def test_the_tables_of_a_document_are_those_of_the_runs(document: str, least: int) -> None:
    kinds = evidence_table.RETRIEVAL, evidence_table.OTHERS, evidence_table.ATTENTION, evidence_table.TRAINING
    columns = {heading: place for kind in kinds for heading, place in kind.items()}
    rows: dict[str, Any] = {}
    headings, checked = list[str](), set[str]()
    for line in (DOCS / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("<!-- bench/results/"):  # where the next table comes from
            rows = evidence_table.by_row(evidence_table.read(RESULTS / Path(line.split()[1]).name))
        elif line.startswith("| row "):
            headings = cells[2:]
        elif line.startswith("| `"):
            runs = rows[cells[0].strip("`")]
            assert cells[1] == str(len(runs))
            for heading, cell in zip(headings, cells[2:], strict=True):
                *place, decimals = columns[heading]
                assert cell == evidence_table.spread(evidence_table.values_of(runs, place), decimals), (line, heading)
            checked.add(cells[0])
    assert len(checked) >= least


def test_every_row_of_the_study_is_one_that_can_be_run_again() -> None:
    """Under today's names, unless it is of a setting that is gone."""
    runs = [each for name in STUDIES for each in evidence_table.read(RESULTS / f"{name}.json")["runs"].items()]
    gone = set()
    for name, run in runs:
        assert run["status"] == "finished", name
        if any(flag.removeprefix("--") in GONE for flag in run["flags"]):
            gone.add(run["row"])
            assert run["row"] not in evidence.ROWS
        else:
            assert list(todays_flags(run["flags"])) == list(evidence.ROWS[run["row"]][1]), name
    assert gone == {"batchnorm"}
    for row in evidence.ROWS:
        read_command_line(evidence_run.training(evidence_run.Job(row, 0, RESULTS, None, (), RESULTS, 1)))


def test_all_tables_beside_the_document_are_made_of_the_runs(tmp_path: Path) -> None:
    for study, tables in {**STUDIES, "ceilings_cub50": "ceilings-tables"}.items():
        evidence_table.main([str(RESULTS / f"{study}.json"), "--md", str(tmp_path / tables)])
        assert (DOCS / f"{tables}.md").read_text() == (tmp_path / tables).read_text()


def test_table_and_picture_go_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    study, table, picture = hand_written(tmp_path / "evidence.json"), tmp_path / "table.md", tmp_path / "study.png"
    boxes = tmp_path / "boxes.png"
    evidence_table.main([str(study), "--md", str(table), "--png", str(picture), "--box_png", str(boxes)])
    assert "12.1 [10.0, 14.1]" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert boxes.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == ""
    study.write_text("{}")
    with pytest.raises(SystemExit):
        evidence_table.main([str(study)])
    assert "is not the evidence.json of a study" in capsys.readouterr().err


@pytest.mark.parametrize("cam_of", ["loss", "similarity"])
def test_slopes_are_the_gradient_along_the_features(cam_of: Any) -> None:
    """Scaling the features of one position by 1 + e changes what GradCAM is of by e * slope / S."""
    import torch
    from torch import nn

    from fastcr.config import MocoConfig
    from fastcr.kernels.info_nce import info_nce
    from fastcr.method.moco import MoCo, mean_pool
    from fastcr.method.objectives import build_objective

    torch.manual_seed(0)
    settings = MocoConfig(embedding_dim=4, queue_size=16)
    moco = MoCo(nn.Conv2d(3, 8, 4, stride=4), 8, settings).eval()
    images = torch.randn(2, 3, 12, 12)
    features = moco.backbone(images).detach()
    slope = gradcam_inside.slopes(moco, images, features, build_objective(settings), cam_of=cam_of)
    with torch.no_grad():
        key = moco.key(images.flip(3), torch.autocast("cpu", enabled=False))
        features = moco.backbone(images)

        def loss(scale: float) -> torch.Tensor:
            changed = features.clone()
            changed[:, :, 1, 2] *= scale
            if cam_of == "similarity":
                return -(moco.head(mean_pool(changed)) * key).sum(1)
            return info_nce(moco.query(mean_pool(changed)), key, moco.queue, temperature=0.2)

        change = (loss(1.01) - loss(0.99)) / 0.02
    assert slope[:, 5] == pytest.approx(change.numpy() * 9, rel=0.01)


def test_runs_that_end_at_once_read_their_settings_in_turn(finished: Path) -> None:
    """The parser of settings keeps what it parses in globals: two threads broke a study."""
    job = evidence_run.Job("moco", 0, finished, None, (), finished / "moco-seed0", 1)
    expected = evidence_run.measuring(job)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(evidence_run.measuring, [job] * 24)) == [expected] * 24
