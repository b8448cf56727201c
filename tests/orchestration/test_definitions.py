"""The graph is the one that was designed, and loading it is cheap."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import LABELS, REPOSITORY, TinyPipeline, environment

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import load_experiment, recipe_names
from orchestration.definitions import build_definitions

GOLDEN = Path(__file__).parent / "golden" / "assets.txt"


@pytest.fixture(scope="module")
def shipped() -> dg.Definitions:
    """The definitions of the shipped recipes, whatever the developer's own are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OPENLM_RECIPES", "OPENLM_RAW_DATA", "OPENLM_TOKENIZER"):
            patch.delenv(name, raising=False)
        return build_definitions([load_experiment(name) for name in recipe_names()])


def _lines(definitions: dg.Definitions) -> list[str]:
    """One line an asset: key, group, kinds, partitioned or not, checks, and the keys it is made from."""
    graph = definitions.resolve_asset_graph()
    lines = []
    for key in sorted(graph.get_all_asset_keys(), key=lambda k: k.path):
        node = graph.get(key)
        checks = ", ".join(sorted(check.name for check in node.check_keys))
        parents = ", ".join(sorted(parent.to_user_string() for parent in node.parent_keys))
        partitioned = " [a raw file each]" if node.partitions_def else ""
        words = f"{key.to_user_string()}{partitioned} | {node.group_name} | {', '.join(sorted(node.kinds))}"
        lines.append(f"{words} | checks: {checks or '-'} | from: {parents or '-'}")
    return lines


def test_definitions_are_loadable(shipped):
    dg.Definitions.validate_loadable(shipped)


def test_assets_are_those_of_the_golden_file(shipped, tmp_path):
    now = tmp_path / "assets.txt"
    now.write_text("\n".join(_lines(shipped)) + "\n")
    assert now.read_text().splitlines() == GOLDEN.read_text().splitlines(), f"if it is meant, copy {now} to {GOLDEN}"


def test_each_asset_is_made_from_what_the_design_says(tmp_path):
    with TinyPipeline.create(tmp_path / "pipeline").active() as definitions:
        graph = definitions.resolve_asset_graph()
    first, last = LABELS
    expected = {
        "raw_files/tiny_text": set(),
        "tokenizer/tiny_bpe": set(),
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
