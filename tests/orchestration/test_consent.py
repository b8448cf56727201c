"""Nothing made is set aside unasked: a job's first step refuses it, and names the change and both ways on."""

import dagster as dg
import pytest
from tiny_pipeline import LABELS, TinyPipeline

from assets.common import user_errors
from openlm_pipeline.errors import ConfigError, ConsentError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.pipeline.preflight import preflight
from openlm_pipeline.pipeline.training import train
from openlm_pipeline.result import ALLOW_TAG, CONSENTS, parse_allow
from openlm_pipeline.runs import machine
from openlm_pipeline.storage.home import Home


def edit(pipeline: TinyPipeline, old: str, new: str) -> None:
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Failed step -> what it says to a person."""
    failed = [e for e in result.all_events if e.is_step_failure]
    return {e.step_key: e.step_failure_data.user_failure_data.description for e in failed}


def started(result: dg.ExecuteInProcessResult) -> list[str]:
    return [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_START]


@pytest.fixture
def edited(finished, tmp_path) -> TinyPipeline:
    """A finished pipeline whose recipe has another learning rate since."""
    pipeline = finished.copy(tmp_path)
    edit(pipeline, "lr: 1.0e-3", "lr: 2.0e-3")
    return pipeline


def test_an_edited_learning_rate_retrains_nothing_unasked(edited):
    before = edited.snapshot("runs")
    result = edited.execute("tiny")
    assert not result.success
    assert started(result) == ["preflight"]
    [(step, said)] = failures(result).items()
    assert step == "preflight"
    assert "training.lr 0.001 -> 0.002" in said
    assert "give the recipe another `version` or name" in said and f"{ALLOW_TAG}=supersede" in said
    assert edited.snapshot("runs") == before
    assert not edited.snapshot("runs/tiny").keys() & {"v1.superseded-1/run.json"}


def test_a_refusal_is_not_retried():
    with pytest.raises(dg.Failure) as failure, user_errors():
        raise ConsentError("no")
    assert failure.value.allow_retries is False


def test_the_runs_tag_allows_it(edited):
    edit(edited, "[10K, 40K]", "[10K]")
    result = edited.execute("tiny", tags={ALLOW_TAG: "supersede"})
    assert result.success
    assert (edited.run_folder.with_name("v1.superseded-1") / "run.json").exists()


@pytest.mark.parametrize("tag", ["dagster/sensor_name", "dagster/schedule_name", "dagster/auto_materialize"])
def test_automation_never_consents(edited, tag):
    result = edited.execute("tiny", tags={ALLOW_TAG: "supersede", tag: "x"})
    assert list(failures(result)) == ["preflight"]


def test_a_misspelt_consent_is_refused(edited):
    said = failures(edited.execute("tiny", tags={ALLOW_TAG: "superseed"}))
    assert "did you mean 'supersede'?" in said["preflight"]
    with pytest.raises(ConfigError, match="did you mean 'remake'"):
        parse_allow("supersede,remkae")
    assert parse_allow(["supersede, cpu", "repeat_data"]) == {"supersede", "cpu", "repeat_data"}
    assert parse_allow(None) == frozenset()


def test_a_damaged_milestone_is_not_trained_again_unasked(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    (part,) = list((pipeline.run_folder / "checkpoints" / "step-00000157").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    result = pipeline.execute("tiny")
    assert list(failures(result)) == ["preflight"]
    assert f"checkpoint/tiny/{LABELS[1]} is damaged" in failures(result)["preflight"]
    assert pipeline.execute("tiny", tags={ALLOW_TAG: "remake"}).success


def test_another_vocabulary_sets_nothing_aside_unasked(finished, tmp_path):
    pipeline = finished.copy(tmp_path)
    pipeline.write_recipe(vocab_size=280)
    before = pipeline.snapshot()
    said = failures(pipeline.execute("tiny"))["preflight"]
    for part in (
        "tokenizer/tiny_bpe was made",
        "shards/tiny_text was made",
        "the run tiny was made",
        "vocab_size 300 -> 280",
    ):
        assert part in said
    assert pipeline.snapshot() == before


@pytest.fixture
def home(finished, tmp_path, monkeypatch) -> Home:
    pipeline = finished.copy(tmp_path)
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)
    return Home(pipeline.home)


def findings(home: Home, *overrides: str) -> dict[str | None, str]:
    return {f.consent: f.what for f in plan(load_experiment("tiny", overrides), home).findings if f.level != "ok"}


def test_plan_says_what_needs_a_consent(home):
    assert findings(home) == {}
    assert set(findings(home, "training.lr=2e-3")) == {"supersede"}
    said = findings(home, "milestones=[10K,40K,100M]")
    assert set(said) == {"repeat_data"} and "times: 100M tokens, of which" in said["repeat_data"]


def test_repeating_text_many_times_is_asked_for(home):
    experiment = load_experiment("tiny", ["milestones=[10K,40K,100M]"])
    with pytest.raises(ConsentError, match=r"would see each text of tiny_text [\d,]+ times.*\n.*--allow repeat_data"):
        list(train(experiment, home, 100_000_000, lambda _: None))
    assert list(train(experiment, home, 40_000, lambda _: None))  # what is there is not refused


def test_days_on_a_cpu_are_asked_for(home, monkeypatch):
    monkeypatch.setattr(machine, "CPU_FLOPS", 1e9)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    experiment = load_experiment("tiny", ["milestones=[10K,40K,50K]"])
    with pytest.raises(ConsentError, match=r"this machine has no GPU.*\n.*--allow cpu"):
        list(train(experiment, home, 50_000, lambda _: None))
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert {f.level for f in preflight(experiment, home, ["checkpoint/tiny/t0050K"])} == {"ok"}


def test_nothing_is_set_aside_for_what_is_then_refused(home):
    experiment = load_experiment("tiny", ["training.lr=2e-3", "milestones=[10K,40K,100M]"])
    runs = home.run("tiny", "v1").parent
    before = sorted(runs.rglob("*"))
    with pytest.raises(ConsentError) as refused:
        list(train(experiment, home, 100_000_000, lambda _: None))
    assert "--allow supersede" in str(refused.value) and "--allow repeat_data" in str(refused.value)
    with pytest.raises(ConsentError, match="--allow repeat_data"):
        list(train(experiment, home, 100_000_000, lambda _: None, allow={"supersede"}))
    assert sorted(runs.rglob("*")) == before


def test_every_consent_is_documented():
    for name, meaning in CONSENTS.items():
        assert name.isidentifier() and meaning
