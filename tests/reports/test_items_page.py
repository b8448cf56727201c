"""Items side by side: the right texts, what each milestone chose, and a page that stays small and can be searched."""

import json
from pathlib import Path

import pytest
from commands import openlm

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.items import items_table
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.evaluation.task_files import read_task_file
from openlm_pipeline.reports import render
from openlm_pipeline.reports.items import as_text, picked, side_by_side
from openlm_pipeline.storage.home import Home

TASK = IclTask(label="pets", dataset_uri="pets.jsonl", num_fewshot=(0,), icl_task_type="multiple_choice")
ROWS = [{"query": f"Question {i}: what barks?", "choices": ["a cat", "a big dog"], "gold": 1} for i in range(4)]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return read_task_file(TASK, Home(tmp_path))


def table_of(file, milestone: str, right: list[bool], nll: list[float]):
    """A model that chooses the dog where it is right; the cat has as many nats for half as many tokens."""
    return items_table(
        {
            **{
                "run": "r",
                "milestone": milestone,
                "suite": "s",
                "suite_version": "v1",
                "task": "pets",
                "num_fewshot": 0,
            },
            **{"item": i, "item_hash": file.rows[i].item_hash, "prompt_hash": f"{i}", "num_choices": 2, "gold": 1},
            **{"choice_logprobs": [-n, -n], "choice_tokens": [2, 4], "choice_mean": int(ok), "correct": ok, "nll": n},
            **{"num_tokens": 4, "metric": "m", "shots": 0},
        }
        for i, (ok, n) in enumerate(zip(right, nll))
    )


@pytest.fixture
def tables(file):
    first = table_of(file, "a", [True, False, True, False], [4.0, 4.0, 4.0, 4.0])
    return {"400K": first, "800K": table_of(file, "b", [True, True, False, False], [3.0, 3.5, 4.25, 8.0])}


def test_those_that_flipped_come_first_and_alone_where_asked_for(tables):
    assert picked(tables, only_flipped=False, by="file", limit=9) == [1, 2, 0, 3]
    assert picked(tables, only_flipped=True, by="file", limit=9) == [1, 2]
    assert picked(tables, only_flipped=False, by="likelihood", limit=3) == [3, 0, 1]  # whichever way it changed


def test_milestones_scored_on_other_items_are_not_put_side_by_side(tables):
    with pytest.raises(DataError, match="other items"):
        picked({"400K": tables["400K"].slice(1), "800K": tables["800K"]}, only_flipped=False, by="file", limit=9)


def test_an_item_shows_its_row_the_choice_and_the_measure_of_the_rule(file, tables):
    text = as_text(side_by_side(TASK, 0, tables, [1], file))
    assert "item 1: wrong at 400K, right at 800K" in text and "Question 1: what barks?" in text
    cat, dog = (line for line in text.splitlines() if line.endswith(("a cat", "a big dog")))
    assert cat.split() == ["-2.000*", "-1.750", "a", "cat"]  # nats per token, which the rule compares
    assert dog.split() == ["gold", "-1.000", "-0.875*", "a", "big", "dog"]


def test_a_row_that_is_another_now_is_not_shown_as_the_one_that_was_scored(file, tables, tmp_path):
    (tmp_path / "pets.jsonl").write_text(json.dumps(ROWS[0] | {"query": "Another?"}) + "\n")
    changed = read_task_file(TASK, Home(tmp_path))
    (item,) = side_by_side(TASK, 0, tables, [0], changed).items
    assert item.question == "" and "Another" not in as_text(side_by_side(TASK, 0, tables, [0], changed))


def test_the_page_of_items_has_a_bound_and_runs_nothing_of_what_it_shows(
    file, tables, experiment, monkeypatch, tmp_path
):
    attack = [{**row, "query": "<script>alert(1)</script>" + "x" * 5000} for row in ROWS]
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in attack))
    hostile = read_task_file(TASK, Home(tmp_path))
    tables = {name: table_of(hostile, "a", [True] * 4, [1.0] * 4) for name in tables}
    found = side_by_side(TASK, 0, tables, [0, 1, 2, 3], hostile)
    page = render.items_page(experiment, [found])
    assert page.count("<script") == 1 and "src=" not in page and page.count("<article") == 4
    monkeypatch.setattr(render, "LARGEST_PAGE", len(page) - 1)
    smaller = render.items_page(experiment, [found])
    assert len(smaller.encode()) < len(page) and smaller.count("<article") == 2 and "2 of 4 items" in smaller


def test_written_answers_stand_beside_those_that_are_right(tmp_path, experiment):
    task = IclTask(
        label="quiz", dataset_uri="quiz.jsonl", num_fewshot=(3,), icl_task_type="generation_task_with_answers"
    )
    row = {"context": "Who wrote Emma?", "answer": "Austen", "aliases": ["Jane Austen"]}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(row) + "\n")
    rows = read_task_file(task, Home(tmp_path))
    common = {"run": "r", "suite": "s", "suite_version": "v1", "task": "quiz", "num_fewshot": 3, "item": 0, "gold": 0}
    common |= {
        "item_hash": rows.rows[0].item_hash,
        "prompt_hash": "0",
        "num_choices": 1,
        "num_tokens": 2,
        "metric": "m",
    }
    wrote = {"400K": ("Byron", False), "800K": ("Austen, of course", True)}
    tables = {
        name: items_table([{**common, "generated": text, "correct": ok, "shots": 3}])
        for name, (text, ok) in wrote.items()
    }
    found = side_by_side(task, 3, tables, [0], rows)
    text = as_text(found)
    assert "[3 solved rows] " in text and "800K wrote: 'Austen, of course'" in text
    assert "right: Austen | Jane Austen" in text
    page = render.items_page(experiment, [found])
    assert "Byron" in page and "Austen | Jane Austen" in page
    with pytest.raises(DataError, match="no likelihood"):
        picked(tables, only_flipped=False, by="likelihood", limit=1)


@pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="there is no /usr/bin/chromium")
@pytest.mark.browser
def test_the_page_is_searched(file, tables, experiment, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "items.html"
    path.write_text(render.items_page(experiment, [side_by_side(TASK, 0, tables, [1, 2, 0, 3], file)]))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(path.as_uri())
        page.fill("#words", "barks? 2:")
        assert page.locator("article:visible").all_inner_texts()[0].startswith("item 2")
        assert page.locator("#count").inner_text() == "1 of 4 items"
        page.fill("#words", "")
        page.check("#flipped")
        assert page.locator("article:visible").count() == 2
        browser.close()


def test_the_command_and_the_report_show_a_runs_items(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    shown = openlm("items", "tiny", "--task", "choice", "--limit", "2", variables=pipeline.variables)
    assert shown.returncode == 0, shown.stderr
    assert "[1 solved rows]" in shown.stdout and "at 10K" in shown.stdout and "at 40K" in shown.stdout
    whole = openlm(
        "items", "tiny", "--task", "choice", "--whole-prompts", "--format", "json", variables=pipeline.variables
    )
    (of,) = json.loads(whole.stdout)
    assert len(of["items"]) == 10 and all(i["prompt"].strip()[-10:] in i["question"] for i in of["items"])
    flipped = openlm("items", "tiny", "--flipped", "10K..40K", "--format", "json", variables=pipeline.variables)
    assert all(len({a["right"] for a in i["answers"]}) == 2 for of in json.loads(flipped.stdout) for i in of["items"])
    by = ("--flipped", "10K..40K", "--by", "likelihood", "--format", "json")
    (of, _) = json.loads(openlm("items", "tiny", *by, variables=pipeline.variables).stdout)
    changes = [abs(i["answers"][0]["nll"] - i["answers"][1]["nll"]) for i in of["items"]]
    assert changes == sorted(changes, reverse=True)
    wrong = openlm("items", "tiny", "--task", "choise", variables=pipeline.variables)
    assert wrong.returncode == 2 and "did you mean 'choice'" in wrong.stderr
    report = pipeline.home / "reports" / "tiny" / "v1"
    assert 'href="items.html"' in (report / "report.html").read_text() and (report / "items.html").exists()


def test_a_report_of_scorecards_without_their_items_is_refused(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    for path in (pipeline.home / "scorecards").rglob("items.parquet"):
        path.unlink()
    made = openlm("report", "tiny", variables=pipeline.variables)
    assert made.returncode == 3 and "items.parquet is missing" in made.stderr


def test_a_task_file_that_changed_or_went_is_said_and_its_texts_are_not_shown(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    file = pipeline.home / "raw" / "tasks" / "choice.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    shown = openlm("items", "tiny", "--task", "choice", variables=pipeline.variables)
    assert shown.returncode == 0 and "was changed since it was scored" in shown.stdout and "option 0" in shown.stdout
    file.unlink()
    assert "does not exist" in openlm("items", "tiny", "--task", "choice", variables=pipeline.variables).stdout
