"""What the tests of several ops share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcr.kernels.settings import TABLE


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing wrote shows: NaN, or an index out of every range."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(2**30) if tensor.itemsize >= 4 else tensor

        return made

    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs in place of hundreds: each has several images, or several tiles of keys."""
    for kernel, rows in TABLE.items():
        few = {row: settings | {name: 2 for name in settings if name == "programs"} for row, settings in rows.items()}
        monkeypatch.setitem(TABLE, kernel, few)
