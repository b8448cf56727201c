"""One job makes everything from raw files to the report; running it again does only what is not done."""

import base64
import json
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import dagster as dg
import pyarrow.parquet as pq
import pytest
from gloo_workers import forked_workers
from tiny_pipeline import LABELS, NOT_IN_JOBS, FinishedPipeline, TinyPipeline

from assets.common import run_links
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.runs.folder import WANDB_URL, RunFolder
from openlm_pipeline.storage.files import read_json

SUPERSEDE = {"openlm/allow": "supersede"}
FIRST, LAST = LABELS
TRAIN_STEP = "train_tiny"
SHARD_CHECKS = ("tokens_conserved", "shard_checksums", "round_trip", "quarantine_rate", "no_file_left_out")
CHECKPOINTS = [f"checkpoint/tiny/{label}" for label in LABELS]
SCORECARDS = [f"scorecard/tiny/{label}" for label in LABELS]


def _materialized(result: dg.ExecuteInProcessResult | FinishedPipeline) -> dict[str, dict[str, object]]:
    """Asset, with its partition if it has one -> metadata of its last materialization in a run."""
    made = {}
    for event in result.all_events:
        if event.is_step_materialization:
            what = event.step_materialization_data.materialization
            name = what.asset_key.to_user_string() + (f"[{what.partition}]" if what.partition else "")
            if name == "preflight":  # says what would be made, and makes nothing
                continue
            made[name] = {k: v.value for k, v in what.metadata.items() if not isinstance(v, dg.TableMetadataValue)}
            made[name] |= {k: v for k, v in what.metadata.items() if isinstance(v, dg.TableMetadataValue)}
    return made


def _reused(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {name: facts["reused"] for name, facts in _materialized(result).items() if "reused" in facts}


def test_the_job_makes_every_asset_from_raw_files_to_report(finished, instance_of):
    made = _materialized(finished)
    files = {f"{stage}/tiny_text[{name}.jsonl]" for stage in ("raw_files", "tokenized") for name in "ab"}
    assert set(made) == {"tokenizer/tiny_bpe", "shards/tiny_text", *files, *CHECKPOINTS, *SCORECARDS, "report/tiny"}
    instance = instance_of(finished.pipeline)
    assert sorted(instance.get_dynamic_partitions("tiny_text_files")) == ["a.jsonl", "b.jsonl"]
    seen = instance.fetch_observations(dg.AssetKey(["raw_files", "tiny_text"]), limit=10).records
    assert {record.partition_key for record in seen} == {"a.jsonl", "b.jsonl"}
    assert all(record.asset_observation.tags["dagster/data_version"] for record in seen)
    assert (finished.pipeline.home / "reports" / "tiny" / "v1" / "report.html").stat().st_size > 1000


def test_every_check_is_evaluated_and_passes(finished):
    evaluated = {
        (check.asset_key.to_user_string(), check.check_name): check.passed
        for check in [
            e.asset_check_evaluation_data
            for e in finished.all_events
            if e.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ]
    }
    expected = {("shards/tiny_text", name) for name in SHARD_CHECKS}
    expected |= {(key, name) for key in CHECKPOINTS for name in ("finite_loss", "integrity")}
    expected |= {(key, name) for key in SCORECARDS for name in ("complete_suite", "no_significant_regression")}
    assert evaluated == dict.fromkeys(expected, True)


def test_metadata_says_what_was_made_in_numbers(finished):
    made = _materialized(finished)
    shards, checkpoint = made["shards/tiny_text"], made[f"checkpoint/tiny/{LAST}"]
    assert shards["documents"] == 60
    assert shards["samples"] * 33 + shards["tail_tokens"] == shards["tokens"]
    assert sum(made[f"tokenized/tiny_text[{name}.jsonl]"]["tokens"] for name in "ab") == shards["tokens"]
    assert checkpoint["step"] * 256 == checkpoint["tokens"] >= 40_000
    assert 0 < checkpoint["loss"] < made[f"checkpoint/tiny/{FIRST}"]["loss"]
    assert checkpoint["tokens_per_second"] > 0
    rows = [row.data for row in checkpoint["records"].records]
    assert rows[-1]["loss"] == checkpoint["loss"]
    assert 5 < len(rows) <= 40
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert 0 <= made[f"scorecard/tiny/{LAST}"]["average"] <= 1
    assert made["report/tiny"]["scorecards"] == 2
    assert "| " in made["report/tiny"]["report"]


def test_what_people_ask_first_comes_first_and_tables_last(finished):
    events = [e.step_materialization_data.materialization for e in finished.all_events if e.is_step_materialization]
    order = {m.asset_key.to_user_string(): list(m.metadata) for m in events}
    checkpoint, scorecard, report = order[CHECKPOINTS[1]], order[SCORECARDS[1]], order["report/tiny"]
    assert checkpoint[:3] == ["loss", "loss_curve", "tokens"] and checkpoint[-1] == "records"
    assert scorecard[:3] == ["score", "change", "average"] and scorecard[-1] == "wrong_items"
    for names in (checkpoint, scorecard):
        asked = [
            name for name in names if name in ("tokens", "run_folder", "data", "machine", "parameters", "trace", "path")
        ]
        assert asked == ["tokens", "run_folder", "data", "machine", "parameters", "trace", "path"]
    assert report[0] == "averages" and report[-1] == "report"


def _svg(markdown: str) -> ElementTree.Element:
    """The picture that a text of Markdown holds."""
    return ElementTree.fromstring(
        base64.b64decode(re.fullmatch(r"!\[.*\]\(data:image/svg\+xml;base64,(.*)\)", markdown)[1])
    )


def test_a_checkpoint_has_its_loss_against_tokens_as_a_picture(finished):
    made = _materialized(finished)[CHECKPOINTS[1]]
    words = [element.text for element in _svg(made["loss_curve"]).iter() if element.tag.endswith("text")]
    assert float(words[1]) <= made["loss"] < float(words[0])
    assert words[2] == "40.2K"


def test_a_page_fits_its_width_and_numbers_have_six_digits(finished):
    """Dagster shows pictures of under 1,000 characters without a click; one broad value broadens all of its table."""
    for event in finished.all_events:
        facts = event.step_materialization_data.materialization.metadata if event.is_step_materialization else {}
        for name, value in facts.items():
            if isinstance(value, dg.FloatMetadataValue):
                assert value.value == float(f"{value.value:.6g}"), name
            elif name in ("loss_curve", "averages"):
                assert len(value.value) < 1000
            elif isinstance(value, dg.TableMetadataValue):
                rows = [[str(cell) for cell in row.data.values()] for row in value.records]
                assert max(sum(max(map(len, cell.split()), default=0) for cell in row) for row in rows) < 60, name


def test_a_checkpoint_names_the_commit_that_trained_it_and_not_the_one_that_tells(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    file = RunFolder(pipeline.run_folder).ledger_file
    unsealed = re.sub(r', "crc32": "\w+"', "", file.read_text())  # as an earlier release's lines are
    file.write_text(re.sub(r'"code": ?"[^"]*"', '"code": "0.1.0 (0123456789ab)"', unsealed))
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        job = definitions.resolve_implicit_global_asset_job_def()
        key = dg.AssetKey(CHECKPOINTS[1].split("/"))
        assert job.execute_in_process(asset_selection=[key], instance=instance).success
        told = instance.get_latest_materialization_event(key).asset_materialization.metadata
    assert told["commit"].value == "0123456789ab"
    assert told["machine"].value.startswith("1 x cpu on ")


def test_a_scorecard_shows_what_was_wrong_and_shards_what_they_hold(finished):
    made = _materialized(finished)
    rows = [row.data for row in made[SCORECARDS[1]]["wrong_items"].records]
    starts = [i for i, row in enumerate(rows) if row["what"] == "task"]
    items = [{row["what"]: row["text"] for row in rows[a:b]} for a, b in zip(starts, [*starts[1:], len(rows)])]
    assert items and {item["task"] for item in items} <= {"last_word/0-shot", "choice/1-shot"}
    assert all(item["question"] and item["right"] and item.get("answered") != item["right"] for item in items)
    number = made[SCORECARDS[1]]["average"]
    assert re.fullmatch(rf"all_tasks {number:.3f} ± 0\.\d{{3}} \(95%\)", made[SCORECARDS[1]]["score"])
    assert f" since {FIRST}, 95% " in made[SCORECARDS[1]]["change"]
    texts = [row.data["text"] for row in made["shards/tiny_text"]["texts"].records]
    raw = "".join((finished.pipeline.home / "raw" / "tiny_text" / f"{n}.jsonl").read_text() for n in "ab")
    documents = [json.loads(line)["text"] for line in raw.splitlines()]
    parts = [part for text in texts for part in text.split("<|endoftext|>") if part]
    assert len(texts) == 2 and all(any(part in document for document in documents) for part in parts)


def test_columns_say_what_they_hold(finished):
    made = _materialized(finished)
    for name, key in (
        ("shards/tiny_text", "dagster/column_schema"),
        (SCORECARDS[0], "columns"),
        ("report/tiny", "columns"),
    ):
        assert [c.name for c in made[name][key].columns if not c.description] == [], name


def test_tables_and_places_come_from_the_files_themselves(finished):
    made, home = _materialized(finished), finished.pipeline.home
    tables = {
        "shards/tiny_text": sorted((home / "shards" / "tiny_text" / "v1").glob("*.provenance.parquet")),
        SCORECARDS[0]: [home / "scorecards" / "tiny" / "v1" / FIRST / "items.parquet"],
        "report/tiny": [home / "reports" / "tiny" / "v1" / "table.parquet"],
    }
    for name, files in tables.items():
        schema = made[name]["dagster/column_schema" if name.startswith("shards") else "columns"]
        assert [(c.name, c.type) for c in schema.columns] == [(f.name, str(f.type)) for f in pq.read_schema(files[0])]
        assert made[name]["dagster/row_count"] == sum(pq.read_table(file).num_rows for file in files) > 0
    required = {c.name for c in made[SCORECARDS[0]]["columns"].columns if not c.constraints.nullable}
    assert {"run", "task", "metric"} <= required
    assert made["tokenized/tiny_text[a.jsonl]"]["dagster/partition_row_count"] == 30
    for name, facts in made.items():
        place = Path(urllib.request.url2pathname(urlsplit(facts["dagster/uri"]).path))
        files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
        if name == "shards/tiny_text":
            files = list(place.glob("*.tar"))
        assert facts["size_bytes"] == sum(p.stat().st_size for p in files) > 0, name


def test_a_run_leads_to_its_folder_and_its_pages(finished, tmp_path):
    for name in [*CHECKPOINTS, *SCORECARDS, "report/tiny"]:
        facts = _materialized(finished)[name]
        assert Path(facts["run_folder"]) == finished.pipeline.run_folder
        assert not {"tensorboard", "wandb"} & set(facts)
    pipeline = finished.copy(tmp_path)
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("log_every: 20", "log_every: 20, report_to: [tensorboard, wandb]"))
    with pipeline.active():
        experiment = load_experiment("tiny")
        assert set(run_links(experiment)) == {"run_folder", "tensorboard"}
        (pipeline.run_folder / WANDB_URL).write_text("https://wandb.example.org/me/tiny/runs/1")
        assert run_links(experiment)["wandb"] == dg.MetadataValue.url("https://wandb.example.org/me/tiny/runs/1")


def _change(pipeline: TinyPipeline, name: str) -> None:
    """Other text in one document of a raw file."""
    path = pipeline.home / "raw" / "tiny_text" / name
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps({"text": "Changed. " + json.loads(first)["text"]}) + "\n", *others]))


def _execute(pipeline: TinyPipeline, asset: str, partition: str, workers: int = 1) -> dg.ExecuteInProcessResult:
    """Materialize, or observe, one partition as the UI does."""
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=[dg.AssetKey.from_user_string(asset)],
            partition_key=partition,
            instance=instance,
            run_config={"resources": {"dask": {"config": {"workers": workers}}}, "loggers": {"live": {}}},
        )


def _tokenized(pipeline: TinyPipeline, name: str) -> dict[str, tuple[int, int]]:
    files = pipeline.snapshot("tokenized", "tiny_text", "v1")
    return {path: found for path, found in files.items() if path.startswith(name)}


@pytest.fixture
def sharded(finished, tmp_path) -> TinyPipeline:
    """A pipeline that has its shards. Its tokenizer is a file, not made from the raw files."""
    pipeline = TinyPipeline.create(tmp_path / "sharded")
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    ready = shutil.copy(finished.pipeline.home / "tokenizers" / "tiny_bpe" / "tokenizer.json", pipeline.root)
    text = recipe.read_text().replace("train: {vocab_size: 300}", f"source: {ready}")
    recipe.write_text(text.replace("model: {", "model: {vocab_size: 300, "))
    assert pipeline.execute("tokenize_tiny_text").success
    return pipeline


def test_a_changed_raw_file_is_tokenized_again_alone(sharded, stale_status, partition_status, instance_of):
    pipeline = sharded
    before = {name: _tokenized(pipeline, name) for name in ("a.jsonl", "b.jsonl")}
    assert partition_status(pipeline, "tokenized/tiny_text") == {"a.jsonl": "FRESH", "b.jsonl": "FRESH"}

    _change(pipeline, "b.jsonl")
    assert _execute(pipeline, "raw_files/tiny_text", "b.jsonl").success
    assert partition_status(pipeline, "tokenized/tiny_text") == {"a.jsonl": "FRESH", "b.jsonl": "STALE"}

    with forked_workers():
        result = _execute(pipeline, "tokenized/tiny_text", "b.jsonl", workers=2)
    assert set(_materialized(result)) == {"tokenized/tiny_text[b.jsonl]"}
    assert partition_status(pipeline, "tokenized/tiny_text") == {"a.jsonl": "FRESH", "b.jsonl": "FRESH"}
    assert _tokenized(pipeline, "a.jsonl") == before["a.jsonl"]
    assert _tokenized(pipeline, "b.jsonl") != before["b.jsonl"]
    seen = instance_of(pipeline).fetch_observations(dg.AssetKey(["tokenized", "tiny_text"]), limit=20).records
    links = [r.asset_observation.metadata.get("dask_dashboard") for r in seen]
    (link,) = [link for link in links if link]
    assert isinstance(link, dg.UrlMetadataValue) and link.url.startswith("http://127.0.0.1:")
    assert stale_status(pipeline)["shards/tiny_text"][0] == "STALE"

    before["b.jsonl"] = _tokenized(pipeline, "b.jsonl")
    _change(pipeline, "a.jsonl")
    result = pipeline.execute("tokenize_tiny_text", tags=SUPERSEDE)
    assert result.success
    made = _materialized(result)
    files = {"raw_files/tiny_text[a.jsonl]", "tokenized/tiny_text[a.jsonl]"}
    assert set(made) == {"tokenizer/tiny_bpe", "shards/tiny_text", *files}
    assert _tokenized(pipeline, "b.jsonl") == before["b.jsonl"]
    assert _tokenized(pipeline, "a.jsonl") != before["a.jsonl"]
    assert made["shards/tiny_text"]["reused"] is False
    assert stale_status(pipeline)["shards/tiny_text"][0] == "FRESH"


def test_every_raw_file_fills_its_partition(finished, instance_of):
    key = dg.AssetKey(["raw_files", "tiny_text"])
    assert instance_of(finished.pipeline).get_materialized_partitions(key) == {"a.jsonl", "b.jsonl"}


def test_a_milestone_is_reported_while_training_goes_on(finished, instance_of):
    last_record = finished.pipeline.run_folder.joinpath("metrics.jsonl").read_text().splitlines()[-1]
    ended_at = json.loads(last_record)["time"]
    instance = instance_of(finished.pipeline)
    first = instance.fetch_materializations(dg.AssetKey(["checkpoint", "tiny", FIRST]), limit=1).records[0]
    assert first.timestamp < ended_at
    seen = [
        record.asset_observation.metadata
        for label in LABELS
        for record in instance.fetch_observations(dg.AssetKey(["checkpoint", "tiny", label]), limit=100).records
    ]
    assert seen
    assert all(facts["loss"].value > 0 and facts["tokens_per_second"].value > 0 for facts in seen)


def test_running_again_reuses_everything_and_starts_no_trainer(finished, tmp_path, stale_status):
    pipeline = finished.copy(tmp_path)
    before = {part: pipeline.snapshot(part) for part in ("tokenizers", "tokenized", "shards", "scorecards")}
    before_run = pipeline.snapshot("runs")
    again = pipeline.execute("tiny")
    assert again.success
    assert _reused(again) == {
        **dict.fromkeys(["tokenizer/tiny_bpe", "shards/tiny_text", *CHECKPOINTS, *SCORECARDS], True),
        "report/tiny": False,  # made anew each time
    }
    assert {part: pipeline.snapshot(part) for part in before} == before
    log = "tiny/v1/train.log"
    assert pipeline.snapshot("runs")[log] == before_run[log]
    assert {name for name, (status, _) in stale_status(pipeline).items() if status != "FRESH"} == NOT_IN_JOBS


def test_a_lost_scorecard_alone_is_scored_again(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    scorecards = pipeline.home / "scorecards" / "tiny" / "v1"
    lost = read_json(scorecards / FIRST / "scorecard.json")
    shutil.rmtree(scorecards / FIRST)
    result = pipeline.execute("evaluate_tiny")
    assert result.success
    made = _materialized(result)
    assert set(made) == {*SCORECARDS, "report/tiny"}
    tasks = ["last_word/0-shot", "choice/1-shot"]
    assert made[SCORECARDS[0]]["scored_tasks"] == made[SCORECARDS[1]]["reused_tasks"] == tasks
    assert "scored_tasks" not in made[SCORECARDS[1]]
    assert (made[SCORECARDS[0]]["reused"], made[SCORECARDS[1]]["reused"]) == (False, True)
    assert read_json(scorecards / FIRST / "scorecard.json") == lost


def test_a_changed_setting_shows_as_stale_and_a_rerun_makes_what_depends_on_it_again(finished, tmp_path, stale_status):
    pipeline = finished.copy(tmp_path)
    pipeline.write_recipe(vocab_size=320)
    stale = stale_status(pipeline)
    for name in ("tokenizer/tiny_bpe", "shards/tiny_text"):
        assert stale[name][0] == "STALE"
        assert any(reason == "CODE: has a new code version" for reason in stale[name][1]), stale[name]
    assert stale["raw_files/tiny_text"][0] == "FRESH"
    old_run = pipeline.snapshot("runs", "tiny", "v1")
    result = pipeline.execute("tiny", tags=SUPERSEDE)
    assert result.success
    assert set(_reused(result).values()) == {False}
    made = _materialized(result)
    assert made["tokenizer/tiny_bpe"]["vocab_size"] == 320
    assert "train.vocab_size 300 -> 320" in made["tokenizer/tiny_bpe"]["changed"]
    assert pipeline.snapshot("runs", "tiny", "v1.superseded-1") == old_run
    assert {name for name, (status, _) in stale_status(pipeline).items() if status != "FRESH"} == NOT_IN_JOBS
