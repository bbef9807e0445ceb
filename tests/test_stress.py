"""What takes minutes to show: kills at any moment, and memory over thousands of steps."""

import json
import random
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch

from fastcr import train
from tests.shared import PLAIN, SHORT, TINY, start

STRESSED = [*TINY, *SHORT, "--optim.epochs", "100", "--run.save_minutes", "0"]


def steps_logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [pytest.param(3, id="sample"), 30])
def test_kills_at_random_moments_change_nothing(
    kills: int, flat: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL while it starts, trains and saves, after each step: the weights come out as those of a run in peace."""
    draw, steps = random.Random(0), 4 * kills
    flags = [*STRESSED, "--data.root", str(flat), "--run.steps", str(steps)]
    train.main(["synthetic", *flags, "--run.dir", str(tmp_path / "whole")])
    folder, reached = tmp_path / "killed", []
    for kill in range(kills):
        before, command = steps_logged(folder), ["-m", "fastcr.train", "synthetic", *flags, "--run.dir", str(folder)]
        process = start(*command, "--resume", "auto")
        if kill % 5 == 4:  # before it has begun
            time.sleep(draw.uniform(0, 1))
        else:
            deadline = time.monotonic() + 120
            while steps_logged(folder) <= before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors
        resume = folder / "resume.pt"
        reached.append(torch.load(resume, weights_only=True)["step"] if resume.exists() else 0)
    assert reached == sorted(reached)  # nothing that was saved is lost again
    assert len(set(reached)) > kills // 3
    with capsys.disabled():
        print(f"\nkilled {kills} times, after steps {reached} of {steps}")
    train.main(["synthetic", *flags, "--run.dir", str(folder), "--resume", "auto"])
    whole, killed = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))


def memory_of(process: int) -> int:
    """Bytes of main memory of a process and those it started; what they share is counted once.

    Without what is read of files: libraries' pages count for less while other programs use them too.
    """
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text().split("\n")
    own = sum(int(line.split()[1]) for line in rollup if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return own * 1024 + sum(memory_of(int(child)) for child in children)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "growth"), [pytest.param(100, 0.05, id="sample"), (2000, 0.02)])
def test_memory_stays_flat(steps: int, growth: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ResNet-18 on the drawn birds with a save a minute, from its second quarter to its last; saves come and go."""
    more = ["--run.steps", str(steps), "--run.save_minutes", "1", "--run.dir", str(tmp_path / "run")]
    more += ["--data.image_size", "32" if steps < 1000 else "64", "--optim.batch_size", "64", "--optim.epochs", "200"]
    command = ["-m", "fastcr.train", "synthetic", *PLAIN, *more, "--run.log_every", "1"]
    process, sizes = start(*command, fresh=True), dict[int, list[int]]()
    while process.poll() is None:
        if 0 < (step := steps_logged(tmp_path / "run")) < steps:
            try:
                sizes.setdefault(step * 4 // steps, []).append(memory_of(process.pid))
            except (OSError, ValueError):  # a process ended between two looks
                continue
        time.sleep(0.2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    quarters = [statistics.median(sizes[part]) for part in sorted(sizes)]
    with capsys.disabled():
        print(f"\n{steps} steps, MiB: {' '.join(f'{size / 2**20:.0f}' for size in quarters)}")
    assert abs(quarters[3] / quarters[1] - 1) < growth
