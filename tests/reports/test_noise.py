"""What an average hides is said: tasks that stay at chance, and how much seeds of training differ."""

import json

import pytest

from openlm_pipeline.pipeline.reports import of_other_seeds
from openlm_pipeline.reports import milestones_table, write_report
from openlm_pipeline.reports.headline import headline
from openlm_pipeline.reports.noise import ABOVE_CHANCE, seed_noise, stuck_tasks
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home

NOMINAL = [250_000, 1_000_000]


def _at(card, **accuracies):
    """The card with other accuracies of some tasks; their intervals stay as wide."""
    tasks = [
        task.model_copy(update={"accuracy": a, "ci_low": max(0.0, a - 0.04), "ci_high": a + 0.04})
        if (a := accuracies.get(task.task)) is not None
        else task
        for task in card.tasks
    ]
    return card.model_copy(update={"tasks": tuple(tasks)})


@pytest.fixture
def stuck(first_card, last_card):
    return [_at(first_card, harder=0.27), _at(last_card, harder=0.22)]


def test_a_task_at_chance_throughout_is_named_and_an_average_goes_without_it(stuck, published):
    table = milestones_table("demo", "v1", stuck, NOMINAL, quoted=[published])
    assert [c.heading for c in stuck_tasks(table)] == ["harder 0-shot"]
    found = [table.cell(row, ABOVE_CHANCE) for row in table.rows]
    assert [c.text for c in found] == ["0.215", "0.255", "0.29"]  # of choice and cloze; the quoted one to two decimals
    said = "harder 0-shot stays at chance at every scored milestone; without it the average at 1M is 0.255."
    assert said in headline(table, stuck).details


def test_a_task_that_is_never_right_is_stuck_whatever_chance_is(stuck):
    table = milestones_table("demo", "v1", [_at(card, choice=0.0, cloze=0.0) for card in stuck])
    assert len(stuck_tasks(table)) == 3
    assert all(c.key != ABOVE_CHANCE for c in table.columns)  # nothing would be left


def test_one_milestone_alone_and_a_task_that_leaves_chance_are_not_stuck(first_card, stuck, last_card):
    assert not stuck_tasks(milestones_table("demo", "v1", stuck[:1]))
    table = milestones_table("demo", "v1", [stuck[0], last_card])
    assert not stuck_tasks(table) and all(c.key != ABOVE_CHANCE for c in table.columns)


def test_the_report_says_how_the_tasks_were_picked(tmp_path, experiment, stuck):
    text = write_report(tmp_path, experiment, stuck, [])["report.md"].read_text()
    assert "average above chance" in text and "picked by these very scores" in text


def _run(home, name, card, **changes):
    identity = {"training": {"lr": 1e-3, "max_skipped_steps": 0, "spike_factor": None}, "seed": 0} | changes
    folder = home.run(name, "v1")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"fingerprint": "0" * 64, "identity": identity}))
    place = home.scorecard(name, "v1", card.label)
    place.mkdir(parents=True)
    (place / "scorecard.json").write_text(card.model_copy(update={"run": name}).model_dump_json())
    return RunFolder(folder)


def test_only_runs_that_differ_in_their_seed_alone_and_were_scored_alike_count(tmp_path, last_card):
    home = Home(tmp_path)
    half = last_card.averages[0].model_copy(update={"value": 0.5})
    twin = last_card.model_copy(update={"averages": (half, *last_card.averages[1:])})
    run = _run(home, "demo", last_card)
    _run(home, "twin", twin, seed=1)
    _run(home, "other", twin, seed=2, training={"lr": 2e-3, "max_skipped_steps": 0, "spike_factor": None})
    _run(home, "same_seed", twin)
    _run(home, "otherwise_scored", twin.model_copy(update={"precision": "bf16"}), seed=3)
    assert of_other_seeds(home, run, [last_card]) == {"t0001M": [pytest.approx(0.29), 0.5]}


def test_a_lead_is_set_against_items_and_seeds(first_card, last_card):
    assert seed_noise({"t0250K": [0.3], "t0001M": [0.3]}) is None
    seeds = seed_noise({"t0250K": [0.24, 0.25], "t0001M": [0.29, 0.30, 0.31]})
    assert (seeds.label, seeds.num_runs, seeds.deviation) == ("t0001M", 3, pytest.approx(0.01))
    # Student's t of two degrees of freedom is 4.303, and two runs differ by sqrt(2) times what one does.
    assert seeds.beyond_both(0.0) == pytest.approx(4.303 * 0.01 * 2**0.5, rel=1e-3)
    table = milestones_table("demo", "v1", [first_card, last_card], NOMINAL)
    (figure,) = [f for f in headline(table, [first_card, last_card], seeds).figures if f.title == "Between seeds"]
    assert figure.value == "±0.010" and "3 runs that differ in their seed alone, at 1M" in figure.detail
    assert figure.detail.endswith("a lead beyond items and seeds needs 0.073, which this has not")
