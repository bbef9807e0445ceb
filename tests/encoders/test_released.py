"""The released variant: the numbers of the authors' code, the gradients it lets flow, the checkpoints it reads."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastcr.method.objectives.infonce import infonce
from torch import Tensor, nn

from fastcr.config import MocoConfig, RationaleConfig, ReleasedConfig
from fastcr.data.views import Batch
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.encoder import load
from fastcr.encoders.released import (
    ReleasedBranch,
    from_released_checkpoint,
    gradcam,
    load_byol_heads,
    released_losses,
)
from fastcr.errors import UsageError
from fastcr.kernels.info_nce import info_nce
from fastcr.method.moco import MoCo
from fastcr.method.step import train_step

INFONCE = partial(infonce, temperature=0.2)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Inputs and outputs of the authors' branch, losses and embedding on three images."""
    file = Path(os.environ.get("FASTCR_TEST_DATA", "")) / "golden" / "official_branch.npz"
    if not file.is_file():
        pytest.skip("FASTCR_TEST_DATA names no folder with golden/official_branch.npz")
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name]).float() for name in arrays}


def golden_branch(golden: dict[str, Tensor], config: ReleasedConfig | None = None) -> ReleasedBranch:
    detectors, channels = golden["branch_weight"].shape
    branch = ReleasedBranch(channels, RationaleConfig(detectors=detectors), config or ReleasedConfig())
    state = {f"norm.{name}": golden[f"bn_{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    branch.load_state_dict(state | {"conv.weight": golden["branch_weight"][:, :, None, None]})
    return branch


def assert_within(got: Tensor, expected: Tensor, *, absolute: float = 0.0, relative: float = 0.0) -> None:
    torch.testing.assert_close(got, expected, atol=absolute, rtol=relative)


def test_training_mask_and_embedding_are_the_released_ones(golden: dict[str, Tensor]) -> None:
    branch = golden_branch(golden)
    pooled, attention = branch.pool(golden["features"])
    assert_within(attention.view(3, 7, 7), golden["train_mask"], absolute=1e-4)
    assert_within(F.normalize(pooled, dim=1), golden["train_embedding"], absolute=1e-4)


def test_evaluation_uses_the_running_statistics(golden: dict[str, Tensor]) -> None:
    branch = golden_branch(golden).eval()
    responses = F.relu(branch.norm(branch.conv(golden["features"])))
    assert_within(responses, golden["eval_branch"], absolute=1e-4)
    embedding = F.normalize(branch.pool(golden["features"]).pooled, dim=1)
    assert_within(embedding, golden["eval_embedding"], absolute=1e-4)


def test_gradcam_and_contrast_loss_are_the_released_ones(golden: dict[str, Tensor]) -> None:
    cam = gradcam(golden["features"], golden["pooled_gradient"])
    assert_within(cam, golden["cam"], absolute=1e-4 * golden["cam"].max().item())
    temperature = golden["temperature"].item()
    loss = info_nce(golden["query"], golden["key"], golden["queue"], temperature=temperature).mean()
    assert_within(loss, golden["contrast_loss_mean"], relative=1e-4)


@pytest.mark.parametrize(
    ("config", "name"),
    [(ReleasedConfig(fit_axis="rows"), "kl_rows_sum"), (ReleasedConfig(fit_axis="all"), "kl_spatial_t04_sum")],
    ids=["rows", "all"],
)
def test_fit_losses_are_the_released_ones(golden: dict[str, Tensor], config: ReleasedConfig, name: str) -> None:
    branch = golden_branch(golden, config)
    fit = branch.fit(branch.attention(golden["features"]), golden["cam"])
    assert_within(fit, golden[name], relative=1e-4)


def test_gradient_of_the_detectors_is_the_released_one(golden: dict[str, Tensor]) -> None:
    # through the batch's min and max and its statistics; the contrast loss and the target do not depend on the branch
    branch = golden_branch(golden)
    (0.01 * branch.fit(branch.attention(golden["features"]), golden["cam"])).backward()
    assert branch.conv.weight.grad is not None
    expected = golden["branch_weight_grad_of_contrast_plus_001_kl_rows"]
    # stored in fp16: half a unit in the last of 11 bits, 2^-25 below the normal range; twice that
    assert_within(branch.conv.weight.grad.flatten(1), expected, absolute=2**-24, relative=2**-10)


def tiny() -> tuple[MoCo, Batch]:
    torch.manual_seed(0)
    backbone, channels = build_backbone("resnet18", "layer3")
    first, second = torch.randn(2, 4, 3, 64, 64)
    return MoCo(backbone, channels, MocoConfig(embedding_dim=16, queue_size=32)), Batch(first, second)


def gradients_of(detach_target: bool) -> tuple[float, dict[str, Tensor]]:
    """Fit loss of a batch, and what it alone sends to each parameter."""
    moco, batch = tiny()
    config = ReleasedConfig(enabled=True, detach_target=detach_target)
    branch = ReleasedBranch(256, RationaleConfig(detectors=8), config)
    losses = released_losses(moco, batch, NO_AUTOCAST, branch=branch, objective=INFONCE)
    assert losses.fit is not None
    losses.fit.backward()
    named = nn.ModuleDict({"moco": moco, "branch": branch}).named_parameters()
    return losses.fit.item(), {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def test_the_fit_loss_reaches_detectors_and_encoder() -> None:
    _, gradients = gradients_of(detach_target=True)
    assert gradients["branch.conv.weight"].any()
    assert gradients["moco.backbone.conv1.weight"].any()
    assert not any("head" in name or "key" in name for name in gradients)


def test_only_an_undetached_target_sends_gradient_through_the_gradcam() -> None:
    detached_loss, detached = gradients_of(detach_target=True)
    loss, released = gradients_of(detach_target=False)
    assert loss == pytest.approx(detached_loss)
    assert released["moco.head.0.weight"].any()  # the gradient's own gradient
    assert not any("key" in name for name in released)
    torch.testing.assert_close(released["branch.conv.weight"], detached["branch.conv.weight"])
    assert not torch.equal(released["moco.backbone.conv1.weight"], detached["moco.backbone.conv1.weight"])


@pytest.mark.parametrize("fit_axis", ["rows", "all"])
@pytest.mark.parametrize("detach_target", [False, True])
def test_a_detached_target_is_a_constant(detach_target: bool, fit_axis: Literal["rows", "all"]) -> None:
    config = ReleasedConfig(detach_target=detach_target, fit_axis=fit_axis)
    branch = ReleasedBranch(4, RationaleConfig(detectors=3), config)
    cam = torch.rand(2, 3, 3, requires_grad=True)
    branch.fit(branch.attention(torch.randn(2, 4, 3, 3)), cam).backward()
    assert (cam.grad is None) == detach_target


def test_a_step_takes_the_released_losses() -> None:
    moco, batch = tiny()
    branch = ReleasedBranch(256, RationaleConfig(detectors=8), ReleasedConfig(enabled=True))
    parameters = [p for p in (*moco.parameters(), *branch.parameters()) if p.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    loss, losses = train_step(
        moco,
        partial(released_losses, branch=branch, objective=INFONCE),
        torch.optim.SGD(parameters, lr=0.1),
        batch,
        fit_weight=0.01,
        key_momentum=0.99,
        autocast=NO_AUTOCAST,
    )
    assert losses.fit is not None
    assert losses.attention is not None
    assert loss.item() == pytest.approx(losses.contrast.item() + 0.01 * losses.fit.item())
    torch.testing.assert_close(losses.attention.sum(1), torch.ones(4))
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def test_the_running_statistics_move_as_by_the_three_updates_of_a_released_step() -> None:
    branch = ReleasedBranch(6, RationaleConfig(detectors=5), ReleasedConfig())
    features, once = torch.randn(4, 6, 3, 3), nn.BatchNorm2d(5)
    for _ in range(3):
        once(branch.conv(features))
    branch.attention(features)
    torch.testing.assert_close(branch.norm.running_mean, once.running_mean)
    torch.testing.assert_close(branch.norm.running_var, once.running_var)


@pytest.mark.parametrize("winners", [1, 4])
def test_effective_detectors_counts_the_winners_of_the_normalised_responses(winners: int) -> None:
    branch = ReleasedBranch(4, RationaleConfig(detectors=4), ReleasedConfig())
    nn.init.zeros_(branch.norm.bias)
    branch.conv.weight.data.copy_(torch.eye(4)[:, :, None, None])
    features = torch.eye(4)[None, :, :, None]  # detector k responds at position k alone
    if winners == 1:
        nn.init.constant_(branch.norm.bias[:1], 100)  # now the first is above the others everywhere
    assert branch.effective_detectors(features).item() == pytest.approx(winners)


def resnet50() -> dict[str, Tensor]:
    with torch.device("meta"):  # names and shapes, no memory
        model = torchvision.models.resnet50()
    return {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}


def branch_state() -> dict[str, Tensor]:
    norm = {f"bn16.{name}": torch.full((32,), 2.0) for name in ("weight", "bias", "running_mean", "running_var")}
    return {"conv16.weight": torch.ones(32, 2048, 1, 1), "bn16.num_batches_tracked": torch.tensor(7)} | norm


def released_moco() -> dict[str, Tensor]:
    encoder = {name: value for name, value in resnet50().items() if not name.startswith("fc.")}
    encoder |= {"fc.0.weight": torch.zeros(1), "fc.2.bias": torch.zeros(1)}
    others = {"queue": torch.zeros(2, 2), "queue_ptr": torch.zeros(1), "qmax.weight": torch.zeros(1)}
    others |= {"conv16_2.weight": torch.zeros(1), "bn16_2.bias": torch.zeros(1), "fc.weight": torch.zeros(1)}
    keys = {f"encoder_k.{name}": value - 1 for name, value in encoder.items()}
    return {f"encoder_q.{name}": value for name, value in encoder.items()} | keys | others | branch_state()


def test_training_goes_on_from_the_heads_of_a_released_byol_checkpoint(tmp_path: Path) -> None:
    settings, file = MocoConfig(objective="byol", embedding_dim=8), tmp_path / "byol.pt"
    theirs, ours = (MoCo(nn.Conv2d(3, 4, 3), 4, settings) for _ in range(2))
    assert theirs.predictor is not None
    heads = {"online_encoder.1.net": theirs.head, "online_predictor.net": theirs.predictor}
    state = {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}
    torch.save({"online_encoder.0.conv1.weight": torch.zeros(1), **state}, file)
    assert load_byol_heads(ours, file)
    for name in ("head", "predictor", "key_head"):
        expected = theirs.predictor if name == "predictor" else theirs.head
        torch.testing.assert_close(getattr(ours, name).state_dict(), expected.state_dict())
    with pytest.raises(UsageError, match="embedding_dim 16"):
        load_byol_heads(MoCo(nn.Conv2d(3, 4, 3), 4, replace(settings, embedding_dim=16)), file)
    torch.save({"conv1.weight": torch.zeros(1)}, file)
    assert not load_byol_heads(ours, file)
    assert not load_byol_heads(MoCo(nn.Conv2d(3, 4, 3), 4, MocoConfig(embedding_dim=8)), file)


def released_byol(*, numbered: bool) -> dict[str, Tensor]:
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    encoder = {}
    for name, value in resnet50().items():
        module, _, rest = name.partition(".")
        if module != "fc" or not numbered:
            encoder[f"{numbers[module] if numbered else module}.{rest}"] = value
    state = {f"online_encoder.0.{name}": value for name, value in encoder.items()}
    state |= {f"target_encoder.0.{name}": value - 1 for name, value in encoder.items()}
    others = {"online_encoder.1.0.weight": torch.zeros(1), "online_predictor.0.weight": torch.zeros(1)}
    return state | others | branch_state()


@pytest.mark.parametrize(
    "state",
    [released_moco, partial(released_byol, numbered=False), partial(released_byol, numbered=True)],
    ids=["moco", "byol by name", "byol by number"],
)
def test_released_checkpoints_load_whole(state: partial[dict[str, Tensor]]) -> None:
    renamed = from_released_checkpoint(state())
    backbone, channels = build_backbone("resnet50")
    branch = ReleasedBranch(channels, RationaleConfig(), ReleasedConfig())
    nn.ModuleDict({"backbone": backbone, "branch": branch}).load_state_dict(renamed, strict=True)
    assert not any(value.any() for value in backbone.state_dict().values())  # the query's zeros, not the key's
    assert branch.conv.weight.eq(1).all()
    assert branch.norm.weight.eq(2).all()
    assert branch.norm.num_batches_tracked == 7  # the statistics came along


def test_other_checkpoints_are_refused_by_their_keys() -> None:
    with pytest.raises(UsageError, match=r"not a released checkpoint .*bn1\.bias, bn1\.num_batches_tracked"):
        from_released_checkpoint(resnet50())


def test_a_branch_without_an_encoder_is_refused() -> None:
    with pytest.raises(UsageError, match="not a released checkpoint"):
        from_released_checkpoint(branch_state())


@pytest.mark.parametrize("kind", ["moco", "byol"])
def test_a_released_checkpoint_is_evaluated_as_it_is(kind: str, tmp_path: Path) -> None:
    backbone, channels = build_backbone("resnet50", stem_maxpool=kind == "moco")
    branch = ReleasedBranch(channels, RationaleConfig(), ReleasedConfig())
    theirs = {"moco": "module.encoder_q.", "byol": "online_encoder.0."}[kind]
    state = {f"{theirs}{key}": value for key, value in backbone.state_dict().items()}
    prefix = "module." if kind == "moco" else ""
    state[f"{prefix}conv16.weight"] = branch.conv.weight.detach()
    state |= {f"{prefix}bn16.{key}": value for key, value in branch.norm.state_dict().items()}
    torch.save({"state_dict": state} if kind == "moco" else state, tmp_path / "released.pth")
    encoder = load(tmp_path / "released.pth")
    loaded, loaded_branch = encoder.backbone, encoder.branch
    assert (encoder.facts["attention"], encoder.facts["stem_maxpool"]) == ("batch-minmax", kind == "moco")
    assert isinstance(loaded_branch, ReleasedBranch)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, expected = loaded.eval()(images), backbone.eval()(images)
        # another memory format, another order of the sums
        torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
        pooled = loaded_branch.eval().pool(expected).pooled
        torch.testing.assert_close(pooled, branch.eval().pool(expected).pooled, atol=1e-3, rtol=1e-4)
