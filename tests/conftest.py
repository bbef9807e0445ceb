"""What tests of several files share; and before all, where the kernels run.

Without a GPU they are tested under Triton's interpreter, which must be chosen before Triton is imported.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small only get slower with threads that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn birds in 16 classes, 64 pictures to train on and 32 to test; not to be changed."""
    from fastcr.synthetic import write_synthetic  # here, for nothing of fastcr may come before the choice above

    return write_synthetic(tmp_path_factory.mktemp("data") / "birds", train_per_class=4, test_per_class=2)


@pytest.fixture(scope="session")
def flat(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its training pictures without labels: nothing is evaluated, which makes for short runs. Not to be changed."""
    root = tmp_path_factory.mktemp("flat")
    for i, picture in enumerate(sorted((birds / "train").glob("*/*.jpg"))):
        shutil.copyfile(picture, root / f"{i:03d}.jpg")
    return root
