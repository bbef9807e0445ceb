"""What tests of several files build on."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastcr.config import Config, DataConfig, ModelConfig, RationaleConfig
from fastcr.data.images import ImageList
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.encoder import Encoder, describe
from fastcr.encoders.rationale import RationaleHead
from fastcr.encoders.released import ReleasedBranch
from fastcr.runs.checkpoint import save_weights
from tests.forked import Forked

ROOT = Path(__file__).parent.parent


def new_encoder(config: Config) -> Encoder:
    """An encoder as `config` says, with random weights."""
    backbone, channels = build_backbone(config.model.backbone, config.model.last_stage)
    branch = RationaleHead(channels, config.rationale) if config.rationale.enabled else None
    return Encoder(backbone, branch, describe(config))


def write_noise(folder: Path, *, broken: int) -> ImageList:
    """Write 24 small pictures of coarse noise into a folder, one of which cannot be read; without labels."""
    rng, files = np.random.default_rng(0), [f"{i:02d}.png" for i in range(24)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((40, 36)).save(folder / file)
    (folder / files[broken]).write_bytes(b"broken")
    return ImageList(folder, tuple(files), None, ())


def write_weights(
    file: Path,
    rationale: RationaleConfig | None = None,
    *,
    backbone: str = "resnet18",
    last_stage: Any = "layer3",
    released: bool = False,
    image_size: int = 32,
    seed: int = 0,
) -> Path:
    """Write, and return, a weights file of a small random encoder; four detectors unless `rationale` says otherwise."""
    torch.manual_seed(seed)
    config = Config(
        model=ModelConfig(backbone=backbone, last_stage=last_stage),
        rationale=rationale or RationaleConfig(detectors=4),
        data=DataConfig(image_size=image_size),
    )
    encoder = new_encoder(config)
    if released:  # with the branch of the authors' checkpoints
        network, channels = build_backbone(backbone, last_stage)
        branch = ReleasedBranch(channels, config.rationale.detectors)
        encoder = Encoder(network, branch, encoder.facts | {"attention": "batch-minmax"})
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(file, encoder.state_dict(), encoder.facts)
    return file


def decoded(uri: str | None, kind: str) -> bytes:
    """Content of a data URI of an image."""
    start, _, content = (uri or "").partition(",")
    assert start == f"data:image/{kind};base64"
    return base64.b64decode(content, validate=True)


# MoCo v2 of a small network with random weights, whatever the recipe of the preset
PLAIN = [
    "--model.backbone", "resnet18", "--model.last_stage", "layer3", "--model.weights", "none",
    "--model.frozen_stages", "0", "--run.precision", "fp32", "--optim.optimizer", "sgd", "--optim.lr", "0.03",
    "--views.key", "same", "--views.jitter", "1", "--views.grey", "0.2", "--views.blur", "0.5",
    "--moco.objective", "infonce", "--moco.head", "mlp", "--moco.temperature", "0.2", "--moco.key_momentum", "0.99",
    "--rationale.cam_keeps", "mismatch", "--rationale.lr", "None",
    "--rationale.init", "random", "--moco.pooling", "mean",
]  # fmt: skip
# a run that takes a second; what is named again after it counts
TINY = [
    *PLAIN, "--data.image_size", "32", "--data.loader", "torch", "--data.workers", "0", "--run.device", "cpu",
    "--optim.batch_size", "8", "--moco.queue_size", "16", "--run.log_every", "1",
]  # fmt: skip
SHORT = ["--optim.epochs", "4", "--moco.queue_size", "20", "--moco.embedding_dim", "16", "--rationale.detectors", "4"]


def start(*command: object, session: bool = False, fresh: bool | None = None, **environment: str) -> Any:
    """`python COMMAND...` in a process of its own, with one thread: sums in another order would be other sums.

    A `subprocess.Popen`, or a `Forked`, which need not import torch again: by default for `-m fastcr.X`, or where
    `fresh` is False; never on a machine with a GPU.
    """
    words = [*map(str, command)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    if fresh is None:
        fresh = words[0] != "-m" or not words[1].startswith("fastcr.")
    if not fresh and not torch.cuda.is_available():
        return Forked(words, variables, session)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], **pipes, text=True, start_new_session=session, env=variables)


def wait_for(holds: Callable[[], object], *processes: Any, seconds: float = 120) -> None:
    """Return when `holds` does; an error, with what they have said, if one of the processes ends before."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    if not holds():
        raise AssertionError([process.communicate(timeout=10) for process in processes if process.poll() is not None])


def records(folder: Path) -> list[dict[str, float]]:
    """What a run has logged; nothing before it has begun."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_calm_weights(file: Path) -> Path:
    """Write, and return, weights with which rounding stays rounding: small residual branches, few ReLUs at their kink.

    From the default random weights training itself makes 1e-2 out of a change of 1e-7 in the queries, in five steps.
    """
    torch.manual_seed(0)
    backbone, _ = build_backbone("resnet18", "layer3")
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            closes_a_block = name.endswith("bn2")
            torch.nn.init.constant_(module.weight, 0.1 if closes_a_block else 1)
            torch.nn.init.constant_(module.bias, 0 if closes_a_block else 3)
    torch.save(backbone.state_dict(), file)
    return file


class Trap:
    """Pickles to a call of `os.mkdir`: what a file with code in it looks like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)
