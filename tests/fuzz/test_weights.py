"""Broken checkpoints: what is read of them is what was saved, or they are refused."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from fastcr.encoders.encoder import load
from fastcr.runs.checkpoint import load_resume, load_weights, random_states, save_resume, save_weights
from tests.fuzz.damage import ARCHIVED, Damage
from tests.fuzz.properties import REFUSED, attempt, fuzzed, reading
from tests.shared import write_weights

FACTS = {"backbone": "resnet18", "detectors": 4, "mean": [0.5, 0.25, 0.125], "temperature": 0.4}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@cache
def checkpoints() -> tuple[dict[str, bytes], dict[str, Any], dict[str, torch.Tensor]]:
    """Checkpoints of every kind by their names, and what resume.pt and weights.safetensors hold."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(8, 4, generator=generator),
        "b.num": torch.tensor(7),
        "c": torch.randn(40, generator=generator),
    }
    optimizer = {"state": {0: {"momentum_buffer": state["a"] * 2}}, "param_groups": []}
    content = {"step": 5, "model": state, "optimizer": optimizer, "random": random_states(), "images": 9}
    halves = {f"module.{key}": value.half() for key, value in state.items()}
    released = {"conv16.weight": torch.ones(4, 2, 1, 1), "encoder_q.conv1.weight": torch.ones(2)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_resume(folder, content)
        save_weights(folder / "weights.safetensors", state, FACTS)
        torch.save({"state_dict": halves, "epoch": 3}, folder / "a.pth")
        torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
        safetensors.torch.save_file({"backbone.a": torch.ones(3)}, folder / "foreign.safetensors")
        torch.save(released, folder / "released.pth")
        write_weights(folder / "encoder.safetensors")
        return {file.name: file.read_bytes() for file in folder.iterdir()}, content, state


def broken(name: str) -> st.SearchStrategy[tuple[str, Damage]]:
    """A checkpoint's name, and the damage to it."""
    return st.tuples(st.just(name), ARCHIVED)


def written(folder: Path, name: str, damage: Damage) -> Path:
    (folder / name).write_bytes(damage(checkpoints()[0][name]))
    return folder / name


@fuzzed(sample=20, count=400, damage=ARCHIVED)
def test_resume_pt(folder: Path, damage: Damage) -> None:
    written(folder, "resume.pt", damage)
    loaded = reading(lambda: load_resume(folder), folder)
    assert loaded is REFUSED or same(checkpoints()[1], loaded[0]), "accepted, but not what was saved"


@fuzzed(sample=30, count=400, damage=ARCHIVED)
def test_weights_safetensors(folder: Path, damage: Damage) -> None:
    file = written(folder, "weights.safetensors", damage)
    reading(lambda: load_weights(file), folder)


@fuzzed(
    sample=30,
    count=400,
    spoilt=st.one_of(*map(broken, ["a.pth", "a.pth", "old.pth", "foreign.safetensors", "released.pth"])),
)
def test_foreign_weights(folder: Path, spoilt: tuple[str, Damage]) -> None:
    file = written(folder, *spoilt)
    state = reading(lambda: load_weights(file)[0], folder)
    if state is not REFUSED:
        assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())


@pytest.mark.parametrize(
    "change",
    [{"backbone": 5}, {"detectors": 10**7}, {"std": [1]}],
)
def test_facts_that_no_encoder_can_have_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(checkpoints()[0]["encoder.safetensors"])
    state, facts = load_weights(file)
    save_weights(file, state, facts | change)
    assert attempt(lambda: load(tmp_path)) is REFUSED
