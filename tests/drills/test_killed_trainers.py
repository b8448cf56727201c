"""SIGKILL of torchrun and of a rank: the run fails with its reason, or torchrun starts again; the next one resumes."""

import dagster as dg
import pytest
from drill_pipeline import (
    LAST,
    WAIT_SECONDS,
    DrillPipeline,
    held_slots,
    kill,
    newest_run,
    reason,
    status,
    wait_until,
)

pytestmark = pytest.mark.drill
FIRST_STEP = 157
TRAIN = ("-m", "openlm_pipeline", "train", "tiny")


@pytest.fixture
def untrained(long_finished, tmp_path) -> DrillPipeline:
    """The tiny pipeline with its shards, before training."""
    pipeline = DrillPipeline(long_finished.copy(tmp_path).root)
    pipeline.untrain()
    return pipeline


def test_a_killed_torchrun_is_told_and_the_same_command_goes_on(untrained, long_finished, programs_on):
    programs = programs_on(untrained)
    trainer = programs.start(*TRAIN)
    wait_until(lambda: untrained.last_step() >= FIRST_STEP + 20, "the first milestone to be passed", trainer)
    (torchrun,), ranks = untrained.torchruns(), untrained.ranks()[0]
    kill(torchrun)
    assert trainer.wait(timeout=WAIT_SECONDS) == 6
    said = programs.last_printed()
    assert "training of tiny ended early" in said and "exit code -9" in said and "Traceback" not in said
    wait_until(lambda: not any(rank.is_running() for rank in ranks), "the rank to go with its torchrun")
    assert not (untrained.run_folder / "outcome.json").exists()
    done = untrained.finished_work()
    assert any("/step-00000157/" in name for name in done)
    programs.finish(*TRAIN)
    assert {name: untrained.finished_work()[name] for name in done} == done
    made, expected = untrained.results(), DrillPipeline(long_finished.pipeline.root).results()
    assert made["weights and optimizer"] == expected["weights and optimizer"]


def test_a_killed_rank_is_started_again_by_torchrun(untrained, long_finished, programs_on):
    recipe = untrained.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("{processes: 1}", "{processes: 1, max_restarts: 1}"))
    programs = programs_on(untrained)
    trainer = programs.start(*TRAIN)
    wait_until(lambda: untrained.last_step() >= FIRST_STEP + 20, "the first milestone to be passed", trainer)
    (torchrun,), (rank,) = untrained.torchruns(), untrained.ranks()[0]
    kill(rank)
    assert trainer.wait(timeout=WAIT_SECONDS) == 0, programs.printed()
    assert not torchrun.is_running()
    assert (untrained.run_folder / "train.log").read_text().count("resumed from step-00000157") == 1
    made, expected = untrained.results(), DrillPipeline(long_finished.pipeline.root).results()
    assert made["weights and optimizer"] == expected["weights and optimizer"]


def test_under_dagster_a_killed_torchrun_and_then_a_killed_rank_fail_the_run_with_a_reason(
    undisturbed, tmp_path, programs_on, instance_of
):
    pipeline = undisturbed.copy(tmp_path / "pipeline")
    pipeline.untrain()
    pipeline.write_recipe(processes=2)
    programs, instance = programs_on(pipeline), instance_of(pipeline)
    for victim, beyond, said in (("torchrun", 140, "exit code -9"), ("rank", 260, "SIGKILL")):
        run = programs.start("-m", "orchestration", "tiny")
        wait_until(lambda beyond=beyond: pipeline.last_step() >= beyond, f"step {beyond}", run)
        assert {rank: len(same) for rank, same in pipeline.ranks().items()} == {0: 1, 1: 1}
        kill(*(pipeline.torchruns() if victim == "torchrun" else pipeline.ranks()[1]))
        assert run.wait(timeout=WAIT_SECONDS) == 1, programs.printed()
        assert pipeline.ranks() == {}
        run_id = newest_run(instance)
        assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE
        assert "training of tiny ended early" in reason(instance, run_id)
        assert said in reason(instance, run_id), reason(instance, run_id)
        assert held_slots(instance) == {}
        assert LAST not in pipeline.milestones()
    done = pipeline.finished_work()
    programs.finish("-m", "orchestration", "tiny")
    assert {name: pipeline.finished_work()[name] for name in done} == done
    assert status(instance, newest_run(instance)) == dg.DagsterRunStatus.SUCCESS
    # Two processes add gradients in another order than one.
    assert pipeline.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)
