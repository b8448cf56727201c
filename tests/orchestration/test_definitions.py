"""The graph is the one that was designed, and loading it is cheap."""

import difflib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline, environment

from assets.common import OWNERS
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.pipeline.recipes import load_recipes
from orchestration.definitions import build_definitions

GOLDEN = Path(__file__).parent / "golden" / "definitions.txt"
SETTINGS = ("OPENLM_RECIPES", "OPENLM_RAW_DATA", "OPENLM_TOKENIZER", "OPENLM_SHARDS_URL", "OPENLM_EVAL_DATA", OWNERS)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    """The definitions of the shipped recipes, whatever the developer's own are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        patch.setenv("OPENLM_HOME", str(tmp_path_factory.mktemp("home")))
        return build_definitions([load_experiment(name) for name in recipe_names()])


def _fields(title: str, **fields: object) -> list[str]:
    """A block of one line a field; those that are empty are left out."""
    return [title, *(f"  {name.replace('_', ' ')}: {value}" for name, value in fields.items() if value), ""]


def _words(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))


def _keys(keys: Iterable[dg.AssetKey]) -> str:
    return _words(key.to_user_string() for key in keys)


def _described(definitions: dg.Definitions) -> list[str]:
    """All that Dagster is told of assets, checks, jobs, sensors and schedules."""
    graph, repository = definitions.resolve_asset_graph(), definitions.get_repository_def()
    lines = []
    for key in sorted(graph.get_all_asset_keys(), key=lambda k: k.path):
        node = graph.get(key)
        lines += _fields(
            f"asset {key.to_user_string()}",
            description=node.description,
            group=node.group_name,
            kinds=_words(node.kinds),
            owners=_words(node.owners),
            code_version=node.code_version,
            partitions=node.partitions_def and node.partitions_def.name,
            backfill="one run" if node.backfill_policy else None,
            made_from=_keys(node.parent_keys),
            pools=_words(node.pools),
            automation=node.automation_condition and node.automation_condition.get_label(),
            metadata=_words(f"{name}={value}" for name, value in node.metadata.items()),
            execution=node.execution_type.value.lower(),
        )[:-1]
        for check in sorted((graph.get(check) for check in node.check_keys), key=lambda c: c.key.name):
            blocking = " (blocking)" if check.blocking else ""
            lines.append(f"  check {check.key.name}{blocking}: {check.description or ''}".rstrip())
        lines.append("")
    for job in sorted(repository.get_all_jobs(), key=lambda job: job.name):
        if not job.name.startswith("__"):
            assets = _keys(job.asset_layer.executable_asset_keys)
            lines += _fields(
                f"job {job.name}", description=job.description, partitions=job.partitions_def, assets=assets
            )
    for sensor in sorted(repository.sensor_defs, key=lambda sensor: sensor.name):
        lines += _fields(
            f"sensor {sensor.name}",
            description=sensor.description,
            kind=sensor.sensor_type.value.lower(),
            status=sensor.default_status.value.lower(),
            every_seconds=sensor.minimum_interval_seconds,
        )
    for schedule in sorted(repository.schedule_defs, key=lambda schedule: schedule.name):
        lines += _fields(
            f"schedule {schedule.name}",
            description=schedule.description,
            status=schedule.default_status.value.lower(),
            cron=schedule.cron_schedule,
        )
    return lines


def test_definitions_are_loadable(shipped):
    dg.Definitions.validate_loadable(shipped)


def test_definitions_are_those_of_the_golden_file(shipped, tmp_path):
    now = tmp_path / GOLDEN.name
    now.write_text("\n".join(_described(shipped)))
    changed = list(difflib.unified_diff(GOLDEN.read_text().split("\n"), now.read_text().split("\n"), n=2, lineterm=""))
    assert not changed, "\n".join([*changed, f"If it is meant: cp {now} {GOLDEN}"])


def test_every_asset_says_what_it_is_and_whose(shipped):
    graph = shipped.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        said = (node.description, node.group_name, node.kinds, node.code_version, node.owners)
        assert all(said), f"{key.to_user_string()}: {said}"
        assert all(graph.get(check).description for check in node.check_keys), key


def test_owners_are_those_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(OWNERS, "team:pretraining, me@example.org")
    with TinyPipeline.create(tmp_path / "pipeline").active() as definitions:
        graph = definitions.resolve_asset_graph()
        owners = {tuple(sorted(graph.get(key).owners)) for key in graph.get_all_asset_keys()}
    assert owners == {("me@example.org", "team:pretraining")}


@pytest.mark.parametrize("wrong", ["pretraining", "team:", "team:a,,team:b", "me@example", "team:a b"])
def test_owners_that_are_none_are_shown_by_name_and_stop_nothing(wrong, monkeypatch):
    monkeypatch.setenv(OWNERS, wrong)
    definitions = build_definitions([load_experiment("demo")])
    said = definitions.resolve_asset_graph().get(dg.AssetKey(["not_loaded", OWNERS])).description
    assert said.startswith("OPENLM_OWNERS: ") and "is neither team:NAME nor an e-mail address" in said
    assert definitions.resolve_job_def("demo")


def test_each_asset_is_made_from_what_the_design_says(tmp_path):
    with TinyPipeline.create(tmp_path / "pipeline").active() as definitions:
        graph = definitions.resolve_asset_graph()
    first, last = LABELS
    expected = {
        "raw_files/tiny_text": set(),
        "preflight": set(),
        "tokenizer/tiny_bpe": {"preflight"},
        "tokenized/tiny_text": {"raw_files/tiny_text", "tokenizer/tiny_bpe"},
        "shards/tiny_text": {"tokenized/tiny_text", "tokenizer/tiny_bpe"},
        f"checkpoint/tiny/{first}": {"shards/tiny_text"},
        f"checkpoint/tiny/{last}": {"shards/tiny_text", f"checkpoint/tiny/{first}"},
        f"scorecard/tiny/{first}": {f"checkpoint/tiny/{first}"},
        f"scorecard/tiny/{last}": {f"checkpoint/tiny/{last}"},
        "task_files/tiny": set(),
        "contamination/tiny_text/tiny": {"shards/tiny_text", "task_files/tiny"},
        "report/tiny": {f"scorecard/tiny/{first}", f"scorecard/tiny/{last}"},
    }
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == expected


def test_every_recipe_has_a_job_and_no_job_is_partitioned(shipped):
    jobs = {job.name: job for job in shipped.resolve_all_job_defs() if not job.name.startswith("__")}
    assert set(recipe_names()) <= set(jobs)
    assert {"evaluate_demo", "tokenize_embedded", "tokenize_pile"} <= set(jobs)
    assert [name for name, job in jobs.items() if job.partitions_def is not None] == []


def test_a_recipe_job_covers_all_of_its_recipe(shipped):
    selected = shipped.resolve_job_def("demo").asset_layer.executable_asset_keys
    names = {key.to_user_string() for key in selected}
    assert {"corpus/embedded", "tokenizer/demo_bpe", "shards/embedded", "shards/embedded_heldout"} < names
    milestones = [label for label, _ in load_experiment("demo").labelled_milestones()]
    assert {f"{kind}/demo/{label}" for kind in ("checkpoint", "scorecard") for label in milestones} < names
    assert "report/demo" in names


NOT_LOADED = {
    "unknown": "extends: tiny\nname: unknown\ntraining:\n  lrr: 1\n",
    "falling": "extends: tiny\nname: falling\nmilestones: [40K, 10K]\n",
    "suiteless": "extends: tiny\nname: suiteless\nevaluation: {suite: nosuch.yaml}\n",
    "broken": "a: [",
    "disagreeing": "extends: tiny\nname: disagreeing\nseq_len: 16\n",
    "evaluate_tiny": "extends: tiny\nname: evaluate_tiny\n",
    "derive": "extends: tiny\nname: derive\n",
    "input": "extends: tiny\nname: input\n",
    "shards__pile": "extends: tiny\nname: shards__pile\n",
    "Upper-Case": "extends: tiny\nname: Upper-Case\n",
}


def test_what_is_not_loaded_is_shown_and_the_rest_is_as_before(tmp_path):
    """Each as an asset, and as a job that fails with its error; `_` makes a name where Dagster needs another."""
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    for name, text in NOT_LOADED.items():
        (pipeline.root / "recipes" / f"{name}.yaml").write_text(text)
    with pipeline.active() as before:
        other = f"{pipeline.root}/recipes:{tmp_path}/nowhere/unknown"  # a folder, of which two share a name
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENLM_RECIPES", other)
            loaded, errors = load_recipes(["tiny", *NOT_LOADED])
        assert [e.name for e in loaded] == ["tiny"] and set(errors) == {f"{tmp_path}/nowhere/unknown", *NOT_LOADED}
        definitions = build_definitions(loaded, errors)
        dg.Definitions.validate_loadable(definitions)
        renamed = {
            "evaluate_tiny": "evaluate_tiny_",
            "derive": "derive_",
            "input": "input_",
            "Upper-Case": "Upper_Case",
        }
        names = {renamed.get(name, name) for name in NOT_LOADED} | {"unknown_"}
        jobs = {job.name: job for job in definitions.resolve_all_job_defs()}
        assert set(jobs) == {job.name for job in before.resolve_all_job_defs()} | names
        graph = definitions.resolve_asset_graph()
        added = graph.get_all_asset_keys() - before.resolve_asset_graph().get_all_asset_keys()
        assert added == {dg.AssetKey(["not_loaded", name]) for name in names}
        assert graph.external_asset_keys >= added  # "Materialize all" leaves them alone
        for name in names:
            error = graph.get(dg.AssetKey(["not_loaded", name])).description
            assert error in errors.values() and error in jobs[name].description
            failed = jobs[name].execute_in_process(raise_on_error=False)
            (event,) = [event for event in failed.all_events if event.is_step_failure]
            assert event.step_failure_data.user_failure_data.description == error


def test_the_graph_shows_what_openlm_only_names(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    program = "from orchestration.definitions import defs; print(*(j.name for j in defs.resolve_all_job_defs()))"
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment(pipeline, OPENLM_ONLY="ti*, pretrain_1b,nosuch"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    jobs = {name for name in shown.stdout.split() if not name.startswith("__")}
    both = {
        f"{before}{run}{after}"
        for run in ("tiny", "pretrain_1b")
        for before, after in (("", ""), ("", "_checkpoints"), ("evaluate_", ""))
    }
    assert jobs == both | {"tokenize_tiny_text", "tokenize_pile", "derive", "nosuch"}, shown.stderr


def test_the_job_derive_saves_a_recipe_that_is_a_job_once_definitions_are_loaded_again(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")

    def run(**settings):
        with pipeline.active() as definitions:
            config = {"ops": {"new_recipe": {"config": settings}}}
            return definitions.resolve_job_def("derive").execute_in_process(config, raise_on_error=False)

    made = run(recipe="tiny", overrides=["training.lr=2e-3"])
    assert made.success
    (output,) = [e for e in made.all_events if e.is_successful_output]
    assert output.event_specific_data.metadata["next"].value == "Reload definitions; job tiny_lr_2e_3"
    with pipeline.active():
        again = build_definitions(*load_recipes(["tiny*"]))
        keys = {key.to_user_string() for key in again.resolve_job_def("tiny_lr_2e_3").asset_layer.executable_asset_keys}
    assert {f"checkpoint/tiny_lr_2e_3/{LABELS[0]}", "shards/tiny_text", "report/tiny_lr_2e_3"} < keys
    refused = run(recipe="tiny", overrides=["training.lrr=1"], name="mine")
    (event,) = [event for event in refused.all_events if event.is_step_failure]
    assert "did you mean 'lr'? (override training.lrr=1)" in event.step_failure_data.user_failure_data.description
    assert [path.name for path in (pipeline.home / "recipes").iterdir()] == ["tiny_lr_2e_3.yaml"]


def test_loading_the_definitions_imports_no_heavy_library():
    heavy = {"torch", "matplotlib", "distributed", "scipy", "huggingface_hub", "tokenizers"}
    program = f"import sys, orchestration.definitions; print(sorted({heavy!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (loaded.returncode, loaded.stdout.strip()) == (0, "[]"), loaded.stderr
