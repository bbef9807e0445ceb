"""The torch references against the equations of their docstrings, written out image by image in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.kernels.common_weights import common_weights
from fastcr.kernels.info_nce import info_nce
from fastcr.kernels.rationale_fit import CamKeeps, Target, rationale_fit
from fastcr.kernels.rationale_pool import rationale_pool
from fastcr.kernels.relational import relational
from tests.kernels.harness import BF16, F16, F32, F64, SMALL, draw, error, fresh, pairwise, run, upstream_of

Array = np.ndarray
# largest error over the largest entry; values come out in fp32 from 16-bit inputs, gradients in the input's dtype
TOLERANCE = {F64: 1e-12, F32: 2e-5, F16: 1e-3, BF16: 8e-3}
TARGETS: list[Target] = ["max-softmax", "sum"]
SIGNS: list[CamKeeps] = ["match", "mismatch"]
TAU = 0.4
MAPS = ["rationale_pool", "rationale_fit"]
OPS = list(SMALL)
# images, channels, positions, detectors
SHAPES = [(0, 64, 49, 5), (1, 2047, 49, 32), (1, 3, 16, 128), (3, 64, 1, 1), (3, 64, 16, 33), (3, 48, 196, 128)]
# images, dimensions, keys in the queue
QUEUES = [(0, 64, 1000), (1, 64, 1), (3, 128, 1000), (3, 5, 33)]


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def naive_target(image: Array, gradient: Array, target: Target, sign: CamKeeps) -> Array:
    cam = np.maximum((1 if sign == "mismatch" else -1) * (gradient @ image), 0)
    if cam.max() == 0:
        return np.full(len(cam), 1 / len(cam))
    return cam / cam.sum() if target == "sum" else softmax(cam / cam.max() / TAU)


def as_numpy(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().double().cpu().numpy() for tensor in tensors]


def assert_close(got: Tensor, expected: Any, floor: float = 1e-3) -> None:
    assert error(got.cpu(), torch.as_tensor(expected, dtype=F64).reshape(got.shape), floor) <= TOLERANCE[got.dtype]


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "target", "sign"),
    pairwise(op=MAPS, shape=SHAPES, dtype=list(TOLERANCE), target=TARGETS, sign=SIGNS),
    ids=str,
)
def test_fit_and_pool_follow_their_equations(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, target: Target, sign: CamKeeps
) -> None:
    arguments = draw(op, dtype, **dict(zip("BCSK", shape, strict=True)))
    if dtype == F64:
        arguments = fresh(op, arguments, Tensor.double)
    options: dict[str, Any] = {"temperature": TAU} | ({"target": target, "cam_keeps": sign} if op == MAPS[1] else {})
    values, gradients = run(op, arguments, impl="torch", **options)
    assert {each.dtype for each in values} == {torch.promote_types(dtype, F32)}
    assert {name: each.dtype for name, each in gradients.items()} == {name: arguments[name].dtype for name in gradients}

    features = arguments["features"].flatten(2)
    maps, weight, shift = as_numpy(features, arguments["detectors"], arguments["bias"])
    upstream = as_numpy(*upstream_of([each.requires_grad_() for each in (values if op == MAPS[0] else values[:1])]))
    by_maps, by_weight, by_bias = (np.zeros_like(array) for array in (maps, weight, shift))
    for b, image in enumerate(maps):
        logits = weight @ image + shift[:, None]
        q, winners = softmax(logits.max(0) / TAU), logits.argmax(0)
        if op == MAPS[0]:
            by_pooled, by_attention = upstream[0][b], upstream[1][b]
            by_q = by_attention + by_pooled @ image
            expected, by_logits = (image @ q, q), q * (by_q - q @ by_q) / TAU
            by_maps[b] = np.outer(by_pooled, q)
        else:
            p = naive_target(image, as_numpy(arguments["gradient"][b])[0], target, sign)
            divergence = sum(a * np.log(a / c) for a, c in zip(p, q, strict=True) if a)
            expected, by_logits = (divergence, q, p), upstream[0][b] * (q - p) / TAU
        for got, exact in zip(values, expected, strict=True):
            assert_close(got[b], exact)
        by_maps[b] += weight[winners].T * by_logits
        np.add.at(by_weight, winners, (by_logits * image).T)
        np.add.at(by_bias, winners, by_logits)
    assert_close(gradients["features"], by_maps)
    assert_close(gradients["detectors"], by_weight)
    assert_close(gradients["bias"], by_bias, floor=1)  # sums to 0 over the detectors


@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    pairwise(op=["info_nce", "relational", "relational, own keys left out"], shape=QUEUES, dtype=list(TOLERANCE)),
    ids=str,
)
def test_ops_over_a_queue_follow_their_equations(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    op, known = op.partition(",")[0], "own" in op
    arguments = draw(op, dtype, **dict(zip("BDN", shape, strict=True)))
    if not known:
        arguments = {name: each for name, each in arguments.items() if not name.endswith("images")}
    values, gradients = run(op, arguments, impl="torch", temperature=0.2)
    assert values[0].dtype == torch.promote_types(dtype, F32)
    assert {each.dtype for each in (*values[1:], *gradients.values())} == {dtype}
    upstream = as_numpy(*upstream_of([values[0].requires_grad_()]))[0]
    query, key, queue = as_numpy(*(arguments[name] for name in ("query", "key", "queue")))
    for b, q in enumerate(query):
        others = queue[arguments["queue_images"].cpu().numpy() != b] if known else queue
        if op == "info_nce":
            shares = softmax(np.append(key[b] @ q, queue @ q) / 0.2)
            loss, by_query = -np.log(shares[0]), (shares @ np.vstack([key[b], queue]) - key[b]) / 0.2
            assert_close(gradients["key"][b], upstream[b] * (shares[0] - 1) * q / 0.2)
        elif len(others):
            p, shares = softmax(others @ key[b] / 0.04), softmax(others @ q / 0.2)
            loss, by_query = -(p * np.log(shares)).sum(), (shares - p) @ others / 0.2
            assert_close(values[1][b], p @ others / np.linalg.norm(p @ others))
        else:
            loss, by_query = 0.0, 0 * q
            assert not values[1][b].any()
        assert_close(values[0][b], loss, floor=1)
        assert_close(gradients["query"][b], upstream[b] * by_query)


@pytest.mark.parametrize(
    ("shape", "dtype", "sign"),
    pairwise(shape=[(0, 64, 49), (1, 512, 49), (3, 64, 1), (40, 70, 20)], dtype=list(TOLERANCE), sign=SIGNS),
    ids=str,
)
def test_common_weights_follow_their_equation(shape: tuple[int, ...], dtype: torch.dtype, sign: CamKeeps) -> None:
    arguments = draw("common_weights", dtype, **dict(zip("BCS", shape, strict=True)))
    arguments["gradient"][1:2] = 0
    found = np.zeros(shape[1])
    for maps, slopes in zip(*as_numpy(arguments["features"].flatten(2), arguments["gradient"]), strict=True):
        cam = np.maximum((1 if sign == "mismatch" else -1) * (slopes @ maps), 0)
        if cam.any():
            found += maps @ (cam / cam.sum() - 1 / len(cam))
    got = common_weights(**arguments, cam_keeps=sign, impl="torch")
    assert got.dtype == torch.promote_types(dtype, F32)  # and as exact for 16-bit features as for fp32
    assert error(got.cpu(), torch.from_numpy(found), floor=1.0) <= (1e-12 if dtype == F64 else 3e-6)


def test_finite_differences_agree_with_every_gradient() -> None:
    maps = fresh("rationale_fit", draw("rationale_fit", B=2, C=3, S=6, K=4), Tensor.double)
    features, gradient, detectors, bias = maps.values()
    query, key, queue, images, queue_images = fresh(
        "relational", draw("relational", B=2, D=4, N=12), Tensor.double
    ).values()
    key.requires_grad_()
    assert torch.autograd.gradcheck(rationale_pool, (features, detectors, bias))
    assert torch.autograd.gradcheck(rationale_pool, (features, detectors))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, queue), (query, key))
    known = {"images": images, "queue_images": queue_images}
    assert torch.autograd.gradcheck(lambda q: relational(q, key.detach(), queue, **known)[0], query)
    assert torch.autograd.gradcheck(
        lambda *weights: rationale_fit(features.detach(), gradient, *weights).divergence, (detectors, bias)
    )
    # the target moves with the features but is a constant: only a zero GradCAM gives differences without it
    flat = torch.zeros_like(gradient)
    assert torch.autograd.gradcheck(
        lambda *inputs: rationale_fit(inputs[0], flat, *inputs[1:]).divergence, (features, detectors, bias)
    )


@pytest.mark.parametrize("sign", SIGNS)
def test_a_gradcam_of_zeros_gives_the_uniform_target_and_adds_nothing(sign: CamKeeps) -> None:
    features, gradient, detectors, bias = draw("rationale_fit", B=4).values()
    features = features.detach().abs().requires_grad_()
    gradient[1] = gradient[1].abs() * (1 if sign == "match" else -1)  # relu leaves nothing of this image
    gradient[2] = 0
    for target in TARGETS:
        fit = rationale_fit(features, gradient, detectors, bias, target=target, cam_keeps=sign)
        torch.testing.assert_close(fit.target[1:3], torch.full((2, 20), 1 / 20, device=features.device))
        (by_features,) = torch.autograd.grad(fit.divergence.sum(), features)
        assert by_features.isfinite().all()
        assert by_features[1:3].any()
    for impl in ("torch", "triton"):
        found = common_weights(features, gradient, cam_keeps=sign, impl=impl)
        assert found.any()
        torch.testing.assert_close(found, common_weights(features[[0, 3]], gradient[[0, 3]], cam_keeps=sign, impl=impl))
        assert not common_weights(features[1:3], gradient[1:3], cam_keeps=sign, impl=impl).any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_image_without_other_keys_has_no_loss(impl: Any) -> None:
    arguments = draw("relational")
    arguments["queue_images"][:] = 1
    (loss, positive), by = run("relational", arguments, impl=impl)
    assert (loss[1], positive[1].any(), by["query"][1].any()) == (0, False, False)
    del arguments["images"], arguments["queue_images"]
    torch.testing.assert_close(loss[[0, 2]], relational(**arguments, impl="torch")[0][[0, 2]])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_relu_does_not_hide_an_infinity(impl: Any) -> None:
    features, gradient = draw("common_weights", C=6, S=6).values()
    endless = gradient.clone()
    endless[0, 3] = torch.inf  # no place has a negative slope, but a gradient of infinite length has no direction
    assert common_weights(features.abs(), endless, cam_keeps="match", impl=impl).isnan().all()
    features[0, 2, 1, 1] = torch.inf if gradient[0, 2] < 0 else -torch.inf  # GradCAM leaves it out: it stays there
    found = common_weights(features, gradient, impl=impl)
    assert found.isfinite().tolist() == [True, True, False, True, True, True]
    assert found[2] == -features[0, 2, 1, 1]


@pytest.mark.parametrize(
    ("stop_gradient", "fit_weight", "dtype"),
    pairwise(stop_gradient=[False, True], fit_weight=[0.0, 0.7], dtype=[F64, F32, BF16]),
    ids=str,
)
def test_pool_weight_gives_the_gradient_of_mean_pooling_and_fit_in_one_graph(
    stop_gradient: bool, fit_weight: float, dtype: torch.dtype
) -> None:
    features, _, detectors, bias = draw("rationale_fit", dtype, C=16, S=16).values()
    convert = Tensor.double if dtype == F64 else Tensor.float
    detectors, bias = (convert(each.detach()).requires_grad_() for each in (detectors, bias))
    key, queue = (convert(draw("info_nce", D=8, N=20)[name].detach()) for name in ("key", "queue"))
    head = convert(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(key.device)).requires_grad_()
    results = []
    for cut in (False, True):
        leaf = features.detach().clone().requires_grad_()
        pooled = (leaf.detach() if cut else leaf).mean((2, 3), dtype=key.dtype).requires_grad_()
        contrast = info_nce(F.normalize(pooled @ head, dim=1), key, queue)
        (gradient,) = torch.autograd.grad(contrast.sum(), pooled, retain_graph=True)
        options: dict[str, Any] = {"pool_weight": 1 / 3 if cut else 0.0, "stop_gradient": stop_gradient}
        fit = rationale_fit(leaf, gradient, detectors, bias, **options)
        loss = contrast.mean() + fit_weight * fit.divergence.mean()
        results.append(torch.autograd.grad(loss, (leaf, head, detectors, bias)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)
