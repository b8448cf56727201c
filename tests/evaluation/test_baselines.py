"""Quoted rows are what OpenLM's README prints, and a table that contradicts itself is refused."""

import re
from pathlib import Path

import pytest
import yaml

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.baselines import SHIPPED, load_quoted, quoted_baselines, random_baseline
from openlm_pipeline.evaluation.suite import load_suite, task_name

TITLES = {"LLAMA-7B": "LLaMA-7B", "Neox-1.3B": "NeoX-1.3B"}


def readme_columns(text: str) -> dict[tuple[str, str | None], dict[str, str]]:
    """(title, tokens) -> row -> printed cell, of every filled column of the README's score tables."""
    columns = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [[cell.strip(" *") for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        names = [line[0] for line in lines]
        if "arc_challenge" not in names:
            continue
        for i, head in enumerate(lines[0][1:], 1):
            cells = {name: line[i] for name, line in zip(names[2:], lines[2:]) if line[i]}
            if cells:
                at = re.fullmatch(r"(\S+) tokens", head, re.IGNORECASE)
                title = lines[0][0] if at else TITLES.get(head, head)
                columns[title, at[1] if at else None] = cells
    return columns


def test_every_cell_is_the_readmes(shared_data):
    readme = Path(shared_data).parent / "spec" / "openlm_readme.md"
    if not readme.is_file():
        pytest.skip(f"OpenLM's README is not at {readme}")
    published = readme_columns(readme.read_text())
    shipped = table()
    rows = {(row["title"], row.get("tokens")): row for row in shipped["rows"].values()}
    assert set(rows) == set(published) and len(rows) == 7 + 4 + 6 + 2
    for key, row in rows.items():
        cells = {re.sub(r"-0 shot$", "", name).lower(): float(cell) for name, cell in published[key].items()}
        ours = {name.removesuffix("/0-shot"): value for name, value in zip(shipped["tasks"], row["scores"])}
        ours |= {name.replace("/5-shot", "-5 shot"): value for name, value in row.get("beside", {}).items()}
        assert ours | {"average": row["average"]} == cells, key


def table() -> dict:
    return yaml.safe_load((SHIPPED / "openlm_readme.yaml").read_text())


def test_one_stated_average_is_not_that_of_its_cells_and_says_so():
    noted = [row for row in quoted_baselines() if row.note]
    assert [row.name for row in noted] == ["openlm_7b_675B"]
    assert noted[0].note == "its cells as printed average to 0.59, not 0.60"
    assert noted[0].average == 0.60


def changed(tmp_path, edit) -> Path:
    document = table()
    edit(document["rows"])
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_row_whose_average_does_not_recompute_is_refused(tmp_path):
    path = changed(tmp_path, lambda rows: rows["pythia_1b"].update(average=0.51))
    with pytest.raises(ConfigError, match=r"row pythia_1b states the average 0.51 but its cells average to 0.48"):
        load_quoted(path)
    path = changed(tmp_path, lambda rows: rows["openlm_7b_675B"].pop("recomputed"))
    with pytest.raises(ConfigError, match="row openlm_7b_675B states the average 0.60"):
        load_quoted(path)
    path = changed(tmp_path, lambda rows: rows["mpt_7b"].update(recomputed=0.60))
    with pytest.raises(ConfigError, match="row mpt_7b"):
        load_quoted(path)


def test_a_row_with_a_cell_too_few_is_refused(tmp_path):
    path = changed(tmp_path, lambda rows: rows["opt_1_3b"]["scores"].pop())
    with pytest.raises(ConfigError, match="row opt_1_3b has 10 scores for 11 tasks"):
        load_quoted(path)


def test_rows_by_name_and_by_family():
    assert [row.name for row in quoted_baselines(["pythia_1b", "openlm_1b_1T"])] == ["openlm_1b_1T", "pythia_1b"]
    one_billion = quoted_baselines(["openlm_1b"])
    assert [row.tokens // 10**9 for row in one_billion] == [250, 500, 750, 1000, 1250, 1500, 1600]
    assert {row.title for row in one_billion} == {"OpenLM-1B"}
    with pytest.raises(ConfigError, match="did you mean 'pythia_1b'"):
        quoted_baselines(["pythia_1B"])


def test_quoted_tasks_are_those_of_the_suite_openlm():
    suite = load_suite("openlm")
    known = {task_name(task.label, k) for task, k in suite.runs()}
    for row in quoted_baselines():
        assert set(row.scores) <= known
        assert set(row.average_tasks) == set(suite.headline)
        assert row.source.startswith("https://") and row.harness


def test_random_baselines_are_versioned():
    assert random_baseline("v1", "boolq", 0.3) == 0.5
    assert random_baseline("v1", "a_task_of_mine", 0.3) == 0.3
    with pytest.raises(ConfigError, match="no random baselines 'v9'; known: dclm_v1, dclm_v2, v1"):
        random_baseline("v9", "boolq", 0.5)
