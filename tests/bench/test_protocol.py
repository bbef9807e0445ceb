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


def test_scores_are_those_of_another_library() -> None:
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    torch.manual_seed(0)
    labels = torch.arange(40) // 4
    vectors = F.normalize(F.one_hot(labels).float() + 0.4 * torch.randn(40, 10), dim=1)
    calculator = calculators.AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), device=torch.device("cpu"), k="max_bin_count"
    )
    expected = calculator.get_accuracy(vectors, labels)
    found = protocol.scores_of(vectors, labels)
    assert 20 < found["recall 1"] < 95
    assert found["recall 1"] == pytest.approx(100 * expected["precision_at_1"], abs=0.01)
    right = labels[(vectors @ vectors.T).fill_diagonal_(-9).topk(8).indices] == labels[:, None]
    assert found["recall 4"] == pytest.approx(100 * right[:, :4].any(1).double().mean().item(), abs=0.01)
    at_r = protocol.precision_at_r(vectors, labels)
    assert at_r == pytest.approx(100 * expected["mean_average_precision_at_r"], abs=0.01)


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
