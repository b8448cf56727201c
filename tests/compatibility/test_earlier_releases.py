"""Identities outlive the code: what an earlier release made is what it was, and a later field changes no fingerprint.

`identities_0_1_0.json` and `home_0_1_0.tar.zst` were written by the first release; nothing here may be written anew.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import zstandard
from commands import openlm
from pydantic import BaseModel

from openlm_pipeline.evaluation.scorecard import Scorecard, load_scorecard
from openlm_pipeline.evaluation.suite import IclTask, load_suite
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.experiments.spec import Dataset, Evaluation, Parent, Source, TokenizerSpec, Training
from openlm_pipeline.fingerprint import FIRST_FIELDS, Neutral, fingerprint, is_later, neutral_value, settings_tree
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.registry import TASK_TYPES
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import FileTokens, _identity
from openlm_pipeline.tokenization.packing_job import shards_identity
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo
from orchestration.definitions import build_definitions

HERE = Path(__file__).parent
FROZEN = json.loads((HERE / "identities_0_1_0.json").read_text())
TOKENIZER = TokenizerInfo("t", "ab" * 32, 50277, 0, {})
SPECS = (ModelConfig, Training, Parent, TokenizerSpec, Source, Dataset, Evaluation, IclTask, Scorecard)


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under which the first release wrote its identities."""
    for name, value in {
        "RAW_DATA": "/data/raw",
        "TOKENIZER": "/data/tokenizer.json",
        "EVAL_DATA": "/data/eval",
    }.items():
        monkeypatch.setenv(f"OPENLM_{name}", value)
    monkeypatch.delenv("OPENLM_RECIPES", raising=False)


def identity_of(experiment: Experiment) -> dict[str, Any]:
    versions = {d.name: f"{i:02d}" * 32 for i, d in enumerate(experiment.training_datasets())}
    return run_identity(
        experiment, versions, {"checkpoint": "ef" * 32, "tokens": 100_000} if experiment.parent else None
    )


@pytest.mark.parametrize("name", list(FROZEN["recipes"]))
def test_runs_files_and_shards_have_the_identity_of_the_first_release(name: str) -> None:
    frozen = FROZEN["recipes"][name]
    experiment = load_experiment(frozen["recipe"], frozen["overrides"])
    assert identity_of(experiment) == frozen["run"]
    assert fingerprint(identity_of(experiment)) == frozen["fingerprint"]
    for dataset in experiment.datasets():
        if dataset.source.shards:
            continue
        recorded = frozen["data"][dataset.name]
        file = FileTokens(
            name="f",
            identity=_identity(dataset, TOKENIZER, "cd" * 32),
            stamp="s",
            documents=1,
            quarantined=0,
            tokens=5,
            text_bytes=9,
            tokens_sha256="aa" * 32,
            engine="e",
            seconds=0.1,
        )
        assert {**file.identity, "max_bad_fraction": 0.001} == recorded["file"]
        assert file.version == recorded["version"]
        assert shards_identity(dataset, [file], TOKENIZER) == recorded["shards"]


@pytest.mark.parametrize("name", list(FROZEN["suites"]))
def test_suites_have_the_digest_of_the_first_release(name: str) -> None:
    assert load_suite(name).digest == FROZEN["suites"][name]


def test_what_dagster_recorded_as_code_versions_is_still_current() -> None:
    recipes = {frozen["recipe"] for frozen in FROZEN["recipes"].values()}
    definitions = build_definitions([load_experiment(name) for name in sorted(recipes)])
    found = {s.key.to_user_string(): s.code_version for a in definitions.assets for s in a.specs}
    assert {key: found.get(key) for key in FROZEN["code_versions"]} == FROZEN["code_versions"]


def with_field(kind: type[BaseModel], **fields: Any) -> type[BaseModel]:
    """`kind` as a later release could have it."""
    namespace = {"__annotations__": {n: a for n, (a, _) in fields.items()}, **{n: v for n, (_, v) in fields.items()}}
    return type(kind.__name__, (kind,), {**namespace, "__module__": kind.__module__})


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
def test_a_later_field_counts_only_where_it_is_not_neutral(kind: type[BaseModel]) -> None:
    later = with_field(kind, cycles=(int, 1), gate=(Annotated[str, Neutral("none")], "silu"))
    examples = {
        "Scorecard": lambda: load_scorecard(HERE / "scorecard_0_1_0.json").model_dump(),
        "ModelConfig": lambda: {"hidden_dim": 8, "n_layers": 1, "n_heads": 1},
        "Training": lambda: {"global_batch": 64, "lr": 1e-3},
        "Parent": lambda: {"run": "a", "milestone": "1K"},
        "TokenizerSpec": lambda: {"name": "t", "source": "x"},
        "Source": lambda: {"name": "s", "files": ["a"]},
        "Evaluation": lambda: {"suite": "demo"},
        "IclTask": lambda: {"label": "a", "dataset_uri": "a", "num_fewshot": [0], "icl_task_type": "schema"},
        "Dataset": lambda: {
            "source": {"name": "s", "files": ["a"]},
            "tokenizer": {"name": "t", "source": "x"},
            "seq_len": 8,
            "samples_per_shard": 4,
            "shuffle_seed": 0,
        },
    }
    fields = examples[kind.__name__]()
    before = settings_tree(kind(**fields))
    assert settings_tree(later(**fields, gate="none")) == before
    assert settings_tree(later(**fields)) == {**before, "gate": "silu"}  # its default has moved, its neutral value not
    assert settings_tree(later(**fields, gate="none", cycles=2)) == {**before, "cycles": 2}


def test_a_later_field_deep_inside_counts_the_same() -> None:
    tree = settings_tree(load_scorecard(HERE / "scorecard_0_1_0.json"))
    task = tree["tasks"][0]
    kind = type(load_scorecard(HERE / "scorecard_0_1_0.json").tasks[0])
    assert settings_tree(with_field(kind, likelihood=(float | None, None))(**task)) == task
    assert fingerprint({"scorecard": tree}) == (HERE / "scorecard_0_1_0.sha256").read_text().strip()


def test_a_later_field_of_a_row_changes_no_item_hash() -> None:
    for _, task_type in TASK_TYPES:
        kind = task_type.Fields
        row = kind.model_construct(**dict.fromkeys(kind.model_fields, "a"))
        later = with_field(kind, passage=(Annotated[str | None, Neutral(None)], None))
        with_passage = later.model_construct(**vars(row), passage="b")
        assert settings_tree(later.model_construct(**vars(row))) == row.model_dump(mode="json", warnings=False)
        assert settings_tree(with_passage)["passage"] == "b"


def specs(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A class with those of its fields, all the way down."""
    yield kind
    for field in kind.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from specs(part)


def test_neutral_values_never_change() -> None:
    """A new field of a spec is added to `neutral_values.json` with its neutral value, which then stays."""
    found = {
        f"{kind.__name__}.{name}": neutral_value(kind, name)
        for spec in SPECS
        for kind in specs(spec)
        for name in kind.model_fields
        if is_later(kind, name)
    }
    assert json.loads(json.dumps(found)) == json.loads((HERE / "neutral_values.json").read_text())


def test_no_field_of_the_first_release_is_gone() -> None:
    known = {kind.__name__: kind for spec in SPECS for kind in specs(spec)}
    for name, fields in FIRST_FIELDS.items():
        assert set(fields.split()) <= set(known[name].model_fields), name


def unpacked(archive: Path, to: Path) -> Path:
    content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archive.read_bytes())).read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(to, filter="data")
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def old_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENLM_RECIPES", str(HERE / "recipes_0_1_0"))
    return Home(unpacked(HERE / "home_0_1_0.tar.zst", tmp_path / "home"))


@pytest.mark.parametrize("recipe", ["old", "old_fork"])
def test_a_home_of_the_first_release_is_fresh(old_home: Home, recipe: str) -> None:
    made = plan(load_experiment(recipe), old_home)
    assert [f"{a.state} {a.name} {a.why}" for a in made.todo] == []


def test_every_stage_reuses_a_home_of_the_first_release(old_home: Home) -> None:
    before = contents(old_home.root)
    for command in (["tokenize", "old"], ["train", "old"], ["evaluate", "old"], ["train", "old_fork"]):
        done = openlm(*command, variables={})
        assert done.returncode == 0, done.stderr
        assert "superseded" not in done.stdout + done.stderr
        assert "reused" in done.stdout
    after = contents(old_home.root)
    new = {name for name in after if name.endswith((".sums", "/documents.parquet"))}
    assert set(after) == set(before) | new and new
    for name in {name for name in before if name.startswith("shards/") and name.endswith((".jsonl", "dataset.json"))}:
        lines = zip(before.pop(name).decode().splitlines(), after.pop(name).decode().splitlines())
        if name.endswith("manifest.jsonl"):  # each line, and `dataset.json`, say what they said, and more
            assert all(json.loads(old).items() <= json.loads(new).items() for old, new in lines)
    rewritten = {name for name in before if before[name] != after[name]}
    resolved = {name for name in rewritten if name.endswith("experiment.yaml")}
    touched = {name for name in rewritten if name.startswith(("tokenized/", "tokenizers/")) and name.endswith(".json")}
    summed_up = {name for name in rewritten if name.endswith("scorecard.json")}
    sealed = {name for name in rewritten if name.startswith("runs/") and name.endswith("run.json")}
    assert rewritten == resolved | touched | summed_up | sealed
    for name in sealed:
        old, new = (json.loads(files[name]) for files in (before, after))
        assert {**new, **old} == new and set(new) - set(old) == {"experiment_sha256", "seal_sha256"}
    for name in summed_up:  # the same items and scores; intervals, and what else is said of them, may be others
        scores = [[(t["task"], t["accuracy"]) for t in json.loads(c[name])["tasks"]] for c in (before, after)]
        assert scores[0] == scores[1]
    for name in touched:  # unpacking gave the raw files another time of change
        old, new = (json.loads(files[name]) for files in (before, after))
        times = {name: new[name] for name in ("stamp", "stamps", "seal_sha256") if name in new}
        assert {**old, **times} == new


@pytest.mark.parametrize("recipe", ["km", "kn"])
def test_the_shared_home_of_the_first_release_is_fresh(
    recipe: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_data / "home_8373ecf"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path))
    monkeypatch.setenv("OPENLM_RECIPES", str(folder / "recipes"))
    made = plan(load_experiment(recipe), Home(unpacked(folder / "home.tar.zst", tmp_path)))
    assert [f"{a.state} {a.name} {a.why}" for a in made.todo] == []
