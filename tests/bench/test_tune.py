"""The search for launch settings, under the interpreter and with a stand-in for the clock."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.workloads import Workload
from fastcr.kernels import queue, rationale_pool
from fastcr.kernels.settings import TABLE

pytest.importorskip("triton")

CPU = torch.device("cpu")
MAPS = {"B": 3, "C": 70, "S": 20, "K": 5}
SMALL = {
    "rationale_fit": Workload("rationale_fit", MAPS, torch.float32),
    "rationale_pool": Workload("rationale_pool", MAPS, torch.float32),
    "attention_gradient": Workload("rationale_pool", MAPS, torch.float32, training=True),
    "spread_gradients": Workload("rationale_fit", MAPS, torch.float32, training=True),
    "common_weights": Workload("common_weights", {"B": 3, "C": 10, "S": 20}, torch.float32),
    "info_nce": Workload("info_nce", {"B": 3, "D": 24, "N": 100}, torch.float32),
    "relational": Workload("relational", {"B": 3, "D": 24, "N": 100}, torch.float32, training=True),
}
Calls = Sequence[Callable[[], Any]]


def row_of(kernel: str) -> str:
    return next(row for row in TABLE[kernel] if row.startswith("32 bits"))


@pytest.mark.parametrize("kernel", ["rationale_fit", "info_nce"])
def test_the_fastest_right_candidate_wins(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, ticks = row_of(kernel), []
    today = TABLE[kernel][row]
    name = next(name for name in ("BLOCK_S", "BLOCK_N", "BLOCK") if name in today)
    wrong = 48 if name == "BLOCK" else 24  # does not compile; 16 channels by 3 positions
    choices = {each: (value,) for each, value in today.items()} | {name: (16, wrong, 32, 64)}
    monkeypatch.setattr(tune, "CHOICES", choices)

    def timer(calls: Calls) -> float:
        calls[0]()
        return 1e-5 if TABLE[kernel][row][name] == 32 else 2e-5

    sizes = SMALL[kernel]
    outcome = tune.search(kernel, row, [sizes, sizes], CPU, timer, lambda: ticks.append(1))
    assert outcome.today is today
    assert outcome.best == today | {name: 32}
    assert outcome.after == 2e-5
    assert outcome.before == (2e-5 if today[name] == 32 else 4e-5)
    assert outcome.out == 1
    assert len(ticks) == len(tune.candidates(today))
    assert TABLE[kernel][row] is today


def test_a_candidate_with_wrong_results_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("rationale_pool")
    today = TABLE["rationale_pool"][row]
    choices = {name: (value,) for name, value in today.items()} | {"num_warps": (1, 2, 32)}
    monkeypatch.setattr(tune, "CHOICES", choices)
    real = rationale_pool._fused

    def wrong_with_two_warps(*given: Any) -> Any:
        pooled, attention, winners = real(*given)
        return pooled * (1.1 if TABLE["rationale_pool"][row]["num_warps"] == 2 else 1), attention, winners

    monkeypatch.setattr(rationale_pool, "_fused", wrong_with_two_warps)

    def timer(calls: Calls) -> float:
        return 1 / TABLE["rationale_pool"][row]["num_warps"]

    outcome = tune.search("rationale_pool", row, [SMALL["rationale_pool"]], CPU, timer, lambda: None)
    assert (outcome.best["num_warps"], outcome.out) == (32, 1)


def test_every_row_has_choices_for_all_its_settings_and_examples_on_a_gpu_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = tune.chosen_rows("")
    monkeypatch.setattr(queue, "has_wgmma", lambda: True)
    there = tune.chosen_rows("")
    assert {*usual, *there} == {(kernel, row) for kernel, rows in TABLE.items() for row in rows}
    assert [row for row in there if row not in usual] == [("relational", "16 bits, B > 16, D <= 256, wgmma")]
    assert [row for row in usual if row not in there] == [("relational", "16 bits, B > 16, D <= 256")]
    assert all(TABLE[kernel][row].keys() <= tune.CHOICES.keys() for kernel, row in there)


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "there is no GPU to time kernels on"), (["--only", "64 bits"], "--only '64 bits': no such row")],
)
def test_a_mistake_is_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        tune.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"bench/tune.py: error: {message}")
    assert error.count("\n") == 1


def test_the_command_writes_a_whole_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"BLOCK_S": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}

    def found(kernel: str, row: str, *unused: Any) -> tune.Outcome:
        return tune.Outcome(kernel, row, TABLE[kernel][row], 3e-5, best, 2e-5, 0)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(queue, "has_wgmma", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(tune, "search", found)
    tune.main(["--only", "attention_gradient", "--out", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["attention_gradient"] == {"16 bits": best, "32 bits": best}
    assert table["rationale_fit"] == TABLE["rationale_fit"]
    out = capsys.readouterr().out
    assert all(word in out for word in ("some GPU", "30.0", "S 32, C 64, warps 4, stages 2", "20.0", "50%"))
