"""Each check fails on real damage, and one that blocks stops what is below it in the same run."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from resealed import reseal
from tiny_pipeline import LABELS, TinyPipeline

from openlm_pipeline.pipeline import training as training_stage
from openlm_pipeline.runs.launch import MilestoneReached, MilestoneReused
from openlm_pipeline.shards.dataset import ShardedDataset

FIRST, LAST = LABELS
SUPERSEDE = {"openlm/allow": "supersede"}
SHARDS = ("shards", "tiny_text", "v1")


@pytest.fixture
def pipeline(finished, tmp_path) -> TinyPipeline:
    return finished.copy(tmp_path)


def _failed(result: dg.ExecuteInProcessResult) -> dict[tuple[str, str], str]:
    """(asset, check) -> description of the checks that failed."""
    return {
        (check.asset_key.to_user_string(), check.check_name): check.description or ""
        for check in result.get_asset_check_evaluations()
        if not check.passed
    }


def _started(result: dg.ExecuteInProcessResult) -> set[str]:
    return {event.step_key for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_START}


def _run_checks(pipeline: TinyPipeline) -> dg.ExecuteInProcessResult:
    """The checks of the shards alone, as the UI runs them."""
    selection = dg.AssetSelection.checks_for_assets(dg.AssetKey(["shards", "tiny_text"]))
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        alone = dg.Definitions(jobs=[dg.define_asset_job("alone", selection=selection)])
        job = dg.Definitions.merge(definitions, alone).resolve_job_def("alone")
        return job.execute_in_process(instance=instance, raise_on_error=False)


def _spoil(pipeline: TinyPipeline, *, in_manifest: bool) -> None:
    """Another token in every sample of the shards.

    Args:
        in_manifest: give the manifest their new hashes, as if they had been made so.
    """
    folder = pipeline.home.joinpath(*SHARDS)
    made = ShardedDataset(folder)
    for k in range(len(made.entries)):
        path = made.shard_path(k)
        content = bytearray(path.read_bytes())
        samples = made.gather(np.arange(made.shard_sizes[:k].sum(), made.shard_sizes[: k + 1].sum()))
        at = 0
        for sample in samples:
            at = content.index(sample.tobytes(), at)
            content[at + 10 : at + 12] = (int(sample[5]) ^ 1).to_bytes(2, "little")
            at += sample.nbytes
        path.write_bytes(content)
    if in_manifest:
        reseal(folder)


def test_whole_shards_of_other_text_fail_the_round_trip_and_are_not_trained_on(pipeline):
    _spoil(pipeline, in_manifest=True)
    result = pipeline.execute("tiny", tags=SUPERSEDE)
    assert not result.success
    assert set(_failed(result)) == {("shards/tiny_text", "round_trip")}
    assert "differs in the shards from its raw text" in _failed(result)["shards/tiny_text", "round_trip"]
    assert not {"train_tiny", *(f"scorecard__tiny__{label}" for label in LABELS), "report__tiny"} & _started(result)


def test_a_changed_shard_fails_its_checksum_and_is_not_trained_on(pipeline):
    _spoil(pipeline, in_manifest=False)
    result = pipeline.execute("tiny")
    assert not result.success
    failed = _failed(result)
    assert re.search(r"00000000\.tar has sha256 .*damaged", failed["shards/tiny_text", "shard_checksums"])
    assert "train_tiny" not in _started(result)


def _read(result: dg.ExecuteInProcessResult) -> int:
    """Number of shards whose hash a check compared."""
    (check,) = [c for c in result.get_asset_check_evaluations() if c.check_name == "shard_checksums"]
    assert check.passed
    return check.metadata["read"].value


def test_a_job_reads_no_shard_again_that_is_as_it_was(pipeline, monkeypatch):
    monkeypatch.setattr("assets.data._CLOCKS_APART", 0.0)
    shards = sorted(pipeline.home.joinpath(*SHARDS).glob("*.tar"))
    assert len(shards) > 1
    time.sleep(1.1)  # what was written in the second of a check is read again
    assert _read(pipeline.execute("tokenize_tiny_text")) == len(shards)  # a copy is another file
    assert _read(pipeline.execute("tokenize_tiny_text")) == 0
    shards[0].write_bytes(shards[0].read_bytes())
    assert _read(pipeline.execute("tokenize_tiny_text")) == 1
    assert _read(_run_checks(pipeline)) == len(shards)


def test_a_manifest_that_lost_a_shard_is_refused_and_not_trained_on(pipeline):
    manifest = pipeline.home.joinpath(*SHARDS, "manifest.jsonl")
    lines = manifest.read_text().splitlines(keepends=True)
    assert len(lines) > 1
    manifest.write_text("".join(lines[:-1]))
    result = pipeline.execute("tiny", tags=SUPERSEDE)
    assert not result.success
    (failure,) = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "manifest.jsonl is damaged" in str(failure.error)
    assert "train_tiny" not in _started(result)


def test_more_bad_records_than_the_recipe_allows_are_told(pipeline):
    raw = pipeline.home / "raw" / "tiny_text" / "a.jsonl"
    raw.write_text(raw.read_text() + "no JSON\n" * 6)
    result = pipeline.execute("tokenize_tiny_text", tags=SUPERSEDE)
    assert result.success
    assert _failed(result) == {}
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("max_bad_fraction: 0.5", "max_bad_fraction: 0.05"))
    assert set(_failed(_run_checks(pipeline))) == {("shards/tiny_text", "quarantine_rate")}


def test_a_raw_file_that_changed_is_an_error_and_not_damage(pipeline):
    raw = pipeline.home / "raw" / "tiny_text" / "a.jsonl"
    raw.write_text("".join(json.dumps({"text": f"other {n}"}) + "\n" for n in range(30)))
    result = _run_checks(pipeline)
    assert not result.success
    assert _failed(result) == {}
    (failure,) = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "a.jsonl is not the one that" in failure.user_failure_data.description


def test_ready_made_shards_have_no_text_to_compare_with(pipeline):
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    more = "sources: [{name: made_up, shards: 'synthetic://64/1'}, "
    recipe.write_text(recipe.read_text().replace("sources: [", more).replace("train: {vocab_size: 300}", "source: x"))
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        graph = definitions.resolve_asset_graph()
        checks = {check.name for check in graph.get(dg.AssetKey(["shards", "made_up"])).check_keys}
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=[dg.AssetKey(["shards", "made_up"])], instance=instance
        )
    assert checks == {"shards_are_there"}
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]


def test_a_loss_that_is_not_finite_is_not_scored(pipeline):
    metrics = pipeline.run_folder / "metrics.jsonl"
    unsealed = re.sub(r', "crc32": "\w+"', "", metrics.read_text())  # as an earlier release's lines are
    metrics.write_text(re.sub(r'"loss": [0-9.]+', '"loss": NaN', unsealed, count=1))
    for name in ("outcome.json", "ledger.jsonl"):  # which say how long the next one was
        (pipeline.run_folder / name).unlink()
    result = pipeline.execute("tiny")
    assert not result.success
    assert set(_failed(result)) == {(f"checkpoint/tiny/{label}", "finite_loss") for label in LABELS}
    assert {key for key in _started(result) if "scorecard" in key or "report" in key} == set()


def test_a_checkpoint_damaged_on_its_way_to_the_disk_is_not_scored(pipeline, monkeypatch):
    train: Callable[..., Iterator[object]] = training_stage.train

    def bad_disk(*args: object, **kwargs: object) -> Iterator[object]:
        for event in train(*args, **kwargs):
            if isinstance(event, MilestoneReached) and not isinstance(event, MilestoneReused):
                _flip(max((p for p in event.checkpoint.path.rglob("*.distcp")), key=lambda p: p.stat().st_size))
            yield event

    monkeypatch.setattr(training_stage, "train", bad_disk)
    (pipeline.run_folder / "checkpoints" / _checkpoint_name(pipeline, LAST) / "COMPLETE").unlink()
    result = pipeline.execute("tiny")
    assert not result.success
    assert set(_failed(result)) == {(f"checkpoint/tiny/{LAST}", "integrity")}
    assert {key for key in _started(result) if "scorecard" in key or "report" in key} == set()


def _checkpoint_name(pipeline: TinyPipeline, label: str) -> str:
    card = json.loads((pipeline.home / "scorecards" / "tiny" / "v1" / label / "scorecard.json").read_text())
    (found,) = [p.name for p in (pipeline.run_folder / "checkpoints").iterdir() if p.name.endswith(f"{card['step']}")]
    return found


def _flip(path: Path) -> None:
    with path.open("r+b") as f:
        f.seek(-100, os.SEEK_END)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))


def test_a_task_that_is_gone_is_an_incomplete_suite(pipeline):
    (pipeline.home / "raw" / "tasks" / "choice.jsonl").unlink()
    result = pipeline.execute("evaluate_tiny")
    assert not result.success
    failed = _failed(result)
    assert set(failed) == {(f"scorecard/tiny/{label}", "complete_suite") for label in LABELS}
    assert all("choice.jsonl" in description for description in failed.values())
    assert "report__tiny" not in _started(result)


def test_scores_that_fell_by_more_than_chance_are_told(pipeline):
    stored = pipeline.home / "scorecards" / "tiny" / "v1" / FIRST / "tasks" / "last_word-0shot.parquet"
    table = pq.read_table(stored)
    right = pa.array([True] * table.num_rows)
    pq.write_table(
        table.set_column(table.schema.get_field_index("correct"), table.schema.field("correct"), right), stored
    )
    (stored.parents[1] / "items.parquet").unlink()
    result = pipeline.execute("evaluate_tiny")
    assert result.success
    failed = _failed(result)
    assert set(failed) == {(f"scorecard/tiny/{LAST}", "no_significant_regression")}
    assert "last_word" in failed[f"scorecard/tiny/{LAST}", "no_significant_regression"]
