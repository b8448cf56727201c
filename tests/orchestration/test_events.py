"""A training run leaves few events in Dagster, however long it is, and is seen from its first seconds."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import dagster as dg
import pytest
from tiny_pipeline import LABELS

from assets import training
from openlm_pipeline.runs.launch import Measured, MilestoneReused, StepSkipped

RECORDS = 61_035
"""Of a run of 1.6T tokens at a global batch of 2.6M that logs every tenth step."""
SECONDS_PER_RECORD = 30.0


def _records(until: int, first: int = 0):
    """As many records as a long run writes, over the tokens of a short one."""
    for number in range(first, RECORDS):
        tokens = until * number // RECORDS
        loss = 2 + 8 / (1 + number)
        yield {
            "step": number // 300,
            "tokens": tokens,
            "loss": loss,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 9e5,
            "tokens_per_second_per_gpu": 9e5,
            "step_seconds": SECONDS_PER_RECORD / 10,
            "time": number * SECONDS_PER_RECORD,
        }


@pytest.mark.parametrize("records", [30, 3000, RECORDS])
def test_a_run_is_observed_at_once_then_at_growing_distances_and_to_its_end(records):
    until, distances = 1_600_000_000_000, training._Distances(1_600_000_000_000)
    numbers = range(1, records + 1)
    seen = [n for n in numbers if distances.due(until * n // records, n * SECONDS_PER_RECORD)]
    assert seen[:6] == [1, 2, 3, 4, 5, 6]
    assert len(seen) <= 540
    gaps = [b - a for a, b in itertools.pairwise([*seen, records])]
    assert max(gaps) <= records / 450 + 1  # in three weeks an hour and ten minutes


@pytest.mark.parametrize(("times", "back"), [(1, 20_000), (30, 400), (3, 20_000)])
def test_a_run_that_is_set_back_is_observed_to_its_end_and_no_more_often_than_the_bound(times, back):
    until, distances = 40_000, training._Distances(40_000)
    ends = [20_000 + 150 * crash for crash in range(times)]
    tokens = [t for end, begin in zip([*ends, until], [0, *(e - back for e in ends)]) for t in range(begin, end)]
    seen = [n for n, t in enumerate(tokens) if distances.due(t, n * SECONDS_PER_RECORD)]
    assert 400 < len(seen) <= 700
    assert max(b - a for a, b in itertools.pairwise([*seen, len(tokens)])) < until / 80


@pytest.mark.drill
def test_a_run_of_a_trillion_tokens_has_fewer_than_a_thousand_events(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    clock = itertools.count(step=SECONDS_PER_RECORD)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=clock.__next__))

    def train(experiment, home, until, report, *, allow):
        """Interrupted once, with many steps left out; its milestones are those that are there."""
        for record in [*_records(until), *_records(until, RECORDS // 2)]:
            yield Measured(record)
            if record["tokens"] % 10 == 0:
                yield StepSkipped({"step": record["step"], "skipped": "gradient norm"})
        for checkpoint in there:
            yield MilestoneReused(checkpoint.milestone, checkpoint)

    monkeypatch.setattr(training.stages, "train", train)
    keys = [dg.AssetKey(["checkpoint", "tiny", label]) for label in LABELS]
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        there = [c for c in training.RunFolder(pipeline.run_folder).saved() if c.milestone]
        lines = (json.dumps(record) for record in itertools.islice(_records(40_000), 0, None, 300))
        (pipeline.run_folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=keys, instance=instance
        )
        logs = instance.all_logs(result.run_id)
        observations = instance.fetch_observations(keys[0], limit=1000, ascending=True).records
        size = (pipeline.root / "dagster" / "history" / "runs" / f"{result.run_id}.db").stat().st_size
    kinds = Counter(log.dagster_event.event_type_value if log.dagster_event else "line" for log in logs)
    print(dict(kinds), size)
    assert result.success
    assert len(logs) < 900
    assert 500 < kinds["ASSET_OBSERVATION"] <= 702
    assert kinds["line"] <= 60
    assert size < 20e6
    seen = [o.asset_observation.metadata for o in observations if "skipped_steps" in o.asset_observation.metadata]
    assert "loss_curve" in seen[-1] and seen[-1]["loss"].value > 0
