"""SIGKILL of the Dagster daemon inside a tick: after its restart nothing is scored twice and nothing is forgotten."""

import shutil

import dagster as dg
import pytest
from drill_pipeline import (
    FIRST,
    LAST,
    NUM_TASKS,
    DrillPipeline,
    Programs,
    held_slots,
    kill,
    times_scored,
    wait_until,
)

pytestmark = pytest.mark.drill
SENSOR, CONDITION = "checkpoints_in_run_folders", "default_automation_condition_sensor"


@pytest.fixture
def pipeline(undisturbed, tmp_path) -> DrillPipeline:
    """Trained, not scored, and unknown to Dagster."""
    pipeline = undisturbed.copy(tmp_path / "pipeline")
    shutil.rmtree(pipeline.home / "scorecards")
    for folder in ("history", "storage", "schedules"):
        shutil.rmtree(pipeline.root / "dagster" / folder, ignore_errors=True)
    return pipeline


def _switch_on(programs: Programs, *sensors: str) -> None:
    for sensor in sensors:
        programs.finish("dagster", "sensor", "start", sensor)


def _is_asked(instance: dg.DagsterInstance, key: dg.AssetKey) -> bool:
    return any(key in (run.asset_selection or ()) for run in instance.get_runs())


def _assert_each_is_scored_once(pipeline: DrillPipeline, instance: dg.DagsterInstance, *labels: str) -> None:
    """Once the scorecards are there and the daemon has looked again twice."""
    cards = [pipeline.home / "scorecards" / "tiny" / "v1" / label / "scorecard.json" for label in labels]
    wait_until(lambda: all(card.exists() for card in cards), "all scorecards")
    sensors = [state.name for state in instance.all_instigator_state() if state.name in (SENSOR, CONDITION)]
    before = {sensor: _ticks(instance, sensor) for sensor in sensors}
    for sensor in sensors:
        wait_until(lambda s=sensor: _ticks(instance, s) >= before[s] + 2, f"two more ticks of {sensor}")
    wait_until(lambda: all(run.is_finished for run in instance.get_runs()), "all runs to end")
    for label in labels:
        assert [len(tasks) for tasks in times_scored(instance, label)] == [NUM_TASKS], label
    assert {run.status for run in instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
    assert held_slots(instance) == {}


def _ticks(instance: dg.DagsterInstance, sensor: str) -> int:
    """Ticks of a sensor that ended well."""
    return sum(
        tick.status.value in ("SUCCESS", "SKIPPED")
        for state in instance.all_instigator_state()
        if state.name == sensor
        for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)
    )


def _is_told(instance: dg.DagsterInstance) -> bool:
    return instance.get_latest_materialization_event(dg.AssetKey(["checkpoint", "tiny", FIRST])) is not None


@pytest.mark.parametrize("moment", ["it has told of a checkpoint", "it has asked for one of two runs"])
def test_killed_inside_a_tick_of_the_checkpoint_sensor(moment, pipeline, undisturbed, programs_on, instance_of):
    programs, instance = programs_on(pipeline), instance_of(pipeline)
    _switch_on(programs, SENSOR)
    daemon = programs.daemon()
    reached = {"it has told of a checkpoint": _is_told, "it has asked for one of two runs": dg.DagsterInstance.get_runs}
    wait_until(lambda: reached[moment](instance), moment, daemon)
    kill(daemon)
    assert len(instance.get_runs()) == (moment == "it has asked for one of two runs")
    programs.daemon()
    _assert_each_is_scored_once(pipeline, instance, FIRST, LAST)
    assert len(instance.get_runs()) == 2
    assert pipeline.results() == undisturbed.results()


def test_killed_while_it_has_a_milestone_scored_and_training_goes_on(pipeline, undisturbed, programs_on, instance_of):
    pipeline.untrain()
    pipeline.write_recipe(last="160K")
    programs, instance = programs_on(pipeline), instance_of(pipeline)
    _switch_on(programs, SENSOR, CONDITION)
    daemon = programs.daemon()
    wait_until(lambda: _ticks(instance, CONDITION) > 0, "a first tick", daemon)
    programs.finish("dagster", "job", "launch", "-j", "tiny_checkpoints")
    first = dg.AssetKey(["scorecard", "tiny", FIRST])
    wait_until(lambda: _is_asked(instance, first), "the score of the first milestone to be asked for", daemon)
    kill(daemon)
    assert pipeline.milestones() == {FIRST} and pipeline.ranks()
    programs.daemon()
    _assert_each_is_scored_once(pipeline, instance, FIRST, "t0160K")
    made, expected = pipeline.results(), undisturbed.results()
    assert made["shards"] == expected["shards"]
    for part in ("weights and optimizer", "items", "scorecards"):
        assert made[part][FIRST] == expected[part][FIRST], part
