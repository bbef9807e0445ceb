"""`fastcr evaluate RUN|WEIGHTS|NAME [--all]`: what an encoder is worth, before and after training.

NAME is a torchvision ResNet or `timm:NAME`: an encoder without a run, measured with every pooling that needs no
training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastcr.arguments import EvaluateConfig, NamedModel, read_arguments
from fastcr.config import Config, DataConfig, ModelConfig, RationaleConfig
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.backbone import RESNETS, TIMM, backbone_mistake, build_backbone
from fastcr.encoders.encoder import Encoder, describe, find_weights
from fastcr.encoders.hub import address_of
from fastcr.encoders.weights import load_initial_weights, with_own_colours
from fastcr.errors import UsageError
from fastcr.measures.evaluation import Classifiers, Evaluation, not_measured, test_images
from fastcr.measures.localisation import read_objects
from fastcr.measures.results import best_pooling
from fastcr.output.evaluations import show, write_results
from fastcr.runs.checkpoint import INITIAL, facts_of
from fastcr.runs.command_line import called, load_config, one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.distributed import processes_of_torchrun

PATIENCE = timedelta(days=1)  # of the other processes, while the first one trains its probes


def read_settings(args: Sequence[str] | None) -> tuple[EvaluateConfig, Path | None, Path | None, Path]:
    """Settings, the weights file (None: an encoder by name), the images' root, and where the results go."""
    config: EvaluateConfig = read_arguments("evaluate", args)
    source, root, name = config.source, config.data.root, str(config.source)
    weights: Path | None = None
    if not source.exists() and (name in RESNETS or name.startswith(TIMM)):
        out = Path(f"{name.replace(':', '-').replace('/', '-')}-results.json")
        if root is None:
            raise UsageError("an encoder by name needs --data.root, the folder of images to measure on")
    else:
        if source.is_dir():
            root = root or load_config(source / "config.yaml").data.root
        weights = find_weights(source)
        if config.model != NamedModel():
            raise UsageError(f"--model is for encoders by name; {source} has its own")
        address = address_of(source)
        out = Path(f"{Path(address).name}-results.json") if address else weights.with_name("results.json")
        if not source.is_dir() and root is None:
            raise UsageError("a weights file needs --data.root, the folder of images to measure on")
    out = config.out or out
    if out.is_dir() or not out.parent.is_dir():  # said before everything is measured
        raise UsageError(f"--out {out} names no file in a folder that is there")
    return config, weights, root, out


def named_encoder(config: EvaluateConfig, say: Callable[[str], object]) -> Encoder:
    """The encoder that `config` names, with its weights, on the CPU; `say` is told what lies beside them.

    `UsageError` if it cannot be had.
    """
    name, model = str(config.source), config.model
    if wrong := backbone_mistake(name, model.last_stage):
        raise UsageError(wrong.removeprefix("--model.backbone: "))
    size = config.data.image_size or facts_of(Path(model.weights)).get("size", DataConfig.image_size)
    settings = Config(
        model=with_own_colours(ModelConfig(name, model.last_stage, model.weights, model.allow_missing_weights), say),
        data=DataConfig(image_size=size),
        rationale=RationaleConfig(enabled=False),
    )
    torch.manual_seed(0)  # of weights that stay random
    backbone, _ = build_backbone(
        name, model.last_stage, image_size=size, colours=(settings.model.mean, settings.model.std)
    )
    load_initial_weights(backbone, settings.model)
    encoder = Encoder(backbone, None, describe(settings)).requires_grad_(False).eval()
    return encoder.to(memory_format=torch.channels_last)


def measure(config: EvaluateConfig, evaluation: Evaluation, weights: Path | None) -> dict[str, Any]:
    """Content of the results' file: of weights, beside those the run began with, or of an encoder by name."""
    if weights is not None:
        initial = weights.with_name(INITIAL)
        of_run = config.source.is_dir() and initial.is_file()
        return evaluation.results(weights, evaluation.measure_file(initial, "before training") if of_run else None)
    encoder = evaluation.context.processes.once(partial(named_encoder, config, evaluation.context.say))
    found = evaluation.described(evaluation.measure(encoder.to(evaluation.context.device), str(config.source)))
    named = {"name": str(config.source), "weights": config.model.weights, "image_size": encoder.image_size}
    return {"encoder": named, **found, "best": {"baseline": best_pooling(found)}}


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr evaluate`."""
    with one_line_errors("evaluate"), processes_of_torchrun(called("evaluate"), PATIENCE) as processes:
        config, weights, root, out = processes.once(partial(read_settings, args))
        splits = read_splits(root or write_synthetic())
        images = test_images(splits)
        if images is None:
            raise UsageError(f"{root} has {not_measured(splits)}, so nothing can be measured")
        context = Context.of(config.run.device, config.run.precision, config.data.workers, processes=processes)
        classifiers = Classifiers(config.knn, config.linear) if config.all else None
        objects = read_objects(config.data.boxes, images) if config.data.boxes else None
        size = config.data.image_size
        evaluation = Evaluation(splits, images, context, classifiers, config.run.tuned, size, objects)
        results = measure(config, evaluation, weights)
        show(results, context, every=bool(config.all))
        if processes.first:
            write_results(out, results)
        context.say(f"results: {out}")


if __name__ == "__main__":
    main()
