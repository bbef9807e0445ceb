"""How a step is carried out: in 16 bits, compiled, replayed, and never waiting for the device."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig, RunConfig
from fastcr.data.views import Batch
from fastcr.encoders.rationale import RationaleHead
from fastcr.method.build import Training, build
from fastcr.method.moco import MoCo
from fastcr.method.objectives import infonce
from fastcr.method.step import Losses, Replayed, contrast_losses, train_step
from fastcr.presets import PRESETS, preset
from fastcr.runs.context import Context
from fastcr.runs.machine import keep_compiled

INFONCE = partial(infonce, temperature=0.2)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# contrast and fit loss over 50 steps
NEAR = {"bf16": (4e-3, 3e-2), "fp32": (1e-4, 1e-3)}
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "to_cpu")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")

pytestmark = pytest.mark.usefixtures("one_thread")


def small(stop_gradient: bool) -> tuple[MoCo, RationaleHead]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    moco = MoCo(backbone, 6, MocoConfig(embedding_dim=4, queue_size=20))
    return moco.eval(), RationaleHead(6, RationaleConfig(detectors=3, cam_weights="own", stop_gradient=stop_gradient))


def one_step(
    moco: MoCo, branch: RationaleHead | None, batch: Batch, **options: Any
) -> tuple[dict[str, Tensor], Tensor, Losses]:
    """Weights, queue and statistics after a step of copies of the model; its loss and losses."""
    moco, branch = copy.deepcopy((moco, branch))
    model = nn.ModuleList([moco, branch] if branch else [moco])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    settings = {"fit_weight": 2.0, "key_momentum": 0.9, "autocast": torch.autocast("cpu", enabled=False)}
    loss_function = partial(contrast_losses, branch=branch, objective=INFONCE, cam_of="loss")
    loss, parts = train_step(moco, loss_function, optimizer, batch, **settings | options)  # type: ignore[arg-type]
    return model.state_dict(), loss, parts


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(*torch.randn(2, 12, 3, 13, 13))


def settings_of(**run: Any) -> Config:
    return Config(
        run=RunConfig(device=str(DEVICE), **run),
        data=DataConfig(image_size=64),
        model=ModelConfig(backbone="resnet18", last_stage="layer2", weights="none"),
        optim=OptimConfig(batch_size=16, lr=0.003),
        moco=MocoConfig(queue_size=128),
        # GradCAM by its sum, and with it what a batch's have in common, jumps where there is next to none: rounding
        # would not stay rounding
        rationale=RationaleConfig(stop_gradient=False, cam_of="loss", cam_keeps="match", cam_weights="own"),
    )


def context_of(config: Config) -> Context:
    return Context.of(config.run.device, config.run.precision)


def calm(training: Training) -> Training:
    """Small residual branches and few ReLUs near their kink: rounding stays rounding (see test_train)."""
    for name, module in training.moco.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.1 if name.endswith("bn2") else 1)
            nn.init.constant_(module.bias, 0 if name.endswith("bn2") else 3)
    return training


def losses_of(config: Config, steps: int = 50) -> Tensor:
    """Contrast and fit loss of each of several steps on four batches in turn: `[steps,2]`."""
    training = calm(build(config, context_of(config)))
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    torch.manual_seed(2)
    pictures = nn.functional.interpolate(2 * torch.randn(64, 3, 4, 4), size=(64, 64), mode="bilinear")
    views = (pictures + 0.3 * torch.randn(2, 64, 3, 64, 64)).to(DEVICE, dtype)
    batches = list(map(Batch, *(view.contiguous(memory_format=torch.channels_last).split(16) for view in views)))
    logged = []
    for step in range(steps):
        _, losses = training.step(batches[step % 4])
        assert losses.fit is not None
        logged.append(torch.stack([losses.contrast.detach(), losses.fit.detach()]).clone())
    return torch.stack(logged).cpu()


def assert_near(got: Tensor, expected: Tensor, precision: str) -> None:
    """No step's losses further off than the precision allows."""
    off = (got - expected).abs().amax(0)
    print(f"{precision}: losses off by at most", off.tolist())
    assert (off <= torch.tensor(NEAR[precision])).all(), off


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """The eager fp32 step with the references of the ops."""
    config = settings_of(precision="fp32", compile=False, kernels="torch")
    expected = losses_of(config)
    untrained = losses_of(replace(config, optim=replace(config.optim, lr=1e-9)))
    moved = (expected - untrained).abs().amax(0)
    print("moved by training", moved)
    assert (moved > 10 * torch.tensor(NEAR["bf16"])).all()
    return expected


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=() if CUDA else pytest.mark.slow)])
def test_fifty_steps_in_16_bits_stay_near_those_in_fp32(plain: Tensor, precision: str) -> None:
    assert_near(losses_of(settings_of(precision=precision, compile=False)), plain, precision)


@pytest.mark.slow
@pytest.mark.skipif(not (CUDA or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_those_of_eager_sample() -> None:
    eager = settings_of(precision="fp32", compile=False)
    compiled = replace(eager, run=replace(eager.run, compile=True))
    assert_near(losses_of(compiled, 8), losses_of(eager, 8), "fp32")


def test_nothing_in_a_step_asks_the_device_for_a_value(batch: Batch) -> None:
    """On a GPU each of these would wait for all that was launched before."""
    moco, branch = small(False)
    one_step(moco, branch, batch)
    with profile() as recorded:
        one_step(moco, branch, batch)
    called = {event.key for event in recorded.key_averages()}
    assert "aten::convolution" in called
    assert not called & {f"aten::{name}" for name in WAITS}


class Capturing(TorchDispatchMode):
    """A CUDA graph being captured, as far as a CPU can tell: what would wait for the device is an error."""

    def __init__(self, *unused: Any, **options: Any) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().removeprefix("aten::") in WAITS:
            raise RuntimeError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A stand-in for CUDA's graphs; gives the graph."""
    graph = mock.Mock()
    for name, stand_in in {"Stream": mock.Mock(), "CUDAGraph": lambda: graph, "graph": Capturing}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return graph


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_step_of_every_preset_can_be_captured(name: str, replays: mock.Mock) -> None:
    config = preset(name)
    model = ModelConfig("resnet18", "layer2", weights="none", batchnorm=config.model.batchnorm)
    training = build(
        replace(
            config,
            model=model,
            data=DataConfig(image_size=32),
            optim=replace(config.optim, batch_size=4),
            moco=replace(config.moco, queue_size=8),
        ),
        Context(),
    )
    step = Replayed(training.step)
    for _ in range(6):
        step(Batch(*torch.randn(2, 4, 3, 32, 32), torch.arange(4)))
    assert replays.replay.call_count == 3


def test_a_step_that_cannot_be_captured_goes_on_as_it_is_or_is_an_error(batch: Batch, replays: mock.Mock) -> None:
    moco, _ = small(False)

    def waits(batch: Batch) -> tuple[Tensor, Losses]:
        loss = batch.first.sum()
        loss.item()
        return loss, Losses(loss, None, None, batch.first, moco.queue)

    said: list[str] = []
    step = Replayed(waits, said.append)
    assert [step(batch)[0].item() for _ in range(5)] == [batch.first.sum().item()] * 5
    assert len(said) == 1
    assert "_local_scalar_dense waits" in said[0]
    step = Replayed(waits)
    for _ in range(step.WARM_UP):
        step(batch)
    with pytest.raises(RuntimeError, match="waits for the device"):
        step(batch)
    assert not replays.replay.called


@pytest.mark.parametrize(
    ("before", "after"),
    [("{temp}/torchinductor_me", "{cache}/fastcr/compiled"), ("/my/own", "/my/own")],
)
def test_compiled_encoders_are_kept_where_a_reboot_leaves_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    places = {"cache": tmp_path, "temp": tempfile.gettempdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before.format(**places))
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == after.format(**places)


@needs_cuda
def test_no_step_waits_for_the_device() -> None:
    config = settings_of(precision="bf16", compile=False)
    training = build(config, context_of(config))
    views = torch.randn(32, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last).split(16)
    training.step(Batch(*views))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            training.step(Batch(*views))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("way", [{"cuda_graph": True}, {"cuda_graph": True, "compile": True}])
def test_replayed_steps_are_those_of_eager(plain: Tensor, way: dict[str, Any]) -> None:
    config = settings_of(precision="fp32", kernels="torch")
    assert_near(losses_of(replace(config, run=replace(config.run, **{"compile": False} | way))), plain, "fp32")


@needs_cuda
def test_a_replayed_step_takes_the_learning_rate_of_the_moment() -> None:
    config = settings_of(precision="fp32", cuda_graph=True, compile=False)
    training = build(config, context_of(config))
    views = torch.randn(32, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last).split(16)
    for _ in range(5):
        training.step(Batch(*views))
    training.optimizer.param_groups[0]["lr"].fill_(0)
    before = copy.deepcopy(training.moco.backbone.state_dict())
    training.step(Batch(*views))
    for name, parameter in training.moco.backbone.named_parameters():
        assert torch.equal(parameter, before[name])
