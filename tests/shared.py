"""What tests of several files build on."""

import base64
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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


SVG = "{http://www.w3.org/2000/svg}"


def decoded(uri: str | None, kind: str) -> bytes:
    """Content of a data URI of an image."""
    start, _, content = (uri or "").partition(",")
    assert start == f"data:image/{kind};base64"
    return base64.b64decode(content, validate=True)


def curves_of(chart: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each curve of a chart, in its own units."""
    groups = [group for group in chart.iter(f"{SVG}g") if group.get("id", "").startswith("curve")]
    paths = [group.find(f"{SVG}path") for group in groups]
    found = [re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")) for path in paths if path is not None]
    return [[(float(x), float(y)) for x, y in points] for points in found]
