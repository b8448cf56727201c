"""A study in the graph: its runs as one group and one job, its fit as an asset, and whether the prediction held."""

import json
from pathlib import Path

import dagster as dg
import pytest
from study_pipeline import study_pipeline
from tiny_pipeline import TinyPipeline

from openlm_pipeline.checkpoints.folders import promote, read_checkpoint
from openlm_pipeline.studies.stage import FIT, PAGE
from openlm_pipeline.studies.study import expand, load_study, save_recipes

KEY = dg.AssetKey(["study", "sizes"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> TinyPipeline:
    return study_pipeline(tmp_path_factory.mktemp("study") / "pipeline")


def names(pipeline: TinyPipeline) -> tuple[str, ...]:
    with pipeline.active():
        return tuple(dict.fromkeys(run.name for run in expand(load_study("sizes"))))


def test_a_study_is_in_the_graph_once_its_recipes_are(pipeline: TinyPipeline):
    with pipeline.active() as definitions:
        assert KEY not in definitions.resolve_asset_graph().get_all_asset_keys()
        save_recipes(expand(load_study("sizes")))
    with pipeline.active("tiny", *names(pipeline)[:2]) as definitions:
        assert KEY not in definitions.resolve_asset_graph().get_all_asset_keys()
    with pipeline.active("larger", *names(pipeline)) as definitions:
        graph = definitions.resolve_asset_graph()
        node = graph.get(KEY)
        assert len([key for key in node.parent_keys if key.path[0] == "checkpoint"]) == 7  # one is the predicted run's
        groups = {graph.get(key).group_name for key in node.parent_keys if key.path[1] != "larger"}
        assert groups == {"sizes", "sizes_scores"}
        job = definitions.resolve_job_def("sizes")
        assert job.executor_def.name == "multiprocess"
        training = [node for node in job.nodes if node.name.startswith("train_sizes")]
        first, *_ = sorted(training, key=lambda node: -int(node.definition.tags["dagster/priority"]))
        assert first.name == "train_sizes_d24_l1_h2"  # the largest


def result_of(pipeline: TinyPipeline, *others: str) -> tuple[dict, bool]:
    result = pipeline.execute("sizes", (*names(pipeline), *others))
    failed = [
        e.step_failure_data.user_failure_data or e.step_failure_data.error
        for e in result.all_events
        if e.is_step_failure
    ]
    assert result.success, failed
    (made,) = result.asset_materializations_for_node("study__sizes")
    (check,) = [c for c in result.get_asset_check_evaluations() if c.asset_key == KEY]
    return {name: value.value for name, value in made.metadata.items()}, check.passed


def test_its_job_trains_scores_fits_and_checks_the_prediction(pipeline: TinyPipeline):
    with pipeline.active():
        save_recipes(expand(load_study("sizes")))
    facts, held = result_of(pipeline)
    assert facts["points"] == 6 and held and "measured_loss" not in facts
    assert facts["predicted_low"] < facts["predicted_loss"] < facts["predicted_high"]
    folder = pipeline.home / "studies" / "sizes"
    assert json.loads((folder / FIT).read_bytes())["hold_out"]["checks"]
    assert "sizes_d24_l1_h2" in (folder / PAGE).read_text()

    assert pipeline.execute("larger", ("larger",)).success
    trained = pipeline.snapshot("runs")
    facts, held = result_of(pipeline, "larger")
    assert facts["relative_error"] == pytest.approx(facts["predicted_loss"] / facts["measured_loss"] - 1, abs=1e-4)
    assert held is (facts["predicted_low"] <= facts["measured_loss"] <= facts["predicted_high"])
    unchanged = {name: at for name, at in pipeline.snapshot("runs").items() if name.endswith(".distcp")}
    assert unchanged == {name: at for name, at in trained.items() if name.endswith(".distcp")}

    (path,) = Path(pipeline.home / "runs" / "larger" / "v1" / "checkpoints").glob("step-*")
    checkpoint = read_checkpoint(path)
    promote(checkpoint, checkpoint.milestone, {**checkpoint.metrics, "validation_loss": 99.0})
    facts, held = result_of(pipeline, "larger")
    assert (facts["measured_loss"], held) == (99.0, False)
