"""Every kernel is launched with the device of its tensors as the current one: Triton launches where that is."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcr.data.views import MEAN, STD
from fastcr.kernels.two_views import two_views
from tests.kernels import test_two_views as views
from tests.kernels.harness import OPS, SMALL, draw, run

FILES = (Path(__file__).parents[2] / "kernels").glob("*.py")


def test_every_kernel_is_launched_inside_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, current, launched = pytest.importorskip("triton"), list[Tensor](), set[Any]()
    kernel = type(triton.jit(lambda x: x))
    original = kernel.__getitem__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def record(self: Any, grid: Any) -> Any:
        assert current, self.fn.__name__
        launched.add(self.fn.__name__)
        return original(self, grid)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel, "__getitem__", record)
    for op in OPS.keys() & SMALL.keys():
        run(op, draw(op), impl="triton")
    two_views(**views.draw([(9, 9)])[0], size=8, mean=MEAN, std=STD, impl="triton")
    found = [vars(import_module(f"fastcr.kernels.{file.stem}")) for file in FILES]
    every = {name for module in found for name, each in module.items() if isinstance(each, kernel)}
    assert launched == {name for name in every if name.endswith("kernel")}  # others are called by them
