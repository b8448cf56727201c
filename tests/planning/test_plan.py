"""`openlm plan` says what a run would do, and why; running it then does that."""

import shutil

import pytest
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.pipeline.plan import RecipePlan, plan
from openlm_pipeline.storage.home import Home

FIRST, LAST = "t0010K", "t0040K"


@pytest.fixture
def planned(finished, tmp_path, monkeypatch):
    """A finished pipeline, and its plan with some settings changed."""
    pipeline = finished.copy(tmp_path)
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)

    def make(*overrides: str, **options) -> RecipePlan:
        return plan(load_experiment("tiny", list(overrides)), Home.from_env(), **options)

    return pipeline, make


def states(made: RecipePlan) -> dict[str, str]:
    return {a.name: a.state for a in made.artefacts}


def reasons(made: RecipePlan, name: str) -> str:
    return " ".join(next(a for a in made.artefacts if a.name == name).why)


def test_a_finished_recipe_has_nothing_to_do(planned):
    pipeline, make = planned
    before = pipeline.snapshot()
    made = make()
    assert set(states(made).values()) == {"fresh"}
    assert (made.cost.tokens, made.todo) == (0, ())
    assert list(made.lines())[-1] == "nothing to do"
    assert pipeline.snapshot() == before


def test_a_lost_scorecard_is_all_that_is_missing(planned):
    pipeline, make = planned
    shutil.rmtree(pipeline.home / "scorecards" / "tiny" / "v1" / LAST)
    assert [(a.name, a.state) for a in make().todo] == [(f"scorecard/tiny/{LAST}", "missing"), ("report/tiny", "stale")]


def test_a_milestone_more_is_trained_from_the_last_one(planned):
    _, make = planned
    made = make("milestones=[10K, 40K, 80K]", price=2.0)
    assert [a.name for a in made.todo] == ["checkpoint/tiny/t0080K", "scorecard/tiny/t0080K", "report/tiny"]
    assert made.cost.tokens == 80_128 - 40_192  # whole steps of 256 tokens
    assert made.cost.steps == 156
    assert made.cost.speed.startswith("measured: ")
    assert made.cost.money == pytest.approx(2.0 * made.cost.gpu_hours)


@pytest.mark.parametrize(
    ("change", "stale", "why"),
    [
        ("tokenizer.train.vocab_size=320", "tokenizer/tiny_bpe", "train.vocab_size 300 -> 320"),
        ("samples_per_shard=512", "shards/tiny_text", "samples_per_shard 1024 -> 512"),
        ("training.lr=5e-4", f"checkpoint/tiny/{FIRST}", "training.lr 0.001 -> 0.0005"),
    ],
)
def test_a_changed_setting_is_named_and_what_lies_below_is_stale(planned, change, stale, why):
    _, make = planned
    made = make(change)
    order = list(states(made))
    below = [n for n in order[order.index(stale) :] if not n.startswith("tokenized/") or change.startswith("tokenizer")]
    assert {n: s for n, s in states(made).items() if s != "fresh"} == dict.fromkeys(below, "stale")
    assert why in reasons(made, stale)
    assert made.cost.tokens >= 40_000


def test_a_raw_file_more_is_named(planned):
    pipeline, make = planned
    raw = pipeline.home / "raw" / "tiny_text"
    shutil.copy(raw / "a.jsonl", raw / "c.jsonl")
    made = make()
    assert "1 of 3 raw files are new, changed or not tokenized: c.jsonl" in reasons(made, "tokenized/tiny_text")
    assert states(made)["shards/tiny_text"] == "stale"


def test_an_empty_home_and_a_gpu_give_assumed_hours(planned, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "empty"))
    shown = CliRunner().invoke(app, ["plan", "pretrain_1b", "--gpu", "H100", "--price", "2.5"])
    assert shown.exit_code == 0, shown.output
    assert "missing  checkpoint/pretrain_1b/t0250B" in shown.output
    assert "assumed: 40% MFU on H100" in shown.output
    assert "GPU-hours" in shown.output
    assert "at the price given" in shown.output
    assert not (tmp_path / "empty").exists()


def test_a_share_too_small_for_the_order_is_said_before_training(planned):
    _, make = planned
    sources = "[{name: tiny_text, files: ['raw/tiny_text/*.jsonl'], weight: 99999, max_bad_fraction: 0.5}, "
    sources += "{name: rare, files: [raw/tiny_text/a.jsonl], max_bad_fraction: 0.5}]"
    refusals = [f.what for f in make(f"sources={sources}").findings if f.level == "refusal"]
    assert any("source 1 of the mixture has less than 1/4096 of it" in what for what in refusals)


OTHER = """
extends: tiny
name: other
sources:
  - {name: tiny_text, files: ["raw/tiny_text/*.jsonl"], max_bad_fraction: 0.5}
  - {name: other_text, files: ["raw/other_text/*.jsonl"], max_bad_fraction: 0.5}
"""


def test_text_that_is_in_another_dataset_already_is_named(planned):
    """By what shards were made from, where neither names of files nor shards are the same."""
    pipeline, make = planned
    copied = pipeline.home / "raw" / "other_text"
    copied.mkdir()
    shutil.copy(pipeline.home / "raw" / "tiny_text" / "a.jsonl", copied / "renamed.jsonl")
    (pipeline.root / "recipes" / "other.yaml").write_text(OTHER)
    done = CliRunner().invoke(app, ["tokenize", "other", "--workers", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    more, fork = "milestones=[10K, 40K, 80K]", ("version=v2", "parent={run: tiny, milestone: 40K}", "milestones=[50K]")
    held_out = "validation={source: {name: held_out, shards: shards/other_text/v1}}"
    other_text = 'sources=[{name: other_text, files: ["raw/other_text/*.jsonl"], max_bad_fraction: 0.5}]'

    def warnings(*overrides: str) -> list[str]:
        return [f.what for f in make(*overrides).findings if f.level == "warning"]

    (warning,) = warnings(more, held_out)
    assert warning.startswith("1 of the validation set's files are also in tiny_text, such as renamed.jsonl")
    (warning,) = warnings(*fork, other_text)
    assert warning.startswith("1 files of other_text, such as ")
    assert "renamed.jsonl, were read by tiny in another dataset" in warning
    assert warnings(*fork) == []
