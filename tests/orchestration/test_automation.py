"""What happens by itself: a new checkpoint is scored once, gaps are filled, failures are told."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import dagster as dg
import pytest

from assets.common import DATA_VERSION_TAG, checkpoint_key, scorecard_key
from openlm_pipeline.alerts import WEBHOOK, send_alert
from openlm_pipeline.errors import ConfigError
from orchestration.automation import alert_sensors

FIRST, LAST = (scorecard_key("tiny", label) for label in ("t0010K", "t0040K"))


@pytest.fixture
def unscored(finished, tmp_path):
    """A pipeline whose run was trained outside Dagster: checkpoints on disk, no scores, nothing in Dagster."""
    pipeline = finished.copy(tmp_path)
    shutil.rmtree(pipeline.home / "scorecards")
    shutil.rmtree(pipeline.root / "dagster" / "history", ignore_errors=True)
    shutil.rmtree(pipeline.root / "dagster" / "storage", ignore_errors=True)
    return pipeline


def tick(definitions: dg.Definitions, instance: dg.DagsterInstance) -> dg.SensorResult:
    sensor = definitions.get_sensor_def("checkpoints_in_run_folders")
    return sensor(dg.build_sensor_context(instance=instance, definitions=definitions))


def test_checkpoints_made_by_hand_are_told_to_dagster_and_scored_once(unscored):
    with unscored.active() as definitions, dg.DagsterInstance.get() as instance:
        found = tick(definitions, instance)
        assert [e.asset_key for e in found.asset_events] == [checkpoint_key("tiny", n) for n in ("t0010K", "t0040K")]
        assert all(e.tags[DATA_VERSION_TAG] for e in found.asset_events)
        assert [r.asset_selection for r in found.run_requests] == [[FIRST], [LAST]]
        assert len({r.run_key for r in found.run_requests}) == 2
        for event in found.asset_events:
            instance.report_runless_asset_event(event)
        again = tick(definitions, instance)
        assert again.asset_events == []
        # Dagster runs the same keys once; a daemon that died before it did is asked again.
        assert [r.run_key for r in again.run_requests] == [r.run_key for r in found.run_requests]


def test_what_is_scored_already_is_not_asked_for(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        found = tick(definitions, instance)
        assert (found.asset_events, found.run_requests) == ([], [])


def test_what_a_run_here_made_or_is_making_is_left_to_the_condition(finished, unscored, tmp_path):
    made = finished.copy(tmp_path / "made")
    shutil.rmtree(made.home / "scorecards")
    with made.active() as definitions, dg.DagsterInstance.get() as instance:
        assert tick(definitions, instance).run_requests == []
    with unscored.active() as definitions, dg.DagsterInstance.get() as instance:
        job = definitions.resolve_job_def("tiny_checkpoints")
        making = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
        found = tick(definitions, instance)
        assert (found.asset_events, found.run_requests) == ([], [])
        instance.report_run_failed(making)
        assert len(tick(definitions, instance).run_requests) == 2


def test_a_run_folder_of_other_settings_is_passed_over(unscored):
    unscored.write_recipe(vocab_size=320)
    with unscored.active() as definitions, dg.DagsterInstance.get() as instance:
        found = tick(definitions, instance)
        assert (found.asset_events, found.run_requests) == ([], [])


def test_the_schedule_asks_for_missing_scores_alone(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        schedule = definitions.get_schedule_def("missing_scores")

        def asked():
            return list(schedule(dg.build_schedule_context(instance=instance)))

        (skipped,) = asked()
        assert isinstance(skipped, dg.SkipReason)
        shutil.rmtree(pipeline.home / "scorecards" / "tiny" / "v1" / "t0040K")
        (request,) = asked()
        assert request.asset_selection == [LAST]


def test_scorecards_and_reports_can_be_made_by_themselves(finished, tmp_path):
    with finished.copy(tmp_path).active() as definitions:
        graph = definitions.resolve_asset_graph()
        automatic = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).automation_condition}
    assert automatic == {"scorecard/tiny/t0010K", "scorecard/tiny/t0040K", "report/tiny"}


@pytest.fixture
def webhook(monkeypatch) -> Iterator[list[dict]]:
    """A server on this machine that keeps what is posted to it."""
    received: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "refuse" in received[-1]["text"] else 200)
            self.end_headers()

        def log_message(self, *args) -> None:
            """Not to the test's output."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(WEBHOOK, f"http://127.0.0.1:{server.server_port}/secret-token")
    yield received
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_alert_goes_to_the_log_and_the_webhook_and_its_address_nowhere(webhook, caplog):
    assert send_alert("loss is not finite")
    assert not send_alert("please refuse")
    assert [r["text"] for r in webhook] == ["loss is not finite", "please refuse"]
    assert "loss is not finite" in caplog.text
    assert "answered 500" in caplog.text
    assert "secret-token" not in caplog.text


def test_an_unreachable_webhook_is_logged_and_a_wrong_one_refused(monkeypatch, caplog):
    monkeypatch.setenv(WEBHOOK, "http://127.0.0.1:9/secret-token")
    assert not send_alert("hello")
    assert "can't be reached" in caplog.text
    assert "secret-token" not in caplog.text
    monkeypatch.setenv(WEBHOOK, "file:///etc/passwd")
    with pytest.raises(ConfigError, match=WEBHOOK):
        send_alert("hello")


def test_failed_runs_and_failed_checks_are_told_with_their_reason(webhook):
    on_failure, on_checks = alert_sensors()

    @dg.op
    def breaks():
        raise dg.Failure(description="step 7: the loss is not finite")

    @dg.job
    def training():
        breaks()

    @dg.asset(check_specs=[dg.AssetCheckSpec("no_regression", asset="score")])
    def score():
        return dg.MaterializeResult(
            check_results=[dg.AssetCheckResult(check_name="no_regression", passed=False, description="copa fell")]
        )

    with dg.DagsterInstance.ephemeral() as instance:
        failed = training.execute_in_process(instance=instance, raise_on_error=False)
        on_failure(
            dg.build_run_status_sensor_context(
                "alert_on_failure", failed.get_run_failure_event(), instance, failed.dagster_run
            ).for_run_failure()
        )
        scored = dg.materialize([score], instance=instance)
        success = next(e for e in scored.all_events if e.event_type == dg.DagsterEventType.RUN_SUCCESS)
        on_checks(dg.build_run_status_sensor_context("alert_on_failed_checks", success, instance, scored.dagster_run))
    assert "training failed" in webhook[0]["text"]
    assert webhook[0]["text"].endswith("step 7: the loss is not finite")
    assert "score no_regression failed" in webhook[1]["text"]
    assert webhook[1]["text"].endswith("copa fell")
