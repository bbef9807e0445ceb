"""What a user gets for a mistake: one line that names the culprit, status 2, nothing lost; `--help`, presets, YAML."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastcr import train
from fastcr.presets import PRESETS
from fastcr.runs import machine
from fastcr.runs.command_line import BASICS, load_config, read_command_line, save_config
from fastcr.runs.validate import validate
from tests.shared import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP = [*TINY, "--run.steps", "1"]


@pytest.fixture(scope="module")
def finished(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*ONE_STEP, "--data.root", str(flat), "--run.dir", str(folder)])
    return folder


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        ("--optim.lrr 1", ("--optim.lrr", "did you mean --optim.lr?")),
        ("--data.loader fast", ("--data.loader", "'fast'", "'dali'", "'torch'")),
        ("cub20", ("'cub20'", "did you mean cub200?")),
        ("qqq", ("'qqq'", *PRESETS)),
        ("--resume --run.steps 3", ("--resume needs a run folder",)),
        ("--resume auto", ("--resume auto needs --run.dir",)),
        ("folder --config a.yaml", ("--config brings all settings",)),
        ("folder --plan", ("preset folder needs --data.root",)),
        ("--run.device cuda:99", ("--run.device cuda:99", "CUDA devices")),
    ],
)
def test_mistaken_arguments_of_train(args: str, culprits: tuple[str, ...], refused: Callable[..., str]) -> None:
    line = refused(train.main, *args.split())
    assert all(culprit in line for culprit in culprits), line


# A value of each kind that is beyond its limits
@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--optim.lr", "0 -0.1 nan inf"),
        ("--run.seed", f"-1 {2**70}"),
        ("--run.steps", "0"),
        ("--moco.key_momentum", "-0.1 1.1 nan"),
    ],
)
def test_values_out_of_range(flag: str, values: str, flat: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for value in values.split():
        args = [*ONE_STEP, "--data.root", flat, "--run.dir", tmp_path / "run", flag, value]
        assert flag in refused(train.main, *args)
        assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(flat: Path, finished: Path, refused: Callable[..., str]) -> None:
    before = (finished / "weights.safetensors").stat().st_mtime_ns
    line = refused(train.main, *ONE_STEP, "--data.root", flat, "--run.dir", finished)
    assert f"{finished} already holds a run" in line
    assert f"--resume {finished}" in line
    assert (finished / "weights.safetensors").stat().st_mtime_ns == before


def test_resume_of_what_is_no_run(flat: Path, tmp_path: Path, finished: Path, refused: Callable[..., str]) -> None:
    assert f"no run folder {tmp_path / 'none'}" in refused(train.main, "--resume", tmp_path / "none")
    assert f"no run folder {finished / 'config.yaml'}" in refused(train.main, "--resume", finished / "config.yaml")
    assert f"{flat} is not a run folder: it has no config.yaml" in refused(train.main, "--resume", flat)
    assert "no file nope.yaml" in refused(train.main, "--config", "nope.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is broken"),
        ("run:\n  nope: 1\n  gone: 2", "was made by another version of fastcr: unknown settings run.gone, run.nope"),
        ("run:\n  track: wandb", "unknown settings run.track"),
        ("optim:\n  lr: abc", "'abc'"),
    ],
)
def test_broken_config(text: str, words: str, copied: Path, refused: Callable[..., str]) -> None:
    (copied / "config.yaml").write_text(text)
    line = refused(train.main, "--resume", copied)
    assert f"{copied}/config.yaml" in line
    assert words in line


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_documented_and_survive_yaml(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    assert config.preset == name
    assert validate(config) == config
    assert (PRESETS[name].__doc__ or "").strip()
    paths = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=tmp_path / "runs/ä b", compile=True, steps=3),
        data=dataclasses.replace(config.data, root=tmp_path / "~/images: 1", workers=0),
    )
    for i, written in enumerate((config, paths)):
        save_config(written, tmp_path / f"{i}.yaml")
        assert load_config(tmp_path / f"{i}.yaml") == written
        earlier = (tmp_path / f"{i}.yaml").read_text().replace("run:\n", "run:\n  track: none\n", 1)
        (tmp_path / f"{i}.yaml").write_text(earlier)
        assert load_config(tmp_path / f"{i}.yaml") == written


def test_flags_override_the_preset_and_the_resumed_run(finished: Path) -> None:
    config, resumed = read_command_line(["cub200-paper", "--optim.lr", "0.5"])
    assert resumed is None
    assert config == dataclasses.replace(
        PRESETS["cub200-paper"](), optim=dataclasses.replace(PRESETS["cub200-paper"]().optim, lr=0.5)
    )
    config, resumed = read_command_line(["--run.steps", "7", "--resume", str(finished)])
    assert (resumed, config.run.steps, config.data.image_size) == (finished, 7, 32)


def test_help_is_a_screen_and_a_plan_takes_a_runs_settings(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    screen = capsys.readouterr().out
    assert (stop.value.code, len(BASICS), len(screen.splitlines())) == (0, 15, 21)
    assert "passes over the images; 0 saves the start (12)" in screen
    with pytest.raises(SystemExit):
        train.main(["synthetic", "--help-all"])
    everything = capsys.readouterr().out
    assert all(f"--{flag}" in screen and f"--{flag}" in everything for flag in BASICS)
    monkeypatch.chdir(tmp_path)
    settings = load_config(finished / "config.yaml")
    read, resumed = read_command_line(["--config", str(finished / "config.yaml"), "--optim.epochs", "3"])
    assert (read.run.dir, read.optim.epochs, read.data, resumed) == (None, 3, settings.data, None)
    assert read_command_line(["--config", str(finished), "--optim.epochs", "3"])[0] == read
    train.main(["--plan", "--config", str(finished / "config.yaml"), "--optim.epochs", "3"])
    planned = capsys.readouterr().out
    assert f"64 training images: 1 steps of {settings.optim.batch_size} in 3 epochs" in planned
    assert "memory: " in planned
    assert "all steps: about 0:00:0" in planned
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("precision", "device", "hardware", "dtype"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("fp32", "cpu", True, torch.float32),
    ],
)
def test_precision_is_what_the_processor_can_do(
    precision: str, device: str, hardware: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: hardware)
    assert machine.pick_dtype(precision, torch.device(device)) == dtype
