"""Runs that do not train: `--optim.epochs 0`, and the branch that begins where DDT is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastcr import embed, evaluate, export, report, train, visualize
from fastcr.data.crops import centre_crop
from fastcr.data.layouts import read_splits
from fastcr.data.views import normalise
from fastcr.encoders.encoder import load
from fastcr.encoders.rationale import RationaleHead
from fastcr.method.ddt import Moments
from fastcr.runs.checkpoint import load_weights
from tests.shared import SHORT, TINY, records, start

pytestmark = pytest.mark.usefixtures("one_thread")
ZERO = ("--optim.epochs", "0")
DDT = ("--rationale.init", "ddt", "--data.image_size", "80")  # maps of 5 by 5: some positions are not at the border
FILES = {"config.yaml", "metrics.jsonl", "weights.safetensors", "init.safetensors", "resume.pt"}


def flags(root: Path, folder: Path, *more: str) -> list[str]:
    return [*TINY, *SHORT, "--data.root", str(root), "--run.dir", str(folder), *more]


def run(root: Path, folder: Path, *more: str) -> Path:
    train.main(flags(root, folder, *more))
    return folder


def weights(folder: Path, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_weights(folder / f"{name}.safetensors")[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def untrained(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(birds, tmp_path_factory.mktemp("runs") / "untrained", *ZERO, *DDT)


def test_a_run_of_no_epochs_has_all_its_files(untrained: Path) -> None:
    names = {file.name for file in untrained.iterdir() if "tfevents" not in file.name}
    assert names == FILES | {"results.json"}
    assert records(untrained) == []
    assert same(weights(untrained), weights(untrained, "init"))
    assert torch.load(untrained / "resume.pt", weights_only=True)["step"] == 0
    results = json.loads((untrained / "results.json").read_text())
    assert results["images"] == 32
    assert results["retrieval"] == results["frozen_init"]["retrieval"]
    assert {"mean", "rationale", "ddt"} <= results["retrieval"].keys()


def test_every_command_takes_a_run_of_no_epochs(untrained: Path, birds: Path, tmp_path: Path) -> None:
    folder, cpu = tmp_path / "run", ("--run.device", "cpu")
    shutil.copytree(untrained, folder)
    before = weights(folder)
    train.main(["--resume", str(folder)])
    assert same(weights(folder), before)
    evaluate.main([str(folder), *cpu, "--all", "--data.workers", "0", "--linear.epochs", "1"])
    assert "linear" in json.loads((folder / "results.json").read_text())
    embed.main([str(folder), str(birds), "--out", str(tmp_path / "rows"), *cpu, "--data.workers", "0"])
    export.main([str(folder), "--format", "safetensors", "--out", str(tmp_path / "exported.safetensors")])
    visualize.main([str(folder), *cpu])
    report.main([str(folder), *cpu])
    assert "no training (0 epochs)" in (folder / "report.html").read_text()
    made = {file.name for file in [*folder.iterdir(), *tmp_path.iterdir()]}
    assert {"attention.png", "rows", "exported.safetensors", "report.html"} <= made


def test_a_run_of_no_epochs_goes_on_as_one_that_never_paused(flat: Path, tmp_path: Path) -> None:
    queued = ("--moco.objective", "relational")  # fills its queue before the first step
    whole = records(run(flat, tmp_path / "whole", *queued, "--run.steps", "2"))
    run(flat, tmp_path / "paused", *queued, *ZERO)
    train.main(["--resume", str(tmp_path / "paused"), "--optim.epochs", "4", "--run.steps", "2"])
    losses = [[record["loss"] for record in each] for each in (whole, records(tmp_path / "paused"))]
    # the keys that the queue begins with come from the files where nothing is trained, else from the cache
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == 2


@pytest.mark.parametrize("more", [("--rationale.enabled", "False"), DDT])
def test_no_epochs_without_labels_and_with_other_methods(more: tuple[str, ...], flat: Path, tmp_path: Path) -> None:
    folder = run(flat, tmp_path / "run", *ZERO, *more)
    assert {file.name for file in folder.iterdir() if "tfevents" not in file.name} == FILES


def test_the_branch_begins_where_ddt_is(untrained: Path, birds: Path) -> None:
    encoder, images = load(untrained / "init.safetensors"), read_splits(birds).train
    crops = torch.stack([centre_crop(images.rgb(i), 80) for i in range(len(images))])
    features = encoder.features(normalise(crops, torch.float32))
    assert isinstance(encoder.branch, RationaleHead)
    torch.manual_seed(0)
    other = RationaleHead(features.shape[1], detectors=4)
    moments = Moments(features.shape[1])
    moments.add(features)
    maps, wanted = features.double().flatten(2), moments.axis().attention(features).flatten(1)
    pooled = [F.normalize(torch.einsum("ns,ncs->nc", each.double(), maps), dim=1) for each in (
        wanted, encoder.branch.pool(features).attention, other.pool(features).attention.detach()
    )]  # fmt: skip
    goal, found, random = [(each - each.mean(0)) @ (each - each.mean(0)).T for each in pooled]
    assert (found - goal).square().sum() < (random - goal).square().sum() / 4


def test_a_resumed_run_keeps_its_branch(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(flat, tmp_path / "run", *DDT, "--run.steps", "1")
    assert not same(weights(folder), weights(folder, "init"))
    initial = weights(folder, "init")
    monkeypatch.setattr(train, "begin", None)  # would fail if it were called
    train.main(["--resume", str(folder), "--run.steps", "2"])
    assert same(weights(folder, "init"), initial)


def test_two_processes_begin_with_the_branch_of_one(flat: Path, tmp_path: Path) -> None:
    alone = run(flat, tmp_path / "alone", *ZERO, *DDT)
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastcr.train")
    started = start(*command, *flags(flat, tmp_path / "two", *ZERO, *DDT))
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 0, errors
    assert same(weights(tmp_path / "two"), weights(alone))
