"""The Triton kernels against the references in fp64; without a GPU they run under Triton's interpreter."""

from random import Random
from typing import Any

import pytest
import torch

from tests.kernels.harness import (
    BF16,
    DTYPES,
    F16,
    F32,
    SMALL,
    TOLERANCE,
    assert_as_exact_as_torch,
    call,
    draw,
    pairwise,
    run,
)

pytest.importorskip("triton")

slow = pytest.mark.slow
MAPS = ["rationale_pool", "rationale_fit"]
QUEUED = ["info_nce", "relational"]
OPS = list(SMALL)
LETTERS = dict.fromkeys(MAPS, "BCSK") | dict.fromkeys(QUEUED, "BDN") | {"common_weights": "BCS"}
# of each group of ops: shapes, and larger ones
SHAPES = {
    (*MAPS,): (
        [(0, 64, 49, 5), (1, 96, 49, 32), (3, 64, 1, 1), (3, 64, 16, 33), (1, 64, 100, 128), (1, 131, 16, 5),
         (5, 70, 21, 16)],
        [(1, 512, 49, 32), (1, 2047, 16, 5), (1, 2048, 49, 32), (3, 2047, 196, 128), (3, 64, 784, 33),
         (1, 512, 1600, 5)],
    ),
    (*QUEUED,): (
        [(0, 64, 1000), (1, 64, 1), (3, 64, 500), (1, 130, 300), (3, 128, 1), (3, 256, 100), (17, 5, 33), (5, 700, 40)],
        [(3, 256, 4096), (1, 64, 4096), (70, 512, 1000), (20, 2048, 600)],
    ),
    ("common_weights",): (
        [(0, 64, 49), (3, 64, 1), (1, 5, 900), (2, 2047, 3), (1, 2049, 2), (41, 3, 9)],
        [(2, 4096, 9), (40, 2048, 49), (3, 640, 1600)],
    ),
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {},
    {"target": "sum", "cam_keeps": "match"},
    {"target": "sum", "pool_weight": 0.5},
    {"cam_keeps": "match", "pool_weight": 0.5, "stop_gradient": True},
    {"stop_gradient": True},
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("op", "shape", "dtype", "other"),
    [
        pytest.param(*case, marks=mark)
        for ops, sizes in SHAPES.items()
        for shapes, mark in zip(sizes, ((), slow), strict=True)
        for case in pairwise(op=ops, shape=shapes, dtype=DTYPES, other=[False] if mark else [False, True])
    ],
    ids=str,
)
def test_values_and_gradients_are_as_exact_as_the_references(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, other: bool
) -> None:
    arguments = draw(op, dtype, **dict(zip(LETTERS[op], shape, strict=True)))
    options = {"cam_keeps": "match" if other else "mismatch"} if op == "common_weights" else {}
    if op == "common_weights":
        arguments["gradient"][1:2] = 0  # an image without GradCAM
    elif other and op in MAPS:
        arguments["bias"] = None
    elif other:  # it is not known whose keys are in the queue
        arguments = {name: each for name, each in arguments.items() if not name.endswith("images")}
    assert_as_exact_as_torch(op, arguments, dtype, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("options", "dtype", "images"), pairwise(options=OPTIONS, dtype=DTYPES, images=[3, 0]), ids=str
)
def test_every_option_of_fit_is_as_exact_as_the_reference(
    options: dict[str, Any], dtype: torch.dtype, images: int
) -> None:
    arguments = draw("rationale_fit", dtype, B=images)
    arguments["gradient"][1:2] = 0  # the second image has no GradCAM, whatever the sign
    assert_as_exact_as_torch("rationale_fit", arguments, dtype, **options)
    target = call("rationale_fit", arguments, impl="triton", **options)[2][1:2]
    torch.testing.assert_close(target, torch.full_like(target, 1 / 20))


@pytest.mark.usefixtures("poisoned", "few_programs")
@pytest.mark.parametrize("op", OPS)
def test_a_program_may_have_several_images_or_tiles_and_the_last_fewer(op: str) -> None:
    sizes = {"B": 5} if "S" in SMALL[op] else {"N": 700}
    assert_as_exact_as_torch(op, draw(op, **sizes), F32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("op", "dtype", "narrow"), pairwise(op=MAPS, dtype=DTYPES, narrow=[F16, BF16]), ids=str)
def test_parameters_may_be_narrow(op: str, dtype: torch.dtype, narrow: torch.dtype) -> None:
    arguments = draw(op, dtype)
    for name in {"detectors", "bias", "gradient"} & arguments.keys():
        arguments[name] = arguments[name].detach().to(narrow).requires_grad_(name != "gradient")
    assert_as_exact_as_torch(op, arguments, max(dtype, narrow, key=lambda each: TOLERANCE[each]))


@pytest.mark.parametrize(("op", "wide"), pairwise(op=QUEUED, wide=["query", "key", "queue"]), ids=str)
def test_queries_keys_and_queue_may_differ_in_dtype(op: str, wide: str) -> None:
    arguments = draw(op, BF16)
    arguments[wide] = arguments[wide].detach().float().requires_grad_(arguments[wide].requires_grad)
    assert_as_exact_as_torch(op, arguments, BF16)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shapes", [pytest.param(4, id="sample"), 100])
def test_any_shape(shapes: int) -> None:
    random = Random(shapes)
    for _ in range(shapes):
        most = {"B": 5, "C": 70, "S": 80, "K": 128, "D": 70, "N": 300}
        sizes = {letter: random.randint(letter != "B", size) for letter, size in most.items()}
        for op in OPS:
            assert_as_exact_as_torch(op, draw(op, **{letter: sizes[letter] for letter in LETTERS[op]}), F32)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op: str) -> None:
    for dtype in (F32, BF16):
        results = [run(op, draw(op, dtype), impl="triton") for _ in range(2)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_query_that_is_its_key_at_one_temperature_is_left_alone(dtype: torch.dtype) -> None:
    """The gradient is the difference of two means, and 16 bits must not be what is left of it."""
    arguments, same = draw("relational", dtype), {"temperature": 0.1, "key_temperature": 0.1, "impl": "triton"}
    other = run("relational", arguments, **same)[1]["query"]
    arguments["query"] = arguments["key"].clone().requires_grad_()
    assert other.abs().max() > 0.1
    assert run("relational", arguments, **same)[1]["query"].abs().max() == 0
