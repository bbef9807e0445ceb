"""MoCo's queue and key encoder, and what one training step does to the encoder."""

import copy
import math
from collections import deque
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastcr.config import Config, MocoConfig, OptimConfig, RationaleConfig, RunConfig
from fastcr.data.views import Batch
from fastcr.encoders.backbone import mean_pool
from fastcr.encoders.rationale import RationaleHead, attention_entropy
from fastcr.method.build import Schedule
from fastcr.method.moco import MoCo, projection_head
from fastcr.method.objectives import infonce
from fastcr.method.step import Losses, contrast_losses, train_step

INFONCE = partial(infonce, temperature=0.2)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(queue_size: int = 10) -> MoCo:
    first = nn.Conv2d(3, 8, 3, stride=2, bias=False)
    backbone = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    return MoCo(backbone, 6, MocoConfig(embedding_dim=4, queue_size=queue_size))


def images(count: int = 5) -> Batch:
    return Batch(torch.randn(count, 3, 13, 13), torch.randn(count, 3, 13, 13))


def parameters(*modules: nn.Module) -> dict[str, Tensor]:
    return dict(nn.ModuleList(modules).named_parameters())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=8))
def test_the_queue_is_a_ring_that_drops_its_oldest(size: int, batches: list[int]) -> None:
    moco = tiny(size)
    model = deque(moco.queue[:, 0].tolist(), maxlen=size)
    for number, batch in enumerate(batches):
        keys = 100 * number + torch.arange(batch, dtype=torch.float32)
        moco.enqueue(keys[:, None].expand(-1, 4))
        model.extend(keys.tolist())
        assert moco.queue.eq(moco.queue[:, :1]).all(1).sum() == min(sum(batches[: number + 1]), size)  # whole rows
        # the position is that of the oldest key, the next to go
        assert moco.queue[:, 0].roll(-int(moco.queue_position)).tolist() == list(model)


def test_a_new_queue_is_random_unit_vectors_and_is_saved_with_its_position() -> None:
    moco = tiny(50)
    torch.testing.assert_close(moco.queue.norm(dim=1), torch.ones(50))
    assert len(moco.queue.unique(dim=0)) == 50
    moco.enqueue(torch.ones(7, 4))
    other = tiny(50)
    other.load_state_dict(moco.state_dict())
    assert torch.equal(other.queue, moco.queue)
    assert other.queue_position == 7


def test_heads_are_those_of_the_settings() -> None:
    assert projection_head(16, MocoConfig(head="linear"))[-1].out_features == 16  # a rotation: all angles are kept
    assert projection_head(16, MocoConfig())[-1].out_features == 256
    linear = projection_head(16, MocoConfig(head="linear", embedding_dim=8))
    weight = next(linear.parameters())
    torch.testing.assert_close(weight @ weight.T, torch.eye(8))  # orthogonal: angles between inputs are kept
    mlp = projection_head(16, MocoConfig(embedding_dim=8))
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_key_encoder_moves_towards_the_query_encoder(momentum: float) -> None:
    moco = tiny()
    queries, keys = parameters(moco.backbone, moco.head), parameters(moco.key_backbone, moco.key_head)
    assert queries.keys() == keys.keys()
    assert all(torch.equal(queries[name], keys[name]) for name in queries)
    with torch.no_grad():
        for query in queries.values():
            query.add_(torch.randn_like(query))
    before = copy.deepcopy(keys)
    moco.update_key_encoder(momentum)
    for name, key in keys.items():
        torch.testing.assert_close(key, momentum * before[name] + (1 - momentum) * queries[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "rationale"])
def test_gradients_of_pooled_features_are_channels_last_down_to_the_convolution(
    pooling: str, dtype: torch.dtype
) -> None:
    convolution = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen: list[Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = convolution(torch.randn(4, 3, 7, 8).contiguous(memory_format=torch.channels_last))
        features = F.relu6(made)
    made.register_hook(seen.append)
    features.register_hook(seen.append)
    branch = RationaleHead(6, RationaleConfig(detectors=3))
    pooled = mean_pool(features) if pooling == "mean" else branch.attended(features)
    back = torch.randn(4, 6)
    pooled.backward(back)
    of_features, of_made = seen
    assert pooled.dtype == torch.float32
    assert of_made.dtype == of_features.dtype == dtype
    assert of_made.is_contiguous(memory_format=torch.channels_last)
    expanded = pooling == "mean" and dtype == torch.float32
    assert of_features.stride() == ((6, 1, 0, 0) if expanded else (180, 1, 36, 6))
    weights = torch.full((4, 30), 1 / 30) if pooling == "mean" else branch.pool(features.detach()).attention
    weights = weights.view(4, 1, 5, 6)
    torch.testing.assert_close(pooled, (features.float() * weights).sum((2, 3)))
    torch.testing.assert_close(of_features.float(), back[:, :, None, None] * weights, rtol=1e-2, atol=1e-4)


def step(
    moco: MoCo, batch: Batch, branch: RationaleHead | None, *, fit_weight: float = 1.0, lr: float = 0.1
) -> tuple[Tensor, Losses]:
    trained = [p for p in (*moco.parameters(), *(branch.parameters() if branch else ())) if p.requires_grad]
    return train_step(
        moco,
        partial(contrast_losses, branch=branch, objective=INFONCE, cam_of="loss"),
        torch.optim.SGD(trained, lr=lr),
        batch,
        fit_weight=fit_weight,
        key_momentum=0.9,
        autocast=NO_AUTOCAST,
    )


def encoder_gradients(
    moco: MoCo, batch: Batch, *, stop_gradient: bool | None = None, fit_weight: float = 0.0
) -> dict[str, Tensor]:
    """Gradients of backbone and head after a step of a copy of `moco`; `stop_gradient` None: without a branch."""
    moco, branch = copy.deepcopy(moco), None
    if stop_gradient is not None:
        branch = RationaleHead(6, RationaleConfig(detectors=3, stop_gradient=stop_gradient))
    step(moco, batch, branch, fit_weight=fit_weight)
    named = parameters(moco.backbone, moco.head)
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def test_the_fit_weight_changes_the_encoder_only_without_stop_gradient() -> None:
    moco, batch = tiny(), images()
    plain = encoder_gradients(moco, batch)
    stopped = encoder_gradients(moco, batch, stop_gradient=True, fit_weight=3.0)
    torch.testing.assert_close(stopped, plain)
    flowing = encoder_gradients(moco, batch, stop_gradient=False, fit_weight=3.0)
    backbone = [name for name in plain if name.startswith("0.")]
    assert backbone
    for name in plain:  # module 0 is the backbone, 1 the head, which the fit does not pass
        assert torch.allclose(flowing[name], plain[name], rtol=1e-3, atol=1e-6) == (name not in backbone)


def test_detectors_learn_from_the_fit_alone() -> None:
    moco, batch = tiny(), images()
    branch = RationaleHead(6, RationaleConfig(detectors=3, stop_gradient=False))
    gradients = []
    for fit_weight in (0.0, 1.0, 2.0):
        step(copy.deepcopy(moco), batch, branch, fit_weight=fit_weight, lr=0.0)
        assert branch.weight.grad is not None
        gradients.append(branch.weight.grad.clone())
    assert not gradients[0].any()
    assert gradients[1].any()
    torch.testing.assert_close(gradients[2], 2 * gradients[1])


@pytest.mark.parametrize("with_branch", [False, True])
def test_a_step_trains_the_query_side_and_queues_the_keys(with_branch: bool) -> None:
    moco, batch = tiny(), images()
    branch = RationaleHead(6, RationaleConfig(detectors=3)) if with_branch else None
    before = copy.deepcopy(moco)
    loss, losses = step(moco, batch, branch, fit_weight=0.5)

    fit = 0.5 * losses.fit.item() if losses.fit is not None else 0.0
    assert loss.item() == pytest.approx(losses.contrast.item() + fit)
    assert (losses.fit is not None) == (losses.attention is not None) == with_branch
    assert not loss.requires_grad
    assert not losses.features.requires_grad

    old = parameters(before.backbone, before.head)
    new = parameters(moco.backbone, moco.head)
    keys = parameters(moco.key_backbone, moco.key_head)
    for name in old:
        assert not torch.equal(new[name], old[name])
        torch.testing.assert_close(keys[name], 0.9 * old[name] + 0.1 * new[name])  # after the optimizer's step
        assert keys[name].grad is None
    # the keys are those of the key encoder before its move, and negatives only from the next step on
    torch.testing.assert_close(losses.key, before.key(batch.second, NO_AUTOCAST))
    assert torch.equal(moco.queue[:5], losses.key)
    assert torch.equal(moco.queue[5:], before.queue[5:])


@pytest.mark.parametrize("with_branch", [False, True])
def test_the_contrast_loss_is_cross_entropy_against_key_and_queue(with_branch: bool) -> None:
    moco, batch = tiny(), images()
    branch = RationaleHead(6, RationaleConfig(detectors=3)) if with_branch else None
    losses = contrast_losses(moco, batch, NO_AUTOCAST, branch=branch, objective=INFONCE, cam_of="loss")
    query = F.normalize(moco.head(moco.backbone(batch.first).mean((2, 3))), dim=1)
    logits = torch.cat([(query * losses.key).sum(1, keepdim=True), query @ moco.queue.T], dim=1) / 0.2
    torch.testing.assert_close(losses.contrast, F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64)))


def test_the_learning_rate_rises_along_a_line_and_falls_along_half_a_cosine() -> None:
    plain = Schedule.of(Config(optim=OptimConfig(epochs=10, batch_size=10)), 100)
    assert [plain.share_of_rate(step) for step in (1, 51, 101)] == pytest.approx([1, 0.5, 0])
    config = Config(optim=OptimConfig(epochs=10, batch_size=10, warmup=0.1), run=RunConfig(steps=3))
    warmed = Schedule.of(config, 100)  # the rate follows the epochs where the run ends before them
    shares = [warmed.share_of_rate(step) for step in (1, 5, 10, 11, 56, 101)]
    assert shares == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_effective_detectors_is_one_for_a_single_winner_and_all_for_equal_wins(dtype: torch.dtype) -> None:
    branch = RationaleHead(4, RationaleConfig(detectors=4))
    branch.weight.data.copy_(torch.eye(4))
    branch.bias.data.zero_()
    features = torch.eye(4, dtype=dtype).expand(3, 4, 4)[..., None]  # detector k wins position k
    assert branch.effective_detectors(features).item() == pytest.approx(4)
    two = features[:, :, [0, 0, 0, 2]]
    assert branch.effective_detectors(two).item() == pytest.approx(4 / 3**0.75)  # shares 3/4 and 1/4
    branch.bias.data[1] = 10
    assert branch.effective_detectors(features).item() == pytest.approx(1)


def test_attention_entropy_is_log_of_the_positions_when_flat_and_zero_on_one() -> None:
    flat, single = torch.full((2, 49), 1 / 49), torch.eye(49)[:2]
    assert attention_entropy(flat).item() == pytest.approx(math.log(49))
    assert attention_entropy(single).item() == 0
    assert attention_entropy(torch.cat([flat, single])).item() == pytest.approx(math.log(49) / 2)
