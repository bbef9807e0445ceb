"""The one command for a machine with a GPU: shares of time, stages that overrun or fail, a rehearsal on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import conftest, gpu_stages, on_gpu
from fastcr.config import Config, OptimConfig
from fastcr.runs.command_line import save_config

SCRIPT = [sys.executable, on_gpu.__file__]
WAIT = "import time; time.sleep(60)"


@pytest.fixture
def run_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run Python snippets as stages within `seconds`; how each ended, as summary.json says it."""

    def run(seconds: float, **snippets: str) -> dict[str, Any]:
        monkeypatch.setattr(on_gpu, "LEAST", 0.0)
        monkeypatch.setattr(on_gpu, "GRACE", 4.0)
        stages = [
            on_gpu.Stage(name, [sys.executable, "-S", "-c", snippet, str(tmp_path / name)], tmp_path / name)
            for name, snippet in snippets.items()
        ]
        returned = on_gpu.run_all(stages, tmp_path, time.monotonic() + 4.0 + seconds, {}, Console(quiet=True))
        written = json.loads((tmp_path / "summary.json").read_text())["stages"]
        assert written == [each._asdict() for each in returned]
        return {each["stage"]: each for each in written}

    return run


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('done'); "


def test_an_overrunning_stage_is_stopped_and_every_result_stays(run_all: Any, tmp_path: Path) -> None:
    on_sigint = (
        "import sys, pathlib, time\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path(sys.argv[1]).write_text('half'); raise SystemExit(2)"
    )
    start = time.monotonic()
    ended = run_all(6.0, tests=WRITE + "print('fine')", ops=on_sigint, steps="raise SystemExit('broken')")
    assert time.monotonic() - start < 20
    assert {name: each["status"] for name, each in ended.items()} == {
        "tests": "passed",
        "ops": "cut off",
        "steps": "failed",
    }
    assert [each["file"] for each in ended.values()] == ["tests", "ops", None]
    assert (tmp_path / "ops").read_text() == "half"
    assert ended["steps"]["note"] == "broken"
    assert "fine" in (tmp_path / "log.txt").read_text()


def test_a_stage_that_ignores_sigint_is_killed_with_its_processes(run_all: Any, tmp_path: Path) -> None:
    deaf = (
        "import signal, subprocess, sys, pathlib; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {WAIT!r}])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); child.wait()"
    )
    assert run_all(1.0, training=deaf)["training"]["status"] == "cut off"
    child = Path("/proc", (tmp_path / "training").read_text())
    for _ in range(100):
        if not child.exists() or ") Z " in (child / "stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the stage is still there")


def test_without_time_a_stage_is_skipped_and_an_old_result_is_not_taken_for_its_own(
    run_all: Any, tmp_path: Path
) -> None:
    (tmp_path / "tests").write_text("old")
    ended = run_all(0.6, tests=WAIT, tune=WAIT)
    assert (ended["tests"]["status"], ended["tests"]["file"]) == ("cut off", None)
    assert (ended["tune"]["status"], ended["tune"]["note"]) == ("skipped", "no time was left")


def test_a_report_is_counted_and_its_failures_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    whole = (  # the last test was interrupted
        "<testsuites><testsuite tests='4' failures='1' errors='1' skipped='1'><testcase name='a'/><testcase name='b'>"
        "<failure message='1 is&#10;not 2'/></testcase><testcase name='c'><skipped/></testcase><testcase name='d'>"
        "<error message='gone'/></testcase><testcase name='e'/></testsuite></testsuites>"
    )
    path.write_text(whole)
    assert on_gpu.read_junit(path) == ("1 passed, 2 failed, 1 skipped", ["b: 1 is not 2", "d: gone"])
    path.write_text(whole[:-9])
    assert on_gpu.read_junit(path) == ("", [])


def test_benchmarks_finished_before_a_kill_are_kept(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, lines = tmp_path / "ops.json", tmp_path / "ops.jsonl"
    result.write_text("")
    benchmark.disabled = False  # as it is where the tests run in several processes
    benchmark.extra_info["work"] = "fit"
    benchmark.pedantic(lambda: None, rounds=3)
    monkeypatch.setenv("FASTCR_BENCH_LINES", str(lines))
    conftest.pytest_runtest_teardown(request.node)
    with lines.open("a") as file:
        file.write('{"name": "cut o')
    on_gpu.salvage(on_gpu.Stage("ops", [], result, lines=lines), {"gpu": "Some GPU"})
    kept = json.loads(result.read_text())
    assert not lines.exists()
    (entry,) = kept["benchmarks"]
    assert kept["machine_info"]["fastcr"]["gpu"] == "Some GPU"
    assert (entry["name"], entry["extra_info"], entry["stats"]["rounds"]) == (request.node.name, {"work": "fit"}, 3)


def test_a_batch_that_does_not_fit_is_halved_and_the_end_of_the_time_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, *, console: Console, started: float) -> None:
        if config.optim.batch_size > 64:
            raise torch.OutOfMemoryError
        console.print("first step done 9.0 s after the start, 1.0 s of it the step")
        assert config.run.dir is not None
        config.run.dir.mkdir()
        save_config(config, config.run.dir / "config.yaml")
        records = [{"step": step, "images_per_second": 50, "data_wait": 0} for step in (10, 20)]
        (config.run.dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        raise SystemExit(130)

    monkeypatch.setattr(gpu_stages, "train", train)
    monkeypatch.setattr(gpu_stages, "recipe", lambda *_: Config(optim=OptimConfig(batch_size=256)))
    assert gpu_stages.train_for(600.0, tmp_path, True) is None
    results = json.loads((tmp_path / "training.json").read_text())
    assert results["problem"] is None
    assert results["settings"]["optim"]["batch_size"] == 64
    assert (results["steps"], results["pairs_per_second"]) == (20, 50)


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"gpu\": null}')"
    last = on_gpu.Stage("tune", [sys.executable, "-c", facts, str(tmp_path / "facts.json"), "tune"])
    monkeypatch.setattr(on_gpu, "make_stages", lambda *_, **__: [last])
    monkeypatch.setattr(on_gpu.signal, "signal", lambda *_: None)
    for name in ("TRITON_INTERPRET", "PYTHONPATH"):  # which it changes
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(SystemExit) as stop:
        on_gpu.main(["--out", str(tmp_path)])
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    assert said.err.startswith("on_gpu: error: there is no GPU here")
    assert said.err.count("\n") == 1


@pytest.mark.slow
def test_a_sample_rehearsal_needs_neither_tyro_nor_the_other_optional_packages(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for path in ("tyro.py", "hypothesis.py", "tensorboard/__init__.py", "nvidia/dali/__init__.py"):
        (absent / path).parent.mkdir(parents=True, exist_ok=True)
        (absent / path).write_text("raise ImportError('not installed')")
    plain = "-p no:hypothesispytest"  # its plugin would look into what stands in for it
    environment = {**os.environ, "PYTHONPATH": str(absent), "PYTEST_ADDOPTS": plain, "OMP_NUM_THREADS": "1"}
    command = [*SCRIPT, "--out", str(tmp_path / "out"), "--rehearse", "--only", "tests", "training"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["facts"]["gpu"] is None
    stages = summary["stages"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "summary.json", "tests.xml"]
    assert [(each["stage"], each["status"]) for each in stages] == [("tests", "passed"), ("training", "passed")]
    assert "under Triton's interpreter" in log
    assert " 0 failed" in stages[0]["note"]
    training = summary["results"]["training"]
    assert training["steps"] == 4
    assert training["pairs_per_second"] > 0
    assert training["seconds_to_first_step"] > 0
