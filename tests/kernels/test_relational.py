"""`relational` and `neighbour`: references against loops in NumPy, kernels against the references in fp64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcr.kernels import launch
from fastcr.kernels import neighbour as neighbour_module
from fastcr.kernels import relational as relational_module
from fastcr.kernels.neighbour import MAX_NEIGHBOURS, neighbour, neighbour_reference
from fastcr.kernels.queue import MAX_DIM
from fastcr.kernels.relational import relational, relational_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32 = torch.float64, torch.float32
NAN, INF = float("nan"), float("inf")

# by the dtype of the inputs: what the loss, and what gradient and positive, which have that dtype, may lose beyond the
# reference in the same dtype, over the largest entry
TOLERANCE = {F32: (5e-6, 1e-5), torch.float16: (1e-5, 2e-3), torch.bfloat16: (5e-5, 2**-7)}
DTYPES = list(TOLERANCE)
# what a reference may lose to the equations in fp64
COARSE = {F64: 1e-12, F32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

slow = pytest.mark.slow
# images, dimensions, keys in the queue
SHAPES: list[Any] = [
    (0, 64, 100),
    (1, 64, 1),
    (3, 64, 1000),
    (3, 128, 5),
    (17, 5, 33),
    pytest.param((3, 256, 4096), marks=slow),
    pytest.param((9, 256, 1000), marks=slow),
    pytest.param((70, 512, 1000), marks=slow),
]
Op = Callable[..., tuple[Tensor, Tensor]]
Arguments = dict[str, Any]


def nearest3(**arguments: Any) -> tuple[Tensor, Tensor]:
    return neighbour(**arguments, neighbours=min(3, len(arguments["queue"])))


OPS: list[Op] = [relational, neighbour, nearest3]
PLAIN: dict[Op, Op] = {relational: relational_reference, neighbour: neighbour_reference}
MODULES = {relational: relational_module, neighbour: neighbour_module}


def draw(images: int, dim: int, keys: int, *, dtype: torch.dtype = F32, known: bool = True) -> Arguments:
    """Unit vectors; about every third key of the queue is of an image of the batch."""
    random = torch.Generator().manual_seed(images + dim + keys)
    sizes = {"query": images, "key": images, "queue": keys}
    drawn = {name: torch.randn(n, dim, generator=random, dtype=F64) for name, n in sizes.items()}
    arguments: Arguments = {name: F.normalize(each, dim=1).to(DEVICE, dtype) for name, each in drawn.items()}
    arguments["query"].requires_grad_()
    if known:
        queue_images = torch.randint(0, 3 * max(images, 1), (keys,), generator=random)
        arguments |= {"images": torch.arange(images, device=DEVICE), "queue_images": queue_images.to(DEVICE)}
    return arguments


def change(arguments: Arguments, convert: Callable[[Tensor], Tensor]) -> Arguments:
    """Fresh leaves, what is floating-point converted."""
    return {
        name: convert(each.detach()).requires_grad_(name == "query") if each.is_floating_point() else each
        for name, each in arguments.items()
    }


def run(op: Op, arguments: Arguments, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, positive, and the gradient by the query for some gradient of the loss."""
    loss, positive = op(**arguments, **options)
    assert (loss.requires_grad, positive.requires_grad) == (True, False)
    upstream = torch.randn(len(loss), generator=torch.Generator().manual_seed(1)).to(loss)
    (gradient,) = torch.autograd.grad(loss, arguments["query"], upstream)
    return loss.detach(), positive, gradient


def error(got: Tensor, exact: Tensor, floor: float) -> float:
    if not got.numel():
        return 0.0
    return (got.double() - exact.double()).abs().max().item() / max(exact.abs().max().item(), floor)


FLOORS = (1.0, 1e-3, 1e-3)  # a loss is a difference of logits, which are some times 1 at least


def assert_as_exact_as_torch(op: Op, arguments: Arguments, dtype: torch.dtype) -> None:
    got, plain = run(op, arguments, impl="triton"), run(op, arguments, impl="torch")
    exact = run(op, change(arguments, Tensor.double), impl="torch")
    for kind, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert (
            a.dtype == b.dtype == (arguments["query"].dtype if kind == 2 else arguments["key"].dtype if kind else F32)
        )
        assert a.shape == b.shape
        assert error(a, c, FLOORS[kind]) <= error(b, c, FLOORS[kind]) + TOLERANCE[dtype][min(kind, 1)]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing wrote shows: NaN, or an index out of every range."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(NAN if tensor.is_floating_point() else 2**30)

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


@pytest.mark.parametrize("known", [False, True], ids=["all keys", "own keys left out"])
@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_references_follow_their_equations(
    op: Op, shape: tuple[int, int, int], dtype: torch.dtype, known: bool
) -> None:
    arguments = draw(*shape, dtype=dtype, known=known)
    results = run(op, arguments, impl="torch", temperature=0.2)
    assert [each.dtype for each in results] == [torch.promote_types(dtype, F32), dtype, dtype]
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).double().numpy()
    query, key, queue = (arguments[name].detach().cpu().double().numpy() for name in ("query", "key", "queue"))
    expected = []
    for b in range(shape[0]):
        mine = arguments["queue_images"].cpu().numpy() == b if known else np.zeros(shape[2], dtype=bool)
        others = queue[~mine]
        if not len(others):
            expected.append((0.0, 0 * query[b], 0 * query[b]))
            continue
        if op is relational:
            p = softmax(others @ key[b] / 0.04)
        else:
            count = min(1 if op is neighbour else 3, len(others))
            p = np.zeros(len(others))
            p[np.argsort(-(others @ key[b]), kind="stable")[:count]] = 1 / count
        q = softmax(others @ query[b] / 0.2)
        pulled = p @ others
        positive = pulled / np.linalg.norm(pulled)
        expected.append((-(p * np.log(q)).sum(), positive, upstream[b] * (q @ others - pulled) / 0.2))
    for got, columns, floor in zip(results, zip(*expected, strict=True), FLOORS, strict=False):
        exact = torch.from_numpy(np.array(columns))
        assert error(got.cpu(), exact, floor) <= COARSE[got.dtype]


@pytest.mark.parametrize("op", OPS)
def test_finite_differences_agree_with_the_gradient(op: Op) -> None:
    arguments = change(draw(3, 4, 12), Tensor.double)
    query = arguments.pop("query")
    assert torch.autograd.gradcheck(lambda q: op(query=q, **arguments, impl="torch")[0], query)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("known", [False, True], ids=["all keys", "own keys left out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_kernels_are_as_exact_as_the_reference(
    op: Op, shape: tuple[int, int, int], dtype: torch.dtype, known: bool
) -> None:
    assert_as_exact_as_torch(op, draw(*shape, dtype=dtype, known=known), dtype)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=6, deadline=None)
@given(shape=st.tuples(st.integers(0, 20), st.integers(1, 70), st.integers(1, 300)), known=st.booleans())
def test_kernels_of_any_shape(shape: tuple[int, int, int], known: bool) -> None:
    for op in OPS:
        assert_as_exact_as_torch(op, draw(*shape, known=known), F32)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
def test_the_order_of_the_queue_does_not_matter(order: list[int]) -> None:
    arguments = change(draw(3, 4, 12), Tensor.double)
    moved = arguments | {name: arguments[name][order] for name in ("queue", "queue_images")}
    for op in OPS:
        torch.testing.assert_close(run(op, moved), run(op, arguments))


@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 3), max_size=6))
def test_an_image_comes_out_the_same_wherever_it_is_in_the_batch(order: list[int]) -> None:
    arguments = change(draw(4, 6, 10), Tensor.double)
    moved = arguments | {name: arguments[name][order] for name in ("query", "key", "images")}
    for op in OPS:
        for got, expected in zip(op(**moved), op(**arguments), strict=True):
            torch.testing.assert_close(got, expected[order])


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_of_equally_near_keys_the_first_is_taken(impl: str, dtype: torch.dtype) -> None:
    queue = torch.zeros(1000, 4, dtype=dtype, device=DEVICE)
    queue[:, 1] = 1
    queue[[40, 41, 300, 900]] = torch.tensor([[0.5, 0, 0, 0.5], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0], [0.5, 0.5, 0, 0]]).to(
        queue
    )
    key = torch.eye(4, dtype=dtype, device=DEVICE)[:1]
    for count, first in ((1, [40]), (2, [40, 41]), (3, [40, 41, 300])):
        _, positive = neighbour(key, key, queue, neighbours=count, impl=impl)
        torch.testing.assert_close(
            positive[0].float(), F.normalize(queue[first].float().mean(0), dim=0), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_an_image_without_other_keys_has_no_loss_and_one_with_few_has_those(op: Op, impl: str) -> None:
    arguments = draw(3, 16, 200)
    arguments["queue_images"][:] = 1
    loss, positive, gradient = run(op, arguments, impl=impl)
    assert loss[1] == 0
    assert not positive[1].any()
    assert not gradient[1].any()
    only = {name: each[:1] for name, each in arguments.items() if name in ("query", "key")}
    torch.testing.assert_close(loss[:1], op(**only, queue=arguments["queue"], impl="torch")[0])
    last = op(**only, queue=arguments["queue"][[5, 150]], images=torch.tensor([1], device=DEVICE),
              queue_images=torch.tensor([0, 1], device=DEVICE), impl=impl)[1]  # fmt: skip
    torch.testing.assert_close(last[0], F.normalize(arguments["queue"][5], dim=0))  # fewer others than neighbours


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op: Op) -> None:
    plain = draw(3, 24, 100)
    wide = {name: torch.stack([each.detach()] * 2, dim=-1)[..., 0] for name, each in plain.items()}
    wide["query"].requires_grad_()
    assert not any(each.is_contiguous() for each in wide.values())
    for impl in ("torch", "triton"):
        torch.testing.assert_close(run(op, wide, impl=impl), run(op, plain, impl=impl), rtol=1e-6, atol=1e-6)
        leaf = plain["query"]
        expanded = torch.tensor(0.5, device=DEVICE).expand(3)
        (half,) = torch.autograd.grad(op(**plain, impl=impl)[0], leaf, expanded)
        (whole,) = torch.autograd.grad(op(**plain, impl=impl)[0].sum(), leaf)
        torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("keys", [1, 100])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_stay_in_their_image(op: Op, keys: int, value: float, impl: str) -> None:
    clean = draw(3, 24, keys, known=False)
    clean["queue"].abs_()  # an infinite entry is of one sign to all keys
    healthy = run(op, clean, impl=impl)
    for name in ("query", "key"):
        sick = change(clean, Tensor.clone)
        with torch.no_grad():
            sick[name][1, 3] = value
        got = run(op, sick, impl=impl)
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(got, healthy, strict=True))
        assert got[0][1].isnan()
        assert got[2][1].isnan().all()
        assert got[1][1].isnan().all() == (name == "key")  # a positive does not know its query
    sick = change(clean, Tensor.clone)
    sick["queue"][keys // 3, 5] = NAN
    assert run(op, sick, impl=impl)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_logits_of_ten_thousand(op: Op, dtype: torch.dtype) -> None:
    far = draw(3, 8, 20, dtype=dtype, known=False)
    far = change(far | {"query": torch.stack([far["key"][0], -far["key"][1], far["queue"][0]]) * 1e3}, Tensor.clone)
    exact = run(op, change(far, Tensor.double), impl="torch")
    assert exact[0].max() > 5e3
    for impl in ("torch", "triton"):
        torch.testing.assert_close(run(op, far, impl=impl), exact, rtol=1e-2, atol=2e-2, check_dtype=False)


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_a_query_that_is_its_key_at_one_temperature_is_left_alone(dtype: torch.dtype) -> None:
    """The gradient is the difference of two means, and 16 bits must not be what is left of it."""
    arguments = draw(3, 24, 100, dtype=dtype)
    other = run(relational, arguments, temperature=0.1, key_temperature=0.1, impl="triton")[2]
    arguments["query"] = arguments["key"].clone().requires_grad_()
    gradient = run(relational, arguments, temperature=0.1, key_temperature=0.1, impl="triton")[2]
    assert other.abs().max() > 0.1
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op: Op) -> None:
    arguments = draw(3, 24, 100, dtype=torch.bfloat16)
    torch.testing.assert_close(run(op, arguments, impl="triton"), run(op, arguments, impl="triton"), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_only_the_query_gets_a_gradient(op: Op, impl: str) -> None:
    arguments = draw(3, 24, 100)
    leaves = {name: arguments[name].requires_grad_() for name in ("query", "key", "queue")}
    loss, positive = op(**arguments, impl=impl)
    assert not positive.requires_grad
    loss.sum().backward()
    assert [each.grad is not None for each in leaves.values()] == [True, False, False]
    leaves["query"].requires_grad_(False)
    assert not op(**arguments, impl=impl)[0].requires_grad


@pytest.mark.parametrize("wide", ["query", "key", "queue"])
@pytest.mark.parametrize("op", OPS)
def test_each_result_keeps_the_dtype_it_is_of(op: Op, wide: str) -> None:
    arguments = draw(3, 24, 100, dtype=torch.bfloat16)
    arguments[wide] = arguments[wide].detach().float().requires_grad_(wide == "query")
    assert_as_exact_as_torch(op, arguments, torch.bfloat16)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_an_enclosing_autocast_changes_nothing(op: Op, dtype: torch.dtype) -> None:
    arguments = draw(3, 24, 100, dtype=dtype)
    expected = run(op, arguments)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(op, arguments)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_custom_ops_pass_opcheck(dtype: torch.dtype, known: bool, images: int) -> None:
    arguments = draw(images, 8, 20, dtype=dtype, known=known)
    given = [arguments.get(name) for name in ("query", "key", "queue", "images", "queue_images")]
    torch.library.opcheck(relational_module._fused, (*given, 0.1, 0.04))
    torch.library.opcheck(neighbour_module._fused, (*given, 0.1, 3))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_compiled_in_one_graph_equals_eager(op: Op, impl: str, dynamic: bool) -> None:
    arguments = draw(3, 24, 100)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(run(compiled, arguments, impl=impl), run(op, arguments, impl=impl), rtol=1e-6, atol=1e-6)


META = torch.device("meta")
GOOD = {
    **{name: torch.zeros(n, 4) for name, n in (("query", 2), ("key", 2), ("queue", 7))},
    **{name: torch.zeros(n, dtype=torch.int64) for name, n in (("images", 2), ("queue_images", 7))},
}
BAD: list[tuple[str, Any]] = [
    ("query", torch.zeros(2, 4, 1)),
    ("query", torch.zeros(2, 4, dtype=torch.int32)),
    ("key", torch.zeros(1, 4)),
    ("key", torch.zeros(2, 4, dtype=torch.int32)),
    ("key", torch.zeros(2, 4, device=META)),
    ("queue", torch.zeros(0, 4)),
    ("queue", torch.zeros(7, 5)),
    ("queue", torch.zeros(7, 4, device=META)),
    ("images", None),
    ("images", torch.zeros(3, dtype=torch.int64)),
    ("images", torch.zeros(2, dtype=torch.int32)),
    ("queue_images", torch.zeros(7, dtype=torch.int64, device=META)),
    ("temperature", 0.0),
    ("temperature", NAN),
    ("impl", "triton"),
    ("impl", "cuda"),
]


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [(op, *case) for op in PLAIN for case in BAD]
    + [(relational, "key_temperature", 0.0), (neighbour, "neighbours", 0), (neighbour, "neighbours", 8)],
)
def test_a_bad_argument_is_refused_by_its_name(op: Op, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRET", False)  # under it, "triton" serves the CPU
    op(**GOOD)
    with pytest.raises(ValueError, match=f"^{name} must"):
        op(**(GOOD | {name: value}))


def test_what_the_kernels_cannot_take_is_refused_but_served_by_auto() -> None:
    wide, deep = draw(2, MAX_DIM + 1, 30), {"neighbours": MAX_NEIGHBOURS + 1}
    for op, arguments in ((relational, wide), (neighbour, wide), (neighbour, draw(2, 8, 30) | deep)):
        with pytest.raises(ValueError, match="impl must"):
            op(**arguments, impl="triton")
        torch.testing.assert_close(op(**arguments), PLAIN[op](**arguments))
    with pytest.raises(ValueError, match="must be fp16, bf16 or fp32"):
        relational(**change(draw(2, 8, 30), Tensor.double), impl="triton")


@pytest.mark.parametrize("op", PLAIN)
def test_auto_uses_the_reference_on_the_cpu(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(MODULES[op], "_fused", refuse)
    arguments = draw(3, 24, 100)
    on_cpu = {name: each.cpu() for name, each in arguments.items()}
    torch.testing.assert_close(op(**on_cpu), PLAIN[op](**on_cpu))
    with pytest.raises(AssertionError, match="launched"):
        op(**arguments, impl="triton")
