"""SIGKILL of the process that executes a run, in each phase, however it was started: the same job again resumes."""

from collections.abc import Callable

import dagster as dg
import pytest
from drill_pipeline import (
    FIRST,
    LAST,
    NUM_FILES,
    NUM_TASKS,
    DrillPipeline,
    Programs,
    held_slots,
    history_by_ui,
    kill,
    launch_by_ui,
    newest_run,
    run_process,
    status,
    wait_until,
)

pytestmark = pytest.mark.drill

PHASES: dict[str, Callable[[DrillPipeline], bool]] = {
    "tokenizing": lambda pipeline: bool(pipeline.tokenized()),
    "training": lambda pipeline: pipeline.last_step() >= 200,
    "scoring": lambda pipeline: bool(pipeline.scored(FIRST)),
}


def _is_in(phase: str, pipeline: DrillPipeline) -> bool:
    """Whether what is on disk says that the run was killed within the phase."""
    if phase == "tokenizing":
        return 0 < len(pipeline.tokenized()) < NUM_FILES
    if phase == "training":
        return pipeline.milestones() == {FIRST}
    return bool(pipeline.scored(FIRST)) and len(pipeline.scored(LAST)) < NUM_TASKS


@pytest.fixture
def pipeline(tmp_path) -> DrillPipeline:
    return DrillPipeline.create(tmp_path / "pipeline")


@pytest.fixture
def launcher(
    request: pytest.FixtureRequest, pipeline: DrillPipeline, programs_on
) -> tuple[Programs, Callable[[dg.DagsterInstance], str]]:
    """Programs, and what starts the job and says its run id, in one of three ways."""
    programs = programs_on(pipeline)

    def begun(instance: dg.DagsterInstance, before: str | None, program) -> str:
        wait_until(lambda: newest_run(instance) != before, "the run to be there", program)
        return newest_run(instance)

    def in_the_terminal(instance: dg.DagsterInstance) -> str:
        before = newest_run(instance)
        return begun(instance, before, programs.start("-m", "orchestration", "tiny"))

    def by_job_launch(instance: dg.DagsterInstance) -> str:
        before = newest_run(instance)
        programs.finish("dagster", "job", "launch", "-j", "tiny")
        return begun(instance, before, None)

    if request.param == "python -m orchestration":
        return programs, in_the_terminal
    pipeline.free_slots_at_once()
    if request.param == "queue":
        pipeline.change_dagster(
            "{module: dagster._core.run_coordinator, class: DefaultRunCoordinator}",
            "{module: dagster._core.run_coordinator, class: QueuedRunCoordinator}",
        )
    programs.finish("dagster", "instance", "info")  # as the webserver's unit does: see deploy/systemd
    programs.daemon()
    if request.param == "dagster job launch":
        return programs, by_job_launch
    _, address = programs.webserver()
    return programs, lambda instance: launch_by_ui(address, "tiny")


@pytest.mark.parametrize("launcher", ["python -m orchestration", "dagster job launch", "queue"], indirect=True)
def test_a_run_killed_in_each_phase_loses_nothing(launcher, pipeline, undisturbed, instance_of):
    programs, launch = launcher
    instance = instance_of(pipeline)
    dead, done = [], {}
    for phase, reached in PHASES.items():
        run_id = launch(instance)
        wait_until(lambda run_id=run_id: run_process(instance, run_id), f"run {run_id} to begin its steps")
        process = run_process(instance, run_id)
        wait_until(lambda reached=reached: reached(pipeline), f"{phase} to be under way: {programs.printed()}")
        below = process.children(recursive=True)
        kill(process)
        assert _is_in(phase, pipeline), phase
        wait_until(lambda below=below: not any(p.is_running() for p in below), "trainers and Dask workers to be gone")
        assert {name: pipeline.finished_work()[name] for name in done} == done, phase
        done = pipeline.finished_work()
        dead.append(run_id)
    run_id = launch(instance)
    wait_until(
        lambda: status(instance, run_id) in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE), "the end"
    )
    assert status(instance, run_id) == dg.DagsterRunStatus.SUCCESS, programs.printed()
    assert pipeline.results() == undisturbed.results()
    assert {name: pipeline.finished_work()[name] for name in done} == done
    assert len(pipeline.scored(FIRST)) == len(pipeline.scored(LAST)) == NUM_TASKS
    assert [status(instance, run) for run in dead] == [dg.DagsterRunStatus.FAILURE] * len(PHASES)
    assert held_slots(instance) == {}


def test_a_webserver_killed_under_its_run_leaves_the_run_alone(pipeline, undisturbed, programs_on, instance_of):
    programs = programs_on(pipeline)
    server, address = programs.webserver()
    run_id = launch_by_ui(address, "tiny")
    wait_until(lambda: pipeline.last_step() >= 140, "training to be under way")
    kill(server)
    instance = instance_of(pipeline)
    assert pipeline.milestones() == {FIRST} and status(instance, run_id) == dg.DagsterRunStatus.STARTED
    _, address = programs.webserver()
    assert history_by_ui(address) == {run_id: "STARTED"}
    wait_until(lambda: history_by_ui(address)[run_id] != "STARTED", "the run to end")
    assert history_by_ui(address) == {run_id: "SUCCESS"}, programs.printed()
    assert pipeline.results() == undisturbed.results()
    assert held_slots(instance) == {}
