"""What an encoder keeps of its start, measured without labels."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from fastcr.data.images import ImageList
from fastcr.encoders.encoder import load
from fastcr.errors import UsageError
from fastcr.measures.health import EncoderHealth, HealthWarnings, effective_rank, kept_neighbours, nearest
from fastcr.runs.context import Context
from tests.shared import write_noise, write_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    return write_noise(tmp_path_factory.mktemp("images"), broken=10)


def test_effective_rank_counts_directions() -> None:
    """RankMe of orthogonal rows is their number; of rows with singular values s it is exp of the entropy of s."""
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_kept_neighbours_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(12, 4), dim=1) for _ in range(2))
    kept = 0
    for row in range(12):
        sets = []
        for each in (first, second):
            order = sorted((n for n in range(12) if n != row), key=lambda n: -float(each[row] @ each[n]))
            sets.append(set(order[:3]))
        kept += len(sets[0] & sets[1])
    assert kept_neighbours(nearest(first, 3), nearest(second, 3)) == pytest.approx(kept / 36)


def test_an_untouched_encoder_keeps_everything_and_another_does_not(images: ImageList, tmp_path: Path) -> None:
    start, other = (write_weights(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1))
    health = EncoderHealth(images, start, 80, Context())
    assert sum(map(len, health.crops)) == 23  # one cannot be read
    same = health.measure(load(start))
    assert same == {"effective_rank": pytest.approx(health.first_rank), "kept_neighbours": 1}
    assert health.measure(load(other))["kept_neighbours"] < 1
    collapsed = load(start)
    for parameter in collapsed.backbone.parameters():
        torch.nn.init.zeros_(parameter)
    assert health.measure(collapsed)["effective_rank"] < 1.01


def test_images_that_cannot_be_read_are_an_error_and_a_single_one_has_nothing_to_lose(
    images: ImageList, tmp_path: Path
) -> None:
    weights = write_weights(tmp_path / "weights.safetensors")
    broken, alone = (ImageList(images.root, (file,), None, ()) for file in ("10.png", "11.png"))
    with pytest.raises(UsageError, match="none of the 1 images"):
        EncoderHealth(broken, weights, 80, Context())
    assert EncoderHealth(alone, weights, 80, Context()).measure(load(weights))["kept_neighbours"] == 1


def test_half_of_the_dimensions_lost_is_said_once() -> None:
    said = io.StringIO()
    warnings = HealthWarnings(Context(console=Console(file=said, width=200)), first_rank=100)
    warnings.look({"embedding_spread": 0.8, "effective_rank": 60.0}, 49)
    assert said.getvalue() == ""
    for _ in range(2):
        warnings.look({"embedding_spread": 0.8, "effective_rank": 49.0}, 49)
    (line,) = said.getvalue().splitlines()
    assert "dimensions" in line
