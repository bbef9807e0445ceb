"""The kernels where numbers are extreme: large logits, scaled gradients, NaN and infinities."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.harness import (
    DTYPES,
    F16,
    INF,
    NAN,
    SMALL,
    TOLERANCE,
    call,
    draw,
    error,
    fresh,
    pairwise,
    run,
)

pytest.importorskip("triton")

OPS = list(SMALL)
MAPS = ["rationale_pool", "rationale_fit"]
QUEUED = ["info_nce", "relational"]


@pytest.mark.parametrize(("op", "dtype", "scale"), pairwise(op=MAPS, dtype=DTYPES, scale=[2.0**-16, 2.0**20]), ids=str)
def test_gradients_scale_with_the_gradient_of_the_loss(op: str, dtype: torch.dtype, scale: float) -> None:
    """A mean over the batch, or a loss scaler, must not take fp32 gradients to the limits of a 16-bit dtype."""
    arguments = draw(op, dtype)
    _, gradients = run(op, arguments, impl="triton")
    _, scaled = run(op, arguments, scale, impl="triton")
    # gradients in fp16 have no room for such a scale themselves
    for name in (name for name, gradient in gradients.items() if gradient.dtype != F16):
        floor = 1.0 if name == "bias" else 1e-3
        assert error(scaled[name].double() / scale, gradients[name].double(), floor) <= TOLERANCE[dtype][1], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype: torch.dtype) -> None:
    for op in OPS:
        arguments = draw(op, dtype)
        if "detectors" in arguments:
            arguments["detectors"] = (arguments["detectors"].detach() * 1e4).requires_grad_()
        elif "query" in arguments:
            far = [arguments["key"][0], -arguments["key"][1], arguments["queue"][0]]
            arguments["query"] = (torch.stack(far).detach() * 2e3).requires_grad_()
        values, gradients = run(op, arguments, impl="triton")
        assert op == "common_weights" or values[0].max() > (1 if op == "rationale_pool" else 1e3)
        assert all(tensor.isfinite().all() for tensor in (*values, *gradients.values()))
        # fp32 logits of 1e4 are 1e-3 apart
        exact = run(op, fresh(op, arguments, torch.Tensor.double))[0]
        torch.testing.assert_close(values, exact, rtol=1e-2, atol=2e-2, check_dtype=False)


WHERE = [("rationale_fit", "features"), ("rationale_fit", "gradient"), ("rationale_pool", "features")]
WHERE += [(op, name) for op in QUEUED for name in ("query", "key")]


@pytest.mark.parametrize(
    ("where", "value", "dtype", "options"),
    pairwise(
        where=WHERE,
        value=[NAN, INF, -INF],
        dtype=DTYPES,
        options=[{}, {"target": "sum", "pool_weight": 0.5}],
    ),
    ids=str,
)
def test_nan_and_inf_stay_in_their_image(
    where: tuple[str, str], value: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    (op, name), options = where, options if where[0] == "rationale_fit" else {}
    clean = {key: each for key, each in draw(op, dtype, B=4).items() if not key.endswith("images")}
    if "queue" in clean:
        clean["queue"].abs_()  # an infinite entry is of one sign to all keys
    sick = fresh(op, clean)
    with torch.no_grad():
        sick[name][1, 3, ...].view(-1)[0] = value
    runs = run(op, clean, impl="triton", **options), run(op, sick, impl="triton", **options)
    reference = run(op, sick, impl="torch", **options)
    per_image = {"features", "query", "key"}
    healthy, got, expected = (
        [*values, *(gradient for name, gradient in gradients.items() if name in per_image)]
        for values, gradients in (*runs, reference)
    )
    for a, b, c in zip(healthy, got, expected, strict=True):
        assert a.isfinite().all()
        assert torch.equal(b[[0, 2, 3]], a[[0, 2, 3]])
        if op == "info_nce":  # an infinite loss has no gradient, finite as the reference may leave parts of it
            assert c[1].isfinite().logical_or(~b[1].isfinite()).all()
        else:
            assert torch.equal(b[1].isnan(), c[1].isnan())
    assert not got[0][1].isfinite().any()


@pytest.mark.parametrize("op", MAPS)
def test_an_infinity_that_every_detector_dislikes_is_not_hidden(op: str) -> None:
    """Its logit is minus infinity: an attention of 0 there and a finite map elsewhere would hide it."""
    arguments = draw(op, K=16)  # no padding, whose product with an infinity is NaN
    with torch.no_grad():
        arguments["detectors"][:, 3] = -1
        arguments["features"][1, 3, 0, 0] = INF
    values, _ = run(op, arguments, impl="triton")
    assert all(each[1].isnan().all() and each[[0, 2]].isfinite().all() for each in values[:2])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_keys_own_image_is_left_out_of_its_target(impl: str) -> None:
    """The queue holds each key itself, which would be nearly all of its target."""
    arguments = draw("relational")
    arguments["queue"][:3] = arguments["key"]
    arguments["queue_images"][:] = 9
    arguments["queue_images"][:3] = torch.arange(3)
    arguments["images"] = torch.tensor([0, 1, 2, 7, 7, 7], device=arguments["key"].device)[:3]  # others behind it
    _, positive = call("relational", arguments, impl=impl)
    assert (positive * arguments["key"]).sum(1).max() < 0.9


@pytest.mark.parametrize("op", QUEUED)
def test_nan_in_the_queue_reaches_every_loss(op: str) -> None:
    arguments = draw(op)
    arguments["queue"][37, 5] = NAN
    arguments = {name: each for name, each in arguments.items() if not name.endswith("images")}
    for impl in ("torch", "triton"):
        values, gradients = run(op, arguments, impl=impl)
        assert values[0].isnan().all()
        assert gradients["query"].isnan().all()


def in_one_go(features: torch.Tensor, gradient: torch.Tensor, keeps: str) -> torch.Tensor:
    """The common weights with all positions' shares made first, in fp32: where infinities and NaN go."""
    maps = features.float().flatten(2)
    slope = torch.einsum("bcs,bc->bs", maps, F.normalize(gradient, dim=1))
    cam = torch.relu(slope if keeps == "mismatch" else -slope)
    total = cam.sum(1, keepdim=True)
    share = torch.where(total == 0, 1 / cam.shape[1], cam / torch.where(total == 0, 1, total))
    return torch.einsum("bcs,bs->bc", maps, share - 1 / cam.shape[1]).sum(0)


@pytest.mark.parametrize(
    ("name", "value", "image", "dtype", "keeps"),
    pairwise(
        name=["features", "gradient"],
        value=[NAN, INF, -INF],
        image=[0, 1],  # the second is one without GradCAM
        dtype=DTYPES,
        keeps=["match", "mismatch"],
    ),
    ids=str,
)
def test_what_is_not_finite_is_in_the_common_weights(
    name: str, value: float, image: int, dtype: torch.dtype, keeps: str
) -> None:
    arguments = draw("common_weights", dtype, C=6, S=6)
    arguments["gradient"][1] = 0
    arguments[name][image, 3].view(-1)[0] = value
    expected = in_one_go(**arguments, keeps=keeps)
    assert not expected.isfinite().all()
    for impl in ("torch", "triton"):
        (found,) = call("common_weights", arguments, cam_keeps=keeps, impl=impl)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_target_does_not_depend_on_the_scale_of_the_gradient(dtype: torch.dtype, scale: float) -> None:
    arguments = draw("rationale_fit", dtype)
    scaled = arguments | {"gradient": arguments["gradient"] * scale}
    for impl in ("torch", "triton"):
        results = [call("rationale_fit", each, impl=impl) for each in (scaled, arguments)]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
