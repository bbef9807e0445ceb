"""What the files of a Hub's folder say of the weights in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastcr.config import ModelConfig
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.weights import with_own_colours
from fastcr.errors import UsageError
from fastcr.runs.command_line import load_config, read_command_line, save_config

OWN, HALF = {"mean": [0.2, 0.3, 0.4], "std": [0.1, 0.2, 0.3]}, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
COLOURS = (tuple(OWN["mean"]), tuple(OWN["std"]))
NAMED = {"architecture": "test_vit"}
IMAGE = {"image_mean": OWN["mean"], "image_std": OWN["std"]}


def hub(folder: Path, content: dict[str, Any]) -> Path:
    """A folder of the Hub with these files."""
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    for name, facts in content.items():
        (folder / f"{name}.json").write_text(json.dumps(facts))
    return folder


PREPROCESSOR = {"size": {"height": 384, "width": 384}, **IMAGE}
OPEN_CLIP = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 256}},
             "preprocess_cfg": OWN}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"config": {**NAMED, "pretrained_cfg": {**OWN, "input_size": [3, 160, 160]}}},
            ("timm:test_vit", 160, COLOURS),
        ),
        ({"config": {**NAMED, "num_classes": 9, **OWN}}, ("timm:test_vit", 224, COLOURS)),
        (
            {"config": {"architectures": ["Dinov2Model"]}, "preprocessor_config": PREPROCESSOR},
            ("resnet50", 384, COLOURS),
        ),
        ({"preprocessor_config": {**PREPROCESSOR, "crop_size": 96}}, ("resnet50", 96, COLOURS)),
        ({"open_clip_config": OPEN_CLIP}, ("timm:vit_base_patch16_siglip_224", 256, COLOURS)),
        ({}, ("resnet50", 224, (None, None))),
    ],
    ids=["timm", "older timm", "transformers", "transformers with a crop", "open_clip", "nothing"],
)
def test_what_lies_beside_weights_is_used_and_said(
    content: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    said = list[str]()
    flags = ["folder", "--data.root", str(tmp_path), "--model.weights", str(hub(tmp_path, content))]
    config, _ = read_command_line(flags)
    found = with_own_colours(config.model, said.append)
    assert (config.model.backbone, config.data.image_size, (found.mean, found.std)) == expected
    assert [all(word in line for word in ("mean (0.2, 0.3, 0.4)", "come first")) for line in said] == [True] * bool(
        content
    )
    given = ["--model.backbone", "resnet18", "--data.image_size", "224", "--model.mean", "0.5", "0.5", "0.5"]
    config, _ = read_command_line([*flags, *given, "--model.std", "0.5", "0.5", "0.5"])
    assert (config.model.backbone, config.data.image_size) == ("resnet18", 224)
    assert with_own_colours(config.model, said.append) == config.model
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml").model
    assert (again.mean, again.std) == HALF


@pytest.mark.parametrize(
    "facts", [{"mean": [0.5]}, {"std": [0, 1, 1]}, {"mean": "grey"}, {"architecture": 5}, {"input_size": "large"}]
)
def test_facts_that_cannot_be_are_named_with_their_file(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json, beside the weights, cannot be used"):
        with_own_colours(ModelConfig(weights=str(hub(tmp_path, {"config": facts}))), print)


def test_a_resnet_of_torchvision_takes_imagenets_colours_only() -> None:
    with pytest.raises(UsageError, match="weights of others need timm:resnet18"):
        build_backbone("resnet18", colours=HALF)
