"""The damage matrix: each kind of file of a home damaged in each way, one at a time, and then read by its next stage.

The stage ends with an error of one line that names the file, or with the result that the undamaged home gives. A file
that no row of the table matches fails the test, so a new kind of file needs a row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Ended
from small_run import train_here
from stages import Result, Stage, scores
from stages import evaluate as score_again
from whole_home import last_checkpoint, make_whole_home, run, variables

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home


@contextlib.contextmanager
def _settings(root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(root).items():
            patch.setenv(name, value)
        yield


def _contents(folder: Path, *patterns: str) -> Result:
    """The hash of each file, without the place of the home, and the hash of bad records, which name it."""
    paths = sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file() and p.name != ".lock")
    place = re.compile(rb'/[^\s"]*(?=/home/)|\w+(?=  quarantine.jsonl)|"(quarantine.jsonl|seal_sha256)": "\w+"')
    return {str(p.relative_to(folder)): hashlib.sha256(place.sub(b"", p.read_bytes())).hexdigest() for p in paths}


def _weights(root: Path) -> Result:
    folder = RunFolder(root / "home" / "runs" / "one" / "v1")
    records = []
    for line in folder.metrics_file.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # what was damaged
            records.append(json.loads(line))
    losses = {record["step"]: record["loss"] for record in records if record["step"] > 8}
    return {"losses": losses, **{str(c.step): (c.milestone, c.weights_digest) for c in folder.saved()}}


def _train(root: Path, *overrides: str) -> tuple[Ended, Result]:
    """What `torchrun -m train` does, in this process."""
    with _settings(root):
        try:
            train_here(load_experiment("one", overrides), Home.from_env())
        except OpenLMError as e:
            return Ended(e.exit_code, "", f"error: {e}\n"), {}
    return Ended(0, "", ""), _weights(root)


def tokenize(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "tokenize one --workers 1")
    return ended, _contents(root / "home", "shards/web/v1/*", "tokenizers/one_bpe/tokenizer.json")


def pack(root: Path) -> tuple[Ended, Result]:
    shutil.rmtree(root / "home" / "shards" / "web")
    return tokenize(root)


def train(root: Path) -> tuple[Ended, Result]:
    shutil.rmtree(root / "home" / "runs" / "one")
    return _train(root)


def resume(root: Path) -> tuple[Ended, Result]:
    return _train(root, "milestones=[1024,2048,2560]")


def evaluate(root: Path) -> tuple[Ended, Result]:
    shutil.rmtree(root / "home" / "scorecards" / "one")
    return rescore(root)


def rescore(root: Path) -> tuple[Ended, Result]:
    return score_again(root)


def evaluate_path(root: Path) -> tuple[Ended, Result]:
    """The newest checkpoint by its path."""
    return _evaluate_files(root, last_checkpoint(root))


def evaluate_huggingface(root: Path) -> tuple[Ended, Result]:
    return _evaluate_files(root, root / "home" / "exports" / "one" / "huggingface")


def evaluate_openlm(root: Path) -> tuple[Ended, Result]:
    tokenizer = root / "home" / "tokenizers" / "one_bpe"
    exported = root / "home" / "exports" / "one" / "openlm" / "checkpoints" / "epoch_1.pt"
    return _evaluate_files(root, exported, f"--tokenizer {tokenizer}")


def _evaluate_files(root: Path, path: Path, more: str = "") -> tuple[Ended, Result]:
    suite = root / "home" / "raw" / "suite.yaml"
    ended = run(root, f"evaluate --checkpoint {path} --eval-yaml {suite} --output-dir {root / 'scores'} {more}")
    return ended, {} if ended.returncode else scores(root / "scores")


def report(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "report one")
    page = root / "home" / "reports" / "one" / "v1"
    return ended, {} if ended.returncode else _contents(page, "*.html", "*.md", "*.csv")


def find_items(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "contamination one --json --workers 1")
    return ended, {} if ended.returncode else json.loads(ended.stdout)


def generate(root: Path) -> tuple[Ended, Result]:
    return _said(root, "generate one@2.048K --prompt import --max-tokens 4 --greedy")


def export(root: Path) -> tuple[Ended, Result]:
    out, tokenizer = root / "home" / "exported", root / "home" / "tokenizers" / "one_bpe"
    ended = run(root, f"export {last_checkpoint(root)} -o {out} --tokenizer {tokenizer}")
    return ended, {} if ended.returncode else _contents(out, "*")


def _said(root: Path, *lines: str) -> tuple[Ended, Result]:
    """What commands print, without the spaces that fill a table; the first error instead of all."""
    every = [run(root, line) for line in lines]
    ended = next((e for e in every if e.returncode), every[0])
    return ended, {"said": [" ".join(e.stdout.replace(str(root), "").split()) for e in every]}


def look(root: Path) -> tuple[Ended, Result]:
    return _said(root, "runs", "show one", "cost one")


def account(root: Path) -> tuple[Ended, Result]:
    return _said(root, "verify one --tokens")


def trace(root: Path) -> tuple[Ended, Result]:
    return _said(root, "trace one --step 3")


def look_at_shards(root: Path) -> tuple[Ended, Result]:
    return _said(root, "shards verify one", "shards stats one", "shards inspect one 3")


def look_at_exported_shards(root: Path) -> tuple[Ended, Result]:
    return _said(root, f"shards verify {root / 'home' / 'exports' / 'one' / 'shards'}")


ROWS: dict[str, tuple[Stage, ...]] = {
    "raw/[!t]*/*.jsonl": (tokenize,),
    "tokenizers/*/tokenizer.json": (tokenize, evaluate, evaluate_path, export, generate),
    "tokenizers/*/tokenizer_info.json": (tokenize, evaluate),
    "tokenized/*/*/*.jsonl.tokens": (pack,),
    "tokenized/*/*/*.jsonl.documents": (pack,),
    "tokenized/*/*/*.jsonl.offsets": (pack,),
    "tokenized/*/*/*.jsonl.json": (pack,),
    "tokenized/*/*/*.jsonl.quarantine.jsonl": (pack,),
    "shards/*/*/*.tar": (train, look_at_shards),
    "shards/*/*/*.sums": (train, look_at_shards),
    "shards/*/*/*.provenance.parquet": (look_at_shards,),
    "shards/*/*/documents.parquet": (look_at_shards,),
    "shards/*/*/quarantine.jsonl": (tokenize, look_at_shards),
    "shards/*/*/quarantine.sha256": (tokenize, look_at_shards),
    "shards/*/*/dataset.json": (tokenize, train, account),
    "shards/*/*/manifest.jsonl": (tokenize, train, trace),
    "runs/*/*/checkpoints/*/*.distcp": (resume, evaluate, evaluate_path, export),
    "runs/*/*/checkpoints/*/.metadata": (resume, evaluate, evaluate_path, export),
    "runs/*/*/checkpoints/*/model_config.json": (resume, evaluate, evaluate_path, export),
    "runs/*/*/checkpoints/*/checkpoint.json": (resume, evaluate, evaluate_path, export),
    "runs/*/*/checkpoints/*/COMPLETE": (resume, evaluate, evaluate_path, export),
    "runs/*/*/run.json": (resume, evaluate, report),
    "runs/*/*/experiment.yaml": (resume, evaluate_path, export, generate),
    "runs/*/*/metrics.jsonl": (resume, report, look),
    "runs/*/*/ledger.jsonl": (report, look, trace),
    "runs/*/*/environments.jsonl": (resume,),
    "runs/*/*/outcome.json": (resume, look),
    "scorecards/*/*/*/items.parquet": (rescore, report),
    "scorecards/*/*/*/scorecard.json": (rescore, report),
    "scorecards/*/*/*/tasks/*.parquet": (rescore,),
    "scorecards/*/*/*/contamination.parquet": (find_items, report),
    "contamination/suites/*/*/windows.json": (find_items,),
    "contamination/suites/*/*/windows.npz": (find_items,),
    "contamination/datasets/*/*/*/*/*.parquet": (find_items,),
    "reports/*/*/*": (report,),
    "exports/*/huggingface/model.safetensors": (evaluate_huggingface,),
    "exports/*/huggingface/config.json": (evaluate_huggingface,),
    "exports/*/huggingface/tokenizer.json": (evaluate_huggingface,),
    "exports/*/huggingface/export.json": (evaluate_huggingface,),
    "exports/*/openlm/checkpoints/epoch_1.pt": (evaluate_openlm,),
    "exports/*/openlm/export.json": (evaluate_openlm,),
    "exports/*/openlm/params.txt": (evaluate_openlm,),
    "exports/*/openlm/model.json": (evaluate_openlm,),
    "exports/*/shards/*.tar": (look_at_exported_shards,),
    "exports/*/shards/manifest.jsonl": (look_at_exported_shards,),
    "exports/*/shards/export.json": (look_at_exported_shards,),
    # Read by nothing of ours:
    "raw/tasks/*.jsonl": (evaluate,),
    "raw/suite.yaml": (),
    "runs/*/*/train.log": (),
    "exports/*/huggingface/README.md": (),
    "exports/*/huggingface/*.py": (),
    "exports/*/huggingface/tokenizer_config.json": (),
    "exports/*/huggingface/generation_config.json": (),
    "exports/*/openlm/checkpoints/optimizer_1.pt": (),
    "exports/*/openlm/checkpoints/stats_1.pt": (),
}
"""A kind of file, as a pattern below the home -> the stages that read it next."""

DIGIT = re.compile(rb"[0-9]")


def flip(path: Path, other: Path, rng: random.Random) -> None:
    """A bit: in text that of a digit, so that it stays text."""
    content = bytearray(path.read_bytes())
    try:
        content.decode()
        places = [m.start() for m in DIGIT.finditer(content)]
    except UnicodeDecodeError:
        places = []
    content[rng.choice(places or range(len(content)))] ^= 1
    path.write_bytes(content)


def flip_any(path: Path, other: Path, rng: random.Random) -> None:
    """A bit, whatever comes of the text."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, other: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    whole_lines = b"".join(lines[: len(lines) // 2])
    path.write_bytes(whole_lines if path.suffix == ".jsonl" else content[: rng.randrange(len(content))])


def delete(path: Path, other: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, other: Path, rng: random.Random) -> None:
    """For the same file of the other run or dataset."""
    shutil.copyfile(other, path)


DAMAGE = (flip, flip_any, cut, delete, swap)


def _kind(file: str) -> list[str]:
    return [pattern for pattern in ROWS if Path(file).match(pattern) and file.count("/") == pattern.count("/")]


def _files(home: Path) -> list[str]:
    paths = [p for p in home.rglob("*") if p.is_file() and p.name != ".lock"]
    return sorted(str(p.relative_to(home)) for p in paths)


OTHER = {"one": "two", "web": "code", "one_bpe": "two_bpe"}
"""What stands in for a run, a dataset or a tokenizer where files are swapped."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole_home(tmp_path_factory)


def _place(whole: Path, pattern: str) -> Path:
    """The file of a kind that is damaged, of the first run and dataset: a full shard, the last milestone."""
    home = whole / "home"
    found = [file for file in _files(home) if _kind(file) == [pattern]]
    own = [file for file in found if OTHER.keys() & set(Path(file).parts) or "tasks" in file]
    return Path((own or found)[0 if "shards" in pattern else -1])


def _other(place: Path) -> Path:
    return Path(*(OTHER.get(part, part) for part in place.parts))


@functools.cache
def _expected(whole: Path, stage: Stage, root: Path) -> Result:
    shutil.copytree(whole, root)
    ended, result = stage(root)
    assert ended.returncode == 0, ended
    return result


def cells(whole: Path) -> list[tuple[str, Callable[..., None], Stage]]:
    """All that can be damaged: a file without a byte has no bit, and some are the same in both runs."""
    found = []
    for pattern, stages in ROWS.items():
        if not stages:
            continue
        place = _place(whole, pattern)
        content, other = (whole / "home" / place).read_bytes(), whole / "home" / _other(place)
        for damage in DAMAGE:
            if content if damage in (flip, flip_any, cut) else damage is delete or content != other.read_bytes():
                found += [(pattern, damage, stage) for stage in stages]
    return found


def judge(whole: Path, folder: Path, pattern: str, damage: Callable[..., None], stage: Stage) -> str | None:
    """What is wrong with a cell; None where the damage is named, or does not matter."""
    place = _place(whole, pattern)
    expected = _expected(whole, stage, folder.parent / stage.__name__)
    shutil.copytree(whole, folder)
    path = folder / "home" / place
    damage(path, folder / "home" / _other(place), random.Random(f"{pattern} {damage.__name__}"))
    ended, result = stage(folder)
    if ended.returncode:
        of_folder = "" if damage is swap else r"(?![/\w])"  # with what was swapped, the rest of a folder does not fit
        named = place.name in ended.stdout + ended.stderr or re.search(f"{path.parent}{of_folder}", ended.stderr)
        return None if named and ended.stderr.startswith("error: ") else f"exit code {ended.returncode}: {ended.stderr}"
    different = [name for name in {**expected, **result} if expected.get(name) != result.get(name)]
    return f"SILENT: other {', '.join(different)}; {ended.stdout[-300:]}" if different else None


def wrong_cells(whole: Path, folder: Path, share: float) -> tuple[list[str], int]:
    """What is wrong in a share of the cells, the same each time; and of how many."""
    every = cells(whole)
    some = random.Random("cells").sample(every, round(len(every) * share))
    wrong = []
    for number, (pattern, damage, stage) in enumerate(sorted(some, key=every.index)):
        if problem := judge(whole, folder / str(number), pattern, damage, stage):
            wrong.append(f"{pattern}, {damage.__name__}, then {stage.__name__}: {problem}")
        shutil.rmtree(folder / str(number))
    return wrong, len(some)


def test_every_file_of_a_home_is_of_one_kind(whole: Path) -> None:
    kinds = {file: _kind(file) for file in _files(whole / "home")}
    assert {file: found for file, found in kinds.items() if len(found) != 1} == {}
    assert {kind for found in kinds.values() for kind in found} == set(ROWS)


def test_damage_is_named_or_does_not_matter(whole: Path, tmp_path: Path) -> None:
    """A sample of the cells."""
    assert wrong_cells(whole, tmp_path, 1 / 4)[0] == []


@pytest.mark.drill
def test_no_damage_is_silent(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, count = wrong_cells(whole, tmp_path, 1)
    with capsys.disabled():
        print("", *wrong, f"{len(wrong)} of {count} cells are wrong", sep="\n")
    assert wrong == []
