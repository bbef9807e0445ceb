"""BatchNorm folded into convolutions: the same maths, and only where it is certain to be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastcr.data.views import Batch
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.encoder import new_encoder
from fastcr.encoders.folding import find_pairs, fold, fold_norms, unfold_norms
from fastcr.method.build import Training, build
from fastcr.method.depthwise import FastGradients

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
        self.plain_norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)])
        self.last_norm = nn.BatchNorm2d(12, eps=0.1)
        self.twice, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1, bias=False)
        self.added, self.kept, self.first, self.second = (nn.Conv2d(12, 12, 1) for _ in range(4))
        self.unpaired = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(6))
        self.batch_alone = nn.BatchNorm2d(12, track_running_stats=False)
        self.never = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))

    def forward(self, images: Tensor) -> Tensor:
        x = self.plain_norms[0](self.reflected(images)).relu()
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
            if each.affine:
                nn.init.uniform_(each.weight, 0.5, 1.5, generator)
                nn.init.normal_(each.bias, 0, 0.3, generator)
            if each.running_mean is not None and each.running_var is not None:
                nn.init.normal_(each.running_mean, 0, 0.3, generator)
                nn.init.uniform_(each.running_var, 0.5, 2, generator)
    return module.eval()


def timm_model(name: str) -> nn.Module:
    pytest.importorskip("timm")
    return build_backbone(f"timm:{name}")[0]


BACKBONES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "odd": (Odd, 4),
    "resnet18": (lambda: build_backbone("resnet18", "layer2")[0], 10),
    "resnet50": (lambda: build_backbone("resnet50", "layer2")[0], 24),
    "lite": (lambda: timm_model("tf_efficientnet_lite0"), 49),
    "resnet18d": (lambda: timm_model("resnet18d"), 22),
}


def folded_copy(backbone: nn.Module) -> nn.Module:
    folded = copy.deepcopy(backbone)
    fold_norms(folded, SIDE)
    return folded


def are_folded(backbone: nn.Module) -> list[str]:
    """Names of the modules whose forward pass is another."""
    return [name for name, each in backbone.named_modules() if "forward" in vars(each)]


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
    folded = folded_copy(backbone)
    assert len(are_folded(folded)) == 2 * pairs
    assert list(folded.state_dict()) == list(backbone.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE).double()
    expected, got = gradients(backbone, images), gradients(folded, images)
    assert expected.keys() == got.keys()
    for each, true in expected.items():
        assert (got[each] - true).norm() < 1e-10 * true.norm() + 1e-13, each
    assert not torch.equal(got["features"], expected["features"])  # it was another way there


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
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in backbone.modules())
    assert backbone.plain_norms[0].num_batches_tracked == 0


def test_a_feature_map_that_is_returned_stays_as_it_is() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            made = self.convolution(images)
            return made, self.norm(made)

    assert not find_pairs(Returned(), SIDE)


def test_a_norm_in_training_mode_is_done_as_ever() -> None:
    backbone = randomised(Odd())
    folded = folded_copy(backbone)
    images = torch.randn(2, 3, SIDE, SIDE)
    for each in (backbone, folded):
        each.train()
    assert torch.equal(folded(images), backbone(images))
    torch.testing.assert_close(folded.state_dict(), backbone.state_dict(), rtol=0, atol=0)
    assert folded.plain_norms[0].num_batches_tracked == 1  # type: ignore[index,union-attr]


def test_it_can_be_undone() -> None:
    backbone = randomised(Odd())
    folded = folded_copy(backbone)
    unfold_norms(folded)
    assert not are_folded(folded)
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(folded(images), backbone(images))


def test_a_deep_copy_folds_its_own_norms() -> None:
    folded = folded_copy(randomised(Odd()))
    copied = copy.deepcopy(folded)
    images = torch.randn(2, 3, SIDE, SIDE)
    before = folded(images)
    with torch.no_grad():
        copied.last_norm.weight.mul_(2)  # type: ignore[operator,union-attr]
        copied.reflected.weight.mul_(2)  # type: ignore[operator,union-attr]
    assert torch.equal(folded(images), before)
    assert not torch.equal(copied(images), before)
    copied.last_norm.train()  # type: ignore[operator,union-attr]
    assert torch.equal(folded(images), before)


def test_slow_depthwise_convolutions_keep_their_fast_gradients() -> None:
    folded = folded_copy(randomised(nn.Sequential(nn.Conv2d(3, 3, 5, groups=3, bias=False), nn.BatchNorm2d(3))))
    with FastGradients():
        output = folded(torch.randn(2, 3, SIDE, SIDE))
    assert type(output.grad_fn).__name__ == "DepthwiseBackward"


def test_without_trained_parameters_nothing_is_recorded() -> None:
    folded = folded_copy(randomised(Odd())).requires_grad_(False)
    assert folded(torch.randn(2, 3, SIDE, SIDE)).grad_fn is None


def test_under_autocast_the_fold_is_fp32_and_as_exact_as_the_norm() -> None:
    backbone = randomised(build_backbone("resnet18", "layer2")[0])
    folded, images = folded_copy(backbone), torch.randn(4, 3, 64, 64)
    exact = copy.deepcopy(backbone).double()(images.double())
    (first, norm), *_ = find_pairs(backbone, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight, _ = fold(first, norm)
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(weight, first.weight * scale[:, None, None, None])
    errors = []
    for each in (backbone, folded):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = each(images)
        assert features.dtype == torch.bfloat16
        errors.append(((features - exact).norm() / exact.norm()).item())
    assert 1e-4 < errors[1] < 1.5 * errors[0] < 0.03


@pytest.mark.parametrize("was_folded", [False, True])
def test_an_evaluation_folds_once_and_leaves_the_encoder_as_it_was(was_folded: bool) -> None:
    encoder = new_encoder(config_of())
    randomised(encoder.backbone)
    images = torch.randn(2, 3, 64, 64)
    expected = encoder(images)
    if was_folded:
        fold_norms(encoder.backbone, 64)
    encoder.train()
    before, state = are_folded(encoder), copy.deepcopy(encoder.state_dict())
    with torch.inference_mode(), encoder.evaluating():
        assert len(are_folded(encoder)) == 2 * 15
        with encoder.evaluating():  # as the start with DDT does
            torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
        with count_calls("rsqrt") as calls:
            torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
        assert not calls
    assert are_folded(encoder) == before
    torch.testing.assert_close(encoder.state_dict(), state, rtol=0, atol=0)
    assert encoder.training
    with torch.no_grad():  # weights that change afterwards count
        encoder.backbone.layer3[0].bn1.weight.mul_(2)  # type: ignore[index,operator,union-attr]
    with torch.no_grad(), encoder.evaluating():
        changed = encoder(images)
    assert not torch.allclose(changed.embedding, expected.embedding, rtol=1e-3)
    gradient = torch.autograd.grad(encoder.eval()(images).embedding[0, 0], encoder.backbone.conv1.weight)
    assert gradient[0].any()


@contextmanager
def count_calls(name: str) -> Iterator[list[str]]:
    """The calls of an operation of torch's inside it."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.extend([name] if func.overloadpacket.__name__ == name else [])
            return func(*args, **(kwargs or {}))

    found: list[str] = []
    with Calls():
        yield found


def test_a_compiled_backbone_is_evaluated_as_it_is() -> None:
    encoder = new_encoder(config_of())
    encoder.backbone.compile(backend="eager")
    with encoder.evaluating():
        assert not are_folded(encoder)


def saved_bytes(backbone: nn.Module, images: Tensor) -> int:
    """What a pass keeps for the backward pass, but for the parameters themselves."""
    own, kept = {each.untyped_storage().data_ptr() for each in backbone.parameters()}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = backbone(images)
    total = sum(kept.values())
    del features
    return total


@pytest.mark.parametrize("bf16", [False, True])
def test_less_is_kept_for_the_backward_pass(bf16: bool) -> None:
    backbone, images = randomised(build_backbone("resnet18", "layer2")[0]), torch.randn(8, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        assert saved_bytes(folded_copy(backbone), images) < 0.8 * saved_bytes(backbone, images)


def test_folded_networks_compile_as_one_graph() -> None:
    for backbone in (Odd(), build_backbone("resnet18", "layer1")[0], timm_model("tf_efficientnet_lite0")):
        folded, images = folded_copy(randomised(backbone)), torch.randn(2, 3, SIDE, SIDE)
        folded.compile(backend="aot_eager" if isinstance(backbone, Odd) else "eager", fullgraph=True)
        got = gradients(folded, images)
        with torch.compiler.set_stance("force_eager"):
            expected = gradients(folded, images)
        for true, each in zip(expected.values(), got.values(), strict=True):
            torch.testing.assert_close(each, true, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()


def test_an_exported_graph_has_its_norms() -> None:
    folded = folded_copy(randomised(Odd()))
    graph = torch.export.export(folded, (torch.randn(2, 3, SIDE, SIDE),)).graph
    norms = [node for node in graph.nodes if "batch_norm" in str(node.target)]
    assert len(norms) == 4 + 8


def config_of(backbone: str = "resnet18", **model: Any) -> Config:
    last_stage: Any = "layer4" if backbone.startswith("timm") else "layer3"
    settings = {"batchnorm": "frozen", "weights": "none", "last_stage": last_stage} | model
    return Config(
        run=RunConfig(precision="fp32"),
        data=DataConfig(image_size=64),
        model=ModelConfig(backbone, **settings),
        optim=OptimConfig(batch_size=4, lr=1e-3),
        moco=MocoConfig(queue_size=16),
    )


def training_of(config: Config, *, folded: bool = True) -> Training:
    """What a run trains, its BatchNorms set at random."""
    training = build(config, torch.device("cpu"), Console(quiet=True))
    for encoder in (training.moco.backbone, training.moco.key_backbone):
        randomised(encoder)
        if not folded:
            unfold_norms(encoder)
    return training


def batch_of(seed: int) -> Batch:
    views = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return Batch(*views, torch.arange(4))


@pytest.mark.parametrize("frozen_stages", [0, "half"])
@pytest.mark.parametrize("backbone", ["resnet18", "timm:tf_efficientnet_lite0"])
def test_a_step_has_the_losses_and_gradients_of_one_with_norms(backbone: str, frozen_stages: Any) -> None:
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    config, found = config_of(backbone, frozen_stages=frozen_stages), []
    for folded in (True, False):
        training = training_of(config, folded=folded)
        for encoder in (training.moco.backbone, training.moco.key_backbone):
            assert bool(are_folded(encoder)) == folded
        loss, losses = training.step(batch_of(0))
        encoder = training.moco.backbone
        by = {name: each.grad for name, each in encoder.named_parameters() if each.grad is not None}
        found.append((loss, losses, by))
    (loss, losses, ours), (same, expected, theirs) = found
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.key, expected.key, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).norm() < 0.02 * theirs[name].norm() + 1e-7 for name in ours)  # kinks


@pytest.mark.parametrize("batchnorm", ["local", "sync"])
def test_other_statistics_are_not_folded(batchnorm: Any) -> None:
    config = config_of(batchnorm=batchnorm, frozen_stages=1)
    moco = build(config, torch.device("cpu"), Console(quiet=True)).moco
    assert not are_folded(moco)


def test_a_checkpoint_from_before_goes_on_as_it_would_have() -> None:
    before = training_of(config_of(), folded=False)
    before.step(batch_of(0))
    state = copy.deepcopy(before.state())
    config = config_of()
    resumed = build(replace(config, run=replace(config.run, seed=5)), torch.device("cpu"), Console(quiet=True))
    assert are_folded(resumed.moco)
    assert resumed.state()["model"].keys() == state["model"].keys()
    resumed.load_state(state)
    for seed in (1, 2):
        expected, _ = before.step(batch_of(seed))
        got, _ = resumed.step(batch_of(seed))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
