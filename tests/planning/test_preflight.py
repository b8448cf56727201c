"""Before anything is spent, all that a recipe needs is looked at; every command and Dagster say the same of it."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app, main
from openlm_pipeline.errors import ConsentError
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.pipeline.preflight import preflight
from openlm_pipeline.pipeline.training import train
from openlm_pipeline.result import CONSENTS, Finding, refuse
from openlm_pipeline.runs import machine
from openlm_pipeline.runs.estimates import estimate_memory
from openlm_pipeline.runs.machine import Gpu
from openlm_pipeline.storage.home import Home

GB = 10**9


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    """A home with 3 MB of raw text for the shipped recipes, on a machine with eight large GPUs and disks."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [json.dumps({"text": "some words of a text " * 50}) for _ in range(3000)]
    (raw / "a.jsonl").write_text("\n".join(rows))
    shutil.copy(raw / "a.jsonl", raw / "a.jsonl.zst")  # only its size is looked at
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENLM_RAW_DATA", str(raw))
    monkeypatch.setenv("OPENLM_TOKENIZER", str(tmp_path / "tokenizer.json"))
    monkeypatch.delenv("OPENLM_RECIPES", raising=False)
    has_gpus(monkeypatch, 8, 80 * GB)
    monkeypatch.setattr(machine, "free_disk", lambda folder: 10**15)
    return Home.from_env()


def has_gpus(monkeypatch, count: int, memory_bytes: int) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: count > 0)
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("NVIDIA H100 80GB HBM3", memory_bytes)] * count)


def of(level: str, experiment: Experiment, home: Home, *kinds: str, **options) -> list[Finding]:
    """Findings of one level on making all artefacts of some kinds."""
    label = [label for label, _ in experiment.labelled_milestones()]
    names = {
        "tokenizer": [f"tokenizer/{experiment.tokenizer.name}"],
        "shards": [f"shards/{d.name}" for d in experiment.datasets()],
        "checkpoint": [f"checkpoint/{experiment.name}/{name}" for name in label],
        "scorecard": [f"scorecard/{experiment.name}/{name}" for name in label],
    }
    makes = [name for kind in kinds for name in names[kind]]
    return [f for f in preflight(experiment, home, makes, **options) if f.level == level]


def refused(experiment: Experiment, home: Home, *kinds: str) -> dict[str | None, str]:
    return {f.consent: f"{f.what}. {f.next}" for f in of("refusal", experiment, home, *kinds)}


def test_raw_text_says_how_often_it_would_be_read(home):
    said = refused(load_experiment("pretrain_1b"), home, "checkpoint")
    assert set(said) == {"repeat_data"}
    assert "each text of pile about" in said["repeat_data"] and "1.6T tokens" in said["repeat_data"]
    few = load_experiment("pretrain_11m", ["milestones=[3M]", "training.warmup=0"])
    assert refused(few, home, "checkpoint") == {}
    assert any(f.what.startswith("pile has about 2.") for f in of("ok", few, home, "checkpoint"))


def few(*overrides: str, recipe: str = "pretrain_1b") -> Experiment:
    return load_experiment(recipe, ["milestones=[6M]", "training.warmup=0", *overrides])


def test_fewer_gpus_than_processes_are_refused(home, monkeypatch):
    has_gpus(monkeypatch, 2, 80 * GB)
    (finding,) = of("refusal", few(), home, "checkpoint")
    assert (finding.what, finding.consent) == ("launcher.processes is 8, and this machine has 2 GPUs", None)
    assert "launcher.processes=2" in finding.next


def test_a_step_that_does_not_fit_names_what_would(home, monkeypatch):
    has_gpus(monkeypatch, 8, 24 * GB)
    experiment = few(recipe="pretrain_1b")
    said = refused(experiment, home, "checkpoint")
    assert set(said) == {"memory"}
    setting = said["memory"].partition("It fits with ")[2].split(";")[0].split(", or")[0]
    changed = few(setting)
    assert estimate_memory(changed, 8).total + machine_context() <= 24 * GB < estimate_memory(experiment, 8).total
    assert refused(changed, home, "checkpoint") == {}


def machine_context() -> int:
    from openlm_pipeline.pipeline import preflight as module

    return module._CONTEXT_BYTES


def test_on_another_machine_the_named_gpu_counts(home, monkeypatch):
    has_gpus(monkeypatch, 0, 0)
    monkeypatch.setattr(machine, "CPU_FLOPS", 1e30)
    memory = [f for f in of("refusal", few(), home, "checkpoint", device="T4") if f.consent == "memory"]
    assert "each T4 has 16 GB" in memory[0].what
    assert any("each H200 has 141 GB" in f.what for f in of("ok", few(), home, "checkpoint", device="H200"))


def test_on_a_cpu_all_trainers_share_its_memory(home, monkeypatch):
    has_gpus(monkeypatch, 0, 0)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 24 * GB)
    said = refused(few(), home, "checkpoint")
    assert set(said) == {"memory"}
    assert "this machine has 24 GB" in said["memory"]


def test_a_small_disk_is_refused_with_what_it_is_for(home, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda folder: 20 * GB)
    said = refused(few(), home, "shards", "checkpoint")
    assert set(said) == {"disk"}
    for part in ("token streams", "shards", "milestones", "rotating checkpoints", "20 GB are free"):
        assert part in said["disk"]
    assert refused(few(), home, "shards") == {}


def test_a_tokenizer_that_is_nowhere_is_refused(home, tmp_path, monkeypatch):
    assert refused(few(), home, "tokenizer") == {}
    (tmp_path / "tokenizer.json").unlink()
    assert "there is no tokenizer at" in refused(few(), home, "tokenizer")[None]
    monkeypatch.setattr(
        "huggingface_hub.file_download.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}"
    )
    monkeypatch.setenv("OPENLM_TOKENIZER", "nobody/nothing")
    said = refused(few(), home, "tokenizer")[None]
    assert "could not be fetched from the Hugging Face hub" in said and "OPENLM_TOKENIZER" in said


def test_missing_evaluation_files_are_named(home, tmp_path, monkeypatch):
    said = refused(few(), home, "scorecard")
    assert set(said) == {"unscored"} and "12 of the 12 files of the suite openlm are not there" in said["unscored"]
    assert "OPENLM_EVAL_DATA" in said["unscored"]
    suite = tmp_path / "suite.yaml"
    row = "{label: a, dataset_uri: %s, num_fewshot: [0], icl_task_type: language_modeling}"
    suite.write_text(f"name: own\nicl_tasks:\n  - {row % (tmp_path / 'a.jsonl')}\n")
    (tmp_path / "a.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    assert refused(few(f"evaluation.suite={suite}"), home, "scorecard") == {}


def test_a_cluster_without_its_programs_is_refused(home, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    slurm = ("launcher.kind=slurm", "launcher.slurm={partition: gpu}")
    assert "squeue" in refused(few(*slurm), home, "checkpoint")[None]


def test_secrets_are_looked_for_by_name(home, monkeypatch):
    wandb = "execution.report_to=[wandb]"
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "WANDB_API_KEY is not set" in refused(few(wandb), home, "checkpoint")[None]
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    assert refused(few(wandb), home, "checkpoint") == {}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    upload = few("execution.upload_to=s3://bucket/runs")
    (warning,) = of("warning", upload, home, "checkpoint")
    assert "no credentials for s3:// are set here (AWS_ACCESS_KEY_ID" in warning.what
    monkeypatch.setenv("AWS_PROFILE", "me")
    assert of("warning", upload, home, "checkpoint") == []


def test_a_cache_too_small_for_its_order_is_refused(home):
    """With `permutation` nearly each sample would fetch a shard."""
    remote = ("execution.shards_url=memory://bucket/shards", "execution.shard_cache_bytes=1000000")
    said = refused(few(*remote), home, "checkpoint")[None]
    assert "training.sampling=permutation reads in turn" in said and "training.sampling=windowed" in said
    windowed = ("training.sampling=windowed", "training.window_shards=1", "samples_per_shard=8")
    assert refused(few(*remote, *windowed), home, "checkpoint") == {}
    said = refused(few(*remote, "training.sampling=windowed"), home, "checkpoint")[None]
    assert "64 shards of pile, which are read together" in said


def test_launch_train_plan_and_dagster_refuse_in_the_same_words(home, monkeypatch, capsys, tmp_path):
    import dagster as dg

    from orchestration.definitions import build_definitions

    has_gpus(monkeypatch, 0, 0)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 24 * GB)
    monkeypatch.setattr(machine, "free_disk", lambda folder: 20 * GB)
    experiment = load_experiment("pretrain_1b")
    text = "\n".join(f"{f.what}\n{f.next}" for f in plan(experiment, home).findings if f.level == "refusal")
    for consent in ("repeat_data", "cpu", "memory", "disk", "unscored"):
        assert f"--allow {consent}" in text
    shown = CliRunner().invoke(app, ["plan", "pretrain_1b"])
    assert all(line in shown.output for line in (f.what for f in plan(experiment, home).findings))
    monkeypatch.setattr("sys.argv", ["openlm", "launch", "pretrain_1b"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == ConsentError.exit_code
    assert capsys.readouterr().err.strip() == f"error: {text}"
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        job = build_definitions([experiment]).resolve_job_def("pretrain_1b")
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    (failed,) = [e for e in result.all_events if e.is_step_failure]
    assert (failed.step_key, failed.step_failure_data.user_failure_data.description) == ("preflight", text)


def test_a_large_recipe_is_not_trained_by_a_run_of_another_name(home, tmp_path):
    import dagster as dg

    from assets.common import PREFLIGHT_KEY, checkpoint_key, shards_key, tokenizer_key
    from orchestration.definitions import build_definitions

    experiment = load_experiment("pretrain_1b")
    definitions = build_definitions([experiment])
    keys = [checkpoint_key("pretrain_1b", label) for label, _ in experiment.labelled_milestones()]
    keys += [tokenizer_key("gpt_neox_20b"), shards_key(experiment.datasets()[0])]
    everything = dg.define_asset_job("everything", dg.AssetSelection.assets(PREFLIGHT_KEY, *keys))
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        job = dg.Definitions.merge(definitions, dg.Definitions(jobs=[everything])).resolve_job_def("everything")
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    (failed,) = [e for e in result.all_events if e.is_step_failure]
    said = failed.step_failure_data.user_failure_data.description
    assert "this run would train all of pretrain_1b" in said and "Launch the job pretrain_1b" in said
    assert "openlm/allow=whole" in said


def test_every_consent_has_its_refusal(home, monkeypatch):
    """And with all of them nothing is refused but what no consent helps."""
    has_gpus(monkeypatch, 0, 0)
    monkeypatch.setattr(machine, "free_disk", lambda folder: 20 * GB)
    refuse(plan(load_experiment("pretrain_1b"), home).findings, CONSENTS)


def test_the_trainer_refuses_what_preflight_does(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path / "copy")
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "free_disk", lambda folder: 1000)
    experiment = load_experiment("tiny", ["milestones=[10K,40K,50K]"])
    with pytest.raises(ConsentError, match=r"of disk are needed \(milestones .*, and 1 kB are free"):
        list(train(experiment, Home.from_env(), 50_000, lambda _: None))


def test_a_plan_counts_all_stages(home, tmp_path):
    made = plan(few("evaluation=null"), home, device="H100", price=2.0)
    assert [stage.name for stage in made.stages] == ["tokenize", "train"]
    assert made.stages[1].gpu_hours == pytest.approx(made.cost.gpu_hours)
    lines = "\n".join(made.lines())
    assert "GPU-hours" in lines and f"{made.cost.gpu_hours * 2:,.2f}" in lines
    unknown = "\n".join(plan(few("evaluation=null"), home).lines())
    assert "what is known" in unknown
