"""The fused ops against the equations of their docstrings, written out image by image in NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcr.kernels.info_nce import info_nce
from fastcr.kernels.rationale_fit import CamKeeps, Target, rationale_fit
from fastcr.kernels.rationale_pool import rationale_pool

Array = np.ndarray
F64 = torch.float64

# largest error over the largest entry; values come out in fp32 from 16-bit inputs, gradients in the input's dtype
TOLERANCE = {F64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
TARGETS: list[Target] = ["max-softmax", "sum", "uniform"]
SIGNS: list[CamKeeps] = ["match", "mismatch"]
TAU = 0.4

# images, channels, height, width, detectors
SHAPES = [
    (0, 64, 7, 7, 5),
    (1, 2047, 7, 7, 32),
    (1, 3, 1, 16, 128),
    (3, 64, 1, 1, 1),
    (3, 64, 4, 4, 33),
    (3, 64, 2, 8, 1),
    (3, 2047, 4, 4, 5),
    (3, 48, 14, 14, 128),
]
# images, dimensions, keys in the queue
CONTRASTS = [(0, 64, 1000), (1, 64, 1), (1, 128, 1000), (3, 64, 1000), (3, 128, 1), (3, 5, 33)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Inputs(NamedTuple):
    features: Tensor
    gradient: Tensor
    detectors: Tensor
    bias: Tensor


def draw(images: int, channels: int, height: int, width: int, detectors: int, *, dtype: torch.dtype = F64) -> Inputs:
    random = torch.Generator().manual_seed(images + 7 * channels + detectors)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64)

    features = normal(images, channels, height, width).to(dtype).requires_grad_()
    gradient = normal(images, channels).to(torch.promote_types(dtype, torch.float32))
    weight = (normal(detectors, channels) / channels**0.5).to(dtype).requires_grad_()
    return Inputs(features, gradient, weight, normal(detectors).to(dtype).requires_grad_())


def draw_contrast(images: int, dim: int, keys: int, *, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(images + dim + keys)
    sizes = (images, images, keys)
    query, key, queue = (torch.randn(n, dim, generator=random, dtype=F64) for n in sizes)
    query, key, queue = (F.normalize(tensor, dim=1).to(dtype) for tensor in (query, key, queue))
    return query.requires_grad_(), key.requires_grad_(), queue


def naive_attention(image: Array, detectors: Array, bias: Array) -> tuple[Array, Array]:
    """Attention `[S]` of one image `[C,S]`, and which detector wins each position."""
    logits = detectors @ image + bias[:, None]
    exponentials = np.exp((logits.max(0) - logits.max()) / TAU)
    return exponentials / exponentials.sum(), logits.argmax(0)


def naive_target(image: Array, gradient: Array, target: Target, sign: CamKeeps) -> Array:
    cam = np.maximum((1 if sign == "mismatch" else -1) * (gradient @ image), 0)
    if cam.max() == 0 or target == "uniform":
        return np.full(len(cam), 1 / len(cam))
    if target == "sum":
        return cam / cam.sum()
    exponentials = np.exp(cam / cam.max() / TAU)
    return exponentials / exponentials.sum()


def logits_backward(by_logits: Array, winners: Array, image: Array, detectors: Array) -> tuple[Array, Array, Array]:
    """Gradient by one image's maximal logits `[S]` carried to its features, to the detectors and to their bias."""
    by_detectors, by_bias = np.zeros_like(detectors), np.zeros(len(detectors))
    np.add.at(by_detectors, winners, (by_logits * image).T)
    np.add.at(by_bias, winners, by_logits)
    return detectors[winners].T * by_logits, by_detectors, by_bias


def as_numpy(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def assert_close(got: Tensor, expected: Any, dtype: torch.dtype, floor: float = 1e-3) -> None:
    expected = torch.as_tensor(expected, dtype=F64).reshape(got.shape)
    if got.numel():
        error = (got.detach().double() - expected).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(expected.abs().max().item(), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pool_follows_its_equations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = draw(*shape, dtype=dtype)
    features, _, detectors, bias = inputs
    pooled, attention = rationale_pool(features, detectors, bias, temperature=TAU)
    accumulation = torch.promote_types(dtype, torch.float32)
    assert pooled.dtype == attention.dtype == accumulation
    upstream = torch.randn(pooled.shape, dtype=accumulation), torch.randn(attention.shape, dtype=accumulation)
    got = torch.autograd.grad((pooled, attention), (features, detectors, bias), upstream)

    maps, weight, shift = as_numpy(features.flatten(2), detectors, bias)
    by_maps, by_weight, by_bias = (np.zeros_like(array) for array in (maps, weight, shift))
    for b, image in enumerate(maps):
        q, winners = naive_attention(image, weight, shift)
        by_pooled, by_attention = as_numpy(upstream[0][b], upstream[1][b])
        assert_close(attention[b], q, accumulation)
        assert_close(pooled[b], image @ q, accumulation)
        by_q = by_attention + by_pooled @ image
        carried = logits_backward(q * (by_q - q @ by_q) / TAU, winners, image, weight)
        by_maps[b] = carried[0] + np.outer(by_pooled, q)
        by_weight, by_bias = by_weight + carried[1], by_bias + carried[2]
    assert {gradient.dtype for gradient in got} == {dtype}
    assert_close(got[0], by_maps, dtype)
    assert_close(got[1], by_weight, dtype)
    assert_close(got[2], by_bias, dtype, floor=1)  # sums to 0 over the detectors


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fit_follows_its_equations(shape: tuple[int, ...], dtype: torch.dtype, target: Target, sign: CamKeeps) -> None:
    features, gradient, detectors, bias = draw(*shape, dtype=dtype)
    fit = rationale_fit(features, gradient, detectors, bias, temperature=TAU, target=target, cam_keeps=sign)
    accumulation = torch.promote_types(dtype, torch.float32)
    assert {output.dtype for output in fit} == {accumulation}
    upstream = torch.randn(fit.divergence.shape, dtype=accumulation)
    got = torch.autograd.grad(fit.divergence, (features, detectors, bias), upstream)

    maps, slopes, weight, shift = as_numpy(features.flatten(2), gradient, detectors, bias)
    by_maps, by_weight, by_bias = (np.zeros_like(array) for array in (maps, weight, shift))
    for b, image in enumerate(maps):
        q, winners = naive_attention(image, weight, shift)
        p = naive_target(image, slopes[b], target, sign)
        assert_close(fit.attention[b], q, accumulation)
        assert_close(fit.target[b], p, accumulation)
        assert_close(fit.divergence[b], sum(a * np.log(a / c) for a, c in zip(p, q, strict=True) if a), accumulation)
        carried = logits_backward(upstream[b].item() * (q - p) / TAU, winners, image, weight)
        by_maps[b] = carried[0]
        by_weight, by_bias = by_weight + carried[1], by_bias + carried[2]
    assert {gradient.dtype for gradient in got} == {dtype}
    assert_close(got[0], by_maps, dtype)
    assert_close(got[1], by_weight, dtype)
    assert_close(got[2], by_bias, dtype, floor=1)  # sums to 0 over the detectors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONTRASTS, ids=str)
def test_info_nce_follows_its_equations(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    query, key, queue = draw_contrast(*shape, dtype=dtype)
    loss = info_nce(query, key, queue, temperature=0.2)
    accumulation = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == accumulation
    upstream = torch.randn(loss.shape, dtype=accumulation)
    by_query, by_key = torch.autograd.grad(loss, (query, key), upstream)
    assert by_query.dtype == by_key.dtype == dtype

    queries, keys, negatives = as_numpy(query, key, queue)
    for b, q in enumerate(queries):
        candidates = np.vstack([keys[b], negatives])
        weights = np.exp(candidates @ q / 0.2)
        shares = weights / weights.sum()
        assert_close(loss[b], -np.log(shares[0]), accumulation)
        assert_close(by_query[b], upstream[b].item() * (shares @ candidates - keys[b]) / 0.2, dtype)
        assert_close(by_key[b], upstream[b].item() * (shares[0] - 1) * q / 0.2, dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_finite_differences_agree_with_every_gradient(bias: bool) -> None:
    features, gradient, detectors, shift = draw(2, 3, 2, 3, 4)
    query, key, queue = draw_contrast(2, 4, 6)
    free = (shift,) if bias else ()
    assert torch.autograd.gradcheck(rationale_pool, (features, detectors, *free))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, queue), (query, key))
    assert torch.autograd.gradcheck(
        lambda *weights: rationale_fit(features.detach(), gradient, *weights).divergence, (detectors, *free)
    )
    # the target moves with the features but is a constant: only a zero GradCAM gives differences without it
    flat = torch.zeros_like(gradient)
    assert torch.autograd.gradcheck(
        lambda *inputs: rationale_fit(inputs[0], flat, *inputs[1:]).divergence, (features, detectors, *free)
    )


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": channels_last,
    "sliced": lambda x: x[:, ::2, 1:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded images": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded positions": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", ["pool", "fit"])
def test_strides_of_the_features_do_not_matter(op: str, layout: Callable[[Tensor], Tensor]) -> None:
    base = draw(3, 6, 5, 6, 7).features
    views = layout(base), layout(base).contiguous()
    assert views[0].stride() != views[1].stride()
    _, gradient, detectors, bias = draw(3, views[0].shape[1], 1, 1, 7)
    results = []
    for features in views:
        if op == "pool":
            outputs = [*rationale_pool(features, detectors, bias)]
            loss = outputs[0].square().sum() + outputs[1].square().sum()
        else:
            outputs = [*rationale_fit(features, gradient, detectors, bias, pool_weight=0.5)]
            loss = outputs[0].square().sum()
        results.append([*outputs, *torch.autograd.grad(loss, (base, detectors, bias))])
    torch.testing.assert_close(*results)


def test_strides_of_the_other_inputs_and_of_the_upstream_gradient_do_not_matter() -> None:
    inputs = draw(3, 6, 2, 2, 5)
    strided = Inputs(
        inputs.features,
        inputs.gradient.T.contiguous().T,
        inputs.detectors.T.contiguous().T,
        inputs.bias.repeat_interleave(2)[::2],
    )
    results = []
    for features, gradient, detectors, bias in (inputs, strided):
        divergence = rationale_fit(features, gradient, detectors, bias).divergence
        by_features, by_bias = torch.autograd.grad(divergence.sum(), (features, inputs.bias))  # expanded, stride 0
        results.append([divergence, by_features, by_bias])
    torch.testing.assert_close(*results)
    query, key, queue = draw_contrast(3, 4, 8)
    wide = [tensor.repeat_interleave(2, dim=1)[:, ::2] for tensor in (query, key, queue)]
    torch.testing.assert_close(info_nce(*wide), info_nce(query, key, queue))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sign", SIGNS)
def test_a_gradcam_of_zeros_gives_the_uniform_target(target: Target, sign: CamKeeps) -> None:
    features, gradient, detectors, bias = draw(3, 4, 3, 3, 5)
    features = features.detach().abs().requires_grad_()
    gradient[1] = gradient[1].abs() * (1 if sign == "match" else -1)  # relu leaves nothing of this image
    gradient[2] = 0
    fit = rationale_fit(features, gradient, detectors, bias, target=target, cam_keeps=sign)
    torch.testing.assert_close(fit.target[1:], torch.full((2, 9), 1 / 9, dtype=F64))
    fit.divergence.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad[1:].any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_target_does_not_depend_on_the_scale_of_the_gradient(target: Target, scale: float) -> None:
    features, gradient, detectors, bias = draw(3, 16, 3, 3, 5, dtype=torch.float32)
    plain, scaled = (rationale_fit(features, g, detectors, bias, target=target) for g in (gradient, gradient * scale))
    torch.testing.assert_close(scaled.target, plain.target)
    torch.testing.assert_close(scaled.divergence, plain.divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand_stay_finite(dtype: torch.dtype) -> None:
    features, gradient, detectors, bias = draw(3, 16, 4, 4, 5, dtype=dtype)
    large = (detectors.detach() * 1e4).requires_grad_()
    pool, fit = rationale_pool(features, large, bias), rationale_fit(features, gradient, large, bias)
    assert fit.divergence.max() > 1e3
    outputs = [*pool, *fit, *torch.autograd.grad(pool.pooled.sum() + fit.divergence.sum(), (features, large, bias))]
    _, key, queue = draw_contrast(3, 8, 20, dtype=dtype)
    far = torch.stack([key[0], -key[1], queue[0]]).detach() * 2e3
    far.requires_grad_()
    loss = info_nce(far, key, queue)
    assert loss.max() > 5e3
    outputs += [loss, *torch.autograd.grad(loss.sum(), (far, key))]
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("poisoned", ["features", "gradient"])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_and_inf_stay_in_their_image(value: float, poisoned: str, target: Target) -> None:
    clean = draw(3, 64, 4, 4, 5, dtype=torch.float32)
    sick = Inputs(*(tensor.detach().clone() for tensor in clean))
    getattr(sick, poisoned)[1].flatten()[3] = value
    results = []
    for features, gradient, detectors, bias in (clean, sick):
        leaf = features.detach().clone().requires_grad_()
        pool = rationale_pool(leaf, detectors, bias)
        fit = rationale_fit(leaf, gradient, detectors, bias, target=target, pool_weight=0.5)
        (by_features,) = torch.autograd.grad(fit.divergence.sum() + pool.pooled.sum(), leaf)
        results.append((*pool, fit.attention, fit.target, fit.divergence, by_features))
    for healthy, output in zip(*results, strict=True):
        assert torch.equal(output[[0, 2]], healthy[[0, 2]])
    pooled, attention, _, probability, divergence, by_features = (output[1] for output in results[1])
    assert divergence.isnan()
    assert by_features.isnan().any()
    if poisoned == "features":
        assert pooled.isnan().all()
        assert attention.isnan().all()
    if poisoned == "gradient" or value != value:  # an infinite feature may leave the GradCAM by its relu
        assert probability.isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("poisoned", [0, 1], ids=["query", "key"])
def test_nan_and_inf_stay_in_their_contrast_loss(value: float, poisoned: int) -> None:
    inputs = [tensor.detach() for tensor in draw_contrast(3, 64, 100, dtype=torch.float32)]
    healthy = info_nce(*inputs)
    inputs[poisoned][1, 0] = value
    loss = info_nce(*inputs)
    assert torch.equal(loss[[0, 2]], healthy[[0, 2]])
    assert not loss[1].isfinite()


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("fit_weight", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_pool_weight_gives_the_gradient_of_mean_pooling_and_fit_in_one_graph(
    stop_gradient: bool, fit_weight: float, dtype: torch.dtype
) -> None:
    features, _, detectors, bias = draw(3, 16, 4, 4, 5, dtype=dtype)
    _, key, queue = draw_contrast(3, 8, 20, dtype=torch.promote_types(dtype, torch.float32))
    head = torch.randn(16, 8, dtype=key.dtype, requires_grad=True)
    results = []
    for cut in (False, True):
        leaf = features.detach().clone().requires_grad_()
        pooled = (leaf.detach() if cut else leaf).mean((2, 3), dtype=key.dtype).requires_grad_()
        contrast = info_nce(F.normalize(pooled @ head, dim=1), key.detach(), queue)
        (gradient,) = torch.autograd.grad(contrast.sum(), pooled, retain_graph=True)
        fit = rationale_fit(
            leaf, gradient, detectors, bias, pool_weight=1 / 3 if cut else 0.0, stop_gradient=stop_gradient
        )
        loss = contrast.mean() + fit_weight * fit.divergence.mean()
        results.append(torch.autograd.grad(loss, (leaf, head, detectors, bias)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected, got.dtype)


def test_without_pool_weight_stop_gradient_leaves_the_features_alone() -> None:
    features, gradient, detectors, bias = draw(3, 16, 4, 4, 5)
    grads = []
    for stop_gradient in (True, False):
        divergence = rationale_fit(features, gradient, detectors, bias, stop_gradient=stop_gradient).divergence
        grads.append(torch.autograd.grad(divergence.sum(), (features, detectors, bias), allow_unused=True))
    assert grads[0][0] is None
    assert grads[1][0].any()
    torch.testing.assert_close(grads[0][1:], grads[1][1:])


def test_only_the_divergence_of_a_fit_but_all_of_a_pool_carries_gradient() -> None:
    features, gradient, detectors, bias = draw(3, 16, 4, 4, 5)
    fit = rationale_fit(features, gradient.requires_grad_(), detectors, bias, pool_weight=1.0)
    assert [output.requires_grad for output in fit] == [True, False, False]
    fit.divergence.sum().backward()
    assert gradient.grad is None
    assert all(output.requires_grad for output in rationale_pool(features, detectors, bias))
    query, key, queue = draw_contrast(3, 4, 8)
    info_nce(query, key, queue.requires_grad_()).sum().backward()
    assert queue.grad is None


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50))
def test_a_constant_added_to_every_bias_changes_nothing(shift: float) -> None:
    features, gradient, detectors, bias = draw(3, 8, 4, 4, 5)
    for got, expected in zip(
        rationale_fit(features, gradient, detectors, bias + shift),
        rationale_fit(features, gradient, detectors, bias),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        rationale_pool(features, detectors, bias + shift), rationale_pool(features, detectors, bias)
    )


@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 3), max_size=6))
def test_an_image_comes_out_the_same_wherever_and_however_often_it_is_in_the_batch(order: list[int]) -> None:
    features, gradient, detectors, bias = draw(4, 8, 3, 4, 5)
    query, key, queue = draw_contrast(4, 6, 10)
    outputs = (
        *rationale_fit(features, gradient, detectors, bias),
        *rationale_pool(features, detectors, bias),
        info_nce(query, key, queue),
    )
    reordered = (
        *rationale_fit(features[order], gradient[order], detectors, bias),
        *rationale_pool(features[order], detectors, bias),
        info_nce(query[order], key[order], queue),
    )
    for got, expected in zip(reordered, outputs, strict=True):
        torch.testing.assert_close(got, expected[order])


@given(order=st.permutations(range(9)))
@settings(max_examples=20, deadline=None)
def test_maps_follow_a_permutation_of_positions(order: list[int]) -> None:
    features, gradient, detectors, bias = draw(2, 8, 3, 3, 5)
    permuted = features.flatten(2)[..., order].unflatten(2, (3, 3))
    fit, same = rationale_fit(features, gradient, detectors, bias), rationale_fit(permuted, gradient, detectors, bias)
    torch.testing.assert_close(same.divergence, fit.divergence)
    torch.testing.assert_close(same.attention, fit.attention[:, order])
    torch.testing.assert_close(same.target, fit.target[:, order])
    pool = rationale_pool(features, detectors, bias)
    torch.testing.assert_close(rationale_pool(permuted, detectors, bias).pooled, pool.pooled)


def fit_loss(features: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor) -> Tensor:
    return rationale_fit(features * 1, gradient, detectors, bias, pool_weight=0.5).divergence.square()


def pool_loss(features: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([output.square() for output in rationale_pool(features * 1, detectors, bias)], dim=1)


def contrast_loss(features: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor) -> Tensor:
    return info_nce(features.mean((2, 3)), gradient, detectors)


@pytest.mark.parametrize("function", [fit_loss, pool_loss, contrast_loss])
def test_compiled_in_one_graph_equals_eager(function: Callable[..., Tensor]) -> None:
    inputs = draw(3, 16, 4, 4, 5)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        loss = run(*inputs)
        results.append((loss, torch.autograd.grad(loss.sum(), wanted, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_enclosing_autocast_changes_nothing(dtype: torch.dtype) -> None:
    features, gradient, detectors, bias = draw(3, 64, 4, 4, 5, dtype=dtype)
    query, key, queue = draw_contrast(3, 64, 20, dtype=dtype)

    def outputs() -> list[Tensor]:
        fit = rationale_fit(features, gradient, detectors, bias, pool_weight=0.5)
        pool = rationale_pool(features, detectors, bias)
        return [*fit, *pool, info_nce(query, key, queue)]

    expected = outputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs()
    assert {output.dtype for output in got} == {torch.float32}
    assert all(map(torch.equal, got, expected))


def test_parameters_may_be_wider_than_the_features() -> None:
    features, gradient, detectors, bias = draw(3, 64, 4, 4, 5, dtype=torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in (detectors, bias)]
    torch.testing.assert_close(
        rationale_fit(features, gradient, *wide), rationale_fit(features, gradient, detectors, bias)
    )
    rationale_pool(features, *wide).pooled.sum().backward()
    assert [tensor.grad.dtype for tensor in (features, *wide) if tensor.grad is not None] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]


META = torch.device("meta")
BAD_FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("features", {"features": torch.zeros(2, 4, 9)}),
    ("features", {"features": torch.zeros(2, 4, 3, 3, dtype=torch.int64)}),
    ("features", {"features": torch.zeros(2, 4, 0, 3)}),
    ("features", {"features": torch.zeros(2, 4, 1, 4097)}),
    ("detectors", {"detectors": torch.zeros(5, 3)}),
    ("detectors", {"detectors": torch.zeros(5, 4, 1, 1)}),
    ("detectors", {"detectors": torch.zeros(0, 4), "bias": None}),
    ("detectors", {"detectors": torch.zeros(129, 4), "bias": None}),
    ("detectors", {"detectors": torch.zeros(5, 4, dtype=torch.int32)}),
    ("detectors", {"detectors": torch.zeros(5, 4, device=META)}),
    ("bias", {"bias": torch.zeros(4)}),
    ("bias", {"bias": torch.zeros(5, 1)}),
    ("bias", {"bias": torch.zeros(5, dtype=torch.int32)}),
    ("bias", {"bias": torch.zeros(5, device=META)}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": float("nan")}),
    ("impl", {"impl": "triton"}),
    ("impl", {"impl": "cuda"}),
]
BAD_FIT: list[tuple[str, dict[str, Any]]] = [
    ("gradient", {"gradient": torch.zeros(2, 4, 1)}),
    ("gradient", {"gradient": torch.zeros(1, 4)}),
    ("gradient", {"gradient": torch.zeros(2, 4, dtype=torch.int32)}),
    ("gradient", {"gradient": torch.zeros(2, 4, device=META)}),
    ("target", {"target": "softmax"}),
    ("cam_keeps", {"cam_keeps": "both"}),
]
BAD_CONTRAST: list[tuple[str, dict[str, Any]]] = [
    ("query", {"query": torch.zeros(2, 4, 1)}),
    ("query", {"query": torch.zeros(2, 4, dtype=torch.int32)}),
    ("key", {"key": torch.zeros(1, 4)}),
    ("key", {"key": torch.zeros(2, 4, dtype=torch.int32)}),
    ("key", {"key": torch.zeros(2, 4, device=META)}),
    ("queue", {"queue": torch.zeros(0, 4)}),
    ("queue", {"queue": torch.zeros(7, 5)}),
    ("queue", {"queue": torch.zeros(4)}),
    ("queue", {"queue": torch.zeros(7, 4, dtype=torch.int32)}),
    ("queue", {"queue": torch.zeros(7, 4, device=META)}),
    *BAD_FEATURES[-5:],
]
BRANCH = {"features": torch.zeros(2, 4, 3, 3), "detectors": torch.zeros(5, 4), "bias": torch.zeros(5)}
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    rationale_pool: BRANCH,
    rationale_fit: BRANCH | {"gradient": torch.zeros(2, 4)},
    info_nce: {"query": torch.zeros(2, 4), "key": torch.zeros(2, 4), "queue": torch.zeros(7, 4)},
}


@pytest.mark.parametrize(
    ("op", "name", "bad"),
    [(rationale_pool, *case) for case in BAD_FEATURES]
    + [(rationale_fit, *case) for case in BAD_FEATURES + BAD_FIT]
    + [(info_nce, *case) for case in BAD_CONTRAST],
)
def test_a_bad_argument_is_refused_by_its_name(
    op: Callable[..., Any], name: str, bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcr.kernels.launch.INTERPRET", False)  # under it, "triton" serves the CPU
    op(**GOOD[op])
    with pytest.raises(ValueError, match=f"^{name} must"):
        op(**(GOOD[op] | bad))
