"""The model card of a milestone: what the hub's own library reads from it are the scorecard's numbers."""

import pytest
from huggingface_hub import ModelCard

from openlm_pipeline.errors import DataError
from openlm_pipeline.reports.model_card import model_card


def test_card_is_the_golden_file(experiment, last_card, golden):
    golden("model_card.md", model_card(experiment, last_card, license="apache-2.0", language="en"))


def test_the_hub_reads_the_scores(experiment, last_card):
    data = ModelCard(model_card(experiment, last_card, license="apache-2.0")).data
    assert (data.license, data.pipeline_tag, data.model_name) == ("apache-2.0", "text-generation", "demo-v1-1M")
    assert {r.dataset_type: r.metric_value for r in data.eval_results} == {
        "choice": 0.45,
        "cloze": 0.06,
        "harder": 0.36,
    }


def test_a_task_that_failed_is_in_the_table_and_not_in_the_index(experiment, failed_card):
    text = model_card(experiment, failed_card)
    assert {r.dataset_type for r in ModelCard(text).data.eval_results} == {"choice", "cloze"}
    assert "| harder 0-shot | failed | – |" in text


def test_a_scorecard_of_another_run_is_refused(experiment, last_card):
    with pytest.raises(DataError, match="other"):
        model_card(experiment, last_card.model_copy(update={"run": "other"}))
