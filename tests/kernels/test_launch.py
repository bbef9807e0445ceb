"""Every kernel is launched with the device of its tensors as the current one: Triton launches where that is."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcr.kernels.rationale_fit import rationale_fit

FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARDS = {"fused_op", "on_its_device"}


def decorators(function: ast.FunctionDef) -> set[str]:
    """Names of a function's decorators, with or without arguments, with or without their module."""
    called = [each.func if isinstance(each, ast.Call) else each for each in function.decorator_list]
    return {ast.unparse(each).rpartition(".")[2] for each in called}


def launches(node: ast.AST) -> list[ast.Call]:
    """Calls `kernel[grid](...)` inside a node."""
    return [each for each in ast.walk(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Subscript)]


def test_whatever_launches_a_kernel_is_guarded() -> None:
    assert len([call for file in FILES for call in launches(ast.parse(file.read_text()))]) >= 9
    for file in FILES:
        tree = ast.parse(file.read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        guarded = [call for each in functions if decorators(each) & GUARDS for call in launches(each)]
        assert [ast.unparse(call.func) for call in launches(tree) if call not in guarded] == [], file.stem
        if file.stem != "launch":  # where the guard is part of an op
            assert not any("custom_op" in decorators(each) for each in functions), file.stem


def test_an_op_runs_inside_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, current = pytest.importorskip("triton"), list[Tensor]()

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    features, seen = torch.rand(2, 3, 2, 2, device=DEVICE), list[bool]()
    kernel = type(triton.jit(lambda x: x))
    original = kernel.__getitem__

    def record(self: Any, grid: Any) -> Any:
        seen.append(bool(current) and current[-1].data_ptr() == features.data_ptr())
        return original(self, grid)

    monkeypatch.setattr(kernel, "__getitem__", record)
    rationale_fit(features, torch.rand(2, 3, device=DEVICE), torch.rand(4, 3, device=DEVICE), impl="triton")
    assert seen == [True]
