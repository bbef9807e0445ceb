"""A run from its first step to its last file; stopped, killed, starved of disk or numbers, and taken up again."""

import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from fastcr import evaluate, train
from fastcr.config import Config, MocoConfig, OptimConfig
from fastcr.data.layouts import read_splits
from fastcr.encoders.encoder import load
from fastcr.kernels import launch
from fastcr.measures.health import HealthWarnings
from fastcr.method import build as training
from fastcr.runs import checkpoint
from fastcr.runs.checkpoint import load_weights
from fastcr.runs.command_line import called, load_config
from fastcr.runs.context import Context
from tests.shared import SHORT, TINY, records, start, wait_for, write_calm_weights

pytestmark = pytest.mark.usefixtures("one_thread")
# 64 training images make 8 steps an epoch; a queue of 20 is no multiple of the batch
STEPS_PER_EPOCH, STEPS = 8, 13
BASELINES = ("gem", "norm", "gaussian", "ddt")
METRICS = {
    *("step", "epoch", "loss", "contrast_loss", "fit_loss", "lr", "images_per_second", "data_wait"),
    *("attention_entropy", "effective_detectors", "embedding_spread"),
}
OF_THE_FIT = {"fit_loss", "attention_entropy", "effective_detectors"}
LOADERS = [
    "torch",
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
            reason="NVIDIA DALI is not installed",
        ),
    ),
]
Records = list[dict[str, float]]


class Finished(NamedTuple):
    """A run folder and what the run printed."""

    folder: Path
    output: str


def flags(root: Path, folder: Path, *more: str) -> list[str]:
    return [*TINY, *SHORT, "--data.root", str(root), "--run.dir", str(folder), *more]


def run(root: Path, folder: Path, *more: str, preset: str = "synthetic") -> Records:
    train.main([preset, *flags(root, folder, *more)])
    return records(folder)


def resume(folder: Path, *more: str) -> Records:
    train.main(["--resume", str(folder), *more])
    return records(folder)


def losses(run: Records) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in ("step", "loss", "contrast_loss", "fit_loss")) for record in run]


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "resume.pt", weights_only=True)
    return content


def facts(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        read: dict[str, Any] = json.loads(opened.metadata()["fastcr"])
    return read


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if "tfevents" not in entry.name}


@pytest.fixture(scope="module")
def evaluated(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("runs") / "evaluated"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run(birds, folder, "--run.steps", "9", "--run.eval_every", "1")
    return Finished(folder, output.getvalue())


@pytest.fixture(scope="module")
def uninterrupted(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undisturbed run with a loader, made at its first use."""
    runs = tmp_path_factory.mktemp("uninterrupted")

    def folder(loader: str) -> Path:
        if not (runs / loader).exists():
            run(flat, runs / loader, "--data.loader", loader, "--run.steps", str(STEPS))
        return runs / loader

    return folder


def test_run_folder_holds_all_its_files(evaluated: Finished) -> None:
    folder = evaluated.folder
    assert names(folder) == {
        *("config.yaml", "metrics.jsonl", "weights.safetensors", "init.safetensors", "resume.pt", "resume.1.pt"),
        *("results.json", "evaluations.jsonl"),
    }
    config = load_config(folder / "config.yaml")
    assert (config.run.dir, config.run.steps, config.rationale.detectors) == (folder, 9, 4)
    assert state(folder)["step"] == 9
    (events,) = folder.glob("events.out.tfevents.*")
    assert all(name.encode() in events.read_bytes() for name in METRICS - {"step", "epoch"})
    for file in ("weights.safetensors", "init.safetensors"):
        assert facts(folder / file) == {
            "backbone": "resnet18",
            "last_stage": "layer3",
            "stem_maxpool": True,
            "detectors": 4,
            "temperature": 0.4,
            "attention": "softmax",
            "image_size": 32,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    trained, initial = (load_weights(folder / file)[0] for file in ("weights.safetensors", "init.safetensors"))
    assert trained.keys() == initial.keys()
    assert not torch.equal(trained["branch.weight"], initial["branch.weight"])


def test_results_are_in_percent_for_both_embeddings_and_the_frozen_init(evaluated: Finished) -> None:
    results = json.loads((evaluated.folder / "results.json").read_text())
    assert (results["images"], results["classes"]) == (32, 16)
    for part in (results, results["frozen_init"]):
        assert part["retrieval"].keys() == {"mean", "rationale", *BASELINES}
        for scores in part["retrieval"].values():
            assert scores.keys() == {"rank1", "rank5", "mAP"}
            # a query is right or wrong: shares of 32 images, in percent
            assert all((scores[key] * 32 / 100).is_integer() for key in ("rank1", "rank5"))
            assert 0 <= scores["rank1"] <= scores["rank5"] <= 100
            assert 1 < scores["mAP"] < 100


def test_evaluation_during_training_is_printed_and_kept(evaluated: Finished) -> None:
    (entry,) = map(json.loads, (evaluated.folder / "evaluations.jsonl").read_text().splitlines())
    results = json.loads((evaluated.folder / "results.json").read_text())
    assert entry["epoch"] == 1
    lines = [line for line in evaluated.output.splitlines() if line.startswith("  rank-1 ")]
    for line, name in zip(lines, ("mean", "rationale"), strict=True):
        now, frozen = entry["retrieval"][name]["rank1"], results["frozen_init"]["retrieval"][name]["rank1"]
        assert f"{now:.2f}" in line
        assert f"{frozen:.2f}" in line
        assert ("warning" in line) == (now < frozen)


def test_metrics_are_whole_and_consistent(uninterrupted: Callable[[str], Path]) -> None:
    run = records(uninterrupted("torch"))
    assert [record["step"] for record in run] == list(range(1, STEPS + 1))
    for record in run:
        assert record.keys() == METRICS
        assert all(math.isfinite(value) for value in record.values())
        assert record["epoch"] == record["step"] / STEPS_PER_EPOCH
        assert record["loss"] == pytest.approx(record["contrast_loss"] + record["fit_loss"], rel=1e-5)
        # the schedule follows the epochs, wherever --run.steps stops
        progress = (record["step"] - 1) / (4 * STEPS_PER_EPOCH)
        assert record["lr"] == pytest.approx(0.03 * (1 + math.cos(math.pi * progress)) / 2)
        assert record["images_per_second"] > 0
        assert 0 < record["data_wait"] < 1
        assert 0 <= record["attention_entropy"] <= math.log(4) + 1e-5  # 32 px at stride 16: four positions
        assert 1 <= record["effective_detectors"] <= 4 + 1e-5
    assert run[0]["loss"] != run[-1]["loss"]


def test_without_the_branch_it_is_plain_moco(birds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    logged = run(birds, folder, "--rationale.enabled", "False", "--run.steps", "3")
    assert all(record.keys() == METRICS - OF_THE_FIT for record in logged)
    assert all(record["loss"] == pytest.approx(record["contrast_loss"]) for record in logged)
    results = json.loads((folder / "results.json").read_text())
    assert results["retrieval"].keys() == results["frozen_init"]["retrieval"].keys() == {"mean", *BASELINES}
    weights, written = load_weights(folder / "weights.safetensors")
    assert written["detectors"] == 0
    assert not [key for key in weights if not key.startswith("backbone.")]


def test_a_branch_that_is_not_fitted_stays_and_the_log_says_nothing_of_it(birds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--rationale.fit_weight", "0", "--rationale.init", "ddt", "--moco.pooling", "rationale")
    logged = run(birds, folder, *options, "--run.steps", "3")
    assert all(record.keys() == METRICS - OF_THE_FIT for record in logged)
    assert all(record["loss"] == pytest.approx(record["contrast_loss"]) for record in logged)
    start, end = (load_weights(folder / f"{name}.safetensors")[0] for name in ("init", "weights"))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert "backbone.conv1.weight" in moved
    assert not [name for name in moved if name.startswith("branch.")]


def test_the_papers_preset_works_end_to_end(birds: Path, tmp_path: Path) -> None:
    """But for the size of the network, its images and its batches, and the weights it starts from."""
    small = ["--model.backbone", "resnet18", "--model.weights", "none", "--data.image_size", "64", "--optim.batch_size"]
    small += ["8", "--moco.queue_size", "64", "--run.device", "cpu", "--data.workers", "0", "--run.log_every", "1"]
    where = ["--data.root", str(birds), "--run.dir", str(tmp_path / "run")]
    train.main(["cub200-paper", *small, *where, "--run.precision", "fp32", "--run.steps", "3"])
    for record in records(tmp_path / "run"):
        assert record["loss"] == pytest.approx(record["contrast_loss"] + 1.28 * record["fit_loss"], rel=1e-5)
    assert facts(tmp_path / "run" / "weights.safetensors")["detectors"] == 32
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["retrieval"].keys() == {"mean", "rationale", *BASELINES}


def test_a_queue_larger_than_the_data_is_cut_or_warned_of(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = read_splits(flat).train
    for objective, size in (("relational", 64), ("infonce", 65)):
        config = Config(moco=MocoConfig(objective=objective, queue_size=65), optim=OptimConfig(batch_size=8))  # type: ignore[arg-type]
        assert training.fit_sizes(config, images, Context()).moco.queue_size == size
    assert "warning: the queue (65) is larger than the data set (64 images)" in capsys.readouterr().out


def test_flat_folder_trains_and_says_that_nothing_is_measured(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(flat, tmp_path / "run", "--run.steps", "8", "--run.eval_every", "1")
    out = capsys.readouterr().out
    assert out.count("retrieval is not measured") == 1
    for command, args in (("evaluate", "--pairs FILE"), ("embed", f"{flat} --out INDEX")):
        assert f"{called(command)} {tmp_path / 'run'} {args}" in out
    assert not names(tmp_path / "run") & {"results.json", "evaluations.jsonl"}


def test_losses_depend_on_the_seed_and_not_on_the_workers(
    flat: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    expected = losses(records(uninterrupted("torch")))[:3]
    assert losses(run(flat, tmp_path / "workers", "--data.workers", "2", "--run.steps", "3")) == expected
    other = losses(run(flat, tmp_path / "seed", "--run.seed", "1", "--run.steps", "3"))
    assert not {loss for _, loss, *_ in other} & {loss for _, loss, *_ in expected}


class Process(NamedTuple):
    """A run in a process of its own."""

    folder: Path
    handle: subprocess.Popen[str]


@pytest.fixture(scope="module")
def interrupted(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """Three real commands, stopped in the first epoch: SIGKILL with either loader, and SIGTERM. Started together,
    because most of their time goes into imports."""
    runs = tmp_path_factory.mktemp("interrupted")
    plans = {"torch": signal.SIGKILL, "dali": signal.SIGKILL, "term": signal.SIGTERM}
    processes = {}
    for name in plans:
        loader = "dali" if name == "dali" else "torch"
        more = ("--data.loader", loader, "--run.save_minutes", "0", "--run.steps", str(STEPS))
        handle = start("-m", "fastcr.train", "synthetic", *flags(flat, runs / name, *more))
        processes[name] = Process(runs / name, handle)
    waiting = dict(processes)

    def all_stopped() -> bool:
        for name, (folder, handle) in list(waiting.items()):
            # the first step has been saved once the third is in the log: the second save waited for it
            if len(records(folder)) >= 3 or handle.poll() is not None:
                handle.send_signal(plans[name])
                del waiting[name]
        return not waiting

    wait_for(all_stopped)
    yield processes
    for _, handle in processes.values():
        handle.kill()
        handle.communicate()


@pytest.mark.parametrize("loader", LOADERS)
def test_killed_run_goes_on_bit_for_bit(
    loader: str, interrupted: dict[str, Process], uninterrupted: Callable[[str], Path]
) -> None:
    folder, handle = interrupted[loader]
    _, errors = handle.communicate(timeout=60)
    assert handle.returncode == -signal.SIGKILL, errors
    assert state(folder)["step"] < STEPS
    assert losses(resume(folder)) == losses(records(uninterrupted(loader)))
    weights = (uninterrupted(loader) / "weights.safetensors").read_bytes()
    assert (folder / "weights.safetensors").read_bytes() == weights


def test_sigterm_saves_says_how_to_go_on_and_exits_143(
    interrupted: dict[str, Process], uninterrupted: Callable[[str], Path]
) -> None:
    folder, handle = interrupted["term"]
    output, errors = handle.communicate(timeout=60)
    assert handle.returncode == 143
    assert errors == ""  # no warning of a library either
    stopped = state(folder)["step"]
    assert f"stopped at step {stopped}; resume with: python -m fastcr.train --resume {folder}" in output
    assert [record["step"] for record in records(folder)] == list(range(1, stopped + 1))
    assert losses(resume(folder)) == losses(records(uninterrupted("torch")))
    weights = (uninterrupted("torch") / "weights.safetensors").read_bytes()
    assert (folder / "weights.safetensors").read_bytes() == weights


def test_resumed_run_evaluates_an_epoch_once(birds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(birds, folder, "--run.eval_every", "1", "--run.steps", "7")
    early = (folder / "resume.pt").read_bytes()
    resume(folder, "--run.steps", "9")
    (folder / "resume.pt").write_bytes(early)  # as after a kill at step 9: the last save was before the evaluation
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write('{"epoch": 2, "retr')
    resume(folder, "--run.steps", "9")
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]


@pytest.mark.parametrize(("sent", "status"), [("SIGUSR1", 143), ("SIGINT", 130)])
def test_signals_save_and_end_the_run(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: str, status: int
) -> None:
    steps = iter(range(1, 100))
    original = training.train_step

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 2:
            signal.raise_signal(getattr(signal, sent))
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", stopped)
    with pytest.raises(SystemExit) as stop:
        run(flat, tmp_path / "run")
    assert stop.value.code == status
    assert state(tmp_path / "run")["step"] == 2
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # as it was before


def test_a_reader_that_goes_away_ends_the_run_with_a_save(flat: Path, tmp_path: Path) -> None:
    """As `| head` does; stderr leads into the same pipe."""
    folder = tmp_path / "run"
    command = ["-m", "fastcr.train", "synthetic", *flags(flat, folder, "--optim.epochs", "100000")]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.stdout.close()
    assert process.wait(60) == 143
    step = state(folder)["step"]
    resume(folder, "--run.steps", str(step + 1))
    assert state(folder)["step"] == step + 1


def test_data_that_vanishes_ends_the_run_in_one_line(flat: Path, tmp_path: Path) -> None:
    root, more = shutil.copytree(flat, tmp_path / "images"), ("--data.workers", "2", "--data.cache", "off")
    process = start("-m", "fastcr.train", "synthetic", *flags(root, tmp_path / "run", "--optim.epochs", "9999", *more))
    wait_for(lambda: records(tmp_path / "run"), process)
    shutil.rmtree(root)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == f"fastcr.train: error: none of the 64 images under {root} can be read\n"


def test_nohup_lets_a_run_go_on(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        original = training.train_step
        monkeypatch.setattr(
            training,
            "train_step",
            lambda *args, **more: (signal.raise_signal(signal.SIGHUP), original(*args, **more))[1],
        )
        run(flat, tmp_path / "run", "--run.steps", "2")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state(tmp_path / "run")["step"] == 2


def test_signal_to_the_whole_job_spares_the_loaders_processes(flat: Path, tmp_path: Path) -> None:
    """As a terminal sends Ctrl-C, and torchrun and Slurm send SIGTERM: the last step still gets its batch."""
    folder = tmp_path / "run"
    more = ("--data.workers", "2", "--data.cache", "off", "--optim.epochs", "1000")
    process = start("-m", "fastcr.train", "synthetic", *flags(flat, folder, *more), session=True)
    wait_for(lambda: records(folder), process)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")
    assert f"stopped at step {state(folder)['step']}" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left


def test_completed_run_is_only_evaluated(evaluated: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "run"))
    kept = ("metrics.jsonl", "weights.safetensors", "resume.pt", "init.safetensors", "results.json")
    before = {name: (folder / name).read_bytes() for name in kept}
    (folder / "results.json").unlink()
    resume(folder)
    assert {name: (folder / name).read_bytes() for name in kept} == before


def test_resume_with_another_shape_is_refused(evaluated: Finished, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "run"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    line = refused(train.main, "--resume", folder, "--rationale.detectors", "5")
    assert f"{folder}/resume.pt does not fit the settings of this run" in line
    assert "branch.weight" in line
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors(value)


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    flat: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "run"
    run(flat, folder, "--run.steps", "2")
    line = refused(train.main, "--resume", folder, "--run.steps", "8", "--optim.lr", "1e38", "--run.log_every", "8")
    assert "the weights are not finite after step 8 " in line  # where it is looked at
    assert f"the last good checkpoint is {folder}/resume.pt" in line
    kept = state(folder)
    assert kept["step"] == 2
    assert all(tensor.isfinite().all() for tensor in tensors(kept) if tensor.is_floating_point())
    lower = ("--run.steps", "3", "--optim.lr", "0.03")
    assert [record["step"] for record in resume(folder, *lower)] == [1, 2, 3]


def test_resume_auto_begins_and_goes_on(
    flat: Path,
    tmp_path: Path,
    uninterrupted: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    """One command for all times: a new folder, one without a save, one with one, one whose newest save is damaged."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("of a run that was killed before its first save")
    command = ["synthetic", *flags(flat, folder, "--resume", "auto", "--run.save_minutes", "0")]
    train.main([*command, "--run.steps", "5"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # logged after the last save, then cut off by a kill
    train.main([*command, "--run.steps", "7"])
    assert {"resume.pt", "resume.1.pt"} <= names(folder)
    newest = bytearray((folder / "resume.pt").read_bytes())
    newest[len(newest) // 2] ^= 4
    (folder / "resume.pt").write_bytes(newest)
    capfd.readouterr()
    train.main([*command, "--run.steps", str(STEPS)])
    assert f"{folder}/resume.pt is missing or broken: resuming from resume.1.pt, step 6" in capfd.readouterr().out
    assert losses(records(folder)) == losses(records(uninterrupted("torch")))
    for save in folder.glob("resume*.pt"):
        save.write_bytes(b"")
    line = refused(train.main, *command)  # what is damaged is not begun again, and not overwritten
    assert "resume.pt" in line
    for wrong in (["--resume", "auto"], ["--resume", "auto", "--run.dir"]):
        assert "--run.dir" in refused(train.main, "synthetic", *wrong)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"embedding_spread": 0.05}, "the embeddings have collapsed"),
        ({"attention_entropy": math.log(49)}, "the attention is the same everywhere"),
        ({}, None),
    ],
)
def test_collapse_is_warned_of_once(metrics: dict[str, float], words: str | None) -> None:
    output = io.StringIO()
    health = HealthWarnings(Context(console=Console(file=output, width=200)))
    for _ in range(3):
        health.look({"embedding_spread": 0.9, "attention_entropy": 3.0} | metrics, 49)
    health.look({"embedding_spread": 0.9}, 1)  # a map of a single cell, without a branch that is fitted
    lines = output.getvalue().splitlines()
    assert len(lines) == bool(words)
    assert not words or lines[0].startswith(f"warning: {words}")


@pytest.mark.parametrize("broken", ["torch.save", "os.replace"])
def test_full_disk_leaves_the_last_good_files_and_nothing_else(
    broken: str, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "run"
    run(flat, folder, "--run.steps", "1")
    before = names(folder)
    files = {name: (folder / name).read_bytes() for name in ("resume.pt", "config.yaml")}

    def full(*args: object, **kwargs: object) -> None:
        for target in args:
            if isinstance(target, Path) and target.suffix == ".tmp":
                target.write_bytes(b"the first half")
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        line = refused(train.main, "--resume", folder, "--run.steps", "2")
    # a run that goes on writes its settings first
    culprit = "resume.pt" if broken == "torch.save" else "config.yaml"
    assert f"cannot save {folder / culprit}: [Errno 28] No space left on device" in line
    assert (folder / culprit).read_bytes() == files[culprit]
    assert names(folder) - {"resume.1.pt"} == before  # there already, as a second name of resume.pt
    assert [record["step"] for record in resume(folder, "--run.steps", "3")] == [1, 2, 3]


def test_run_stopped_between_its_last_two_saves_ends_well(flat: Path, tmp_path: Path) -> None:
    """Whatever resume.pt has passed is in weights.safetensors too: it is written first."""
    order: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_weights", "save_resume"):
            original = getattr(checkpoint, name)
            patch.setattr(checkpoint, name, lambda *args, name=name, do=original: (order.append(name), do(*args)))
        run(flat, tmp_path / "run", "--run.steps", "1")
    assert order[-2:] == ["save_weights", "save_resume"]


def test_triton_kernels_train_as_the_references_do(flat: Path, tmp_path: Path) -> None:
    """Six steps in fp32, the fit's gradient in the encoder too: one percent of what training moves would show."""
    if not launch.INTERPRET and not torch.cuda.is_available():
        pytest.skip("needs a GPU or Triton's interpreter")
    calm = str(write_calm_weights(tmp_path / "calm.pt"))
    settings = ["--model.weights", calm, "--model.batchnorm", "local", "--optim.lr", "0.003"]
    settings += ["--rationale.stop_gradient", "False", "--run.steps", "6"]

    def losses_with(kernels: str, *more: str) -> torch.Tensor:
        logged = run(flat, tmp_path / f"run{len(list(tmp_path.iterdir()))}", "--run.kernels", kernels, *settings, *more)
        assert len(logged) == 6
        return torch.tensor([(record["contrast_loss"], record["fit_loss"]) for record in logged])

    expected = losses_with("torch")
    # the losses have moved by training, not only because the queue fills up
    untrained = losses_with("torch", "--optim.lr", "1e-9")
    assert ((expected - untrained).abs().amax(0) > 0.01).all()
    torch.testing.assert_close(losses_with("triton"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.batchnorm", "sync"], "--model.batchnorm sync needs CUDA, and this run is on cpu"),
        (["--moco.objective", "relational", "--moco.queue_size", "1"], "needs a larger --moco.queue_size"),
    ],
)
def test_ways_of_doing_a_step_that_cannot_work_are_refused(
    flat: Path, tmp_path: Path, refused: Callable[..., str], more: list[str], message: str
) -> None:
    assert message in refused(train.main, *flags(flat, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_run_of_settings_that_there_are_no_more_is_refused_in_one_line(
    evaluated: Finished, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Its weights load as ever."""
    folder = Path(shutil.copytree(evaluated.folder, tmp_path / "run"))
    with (folder / "config.yaml").open("a") as file:
        file.write("released:\n  enabled: false\n")
    for main, *args in ((train.main, "--resume", folder), (evaluate.main, folder)):
        assert "released.enabled" in refused(main, *args)
    assert load(folder).image_size == 32
