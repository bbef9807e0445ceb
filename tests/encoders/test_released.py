"""The authors' released checkpoints: what is read of them, and the numbers of their code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcr
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.encoder import Encoder
from fastcr.encoders.released import ReleasedBranch, from_released_checkpoint
from fastcr.errors import UsageError
from fastcr.kernels.info_nce import info_nce

pytestmark = pytest.mark.usefixtures("one_thread")
NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Inputs and outputs of the authors' branch, losses and embedding on three images."""
    file = Path(os.environ.get("FASTCR_TEST_DATA", "")) / "golden" / "official_branch.npz"
    if not file.is_file():
        pytest.skip("FASTCR_TEST_DATA names no folder with golden/official_branch.npz")
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name]).float() for name in arrays}


@pytest.fixture
def branch(golden: dict[str, Tensor]) -> ReleasedBranch:
    """The authors' branch, in training mode."""
    detectors, channels = golden["branch_weight"].shape
    branch = ReleasedBranch(channels, detectors)
    state = {f"norm.{name}": golden[f"bn_{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    branch.load_state_dict(state | {"conv.weight": golden["branch_weight"][:, :, None, None]})
    return branch


@pytest.mark.parametrize("training", [False, True])
def test_mask_and_embedding_are_the_released_ones(
    training: bool, golden: dict[str, Tensor], branch: ReleasedBranch
) -> None:
    encoder = Encoder(nn.Identity(), branch, {"image_size": 224})  # the arrays begin at the features
    embedding, attention = encoder.train(training)(golden["features"])
    mask = golden["train_mask"]
    if not training:  # with the running statistics
        peak = golden["eval_branch"].amax(1)
        mask = (peak - peak.min()) / (peak.max() - peak.min())
        responses = branch.responses(golden["features"]).relu()
        torch.testing.assert_close(responses, golden["eval_branch"], atol=1e-4, rtol=0)
    torch.testing.assert_close(attention, mask, atol=1e-4, rtol=0)
    expected = golden["train_embedding" if training else "eval_embedding"]
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)


def test_losses_of_the_branchs_attention_are_the_released_ones(
    golden: dict[str, Tensor], branch: ReleasedBranch
) -> None:
    """The released code's GradCAM and fit, from its equations: the fit's logits are the map that `attention` gives."""
    cam = F.relu(torch.einsum("bchw,bc->bhw", golden["features"], golden["pooled_gradient"])) / 49
    torch.testing.assert_close(cam, golden["cam"], atol=1e-4 * golden["cam"].max().item(), rtol=0)
    temperature = golden["temperature"].item()
    contrast = info_nce(golden["query"], golden["key"], golden["queue"], temperature=temperature).mean()
    torch.testing.assert_close(contrast, golden["contrast_loss_mean"], rtol=1e-4, atol=0)

    logits = branch.attention(golden["features"])
    rows = F.kl_div(logits.log_softmax(-1), cam.softmax(-1), reduction="sum")  # over the last axis only
    everywhere, target = (logits.flatten(1) / 0.4).log_softmax(1), (cam.flatten(1) / 0.4).softmax(1)
    torch.testing.assert_close(rows, golden["kl_rows_sum"], rtol=1e-4, atol=0)
    everywhere = F.kl_div(everywhere, target, reduction="sum")
    torch.testing.assert_close(everywhere, golden["kl_spatial_t04_sum"], rtol=1e-4, atol=0)


def checkpoint(kind: str, branch: ReleasedBranch, backbone: nn.Module) -> dict[str, Tensor]:
    """The state dict as the authors' code has it; other encoders than the trained one are full of sevens."""
    encoder, others = backbone.state_dict(), dict[str, Tensor]()
    if kind == "byol by number":
        encoder = {name.replace(name.split(".")[0], NUMBERS[name.split(".")[0]], 1): v for name, v in encoder.items()}
    if kind == "moco":
        own, second = "encoder_q.", "encoder_k."
        names = ("encoder_q.fc.0.weight", "queue", "fc.bias", "qmax.0.weight", "conv16_2.weight", "bn16_2.bias")
        others = {name: torch.ones(1) for name in names}
    else:
        own, second = "online_encoder.0.", "target_encoder.0."
        others = {name: torch.ones(1) for name in ("online_encoder.1.0.weight", "online_predictor.0.weight")}
    state = {f"{second}{name}": torch.full_like(value, 7) for name, value in encoder.items()} | others
    state |= {f"{own}{name}": value for name, value in encoder.items()}
    state |= {"conv16.weight": branch.conv.weight.detach()}
    return state | {f"bn16.{name}": value for name, value in branch.norm.state_dict().items()}


@pytest.mark.parametrize("kind", ["moco", "byol by number"])
def test_released_checkpoints_load_whole(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backbone, channels = build_backbone("resnet50", stem_maxpool=kind == "moco")
    branch = ReleasedBranch(channels, 32)
    nn.init.uniform_(branch.norm.running_mean)
    branch.norm.num_batches_tracked.fill_(7)
    state = checkpoint(kind, branch, backbone)
    if kind == "moco":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": v for key, v in state.items()}}, tmp_path / "a.pth.tar")
    else:
        torch.save(state, tmp_path / "a.pth.tar")
    encoder = fastcr.load(tmp_path / "a.pth.tar")
    assert capfd.readouterr() == ("", "")
    assert (encoder.facts["attention"], encoder.facts["stem_maxpool"]) == ("batch-minmax", kind == "moco")
    assert (encoder.image_size, encoder.facts["detectors"]) == (224, 32)
    for part, own in ((encoder.backbone, backbone), (encoder.branch, branch)):
        assert part is not None
        torch.testing.assert_close(part.state_dict(), own.state_dict(), rtol=0, atol=0)
    embedding, attention = encoder(torch.randn(2, 3, 64, 64))
    assert embedding.shape == (2, 2048)
    assert attention.shape == ((2, 2, 2) if kind == "moco" else (2, 4, 4))


def test_other_checkpoints_are_refused_by_their_keys() -> None:
    with pytest.raises(UsageError, match=r"not a released checkpoint .*its keys begin conv16"):
        from_released_checkpoint({"conv16.weight": torch.ones(1), "queue": torch.ones(1)})
