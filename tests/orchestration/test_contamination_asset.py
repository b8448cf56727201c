"""The scan of a dataset for a suite's items is an asset: made once, stale when the task files are others."""

import json

import dagster as dg
from tiny_pipeline import TinyPipeline

KEY, FILES = dg.AssetKey(["contamination", "tiny_text", "tiny"]), dg.AssetKey(["task_files", "tiny"])


def _run(pipeline: TinyPipeline, key: dg.AssetKey) -> dg.ExecuteInProcessResult:
    with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
        job = dg.define_asset_job("some", selection=[key]).resolve(asset_graph=definitions.resolve_asset_graph())
        return job.execute_in_process(
            instance=instance,
            resources=definitions.resources,
            run_config={"resources": {"dask": {"config": {"workers": 1}}}},
        )


def _metadata(result: dg.ExecuteInProcessResult) -> dict[str, object]:
    [made] = result.asset_materializations_for_node(next(iter(result.job_def.nodes)).name)
    return {name: value.value for name, value in made.metadata.items()}


def test_a_dataset_is_scanned_once_and_again_for_other_task_files(finished, tmp_path, stale_status):
    pipeline = finished.copy(tmp_path)
    first = _metadata(_run(pipeline, KEY))
    assert first["shards_scanned"] > 0 and not first["reused"] and first["items"] == 24 + 23
    assert {"occurrences", "tokens", "cpu_seconds", "boilerplate_windows"} <= first.keys()
    assert stale_status(pipeline)[KEY.to_user_string()][0] == "FRESH"
    again = _metadata(_run(pipeline, KEY))
    assert (again["shards_scanned"], again["reused"], again["version"]) == (0, True, first["version"])

    tasks = pipeline.home / "raw" / "tasks" / "last_word.jsonl"
    text = json.loads((pipeline.home / "raw" / "tiny_text" / "a.jsonl").read_text().splitlines()[0])["text"]
    words = text[500:900].split()
    tasks.write_text(tasks.read_text() + json.dumps({"context": " ".join(words[:-1]), "continuation": words[-1]}))
    assert _run(pipeline, FILES).success
    state, _ = stale_status(pipeline)[KEY.to_user_string()]
    assert state == "STALE"
    then = _metadata(_run(pipeline, KEY))
    assert then["shards_scanned"] == first["shards_scanned"] and then["version"] != first["version"]
    assert then["occurrences"] > first["occurrences"]
    assert stale_status(pipeline)[KEY.to_user_string()][0] == "FRESH"
