"""Several processes train as one, and end together: with gloo, on the CPU."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastcr import train
from fastcr.config import Config, OptimConfig, RunConfig
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.errors import UsageError
from fastcr.method.build import check_settings
from fastcr.runs.context import Context
from fastcr.runs.distributed import Processes
from fastcr.runs.machine import pick_device
from tests.shared import SHORT, TINY, records, start, wait_for, write_calm_weights

FLAGS = [*TINY, *SHORT, "--optim.lr", "0.001", "--model.batchnorm", "frozen"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(*command: object) -> list[subprocess.Popen[str]]:
    """The command in two processes that know of each other, as torchrun would start them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(*command, RANK=rank, LOCAL_RANK=rank, fresh=False, **shared) for rank in ("0", "1")]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 100) -> list[tuple[int, str, str]]:
    """Exit status and output of each; none outlives the test."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, ended, strict=True)]


def table(found: list[dict[str, float]], *names: str) -> torch.Tensor:
    return torch.tensor([[record[name] for name in names] for record in found], dtype=torch.float64)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calm_weights(tmp_path_factory.mktemp("weights") / "calm.pt")


@pytest.fixture(scope="module")
def data(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The birds with an unreadable picture in a test split larger than one batch of evaluation."""
    root = tmp_path_factory.mktemp("split") / "birds"
    shutil.copytree(birds, root)
    pictures = sorted((root / "test").glob("*/*.jpg"))
    for copy in range(9):
        for picture in pictures:
            shutil.copyfile(picture, picture.with_name(f"{picture.stem}-{copy}.jpg"))
    pictures[3].write_bytes(b"no picture")
    assert len(pictures) * 10 > 2 * BATCH_SIZE
    return root


@pytest.fixture(scope="module")
def one_and_two(data: Path, calm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What came of the driver in one process, and in two."""
    out = tmp_path_factory.mktemp("found")
    command = ("-m", "tests.runs.two_processes", data, calm)
    alone = start(*command, out / "one", fresh=False)
    for status, _, errors in finish([alone, *launch(*command, out / "two")], 200):
        assert status == 0, errors
    one, two = (json.loads((out / name).read_text()) for name in ("one", "two"))
    return one, two


@pytest.mark.parametrize("what", ["losses", "of the batch"])
def test_two_processes_give_the_losses_of_one(one_and_two: tuple[Any, Any], what: str) -> None:
    """Also with negatives and weights of GradCAM that are of the whole batch."""
    one, two = (table(found[what], "loss", "contrast", "fit") for found in one_and_two)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    if what == "losses":
        untrained = table(one_and_two[0]["untrained"], "loss", "contrast", "fit")
        assert ((one[:8] - untrained).abs().amax(0) > 1e-3).all()  # training, not only the queue, has moved the losses


def test_the_queue_is_the_same_in_all_processes_and_that_of_one(one_and_two: tuple[Any, Any]) -> None:
    one, two = one_and_two
    assert two["queues"][0] == two["queues"][1]
    assert one["position"] == two["position"] == 20 * 16 % 100
    torch.testing.assert_close(torch.tensor(two["queues"][0]), torch.tensor(one["queues"][0]), atol=1e-5, rtol=0)
    assert two["weights"][0] == two["weights"][1]


def test_local_statistics_are_those_of_a_share_of_the_batch(one_and_two: tuple[Any, Any]) -> None:
    one, two = (table(found["local"], "loss") for found in one_and_two)
    assert (one - two).abs().max() > 1e-4


def test_evaluation_is_that_of_one_process(one_and_two: tuple[Any, Any]) -> None:
    one, two = one_and_two
    assert two["kept"] == one["kept"]
    assert len(one["kept"]) == 319
    assert two["unreadable"] == one["unreadable"]
    assert len(one["unreadable"]) == 1
    assert two["sizes"] == one["sizes"]
    for ours, alone in zip(two["embeddings"], one["embeddings"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(alone), atol=1e-4, rtol=0)  # trained apart


def test_a_command_in_two_processes_leaves_one_run(birds: Path, calm: Path, tmp_path: Path) -> None:
    """The whole command: rank 0 alone prints and writes; taken up by one process it goes on as if nothing was."""
    flags = [*FLAGS, "--data.root", str(birds), "--model.weights", str(calm)]
    command = ("-m", "fastcr.train", "synthetic", *flags, "--run.dir", str(tmp_path / "two"), "--run.steps", "4")
    (status, output, errors), *other = finish(launch(*command))
    assert (status, errors) == (0, "")
    assert other == [(0, "", "")]
    assert output.count("run folder:") == 2
    train.main(["synthetic", *flags, "--run.dir", str(tmp_path / "one"), "--run.steps", "6"])
    names = [
        {file.name for file in (tmp_path / name).iterdir() if "tfevents" not in file.name} for name in ("one", "two")
    ]
    assert names[0] == names[1]
    train.main(["--resume", str(tmp_path / "two"), "--run.steps", "6"])
    one, two = (table(records(tmp_path / name), "loss", "contrast_loss", "fit_loss", "lr") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    assert len(one) == 6
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["frozen_init"] == results[1]["frozen_init"]


def test_a_mistake_is_said_once(birds: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--model.weights", "nothere.pt", "--data.root", str(birds), "--run.dir", str(tmp_path / "run")]
    ended = finish(launch("-m", "fastcr.train", "synthetic", *flags))
    assert [status for status, *_ in ended] == [2, 2]
    (line,) = "".join(errors for *_, errors in ended).splitlines()
    assert line.startswith("fastcr.train: error: no weights file nothere.pt")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def job(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[subprocess.Popen[str]]]]:
    """Two processes that have trained for some steps, and go on for long."""
    folder = tmp_path_factory.mktemp("job") / "run"
    flags = [*FLAGS, "--data.root", str(flat), "--model.weights", "none", "--run.save_minutes", "0"]
    started = launch("-m", "fastcr.train", "synthetic", *flags, "--run.dir", str(folder), "--optim.epochs", "1000")
    wait_for(lambda: len(records(folder)) >= 3, *started)
    yield folder, started
    for process in started:
        process.kill()


def test_when_one_process_is_killed_the_other_says_so_and_ends(job: tuple[Path, list[subprocess.Popen[str]]]) -> None:
    folder, (first, second) = job
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = first.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert first.returncode == 1, errors
    assert errors.startswith("fastcr.train: error: the processes of this job lost each other: ")
    assert errors.count("\n") == 1
    assert torch.load(folder / "resume.pt", weights_only=True)["step"] >= 2
    train.main(["--resume", str(folder), "--run.steps", str(len(records(folder)) + 1)])


def test_sigterm_to_either_process_saves_and_ends_both(flat: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data.root", str(flat), "--model.weights", "none", "--optim.epochs", "1000"]
    started = launch("-m", "fastcr.train", "synthetic", *flags, "--run.dir", str(tmp_path / "run"))
    wait_for(lambda: len(records(tmp_path / "run")) >= 2, *started)
    started[1].send_signal(signal.SIGTERM)
    (status, output, errors), (other, *silence) = finish(started)
    assert (status, other, errors, silence) == (143, 143, "", ["", ""])
    stopped = int(re.findall(r"stopped at step (\d+)", output)[0])
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"] == stopped


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_goes_on_sample(flat: Path, tmp_path: Path) -> None:
    """The words of the README: `--max-restarts` with `--resume auto`."""
    folder = tmp_path / "run"
    flags = [*FLAGS, "--data.root", flat, "--model.weights", "none", "--run.save_minutes", "0", "--run.steps", "60"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["--max-restarts", "2", "-m", "fastcr.train", "synthetic", "--run.dir", str(folder), "--resume", "auto"]
    torchrun = start(*command, *flags, "--optim.epochs", "100")
    steps = 0
    for which in (-1, 0):  # whichever it is
        wait_for(lambda before=steps: len(records(folder)) >= before + 3, torchrun)
        children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[which]), signal.SIGKILL)
        killed, steps = time.monotonic(), len(records(folder))
        time.sleep(2)
        wait_for(lambda before=steps: len(records(folder)) > before, torchrun)
        assert time.monotonic() - killed < 60
    ((status, output, errors),) = finish([torchrun])
    assert status == 0, errors
    assert [record["step"] for record in records(folder)] == list(range(1, 61))
    assert output.count("first step done") == 3


def test_devices_of_several_processes() -> None:
    assert pick_device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"cuda:1: .* each of 2 processes takes its own"):
        pick_device("cuda:1", 0, 2)
    with pytest.raises(UsageError, match="each of 1000 processes takes its own"):
        pick_device("cuda", 0, 1000)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(run=RunConfig(cuda_graph=True)), "cuda_graph works in one process only"),
        (Config(optim=OptimConfig(batch_size=3)), "does not divide among 2 processes"),
    ],
)
def test_what_several_processes_cannot_do(config: Config, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_settings(config, Context(console=Console(quiet=True), processes=Processes(0, 2, 0, 2)))
