"""`fastcr evaluate RUN|WEIGHTS|NAME ... [--all]`: what an encoder is worth, before and after training.

NAME is a torchvision ResNet or `timm:NAME`: an encoder without a run, measured with every pooling that needs no
training. Several encoders are ranked; with `--pairs`, pairs of images stand in for labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fastcr.arguments import EvaluateConfig, NamedModel, read_arguments
from fastcr.config import LinearConfig
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import BOXES, write_synthetic
from fastcr.encoders.encoder import Encoder, load
from fastcr.encoders.hub import address_of, find_weights
from fastcr.encoders.named import is_name, model_of, open_encoder
from fastcr.errors import UsageError
from fastcr.measures.evaluation import Evaluation, not_measured, test_images
from fastcr.measures.localisation import read_objects
from fastcr.measures.pairs import Scored, read_pairs, results_of, score_pairs
from fastcr.measures.poolings import key_of
from fastcr.measures.results import best_pooling
from fastcr.output.evaluations import show, write_results
from fastcr.runs.checkpoint import INITIAL
from fastcr.runs.command_line import called, load_config, one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.distributed import processes_of_torchrun

PATIENCE = timedelta(days=1)  # of the other processes, while the first one trains its probes


def read_settings(args: Sequence[str] | None) -> tuple[EvaluateConfig, Path | None, Path]:
    """Settings, the images' root (None: the drawn birds, or pairs), and where the results go."""
    config: EvaluateConfig = read_arguments("evaluate", args)
    root, out, sources = config.data.root, Path("ranking.json"), config.sources
    if not sources:
        raise UsageError("name a RUN, or an encoder such as timm:NAME; several of them are ranked")
    for source in sources:
        if is_name(source):
            model_of(str(source), **vars(config.model))  # a mistake in a name is said before anything is measured
            continue
        weights = find_weights(source)
        if source.is_dir() and not config.pairs:
            root = root or load_config(source / "config.yaml").data.root
    without = [str(source) for source in sources if not source.is_dir()]
    if without and root is None and not config.pairs:
        raise UsageError(f"{without[0]} needs --data.root, the folder of images to measure on")
    if config.model != NamedModel() and not any(map(is_name, sources)):
        raise UsageError(f"--model is for encoders by name; {sources[0]} has its own")
    if len(sources) > 1 and (config.all or config.data.boxes):
        raise UsageError("--all and --data.boxes are for one encoder: several are ranked by retrieval and kNN")
    if config.pairs:
        out = config.pairs.with_name(f"{config.pairs.stem}-results.json")
    elif len(sources) == 1 and (is_name(sources[0]) or address_of(sources[0])):
        name = Path(address_of(sources[0]) or "").name or re.sub("[:/]", "-", str(sources[0]))
        out = Path(f"{name}-results.json")
    elif len(sources) == 1:
        out = weights.with_name("results.json")
    out = config.out or out
    if out.is_dir() or not out.parent.is_dir():  # said before everything is measured
        raise UsageError(f"--out {out} names no file in a folder that is there")
    return config, root, out


def encoder_of(config: EvaluateConfig, context: Context, source: Path) -> Encoder:
    """One of the encoders that `config` names, on the CPU. `UsageError` if it cannot be had."""
    tuned, settings = (None, vars(config.model)) if is_name(source) else (config.run.tuned, {})
    return open_encoder(source, "cpu", tuned, config.data.image_size, context.say, **settings).encoder


def measure(config: EvaluateConfig, evaluation: Evaluation) -> dict[str, Any]:
    """Content of the results' file: of weights, beside those the run began with, or of an encoder by name."""
    (source,) = config.sources
    if not is_name(source):
        weights = find_weights(source)
        initial = weights.with_name(INITIAL)
        of_run = source.is_dir() and initial.is_file()
        return evaluation.results(weights, evaluation.measure_file(initial, "before training") if of_run else None)
    encoder = evaluation.context.processes.once(partial(encoder_of, config, evaluation.context, source))
    found = evaluation.described(evaluation.measure(encoder.to(evaluation.context.device), str(source)))
    named = {"name": str(source), "weights": config.model.weights, "image_size": encoder.image_size}
    return {"encoder": named, **found, "best": {"baseline": best_pooling(found)}}


def rank(config: EvaluateConfig, evaluation: Evaluation) -> dict[str, Any]:
    """Content of the results' file: a row for each encoder, by the pooling that `fastcr embed` takes; best first.

    Those that cannot be had are named and left out; `UsageError` if that is all of them.
    """
    context, rows, found = evaluation.context, list[dict[str, Any]](), dict[str, Any]()
    for source in config.sources:
        try:
            encoder = context.processes.once(partial(encoder_of, config, context, source))
            measured = evaluation.measure(encoder.to(context.device), str(source), baselines=False)
        except UsageError as error:
            if context.processes.ranks > 1:  # the others have ended
                raise
            context.say(f"left out: {source}: {error}")
            continue
        found = found or evaluation.described(measured)
        pooling, scores = key_of(None, encoder), measured.scores
        row = {"encoder": str(source), "image_size": encoder.image_size, "pooling": pooling}
        row |= {"knn": scores["knn"][pooling]["top1"]} if "knn" in scores else {}
        rows.append(row | scores["retrieval"][pooling] | {"seconds": measured.seconds})
    if not rows:
        raise UsageError("none of these encoders could be measured")
    facts = {name: found[name] for name in ("folder", "images", "unreadable", "skipped", "classes")}
    return facts | {"ranking": sorted(rows, key=lambda row: -row["mAP"])}


def by_pairs(config: EvaluateConfig, source: Path, context: Context) -> dict[str, Any]:
    """Content of the results' file: what the pairs say of each encoder, of a run before and after training."""
    once, scored = context.processes.once, dict[str, Scored]()
    pairs = once(partial(read_pairs, source))
    for each in config.sources:
        if (each / INITIAL).is_file():
            before = once(partial(load, each / INITIAL, image_size=config.data.image_size)).to(context.device)
            scored[f"{each}, before"] = score_pairs(before, pairs, context)
        encoder = once(partial(encoder_of, config, context, each))
        scored[str(each)] = score_pairs(encoder.to(context.device), pairs, context)
    return once(partial(results_of, pairs, scored))


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr evaluate`."""
    with one_line_errors("evaluate"), processes_of_torchrun(called("evaluate"), PATIENCE) as processes:
        config, root, out = processes.once(partial(read_settings, args))
        context = Context.of(config.run.device, config.run.precision, config.data.workers, processes=processes)
        if config.pairs:
            results = by_pairs(config, config.pairs, context)
        else:
            splits = read_splits(root or write_synthetic())
            boxes = config.data.boxes or (None if root else write_synthetic() / BOXES)
            images = test_images(splits)
            if images is None:
                raise UsageError(f"{root} has {not_measured(splits)}, so nothing can be measured")
            several = len(config.sources) > 1
            linear = LinearConfig(enabled=False) if several else config.linear if config.all else None
            objects = read_objects(boxes, images) if boxes else None
            size = config.data.image_size
            evaluation = Evaluation(splits, images, context, linear, config.run.tuned, size, objects)
            results = rank(config, evaluation) if several else measure(config, evaluation)
        show(results, context, every=bool(config.all))
        if processes.first:
            write_results(out, results)
        context.say(f"results: {out}")


if __name__ == "__main__":
    main()
