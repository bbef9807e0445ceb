"""What `python -m tests.ptx` executes: every op, forward and backward, at sizes of every row of the launch settings.

This is the one file here that knows the project: `CASES` has a case by each name, and `check` runs one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from fastcr.kernels import launch
from fastcr.kernels.settings import TABLE, Settings
from tests.kernels import test_two_views as views
from tests.kernels.harness import BF16, F16, F32, OPS, assert_as_exact_as_torch, draw

PROGRAMS = 8  # of a launch, in place of hundreds: each then has several images, or several tiles of keys
# images, channels, positions, detectors of the two ops with detectors, and options of `rationale_fit`; channels in
# multiples of 16 are copied asynchronously, 90 positions are two tiles, the second one not full
MAPS: list[tuple[torch.dtype, tuple[int, ...], dict[str, Any]]] = [
    (BF16, (9, 256, 49, 32), {}),
    (F16, (2, 70, 90, 5), {"target": "sum", "pool_weight": 0.5}),
    (BF16, (2, 192, 90, 20), {"cam_keeps": "match"}),
    (BF16, (9, 256, 49, 64), {}),
    (BF16, (2, 192, 90, 128), {"target": "sum"}),
    (F16, (2, 70, 49, 33), {"stop_gradient": True}),
    (F32, (2, 128, 49, 32), {}),
    (F32, (2, 64, 35, 64), {"target": "sum", "pool_weight": 0.5}),
    (BF16, (3, 64, 1, 1), {}),
    (BF16, (2, 2048, 49, 1), {"cam_keeps": "match", "stop_gradient": True}),  # the presets' own
]
COMMON = [(BF16, 19, 256, 49), (F16, 9, 700, 15), (BF16, 9, 2100, 4), (F32, 9, 256, 49), (F32, 9, 700, 15)]
COMMON += [(F32, 9, 2100, 4)]
# queries, dimensions, keys in the queue
QUEUES = {
    "info_nce": [
        *(
            (BF16, 3, 256, 2000),
            (BF16, 3, 512, 1000),
            (BF16, 70, 256, 2000),
            (BF16, 70, 64, 600),
            (BF16, 70, 512, 1000),
        ),
        *((F16, 130, 128, 1500), (F16, 17, 100, 777), (BF16, 3, 1280, 300), (BF16, 20, 600, 300)),
        *((F32, 3, 128, 600), (F32, 3, 512, 300), (F32, 40, 128, 300), (F32, 20, 512, 150)),
        *((F32, 3, 600, 40), (F32, 20, 600, 40)),
    ],
    "relational": [
        *((BF16, 3, 256, 1000), (F16, 5, 100, 333), (BF16, 3, 512, 600), (BF16, 40, 128, 600), (BF16, 40, 512, 300)),
        *((F32, 3, 128, 300), (F32, 3, 512, 300), (F32, 20, 128, 300), (F32, 20, 512, 150)),
        *((BF16, 3, 1280, 300), (BF16, 20, 600, 300), (F32, 3, 600, 40), (F32, 12, 600, 40)),
        (BF16, 64, 256, 1500),  # the presets' batch and head
    ],
}
# compares with fp64; and the rows of the launch settings that it is to use on the current target
Case = tuple[Callable[[], None], Callable[[], set[str]]]


@contextlib.contextmanager
def few_programs() -> Iterator[set[str]]:
    """Launch few programs of many; the rows of the launch settings that are used, as `kernel: row`."""
    used: set[str] = set()

    class Rows(dict[str, Settings]):
        def __getitem__(self, row: str) -> Settings:
            used.add(next(f"{kernel}: {row}" for kernel, rows in TABLE.items() if rows is self))
            settings = super().__getitem__(row)
            return settings | {name: PROGRAMS for name in settings if name == "programs"}

    with mock.patch.dict(TABLE, {kernel: Rows(rows) for kernel, rows in TABLE.items()}):
        yield used


def of_op(op: str, dtype: torch.dtype, letters: str, numbers: tuple[int, ...], **options: Any) -> dict[str, Case]:
    """An op at the sizes of its docstring's letters."""
    sizes = dict(zip(letters, numbers, strict=True))
    name = " ".join((op, str(dtype).removeprefix("torch."), *(f"{letter}{size}" for letter, size in sizes.items())))

    def check() -> None:
        assert_as_exact_as_torch(op, draw(op, dtype, **sizes), dtype, **options)

    return {name: (check, lambda: {f"{kernel}: {row}" for kernel, row in OPS[op].rows(sizes, dtype).items()})}


def two_views(size: int, dtype: torch.dtype) -> None:
    views.assert_as_exact_as_torch(views.draw(views.SIZES)[0], size, dtype)


CASES: dict[str, Case] = {}
for dtype, numbers, options in MAPS:
    CASES |= of_op("rationale_fit", dtype, "BCSK", numbers, **options) | of_op("rationale_pool", dtype, "BCSK", numbers)
for dtype, *sizes in COMMON:
    CASES |= of_op("common_weights", dtype, "BCS", tuple(sizes))
for op, shapes in QUEUES.items():
    for dtype, *sizes in shapes:
        CASES |= of_op(op, dtype, "BDN", tuple(sizes))
for dtype, size in ((BF16, 16), (F16, 19), (F32, 16)):
    CASES[f"two_views {dtype}".replace("torch.", "")] = partial(two_views, size, dtype), set


def check(name: str) -> None:
    """Run a case where `executed` is in force. `AssertionError`: values are wrong, or other rows are used."""
    compare, wanted = CASES[name]
    rows = wanted()
    with mock.patch.object(launch, "INTERPRET", True), few_programs() as used:  # the ops then take CPU tensors
        compare()
    assert used == rows, f"it used the launch settings {sorted(used)}, not {sorted(rows)}"
