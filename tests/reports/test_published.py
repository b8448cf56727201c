"""The tables of OpenLM's README, beside a run's own numbers, and empty where nothing was published."""

import pytest

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.reports import milestones_table
from openlm_pipeline.reports.published import openlm_table


def _cells(text: str) -> dict[str, dict[str, str]]:
    titles = [c.strip() for c in text.splitlines()[0].strip("|").split("|")]
    rows = ([c.strip() for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| "))
    return {row[0]: dict(zip(titles[1:], row[1:])) for row in rows}


def test_the_7b_table_has_its_empty_row_and_columns_and_llama_and_mpt():
    cells = _cells(openlm_table("openlm_7b"))
    titles = list(cells["average"])
    assert titles[-5:] == ["OpenLM-7B 1.25T", "OpenLM-7B 1.5T", "OpenLM-7B 1.6T", "LLaMA-7B", "MPT-7B"]
    assert set(cells["triviaqa/0-shot"].values()) == {""}
    assert {row["OpenLM-7B 1.6T"] for name, row in cells.items() if name not in ("task", "---")} == {""}
    assert [cells["mmlu/5-shot"][t] for t in titles[-5:]] == ["0.34", "", "", "0.34", ""]
    assert list(cells).index("mmlu/5-shot") > list(cells).index("average")  # it is in no average


def test_a_run_stands_before_the_published_models(of_tasks):
    tasks = [name for name in _cells(openlm_table("openlm_1b")) if name.endswith("/0-shot") and "triviaqa" not in name]
    card = of_tasks({name.removesuffix("/0-shot"): 0.5 for name in tasks}, "t0250B", 250 * 10**9, run="own")
    table = milestones_table("own", "v1", [card], [250 * 10**9])
    cells = _cells(openlm_table("openlm_1b", table))
    assert list(cells["average"])[:2] == ["own 250B", "OpenLM-1B 250B"] and list(cells["average"])[-1] == "OPT-IML-1.3B"
    assert cells["copa/0-shot"]["own 250B"] == "0.50" and cells["triviaqa/0-shot"]["own 250B"] == ""
    assert cells["average"]["own 250B"] == "0.50"


def test_a_table_that_the_readme_does_not_have():
    with pytest.raises(ConfigError, match="openlm_1b, openlm_7b"):
        openlm_table("openlm_3b")
