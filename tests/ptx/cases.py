"""What `python -m tests.ptx` executes: every op, forward and backward, at sizes of every row of the launch settings.

This is the one file here that knows the project: `CASES` has a case by each name, and `check` runs one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastcr.kernels import launch
from fastcr.kernels.settings import TABLE, Settings
from tests.kernels import test_two_views as views
from tests.kernels.harness import BF16, F16, F32, OPS, assert_as_exact_as_torch, draw

PROGRAMS = 8  # of a launch, in place of hundreds: each then has several images, or several tiles of keys


class Case(NamedTuple):
    """An op at some sizes."""

    check: Callable[[], None]  # values and gradients against fp64, within the tolerances of the other kernel tests
    rows: set[str]  # of the launch settings that it is to use


class Recorder(dict[str, Settings]):
    """Rows of one kernel: remembers which are used, and makes few programs of many."""

    used: set[str]

    def __getitem__(self, row: str) -> Settings:
        self.used.add(row)
        settings = super().__getitem__(row)
        return settings | {name: PROGRAMS for name in settings if name == "programs"}


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The rows of the launch settings that are used, as `kernel: row`."""
    recorders = {kernel: Recorder(rows) for kernel, rows in TABLE.items()}
    used: set[str] = set()
    for recorder in recorders.values():
        recorder.used = set()
    with mock.patch.dict(TABLE, recorders):
        yield used
    used.update(f"{kernel}: {row}" for kernel, recorder in recorders.items() for row in recorder.used)


def case(op: str, dtype: torch.dtype, options: dict[str, Any] | None = None, **sizes: int) -> Case:
    """An op at the sizes of its docstring's letters."""

    def check() -> None:
        assert_as_exact_as_torch(op, draw(op, dtype, **sizes), dtype, **options or {})

    return Case(check, {f"{kernel}: {row}" for kernel, row in OPS[op].rows(sizes, dtype).items()})


def two_views(size: int, dtype: torch.dtype) -> Case:
    def check() -> None:
        views.assert_as_exact_as_torch(views.draw(views.SIZES)[0], size, dtype)

    return Case(check, set())


def both(name: str, dtype: torch.dtype, options: dict[str, Any] | None = None, **sizes: int) -> dict[str, Case]:
    """The two ops with detectors; `options` are of `rationale_fit`."""
    return {
        f"rationale_fit {name}": case("rationale_fit", dtype, options, **sizes),
        f"rationale_pool {name}": case("rationale_pool", dtype, **sizes),
    }


# channels in multiples of 16 are copied asynchronously; 90 positions are two tiles, the second one not full
CASES: dict[str, Case] = {
    **both("bf16 K32", BF16, B=9, C=256, S=49, K=32),
    **both("fp16 K5 odd", F16, {"target": "sum", "pool_weight": 0.5}, B=2, C=70, S=90, K=5),
    **both("bf16 K20 tiles", BF16, {"cam_keeps": "match"}, B=2, C=192, S=90, K=20),
    **both("bf16 K64", BF16, B=9, C=256, S=49, K=64),
    **both("bf16 K128 tiles", BF16, {"target": "sum"}, B=2, C=192, S=90, K=128),
    **both("fp16 K33 odd", F16, {"stop_gradient": True}, B=2, C=70, S=49, K=33),
    **both("fp32 K32", F32, B=2, C=128, S=49, K=32),
    **both("fp32 K64 tiles", F32, {"target": "sum", "pool_weight": 0.5}, B=2, C=64, S=35, K=64),
    **both("bf16 K1 one position", BF16, B=3, C=64, S=1, K=1),
    "common_weights bf16 C256": case("common_weights", BF16, B=19, C=256, S=49),
    "common_weights fp16 C700 odd": case("common_weights", F16, B=9, C=700, S=15),
    "common_weights bf16 C2100": case("common_weights", BF16, B=9, C=2100, S=4),
    "common_weights fp32 C256": case("common_weights", F32, B=9, C=256, S=49),
    "common_weights fp32 C700": case("common_weights", F32, B=9, C=700, S=15),
    "common_weights fp32 C2100": case("common_weights", F32, B=9, C=2100, S=4),
    "info_nce bf16 B3 D256": case("info_nce", BF16, B=3, D=256, N=2000),
    "info_nce bf16 B3 D512": case("info_nce", BF16, B=3, D=512, N=1000),
    "info_nce bf16 B70 D256": case("info_nce", BF16, B=70, D=256, N=2000),
    "info_nce bf16 B70 D64": case("info_nce", BF16, B=70, D=64, N=600),
    "info_nce bf16 B70 D512": case("info_nce", BF16, B=70, D=512, N=1000),
    "info_nce fp16 B130 D128": case("info_nce", F16, B=130, D=128, N=1500),
    "info_nce fp16 B17 D100 odd": case("info_nce", F16, B=17, D=100, N=777),
    "info_nce fp32 B3 D128": case("info_nce", F32, B=3, D=128, N=600),
    "info_nce fp32 B3 D512": case("info_nce", F32, B=3, D=512, N=300),
    "info_nce fp32 B40 D128": case("info_nce", F32, B=40, D=128, N=300),
    "info_nce fp32 B20 D512": case("info_nce", F32, B=20, D=512, N=150),
    "relational bf16 B3 D256": case("relational", BF16, B=3, D=256, N=1000),
    "relational fp16 B5 D100 odd": case("relational", F16, B=5, D=100, N=333),
    "relational bf16 B3 D512": case("relational", BF16, B=3, D=512, N=600),
    "relational bf16 B40 D128": case("relational", BF16, B=40, D=128, N=600),
    "relational bf16 B40 D512": case("relational", BF16, B=40, D=512, N=300),
    "relational fp32 B3 D128": case("relational", F32, B=3, D=128, N=300),
    "relational fp32 B3 D512": case("relational", F32, B=3, D=512, N=300),
    "relational fp32 B20 D128": case("relational", F32, B=20, D=128, N=300),
    "relational fp32 B20 D512": case("relational", F32, B=20, D=512, N=150),
    "two_views bf16": two_views(16, BF16),
    "two_views fp16 ragged": two_views(19, F16),
    "two_views fp32": two_views(16, F32),
}


def check(name: str) -> None:
    """Run a case where `executed` is in force. `AssertionError`: values are wrong, or other rows are used."""
    with mock.patch.object(launch, "INTERPRET", True), recorded() as used:  # the ops then take CPU tensors
        CASES[name].check()
    assert used == CASES[name].rows, f"it used the launch settings {sorted(used)}, not {sorted(CASES[name].rows)}"
