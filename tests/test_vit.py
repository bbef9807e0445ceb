"""The presets with a ViT: what is trained and at which rate, what is measured, and the page's command for DINOv2."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastcr
from bench import protocol
from fastcr import embed, evaluate, train
from fastcr.data.layouts import read_splits
from fastcr.runs.command_line import load_config, read_command_line
from tests.bench.test_evidence import in_process

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
BACKBONE = "--model.backbone timm:"
CPU = ["--run.device", "cpu", "--data.workers", "0"]
PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def test_a_vit_is_tuned_in_its_last_blocks_and_measured_by_its_class_token(birds: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    run, backbone, weights = tmp_path / "run", "timm:test_vit", str(tmp_path / "vit.pth")
    train.main(
        ["folder", "--data.root", str(birds), "--model.backbone", backbone, "--model.weights", weights, *CPU,
         "--run.dir", str(run), "--data.image_size", "64", "--optim.batch_size", "16", "--optim.epochs", "6",
         "--optim.lr", "3e-3", "--moco.embedding_dim", "32", "--optim.tuned", "1"]
    )  # fmt: skip
    losses = [json.loads(line)["contrast_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert load_config(run / "config.yaml").optim.backbone_lr == pytest.approx(3e-4)
    first, last = (fastcr.load(run / file) for file in ("init.safetensors", "weights.safetensors"))
    moved = [
        key
        for key, value in last.backbone.named_parameters()
        if not torch.equal(value, first.backbone.get_parameter(key))
    ]
    half = len(last.backbone.timm.blocks) // 2
    assert {key.split(".")[2] for key in moved if "blocks" in key} == {str(n) for n in range(half, 2 * half)}
    assert {"timm.norm.weight", f"timm.blocks.{half}.norm1.weight"} <= set(moved)
    assert "timm.pos_embed" not in moved
    evaluate.main([str(run), *CPU, "--all", "--linear.enabled", "False"])
    results = json.loads((run / "results.json").read_text())
    assert results["retrieval"].keys() == results["frozen_init"]["retrieval"].keys() >= {"mean", "rationale", "cls"}

    embed.main([str(run), str(birds / "test"), "--pooling", "cls", *CPU, "--out", str(tmp_path / "out")])
    images = read_splits(birds / "test").train
    tokens = torch.stack([last.transform(images.rgb(index)) for index in range(len(images))])
    expected = F.normalize(last.with_class_token(tokens)[1], dim=1)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out" / "cls.npy")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ("", 3e-5),
        ("--optim.backbone_lr 1e-4", 1e-4),
        ("--model.weights none", None),
        (f"{BACKBONE}convnext_atto", None),
    ],
)
def test_a_pretrained_vit_is_tuned_at_a_tenth_of_the_rate(flags: str, rate: float | None) -> None:
    given = f"folder --data.root . {BACKBONE}vit_small_patch14_dinov2 {flags}"
    config, _ = read_command_line(given.split())
    assert (config.optim.lr, config.optim.backbone_lr) == (3e-4, rate and pytest.approx(rate))


def test_the_pages_command_tunes_dinov2_on_half_of_the_kinds_and_measures_the_other_half(
    birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, small pictures and one step."""
    (block,) = (each for each in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL) if "dinov2" in each)
    command = block.replace("\\\n", " ").replace("DIR", str(birds))
    small = "--model.weights none --data.image_size 56 --run.steps 1 --optim.batch_size 4 --run.precision fp32"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(protocol, "carry_out", in_process)
    own, training = shlex.split(command)[2:], [*small.split(), *CPU]
    at = own.index("--")
    protocol.main([*own[:at], "--seeds", "0", "--run.device", "cpu", *own[at:], *training])
    scores = json.loads(Path("dinov2-small/protocol.json").read_text())["runs"]["seed0"]["other kinds"]
    assert scores.keys() == {"0", "0.5", "0.75", "1"}
    assert scores["1"].keys() >= {"mean", "attention", "cls", "cls, k-reciprocal"}
    assert load_config(Path("dinov2-small/seed0/config.yaml")).model.backbone == "timm:vit_small_patch14_dinov2.lvd142m"
