"""The Triton kernels against the references in fp64; without a GPU they run under Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcr.kernels import detectors as detectors_module
from fastcr.kernels import info_nce as contrast_module
from fastcr.kernels import launch
from fastcr.kernels import rationale_fit as fit_module
from fastcr.kernels import rationale_pool as pool_module
from fastcr.kernels.info_nce import MAX_DIM, info_nce, info_nce_reference
from fastcr.kernels.rationale_fit import rationale_fit, rationale_fit_reference
from fastcr.kernels.rationale_pool import rationale_pool, rationale_pool_reference
from fastcr.kernels.settings import FENCED, TABLE

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32 = torch.float64, torch.float32

# by the dtype of the features: what values and gradients may lose beyond the reference in the same dtype, over the
# largest entry; 2^-7 is one unit in the last place of bf16, which the interpreter truncates when it stores
TOLERANCE = {F32: (5e-6, 1e-5), torch.float16: (1e-5, 2e-3), torch.bfloat16: (5e-5, 2**-7)}
DTYPES = list(TOLERANCE)
NAN, INF = float("nan"), float("inf")

slow = pytest.mark.slow
# images, channels, height, width, detectors
SHAPES: list[Any] = [
    (0, 64, 7, 7, 5),
    (1, 512, 7, 7, 32),
    (3, 64, 1, 1, 1),
    (3, 64, 4, 4, 33),
    (1, 64, 14, 14, 128),
    (1, 2047, 2, 8, 5),
    (5, 200, 7, 7, 16),
    (2, 64, 9, 9, 5),
    pytest.param((1, 2048, 7, 7, 32), marks=slow),
    pytest.param((3, 2047, 14, 14, 128), marks=slow),
    pytest.param((3, 64, 28, 28, 33), marks=slow),
    pytest.param((1, 512, 40, 40, 5), marks=slow),
]
# images, dimensions, keys in the queue
CONTRASTS: list[Any] = [
    (0, 64, 1000),
    (1, 64, 1),
    (3, 64, 1000),
    (1, 128, 1000),
    (3, 128, 1),
    (3, 256, 1000),
    (17, 5, 33),
    pytest.param((3, 256, 4096), marks=slow),
    pytest.param((1, 64, 4096), marks=slow),
    pytest.param((70, 512, 1000), marks=slow),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"target": "sum", "cam_keeps": "mismatch"},
    {"target": "sum", "pool_weight": 0.5},
    {"cam_keeps": "mismatch", "pool_weight": 0.5, "stop_gradient": True},
    {"stop_gradient": True},
    {"target": "uniform", "pool_weight": 0.5},
]


def draw(
    images: int, channels: int, height: int, width: int, detectors: int, *, dtype: torch.dtype = F32, bias: bool = True
) -> dict[str, Tensor | None]:
    """Arguments of `rationale_fit`; detectors and bias in fp32, as in training."""
    random = torch.Generator().manual_seed(images + 7 * channels + detectors)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64)

    return {
        "features": normal(images, channels, height, width).to(DEVICE, dtype).requires_grad_(),
        "gradient": normal(images, channels).to(DEVICE, F32),
        "detectors": (normal(detectors, channels) / channels**0.5).to(DEVICE, F32).requires_grad_(),
        "bias": normal(detectors).to(DEVICE, F32).requires_grad_() if bias else None,
    }


def draw_contrast(images: int, dim: int, keys: int, *, dtype: torch.dtype = F32) -> dict[str, Tensor | None]:
    random = torch.Generator().manual_seed(images + dim + keys)
    sizes = {"query": images, "key": images, "queue": keys}
    drawn = {name: torch.randn(n, dim, generator=random, dtype=F64) for name, n in sizes.items()}
    return {
        name: F.normalize(tensor, dim=1).to(DEVICE, dtype).requires_grad_(name != "queue")
        for name, tensor in drawn.items()
    }


def pool(*, gradient: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
    return rationale_pool(**arguments)


def fit(**arguments: Any) -> tuple[Tensor, ...]:
    return rationale_fit(**arguments)


def contrast(**arguments: Any) -> tuple[Tensor, ...]:
    return (info_nce(**arguments),)


Op = Callable[..., tuple[Tensor, ...]]
Arguments = dict[str, Tensor | None]
MAPS = draw(3, 70, 4, 5, 5)
SMALL: dict[Op, Arguments] = {pool: MAPS, fit: MAPS, contrast: draw_contrast(3, 24, 100)}
OPS = list(SMALL)


def small(op: Op, dtype: torch.dtype = F32) -> Arguments:
    """Fresh leaves of a small case."""
    dtypes = dict.fromkeys(("features", "query", "key", "queue"), dtype)
    return {
        name: tensor.detach().to(dtypes.get(name, F32), copy=True).requires_grad_(tensor.requires_grad)
        for name, tensor in SMALL[op].items()
    }


def upstream_of(outputs: tuple[Tensor, ...], scale: float = 1.0) -> list[Tensor]:
    """One gradient for each output that carries one, the same for equal shapes."""
    random = torch.Generator().manual_seed(1)
    wanted = [output for output in outputs if output.requires_grad]
    return [(torch.randn(output.shape, generator=random) * scale).to(output) for output in wanted]


Results = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def run(op: Op, arguments: Arguments, scale: float = 1.0, **options: Any) -> Results:
    """Outputs, and the gradient by each argument that requires one."""
    outputs = tuple(op(**arguments, **options))
    leaves = {name: tensor for name, tensor in arguments.items() if tensor is not None and tensor.requires_grad}
    differentiable = [output for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(
        differentiable, list(leaves.values()), upstream_of(outputs, scale), allow_unused=True, materialize_grads=True
    )
    return tuple(output.detach() for output in outputs), dict(zip(leaves, gradients, strict=True))


def in_fp64(arguments: Arguments) -> Arguments:
    return {
        name: None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in arguments.items()
    }


def error(got: Tensor, exact: Tensor, floor: float) -> float:
    if not got.numel():
        return 0.0
    return (got.double() - exact).abs().max().item() / max(exact.abs().max().item(), floor)


def assert_as_exact_as_torch(op: Op, arguments: Arguments, dtype: torch.dtype, **options: Any) -> None:
    values, gradients = run(op, arguments, impl="triton", **options)
    plain_values, plain_gradients = run(op, arguments, impl="torch", **options)
    exact_values, exact_gradients = run(op, in_fp64(arguments), impl="torch", **options)
    for got, plain, exact in zip(values, plain_values, exact_values, strict=True):
        assert got.dtype == plain.dtype == F32
        assert got.shape == plain.shape
        assert error(got, exact, 1e-3) <= error(plain, exact, 1e-3) + TOLERANCE[dtype][0]
    assert gradients.keys() == plain_gradients.keys()
    for name, got in gradients.items():
        plain, exact = plain_gradients[name], exact_gradients[name]
        assert got.dtype == plain.dtype
        assert got.shape == plain.shape
        floor = 1.0 if name == "bias" else 1e-3  # the terms of the bias sum to 0
        assert error(got, exact, floor) <= error(plain, exact, floor) + TOLERANCE[dtype][1], name


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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [pool, fit])
def test_maps_are_as_exact_as_the_reference(op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(op, draw(*shape, dtype=dtype), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONTRASTS, ids=str)
def test_contrast_is_as_exact_as_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(contrast, draw_contrast(*shape, dtype=dtype), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_fit_is_as_exact_as_the_reference(
    options: dict[str, Any], dtype: torch.dtype, images: int
) -> None:
    arguments = draw(images, 70, 4, 5, 5, dtype=dtype)
    # the second image has no GradCAM, whatever the sign
    if images:
        arguments["gradient"][1] = 0
    assert_as_exact_as_torch(fit, arguments, dtype, **options)
    if images:
        target = fit(**arguments, **options, impl="triton")[2]
        torch.testing.assert_close(target[1], torch.full_like(target[1], 1 / 20))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", [pool, fit])
def test_several_images_may_share_a_partial_sum(op: Op) -> None:
    assert_as_exact_as_torch(op, draw(17, 2047, 1, 2, 5), F32)  # 2 images in each but the last


def test_neighbouring_programs_of_the_backward_read_neighbouring_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(detectors_module, "_spread_kernel", Recorder())
    features, images, channels = torch.empty(700, 300, 1, 1, dtype=torch.bfloat16), 700, 300
    empty = torch.empty(images, 1)
    detectors_module.spread_gradients(
        features, torch.empty(5, channels), empty.int(), empty, empty, torch.empty(images, channels), True
    )
    row = TABLE["spread_gradients"]["16 bits, K <= 32"]
    chunks = -(-channels // row["BLOCK_C"])
    ((x, y),) = launched  # blocks are started along x first
    assert (x, y > 1) == (chunks, True)
    assert x * y <= row["programs"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", [pool, fit])
def test_bias_may_be_absent(op: Op) -> None:
    assert_as_exact_as_torch(op, draw(3, 64, 3, 5, 5, bias=False), F32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [pool, fit])
def test_parameters_may_be_narrow(op: Op, dtype: torch.dtype, narrow: torch.dtype) -> None:
    arguments = small(op, dtype)
    for name in ("detectors", "bias"):
        arguments[name] = arguments[name].detach().to(narrow).requires_grad_()
    arguments["gradient"] = arguments["gradient"].to(narrow)
    coarsest = max(dtype, narrow, key=lambda each: TOLERANCE[each])
    assert_as_exact_as_torch(op, arguments, coarsest)


@pytest.mark.parametrize("scale", [2.0**-16, 2.0**20], ids=["small", "large"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [pool, fit])
def test_gradients_scale_with_the_gradient_of_the_loss(op: Op, dtype: torch.dtype, scale: float) -> None:
    """A mean over the batch, or a loss scaler, must not take fp32 gradients to the limits of a 16-bit dtype."""
    arguments = small(op, dtype)
    _, gradients = run(op, arguments, impl="triton")
    _, scaled = run(op, arguments, scale, impl="triton")
    # gradients in fp16 have no room for such a scale themselves
    for name in (name for name, gradient in gradients.items() if gradient.dtype != torch.float16):
        floor = 1.0 if name == "bias" else 1e-3
        assert error(scaled[name].double() / scale, gradients[name].double(), floor) <= TOLERANCE[dtype][1], name


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=8, deadline=None)
@given(shape=st.tuples(*(st.integers(low, high) for low, high in ((0, 3), (1, 70), (1, 9), (1, 9), (1, 128)))))
def test_maps_of_any_shape(shape: tuple[int, ...]) -> None:
    for op in (pool, fit):
        assert_as_exact_as_torch(op, draw(*shape), F32)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=8, deadline=None)
@given(shape=st.tuples(st.integers(0, 20), st.integers(1, 70), st.integers(1, 300)))
def test_contrast_of_any_shape(shape: tuple[int, int, int]) -> None:
    assert_as_exact_as_torch(contrast, draw_contrast(*shape), F32)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, ::2, 1:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded images": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded positions": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", [pool, fit])
def test_strides_of_the_features_do_not_matter(op: Op, layout: Callable[[Tensor], Tensor]) -> None:
    features = layout(draw(3, 6, 5, 6, 7)["features"].detach())
    arguments = draw(3, features.shape[1], 1, 1, 7)
    results = [
        run(op, arguments | {"features": view.detach().requires_grad_()}, impl="triton")
        for view in (features, features.contiguous())
    ]
    assert features.stride() != features.contiguous().stride()
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_strides_of_the_other_inputs_do_not_matter(op: Op) -> None:
    plain, strided = small(op), small(op)
    for name, tensor in plain.items():
        if name != "features":
            strided[name] = torch.stack([tensor.detach()] * 2, dim=-1)[..., 0].requires_grad_(tensor.requires_grad)
            assert not strided[name].is_contiguous()
    options = {"impl": "triton"} | ({"pool_weight": 0.5} if op is fit else {})
    torch.testing.assert_close(run(op, strided, **options), run(op, plain, **options), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_an_expanded_upstream_gradient_counts_as_its_copy(op: Op) -> None:
    arguments = small(op)
    leaves = [tensor for tensor in arguments.values() if tensor is not None and tensor.requires_grad]
    outputs = [output for output in op(**arguments, impl="triton") if output.requires_grad]
    expanded = [torch.tensor(0.5, device=DEVICE).expand(output.shape) for output in outputs]
    results = [
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        for upstream in (expanded, [gradient.contiguous() for gradient in expanded])
    ]
    half_sum = sum(output.sum() for output in outputs) / 2
    results.append(torch.autograd.grad(half_sum, leaves))
    assert all(gradient.any() for gradient in results[0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype: torch.dtype) -> None:
    arguments = draw(3, 16, 4, 4, 5, dtype=dtype)
    arguments["detectors"] = (arguments["detectors"].detach() * 1e4).requires_grad_()
    far = draw_contrast(3, 8, 20, dtype=dtype)
    far["query"] = (torch.stack([far["key"][0], -far["key"][1], far["queue"][0]]).detach() * 2e3).requires_grad_()
    for op, inputs, largest in ((pool, arguments, 1), (fit, arguments, 1e3), (contrast, far, 5e3)):
        values, gradients = run(op, inputs, impl="triton")
        assert values[0].max() > largest
        assert all(tensor.isfinite().all() for tensor in (*values, *gradients.values()))
        # fp32 logits of 1e4 are 1e-3 apart
        torch.testing.assert_close(values, run(op, in_fp64(inputs))[0], rtol=5e-3, atol=5e-3, check_dtype=False)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("op", "name", "options"),
    [(fit, name, options) for name in ("features", "gradient") for options in OPTIONS[:3]]
    + [(pool, "features", {}), (contrast, "query", {}), (contrast, "key", {})],
)
def test_nan_and_inf_stay_in_their_image(op: Op, name: str, options: dict[str, Any], value: float) -> None:
    clean, sick = small(op), small(op)
    with torch.no_grad():
        sick[name][1].flatten()[3] = value
    runs = [run(op, clean, impl="triton", **options), run(op, sick, impl="triton", **options)]
    reference = run(op, sick, impl="torch", **options)
    per_image = {"features", "query", "key"}
    healthy, got, expected = (
        [*values, *(gradient for name, gradient in gradients.items() if name in per_image)]
        for values, gradients in (*runs, reference)
    )
    for a, b, c in zip(healthy, got, expected, strict=True):
        assert a.isfinite().all()
        assert torch.equal(b[[0, 2]], a[[0, 2]])
        if op is contrast:  # an infinite loss has no gradient, finite as the reference may leave parts of it
            assert c[1].isfinite().logical_or(~b[1].isfinite()).all()
        else:
            assert torch.equal(b[1].isnan(), c[1].isnan())
    assert not got[0][1].isfinite().any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["features", "gradient"])
@pytest.mark.parametrize("target", ["max-softmax", "sum", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_nan_and_inf_do_not_reach_the_other_image_of_a_program(
    dtype: torch.dtype, target: str, name: str, value: float
) -> None:
    clean, sick = (draw(4, 70, 4, 5, 5, dtype=dtype) for _ in range(2))
    sick[name].detach()[1].flatten()[3] = value  # type: ignore[union-attr]
    healthy, got, expected = (
        fit(**arguments, target=target, impl=impl)
        for arguments, impl in ((clean, "triton"), (sick, "triton"), (sick, "torch"))
    )
    for a, b, c in zip(healthy, got, expected, strict=True):
        assert a.isfinite().all()
        assert torch.equal(b[[0, 2, 3]], a[[0, 2, 3]])
        assert torch.equal(b[1].isnan(), c[1].isnan())
    assert got[0][1].isnan()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_target_does_not_depend_on_the_scale_of_the_gradient(dtype: torch.dtype, scale: float) -> None:
    arguments = small(fit, dtype)
    plain = fit(**arguments, impl="triton")
    scaled = fit(**arguments | {"gradient": arguments["gradient"] * scale}, impl="triton")
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not FENCED, reason="with this Triton a program does one image")
def test_two_images_a_program_are_for_small_maps_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("two images a program")

    monkeypatch.setattr(fit_module, "launch_pairs", refuse)
    for dtype, side, detectors in ((F32, 8, 32), (torch.float16, 9, 32), (torch.float16, 8, 33)):
        assert fit(**draw(1, 8, side, side, detectors, dtype=dtype), impl="triton")[0].isfinite().all()
    with pytest.raises(AssertionError, match="two images a program"):
        fit(**draw(1, 8, 8, 8, 32, dtype=torch.float16), impl="triton")


def test_nan_in_the_queue_reaches_every_loss() -> None:
    arguments = small(contrast)
    arguments["queue"][37, 5] = NAN
    values, gradients = run(contrast, arguments, impl="triton")
    assert values[0].isnan().all()
    assert gradients["query"].isnan().all()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op: Op, dtype: torch.dtype) -> None:
    arguments = small(op, dtype)
    torch.testing.assert_close(run(op, arguments, impl="triton"), run(op, arguments, impl="triton"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "wanted"),
    [(op, wanted) for op in (pool, fit) for wanted in (["features"], ["detectors"], ["bias"], ["features", "bias"], [])]
    + [(contrast, wanted) for wanted in (["query"], ["key"], ["query", "key"], [])],
)
def test_gradients_go_where_they_are_asked_for(op: Op, wanted: list[str]) -> None:
    arguments = small(op)
    everything = run(op, arguments, impl="triton")[1]
    for name, tensor in arguments.items():
        tensor.requires_grad_(name in wanted)
    outputs = op(**arguments, impl="triton")
    assert outputs[0].requires_grad == bool(wanted)
    if wanted:
        got = run(op, arguments, impl="triton")[1]
        torch.testing.assert_close(got, {name: everything[name] for name in wanted}, rtol=0, atol=0)


def test_constants_and_maps_carry_no_gradient() -> None:
    arguments = small(fit)
    arguments["gradient"].requires_grad_()
    outputs = fit(**arguments, impl="triton", pool_weight=1.0)
    assert [output.requires_grad for output in outputs] == [True, False, False]
    outputs[0].sum().backward()
    assert arguments["gradient"].grad is None
    arguments = small(contrast)
    arguments["queue"].requires_grad_()
    contrast(**arguments, impl="triton")[0].sum().backward()
    assert arguments["queue"].grad is None


def test_gradients_keep_the_dtype_of_a_mixed_contrast() -> None:
    arguments = draw_contrast(3, 24, 100, dtype=torch.bfloat16)
    arguments["query"] = arguments["query"].detach().float().requires_grad_()
    assert_as_exact_as_torch(contrast, arguments, torch.bfloat16)
    arguments = draw_contrast(3, 24, 100, dtype=torch.bfloat16)
    arguments["queue"] = arguments["queue"].float()
    assert_as_exact_as_torch(contrast, arguments, torch.bfloat16)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_pool_weight_with_stop_gradient_is_mean_pooling(dtype: torch.dtype) -> None:
    arguments = draw(3, 70, 4, 5, 5, dtype=dtype)
    gradients = run(fit, arguments, impl="triton", pool_weight=0.5, stop_gradient=True)[1]
    by_pooled = (arguments["gradient"] * (0.5 / 20)).to(dtype)[:, :, None, None].expand(3, 70, 4, 5)
    torch.testing.assert_close(gradients["features"], by_pooled)
    plain = run(fit, arguments, impl="triton")[1]
    torch.testing.assert_close(gradients["detectors"], plain["detectors"], rtol=0, atol=0)


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize(("dtype", "bias"), [(F32, True), (torch.bfloat16, False)], ids=str)
def test_custom_ops_of_pool_pass_opcheck(dtype: torch.dtype, bias: bool, images: int) -> None:
    features, _, *parameters = draw(images, 20, 2, 3, 5, dtype=dtype, bias=bias).values()
    torch.library.opcheck(pool_module._fused, (features, *parameters, 0.4))
    pooled, attention, winners = (tensor.detach() for tensor in pool_module._fused(features, *parameters, 0.4))
    upstream = [torch.ones((), device=DEVICE).expand_as(output) for output in (pooled, attention)]
    saved = (features.detach(), parameters[0].detach(), attention, winners)
    torch.library.opcheck(pool_module._fused_backward, (*upstream, *saved, 0.4))


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize(("dtype", "bias"), [(F32, True), (torch.bfloat16, False)], ids=str)
def test_custom_ops_of_fit_pass_opcheck(dtype: torch.dtype, bias: bool, stop_gradient: bool, images: int) -> None:
    features, *others = draw(images, 20, 2, 3, 5, dtype=dtype, bias=bias).values()
    forward = (features, *others, 0.4, "sum", "match", 0.5, stop_gradient)
    divergence, *maps = (tensor.detach() for tensor in fit_module._fused(*forward))
    upstream = torch.ones((), device=DEVICE).expand_as(divergence)
    saved = (features.detach(), others[0], others[1].detach(), *maps)
    torch.library.opcheck(fit_module._fused_backward, (upstream, *saved, 0.4, 0.5, not stop_gradient))
    torch.library.opcheck(fit_module._fused, forward)


@pytest.mark.parametrize("shape", [(0, 8, 20), (3, 8, 20)], ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_custom_op_of_the_contrast_passes_opcheck(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    arguments = draw_contrast(*shape, dtype=dtype)
    torch.library.opcheck(contrast_module._fused, (*arguments.values(), 0.2))
    arguments["key"].requires_grad_(False)
    torch.library.opcheck(contrast_module._fused, (*arguments.values(), 0.2))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("op", "options"), [(pool, {}), (contrast, {}), *((fit, options) for options in (*OPTIONS[:1], *OPTIONS[2:4]))]
)
def test_compiled_in_one_graph_equals_eager(op: Op, options: dict[str, Any], dynamic: bool) -> None:
    arguments = small(op)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run(op, arguments, impl="triton", **options)
    torch.testing.assert_close(run(compiled, arguments, impl="triton", **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_tensors_the_kernels_cannot_take_are_refused(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tensor in SMALL[op].items():
        if not (op is pool and name == "gradient"):
            with pytest.raises(ValueError, match=f"{name} must"):
                op(**(SMALL[op] | {name: tensor.double()}), impl="triton")
    monkeypatch.setattr(launch, "INTERPRET", False)
    on_cpu = {name: tensor.cpu() for name, tensor in SMALL[op].items()}
    with pytest.raises(ValueError, match=r"impl must .* the tensors are on cpu"):
        op(**on_cpu, impl="triton")
    with pytest.raises(ValueError, match="impl must"):
        op(**SMALL[op], impl="cuda")


def test_queries_beyond_the_limit_are_refused_but_served_by_auto() -> None:
    arguments = draw_contrast(2, MAX_DIM + 1, 3)
    with pytest.raises(ValueError, match="impl must"):
        info_nce(**arguments, impl="triton")
    torch.testing.assert_close(info_nce(**arguments), info_nce_reference(**arguments))


@pytest.mark.parametrize(
    ("op", "module", "reference"),
    [
        (pool, pool_module, rationale_pool_reference),
        (fit, fit_module, rationale_fit_reference),
        (contrast, contrast_module, info_nce_reference),
    ],
)
def test_auto_uses_the_reference_on_the_cpu(
    op: Op, module: Any, reference: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(module, "_fused", refuse)
    arguments = {name: tensor.detach().cpu() for name, tensor in SMALL[op].items()}
    got = op(**arguments)
    if op is pool:
        del arguments["gradient"]
    expected = reference(**arguments)
    torch.testing.assert_close(got, (expected,) if op is contrast else tuple(expected))
    with pytest.raises(AssertionError, match="launched"):
        op(**SMALL[op], impl="triton")
