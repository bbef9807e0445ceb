"""The protocol of metric learning: which pictures are trained on and searched, and what is measured of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import protocol
from fastcr.config import EncoderConfig
from fastcr.data.layouts import read_splits
from fastcr.errors import UsageError
from fastcr.runs.context import Context
from tests.bench.test_evidence import TINY, in_process

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(birds: Path, out: Path, **more: Any) -> protocol.ProtocolConfig:
    return protocol.ProtocolConfig(out, protocol.ProtocolData(birds), seeds=(0,), run=EncoderConfig("cpu"), **more)


def test_half_of_the_classes_is_trained_on_and_the_other_half_searched(birds: Path, tmp_path: Path) -> None:
    splits = read_splits(birds)
    assert splits.test is not None
    classes = sorted(splits.train.classes)
    half = len(classes) // 2
    every = {"train": splits.train, "test": splits.test}
    whole = protocol.linked(birds, tmp_path / "whole", None)
    assert sorted(read_splits(whole["train"]).train.classes) == classes[:half]
    assert sorted(read_splits(whole["other kinds"]).train.classes) == classes[half:]
    counts = [len(read_splits(place).train) for place in whole.values()]
    assert sum(counts) == sum(map(len, every.values()))
    some = protocol.linked(birds, tmp_path / "some", 5)
    found = {part: {file.resolve() for file in place.rglob("*.*")} for part, place in some.items()}
    assert len(found["train"]) == 5
    assert {path.parts[-3] for path in found["train"]} == {"train"}
    assert {path.parts[-3] for path in found["same kinds"] | found["other kinds"]} == {"test"}
    assert sorted({path.parent.name for path in found["same kinds"]}) == classes[:half]


def test_scores_are_those_of_their_definitions() -> None:
    """Query by query, over sorted lists: the definitions of Musgrave et al., arXiv 2003.08505, for mAP@R."""
    torch.manual_seed(0)
    labels = torch.cat([torch.arange(30) // 3, torch.arange(10, 13).repeat_interleave(5)])
    vectors = F.normalize(F.one_hot(labels).float() + 0.4 * torch.randn(len(labels), 13), dim=1)
    recalls, at_r = dict.fromkeys((1, 2, 4, 8), 0), list[float]()
    for query in range(len(labels)):
        others = [index for index in range(len(labels)) if index != query]
        others.sort(key=lambda index: -float(vectors[query] @ vectors[index]))
        right = [bool(labels[index] == labels[query]) for index in others]
        for k in recalls:
            recalls[k] += any(right[:k])
        first = right[: sum(right)]
        at_r.append(sum(sum(first[: i + 1]) / (i + 1) for i, hit in enumerate(first) if hit) / sum(right))
    found = protocol.scores_of(vectors, labels)
    assert 20 < found["recall 1"] < 95
    for k, count in recalls.items():
        assert found[f"recall {k}"] == pytest.approx(100 * count / len(labels), abs=0.01)
    assert protocol.precision_at_r(vectors, labels) == pytest.approx(100 * sum(at_r) / len(at_r), abs=0.01)


def test_a_study_measures_every_point_and_goes_on(birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "carry_out", in_process)
    config, context = settings(birds, tmp_path, pictures=12), Context()
    protocol.study(config, TINY, context)
    found = json.loads((tmp_path / "protocol.json").read_text())
    assert found["pictures"] == 12
    (run,) = found["runs"].values()
    for part in ("same kinds", "other kinds"):
        assert run[part].keys() == {"0", "0.5", "0.75", "1"}
        assert run[part]["0"] != run[part]["1"]
        assert {"mean", "attention, k-reciprocal", "gem, whitened, expanded"} <= run[part]["0.5"].keys()

    def refuse(*_: object) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(protocol, "carry_out", refuse)
    protocol.study(config, TINY, context)
    with pytest.raises(UsageError, match="was begun with other images or flags"):
        protocol.study(config, (*TINY, "--optim.lr", "0.01"), context)
