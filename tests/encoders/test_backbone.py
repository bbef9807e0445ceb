"""The encoder against torchvision's and timm's own."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from fastcr import train
from fastcr.data.views import MEAN, STD
from fastcr.encoders.backbone import PACKAGED, backbone_mistake, build_backbone, freeze_stages, synchronise_norms
from fastcr.encoders.encoder import Encoder, load
from fastcr.errors import UsageError
from fastcr.method.build import check_settings
from fastcr.runs.command_line import read_command_line
from fastcr.runs.context import Context
from tests.shared import TINY

VIT, CNN = "timm:vit_tiny_patch16_224", "timm:convnext_atto"
SIDE = 64


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name).eval().requires_grad_(False)
    images = torch.randn(2, 3, 64, 96)
    expected = create_feature_extractor(whole, ["layer3", "layer4"])(images)
    for last_stage, stride in (("layer3", 16), ("layer4", 32)):
        with torch.device("meta"):
            backbone, channels = build_backbone(name, last_stage)
        weights = {key: value for key, value in whole.state_dict().items() if key in backbone.state_dict()}
        backbone.eval().load_state_dict(weights, assign=True)
        features = backbone(images)
        assert features.shape == (2, channels, 64 // stride, 96 // stride)
        assert torch.equal(features, expected[last_stage])


def by_timm(name: str) -> tuple[nn.Module, int]:
    pytest.importorskip("timm")
    return build_backbone(name)


# a class token; four register tokens and a norm after pooling; channels first; channels last
@pytest.mark.parametrize("name", [VIT, "timm:vit_pwee_patch16_reg1_gap_256", CNN, "timm:swin_tiny_patch4_window7_224"])
def test_features_are_timms(name: str) -> None:
    torch.manual_seed(0)
    encoder, channels = by_timm(name)
    model = encoder.timm
    for parameter in model.parameters():  # fresh models add nothing to position and bias
        nn.init.normal_(parameter, 0, 0.1)
    pixels = torch.rand(1, 3, *((224, 224) if "swin" in name else (SIDE, 2 * SIDE)))
    own, imagenet = (torch.tensor(pair).view(2, 3, 1, 1) for pair in
                     ((model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), (MEAN, STD)))  # fmt: skip
    with torch.no_grad():
        features = encoder.eval()((pixels - imagenet[0]) / imagenet[1])
        (expected,) = model.forward_intermediates(
            (pixels - own[0]) / own[1], indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        if "gap" in name:
            expected = model.fc_norm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert features.shape[:2] == (1, channels)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-3)


def test_a_copy_of_a_timm_encoder_stands_alone() -> None:
    """The key encoder is one: same features, moved by its own weights only, in bf16 and channels-last too."""
    encoder, channels = by_timm(VIT)
    copied = copy.deepcopy(encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(2, 3, SIDE, SIDE)
    before = encoder(images)
    torch.testing.assert_close(copied(images), before, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = copied(images.bfloat16())
    assert features.shape[1] == channels
    features.float().square().sum().backward()
    without = [key for key, parameter in copied.named_parameters() if parameter.grad is None]
    assert not without  # nothing of the classifier is left over
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(encoder(images), before)


def check(*flags: str) -> None:
    """What training does with these settings before it loads anything."""
    check_settings(read_command_line(["cub200", *flags])[0], Context(console=Console(quiet=True)))


@pytest.mark.parametrize(
    ("name", "last_stage", "culprits"),
    [
        ("resnet19", "layer4", ("'resnet19'", "did you mean 'resnet18'", "timm:NAME")),
        ("timm:convnext_atoo", "layer4", ("'timm:convnext_atoo'", CNN)),
        ("timm:convnext_atto.nobody", "layer4", ("'timm:convnext_atto.nobody'", CNN)),
        (CNN, "layer3", ("--model.last_stage layer3", CNN)),
    ],
)
def test_mistaken_names_are_answered_on_one_line(name: str, last_stage: str, culprits: tuple[str, ...]) -> None:
    pytest.importorskip("timm")
    mistake = backbone_mistake(name, last_stage)
    assert mistake
    assert "\n" not in mistake
    assert all(culprit in mistake for culprit in culprits), mistake
    with pytest.raises(ValueError, match=re.escape(mistake)):
        build_backbone(name, last_stage)
    with pytest.raises(UsageError, match=re.escape(mistake)):
        check("--model.backbone", name, "--model.last_stage", last_stage)


@pytest.mark.parametrize(
    ("name", "side", "reason"),
    [
        (VIT, 100, r"divisible by patch size \(16\)"),
        ("timm:pit_ti_224", 224, "are no map"),  # gives its class token only
    ],
)
def test_images_a_timm_model_cannot_take_are_refused(name: str, side: int, reason: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        UsageError, match=rf"^{name} cannot take --data\.image_size {side} \(its own is 224\): .*{reason}"
    ):
        build_backbone(name, image_size=side)


def test_a_timm_model_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=re.escape('timm:convnext_atto needs timm: pip install "fastcr[timm]"')):
        check("--model.backbone", CNN)
    with pytest.raises(UsageError, match=re.escape(f'{PACKAGED} needs timm: pip install "fastcr[demo]"')):
        check("--model.backbone", PACKAGED)
    assert backbone_mistake("resnet18") is None


def test_a_timm_encoder_is_trained_saved_and_read_again(flat: Path, tmp_path: Path, one_thread: None) -> None:
    """From a folder of the Hub, whose config.json says what the images are like."""
    timm = pytest.importorskip("timm")
    run, name, hub = tmp_path / "run", "timm:test_vit", tmp_path / "hub"
    model, own = (
        timm.create_model("test_vit", dynamic_img_size=True).eval(),
        {"mean": [0.2] * 3, "std": [0.1, 0.2, 0.3]},
    )
    hub.mkdir()
    save_file(model.state_dict(), hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": own}))
    train.main(
        [*TINY, "--data.root", str(flat), "--run.dir", str(run), "--data.image_size", str(SIDE), "--run.precision",
         "bf16", "--run.steps", "2", "--model.backbone", name, "--model.last_stage", "layer4", "--model.weights",
         str(hub)]
    )  # fmt: skip
    images = torch.randn(1, 3, SIDE, SIDE)
    first, last = (load(run / file) for file in ("init.safetensors", "weights.safetensors"))
    assert (last.facts["backbone"], last.image_size) == (name, SIDE)
    mean, std, own_mean, own_std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD, *own.values()))
    tokens = model.forward_features((images * std + mean - own_mean) / own_std)[:, 1:]
    torch.testing.assert_close(first.features(images).flatten(2), tokens.mT, atol=1e-4, rtol=1e-4)
    train.main(["--resume", str(run), "--run.steps", "3"])
    assert load(run).facts["own_std"] == own["std"]
    pairs = zip(first.backbone.named_parameters(), last.backbone.parameters(), strict=True)
    still = [key for (key, a), b in pairs if torch.equal(a, b)]
    assert not [key for key in still if key.endswith("weight")]
    assert last.branch is not None
    features = last.backbone(images)
    assert last.branch.pool(features).attention.shape == (1, features.shape[2] * features.shape[3])


def kept(name: str, count: Any, last_stage: str = "layer4") -> tuple[set[str], set[str]]:
    """First parts of the names of the parameters that are kept and trained, BatchNorms in eval mode among the first."""
    backbone, _ = build_backbone(name, last_stage)
    freeze_stages(backbone, count)
    found: tuple[set[str], set[str]] = set(), set()
    for key, parameter in backbone.named_parameters():
        found[parameter.requires_grad].add(
            ".".join(key.removeprefix("timm.").split(".")[: 1 + key.startswith("timm.blocks")])
        )
    for key, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.training == module.weight.requires_grad, key
    return found


def test_stages_of_a_resnet_are_kept_from_its_stem_on() -> None:
    assert kept("resnet18", 0) == (set(), {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})
    assert kept("resnet18", 1) == ({"conv1", "bn1", "layer1"}, {"layer2", "layer3", "layer4"})
    assert kept("resnet18", "half") == kept("resnet18", 2)
    assert kept("resnet18", "half", "layer3") == kept("resnet18", 1, "layer3")
    assert kept("resnet18", 2, "layer3") == ({"conv1", "bn1", "layer1", "layer2"}, {"layer3"})
    with pytest.raises(UsageError, match=r"frozen_stages 3.* at most 2"):
        kept("resnet18", 3, "layer3")


@pytest.mark.parametrize(
    ("name", "stem", "last"),
    [
        ("timm:tf_efficientnet_lite0", {"conv_stem", "bn1"}, {"blocks.6", "conv_head", "bn2"}),
        ("timm:vit_tiny_patch16_224", {"cls_token", "pos_embed", "patch_embed"}, {"blocks.11", "norm"}),
    ],
)
def test_stages_of_a_timm_model_are_kept_from_its_stem_on(name: str, stem: set[str], last: set[str]) -> None:
    pytest.importorskip("timm")
    assert kept(name, "half") == kept(name, 3 if "lite0" in name else 6)
    fixed, moving = kept(name, 3)
    assert fixed == stem | {"blocks.0", "blocks.1", "blocks.2"}
    assert last | {"blocks.3"} <= moving


@pytest.mark.parametrize(("name", "there"), [("test_vit", True), ("vit_pwee_patch16_reg1_gap_256", False)])
def test_class_token_is_what_timm_pools(name: str, there: bool) -> None:
    timm = pytest.importorskip("timm")
    backbone, _ = build_backbone(f"timm:{name}")
    encoder = Encoder(backbone.eval(), None, {"image_size": 64})
    assert encoder.has_class_token == there
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, token = encoder.with_class_token(images)
        assert torch.equal(features, encoder.features(images))
        if not there:
            assert token is None
            return
        model = timm.create_model(name, num_classes=0, global_pool="token", dynamic_img_size=True).eval()
        model.load_state_dict(backbone.timm.state_dict())
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        torch.testing.assert_close(token, model((pixels - mean) / std))


@pytest.mark.parametrize("name", ["resnet18", "timm:tf_efficientnet_lite0"])
def test_norms_of_all_processes_keep_the_encoder_as_it_is(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = nn.Sequential(build_backbone(name, image_size=64)[0]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        synchronise_norms(model)
        torch.testing.assert_close(model(images), before)
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(each, nn.SyncBatchNorm) for each in norms)
