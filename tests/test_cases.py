"""Trouble from the world outside: scripts that build an input and exit 0 where fastcr does what its user expects.

They lie in `cases` of the folder that FASTCR_TEST_DATA names; 77 says that this machine cannot try one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = Path(os.environ.get("FASTCR_TEST_DATA", "nowhere")) / "cases"
QUICK = ("01", "02", "04", "05", "09", "10", "12", "14", "24", "30", "52")  # no training: seconds each
# where what the scripts look into lies today
MOVED = {
    "from fastcr.folders import read_rgb": "from fastcr.data.images import read_rgb",
    "from fastcr.embed_folder import main": "from fastcr.embed import main",
    " --format npy ": " ",  # there is no other
}
GONE = {"50": "it makes the loaders by hand, as another version took them; tests/data/test_pixels.py compares them"}


def named(case: Path) -> object:
    return pytest.param(case, id=f"{'sample-' if case.name[:2] in QUICK else ''}{case.stem}")


@pytest.mark.slow  # minutes
@pytest.mark.skipif(not CASES.is_dir(), reason="FASTCR_TEST_DATA names no folder with cases")
@pytest.mark.parametrize("case", map(named, sorted(CASES.glob("*.sh"))))
def test_case(case: Path) -> None:
    if case.name[:2] in GONE:
        pytest.skip(GONE[case.name[:2]])
    script = case.read_text()
    for before, today in MOVED.items():
        script = script.replace(before, today)
    # some go to another folder before they call python
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
