"""Records and tokens add up from the raw files to the last step; a count that does not is named."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from traced_run import BATCH, TracedRun

from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.pipeline.conservation import Equation, conserved
from openlm_pipeline.pipeline.overview import find_run
from openlm_pipeline.storage.files import read_sealed, write_sealed

MODULE = """
from openlm_pipeline.corpus.maps import Drop

def clean(document):
    return Drop("short") if len(document.text) < 100 else document.text.upper()
"""


def equations(run: TracedRun, name: str = "small") -> dict[str, Equation]:
    return {e.name: e for e in conserved(find_run(run.home, name), run.home)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TracedRun:
    folder = tmp_path_factory.mktemp("conserved")
    (folder / "my_maps.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLM_MAP_MODULES", str(folder / "my_maps.py"))
        made = TracedRun.make(folder)
        text = made.recipe.read_text()
        made.recipe.write_text(text.replace("weight: 3,", 'weight: 3, map: {function: "my_maps:clean", version: "1"},'))
        made.pack().train()
    return made


def test_all_is_conserved_with_records_quarantined_and_dropped(trained: TracedRun):
    found = equations(trained)
    assert {e.state for e in found.values()} == {"ok"}
    of_b = found["records of b.jsonl"]
    assert of_b.left == {"in the raw file": 30} and of_b.right["quarantined"] == 1 and of_b.right["dropped"] > 0
    assert sum(found["records of text/v1"].left.values()) == 70
    assert sum(found["samples of small/v1"].right.values()) == 80 * 6
    assert found["once an epoch each sample of code/v1"].state == "ok"
    ended = trained.openlm("verify", "small", "--tokens")
    assert ended.returncode == 0 and "30 in the raw file = " in ended.stdout
    asked = trained.openlm("verify", "small")
    assert asked.returncode == 3 and "--tokens" in asked.stderr


@pytest.mark.parametrize("sampling", ["windowed", "manifest", "resampled"])
def test_each_sample_comes_once_an_epoch_and_draws_are_counted(trained: TracedRun, tmp_path: Path, sampling: str):
    run = trained.copy(tmp_path)
    run.train("version=v2", f"training.sampling={sampling}", "training.window_shards=2")
    found = equations(run, "small/v2")
    assert {e.state for e in found.values()} == {"ok"}
    said = [e.line() for e in found.values() if "drawn with replacement" in e.note]
    assert len(said) == (2 if sampling == "resampled" else 0)


def test_a_fork_is_conserved_with_its_parent(trained: TracedRun, tmp_path: Path):
    run = trained.copy(tmp_path)
    parent = f"parent={{run: small, milestone: {40 * BATCH}}}"
    run.train("name=twig", parent, f"milestones=[{90 * BATCH}]", "sources.0.weight=1", "training.global_batch=192")
    found = equations(run, "twig")
    assert {e.state for e in found.values()} == {"ok"}
    assert sum(found["samples of twig/v1"].left.values()) == 90 * 6


def change(path: Path, field: str, by: int) -> None:
    """Another number in a record that is sealed, as if it had been written so."""
    record = read_sealed(path)
    write_sealed(path, {**record, field: record[field] + by})


def test_a_count_that_was_changed_is_named(trained: TracedRun, tmp_path: Path):
    run = trained.copy(tmp_path)
    change(run.home.tokenized("text", "v1") / "a.jsonl.json", "documents", -1)
    path = run.home.shards("code", "v1") / "documents.parquet"
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(3, "tokens", pa.array(table["tokens"].to_numpy() + (np.arange(len(table)) == 3))), path
    )
    with (run.home.shards("text", "v1") / "quarantine.jsonl").open("a") as f:
        f.write(json.dumps({"file": str(run.raw("text/b.jsonl")), "line": 2, "offset": 9, "reason": "made up"}) + "\n")
    lines = run.raw("code/c.jsonl").read_text().splitlines()
    run.raw("code/c.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (checkpoint,) = run.home.run("small", "v1").glob("checkpoints/step-00000080/checkpoint.json")
    written = json.loads(checkpoint.read_text())
    changed = {k: v + 96 if k == "tokens" else v for k, v in written.items() if k != "sha256"}
    checkpoint.write_text(json.dumps({**changed, "sha256": fingerprint(changed)}))
    wrong = {name for name, e in equations(run).items() if e.state == "differs"}
    assert wrong == {
        "stage 1 of a.jsonl", "stage 1 of b.jsonl", "records of b.jsonl", "quarantine of text/v1",
        "records of c.jsonl", "records of code/v1", "tokens of code/v1", "packed tokens of code/v1",
        f"checkpoint t{80 * BATCH}",
    }  # fmt: skip
    ended = run.openlm("verify", "small", "--tokens", "--json")
    assert ended.returncode == 4 and f"{len(wrong)} of" in ended.stderr
    assert {
        row["name"] for line in ended.stdout.splitlines() if (row := json.loads(line))["state"] == "differs"
    } == wrong


def test_what_is_not_here_is_said(trained: TracedRun, tmp_path: Path):
    run = trained.copy(tmp_path)
    run.raw("text/a.jsonl").unlink()
    found = equations(run)
    assert next(iter(found["records of a.jsonl"].left)) == "that stage 1 read (the raw file is not here)"
    (run.home.tokenized("text", "v1") / "a.jsonl.json").unlink()
    found = equations(run)
    assert found["records of a.jsonl"].state == "not here"
    assert run.openlm("verify", "small", "--tokens").returncode == 0
