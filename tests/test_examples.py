"""The branch in other people's training loops: its loss against the op, and the examples as a reader runs them."""

import math
import re
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from fastcr.config import RationaleConfig
from fastcr.encoders.rationale import RationaleHead
from fastcr.kernels.rationale_fit import rationale_fit
from tests.shared import start

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(example: str, steps: int, batch_size: int) -> list[tuple[float, float]]:
    """Contrast and fit loss of each step that an example prints."""
    args = ["--device", "cpu", "--steps", steps, "--batch-size", batch_size]
    process = start("-m", f"examples.{example}", *args, fresh=False)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert re.search(r"^embedding \[\d+, \d+\] attention \[\d+, 36\]$", out, re.MULTILINE), out
    found = re.findall(r"^step \d+ contrast (\S+) fit (\S+)$", out, re.MULTILINE)
    return [(float(contrast), float(fit)) for contrast, fit in found]


@pytest.mark.slow
def test_the_fit_loss_of_the_plain_loop_falls_sample() -> None:
    printed = losses("plain_torch", 25, 16)
    assert len(printed) == 25
    assert all(math.isfinite(value) for pair in printed for value in pair)
    fits = [fit for _, fit in printed]
    assert sum(fits[-5:]) < 0.7 * sum(fits[:5])  # without its gradient: 1.61, with it 0.48


@pytest.mark.parametrize(("example", "needs"), [("with_lightly", "lightly"), ("with_timm", "timm")])
def test_the_other_loops_run(example: str, needs: str) -> None:
    if not find_spec(needs):
        pytest.skip(f"{needs} is not installed")
    printed = losses(example, 2, 4)
    assert len(printed) == 2
    assert all(math.isfinite(value) for pair in printed for value in pair)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_loss_is_the_mean_divergence_from_the_gradcam(stop_gradient: bool) -> None:
    torch.manual_seed(0)
    weight, key = torch.randn(3, 6), F.normalize(torch.randn(4, 3), dim=1)
    features = torch.randn(4, 6, 3, 5, requires_grad=True)
    head = RationaleHead(
        6, detectors=5, temperature=0.7, target="sum", cam_keeps="mismatch", cam_weights="own",
        stop_gradient=stop_gradient,
    )  # fmt: skip
    pooled = features.mean((2, 3))
    projected = (pooled @ weight.T).square()
    loss = head.loss(features, pooled, projected, key)
    gradient = -(2 * (pooled @ weight.T) * key) @ weight  # by hand: of what raises the mismatch, -projected . key
    expected = rationale_fit(
        features, gradient, head.weight, head.bias,
        temperature=0.7, target="sum", cam_keeps="mismatch", stop_gradient=stop_gradient,
    ).divergence.mean()  # fmt: skip
    torch.testing.assert_close(loss, expected)
    contrast = -(projected * key).sum(1).mean()
    (contrast + loss).backward()  # the caller's graph is still there
    assert head.weight.grad is not None
    assert features.grad is not None
    by_pooling = (gradient / (15 * 4))[..., None, None].expand_as(features)
    assert torch.allclose(features.grad, by_pooling, atol=1e-6) == stop_gradient


def test_loss_names_pooled_features_that_projected_does_not_come_from() -> None:
    features, key = torch.randn(2, 6, 3, 3, requires_grad=True), torch.randn(2, 6)
    head = RationaleHead(6)
    for pooled in (features.mean((2, 3)), features.mean((2, 3)).detach()):
        with pytest.raises(ValueError, match="projected must be computed from pooled"):
            head.loss(features, pooled, features.mean((2, 3)).square(), key)


def test_keywords_are_the_fields_of_the_configuration() -> None:
    assert RationaleHead(6).config == RationaleConfig()
    config = RationaleConfig(detectors=3, temperature=0.2, target="sum", cam_keeps="match", stop_gradient=False)
    head = RationaleHead(6, detectors=3, temperature=0.2, target="sum", cam_keeps="match", stop_gradient=False)
    assert head.config == RationaleHead(6, config).config == config
    assert {name: list(value.shape) for name, value in head.state_dict().items()} == {"weight": [3, 6], "bias": [3]}
