"""What every op promises beside its values: strides, gradients, tracing, and which arguments it takes."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcr.kernels import launch, rationale_pool
from fastcr.kernels.common_weights import MAX_CHANNELS
from fastcr.kernels.detectors import spread_gradients
from fastcr.kernels.queue import MAX_DIM
from tests.kernels.harness import BF16, DEVICE, F32, LEARNS, NAN, OPS, SMALL, call, draw, fresh, pairwise, run

pytest.importorskip("triton")

NAMES = list(SMALL)
MAPS = ["rationale_pool", "rationale_fit", "common_weights"]
IMPLS = ["torch", "triton"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "sliced": lambda x: x[:, ::2, 1:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded images": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded positions": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 6),
}


def options_of(op: str) -> dict[str, Any]:
    return {"pool_weight": 0.5} if op == "rationale_fit" else {}


@pytest.mark.parametrize(("op", "layout", "impl"), pairwise(op=MAPS, layout=list(LAYOUTS), impl=IMPLS))
def test_strides_of_the_features_do_not_matter(op: str, layout: str, impl: str) -> None:
    features = LAYOUTS[layout](draw(op, C=12, S=30)["features"].detach())
    arguments = draw(op, C=features.shape[1], S=30)
    plain = features.contiguous(memory_format=torch.channels_last)
    assert features.stride() != plain.stride()
    learns = "features" in LEARNS[op]
    results = [
        run(op, arguments | {"features": each.detach().requires_grad_(learns)}, impl=impl, **options_of(op))
        for each in (features, plain)
    ]
    exact = {"rtol": 0, "atol": 0} if impl == "triton" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(*results, **exact)


@pytest.mark.parametrize(("op", "impl"), pairwise(op=NAMES, impl=IMPLS))
def test_strides_of_the_other_inputs_do_not_matter(op: str, impl: str) -> None:
    plain = draw(op)
    strided = {name: torch.stack([each.detach()] * 2, dim=-1)[..., 0] for name, each in plain.items()}
    strided["features" if op in MAPS else "query"] = plain["features" if op in MAPS else "query"]
    assert not any(each.is_contiguous() for name, each in strided.items() if name not in ("features", "query"))
    strided = fresh(op, strided, lambda each: each)
    options = options_of(op)
    results = [run(op, each, impl=impl, **options) for each in (strided, plain)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", [name for name in NAMES if LEARNS[name]])
def test_an_expanded_upstream_gradient_counts_as_its_copy(op: str) -> None:
    arguments = draw(op)
    leaves = [arguments[name] for name in LEARNS[op]]
    outputs = [output for output in call(op, arguments, impl="triton") if output.requires_grad]
    expanded = [torch.tensor(0.5, device=DEVICE).expand(output.shape) for output in outputs]
    results = [
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        for upstream in (expanded, [gradient.contiguous() for gradient in expanded])
    ]
    results.append(torch.autograd.grad(sum(output.sum() for output in outputs) / 2, leaves))
    assert all(gradient.any() for gradient in results[0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(("op", "impl"), pairwise(op=NAMES, impl=IMPLS))
def test_gradients_go_where_they_are_asked_for_and_nowhere_else(op: str, impl: str) -> None:
    arguments = draw(op)
    everything = run(op, arguments, impl=impl, **options_of(op))[1]
    for wanted in ([], *([name] for name in LEARNS[op]), LEARNS[op][::2]):
        for name in LEARNS[op]:
            arguments[name].requires_grad_(name in wanted)
        assert call(op, arguments, impl=impl)[0].requires_grad == bool(wanted)
        got = run(op, arguments, impl=impl, **options_of(op))[1]
        torch.testing.assert_close(got, {name: everything[name] for name in wanted}, rtol=0, atol=0)
    for each in arguments.values():
        each.requires_grad_(each.is_floating_point())
    outputs = call(op, arguments, impl=impl, **options_of(op))
    # maps of the fit and the positive of a query are constants
    carry = {"rationale_pool": [True, True], "rationale_fit": [True, False, False], "common_weights": [False]}
    assert [each.requires_grad for each in outputs] == carry.get(op, [True, False][: len(outputs)])
    if LEARNS[op]:
        outputs[0].sum().backward()
    assert {name for name, each in arguments.items() if each.grad is not None} == set(LEARNS[op])


@pytest.mark.parametrize("op", NAMES)
def test_an_enclosing_autocast_changes_nothing(op: str) -> None:
    arguments = draw(op)
    expected = call(op, arguments)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = call(op, arguments)
    assert all(map(torch.equal, got, expected))
    assert [each.dtype for each in got] == [each.dtype for each in expected]


@pytest.mark.parametrize(
    ("op", "impl", "dynamic", "options"),
    [
        *((op, "triton", True, {}) for op in NAMES),
        ("relational", "torch", True, {}),
        ("rationale_fit", "triton", False, {"stop_gradient": True, "pool_weight": 0.5}),
    ],
)
def test_compiled_in_one_graph_equals_eager(op: str, impl: str, dynamic: bool, options: dict[str, Any]) -> None:
    arguments = draw(op)
    torch.compiler.reset()
    compiled = torch.compile(OPS[op].op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run(op, arguments, impl=impl, **options)
    torch.testing.assert_close(run(op, arguments, function=compiled, impl=impl, **options), expected)


@pytest.mark.parametrize(
    ("op", "dtype", "images"),
    [*((op, F32, 3) for op in NAMES), ("rationale_fit", BF16, 0), ("relational", BF16, 3)],
    ids=str,
)
def test_the_custom_op_passes_opcheck(op: str, dtype: torch.dtype, images: int) -> None:
    sizes = {"C": 20, "S": 6} if op in MAPS else {"D": 8, "N": 20}
    settings = {
        "rationale_pool": (0.4,), "rationale_fit": (0.4, "sum", "match", 0.5, False), "common_weights": ("match",),
        "info_nce": (0.2,), "relational": (0.1, 0.04),
    }  # fmt: skip
    arguments = draw(op, dtype, B=images, **sizes)
    if dtype == BF16:  # and without what may be absent
        arguments |= dict.fromkeys({"bias", "images", "queue_images"} & arguments.keys())
    torch.library.opcheck(import_module(f"fastcr.kernels.{op}")._fused, (*arguments.values(), *settings[op]))


@pytest.mark.parametrize(("dtype", "images", "write"), [(F32, 3, True), (BF16, 3, False), (BF16, 0, True)], ids=str)
def test_the_custom_ops_of_the_backward_pass_opcheck(dtype: torch.dtype, images: int, write: bool) -> None:
    features, gradient, detectors, bias = (
        each.detach() for each in draw("rationale_fit", dtype, B=images, C=20, S=6).values()
    )
    pooled, attention, winners = rationale_pool._fused(features, detectors, bias, 0.4)
    upstream = torch.ones((), device=DEVICE)
    by = upstream.expand_as(pooled), upstream.expand_as(attention)
    torch.library.opcheck(rationale_pool._by_logits, (*by, features, attention, 0.4))
    given = features, detectors, winners, by[1], attention, gradient
    torch.library.opcheck(spread_gradients, given, {"write": write})


@pytest.mark.parametrize("op", NAMES)
def test_the_kernel_serves_what_it_takes_and_auto_the_rest(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a kernel was launched")

    limit = {
        "common_weights": {"C": MAX_CHANNELS + 1},
        "info_nce": {"D": MAX_DIM + 1},
        "relational": {"D": MAX_DIM + 1},
    }
    if op in limit:
        beyond = draw(op, **limit[op])
        torch.testing.assert_close(call(op, beyond), call(op, beyond, OPS[op].reference))
        with pytest.raises(ValueError, match="its kernels do not take these shapes"):
            call(op, beyond, impl="triton")
    arguments = draw(op)
    for name, each in arguments.items():
        if each.is_floating_point():
            with pytest.raises(ValueError, match=f"{name} must"):
                call(op, arguments | {name: each.double()}, impl="triton")
    with pytest.raises(ValueError, match="impl must"):
        call(op, arguments, impl="cuda")
    monkeypatch.setattr(import_module(f"fastcr.kernels.{op}"), "_fused", refuse)
    on_cpu = {name: each.cpu() for name, each in arguments.items()}
    torch.testing.assert_close(call(op, on_cpu), call(op, on_cpu, OPS[op].reference))
    with pytest.raises(AssertionError, match="launched"):
        call(op, arguments, impl="triton")
    monkeypatch.setattr(launch, "INTERPRET", False)
    with pytest.raises(ValueError, match=r"impl must .* the tensors are on cpu"):
        call(op, on_cpu, impl="triton")


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


def whole(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


FEATURES = [torch.zeros(2, 4, 9), whole(2, 4, 3, 3), torch.zeros(2, 4, 0, 3), torch.zeros(2, 4, 1, 4097)]
GRADIENTS = [torch.zeros(2, 4, 1), torch.zeros(1, 4), whole(2, 4), meta(2, 4)]
DETECTORS = [*(torch.zeros(*shape) for shape in ((5, 3), (5, 4, 1, 1), (0, 4), (129, 4))), whole(5, 4), meta(5, 4)]
BRANCH = {
    "features": FEATURES, "detectors": DETECTORS, "bias": [torch.zeros(4), torch.zeros(5, 1), whole(5), meta(5)],
    "temperature": [0.0, -1.0, NAN],
}  # fmt: skip
QUEUE = {
    "query": [torch.zeros(2, 4, 1), whole(2, 4)],
    "key": [torch.zeros(1, 4), whole(2, 4), meta(2, 4)],
    "queue": [torch.zeros(0, 4), torch.zeros(7, 5), torch.zeros(4), whole(7, 4), meta(7, 4)],
    "temperature": [0.0, NAN],
}
BAD: dict[str, dict[str, list[Any]]] = {
    "rationale_pool": BRANCH,
    "rationale_fit": BRANCH | {"gradient": GRADIENTS, "target": ["softmax"], "cam_keeps": ["both"]},
    "common_weights": {"features": FEATURES, "gradient": GRADIENTS, "cam_keeps": ["both"]},
    "info_nce": QUEUE,
    "relational": QUEUE
    | {
        "images": [None, torch.zeros(3, dtype=torch.int64), whole(2)],
        "queue_images": [meta(7, dtype=torch.int64)],
        "key_temperature": [0.0],
    },
}


@pytest.mark.parametrize("op", BAD)
def test_a_bad_argument_is_refused_by_its_name(op: str) -> None:
    good = {key: each.detach().cpu() for key, each in draw(op, B=2, C=4, S=9, K=5, D=4, N=7).items()}
    call(op, good)
    for name, values in BAD[op].items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must"):
                call(op, good | {name: value})
