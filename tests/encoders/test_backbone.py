"""The encoder against torchvision's and timm's own, and every way its first weights come or fail to come."""

import argparse
import copy
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from fastcr import train
from fastcr.config import ModelConfig
from fastcr.data.views import MEAN, STD
from fastcr.encoders.backbone import PACKAGED, backbone_mistake, build_backbone, freeze_stages, synchronise_norms
from fastcr.encoders.encoder import Encoder, load
from fastcr.encoders.weights import FILE_OF, MODULE, PACKAGE, load_initial_weights
from fastcr.errors import UsageError
from fastcr.method.build import check_settings
from fastcr.runs.checkpoint import save_weights
from fastcr.runs.command_line import read_command_line

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
IMAGENET = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
IMAGENET_FILE = IMAGENET.url.rsplit("/", 1)[1]


def model(weights: Path | str, *, allow_missing: bool = False, last_stage: Any = "layer4") -> ModelConfig:
    return ModelConfig("resnet18", last_stage, weights=str(weights), allow_missing_weights=allow_missing)


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Tensor]:
    """State of a ResNet-18 in which no two tensors are alike, statistics included."""
    state = torchvision.models.resnet18().state_dict()
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=random) if value.is_floating_point() else value
        for name, value in state.items()
    }


def unfilled() -> nn.Sequential:
    """An encoder without memory, for what is refused before anything is loaded."""
    with torch.device("meta"):
        return build_backbone("resnet18")[0]


def assert_filled(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last_stage", ["layer3", "layer4"])
def test_names_are_those_of_torchvision_up_to_the_last_stage(name: str, last_stage: str) -> None:
    with torch.device("meta"):
        backbone, channels = build_backbone(name, last_stage)
        whole = torchvision.models.get_model(name).state_dict()
    later = ("fc.", "layer4.") if last_stage == "layer3" else ("fc.",)
    assert list(backbone.state_dict()) == [key for key in whole if not key.startswith(later)]
    full = 512 if name in ("resnet18", "resnet34") else 2048
    assert channels == (full if last_stage == "layer4" else full // 2)


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


def test_without_the_max_pool_the_map_is_twice_as_large() -> None:
    images = torch.randn(1, 3, 64, 64)
    pooled, unpooled = build_backbone("resnet18")[0], build_backbone("resnet18", stem_maxpool=False)[0]
    assert list(pooled.state_dict()) == list(unpooled.state_dict())
    assert pooled.eval()(images).shape == (1, 512, 2, 2)
    assert unpooled.eval()(images).shape == (1, 512, 4, 4)


def as_safetensors(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_half(path: Path, state: dict[str, Tensor]) -> Path:
    half = {name: value.half() if value.ndim == 4 else value for name, value in state.items()}
    return as_safetensors(path, half)


def as_wrapped(path: Path, state: dict[str, Tensor]) -> Path:
    """What a training script of its time leaves behind."""
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "arch": "resnet18", "state_dict": wrapped}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def as_plain(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_old_torch(path: Path, state: dict[str, Tensor]) -> Path:
    """Not a zip; and before BatchNorm counted its batches."""
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"model": state}, path.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pth")


def as_ours(path: Path, state: dict[str, Tensor]) -> Path:
    backbone, channels = build_backbone("resnet18")
    backbone.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    ours = nn.ModuleDict({"backbone": backbone, "branch": nn.Linear(channels, 32)})
    save_weights(path.with_suffix(".safetensors"), ours.state_dict(), {"detectors": 32})
    return path.with_suffix(".safetensors")


def others(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 9, "state_dict": tensors, "optimizer": {"state": {}}}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(value, 7) for name, value in state.items()}


def as_moco(path: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint of the MoCo v2 repository: two encoders with two-layer heads, and a queue."""
    head = {f"fc.{layer}.{kind}": torch.ones(3) for layer in (0, 2) for kind in ("weight", "bias")}
    query, key = headless(state) | head, wrong(headless(state) | head)
    queue = {"module.queue": torch.ones(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return others(path, queue | under("module.encoder_k.", key) | under("module.encoder_q.", query))


def as_moco3(path: Path, state: dict[str, Tensor]) -> Path:
    momentum = under("module.momentum_encoder.", wrong(state))
    return others(path, momentum | under("module.base_encoder.", headless(state)))


def as_solo_learn(path: Path, state: dict[str, Tensor]) -> Path:
    momentum = under("momentum_backbone.", wrong(headless(state))) | {"classifier.weight": torch.ones(2)}
    return others(path, momentum | under("backbone.", headless(state)))


def as_lightly(path: Path, state: dict[str, Tensor]) -> Path:
    """Encoders that are the `nn.Sequential` of a ResNet's children."""
    places = {name: str(i) for i, (name, _) in enumerate(torchvision.models.resnet18().named_children())}
    numbered = {name.replace(first := name.split(".")[0], places[first], 1): value for name, value in state.items()}
    numbered = {name: value for name, value in numbered.items() if not name.startswith(places["fc"])}
    momentum = under("backbone_momentum.", wrong(numbered)) | {"projection_head.layers.0.weight": torch.ones(2)}
    return others(path, momentum | under("backbone.", numbered))


@pytest.mark.parametrize(
    "write",
    [
        as_safetensors,
        as_half,
        as_wrapped,
        as_plain,
        as_old_torch,
        as_ours,
        as_moco,
        as_moco3,
        as_solo_learn,
        as_lightly,
    ],
)
@pytest.mark.parametrize("last_stage", ["layer3", "layer4"])
def test_every_kind_of_weights_file_fills_the_encoder(
    tmp_path: Path,
    resnet18: dict[str, Tensor],
    write: Callable[[Path, dict[str, Tensor]], Path],
    last_stage: str,
) -> None:
    file = write(tmp_path / "weights", resnet18)
    backbone, _ = build_backbone("resnet18", last_stage)
    assert load_initial_weights(backbone, model(file, last_stage=last_stage)) == []
    if write is as_half:
        resnet18 = {name: value.half().float() if value.ndim == 4 else value for name, value in resnet18.items()}
    assert_filled(backbone, resnet18)


def test_no_weights_leave_the_encoder_as_it_is() -> None:
    backbone, _ = build_backbone("resnet18", "layer3")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert load_initial_weights(backbone, model("none")) == []
    assert_filled(backbone, before)


def test_missing_weights_are_listed_and_allowed_only_when_asked(tmp_path: Path, resnet18: dict[str, Tensor]) -> None:
    trunk = {name: value for name, value in resnet18.items() if not name.startswith(("layer4.", "fc."))}
    file = as_safetensors(tmp_path / "trunk", trunk)
    backbone, _ = build_backbone("resnet18")
    lacking = {name for name in backbone.state_dict() if name not in trunk and "tracked" not in name}
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UsageError) as refused:
        load_initial_weights(backbone, model(file))
    for part in (str(file), str(len(lacking)), *sorted(lacking)[:3], "--model.allow_missing_weights True"):
        assert part in str(refused.value)
    assert_filled(backbone, before)  # nothing is loaded by halves

    assert set(load_initial_weights(backbone, model(file, allow_missing=True))) == lacking
    assert_filled(backbone, trunk | {name: before[name] for name in before if name.startswith("layer4.")})


def as_dino(path: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint of the DINO repository: two encoders with heads, and the settings as a namespace."""
    head = {"head.mlp.0.weight": torch.ones(3)}
    student = under("module.", under("backbone.", wrong(headless(state))) | head)
    content = {"student": student, "teacher": under("backbone.", headless(state)) | head, "epoch": 3}
    torch.save(content | {"args": argparse.Namespace(arch="resnet18"), "optimizer": {"state": {}}}, path)
    return path


def as_swav(path: Path, state: dict[str, Tensor]) -> Path:
    heads = {"projection_head.0.weight": torch.ones(3), "prototypes.weight": torch.ones(2)}
    torch.save(under("module.", headless(state) | heads), path)
    return path


def as_simsiam(path: Path, state: dict[str, Tensor]) -> Path:
    heads = {"module.encoder.fc.0.weight": torch.ones(3), "module.predictor.0.weight": torch.ones(2)}
    return others(path, under("module.encoder.", headless(state)) | heads)


def as_barlow_twins(path: Path, state: dict[str, Tensor]) -> Path:
    """The checkpoint of a training run; VICReg's is the same but for the names of the heads."""
    heads = {"module.projector.0.weight": torch.ones(3), "module.bn.running_mean": torch.ones(2)}
    torch.save({"epoch": 1, "model": under("module.backbone.", headless(state)) | heads, "optimizer": {}}, path)
    return path


def as_lightning(path: Path, state: dict[str, Tensor]) -> Path:
    heads = {"model.head.weight": torch.ones(3), "loss.center": torch.ones(2)}
    content = {"state_dict": under("model.backbone.", headless(state)) | heads, "hyper_parameters": {"lr": 0.1}}
    torch.save(content | {"pytorch-lightning_version": "2.5.0", "callbacks": {}}, path)
    return path


def as_teacher_under_names(path: Path, state: dict[str, Tensor]) -> Path:
    both = under("student.backbone.", wrong(state)) | under("teacher.backbone.", state)
    torch.save({name: value.half() if value.ndim == 4 else value for name, value in both.items()}, path)
    return path


def as_timm(path: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint of timm's training script: the weights, and their moving average, which timm itself takes."""
    torch.save({"epoch": 3, "state_dict": wrong(state), "optimizer": {}, "state_dict_ema": state}, path)
    return path


def as_vissl(path: Path, state: dict[str, Tensor]) -> Path:
    trunk, heads = under("_feature_blocks.", headless(state)), {"0.clf.weight": torch.ones(3)}
    base = {"model": {"trunk": trunk, "heads": heads}, "meta": {"input_shape": [3]}}
    torch.save({"classy_state_dict": {"base_model": base}, "phase_idx": 3, "loss": [{"a": torch.ones(1)}]}, path)
    return path


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (as_timm, "of the encoders state_dict, state_dict_ema, state_dict_ema is taken"),
        (as_vissl, "not used: classy_state_dict (1)"),
        (as_dino, "of the encoders student.module.backbone, teacher.backbone, teacher.backbone is taken"),
        (as_dino, "not used: student (121), teacher (1)"),
        (as_swav, "not used: projection_head (1), prototypes (1)"),
        (as_simsiam, "not used: predictor (1)"),
        (as_barlow_twins, "not used: projector (1), bn (1)"),
        (as_lightning, "not used: model (1), loss (1)"),
        (as_teacher_under_names, "of the encoders student.backbone, teacher.backbone, teacher.backbone is taken"),
        *((wrapper, None) for wrapper in (
            "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.encoder.", "trunk.",
            "encoder._orig_mod.",
        )),
    ],
)  # fmt: skip
def test_the_encoder_is_found_and_what_is_not_used_is_named(
    tmp_path: Path,
    resnet18: dict[str, Tensor],
    write: Callable[[Path, dict[str, Tensor]], Path] | str,
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(write, str):
        torch.save(under(write, resnet18), file)
    else:
        write(file, resnet18)
    backbone, _ = build_backbone("resnet18")
    assert load_initial_weights(backbone, model(file)) == []
    assert_filled(
        backbone,
        {name: value.half().float() if value.ndim == 4 else value for name, value in resnet18.items()}
        if write is as_teacher_under_names
        else resnet18,
    )
    err = capsys.readouterr().err
    assert said in err if said else err == ""


@pytest.mark.parametrize("name", ["weights.safetensors", "model.safetensors"])
def test_a_folder_stands_for_the_weights_in_it(tmp_path: Path, resnet18: dict[str, Tensor], name: str) -> None:
    save_file(resnet18, tmp_path / name)
    backbone, _ = build_backbone("resnet18")
    assert load_initial_weights(backbone, model(tmp_path)) == []
    assert_filled(backbone, resnet18)


def foreign(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"layer1.2.conv1.weight": torch.zeros(3), "scale": torch.zeros(3)}


def narrower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}


def of_model(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in torchvision.models.get_model(name).state_dict().items()}
    return lambda _: {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (foreign, r"is not a resnet18: it has 2 foreign keys, layer1\.2\.conv1\.weight, scale"),
        (narrower, r"is not a resnet18: conv1\.weight is \[64, 3, 3, 3\], not \[64, 3, 7, 7\]"),
        (of_model("resnet50"), "is not a resnet18: "),
        (of_model("squeezenet1_1"), "has no weight of a resnet18"),
        (lambda _: {}, "has no weight of a resnet18"),
        # every weight of a ResNet-18 has its like in a ResNet-34, whose further blocks would be dropped
        (of_model("resnet34"), "is not a resnet18: "),
    ],
    ids=["foreign", "narrower", "resnet50", "squeezenet", "empty", "resnet34"],
)
def test_weights_of_something_else_are_refused(
    tmp_path: Path, resnet18: dict[str, Tensor], change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    file = as_safetensors(tmp_path / "other", change(resnet18))
    with pytest.raises(UsageError, match=f"^{re.escape(str(file))} {message}"):
        load_initial_weights(unfilled(), model(file, allow_missing=True))


class Sabotage:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, resnet18: dict[str, Tensor]) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"state_dict": {"bn1.bias": resnet18["bn1.bias"]}, "extra": Sabotage(trace)}, file)
    with pytest.raises(UsageError, match=r"weights\.pth is refused: it holds pickled code"):
        load_initial_weights(unfilled(), model(file))
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # it would have been


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["truncated", "half", "text", "empty", "absent", "a folder"])
def test_broken_files_are_named_on_one_line(
    tmp_path: Path, resnet18: dict[str, Tensor], suffix: str, damage: str
) -> None:
    write = as_safetensors if suffix == ".safetensors" else as_wrapped
    whole = write(tmp_path / "whole", {"conv1.weight": resnet18["conv1.weight"]}).read_bytes()
    file = tmp_path / f"broken{suffix}"
    if damage == "a folder":
        file.mkdir()
    elif damage != "absent":
        kept = {"truncated": whole[:-100], "half": whole[: len(whole) // 2], "text": b"see the README\n", "empty": b""}
        file.write_bytes(kept[damage])
    with pytest.raises(UsageError) as refused:
        load_initial_weights(unfilled(), model(file))
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], torch.zeros(2), {"conv1.weight": "not a tensor"}, {"lr": 0.1, "epoch": 3}, {0: torch.zeros(2)}],
    ids=["list", "tensor", "string", "numbers", "numbered"],
)
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=r"weights\.pt holds no dict of tensors"):
        load_initial_weights(unfilled(), model(tmp_path / "weights.pt"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download cache, and no network."""

    def unreachable(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    return tmp_path / "hub" / "checkpoints"


def test_imagenet_weights_without_network_name_file_folder_and_flag(hub: Path) -> None:
    with pytest.raises(UsageError) as refused:
        load_initial_weights(unfilled(), model("imagenet"))
    for part in ("no route to host", IMAGENET_FILE, str(hub), "--model.weights"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_imagenet_weights_are_the_file_put_into_that_folder(hub: Path, resnet18: dict[str, Tensor]) -> None:
    hub.mkdir(parents=True)
    torch.save(resnet18, hub / IMAGENET_FILE)
    backbone, _ = build_backbone("resnet18")
    assert load_initial_weights(backbone, model("imagenet")) == []
    assert_filled(backbone, resnet18)


def test_a_truncated_file_in_that_folder_is_named(hub: Path, resnet18: dict[str, Tensor]) -> None:
    hub.mkdir(parents=True)
    torch.save(resnet18, hub / IMAGENET_FILE)
    with open(hub / IMAGENET_FILE, "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(UsageError, match=re.escape(IMAGENET_FILE)) as refused:
        load_initial_weights(unfilled(), model("imagenet"))
    assert "no network" not in str(refused.value)


def test_a_download_that_is_not_the_file_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_bytes(*arguments: object, **options: object) -> None:
        raise RuntimeError('invalid hash value (expected "f37072fd", got "e3b0c442")')  # as torch.hub does

    monkeypatch.setattr(torch.hub, "download_url_to_file", other_bytes)
    with pytest.raises(UsageError, match=re.escape(IMAGENET_FILE)):
        load_initial_weights(unfilled(), model("imagenet"))


VIT, CNN = "timm:vit_tiny_patch16_224", "timm:convnext_atto"
SIDE = 64


def timm_model(name: str) -> Any:
    return pytest.importorskip("timm").create_model(name.removeprefix("timm:"))


def of_timm(name: str, weights: Path | str, *, allow_missing: bool = False) -> ModelConfig:
    return ModelConfig(name, weights=str(weights), allow_missing_weights=allow_missing)


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


@pytest.mark.parametrize("name", [VIT, CNN])
def test_a_copy_of_a_timm_encoder_stands_alone(name: str) -> None:
    """The key encoder is one: same features, moved by its own weights only, in bf16 and channels-last too."""
    encoder, channels = by_timm(name)
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


@pytest.mark.parametrize("name", [VIT, CNN])
@pytest.mark.parametrize("prefix", ["", "module.base_encoder.", "backbone."])
def test_weights_in_timms_names_fill_the_encoder(tmp_path: Path, name: str, prefix: str) -> None:
    whole = timm_model(name).state_dict()  # with its classifier
    file = others(tmp_path / "weights", under(prefix, whole))
    encoder, _ = build_backbone(name)
    assert load_initial_weights(encoder, of_timm(name, file)) == []
    assert_filled(encoder.timm, whole)


def test_timm_weights_files_are_checked_as_others_are(tmp_path: Path) -> None:
    whole = timm_model(VIT).state_dict()
    cases = {
        r"is not a timm:vit_tiny_patch16_224: it has 1 foreign keys, blocks\.77\.bias": whole
        | {"blocks.77.bias": torch.ones(1)},
        r"is not a timm:vit_tiny_patch16_224: norm\.bias is \[5\], not \[192\]": whole | {"norm.bias": torch.ones(5)},
        r"lacks 1 of the encoder's weights, pos_embed": {k: v for k, v in whole.items() if k != "pos_embed"},
        r"has no weight of a timm:vit_tiny_patch16_224": {"conv1.weight": torch.ones(2)},
    }
    for message, state in cases.items():
        file = as_safetensors(tmp_path / "other", state)
        with pytest.raises(UsageError, match=f"^{re.escape(str(file))} {message}"):
            load_initial_weights(build_backbone(VIT)[0], of_timm(VIT, file))


def test_timms_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timm_model(VIT).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(whole))
    encoder, _ = build_backbone(VIT)
    assert load_initial_weights(encoder, of_timm(VIT, "imagenet")) == []
    assert_filled(encoder.timm, whole)

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(
        UsageError, match=r"weights of vit_tiny_patch16_224 \(no route to host\): .*--model\.weights FILE"
    ):
        load_initial_weights(encoder, of_timm(VIT, "imagenet"))
    with pytest.raises(UsageError, match="timm has no weights for vit_tiny_patch32_224"):
        load_initial_weights(encoder, of_timm("timm:vit_tiny_patch32_224", "imagenet"))


def test_the_packages_weights_are_those_of_timms_model() -> None:
    """Against the same tensors under timm's names, which are half floats."""
    pytest.importorskip(MODULE)
    file = Path(os.environ.get("FASTCR_TEST_DATA", "")) / "weights" / "efficientnet_lite0.safetensors"
    if not file.is_file():
        pytest.skip("FASTCR_TEST_DATA names no folder with weights/efficientnet_lite0.safetensors")
    encoder, _ = by_timm(PACKAGED)
    assert load_initial_weights(encoder, of_timm(PACKAGED, PACKAGE)) == []
    expected = load_file(file)
    for name, value in encoder.timm.state_dict().items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name
    assert encoder.scale.flatten().tolist() == pytest.approx([std / 0.5 for std in STD])
    assert encoder.shift.flatten().tolist() == pytest.approx([(mean - 0.5) / 0.5 for mean in MEAN])
    assert expected.keys() - encoder.timm.state_dict().keys() == {"classifier.weight", "classifier.bias"}


def test_the_packages_weights_serve_their_model_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^--model\.weights {PACKAGE} are of --model\.backbone {PACKAGED}, not of r"):
        load_initial_weights(unfilled(), model(PACKAGE))
    encoder, _ = by_timm(PACKAGED)
    broken = ModuleType(MODULE)
    broken.__dict__[FILE_OF] = SimpleNamespace(get_model_file_path=lambda: tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, MODULE, broken)
    torch.save({"_conv_stem.weight": torch.ones(32, 3, 3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=rf"weights\.pth is not the {PACKAGE} that fastcr knows"):
        load_initial_weights(encoder, of_timm(PACKAGED, PACKAGE))
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(UsageError, match=re.escape('needs that package: pip install "fastcr[demo]"')):
        load_initial_weights(encoder, of_timm(PACKAGED, PACKAGE))


def check(*flags: str) -> None:
    """What training does with these settings before it loads anything."""
    check_settings(read_command_line(["cub200", *flags])[0], torch.device("cpu"), Console(quiet=True))


@pytest.mark.parametrize(
    ("name", "last_stage", "culprits"),
    [
        ("resnet19", "layer4", ("'resnet19'", "did you mean 'resnet18'?", "timm:NAME")),
        ("convnext_atto", "layer4", ("'convnext_atto'", "resnet50", "timm:NAME")),
        ("timm:convnext_atoo", "layer4", ("'convnext_atoo'", "'convnext_atto'")),
        ("timm:convnext_atto.nobody", "layer4", ("'convnext_atto.nobody'", "'convnext_atto'")),
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
        ("timm:mixer_s32_224", SIDE, r"doesn't match model"),
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


@pytest.mark.parametrize(("name", "precision"), [(VIT, "bf16"), (CNN, "fp32")])
def test_a_timm_encoder_is_trained_saved_and_read_again(
    name: str, precision: str, flat: Path, tmp_path: Path, one_thread: None
) -> None:
    pytest.importorskip("timm")
    run = tmp_path / "run"
    train.main(
        ["--data.root", str(flat), "--run.dir", str(run), "--data.image_size", str(SIDE), "--data.loader", "torch",
         "--data.workers", "0", "--run.device", "cpu", "--run.precision", precision, "--run.steps", "2",
         "--model.backbone", name, "--model.weights", "none", "--optim.batch_size", "4", "--moco.queue_size", "8"]
    )  # fmt: skip
    images = torch.randn(1, 3, SIDE, SIDE)
    first, last = (load(run / file) for file in ("init.safetensors", "weights.safetensors"))
    assert (last.facts["backbone"], last.image_size) == (name, SIDE)
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


@pytest.mark.parametrize(("name", "last_stage", "most"), [("resnet18", "layer4", 3), ("resnet18", "layer3", 2)])
def test_not_all_stages_can_be_kept(name: str, last_stage: str, most: int) -> None:
    kept(name, most, last_stage)
    with pytest.raises(UsageError, match=f"frozen_stages {most + 1}.* at most {most}"):
        kept(name, most + 1, last_stage)


@pytest.mark.parametrize(
    ("name", "there"), [("test_vit", True), ("vit_pwee_patch16_reg1_gap_256", False), ("convnext_atto", False)]
)
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


@pytest.mark.parametrize(
    ("flags", "warned"),
    [((), True), (("--moco.objective", "infonce"), False), (("--model.weights", "imagenet"), False)],
)
def test_random_weights_with_an_objective_that_learns_from_them_are_named(
    flags: tuple[str, ...], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["folder", "--data.root", ".", "--model.weights", "none", *flags]
    check_settings(read_command_line(args)[0], torch.device("cpu"), Console())
    assert ("those are random" in capsys.readouterr().out) == warned
