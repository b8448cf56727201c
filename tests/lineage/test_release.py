"""A release proves its own numbers: each file and each printed number that is changed is named."""

import gzip
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from commands import Ended, openlm
from gloo_workers import forked_trainers
from tiny_pipeline import FinishedPipeline, TinyPipeline

from openlm_pipeline.lineage import verify_release
from openlm_pipeline.lineage.verify_release import DIFFERS, MANIFEST, NOT_HERE, OK, links
from openlm_pipeline.pipeline.release import _seal

LINKS = [
    "files",
    "weights -> checkpoint",
    "checkpoint -> run",
    "run -> data -> raw files",
    "scores -> items -> checkpoint",
    "card -> scores",
    "contamination",
    "environment",
]


@pytest.fixture(scope="module")
def released(finished: FinishedPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    out, variables = folder / "tiny", finished.copy(folder).variables
    scanned = openlm("contamination", "tiny", "--workers", "1", variables=variables)
    assert scanned.returncode == 0, scanned.stderr
    made = openlm("release", "tiny@40K", "-o", out, "--licence", "mit", variables=variables)
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture
def bundle(released: Path, tmp_path: Path) -> Path:
    shutil.copytree(released, tmp_path / "tiny")
    return tmp_path / "tiny"


def verify(pipeline: TinyPipeline, folder: Path, *flags: str) -> Ended:
    return openlm("verify", folder, *flags, variables=pipeline.variables)


def wrong(folder: Path) -> list[tuple[str, str]]:
    return [(name, what) for name, status, what in links(folder) if status == DIFFERS]


def test_every_link_holds(released: Path, finished: FinishedPipeline):
    found = list(links(released))
    assert list(dict.fromkeys(name for name, _, _ in found)) == LINKS
    assert {status for _, status, _ in found} == {OK}
    ended = verify(finished.pipeline, released, "--deep", "--device", "cpu")
    assert ended.returncode == 0, ended.stdout
    assert "scored again, log-probabilities within" in ended.stdout
    assert "Not proved" in ended.stdout


def test_without_the_library(released: Path):
    """`-I -S`: no site-packages, no PYTHONPATH."""
    program = [sys.executable, "-I", "-S", str(released / "verify.py")]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line.split("  ")[0].strip() for line in ended.stdout.splitlines()[:-1]] == [OK] * 10
    (released / "README.md").touch()  # not its bytes


def test_a_byte_flipped_in_each_file_is_named(bundle: Path):
    names = sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file())
    assert len(names) > 20
    for name in names:
        path, data = bundle / name, (bundle / name).read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        assert any(name in what for _, what in wrong(bundle)), name
        path.write_bytes(data)
    assert wrong(bundle) == []


def test_a_file_that_is_gone_is_named(bundle: Path):
    for name in ("openlm/run.json", "openlm/items.jsonl.gz", "model.safetensors", MANIFEST):
        data = (bundle / name).read_bytes()
        (bundle / name).unlink()
        assert any(Path(name).name in what for _, what in wrong(bundle)), name
        (bundle / name).write_bytes(data)
    (bundle / "more.txt").write_text("more")
    assert wrong(bundle) == [("files", f"more.txt is not in {MANIFEST}")]


def _json(path: Path, change) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _score(card: dict) -> None:
    card["tasks"][0]["accuracy"] += 0.01
    del card["seal_sha256"]


def _average(card: dict) -> None:
    card["averages"][0]["value"] += 0.01
    del card["seal_sha256"]


def _raw_hash(raw: dict) -> None:
    raw["a.jsonl"]["sha256"] = "0" * 64


def _rate(run: dict) -> None:
    run["identity"]["training"]["lr"] *= 2
    del run["seal_sha256"]


FORGED = {
    "a score": ("openlm/scorecard.json", _score, "last_word/0-shot: accuracy"),
    "an average": ("openlm/scorecard.json", _average, "and its tasks give"),
    "a raw file": ("openlm/data/tiny_text/v1/raw_files.json", _raw_hash, "sha256 of a.jsonl"),
    "the run": ("openlm/run.json", _rate, "identity of run.json"),
}


@pytest.mark.parametrize("name, change, told", FORGED.values(), ids=FORGED)
def test_what_is_forged_with_its_hashes_is_named(bundle: Path, name: str, change, told: str):
    """Whoever changes a number and makes the list of hashes anew is caught by the link that the number is part of."""
    _json(bundle / name, change)
    (bundle / MANIFEST).unlink()
    _seal(bundle)
    found = wrong(bundle)
    assert any(told in what for _, what in found), found
    assert "files" not in [link for link, _ in found]


def test_an_item_that_was_seen_and_is_told_otherwise_is_named(bundle: Path):
    path = bundle / "openlm" / "contamination.jsonl.gz"
    with gzip.open(path, "rt") as f:
        rows = [json.loads(line) for line in f]
    rows[3]["first_seen_tokens"] = 64
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    (bundle / MANIFEST).unlink()
    _seal(bundle)
    assert {link for link, _ in wrong(bundle)} == {"contamination"}


def test_a_release_of_a_stranger_leads_nowhere_and_fills_no_memory(bundle: Path, tmp_path: Path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    _json(bundle / "openlm" / "data.json", lambda data: data[0].update(segments=["../../../secret"]))
    with gzip.open(bundle / "openlm" / "items.jsonl.gz", "wb", compresslevel=9) as f:
        for _ in range(200):
            f.write(b" " * (1 << 20))
    (bundle / MANIFEST).unlink()
    _seal(bundle)
    _json(
        bundle / MANIFEST,
        lambda manifest: (manifest.pop("seal_sha256"), manifest["files"].update({"../secret.json": {}})),
    )
    tracemalloc.start()
    found = wrong(bundle)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    assert ("files", "ValueError: '../secret.json' leads out of the release") in found
    assert any("leads out of the release" in what for link, what in found if link == "run -> data -> raw files")
    assert any(
        "more text than a release has" in what for link, what in found if link == "scores -> items -> checkpoint"
    )


def test_a_printed_score_that_is_changed_is_named(bundle: Path):
    text = (bundle / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| choice 1-shot"))
    for old, new in ((row, row.replace("| 0.", "| 1.", 1)), ("      value: 0.", "      value: 7.")):
        (bundle / "README.md").write_text(text.replace(old, new, 1))
        (bundle / MANIFEST).unlink()
        _seal(bundle)
        assert [link for link, _ in wrong(bundle)] == ["card -> scores"]


def test_other_weights_are_named(bundle: Path):
    path = bundle / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (bundle / MANIFEST).unlink()
    _seal(bundle)
    assert [link for link, _ in wrong(bundle)] == ["weights -> checkpoint"]


def test_the_library_finds_an_interval_that_was_changed(bundle: Path, finished: FinishedPipeline):
    def narrow(card: dict) -> None:
        card["tasks"][1]["ci_low"] += 0.01
        del card["seal_sha256"]

    _json(bundle / "openlm/scorecard.json", narrow)
    (bundle / MANIFEST).unlink()
    _seal(bundle)
    ended = verify(finished.pipeline, bundle, "--json")
    assert ended.returncode == 4
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [f["link"] for f in found if f["status"] == DIFFERS] == ["scorecard, made again"]
    assert "ci_low" in next(f["what"] for f in found if f["status"] == DIFFERS)


def _sealed_checkpoint(digest: str):
    def change(info: dict) -> None:
        del info["sha256"]
        info["weights_digest"] = digest
        info["sha256"] = verify_release.fingerprint(info)

    return change


_other_digest = _sealed_checkpoint("0" * 64)


def test_scores_of_other_weights_are_found(bundle: Path, finished: FinishedPipeline, tmp_path: Path):
    """A chain that holds, around weights that were never scored: only `--deep` tells."""
    early = tmp_path / "early"
    assert openlm("release", "tiny@10K", "-o", early, variables=finished.pipeline.variables).returncode == 0
    for name in ("model.safetensors", "export.json"):
        shutil.copyfile(early / name, bundle / name)
    digest = json.loads((early / "export.json").read_bytes())["weights_digest"]
    _json(bundle / "openlm/checkpoint.json", _sealed_checkpoint(digest))

    def of_it(card: dict) -> None:
        del card["seal_sha256"]
        card["checkpoint_digest"] = digest

    _json(bundle / "openlm/scorecard.json", of_it)
    (bundle / MANIFEST).unlink()
    _seal(bundle)
    assert wrong(bundle) == []
    ended = verify(finished.pipeline, bundle, "--deep", "--device", "cpu")
    assert ended.returncode == 4
    assert "a log-probability is off by" in ended.stdout


def test_what_can_not_be_done_is_not_here(released: Path, finished: FinishedPipeline, tmp_path: Path):
    ended = verify(finished.pipeline, released, "--replay", "5")
    assert ended.returncode == 0
    assert f"{NOT_HERE}  run -> weights" in ended.stdout and "keep_before_milestone" in ended.stdout
    elsewhere = openlm("verify", released, "--deep", "--replay", "5", variables={"OPENLM_HOME": str(tmp_path)})
    assert elsewhere.returncode == 0
    assert ended.stdout.count(NOT_HERE) == 1 and elsewhere.stdout.count(f"{NOT_HERE}  ") == 2


def test_the_last_steps_trained_again_give_the_same_weights(finished: FinishedPipeline, tmp_path: Path):
    pipeline = finished.copy(tmp_path)
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("log_every: 20", "log_every: 20, keep_before_milestone: 7"))
    for path in pipeline.run_folder.glob("checkpoints/step-*157"):
        shutil.rmtree(path)
    with forked_trainers(torchrun=True):
        for command in (["train", "tiny"], ["evaluate", "tiny"], ["release", "tiny", "-o", tmp_path / "out"]):
            ended = openlm(*command, variables=pipeline.variables)
            assert ended.returncode == 0, ended.stdout + ended.stderr
        steps = sorted(int(path.name[5:]) for path in pipeline.run_folder.glob("checkpoints/step-*"))
        assert steps == [40, 150, 157]
        ended = verify(pipeline, tmp_path / "out", "--replay", "7")
        assert ended.returncode == 0, ended.stdout
        assert "steps 150 to 157 give the same weights, bit for bit" in ended.stdout
        assert not (pipeline.home / "replays" / "tiny-v1-t0040K").exists()
        _json(tmp_path / "out" / "openlm" / "checkpoint.json", _other_digest)
        ended = verify(pipeline, tmp_path / "out", "--replay", "7")
        assert ended.returncode == 4 and "steps 150 to 157 give weights" in ended.stdout


def test_scores_of_averaged_weights(finished: FinishedPipeline, tmp_path: Path):
    pipeline = finished.copy(tmp_path)
    recipe = pipeline.root / "recipes" / "tiny.yaml"
    text = recipe.read_text().replace("schedule: constant", "schedule: constant, averages: [ema_0.9_1]")
    recipe.write_text(text.replace('suite.yaml"', 'suite.yaml", average: ema_0.9_1') + "version: v2\n")
    with forked_trainers(torchrun=True):
        for command in (["train", "tiny"], ["evaluate", "tiny"], ["release", "tiny", "-o", tmp_path / "out"]):
            ended = openlm(*command, variables=pipeline.variables)
            assert ended.returncode == 0, ended.stdout + ended.stderr
    ended = verify(pipeline, tmp_path / "out", "--deep", "--device", "cpu")
    assert ended.returncode == 0, ended.stdout
    assert "whether they are the average ema_0.9_1" in ended.stdout and "scored again" in ended.stdout


def test_only_a_release_is_replaced(released: Path, finished: FinishedPipeline, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    ended = openlm("release", "tiny", "-o", tmp_path / "mine", variables=finished.pipeline.variables)
    assert ended.returncode == 5 and "holds something else" in ended.stderr + ended.stdout
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    before = (released / MANIFEST).read_bytes()
    variables = TinyPipeline(released.parent / "pipeline").variables
    again = openlm("release", "tiny@40K", "-o", released, "--licence", "mit", variables=variables)
    assert again.returncode == 0 and (released / MANIFEST).read_bytes() == before
    assert verify_release.sha256_of(released / "verify.py") == verify_release.sha256_of(Path(verify_release.__file__))


def test_there_must_be_scores(finished: FinishedPipeline, tmp_path: Path):
    pipeline = finished.copy(tmp_path)
    shutil.rmtree(pipeline.home / "scorecards")
    ended = openlm("release", "tiny@40K", "-o", tmp_path / "out", variables=pipeline.variables)
    assert ended.returncode == 3 and "`openlm evaluate tiny@t0040K` makes it" in " ".join(
        (ended.stdout + ended.stderr).split()
    )
