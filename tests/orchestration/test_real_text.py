"""`dagster job launch -j pretrain_11m` from raw files of the Pile's form to scorecards, with no daemon."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import REPOSITORY, environment

from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.files import read_json

pytestmark = pytest.mark.drill

RECIPE = """
extends: pretrain_11m
milestones: [16K, 32K]
training: {global_batch: 8192, warmup: 8K, precision: fp32}
evaluation: {suite: "${OPENLM_HOME}/two_tasks.yaml"}
execution: {micro_batch: 1, log_every: 1, compile: false}
launcher: {processes: 1}
"""
SUITE = """
name: two_tasks
icl_tasks:
  - {label: copa, dataset_uri: "${OPENLM_EVAL_DATA}/copa.jsonl", num_fewshot: [0], icl_task_type: multiple_choice}
  - {label: winograd, dataset_uri: "${OPENLM_EVAL_DATA}/winograd_wsc.jsonl", num_fewshot: [0], icl_task_type: schema}
"""


def test_a_shipped_recipe_with_a_small_budget_runs_from_raw_files_to_scorecards(
    shared_data: Path, tmp_path: Path, wait_until, monkeypatch
):
    home, recipes, state = (tmp_path / name for name in ("home", "recipes", "dagster"))
    for folder in (home, recipes, state):
        folder.mkdir()
    shutil.copy(REPOSITORY / ".dagster" / "dagster.yaml", state)
    (recipes / "pretrain_11m.yaml").write_text(RECIPE)
    (home / "two_tasks.yaml").write_text(SUITE)
    variables = environment(
        OPENLM_HOME=str(home),
        OPENLM_RECIPES=str(recipes),
        OPENLM_RAW_DATA=str(shared_data / "raw"),
        OPENLM_TOKENIZER=str(shared_data / "tokenizers" / "gpt-neox-20b" / "tokenizer.json"),
        OPENLM_EVAL_DATA=str(shared_data / "eval"),
        DAGSTER_HOME=str(state),
        OMP_NUM_THREADS=str(os.cpu_count()),
    )
    command = [str(Path(sys.executable).parent / "dagster"), "job", "launch", "-j", "pretrain_11m"]
    with (tmp_path / "output.txt").open("w") as output:
        launched = subprocess.run(command, cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT)
    assert launched.returncode == 0, (tmp_path / "output.txt").read_text()

    monkeypatch.setenv("DAGSTER_HOME", str(state))
    with dg.DagsterInstance.get() as instance:
        wait_until(lambda: all(run.is_finished for run in instance.get_runs()), "the run to end", 1500)
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS, (tmp_path / "output.txt").read_text()
        assert all(daemon.last_heartbeat is None for daemon in instance.get_daemon_statuses().values())
        assert len(instance.get_dynamic_partitions("pile_files")) == len(
            list((shared_data / "raw").glob("*.jsonl.zst"))
        )
    totals = read_json(home / "shards" / "pile" / "v1" / "dataset.json")["totals"]
    assert totals["documents"] > 1000 and totals["quarantined"] == 0
    for label in ("t0016K", "t0032K"):
        card = read_json(home / "scorecards" / "pretrain_11m" / "v1" / label / "scorecard.json")
        assert {t["task"]: t["num_items"] for t in card["tasks"]} == {"copa": 100, "winograd": 273}
        assert card["status"] == "complete"
    losses = [r["loss"] for r in RunFolder(home / "runs" / "pretrain_11m" / "v1").read_metrics()]
    assert losses[-1] < losses[0]
    assert (home / "reports" / "pretrain_11m" / "v1" / "report.html").exists()
