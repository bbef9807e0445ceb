"""README and docs: the links lead somewhere, commands and flags are there, and the README's Python runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

from fastcr import Config
from fastcr.__main__ import COMMANDS
from fastcr.arguments import EvaluateConfig, check_arguments
from fastcr.data.layouts import read_splits
from tests.shared import write_weights

ROOT = Path(__file__).parents[1]
NAMED = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md", "bench/README.md", "tests/ptx/README.md"),
)
PAGES = [*(ROOT / name for name in NAMED), *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.usefixtures("one_thread")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each_page
def test_flags_and_scripts_are_there(page: Path) -> None:
    blocks = re.findall(r"```\w*\n(.*?)```|`([^`]+)`", page.read_text(), re.DOTALL)
    code = "\n".join(block or " ".join(words.split()) for block, words in blocks)
    known = {"--data.classes", "--data.skip", "--section.field"} | {
        f"--{section.name}.{each.name}"
        for settings in (Config, EvaluateConfig)
        for section in dataclasses.fields(settings)
        if dataclasses.is_dataclass(section.default_factory)
        for each in dataclasses.fields(section.default_factory)
    }
    assert set(re.findall(r"--[a-z]+\.[a-z_]+", code)) <= known
    for script in re.findall(r"(?:bench|examples|kernels|tests)/\w+\.(?:py|sh)", code):
        assert (ROOT / script).is_file(), script


@each_page
def test_every_command_of_a_block_is_understood(page: Path) -> None:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    commands = re.findall(r"^(?:.* && )?(?:fastcr |(?:python|torchrun.*) -m fastcr\.)(\w+)(.*)$", blocks, re.MULTILINE)
    for command, args in commands:
        assert command in COMMANDS
        check_arguments(command, shlex.split(args, comments=True))


def test_the_first_python_of_the_readme_runs(birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    weights = write_weights(tmp_path / "weights.safetensors")
    code, named = re.subn(r'load\(".*?"\)', f"load({str(weights)!r})", code)
    assert named == 1
    images = read_splits(birds).train
    files, labels = [images.path(index) for index in range(0, 40, 4)], torch.arange(10) % 2
    exec(compile(code, "README.md", "exec"), {"files": files, "labels": labels})
    assert "rank1" in capsys.readouterr().out


def test_the_loop_of_the_readme_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    found = {
        "images": torch.rand(4, 3, 32, 32),
        "key": torch.nn.functional.normalize(torch.rand(4, 16), dim=1),
        "encoder": torch.nn.Conv2d(3, 512, 8, stride=8),
        "projection": torch.nn.Linear(512, 16),
        "contrast_loss": lambda projected, key: -(projected * key).sum(1).mean(),
    }
    exec(compile(code, "README.md", "exec"), found)
    found["loss"].backward()  # type: ignore[attr-defined]
    assert found["encoder"].weight.grad is not None  # type: ignore[attr-defined]
    assert found["embedding"].shape == (4, 512)  # type: ignore[attr-defined]
