"""What tests of several files build on."""

from pathlib import Path
from typing import Any

import torch

from fastcr.config import Config, DataConfig, ModelConfig, RationaleConfig, ReleasedConfig
from fastcr.method.encoder import new_encoder
from fastcr.runs.checkpoint import save_weights


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
        released=ReleasedConfig(enabled=released),
        data=DataConfig(image_size=image_size),
    )
    encoder = new_encoder(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(file, encoder.state_dict(), encoder.facts)
    return file
