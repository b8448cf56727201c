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
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import load_experiment, recipe_names
from orchestration.definitions import build_definitions

GOLDEN = Path(__file__).parent / "golden" / "definitions.txt"
SETTINGS = ("OPENLM_RECIPES", "OPENLM_RAW_DATA", "OPENLM_TOKENIZER", "OPENLM_SHARDS_URL", "OPENLM_EVAL_DATA", OWNERS)


@pytest.fixture(scope="module")
def shipped() -> dg.Definitions:
    """The definitions of the shipped recipes, whatever the developer's own are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
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
def test_owners_that_are_none_are_refused_by_name(wrong, monkeypatch):
    monkeypatch.setenv(OWNERS, wrong)
    with pytest.raises(ConfigError, match="OPENLM_OWNERS: .* is neither team:NAME nor an e-mail address"):
        build_definitions([load_experiment("demo")])


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


def test_recipes_that_describe_one_dataset_differently_are_refused():
    one, other = load_experiment("pretrain_1b"), load_experiment("pretrain_3b", ["seq_len=1024"])
    with pytest.raises(ConfigError, match="pretrain_1b and pretrain_3b describe dataset pile differently"):
        build_definitions([one, other])


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
