"""What a user gets for a mistake: one line that names the culprit, status 2, nothing lost; `--help`, presets, YAML."""

import dataclasses
import gc
import io
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastcr import evaluate, train
from fastcr.config import Config
from fastcr.errors import UsageError
from fastcr.presets import PRESETS
from fastcr.runs import machine
from fastcr.runs.checkpoint import save_weights
from fastcr.runs.command_line import load_config, read_command_line, save_config, spare_imports
from fastcr.runs.validate import validate
from tests.shared import TINY, start

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP = [*TINY, "--run.steps", "1"]
Main = Callable[[Sequence[str]], None]


@pytest.fixture(scope="module")
def finished(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*ONE_STEP, "--data.root", str(flat), "--run.dir", str(folder)])
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """That run, for a test to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        ("--optim.lrr 1", ("--optim.lrr", "did you mean --optim.lr?")),
        ("--optm.batch_size 1", ("--optm.batch_size", "did you mean --optim.batch_size?")),
        ("--optim.lr abc", ("--optim.lr", "'abc'")),
        ("--optim.lr", ("--optim.lr",)),
        ("--optim.batch_size 2.5", ("--optim.batch_size", "'2.5'")),
        ("--data.loader fast", ("--data.loader", "'fast'", "'dali'", "'torch'")),
        ("--rationale.enabled maybe", ("--rationale.enabled", "'maybe'", "'True'")),
        ("--model.backbone resnet19", ("--model.backbone", "'resnet19'", "'resnet18'")),
        ("synthetic stray", ("stray",)),
        ("cub20", ("'cub20'", "did you mean cub200?")),
        ("qqq", ("'qqq'", *PRESETS)),
        ("--resume", ("--resume needs a run folder",)),
        ("--resume --run.steps 3", ("--resume needs a run folder",)),
        ("--run.device cuda:99", ("--run.device cuda:99", "CUDA devices")),
        ("--run.device gpu", ("--run.device", "'gpu'")),
        ("--run.device mps", ("--run.device", "'mps'")),
    ],
)
def test_mistaken_arguments_of_train(args: str, culprits: tuple[str, ...], refused: Callable[..., str]) -> None:
    line = refused(train.main, *args.split())
    assert all(culprit in line for culprit in culprits), line


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "latin-1"])
def test_a_mistake_is_one_line_whatever_stdout_is(
    encoding: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    # the parser draws its boxes with other characters where stdout is not called "utf-8"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    line = refused(train.main, "--optim.lrr", "1")
    assert line == "fastcr.train: error: Unrecognized options: --optim.lrr, 1 (did you mean --optim.lr?)"


# Every message of `validate`, from the side of the flag. Numbers that torch would refuse with a traceback belong here.
@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--data.image_size", "31 -1"),
        ("--data.workers", "-1"),
        ("--optim.epochs", "-1"),
        ("--optim.batch_size", "1"),
        ("--optim.lr", "0 -0.1 nan inf"),
        ("--optim.backbone_lr", "-0.1 nan inf"),
        ("--optim.momentum", "-1 nan"),
        ("--optim.weight_decay", "-1 nan"),
        ("--run.seed", f"-1 {2**70}"),
        ("--run.steps", "0"),
        ("--run.log_every", "0"),
        ("--run.eval_every", "-1"),
        ("--run.save_minutes", "-1 nan"),
        ("--moco.queue_size", "-1"),
        ("--moco.temperature", "0 nan"),
        ("--moco.key_momentum", "-0.1 1.1 nan"),
        ("--moco.embedding_dim", "0"),
        ("--rationale.detectors", "0 129"),
        ("--rationale.temperature", "0 nan"),
        ("--rationale.fit_weight", "-1 nan inf"),
        ("--rationale.lr", "0 -1 nan inf"),
    ],
)
def test_values_out_of_range(flag: str, values: str, flat: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for value in values.split():
        args = [*ONE_STEP, "--data.root", flat, "--run.dir", tmp_path / "run", flag, value]
        assert flag in refused(train.main, *args)
        assert not (tmp_path / "run").exists()


def test_released_branch_without_a_branch(refused: Callable[..., str]) -> None:
    line = refused(train.main, "cub200-released", "--rationale.enabled", "False")
    assert "--released.enabled needs --rationale.enabled True" in line


def unlabelled_file(root: Path) -> None:
    (root / "notes.txt").write_text("no picture")


def only_test(root: Path) -> None:
    (root / "test" / "crow").mkdir(parents=True)
    (root / "test" / "crow" / "0.jpg").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "culprits"),
    [
        (unlabelled_file, ("no images", ".jpg")),
        (only_test, ("none named train",)),
    ],
    ids=["no pictures", "only test"],
)
@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_unusable_folders_of_images(
    main: Main,
    make: Callable[[Path], None],
    culprits: tuple[str, ...],
    tmp_path: Path,
    finished: Path,
    refused: Callable[..., str],
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make(root)
    args = (*ONE_STEP, "--run.dir", tmp_path / "run") if main is train.main else (finished,)
    line = refused(main, *args, "--data.root", root)
    assert str(root) in line
    assert all(culprit in line for culprit in culprits)
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(flat: Path, finished: Path, refused: Callable[..., str]) -> None:
    before = (finished / "weights.safetensors").stat().st_mtime_ns
    line = refused(train.main, *ONE_STEP, "--data.root", flat, "--run.dir", finished)
    assert f"{finished} already holds a run" in line
    assert f"--resume {finished}" in line
    assert (finished / "weights.safetensors").stat().st_mtime_ns == before


def test_run_folder_that_cannot_be_written(flat: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):  # permissions do not stop a test run by root
        assert f"--run.dir {folder}" in refused(train.main, *ONE_STEP, "--data.root", flat, "--run.dir", folder)


def test_resume_of_what_is_no_run(flat: Path, tmp_path: Path, finished: Path, refused: Callable[..., str]) -> None:
    assert f"no run folder {tmp_path / 'none'}" in refused(train.main, "--resume", tmp_path / "none")
    assert f"no run folder {finished / 'config.yaml'}" in refused(train.main, "--resume", finished / "config.yaml")
    assert f"{flat} is not a run folder: it has no config.yaml" in refused(train.main, "--resume", flat)


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (lambda file: file.unlink(), "no resume.pt"),
        (lambda file: file.write_bytes(b""), "resume.pt"),
        (lambda file: file.write_bytes(b"not a checkpoint"), "resume.pt"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "resume.pt"),
        (lambda file: torch.save([1], file), "resume.pt was not written by fastcr.train"),
        (lambda file: torch.save({"step": 1, "model": 5, "optimizer": 1, "random": 1}, file), "resume.pt"),
    ],
    ids=["missing", "empty", "text", "truncated", "foreign", "wrong types"],
)
def test_broken_resume(
    damage: Callable[[Path], object], culprit: str, copied: Path, refused: Callable[..., str]
) -> None:
    damage(copied / "resume.pt")
    line = refused(train.main, "--resume", copied)
    assert str(copied) in line
    assert culprit in line


@pytest.mark.parametrize(
    "text", ["", "[1]", "run: 5", "run: [", "nope: 1", "run:\n  nope: 1", "optim:\n  lr: abc", "data:\n  loader: fast"]
)
def test_broken_config(text: str, copied: Path, refused: Callable[..., str]) -> None:
    (copied / "config.yaml").write_text(text)
    line = refused(train.main, "--resume", copied)
    assert f"{copied}/config.yaml" in line
    if "nope" in text:
        assert "nope" in line


@pytest.mark.parametrize(
    ("make", "culprits"),
    [
        (lambda file: None, ("no weights file",)),
        (lambda file: file.write_bytes(b"text"), ("checkpoint",)),
        (lambda file: torch.save([1, 2], file), ("no dict of tensors",)),
        (lambda file: torch.save({"conv1.weight": torch.ones(2)}, file), ("conv1.weight is [2]",)),
        (lambda file: torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, file), ("lacks", "allow_missing_weights")),
    ],
    ids=["missing", "text", "list", "shape", "incomplete"],
)
def test_unusable_initial_weights(
    make: Callable[[Path], object], culprits: tuple[str, ...], flat: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "weights.pt"
    make(file)
    args = (*ONE_STEP, "--data.root", flat, "--run.dir", tmp_path / "run", "--model.weights", file)
    line = refused(train.main, *args)
    assert all(culprit in line for culprit in (str(file), *culprits)), line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "fastcr.data.dali_views", raising=False)
    monkeypatch.delattr("nvidia.dali", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_loader_on_the_cpu_needs_no_dali(
    without_dali: None, flat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train.main([*ONE_STEP, "--data.root", str(flat), "--run.dir", str(tmp_path / "run"), "--data.loader", "auto"])
    captured = capfd.readouterr()
    assert "loader: fused; cache: host; device: cpu, fp32; 64 training images" in captured.out
    assert "DALI" not in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("name", ["a[b]c", "x[/y]z"])
def test_names_with_brackets_are_printed_as_they_are(
    name: str, flat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name  # square brackets are markup to rich; the slash makes it a closing tag
    train.main([*ONE_STEP, "--data.root", str(flat), "--run.dir", str(folder)])
    assert f"run folder: {folder}" in capfd.readouterr().out.splitlines()


def test_mistaken_arguments_of_evaluate(
    finished: Path, birds: Path, flat: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    main, file = evaluate.main, finished / "weights.safetensors"
    assert "PATH" in refused(main)
    assert "did you mean --data.root?" in refused(main, finished, "--data.rot", birds)
    assert str(tmp_path / "none") in refused(main, tmp_path / "none")
    assert f"{flat} is not a run folder: it has no config.yaml" in refused(main, flat)
    assert "--data.root" in refused(main, file)
    assert f"{flat} has no labels" in refused(main, finished)
    assert f"{flat} has no labels" in refused(main, file, "--data.root", flat)
    assert "--run.device" in refused(main, file, "--data.root", birds, "--run.device", "gpu")
    assert "--data.workers" in refused(main, file, "--data.root", birds, "--data.workers", -1)


def test_run_without_weights_cannot_be_evaluated(copied: Path, birds: Path, refused: Callable[..., str]) -> None:
    (copied / "weights.safetensors").unlink()
    line = refused(evaluate.main, copied, "--data.root", birds)
    assert f"{copied} is not a run folder, or its run has saved nothing yet: no weights.safetensors in it" in line


def odd_facts(**facts: object) -> Callable[[Path], None]:
    whole = {"backbone": "resnet18", "last_stage": "layer3", "stem_maxpool": True, "detectors": 0, "temperature": 0.4}
    whole |= {"attention": "softmax", "image_size": 32}

    def make(file: Path) -> None:
        save_weights(file, {"backbone.conv1.weight": torch.ones(2)}, whole | facts)

    return make


def metadata(text: str) -> Callable[[Path], None]:
    return lambda file: safetensors.torch.save_file({"a": torch.ones(2)}, file, {"fastcr": text})


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda file: file.write_bytes(b""), "whole safetensors file"),
        (lambda file: file.write_bytes(b"\xff" * 50), "whole safetensors file"),
        (lambda file: safetensors.torch.save_file({"a": torch.ones(2)}, file), "no fastcr metadata"),
        (metadata("{"), ""),
        (metadata("[1]"), ""),
        (metadata('{"backbone": "resnet18"}'), "does not hold what its metadata says"),
        (odd_facts(), "does not hold what its metadata says"),
        (odd_facts(backbone="vit"), "vit"),
        (odd_facts(last_stage="layer9"), "layer9"),
        (odd_facts(detectors="many"), ""),
    ],
    ids=["empty", "bytes", "bare", "no json", "list", "few facts", "shapes", "backbone", "stage", "detectors"],
)
def test_unusable_weights_files(
    make: Callable[[Path], object], culprit: str, birds: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "weights.safetensors"
    make(file)
    line = refused(evaluate.main, file, "--data.root", birds)
    assert str(file) in line
    assert culprit in line
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_help(main: Main, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    captured = capfd.readouterr()
    assert (stop.value.code, captured.err) == (0, "")
    sections = [field.name for field in dataclasses.fields(Config) if field.name != "preset"]
    for section in sections if main is train.main else ("data", "run"):
        assert f"--{section}." in captured.out
    if main is train.main:
        assert all(f"  {name}: " in captured.out for name in PRESETS)
        assert "--preset" not in captured.out


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


def test_unknown_setting_in_yaml_is_refused_by_name(tmp_path: Path) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  seed: 0", "  sead: 0"))
    with pytest.raises(UsageError, match="sead"):
        load_config(tmp_path / "config.yaml")


def test_flags_override_the_preset_and_the_resumed_run(finished: Path) -> None:
    config, resumed = read_command_line(["cub200-released", "--optim.lr", "0.5"])
    assert resumed is None
    assert config == dataclasses.replace(
        PRESETS["cub200-released"](), optim=dataclasses.replace(PRESETS["cub200-released"]().optim, lr=0.5)
    )
    config, resumed = read_command_line(["--run.steps", "7", "--resume", str(finished)])
    assert (resumed, config.run.steps, config.data.image_size) == (finished, 7, 32)


@pytest.mark.parametrize(
    ("precision", "device", "hardware", "dtype"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("auto", "cuda", False, torch.bfloat16),
        ("fp32", "cpu", True, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp16", "cuda", True, torch.float16),
    ],
)
def test_precision_is_what_the_processor_can_do(
    precision: str, device: str, hardware: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: hardware)
    assert machine.pick_dtype(precision, torch.device(device)) == dtype


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="there is no /proc")
def test_hardware_that_multiplies_bf16_is_what_the_kernel_lists() -> None:
    asked = start("-c", "from fastcr.runs.machine import multiplies_bf16; print(multiplies_bf16())")
    flags = Path("/proc/cpuinfo").read_text()
    assert (asked.communicate(timeout=60)[0].strip() == "True") == bool(
        re.search(r"avx512_bf16|amx_tile|\bbf16\b", flags)
    )


@pytest.mark.parametrize("program", ["/venv/bin/fastcr", "/site/fastcr/train.py", "/venv/bin/pytest"])
def test_imports_are_no_garbage_in_a_process_of_ones_own(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    try:
        spare_imports()
        assert bool(gc.get_freeze_count()) == ("pytest" not in program)
    finally:
        gc.unfreeze()
