"""What `import fastcr` and the command `fastcr` offer, and what they do without."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

import fastcr
from fastcr import __main__ as program
from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastcr.train import train
from tests.shared import records, start

HEAVY = ("torch", "torchvision", "numpy", "PIL", "rich", "tyro", "yaml", "triton", "safetensors")
FOLDER = Path(fastcr.__file__).parent


def modules_after(code: str) -> set[str]:
    """The modules a fresh Python has after `code`."""
    process = start("-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return set(json.loads(output.splitlines()[-1]))


def test_importing_fastcr_imports_nothing_heavy_until_it_is_asked_for() -> None:
    assert not {"torch", "numpy", "tyro"} & modules_after("import fastcr")
    assert "torch" in modules_after("import fastcr\nfastcr.load")
    commands = "import fastcr.embed, fastcr.search, fastcr.evaluate, fastcr.report, fastcr.export"
    assert not {"torchvision", "torch._dynamo", "timm"} & modules_after(commands)  # each takes a second


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(fastcr, name) is not None and name in dir(fastcr) for name in fastcr.__all__)
    assert fastcr.preset("cub200").preset == "cub200"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastcr.nothing  # noqa: B018


def test_train_works_with_a_config_alone(flat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = Config(
        run=RunConfig(dir=tmp_path / "run", device="cpu", steps=1),
        data=DataConfig(root=flat, loader="torch", image_size=32, workers=0),
        model=ModelConfig(backbone="resnet18", last_stage="layer3", weights="none"),
        optim=OptimConfig(batch_size=8),
        moco=MocoConfig(queue_size=16),
    )
    assert train(config) == tmp_path / "run"
    assert f"run folder: {tmp_path}/run" in capfd.readouterr().out
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2))
    with pytest.raises(fastcr.UsageError, match="already holds a run"):
        train(more)
    assert train(more, resume=tmp_path / "run") == tmp_path / "run"
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    with pytest.raises(fastcr.UsageError, match=r"--optim\.lr must be above 0"):
        train(dataclasses.replace(config, optim=OptimConfig(batch_size=8, lr=0.0)))


# --- the command ---


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    doors = {file.stem for file in FOLDER.glob("*.py") if "def main(" in file.read_text()} - {"__main__"}
    assert len(doors) >= 8
    shown = []
    for args in ([], ["-h"], ["--help"]):
        program.main(args)
        shown.append(capsys.readouterr().out)
    assert shown == [shown[0]] * 3
    program.main(["--version"])
    assert capsys.readouterr().out == f"{fastcr.__version__}\n"
    listed = [line.split(maxsplit=1) for line in shown[0].splitlines() if line.startswith("  ")]
    assert {command for command, _ in listed} == doors
    assert all(len(line) > 10 for _, line in listed)


def test_help_and_mistakes_import_nothing_heavy() -> None:
    for call in ("main(['--help'])", "main(['--version'])"):
        assert not set(HEAVY) & modules_after(f"from fastcr.__main__ import main\n{call}")
    calls = [[command, word] for command in program.COMMANDS for word in ("--help", "--mistake")]
    code = "import contextlib\nfrom fastcr.__main__ import main\n"
    code += "".join(f"with contextlib.suppress(SystemExit): main({call})\n" for call in calls)
    assert not {"torch", "torchvision", "numpy", "PIL"} & modules_after(code)


@pytest.mark.parametrize(
    ("command", "hint"), [("trian", "did you mean train?"), ("xyz", "fastcr --help lists the commands")]
)
def test_an_unknown_command_is_a_mistake_of_one_line(command: str, hint: str) -> None:
    process = start("-m", "fastcr", command)
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors == f"fastcr: error: no command {command!r} ({hint})\n"


@pytest.mark.parametrize("command", program.COMMANDS)
def test_each_command_has_help_and_says_how_it_was_called(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {"/usr/bin/fastcr": "fastcr {}", f"{FOLDER}/__main__.py": "python -m fastcr {}",
            f"{FOLDER}/{command}.py": "python -m fastcr.{}", "pytest/__main__.py": "python -m fastcr.{}"}  # fmt: skip
    for argument, called in ways.items():
        monkeypatch.setattr(sys, "argv", [argument])
        with pytest.raises(SystemExit) as stop:
            program.main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: {called.format(command)} " in " ".join(capsys.readouterr().out.split())
