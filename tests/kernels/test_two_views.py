"""The fused views against torchvision on the same parameters, and the kernels against the reference in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from bench.torchvision_views import ADJUSTMENTS, torchvision_view
from fastcr.data.cutting import view_table
from fastcr.data.views import MEAN, STD, ViewParameters, draw_parameters
from fastcr.kernels import two_views as module
from fastcr.kernels.colour import jitter_reference
from fastcr.kernels.two_views import COLUMNS, MAX_SIZE, two_views

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLOURS: dict[str, Any] = {"mean": MEAN, "std": STD}
# what the kernels may lose beyond the reference in the same dtype: views rest in 16 bits between passes, and the
# interpreter truncates to bf16 instead of rounding
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def draw(sizes: list[tuple[int, int]], seed: int = 0, epoch: int = 0) -> tuple[dict[str, Tensor], ViewParameters]:
    """Random images of these sizes and MoCo v2's augmentation of them."""
    rng = np.random.default_rng(seed)
    lengths = np.array([3 * height * width for height, width in sizes], dtype=np.int64)
    parameters = draw_parameters(seed, epoch, np.arange(len(sizes)), np.array(sizes))
    arrays = {
        "pixels": rng.integers(0, 256, lengths.sum(), dtype=np.uint8),
        "starts": lengths.cumsum() - lengths,
        "widths": np.array([width for _, width in sizes], dtype=np.int64),
        "table": view_table(parameters),
    }
    return {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}, parameters


SIZES = [(40, 33), (9, 70), (64, 64), (1, 1), (31, 47)]


def assert_as_exact_as_torch(arguments: dict[str, Tensor], size: int, dtype: torch.dtype) -> None:
    exact = two_views(**arguments, size=size, **COLOURS, dtype=torch.float64, impl="torch")
    got, plain = (two_views(**arguments, size=size, **COLOURS, dtype=dtype, impl=impl) for impl in ("triton", "torch"))
    assert got.dtype == dtype
    assert got.shape == exact.shape
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in got)
    if exact.numel():
        allowed = (plain.double() - exact).abs().max() + TOLERANCE[dtype]
        assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_agree_with_the_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(draw(SIZES, epoch=dtype == torch.float32)[0], 20, dtype)


def test_a_strong_reduction_takes_every_pixel_under_the_filter() -> None:
    sizes = [(200, 9), (9, 200), (40, 40)]  # to 8: up to 25 times smaller
    arguments, parameters = draw(sizes)
    arguments["table"] = torch.from_numpy(view_table(single(parameters))).to(DEVICE)
    arguments["table"][:, :, :4] = torch.tensor([[[0, 0, *size]] * 2 for size in sizes], dtype=torch.float32)
    assert_as_exact_as_torch(arguments, 8, torch.float32)


@pytest.mark.parametrize(("images", "size"), [(1, 8), (70_000, 8), (1, 4104), (2, MAX_SIZE)])
def test_launches_stay_within_the_limits_of_cuda(images: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_cut_kernel", "_colour_kernel", "_blur_kernel"):
        monkeypatch.setattr(module, name, Recorder())
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *args: self)  # of what no kernel wrote
    table = torch.empty(images, 2, 16, device="meta")
    arguments = torch.empty(3, dtype=torch.uint8), *[torch.empty(images, dtype=torch.int64) for _ in range(2)]
    module._fused._init_fn(*arguments, table, size, list(MEAN), list(STD), torch.bfloat16)
    assert len(grids) == 4
    for grid in grids:
        x, y, z = (*grid, 1, 1)[:3]
        assert x * y * z >= images * 2 * size**2 / module.BLOCK
        assert x < 2**31
        assert max(y, z) < 2**16


def test_a_view_beyond_the_limit_is_refused_but_served_by_auto() -> None:
    arguments, _ = draw([(9, 9)])
    arguments["table"] = arguments["table"][:, :0]
    with pytest.raises(ValueError, match="its kernels do not take these shapes"):
        two_views(**arguments, size=MAX_SIZE + 1, **COLOURS, impl="triton")
    assert two_views(**arguments, size=MAX_SIZE + 1, **COLOURS).shape == (0, 1, 3, MAX_SIZE + 1, MAX_SIZE + 1)


def single(parameters: ViewParameters, **changes: Any) -> ViewParameters:
    """The parameters with everything off but what `changes` turn on."""
    off = {name: np.zeros_like(getattr(parameters, name)) for name in ("jitter", "grey", "blur", "flip")}
    return parameters._replace(**(off | changes))


def torchvision_views(pixels: Tensor, sizes: list[tuple[int, int]], p: ViewParameters, size: int) -> Tensor:
    """Torchvision's views, normalised; it rounds to uint8 after the resize and at the end."""
    views, start = [], 0
    for i, (height, width) in enumerate(sizes):
        image = pixels[start : start + 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        start += 3 * height * width
        alone = ViewParameters(*(values[i : i + 1] for values in p))
        views.append(torch.stack([torchvision_view(image, alone, view, size).permute(2, 0, 1) for view in (0, 1)]))
    return v2.functional.normalize(torch.stack(views, dim=1) / 255, list(MEAN), list(STD))


LEVEL = 1 / 255 / min(STD)  # of uint8, normalised
EACH: dict[str, tuple[dict[str, Any], float]] = {  # what is on, and how many levels of uint8 it may lie off at most
    "crop and resize": ({}, 1.0),
    "brightness": ({"order": 0}, 2.0),
    "contrast": ({"order": 1}, 2.0),
    "saturation": ({"order": 2}, 2.0),
    "hue": ({"order": 3}, 9.0),  # of nearly grey pixels the hue turns by much with a rounding of their colour
    "grey": ({"grey": np.array(True)}, 1.5),
    "blur": ({"blur": np.array(True)}, 1.5),
    "flip": ({"flip": np.array(True)}, 1.0),
}


def alone(parameters: ViewParameters, changes: dict[str, Any]) -> ViewParameters:
    """The parameters with one augmentation on, as `EACH` says."""
    if "order" not in changes:
        return single(parameters, **{key: np.broadcast_to(on, parameters.grey.shape) for key, on in changes.items()})
    only = np.full_like(parameters.order, changes["order"])
    only[..., 1:] = -1
    return single(parameters, jitter=np.ones_like(parameters.jitter), order=only)


@pytest.mark.parametrize("name", EACH)
def test_each_augmentation_is_torchvisions(name: str) -> None:
    sizes = [(50, 40), (37, 61), (90, 33)]
    arguments, parameters = draw(sizes)
    changes, levels = EACH[name]
    p = alone(parameters, changes)
    arguments["table"] = torch.from_numpy(view_table(p)).to(DEVICE)
    ours = two_views(**arguments, size=28, **COLOURS, impl="torch").cpu()
    difference = (ours - torchvision_views(arguments["pixels"].cpu(), sizes, p, 28)).abs()
    assert difference.max() <= levels * LEVEL
    assert difference.mean() <= 0.5 * LEVEL
    if name != "crop and resize":  # it does something
        arguments["table"] = torch.from_numpy(view_table(single(parameters))).to(DEVICE)
        assert (two_views(**arguments, size=28, **COLOURS, impl="torch").cpu() - ours).abs().mean() > 2 * LEVEL


def test_the_kernels_do_each_augmentation_alone_and_any_number_of_views() -> None:
    arguments, parameters = draw([(50, 40), (21, 31)])
    each = [view_table(alone(parameters, changes))[:, :1] for changes, _ in EACH.values()]
    arguments["table"] = torch.from_numpy(np.concatenate(each, axis=1)).to(DEVICE)
    assert_as_exact_as_torch(arguments, 17, torch.float32)
    assert_as_exact_as_torch(arguments | {"table": arguments["table"][:, -1:]}, 17, torch.float32)


def test_on_a_cpu_they_are_torchvisions_but_for_the_last_rounding() -> None:
    """`auto`: the resize is torchvision's own, and so nothing is left for the hue of nearly grey pixels to enlarge."""
    sizes = [(48, 36 + i) for i in range(30)]
    arguments, parameters = draw(sizes)
    on_cpu = {name: tensor.cpu() for name, tensor in arguments.items()}
    ours, exact = (two_views(**on_cpu, size=24, **COLOURS, impl=impl) for impl in ("auto", "torch"))
    theirs = torchvision_views(on_cpu["pixels"], sizes, parameters, 24)
    levels = torch.tensor(STD)[:, None, None] * 255
    assert ((ours - theirs) * levels).abs().max() < 0.502
    assert ((exact - theirs) * levels).abs().max() > 1
    oracle = two_views(**on_cpu, size=24, **COLOURS, dtype=torch.float64)
    torch.testing.assert_close(oracle.float(), exact, atol=1e-4, rtol=0)  # in fp64 nothing is rounded


@pytest.mark.parametrize(("which", "factors"), [(0, (0, 2)), (1, (0, 2)), (2, (0, 2)), (3, (-0.5, 0.5))])
def test_any_strength_of_jitter_is_torchvisions(which: int, factors: tuple[float, float]) -> None:
    x = torch.rand(3, 40, 40, dtype=torch.float64)
    x[1:, :5], x[:, 5:7], x[:, 7:9] = x[:1, :5], 0, 1  # greys, black and white
    x[0, 10:20] = x[1, 10:20]  # two channels alike
    for factor in torch.linspace(*factors, 9).tolist():
        expected = ADJUSTMENTS[which](x, factor)
        torch.testing.assert_close(jitter_reference(x, which, factor), expected, atol=1e-5, rtol=0)


def test_two_runs_give_the_same_bits_and_compile_in_one_graph() -> None:
    arguments, _ = draw(SIZES[:2])

    def op(**tensors: Tensor) -> Tensor:
        return two_views(**tensors, size=16, **COLOURS, impl="triton")

    expected = op(**arguments)
    assert torch.equal(op(**arguments), expected)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), expected)
    torch.library.opcheck(module._fused, (*arguments.values(), 16, list(MEAN), list(STD), torch.float32))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pixels": torch.zeros(3)}, "pixels must be a contiguous uint8"),
    ({"pixels": torch.zeros(60, dtype=torch.uint8)[::2]}, "pixels must be a contiguous uint8"),
    ({"starts": torch.zeros(1, dtype=torch.int32)}, r"starts must be torch.int64 \[1\] on cpu"),
    ({"widths": torch.zeros(1, dtype=torch.int64, device="meta")}, r"widths must be torch.int64 \[1\] on cpu"),
    ({"table": torch.zeros(1, 2, 15)}, rf"table must be torch.float32 \[1, 2, {len(COLUMNS)}\]"),
    ({"size": 7}, "size must be at least 8"),
    ({"mean": (0.5,)}, "mean and std must have three values, got 1 and 3"),
    ({"dtype": torch.uint8}, "dtype must be floating-point"),
    ({"dtype": torch.float64, "impl": "triton"}, "impl must be"),
    ({"impl": "cuda"}, "impl must be"),
]


def test_bad_arguments_are_named() -> None:
    arguments = {name: tensor.cpu() for name, tensor in draw([(9, 9)])[0].items()}
    for change, message in BAD:
        with pytest.raises(ValueError, match=message):
            two_views(**({"size": 16, **arguments, **COLOURS} | change))
