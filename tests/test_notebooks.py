"""The notebooks of examples/: as they are committed, and run from the start in an empty folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
each_notebook = pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda file: file.stem)


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for cell in code_cells(notebook) for each in cell["outputs"]]


def kinds(cell: dict[str, Any]) -> set[str]:
    """What a cell puts out: text on a stream, or the best form of what it shows."""
    shown = {each.get("name") or min(each["data"]) for each in cell["outputs"]}
    return {"text" if kind in ("stdout", "text/plain", "text/html") else kind for kind in shown}


@each_notebook
def test_it_is_committed_as_it_ran_from_start_to_end(file: Path) -> None:
    text = file.read_text()
    cells = code_cells(json.loads(text))
    assert len(text) < 500_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert set().union(*map(kinds, cells)) == {"text", "image/jpeg"}  # no warnings, no errors
    for page in re.findall(r"\]\(([^)#\s]+)", "".join("".join(cell["source"]) for cell in json.loads(text)["cells"])):
        assert (file.parent / page).exists(), page


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("frozen_search", id="sample"), "own_images"])
def test_it_runs_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    before = [kinds(cell) for cell in code_cells(notebook)]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [kinds(cell) for cell in code_cells(notebook)] == before
    shown = "".join(each["data"].get("text/plain", "") for each in outputs(notebook) if "data" in each)
    (scores,) = re.findall(r"^│ (?:rationale|attention) +│(.*)│$", shown, re.MULTILINE)
    rank1 = [float(each.strip(" *")) for each in scores.split("│")][::2]  # before training, and after it; by chance 4
    assert len(rank1) == (1 if name == "frozen_search" else 2)
    assert 15 < rank1[0] <= rank1[-1]
