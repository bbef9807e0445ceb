"""Other people's names of an encoder's weights, put into torchvision's and timm's."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

# lightly keeps a ResNet as the Sequential of its children
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# the names of transformers' ViT, DeiT, DINOv2, DINOv3, BEiT, MAE, MSN, I-JEPA, CLIP and SigLIP, one rule after another
TRANSFORMERS = [
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^(model\.|encoder\.)?layers?\.(?=\d)", "blocks."),
    (r"^blocks\.\d+\.(?=\d)", "blocks."),  # DINOv2's own training keeps its blocks in parts
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(attention\.attention|self_attn|attention)\.(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^pooler\.layernorm\.", "fc_norm."),
]


def torchvision_name(key: str) -> str:
    """torchvision's name for a key of `nn.Sequential(*resnet.children())`."""
    first, _, rest = key.partition(".")
    return f"{CHILDREN.get(first, first)}.{rest}"


def of_children(part: State, wanted: State) -> State:
    """A ResNet's weights by the numbers of its children, in torchvision's names."""
    return {torchvision_name(key): value for key, value in part.items()}


def of_transformers(part: State, wanted: State) -> State:
    """A ViT's weights in the names of Hugging Face's transformers, in timm's or those of its authors."""
    found, apart = State(), dict[str, State]()
    for key, value in part.items():
        for pattern, name in TRANSFORMERS:
            key = re.sub(pattern, name, key)
        if of_one := re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", key):
            apart.setdefault(f"{of_one[1]}{{}}{of_one[3]}", {})[of_one[2]] = value
        else:
            found[key] = value.reshape(1, -1, value.shape[-1]) if key in ("cls_token", "pos_embed") else value
    for name, each in apart.items():
        if "k" not in each and name.format("q_") in wanted:  # no bias of the keys
            found |= {name.format(f"{kind}_"): value for kind, value in each.items()}
        elif "q" in each:
            found[name.format("qkv.")] = torch.cat([each.get(kind, torch.zeros_like(each["q"])) for kind in "qkv"])
    gated = {key.removesuffix("gate_proj.weight") for key in found if key.endswith("gate_proj.weight")}
    for block in gated:  # SwiGLU in three parts
        for theirs, own in ("fc1", "w2"), ("fc2", "w3"), ("gate_proj", "w1"):
            for kind in ("weight", "bias"):
                if f"{block}{theirs}.{kind}" in found:
                    found[f"{block}{own}.{kind}"] = found.pop(f"{block}{theirs}.{kind}")
    return found


def by_timm(part: State, model: Any) -> tuple[State, list[str]]:
    """What timm itself makes of published weights for this model, and the names of those it resampled.

    They stay as they are where it can make nothing of them.
    """
    convert: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    given = dict(part)
    if "class_embedding" in given:  # CLIP's image encoder, by the name of which timm knows it
        given = {f"visual.{key}": value for key, value in given.items()}
    if "register_tokens" in given:
        if "pos_embed" in given:
            given.setdefault("mask_token", torch.empty(0))  # by which timm knows DINOv2
        else:
            given["storage_tokens"] = given.pop("register_tokens")  # DINOv3, in its authors' names
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of it prints
            found: State = convert(dict(given), model)
    except Exception:  # there is none, or of weights of another kind it expects what they lack
        return part, []
    for key, value in part.items():
        if key == "patch_embed.proj.weight" and value.ndim == 4:
            found[key] = value  # for patches of another size there is another model
        elif key.endswith("qkv.bias") and key not in found and key.replace("qkv.bias", "q_bias") not in found:
            found |= {key: value} if value.unflatten(0, (3, -1))[[0, 2]].any() else {}  # the model has no place for it
    # what lies on a grid, but for the class token's place in it
    grids = [key for key in found if key.endswith(("pos_embed", "position_bias_table")) and key in part]
    return found, [key for key in grids if abs(found[key].shape[-2] - part[key].shape[-2]) > 1]
