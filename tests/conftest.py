"""What tests of several files share; and before all, where the kernels run.

Without a GPU they are tested under Triton's interpreter, which must be chosen before Triton is imported.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core leaves no core for more threads; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    """Where the kernels run: figures and failures mean little without it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernels: under Triton's interpreter"
    return f"kernels: compiled for {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU: not run'}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small only get slower with threads that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def one_precision() -> Iterator[None]:
    """A CPU that multiplies bf16 shall give the figures that others give."""
    from fastcr.runs import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "multiplies_bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn birds of 16 species, 64 pictures to train on and 32 to test; not to be changed."""
    # here, for nothing of fastcr may come before the choice above
    from fastcr.data.synthetic import CLASSES, write_synthetic

    root = write_synthetic(tmp_path_factory.mktemp("data") / "birds", train_per_class=4, test_per_class=2)
    for split in ("train", "test"):
        for kind in CLASSES[16:]:  # sums are easier with powers of two
            shutil.rmtree(root / split / kind.name)
    return root


@pytest.fixture(scope="session")
def flat(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its training pictures without labels: nothing is evaluated, which makes for short runs. Not to be changed."""
    root = tmp_path_factory.mktemp("flat")
    for i, picture in enumerate(sorted((birds / "train").glob("*/*.jpg"))):
        shutil.copyfile(picture, root / f"{i:03d}.jpg")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of a small random encoder, alone in its folder; not to be changed."""
    from tests.shared import write_weights

    return write_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="session")
def finished(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with the birds; not to be changed."""
    from fastcr import train
    from tests.shared import TINY

    folder = tmp_path_factory.mktemp("runs") / "finished"
    three = [*TINY, "--run.steps", "3", "--optim.epochs", "8", "--moco.queue_size", "24"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main([*three, "--data.root", str(birds), "--run.dir", str(folder)])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """That run, for a test to change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command ends with for bad input: `refused(train.main, "--optim.lr", 0)`."""

    def call(main: Callable[[Sequence[str]], None], *args: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        assert stop.value.code == 2
        errors = capfd.readouterr().err
        (line,) = errors.splitlines()
        assert line.startswith(f"{main.__module__}: error: ")
        assert "Traceback" not in line
        assert "object has no attribute" not in line  # Python's words, not the user's
        return line

    return call
