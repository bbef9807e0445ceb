"""Files are replaced whole or not at all, through failures and kills, and come back as they were written."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import (
    load_resume,
    load_weights,
    random_states,
    save_resume,
    save_weights,
    set_random_states,
    write_whole,
)

FACTS = {"backbone": "resnet18", "detectors": 4, "mean": [0.5, 0.25, 0.125], "temperature": 0.4}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_failed_write_keeps_the_old_file_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def half(beside: Path) -> None:
        beside.write_text("ne")
        raise RuntimeError("PytorchStreamWriter failed")

    with pytest.raises(UsageError, match=f"cannot save {file}: .*what was there before is untouched"):
        write_whole(file, half)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_weights_come_back_with_their_facts(tmp_path: Path) -> None:
    file, generator = tmp_path / "weights.safetensors", torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    state = {
        "fp32": image,
        "bf16": image.bfloat16(),
        "channels_last": image.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "count": torch.tensor(7),
    }
    save_weights(file, state, FACTS)
    loaded, facts = load_weights(file)
    assert facts == FACTS
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        expected = value.detach().float() if value.is_floating_point() else value
        assert torch.equal(loaded[key], expected), key
        assert loaded[key].dtype == expected.dtype
        assert not loaded[key].requires_grad
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("bf16").dtype == torch.bfloat16  # stored as it was
    save_weights(file, state, FACTS | {"crc32": "0a0a0a0a"})  # as earlier versions wrote it
    assert load_weights(file)[1] == FACTS


def test_resume_state_comes_back_and_so_do_the_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    content = {"step": 5, "model": {"a": torch.randn(4)}, "random": random_states()}
    expected = torch.rand(3)
    save_resume(tmp_path, content)
    torch.manual_seed(99)
    loaded, file = load_resume(tmp_path)
    assert file == tmp_path / "resume.pt"
    assert (loaded["step"], loaded["model"]["a"].tolist()) == (5, content["model"]["a"].tolist())  # type: ignore[index]
    set_random_states(loaded["random"])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_saves_are_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refused)
    for step in range(1, 6):
        save_resume(tmp_path, {"step": step, "model": {}})
    assert names(tmp_path) == ["resume.1.pt", "resume.pt"]
    assert [torch.load(tmp_path / name, weights_only=True)["step"] for name in names(tmp_path)] == [4, 5]


def test_a_damaged_save_is_noticed_and_the_one_before_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    for step in (1, 2):
        save_resume(tmp_path, {"step": step, "model": {"a": torch.randn(5000)}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the numbers: torch alone would load it
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["step"] == 2
    state, file = load_resume(tmp_path)
    assert (state["step"], file.name) == (1, "resume.1.pt")
    file.unlink()
    with pytest.raises(UsageError, match=r"resume\.pt is broken: it is not what was written"):
        load_resume(tmp_path)


# The child imports once and forks a writer for each line it reads: a kill costs milliseconds, not an import of torch.
# Every tensor of a file holds its generation, so that a mixture of two files would show.
WRITERS = """
import os, sys
from pathlib import Path
import torch
from fastcr.runs.checkpoint import save_resume, save_weights
folder = Path(sys.argv[1])
torch.set_num_threads(1)
for first in map(int, sys.stdin):
    writer = os.fork()
    if writer == 0:
        generation = first
        while True:
            state = {str(i): torch.full((50_000,), generation, dtype=torch.float32) for i in range(4)}
            save_resume(folder, {"step": generation, "model": state})
            save_weights(folder / "weights.safetensors", state, {"generation": generation})
            generation += 1
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("gone", flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(400, marks=pytest.mark.slow)])
def test_kill_while_saving_always_leaves_whole_files(kills: int, tmp_path: Path) -> None:
    delay = random.Random(0)
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        generation, cut_off = 0, 0
        for kill in range(kills):
            server.stdin.write(f"{generation + 1}\n")
            server.stdin.flush()
            writer = int(server.stdout.readline())
            while kill == 0 and not (tmp_path / "weights.safetensors").exists():
                time.sleep(0.001)
            time.sleep(delay.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
            assert server.stdout.readline() == "gone\n"

            resume, file = load_resume(tmp_path)
            assert file.name == "resume.pt"  # there is a whole one under this name at any time
            if (before := tmp_path / "resume.1.pt").exists():
                assert torch.load(before, weights_only=True)["step"] in range(resume["step"] - 1, resume["step"] + 1)
            state, facts = load_weights(tmp_path / "weights.safetensors")
            for tensors, number in ((resume["model"], resume["step"]), (state, facts["generation"])):
                assert {float(value) for tensor in tensors.values() for value in tensor[[0, -1]]} == {number}
            assert generation <= resume["step"]
            assert facts["generation"] <= resume["step"]  # saved second
            generation = resume["step"]
            leftovers = [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]
            cut_off += bool(leftovers)
            for leftover in leftovers:
                leftover.unlink()
        server.stdin.close()
    assert cut_off, "no kill met a save half-way, so nothing was tested"
