"""The chain from a scorecard to the raw files names whatever is not what it was, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from commands import Ended
from traced_run import BATCH, TracedRun

SUITE = """
name: tiny
icl_tasks:
  - {label: choice, dataset_uri: raw/tasks/choice.jsonl, num_fewshot: [0, 1], icl_task_type: multiple_choice}
"""
ROWS = [{"query": f"a fox and {n}", "choices": ["the dog", "some hill"], "gold": n % 2} for n in range(12)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> TracedRun:
    made = TracedRun.make(tmp_path_factory.mktemp("scored")).pack()
    made.raw("tasks").mkdir()
    made.raw("tasks/choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (made.home.root / "suite.yaml").write_text(SUITE)
    made.recipe.write_text(made.recipe.read_text() + 'evaluation: {suite: "${OPENLM_HOME}/suite.yaml"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLM_HOME", str(made.home.root))
        made.train()
    assert made.openlm("evaluate", "small", "--milestone", "3.84K").returncode == 0
    return made


def links(run: TracedRun, *arguments: str) -> tuple[Ended, list[dict[str, str]]]:
    ended = run.openlm("trace", "small@3.84K", "--json", *arguments)
    assert "Traceback" not in ended.stderr
    return ended, [json.loads(line) for line in ended.stdout.splitlines()]


def test_every_link_of_what_was_made_is_ok(scored: TracedRun):
    ended, found = links(scored)
    assert ended.returncode == 0 and {row["state"] for row in found} == {"ok"}
    kinds = {"scorecard", "items", "task file", "scored", "checkpoint", "checkpoint file", "run", "run of checkpoint"}
    assert {row["kind"] for row in found} == kinds | {"dataset", "content", "tokenizer", "shards", "raw file"}
    assert {Path(row["name"]).name for row in found if row["kind"] == "raw file"} == {"a.jsonl", "b.jsonl", "c.jsonl"}
    shown = scored.openlm("trace", "small@3.84K").stdout
    assert shown.count("\nok ") == len(shown.splitlines()) - 1
    assert links(scored, "--quick")[0].returncode == 0


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("scorecards/small/v1/*/scorecard.json", "scorecard"),
        ("scorecards/small/v1/*/items.parquet", "items"),
        ("raw/tasks/choice.jsonl", "task file"),
        ("runs/small/v1/checkpoints/step-00000040/__0_0.distcp", "checkpoint file"),
        ("runs/small/v1/checkpoints/step-00000040/checkpoint.json", "checkpoint"),
        ("runs/small/v1/run.json", None),
        ("runs/small/v1/experiment.yaml", None),
        ("shards/text/v1/manifest.jsonl", "dataset"),
        ("shards/text/v1/dataset.json", "dataset"),
        ("shards/text/v1/00000001.tar", "shard"),
        ("shards/text/v1/00000001.provenance.parquet", "shard"),
        ("shards/text/v1/documents.parquet", "shard"),
        ("tokenizers/bpe/tokenizer.json", "tokenizer"),
        ("raw/text/b.jsonl", "raw file"),
    ],
)
def test_a_flipped_byte_is_named(scored: TracedRun, tmp_path: Path, pattern: str, kind: str | None):
    run = scored.copy(tmp_path)
    (path,) = run.home.root.glob(pattern)
    content = bytearray(path.read_bytes())
    at = next(i for i in range(len(content) // 2, len(content)) if chr(content[i]).isalnum())
    content[at] ^= 1
    path.write_bytes(content)
    ended, found = links(run)
    assert ended.returncode == 4
    if kind is None:  # without it nobody knows what the run is
        assert path.name in ended.stderr
        return
    wrong = [row for row in found if row["state"] == "differs"]
    assert any(row["kind"] == kind and path.name in row["name"] + row["why"] for row in wrong)


def test_what_is_gone_is_not_here(scored: TracedRun, tmp_path: Path):
    run = scored.copy(tmp_path)
    run.raw("text/b.jsonl").unlink()
    shutil.rmtree(run.home.root / "scorecards")
    ended, found = links(run)
    assert ended.returncode == 0
    assert [row["kind"] for row in found if row["state"] == "not here"] == ["scorecard", "raw file"]


def test_a_forks_chain_has_its_parents(scored: TracedRun, tmp_path: Path):
    run = scored.copy(tmp_path)
    run.recipe.write_text(run.recipe.read_text().partition("evaluation:")[0])
    run.train("name=twig", f"parent={{run: small, milestone: {40 * BATCH}}}", f"milestones=[{50 * BATCH}]")
    ended = run.openlm("trace", "twig@4.8K", "--json")
    kinds = [json.loads(line)["kind"] for line in ended.stdout.splitlines()]
    assert (
        ended.returncode == 0 and kinds.count("run") == 2 and kinds.count("parent") == 1 == kinds.count("dataset") / 2
    )
    shutil.rmtree(run.home.run("small", "v1"))
    ended = run.openlm("trace", "twig@4.8K")
    assert ended.returncode == 0 and "not here  parent" in ended.stdout
