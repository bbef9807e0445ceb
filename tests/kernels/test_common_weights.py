"""The common channel weights: reference and kernel against the equation in fp64, and what else each op must do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from fastcr.kernels import common_weights as module
from fastcr.kernels import launch, settings
from fastcr.kernels.common_weights import MAX_CHANNELS, common_weights
from fastcr.kernels.rationale_fit import CamKeeps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEEPS: list[CamKeeps] = ["match", "mismatch"]
IMPLS = ["torch", *(["triton"] if launch.triton else [])]
slow = pytest.mark.slow
SHAPES: list[Any] = [  # images, channels, height, width
    (0, 64, 7, 7),
    (1, 512, 7, 7),
    (3, 64, 1, 1),
    (3, 70, 4, 5),
    (1, 5, 64, 64),
    (2, 2047, 1, 3),
    (1, 2049, 2, 1),
    (41, 3, 3, 3),
    pytest.param((2, MAX_CHANNELS, 3, 3), marks=slow),
    pytest.param((40, 2048, 7, 7), marks=slow),
    pytest.param((3, 640, 40, 40), marks=slow),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features in `dtype`, and a gradient in fp32 whose second image has no GradCAM."""
    random = torch.Generator().manual_seed(sum(shape))
    features = torch.randn(shape, generator=random, dtype=torch.float64).to(DEVICE, dtype)
    gradient = torch.randn(shape[:2], generator=random, dtype=torch.float64).to(DEVICE, torch.float32)
    gradient[1:2] = 0
    return features, gradient


def naive(features: Tensor, gradient: Tensor, keeps: CamKeeps) -> Tensor:
    """The equation, image by image in fp64."""
    found = np.zeros(features.shape[1])
    for maps, slopes in zip(features.double().flatten(2).cpu().numpy(), gradient.double().cpu().numpy(), strict=True):
        cam = np.maximum((1 if keeps == "mismatch" else -1) * (slopes @ maps), 0)
        if cam.any():
            found += maps @ (cam / cam.sum() - 1 / len(cam))
    return torch.from_numpy(found).to(DEVICE)


def error(got: Tensor, exact: Tensor) -> float:
    """Over the largest entry, or that of features of unit variance: their mean, taken off, may leave nothing."""
    return (got.double() - exact).abs().max().item() / max(exact.abs().max().item(), 1.0)


@pytest.fixture
def two_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images to a program."""
    for row, chosen in settings.TABLE["common_weights"].items():
        monkeypatch.setitem(settings.TABLE["common_weights"], row, chosen | {"programs": 2})


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing wrote shows."""
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: make(*args, **kwargs).fill_(NAN))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_equation_to_fp32_rounding(
    shape: tuple[int, ...], dtype: torch.dtype, impl: Any, keeps: CamKeeps
) -> None:
    features, gradient = draw(shape, dtype)
    found = common_weights(features, gradient, cam_keeps=keeps, impl=impl)
    assert found.dtype == torch.float32  # and as exact for 16-bit features as for fp32
    assert error(found, naive(features, gradient, keeps)) <= 3e-6


def test_fp64_features_give_fp64_weights() -> None:
    features, gradient = (tensor.double() for tensor in draw((3, 70, 4, 5)))
    found = common_weights(features, gradient)
    assert found.dtype == torch.float64
    assert error(found, naive(features, gradient, "mismatch")) <= 1e-13


@pytest.mark.usefixtures("poisoned", "two_programs")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_program_may_have_several_images_and_the_last_fewer(impl: Any) -> None:
    features, gradient = draw((5, 70, 4, 5), torch.bfloat16)
    expected = naive(features, gradient, "match")
    assert error(common_weights(features, gradient, cam_keeps="match", impl=impl), expected) <= 3e-6


@hypothesis_settings(max_examples=10, deadline=None)
@given(shape=st.tuples(*(st.integers(low, high) for low, high in ((0, 4), (1, 600), (1, 9), (1, 9)))))
def test_maps_of_any_shape(shape: tuple[int, ...]) -> None:
    features, gradient = draw(shape)
    for impl in IMPLS:
        assert error(common_weights(features, gradient, impl=impl), naive(features, gradient, "mismatch")) <= 3e-6


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, ::2, 1:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded images": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded positions": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl: Any, layout: Callable[[Tensor], Tensor]) -> None:
    features = layout(draw((3, 6, 5, 6))[0])
    gradient = draw((3, features.shape[1], 1, 1))[1]
    assert features.stride() != features.contiguous().stride()
    strided = torch.stack([gradient] * 2, dim=-1)[..., 0]
    found = common_weights(features, strided, impl=impl)
    assert error(found, common_weights(features.contiguous(), gradient, impl=impl).double()) <= 1e-6
    assert error(found, naive(features, gradient, "mismatch")) <= 3e-6


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_image_without_gradcam_adds_nothing(impl: Any, keeps: CamKeeps) -> None:
    features, gradient = draw((4, 6, 3, 3))
    features = features.abs()
    gradient[2] = gradient[2].abs() * (1 if keeps == "match" else -1)  # relu leaves nothing of this image
    found = common_weights(features, gradient, cam_keeps=keeps, impl=impl)
    others = common_weights(features[[0, 3]], gradient[[0, 3]], cam_keeps=keeps, impl=impl)
    torch.testing.assert_close(found, others)
    assert found.any()
    nothing = common_weights(features[1:3], gradient[1:3], cam_keeps=keeps, impl=impl)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_size_of_an_images_gradient_does_not_matter(impl: Any, scale: float) -> None:
    features, gradient = draw((3, 16, 3, 3))
    larger = gradient * torch.tensor([scale, 1, 1], device=DEVICE)[:, None]
    plain, scaled = (common_weights(features, each, impl=impl) for each in (gradient, larger))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)


def in_one_go(features: Tensor, gradient: Tensor, keeps: CamKeeps) -> Tensor:
    """The equation with all positions' weights made first, in fp32: where infinities and NaN go."""
    maps = features.float().flatten(2)
    slope = torch.einsum("bcs,bc->bs", maps, F.normalize(gradient, dim=1))
    cam = torch.relu(slope if keeps == "mismatch" else -slope)
    total = cam.sum(1, keepdim=True)
    share = torch.where(total == 0, 1 / cam.shape[1], cam / torch.where(total == 0, 1, total))
    return torch.einsum("bcs,bs->bc", maps, share - 1 / cam.shape[1]).sum(0)


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("image", [0, 1], ids=["an image", "one without GradCAM"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_goes_where_the_equation_takes_it(
    impl: Any, dtype: torch.dtype, image: int, value: float, keeps: CamKeeps
) -> None:
    for name in ("features", "gradient"):
        features, gradient = draw((3, 6, 2, 3), dtype)
        (features if name == "features" else gradient)[image].flatten()[3] = value
        found, expected = (
            common_weights(features, gradient, cam_keeps=keeps, impl=impl),
            in_one_go(features, gradient, keeps),
        )
        assert not expected.isfinite().all()
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_relu_does_not_hide_an_infinite_gradient(impl: Any) -> None:
    features, gradient = draw((3, 6, 2, 4))
    gradient[0, 3] = INF  # no place has a negative slope, but a gradient of infinite length has no direction
    assert common_weights(features.abs(), gradient, cam_keeps="match", impl=impl).isnan().all()


def test_an_infinity_that_gradcam_leaves_out_stays_in_its_channel() -> None:
    features, gradient = draw((3, 6, 2, 3))
    features[0, 2, 1, 1] = INF if gradient[0, 2] < 0 else -INF
    for impl in IMPLS:
        found = common_weights(features, gradient, cam_keeps="mismatch", impl=impl)
        assert found.isfinite().tolist() == [True, True, False, True, True, True]
        assert found[2] == -features[0, 2, 1, 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_the_same_bits_and_nothing_carries_gradient(impl: Any) -> None:
    features, gradient = draw((3, 70, 4, 5), torch.bfloat16)
    found = common_weights(features.requires_grad_(), gradient.requires_grad_(), impl=impl)
    assert not found.requires_grad
    assert torch.equal(common_weights(features, gradient, impl=impl), found)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(common_weights(features, gradient, impl=impl), found)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_in_one_graph_equals_eager(impl: Any, dynamic: bool) -> None:
    features, gradient = draw((3, 70, 4, 5))

    def doubled(features: Tensor, gradient: Tensor) -> Tensor:
        return 2 * common_weights(2 * features, gradient, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(features, gradient), doubled(features, gradient))


@pytest.mark.skipif("triton" not in IMPLS, reason="there is no Triton")
@pytest.mark.parametrize("images", [0, 3])
def test_the_custom_op_passes_opcheck(images: int) -> None:
    for dtype in DTYPES:
        torch.library.opcheck(module._fused, (*draw((images, 20, 2, 3), dtype), "match"))


GOOD: dict[str, Any] = {"features": torch.zeros(2, 4, 3, 3), "gradient": torch.zeros(2, 4)}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("features", {"features": torch.zeros(2, 4, 9)}),
    ("features", {"features": torch.zeros(2, 4, 3, 3, dtype=torch.int64)}),
    ("features", {"features": torch.zeros(2, 4, 0, 3)}),
    ("features", {"features": torch.zeros(2, 4, 1, 4097)}),
    ("gradient", {"gradient": torch.zeros(2, 4, 1)}),
    ("gradient", {"gradient": torch.zeros(1, 4)}),
    ("gradient", {"gradient": torch.zeros(2, 4, dtype=torch.int32)}),
    ("gradient", {"gradient": torch.zeros(2, 4, device="meta")}),
    ("cam_keeps", {"cam_keeps": "both"}),
    ("impl", {"impl": "triton"}),
    ("impl", {"impl": "cuda"}),
]


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_a_bad_argument_is_refused_by_its_name(name: str, bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRET", False)  # under it, "triton" serves the CPU
    common_weights(**GOOD)
    with pytest.raises(ValueError, match=f"^{name} must"):
        common_weights(**(GOOD | bad))


@pytest.mark.skipif("triton" not in IMPLS, reason="there is no Triton")
def test_the_kernel_serves_what_it_takes_and_auto_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    many = draw((2, MAX_CHANNELS + 1, 1, 2))
    torch.testing.assert_close(common_weights(*many), common_weights(*many, impl="torch"))
    for tensors in (many, [tensor.double() for tensor in many]):
        with pytest.raises(ValueError, match="impl must"):
            common_weights(*tensors, impl="triton")

    def refuse(*args: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(module, "_fused", refuse)
    assert common_weights(**GOOD).shape == (4,)
    with pytest.raises(AssertionError, match="launched"):
        common_weights(*draw((2, 3, 1, 2)), impl="triton")
