"""README and docs: every link, command and flag in them is there, and the README's Python runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastcr import Config, preset
from fastcr.__main__ import COMMANDS
from fastcr.arguments import EvaluateConfig
from fastcr.data.layouts import read_splits
from fastcr.presets import PRESETS
from fastcr.runs import command_line
from tests.shared import write_weights

ROOT = Path(__file__).parents[1]
# all but the tables that bench/evidence_table.py writes, and the history
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md", "tests/ptx/README.md")
    ),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if "tables" not in page.name),
]
pytestmark = pytest.mark.usefixtures("one_thread")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


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


def flags_of(settings: type) -> set[str]:
    sections = {each.name: each.default_factory for each in dataclasses.fields(settings)}
    return {
        f"--{name}.{each.name}"
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for each in dataclasses.fields(section)
    }


def code_of(page: Path) -> str:
    """What a page shows as code, blocks and words in a line, each from the start of a line."""
    blocks = re.findall(r"```\w*\n(.*?)```|`([^`]+)`", page.read_text(), re.DOTALL)
    return "\n".join(block or " ".join(words.split()) for block, words in blocks)


@each_page
def test_commands_and_flags_are_there(page: Path) -> None:
    text = code_of(page)
    known = flags_of(Config) | flags_of(EvaluateConfig) | {"--data.classes", "--data.skip", "--section.field"}
    assert "--rationale.cam_keeps" in known
    assert set(re.findall(r"--[a-z]+\.[a-z_]+", text)) <= known
    assert set(re.findall(r"^fastcr (\w+)", text, re.MULTILINE)) <= set(COMMANDS)
    assert set(re.findall(r"-m fastcr\.(\w+)", text)) <= set(COMMANDS)
    presets = re.findall(r"(?:^fastcr |-m fastcr\.)(?:train|trace) ([a-z][\w-]*)", text, re.MULTILINE)
    assert set(presets) <= set(PRESETS)
    for script in re.findall(r"(?:bench|examples|kernels|tests)/\w+\.(?:py|sh)", text):
        assert (ROOT / script).is_file(), script


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """The fastcr commands of a page's bash blocks, with their arguments."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"^(?:.* && )?(?:fastcr |(?:python|torchrun.*) -m fastcr\.)(\w+)(.*)$", blocks, re.MULTILINE)
    return [(command, shlex.split(args, comments=True)) for command, args in found]


class Parsed(Exception):  # noqa: N818 (it is no error)
    """Raised in place of what a command would do with its settings."""


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_every_command_of_a_block_is_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = command_line.parse

    def only_parse(*args: Any, prog: str, **options: Any) -> Any:
        settings = real(*args, prog=prog, **options)
        if prog == "config.yaml":  # of a run to resume
            return settings
        raise Parsed

    monkeypatch.chdir(tmp_path)
    for command, args in commands_of(page):
        if "--resume" in args and (run := args[args.index("--resume") + 1]) != "auto":
            Path(run).mkdir(parents=True, exist_ok=True)
            command_line.save_config(preset("folder"), Path(run, "config.yaml"))
        module = import_module(f"fastcr.{command}")
        for home in [each for name, each in sys.modules.items() if name.startswith("fastcr.")]:
            if getattr(home, "parse", None) is real:  # wherever it was imported
                monkeypatch.setattr(home, "parse", only_parse)
        try:
            module.main(args)
        except Parsed:
            continue
        except SystemExit:
            pytest.fail(f"fastcr {command} {shlex.join(args)}: {capsys.readouterr().err}")
        pytest.fail(f"fastcr {command} read no settings")


def test_the_readme_names_every_command_and_holds_two_that_install() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"^pip install -e .*", text, re.MULTILINE) == [
        'pip install -e ".[dali,demo]" && python -m fastcr.train',
        'pip install -e ".[dali,test]" && pytest -n auto',
    ]
    assert [each for each in COMMANDS if f"`fastcr {each}" not in text] == []


def test_the_first_python_of_the_readme_runs(birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    weights = write_weights(tmp_path / "weights.safetensors")
    code, named = re.subn(r'load\(".*?"\)', f"load({str(weights)!r})", code)
    assert named == 1
    images = read_splits(birds).train
    files, labels = [images.path(index) for index in range(0, 40, 4)], torch.arange(10) % 2
    found = {"files": files, "labels": labels}
    exec(compile(code, "README.md", "exec"), found)
    attention: torch.Tensor = found["attention"]  # type: ignore[assignment]
    assert attention.shape[0] == 10
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(10))
    assert "rank1" in capsys.readouterr().out


def test_the_loop_of_the_readme_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    encoder = torch.nn.Conv2d(3, 512, 8, stride=8)
    found = {
        "images": torch.rand(4, 3, 32, 32),
        "key": torch.nn.functional.normalize(torch.rand(4, 16), dim=1),
        "encoder": encoder,
        "projection": torch.nn.Linear(512, 16),
        "contrast_loss": lambda projected, key: -(projected * key).sum(1).mean(),
    }
    exec(compile(code, "README.md", "exec"), found)
    found["loss"].backward()  # type: ignore[attr-defined]
    assert encoder.weight.grad is not None
    assert found["embedding"].shape == (4, 512)  # type: ignore[attr-defined]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert citation["version"] == version[1]
    assert citation["preferred-citation"]["title"] in " ".join((ROOT / "README.md").read_text().split())
