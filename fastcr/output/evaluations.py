"""The evaluations of a training run, during it and at its end, as the run shows and logs them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from fastcr.config import LinearConfig
from fastcr.data.images import Splits
from fastcr.encoders.encoder import Encoder
from fastcr.measures.evaluation import Evaluation, Measured, not_measured, test_images
from fastcr.measures.localisation import read_objects
from fastcr.measures.poolings import SHOWN
from fastcr.output.gallery import fixed_attention
from fastcr.output.tables import results_tables
from fastcr.runs.checkpoint import INITIAL, write_whole
from fastcr.runs.command_line import called
from fastcr.runs.context import Context

HISTORY = "evaluations.jsonl"  # of a run: one object for each evaluation during training


class Logged(NamedTuple):
    """What an evaluation gives a run's log; nothing in processes other than the first."""

    scores: dict[str, float] = {}  # noqa: RUF012  # percent, by names such as knn/rationale/top1
    attention: Image.Image | None = None


class TrainingEvaluation:
    """The evaluations of one training run: during it, and at its end. Without labels, only the attention is drawn."""

    def __init__(self, folder: Path, splits: Splits, context: Context, knn: bool, boxes: Path | None) -> None:
        """With `knn`, kNN is measured too; with the file `boxes`, how much of the attention lies in them."""
        self.folder, self.context, images = folder, context, test_images(splits)
        linear = LinearConfig(enabled=False) if knn else None
        objects = read_objects(boxes, images) if boxes and images else None
        self.evaluation = Evaluation(splits, images, context, linear, objects=objects) if images else None
        self.drawn, self.lacking = splits.test or splits.train, not_measured(splits)

    @cached_property
    def before(self) -> Measured:
        """The encoder as it was before the first step."""
        assert self.evaluation
        return self.evaluation.measure_file(self.folder / INITIAL, "before training")

    def _logged(self, encoder: Encoder, scores: Mapping[str, Any]) -> Logged:
        if not self.context.processes.first:
            return Logged()
        found = {
            f"{section}/{pooling}/{measure}": value
            for section in ("retrieval", "knn")
            for pooling in ("mean", "rationale")
            for measure, value in scores.get(section, {}).get(pooling, {}).items()
        }
        return Logged(found, fixed_attention(encoder, self.drawn, self.context))

    def during(self, encoder: Encoder, epoch: int) -> Logged:
        """Print rank-1 and kNN of the encoder as it is now and before training, and warn where they have fallen."""
        if self.evaluation is None:
            return self._logged(encoder, {})
        before = self.before.scores
        with torch.compiler.set_stance("force_eager"):  # not worth compiling for eval mode and another batch size
            scores = self.evaluation.measure(encoder, f"epoch {epoch}", baselines=False).scores
        if not self.context.processes.first:
            return Logged()
        with (self.folder / HISTORY).open("a") as file:
            folder = str(self.evaluation.images.root)
            file.write(json.dumps({"epoch": epoch, "folder": folder, **scores}) + "\n")
        for section, measure, shown in (("retrieval", "rank1", "rank-1"), ("knn", "top1", "kNN")):
            for name, values in scores.get(section, {}).items():
                now, then = values[measure], before[section][name][measure]
                below = "  warning: lower than before training" if now < then else ""
                self.context.say(f"  {shown} {SHOWN.get(name, name)} {now:.2f} (before training {then:.2f}){below}")
        return self._logged(encoder, scores)

    def at_the_end(self, encoder: Encoder) -> Logged:
        """Evaluate weights.safetensors, which hold `encoder`; write results.json and print the table."""
        if self.evaluation is None:
            run = shlex.quote(str(self.folder))
            self.context.say(
                f"{self.lacking}: retrieval is not measured. Is it better than before? Some fifty pairs tell:"
            )
            self.context.say(f"  {called('evaluate')} {run} --pairs FILE    (each line: IMAGE,IMAGE,same or different)")
            self.context.say(f"to search: {called('embed')} {run} {shlex.quote(str(self.drawn.root))} --out INDEX")
            self.context.say(f"  {called('search')} INDEX IMAGE")
            return self._logged(encoder, {})
        results = self.evaluation.results(self.folder / "weights.safetensors", self.before)
        show(results, self.context)
        if self.context.processes.first:
            write_results(self.folder / "results.json", results)
        return self._logged(encoder, results)


def show(results: dict[str, Any], context: Context, *, every: bool = False) -> None:
    """Print the results for people; with `every`, each pooling."""
    for each in results_tables(results, every=every):
        context.say(each) if isinstance(each, str) else context.show(each)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, whole or not at all."""
    write_whole(path, lambda file: file.write_text(json.dumps(results, indent=2) + "\n"))
