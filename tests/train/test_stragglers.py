"""A rank that all others wait for is named: one that computes more slowly, and one whose data comes late."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gloo_workers import run_in_processes
from small_run import SmallRun, train_here

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.models.transformer import Block
from openlm_pipeline.runs import ledger
from train.data import Batches

SLOW_RANK = "1"


def _later(function: Callable[..., Any]) -> Callable[..., Any]:
    def late(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.3)  # longer than a step on a busy machine
        return function(*arguments, **named)

    return late


def _train(recipe: str, home: Any, slow: str) -> None:
    if os.environ["RANK"] == SLOW_RANK and slow == "compute":
        Block.forward = _later(Block.forward)
    if os.environ["RANK"] == SLOW_RANK and slow == "data":
        Batches.load = Batches._read = _later(Batches._read)
    train_here(load_experiment(recipe), home)


@pytest.mark.parametrize("slow, other", [("compute", "waits for data"), ("data", "computes")])
def test_a_slow_rank_is_named_once(slow: str, other: str, tmp_path: Path) -> None:
    small = SmallRun(tmp_path, (12,))
    run_in_processes(2, _train, str(small.recipe), small.home, slow)
    records = [r for r in small.run.read_metrics() if "loss" in r]
    field = {"compute": "slowest_rank", "data": "data_wait_rank"}[slow]
    assert [r[field] for r in records[1:]].count(int(SLOW_RANK)) >= 7
    told = [event for event in ledger.History(small.run).account().stragglers if other not in event["why"]]
    assert [(event["rank"], event["step"] <= 8) for event in told] == [(1, True)]
    assert "CPU on" in told[0]["name"]


def test_ranks_alike_are_no_stragglers_and_one_has_no_others(tmp_path: Path) -> None:
    small = SmallRun(tmp_path, (2,))
    small.train()
    assert not any("slowest_rank" in r for r in small.run.read_metrics())
