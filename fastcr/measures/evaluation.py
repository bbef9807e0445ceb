"""What an encoder is worth: every measure of it, during a training run, at its end, and for `fastcr.evaluate`."""

from __future__ import annotations

import filecmp
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcr.config import LinearConfig
from fastcr.data.copies import copied
from fastcr.data.crop_loader import KeptCrops
from fastcr.data.images import ImageList, Splits
from fastcr.encoders.encoder import Encoder, load
from fastcr.errors import UsageError
from fastcr.measures.embeddings import Embeddings, embed
from fastcr.measures.localisation import localisation, objects_in_crop
from fastcr.measures.poolings import SHOWN, without_training
from fastcr.measures.results import Scores, Split, best_pooling, classifier_scores, less_mean, reranked
from fastcr.measures.retrieval import Queries, compare, retrieve_each
from fastcr.method.ddt import ddt_axis
from fastcr.runs.checkpoint import INITIAL, facts_of
from fastcr.runs.context import Context


class Measured(NamedTuple):
    """Scores of an encoder, and which images they leave out."""

    scores: Scores
    skipped: int  # images that are alone in their class: in the gallery, but no queries
    unreadable: list[str]
    queries: dict[tuple[str, bool], Queries]  # by pooling and whether the mean is subtracted
    seconds: float  # that the encoder took for a thousand images


def test_images(splits: Splits) -> ImageList | None:
    """The images to measure on, the test split, else the training images; None where `not_measured` says why."""
    return None if not_measured(splits) else splits.test or splits.train


def not_measured(splits: Splits) -> str | None:
    """What the images to measure on have that leaves nothing to measure: for retrieval, some must have a partner."""
    labels = Counter((splits.test or splits.train).labels)
    if not labels:
        return "no labels (class folders)"
    if len(labels) == 1:
        return "images of one class only"
    return "no class of two images" if max(labels.values()) == 1 else None


@dataclass(frozen=True)
class Evaluation:
    """How encoders are measured: retrieval always, the rest as asked for and as there are images for it."""

    splits: Splits
    images: ImageList  # that the scores are of
    context: Context
    linear: LinearConfig | None = None  # None: no linear probes, and neither kNN nor re-ranking
    tuned: float | None = None  # of a run: how far on the way to its trained weights; None: where it was saved
    image_size: int | None = None  # of the crops, pixels; None: that of the training
    objects: Tensor | None = None  # boxes [N,4] in `images`
    load: KeptCrops = field(default_factory=KeptCrops, compare=False)  # every encoder is shown the same crops

    def measure(self, encoder: Encoder, title: str, *, baselines: bool = True) -> Measured:
        """Every score of an encoder; with `baselines`, retrieval by each pooling that needs no training too."""
        train = self.splits.train
        classified = self.linear is not None and self.splits.test is not None and bool(self._in_common().any())
        poolings = without_training(ddt_axis(encoder, train, self.context, self.load)) if baselines else {}
        see = partial(embed, encoder, context=self.context, load=self.load)
        found = see(self.images, title=title, poolings=poolings)
        known = see(train, title=f"{title}, training images") if classified else None
        return self.context.processes.once(lambda: self.scores_of(encoder, found, known))

    def _in_common(self) -> Tensor:
        """Which images are of a class with training images, bool `[N]`: only these can be classified."""
        return torch.isin(torch.tensor(self.images.labels), torch.tensor(self.splits.train.labels or ()))

    def _split(self, found: Embeddings, images: ImageList) -> Split:
        """The embeddings of images that could be read, with their labels, by every pooling there is."""
        named = {"mean": found.mean, "rationale": found.rationale, **found.others}
        vectors = {name: each.to(self.context.device) for name, each in named.items() if each is not None}
        return Split(vectors, torch.tensor(images.labels)[found.kept])

    def scores_of(self, encoder: Encoder, found: Embeddings, known: Embeddings | None) -> Measured:
        """Every score of the images `found`; kNN and probes learn from those `known`."""
        test, queries = self._split(found, self.images), dict[tuple[str, bool], Queries]()
        for name, vectors in test.vectors.items():
            for centred in (False, True) if found.others else (False,):
                ranked = retrieve_each(less_mean(vectors) if centred else vectors, test.labels)
                queries[name, centred] = ranked._replace(images=found.kept[ranked.images])
        if not len(queries["mean", False].images):
            raise UsageError(f"no two readable images of a class in {self.images.root}: there is nothing to measure")
        scores: Scores = {}
        for (name, centred), ranked in queries.items():
            each = ranked.scores(len(test.labels))
            section = scores.setdefault("retrieval_centred" if centred else "retrieval", {})
            section[name] = {"rank1": each.rank1, "rank5": each.rank5, "mAP": each.mAP}
        if self.linear and found.others:
            own = {name: test.vectors[name] for name in ("mean", "rationale") if name in test.vectors}
            scores["reranked"] = {name: reranked(vectors, test.labels) for name, vectors in own.items()}
        if self.linear and known:
            train, kept = self._split(known, self.splits.train), self._in_common()[found.kept]
            asked = Split({name: test.vectors[name][kept.to(self.context.device)] for name in train.vectors},
                          test.labels[kept])  # fmt: skip
            scores |= classifier_scores(train, asked, len(self.images.classes), self.linear, self.context)
        if self.objects is not None and found.attention is not None:
            boxes = objects_in_crop(self.objects[found.kept], found.sizes, encoder.image_size)
            scores["localisation"] = localisation(found.attention, boxes)
        if found.others:
            shown = partial(self.context.progress, title="looking for copies")
            copies = found.kept[copied(found.looks.to(self.context.device), shown).cpu()]
            others = ~torch.isin(queries["mean", False].images, copies)
            scores["copies"] = {"queries": int((~others).sum())} | {
                name: {"rank1": Queries(*(each[others] for each in queries[name, False])).scores(0).rank1}
                for name in scores["retrieval"]
            }
        alone = len(test.labels) - len(queries["mean", False].images)
        return Measured(scores, alone, found.unreadable, queries, found.seconds)

    def measure_file(self, path: Path, title: str, tuned: float | None = None) -> Measured:
        """Every score of a weights file, which only the first process needs to have; `tuned` as of `load`."""
        encoder = self.context.processes.once(lambda: load(path, tuned=tuned, image_size=self.image_size))
        return self.measure(encoder.to(self.context.device), title)

    def results(self, weights: Path, initial: Measured | None) -> dict[str, Any]:
        """Content of `results.json`: scores of `weights` beside those of the initial weights."""
        unchanged = partial(filecmp.cmp, weights, weights.with_name(INITIAL), shallow=False)
        same = initial and self.context.processes.once(unchanged)
        measured = initial if initial and same else self.measure_file(weights, "after training", self.tuned)
        results = self.described(measured)
        results["best"] = {"trained": best_pooling(measured.scores)}
        if initial is not None:
            results["frozen_init"] = initial.scores
            results["best"]["baseline"] = best_pooling(initial.scores)
            if initial is not measured:
                results["comparison"] = compare_best(initial, measured)
        if self.tuned is None and self.context.processes.once(lambda: facts_of(weights)).get("tuned", 1) < 1:
            results["end"] = self.measure_file(weights, "at the end of training", 1.0).scores
        return results

    def described(self, measured: Measured) -> dict[str, Any]:
        """The scores, and the images that they are of; those left out are named for people too."""
        for path in measured.unreadable:
            self.context.say(f"unreadable image {path!r}: left out")
        if measured.skipped:
            self.context.say(
                f"{measured.skipped} images are alone in their class: retrieved from, but not used as queries"
            )
        if (copies := measured.scores.get("copies", {})).get("queries"):
            said = f"{copies['queries']} queries have a copy among the images (fastcr folders names them)"
            for name in ("mean", "rationale"):
                if name in copies:
                    without, whole = (part[name]["rank1"] for part in (copies, measured.scores["retrieval"]))
                    said += f"; {SHOWN.get(name, name)}: rank-1 without them {without:.2f}, with them {whole:.2f}"
            self.context.say(said)
        if self.linear and self.splits.test and (alone := int((~self._in_common()).sum())):
            left_out = f"{alone} of {len(self.images)} test images are of classes without training images"
            self.context.say(f"{left_out}: kNN and linear probes leave them out")
        return {
            "folder": str(self.images.root),
            **({"image_size": self.image_size} if self.image_size else {}),
            "images": len(self.images) - len(measured.unreadable),
            "unreadable": len(measured.unreadable),
            "skipped": measured.skipped,
            "classes": len(set(self.images.labels or ())),
            **measured.scores,
        }


def compare_best(before: Measured, after: Measured) -> dict[str, Any] | None:
    """The pooling that is best by mAP before training and the one after it, compared over the same queries.

    None if an image became unreadable in between, so that the queries differ.
    """
    best = {"before": best_pooling(before.scores), "after": best_pooling(after.scores)}
    first = before.queries[best["before"]["pooling"], best["before"]["centred"]]
    second = after.queries[best["after"]["pooling"], best["after"]["centred"]]
    return best | compare(first, second) if torch.equal(first.images, second.images) else None
