"""A run whose process was killed with nobody left to say so is failed, and its pool slot freed; others are not."""

import os
import socket
import subprocess
import sys
import time
import uuid

import dagster as dg
import psutil
import pytest
from tiny_pipeline import TinyPipeline, environment
from waiting import wait_until

from orchestration.dead_runs import PROCESS_TAG, dead_run_sensor, fail_dead_runs, free_slots_of_ended_runs

HOLDS_A_SLOT = """
import sys
import uuid
import dagster as dg

@dg.op(pool="training")
def hold():
    print("held", flush=True)
    sys.stdin.readline()

@dg.job
def holding():
    hold()

with dg.DagsterInstance.get() as instance:
    holding.execute_in_process(instance=instance)
"""


def test_a_run_killed_with_its_slot_is_failed_and_the_slot_freed(tmp_path, instance_of):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    instance = instance_of(pipeline)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDS_A_SLOT],
        env=environment(pipeline), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        assert fail_dead_runs(instance) == []
        process.kill()
    (run,) = instance.get_runs()
    assert run.status == dg.DagsterRunStatus.STARTED
    sensor = dead_run_sensor()
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert run.run_id in sensor(dg.build_sensor_context(instance=instance)).skip_message
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert instance.event_log_storage.get_concurrency_info("training").active_run_ids == {run.run_id}
    free_slots_of_ended_runs(instance)
    assert instance.event_log_storage.get_concurrency_info("training").active_run_ids == set()


def test_only_runs_of_this_machine_whose_process_is_another_now_are_failed(tmp_path, instance_of):
    instance = instance_of(TinyPipeline.create(tmp_path / "pipeline"))

    @dg.job
    def empty():
        pass

    def started(host: str, created: float) -> str:
        tags = {PROCESS_TAG: f"{host}:{os.getpid()}:{created:.2f}"}
        return instance.create_run_for_job(empty, status=dg.DagsterRunStatus.STARTED, tags=tags).run_id

    started(socket.gethostname(), psutil.Process().create_time())
    started("another.example", 1000)
    used_again = started(socket.gethostname(), 1000)
    instance.create_run_for_job(empty, status=dg.DagsterRunStatus.STARTED)  # its steps have not begun
    assert fail_dead_runs(instance) == [used_again]


@pytest.mark.parametrize("killed", ["before", "while it waits"])
def test_a_launched_run_goes_on_after_a_killed_one_without_a_daemon(finished, tmp_path, instance_of, killed):
    pipeline, run_id = finished.copy(tmp_path / "pipeline"), str(uuid.uuid4())
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDS_A_SLOT],
        env=environment(pipeline), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        if killed == "before":
            process.kill()
            process.wait()
        launch = [sys.executable, "-W", "ignore", "-m", "dagster", "job", "launch"]
        launch += ["-m", "openlm_pipeline.cli.definitions", "-j", "tiny_checkpoints", "--run-id", run_id]
        with (tmp_path / "log").open("wb") as log:
            subprocess.run(launch, env=environment(pipeline), stdout=log, stderr=log, check=True, timeout=100)
        instance = instance_of(pipeline)
        if killed != "before":
            said = "waits for a slot of pool training, held by holding (run "
            wait_until(lambda: any(said in e.user_message for e in instance.all_logs(run_id)), seconds=100)
            waiting = psutil.Process(
                instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_START)[-1].dagster_event.pid
            )
            before = sum(waiting.cpu_times()[:2])
            time.sleep(4)
            assert sum(waiting.cpu_times()[:2]) - before < 1
            process.kill()
    wait_until(lambda: instance.get_run_by_id(run_id).is_finished, seconds=100)
    assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.SUCCESS
