"""Weights by the names under which other projects publish them give the features that they give in their own model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastcr.config import ModelConfig
from fastcr.encoders.backbone import TIMM_HEADS, TimmEncoder
from fastcr.encoders.weights import load_initial_weights
from fastcr.errors import UsageError
from tests.encoders.test_weights import State, under

timm = pytest.importorskip("timm")
EXTRA = torch.zeros(1, 1, 8)
MASK, DECODER = {"mask_token": EXTRA}, {"decoder_pos_embed": EXTRA, "decoder_blocks.0.norm1.weight": EXTRA}
VIT, SWIGLU = "vit_tiny_patch16_224", "vit_giant_patch14_reg4_dinov2"
DINOV3, CLIP = "vit_small_patch16_dinov3_qkvb", "vit_base_patch16_clip_224"
# timm's names to OpenAI's
OPENAI = [
    ("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"), ("blocks", "transformer.resblocks"),
    ("norm_pre", "ln_pre"), (r"^norm\.", "ln_post."), (r"\.norm(.)", r".ln_\1"), (r"qkv\.", "in_proj_"),
    ("attn.proj", "attn.out_proj"), ("fc1", "c_fc"), ("fc2", "c_proj"), ("cls_token", "class_embedding"),
]  # fmt: skip
# and to those of transformers, of which the others differ in these first ones
INNER = [(r"blocks\.", "encoder.layer."), ("attn.proj", "attention.output.dense"), ("attn", "attention.attention"),
         ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), (r"\.norm1", ".layernorm_before"),
         (r"\.norm2", ".layernorm_after"), (r"^norm\.", "layernorm."),
         ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("^cls_token", "embeddings.cls_token"),
         ("^pos_embed", "embeddings.position_embeddings")]  # fmt: skip
INNER_3 = [(r"blocks\.", "layer."), (r"attn\.proj", "attention.o_proj"), ("attn", "attention"),
           ("fc1", "up_proj"), ("fc2", "down_proj"), ("gamma_(.)", r"layer_scale\1.lambda1"),
           ("patch_embed.proj", "embeddings.patch_embeddings"), ("^cls_token", "embeddings.cls_token"),
           ("^reg_token", "embeddings.register_tokens")]  # fmt: skip
INNER_CLIP = [(r"blocks\.", "encoder.layers."), ("attn.proj", "self_attn.out_proj"), (r"(?<!self_)attn", "self_attn"),
              (r"\.norm(.)", r".layer_norm\1"), (r"^norm\.", "post_layernorm."), ("norm_pre", "pre_layrnorm"),
              ("patch_embed.proj", "embeddings.patch_embedding"), ("^cls_token", "embeddings.class_embedding"),
              ("^pos_embed", "embeddings.position_embedding.weight")]  # fmt: skip


def tiny(name: str, side: int = 64, **changed: Any) -> Any:
    """A small model of that family, its weights drawn so that each counts."""
    if name.startswith(("vit", "eva", "beit")):
        changed |= {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": side}
    model = timm.create_model(name, num_classes=0, **changed).eval()
    for head in TIMM_HEADS:
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return model


def renamed(state: State, names: list[tuple[str, Any]]) -> State:
    found = {}
    for key, value in state.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found


def apart(state: State, query: str, key: str, value: str) -> State:
    """The three projections of the attention in tensors of their own; no bias of the keys where timm has none."""
    found = State()
    for name, each in state.items():
        if "qkv" in name:
            parts = zip((query, key, value), each.chunk(3), strict=True)
            found |= {name.replace("qkv", part): tensor for part, tensor in parts}
        else:
            found[name.replace("q_bias", f"{query}.bias").replace("v_bias", f"{value}.bias")] = each
    return found


def without_prefix_positions(state: State) -> State:
    """As DINOv2 with registers has it: the class token has a position of its own."""
    position = torch.full_like(state["cls_token"], 0.1)
    return state | {
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], 1),
    }


def dinov3(state: State) -> State:
    """One bias for the three projections, of which the keys' is masked."""
    found = {key: value for key, value in state.items() if not key.endswith(("q_bias", "v_bias"))}
    for key in (key for key in state if key.endswith("q_bias")):
        bias = torch.cat([state[key], torch.ones(48), state[key.replace("q_bias", "v_bias")]])
        found[key.replace("q_bias", "qkv.bias")] = bias
        found[key.replace("q_bias", "qkv.bias_mask")] = torch.full_like(bias, torch.nan)
    names = [("gamma_(.)", r"ls\1.gamma"), ("reg_token", "storage_tokens")]
    return renamed(found, names) | MASK | {"rope_embed.periods": torch.ones(4)}


def flat(state: State) -> State:
    """Without the dimensions of size 1 that CLIP's embeddings lack."""
    return {key: value.squeeze() if key.endswith("embedding") else value for key, value in state.items()}


PUBLISHED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "MAE": (VIT, lambda state: {"model": state | MASK | DECODER}),
    "DINO": (VIT, lambda state: {"student": under("module.backbone.", state), "teacher": under("backbone.", state)}),
    "DINOv2": ("vit_small_patch14_dinov2", lambda state: state | MASK),
    "DINOv2 with registers": (SWIGLU, lambda state: renamed(without_prefix_positions(state), [
        ("reg_token", "register_tokens"), ("fc1", "w12"), ("fc2", "w3")]) | MASK),
    "DINOv2 in training": (VIT, lambda state: {"model": under(
        "teacher.backbone.", renamed(state, [(r"blocks\.1", "blocks.1.1"), (r"blocks\.0", "blocks.0.0")]) | MASK)}),
    "DINOv3": (DINOV3, dinov3),
    "iBOT": (VIT, lambda state: {"state_dict": state | {"masked_embed": EXTRA}}),
    "MSN": (VIT, lambda state: {"target_encoder": under("module.", state | {"fc.fc1.weight": EXTRA}), "epoch": 3}),
    "I-JEPA": ("vit_huge_patch14_gap_224", lambda state: {
        "encoder": under("module.", state), "predictor": under("module.", MASK | {"predictor_pos_embed": EXTRA})}),
    "MoCo v3": (VIT, lambda state: {"state_dict": under("module.base_encoder.", state | {"head.0.weight": EXTRA})}),
    "CLIP": (CLIP, lambda state: flat(under("visual.", renamed(state, OPENAI) | {"proj": torch.zeros(48, 8)}))
             | {"logit_scale": EXTRA, "positional_embedding": EXTRA[0]}),
    "open_clip, SigLIP": ("vit_base_patch16_siglip_224", lambda state: under("visual.trunk.", state)),
    "EVA": ("eva02_tiny_patch14_224", lambda state: {"module": renamed(
        state, [("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")]) | {"rope.freqs_cos": EXTRA} | MASK}),
    "BEiT": ("beit_base_patch16_224", lambda state: {"model": state}),
    "lightly, ResNet": ("resnet18", lambda state: under("backbone.", renamed(state, [
        ("^conv1", "0"), ("^bn1", "1"), (r"^layer(\d)", lambda found: str(int(found[1]) + 3))]))),
    "VICReg-L": ("test_convnext", lambda state: {"model": under("module.backbone.", renamed(state, [
        ("^stem", "downsample_layers.0"), (r"stages.(.).downsample", r"downsample_layers.\1"),
        (r"(stages..)\.blocks", r"\1"), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv")]))}),
    "lightly-train": (VIT, lambda state: {"state_dict": under(
        "teacher_embedding_model.wrapped_model._model.", state)}),
    "transformers, ViT": (VIT, lambda state: under(
        "vit.", renamed(apart(state, "query", "key", "value"), INNER)) | {"decoder.mask_token": EXTRA}),
    "transformers, BEiT": ("beit_base_patch16_224", lambda state: renamed(apart(state, "query", "key", "value"), [
        ("gamma_", "lambda_"), ("^fc_norm", "pooler.layernorm"),
        ("attn.relative", "attention.attention.relative_position_bias.relative"), *INNER])),
    "transformers, DINOv3": (DINOV3, lambda state: renamed(apart(state, "q_proj", "k_proj", "v_proj"), INNER_3)),
    "transformers, CLIP": (CLIP, lambda state: under("vision_model.", renamed(
        apart(state, "q_proj", "k_proj", "v_proj"), INNER_CLIP))),
}  # fmt: skip


def loaded(state: Any, model: Any, folder: Path) -> TimmEncoder:
    torch.save(state, folder / "weights.pth")
    encoder = TimmEncoder(model).eval()
    assert load_initial_weights(encoder, ModelConfig("timm:model", weights=str(folder / "weights.pth"))) == []
    return encoder


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_weights_give_the_features_of_their_own_model(family: str, tmp_path: Path) -> None:
    name, publish = PUBLISHED[family]
    side = 56 if "14" in name else 64
    own, other = tiny(name, side), tiny(name, side)
    encoder = loaded(publish(own.state_dict()), other, tmp_path)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), TimmEncoder(own).eval()(images), atol=1e-5, rtol=1e-4)


def test_positions_of_another_image_size_are_resampled_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, model = tiny(VIT, 96).state_dict(), tiny(VIT)
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], (4, 4), (6, 6), num_prefix_tokens=1)
    encoder = loaded(state, model, tmp_path)
    torch.testing.assert_close(encoder.timm.pos_embed, expected)
    assert "weights.pth is of another image size: pos_embed resampled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "publish", "other", "reason"),
    [
        (DINOV3, dinov3, "vit_small_patch16_dinov3", r"2 foreign keys, blocks\.0\.attn\.qkv\.bias"),
        (SWIGLU, without_prefix_positions, "vit_giant_patch14_dinov2", "1 foreign keys, reg_token"),
        (VIT, dict, "vit_small_patch32_224", r"patch_embed\.proj\.weight is \[48, 3, 16, 16\], not \[48, 3, 32, 32\]"),
    ],
)
def test_weights_of_another_model_are_refused_for_what_differs(
    name: str, publish: Callable[[State], Any], other: str, reason: str, tmp_path: Path
) -> None:
    side = 56 if "14" in name else 64
    with pytest.raises(UsageError, match=reason):
        loaded(publish(tiny(name, side).state_dict()), tiny(other, side), tmp_path)
