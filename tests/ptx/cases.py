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
from fastcr.kernels.common_weights import common_weights
from fastcr.kernels.fit_pairs import takes_pairs
from fastcr.kernels.settings import TABLE, Settings, channels_class, contrast_class, map_class
from tests.kernels import test_common_weights as weights
from tests.kernels import test_kernels as kernels
from tests.kernels import test_relational as queued
from tests.kernels import test_two_views as views

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
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


def maps(op: str, *shape: int, dtype: torch.dtype, **options: Any) -> Case:
    """`rationale_fit` or `rationale_pool` of `images, channels, height, width, detectors`."""

    def check() -> None:
        function = {"fit": kernels.fit, "pool": kernels.pool}[op]
        kernels.assert_as_exact_as_torch(function, kernels.draw(*shape, dtype=dtype), dtype, **options)

    row, (images, channels, height, width, detectors) = map_class(dtype, shape[-1]), shape
    pairs = op == "fit" and takes_pairs(torch.empty(images, height * width, channels, dtype=dtype), detectors)
    attention = {f"attention_gradient: {map_class(dtype)}"} if op == "pool" else set()
    forward = "fit_pairs" if pairs else f"rationale_{op}"
    return Case(check, {f"{forward}: {row}", f"spread_gradients: {row}"} | attention)


def common(*shape: int, dtype: torch.dtype) -> Case:
    """`common_weights` of `images, channels, height, width`."""

    def check() -> None:
        features, gradient = weights.draw(shape, dtype)
        got = common_weights(features, gradient, impl="triton")
        assert weights.error(got, weights.naive(features, gradient, "mismatch")) < 1e-5

    return Case(check, {f"common_weights: {channels_class(dtype, shape[1])}"})


def contrast(*shape: int, dtype: torch.dtype) -> Case:
    """`info_nce` of `images, dimensions, keys`."""

    def check() -> None:
        kernels.assert_as_exact_as_torch(kernels.contrast, kernels.draw_contrast(*shape, dtype=dtype), dtype)

    return Case(check, {f"info_nce: {contrast_class(dtype, *shape[:2])}"})


def pulled(op: str, *shape: int, dtype: torch.dtype) -> Case:
    """`relational`, whose kernel gets queries and keys as rows, or `neighbour`, of `images, dimensions, keys`."""

    def check() -> None:
        queued.assert_as_exact_as_torch(
            {"relational": queued.relational, "neighbour": queued.nearest3}[op], queued.draw(*shape, dtype=dtype), dtype
        )

    rows = shape[0] * (2 if op == "relational" else 1)
    return Case(check, {f"{op}: {contrast_class(dtype, rows, shape[1])}"})


def every_pull(name: str, *shape: int, dtype: torch.dtype) -> dict[str, Case]:
    return {f"{op} {name}": pulled(op, *shape, dtype=dtype) for op in ("relational", "neighbour")}


def two_views(size: int, dtype: torch.dtype) -> Case:
    def check() -> None:
        views.assert_as_exact_as_torch(views.draw(views.SIZES)[0], size, dtype)

    return Case(check, set())


def both(name: str, *shape: int, dtype: torch.dtype, **options: Any) -> dict[str, Case]:
    """The two ops on maps; `options` are of `rationale_fit`."""
    return {
        f"rationale_fit {name}": maps("fit", *shape, dtype=dtype, **options),
        f"rationale_pool {name}": maps("pool", *shape, dtype=dtype),
    }


# channels in multiples of 16 are copied asynchronously; 90 positions are two tiles, the second one not full
CASES: dict[str, Case] = {
    **both("bf16 K32", 9, 256, 7, 7, 32, dtype=BF16),
    **both("fp16 K5 odd", 2, 70, 10, 9, 5, dtype=FP16, target="sum", pool_weight=0.5),
    **both("bf16 K20 tiles", 2, 192, 10, 9, 20, dtype=BF16, cam_keeps="match"),
    **both("bf16 K64", 9, 256, 7, 7, 64, dtype=BF16),
    **both("bf16 K128 tiles", 2, 192, 10, 9, 128, dtype=BF16, target="sum"),
    **both("fp16 K33 odd", 2, 70, 7, 7, 33, dtype=FP16, stop_gradient=True),
    **both("fp32 K32", 2, 128, 7, 7, 32, dtype=FP32),
    **both("fp32 K64 tiles", 2, 64, 5, 7, 64, dtype=FP32, target="sum", pool_weight=0.5),
    **both("bf16 K1 one position", 3, 64, 1, 1, 1, dtype=BF16),
    "common_weights bf16 C256": common(19, 256, 7, 7, dtype=BF16),
    "common_weights fp16 C700 odd": common(9, 700, 3, 5, dtype=FP16),
    "common_weights bf16 C2100": common(9, 2100, 2, 2, dtype=BF16),
    "common_weights fp32 C256": common(9, 256, 7, 7, dtype=FP32),
    "common_weights fp32 C700": common(9, 700, 3, 5, dtype=FP32),
    "common_weights fp32 C2100": common(9, 2100, 2, 2, dtype=FP32),
    "info_nce bf16 B3 D256": contrast(3, 256, 2000, dtype=BF16),
    "info_nce bf16 B3 D512": contrast(3, 512, 1000, dtype=BF16),
    "info_nce bf16 B70 D256": contrast(70, 256, 2000, dtype=BF16),
    "info_nce bf16 B70 D64": contrast(70, 64, 600, dtype=BF16),
    "info_nce bf16 B70 D512": contrast(70, 512, 1000, dtype=BF16),
    "info_nce fp16 B130 D128": contrast(130, 128, 1500, dtype=FP16),
    "info_nce fp16 B17 D100 odd": contrast(17, 100, 777, dtype=FP16),
    "info_nce fp32 B3 D128": contrast(3, 128, 600, dtype=FP32),
    "info_nce fp32 B3 D512": contrast(3, 512, 300, dtype=FP32),
    "info_nce fp32 B40 D128": contrast(40, 128, 300, dtype=FP32),
    "info_nce fp32 B20 D512": contrast(20, 512, 150, dtype=FP32),
    **every_pull("bf16 B3 D256", 3, 256, 1000, dtype=BF16),
    **every_pull("fp16 B5 D100 odd", 5, 100, 333, dtype=FP16),
    **every_pull("bf16 B3 D512", 3, 512, 600, dtype=BF16),
    **every_pull("bf16 B40 D128", 40, 128, 600, dtype=BF16),
    **every_pull("bf16 B40 D512", 40, 512, 300, dtype=BF16),
    **every_pull("fp32 B3 D128", 3, 128, 300, dtype=FP32),
    **every_pull("fp32 B3 D512", 3, 512, 300, dtype=FP32),
    **every_pull("fp32 B20 D128", 20, 128, 300, dtype=FP32),
    **every_pull("fp32 B20 D512", 20, 512, 150, dtype=FP32),
    "two_views bf16": two_views(16, BF16),
    "two_views fp16 ragged": two_views(19, FP16),
    "two_views fp32": two_views(16, FP32),
}


def check(name: str) -> None:
    """Run a case where `executed` is in force. `AssertionError`: values are wrong, or other rows are used."""
    with mock.patch.object(launch, "INTERPRET", True), recorded() as used:  # the ops then take CPU tensors
        CASES[name].check()
    assert used == CASES[name].rows, f"it used the launch settings {sorted(used)}, not {sorted(CASES[name].rows)}"
