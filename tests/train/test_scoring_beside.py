"""A part of the suite is scored at milestones while a run goes on, and nothing waits for it."""

import json

import pytest
from commands import openlm
from gloo_workers import forked_trainers
from tiny_pipeline import TinyPipeline
from waiting import wait_until

SETTING = "evaluation.while_training={limit: 5, tasks: [last_word]}"


@pytest.fixture
def pipeline(finished: TinyPipeline, tmp_path) -> TinyPipeline:
    return finished.copy(tmp_path / "pipeline")


def train(pipeline: TinyPipeline, *overrides: str):
    with forked_trainers(torchrun=False):
        return openlm("train", "tiny", "version=beside", SETTING, *overrides, variables=pipeline.variables)


def test_each_milestone_is_scored_beside_training(pipeline: TinyPipeline):
    trained = train(pipeline)
    assert trained.returncode == 0, trained.stderr
    scores = pipeline.home / "scorecards" / "tiny" / "beside"
    first = scores / "t0010K" / "parts" / "last_word-5_rows" / "scorecard.json"
    wait_until(first.exists, seconds=120)
    card = json.loads(first.read_text())
    assert [(t["task"], t["num_items"]) for t in card["tasks"]] == [("last_word", 5)]
    assert card["run_version"] == "beside"
    log = pipeline.home / "runs" / "tiny" / "beside" / "scoring.log"
    assert "rows alone were scored" in log.read_text()


def test_it_is_no_part_of_the_run_or_its_scores(pipeline: TinyPipeline):
    """The run that has it is the run that has it not."""
    with pipeline.active():
        from openlm_pipeline.experiments import load_experiment
        from openlm_pipeline.fingerprint import settings_tree
        from openlm_pipeline.runs.identity import settings_identity

        plain, beside = load_experiment("tiny"), load_experiment("tiny", [SETTING])
        assert settings_identity(plain) == settings_identity(beside)
        assert settings_tree(plain.evaluation) == settings_tree(beside.evaluation, {"while_training"})
