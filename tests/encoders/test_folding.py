"""BatchNorm folded into convolutions: the same maths, and only where it is certain to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig
from fastcr.data.views import Batch
from fastcr.encoders import folding
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.folding import FoldedConv2d, FoldedNorm, find_pairs, fold, fold_norms, folded_copy
from fastcr.method import build
from fastcr.runs.context import Context
from tests.shared import new_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 33  # odd: padding differs at the two ends


class Odd(nn.Module):
    """Convolutions of all kinds, and BatchNorms with which something else is the matter."""

    def __init__(self) -> None:
        super().__init__()
        self.reflected = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.plain_norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.last_norm = nn.BatchNorm2d(12, eps=0.1)
        self.twice, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1, bias=False)
        self.added, self.kept, self.first, self.second = (nn.Conv2d(12, 12, 1) for _ in range(4))
        self.unpaired = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(6))
        self.batch_alone = nn.BatchNorm2d(12, track_running_stats=False)
        self.never = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))
        self.alias = self.reflected

    def forward(self, images: Tensor) -> Tensor:
        x = self.plain_norms[0](self.alias(images)).relu()
        x = self.plain_norms[1](self.same(x)).relu_()
        x = self.plain_norms[2](self.depthwise(x)).relu()
        x = self.last_norm(self.grouped(x))
        x = self.unpaired[0](x)  # no convolution before it
        x = self.unpaired[1](self.twice(x)) + self.unpaired[2](self.twice(x))  # one weight for two norms
        x = self.unpaired[3](self.added(x) + x)  # of a sum
        made = self.kept(x)
        x = self.unpaired[4](made) + made  # the convolution's output is needed without the norm
        x = self.unpaired[5](self.first(x)) * self.unpaired[5](self.second(x))  # one norm for two convolutions
        return self.batch_alone(self.last(x))


def randomised(module: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            nn.init.uniform_(each.weight, 0.5, 1.5, generator)
            nn.init.normal_(each.bias, 0, 0.3, generator)
            if each.running_mean is not None and each.running_var is not None:
                nn.init.normal_(each.running_mean, 0, 0.3, generator)
                nn.init.uniform_(each.running_var, 0.5, 2, generator)
    return module.eval()


def lite() -> nn.Module:
    pytest.importorskip("timm")
    return build_backbone("timm:tf_efficientnet_lite0")[0]


BACKBONES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "odd": (Odd, 4),
    "resnet18": (lambda: build_backbone("resnet18", "layer2")[0], 10),
    "lite": (lite, 49),
}


def folded(backbone: nn.Module) -> Any:
    """A copy whose norms are folded in each pass."""
    copied = copy.deepcopy(backbone)
    fold_norms(copied, SIDE)
    return copied


def folds(module: nn.Module) -> int:
    """How many convolutions of a network do the work of a norm."""
    kinds = [type(each) for each in module.modules()]
    assert kinds.count(FoldedConv2d) == kinds.count(FoldedNorm)
    return kinds.count(FoldedConv2d)


def gradients(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Features, and the gradients by images and parameters of a sum that weights them at random."""
    images = images.clone().requires_grad_()
    features = backbone(images)
    back = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features)
    named = {"images": images, **{name: each for name, each in backbone.named_parameters() if each.requires_grad}}
    found = torch.autograd.grad(features, list(named.values()), back, allow_unused=True)
    return {"features": features.detach(), **{n: g for n, g in zip(named, found, strict=True) if g is not None}}


@pytest.mark.parametrize("name", BACKBONES)
def test_features_and_all_gradients_are_those_of_the_network_as_it_was(name: str) -> None:
    """In fp64: in fp32 rounding alone takes some positions over a ReLU's kink."""
    make, pairs = BACKBONES[name]
    torch.manual_seed(0)
    backbone = randomised(make()).double()
    other = folded(backbone)
    assert folds(other) == pairs
    assert list(other.state_dict()) == list(backbone.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE).double()
    expected, got = gradients(backbone, images), gradients(other, images)
    assert expected.keys() == got.keys()
    for each, true in expected.items():
        assert (got[each] - true).norm() < 1e-10 * true.norm() + 1e-13, each
    assert not torch.equal(got["features"], expected["features"])  # it was another way there
    once = folded_copy(backbone, SIDE)
    assert torch.equal(once(images), got["features"])
    assert torch.equal(folded_copy(other, SIDE)(images), got["features"])
    assert not once(images).requires_grad


class PreActivated(nn.Module):
    """Each norm takes a sum, which is gone when the convolution after it gives a tensor that may get its identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(40))
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(40))

    def forward(self, x: Tensor) -> Tensor:
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = convolution(norm(x).relu()) + x
        return x


def test_a_norm_before_its_convolution_is_never_folded() -> None:
    backbone = PreActivated()
    assert [find_pairs(backbone, SIDE) for _ in range(5)] == [[]] * 5


def test_only_the_norms_that_are_certain_are_folded() -> None:
    backbone = Odd()
    modes = {each: each.training for each in backbone.modules()}
    names = {module: name for name, module in backbone.named_modules()}
    assert [(names[convolution], names[norm]) for convolution, norm in find_pairs(backbone, SIDE)] == [
        ("reflected", "plain_norms.0"),
        ("same", "plain_norms.1"),
        ("depthwise", "plain_norms.2"),
        ("grouped", "last_norm"),
    ]
    assert {each: each.training for each in backbone.modules()} == modes
    assert backbone.plain_norms[0].num_batches_tracked == 0


def test_folded_statistics_stay_in_training_mode_too() -> None:
    other, images = folded(randomised(Odd())), torch.randn(2, 3, SIDE, SIDE)
    before = other.last_norm.running_mean.clone()
    other.train()(images)
    assert torch.equal(other.last_norm.running_mean, before)
    assert not other.unpaired[0].running_mean.equal(randomised(Odd()).unpaired[0].running_mean)  # type: ignore[index,union-attr]


def test_a_deep_copy_folds_its_own_norms() -> None:
    first = folded(randomised(Odd()))
    other, images = copy.deepcopy(first), torch.randn(2, 3, SIDE, SIDE)
    before = first(images)
    with torch.no_grad():
        other.last_norm.weight.mul_(2)
    assert torch.equal(first(images), before)
    assert not torch.equal(other(images), before)


def test_under_autocast_the_fold_is_fp32_and_as_exact_as_the_norm() -> None:
    backbone = randomised(build_backbone("resnet18", "layer2")[0])
    other, images = folded(backbone), torch.randn(4, 3, 64, 64)
    exact = copy.deepcopy(backbone).double()(images.double())
    (first, norm), *_ = find_pairs(backbone, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight, _ = fold(first, norm)
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(weight, first.weight * scale[:, None, None, None])
    errors = []
    for each in (backbone, other):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = each(images)
        assert features.dtype == torch.bfloat16
        errors.append(((features - exact).norm() / exact.norm()).item())
    assert 1e-4 < errors[1] < 1.5 * errors[0] < 0.03


def test_a_folded_network_compiles_as_one_graph() -> None:
    other, images = folded(randomised(Odd())), torch.randn(2, 3, SIDE, SIDE)
    other.compile(backend="eager", fullgraph=True)
    got = gradients(other, images)
    with torch.compiler.set_stance("force_eager"):
        expected = gradients(other, images)
    torch.compiler.reset()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def config_of(backbone: str = "resnet18", **model: Any) -> Config:
    last_stage: Any = "layer4" if backbone.startswith("timm") else "layer3"
    settings = {"batchnorm": "frozen", "weights": "none", "last_stage": last_stage} | model
    return Config(
        data=DataConfig(image_size=64),
        model=ModelConfig(backbone, **settings),
        optim=OptimConfig(batch_size=4, lr=1e-3),
        moco=MocoConfig(queue_size=16),
    )


@pytest.mark.parametrize("was_folded", [False, True])
def test_an_evaluation_folds_once_and_leaves_the_encoder_as_it_was(was_folded: bool) -> None:
    encoder = new_encoder(config_of())
    randomised(encoder.backbone)
    images = torch.randn(2, 3, 64, 64)
    expected = encoder(images)
    if was_folded:
        fold_norms(encoder.backbone, 64)
    backbone, state = encoder.train().backbone, copy.deepcopy(encoder.state_dict())
    with torch.inference_mode(), encoder.evaluating():
        assert folds(encoder) == 15
        with encoder.evaluating():  # as the start with DDT does
            torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
    assert encoder.backbone is backbone
    assert folds(backbone) == (15 if was_folded else 0)
    torch.testing.assert_close(encoder.state_dict(), state, rtol=0, atol=0)
    assert encoder.training
    with torch.no_grad():  # weights that change afterwards count
        encoder.backbone.layer3[0].bn1.weight.mul_(2)  # type: ignore[index,operator,union-attr]
    with torch.no_grad(), encoder.evaluating():
        changed = encoder(images)
    assert not torch.allclose(changed.embedding, expected.embedding, rtol=1e-3)
    gradient = torch.autograd.grad(encoder.eval()(images).embedding[0, 0], encoder.backbone.conv1.weight)
    assert gradient[0].any()


def test_a_compiled_backbone_is_evaluated_as_it_is() -> None:
    encoder = new_encoder(config_of())
    encoder.backbone.compile(backend="eager")
    with encoder.evaluating():
        assert not folds(encoder)


@pytest.mark.parametrize(("backbone", "frozen_stages"), [("resnet18", 0), ("timm:tf_efficientnet_lite0", "half")])
def test_a_step_has_the_losses_and_gradients_of_one_with_norms(
    backbone: str, frozen_stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    config, found = config_of(backbone, frozen_stages=frozen_stages), []
    for is_folded in (True, False):
        if not is_folded:
            monkeypatch.setattr(build, "fold_norms", lambda *args: None)
        training = build.build(config, Context())
        randomised(training.moco.backbone)
        training.moco.key_backbone.load_state_dict(training.moco.backbone.state_dict())
        assert bool(folds(training.moco.backbone)) == bool(folds(training.moco.key_backbone)) == is_folded
        views = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        loss, losses = training.step(Batch(*views))
        encoder = training.moco.backbone
        by = {name: each.grad for name, each in encoder.named_parameters() if each.grad is not None}
        found.append((loss, losses, by))
    (loss, losses, ours), (same, expected, theirs) = found
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.key, expected.key, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).norm() < 0.02 * theirs[name].norm() + 1e-7 for name in ours)  # kinks


def test_what_is_not_trained_is_folded_once_and_the_losses_stay() -> None:
    losses, counted = list[list[float]](), list[int]()
    for once in (False, True):
        training = build.build(config_of(frozen_stages="half"), Context())
        randomised(training.moco.backbone)
        training.moco.key_backbone.load_state_dict(training.moco.backbone.state_dict())
        if once:
            training.moco.keep_frozen(torch.float32)
        views = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with mock.patch.object(folding, "fold", wraps=folding.fold) as called:
            losses.append([training.step(Batch(*views))[0].item() for _ in range(3)])
        counted.append(called.call_count)
    assert losses[0] == losses[1]
    assert counted == [2 * 3 * 15, 2 * 3 * 10]  # the stem and the first of three stages hold five convolutions


def test_other_statistics_are_not_folded() -> None:
    assert not folds(build.build(config_of(batchnorm="local", frozen_stages=1), Context()).moco)
