"""Gradients of gradients: right with `impl="torch"`, an error from the kernels, which have none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.harness import LEARNS, call, draw, fresh

SIZES = {"B": 2, "C": 3, "S": 6, "K": 4, "D": 4, "N": 12}
CASES: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "relational": {},
    "rationale_pool": {},
    "rationale_fit": {"stop_gradient": True, "pool_weight": 0.5},
}


def of_inputs(op: str, arguments: dict[str, Any], **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """The outputs of `op` that carry gradients, as a function of the inputs that learn; and these."""
    names = [name for name in LEARNS[op] if not (options.get("stop_gradient") and name == "features")]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = call(op, arguments | dict(zip(names, inputs, strict=True)), **options)
        return tuple(each for each in outputs if each.requires_grad)

    return function, [arguments[name] for name in names]


@pytest.mark.parametrize("op", CASES)
def test_plain_torch_gives_right_gradients_of_gradients(op: str) -> None:
    arguments = fresh(op, draw(op, **SIZES), Tensor.double)
    assert torch.autograd.gradgradcheck(*of_inputs(op, arguments, impl="torch", **CASES[op]))


def test_so_it_does_by_the_features_of_the_fit() -> None:
    """The target moves with the features but is a constant: only a GradCAM of 0 leaves no other difference."""
    arguments = fresh("rationale_fit", draw("rationale_fit", **SIZES), Tensor.double)
    arguments["gradient"] = torch.zeros_like(arguments["gradient"])
    assert torch.autograd.gradgradcheck(*of_inputs("rationale_fit", arguments, impl="torch"))


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("by", ["backward", "grad"])
def test_the_kernels_refuse_to_be_differentiated_twice(op: str, by: str) -> None:
    pytest.importorskip("triton")
    function, inputs = of_inputs(op, draw(op, **SIZES), impl="triton", **CASES[op])
    loss = sum(each.square().sum() for each in function(*inputs))
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    plain = torch.autograd.grad(sum(each.square().sum() for each in function(*inputs)), inputs)
    torch.testing.assert_close(gradients, plain, rtol=0, atol=0)
    for gradient in gradients:
        penalty = gradient.square().sum()
        again = partial(torch.autograd.grad, penalty, inputs, allow_unused=True) if by == "grad" else penalty.backward
        with pytest.raises(RuntimeError, match=f'the kernels of {op} give no gradient .*impl="torch"'):
            again(retain_graph=True)
