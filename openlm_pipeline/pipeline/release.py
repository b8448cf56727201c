"""`openlm release`: a milestone in one folder with all that its numbers rest on; `openlm verify`: each link of it.

`lineage.verify_release` has the links that need nothing but Python, and says how the folder is laid out; it goes along
as `verify.py`. Here are those that need this library.
"""

import gzip
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openlm_pipeline.checkpoints.folders import INFO, Checkpoint, recipe_of, verify
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.download_folder import RECORD_NAME, recorded_downloads
from openlm_pipeline.errors import DataError, IdentityError, MissingInputError, OpenLMError, public
from openlm_pipeline.experiments import Dataset, Experiment, load_experiment
from openlm_pipeline.fingerprint import differences, settings_tree
from openlm_pipeline.lineage import verify_release
from openlm_pipeline.lineage.verify_release import DIFFERS, MANIFEST, NOT_HERE, OK, Link, json_lines, links
from openlm_pipeline.pipeline.contamination import joined_if_scanned
from openlm_pipeline.pipeline.evaluation import CARD
from openlm_pipeline.pipeline.items import milestone_named
from openlm_pipeline.pipeline.overview import find_run
from openlm_pipeline.pipeline.training import train
from openlm_pipeline.result import CONSENTS, Say
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import settings_identity, settled
from openlm_pipeline.runs.launch import MilestoneReached
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.extended import ExtendedDataset
from openlm_pipeline.shards.manifest import DATASET, read_version
from openlm_pipeline.shards.manifest import MANIFEST as SHARDS
from openlm_pipeline.shards.opening import Opened, open_dataset
from openlm_pipeline.shards.subset import FirstSamples
from openlm_pipeline.storage.files import (
    folder_lock,
    make_folder,
    read_json,
    read_sealed,
    rename,
    sha256_file,
    write_json,
    write_sealed,
    write_text,
)
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import is_remote
from openlm_pipeline.tokenization.documents import results

if TYPE_CHECKING:
    import pyarrow as pa

    from openlm_pipeline.evaluation.scorecard import Scorecard
    from openlm_pipeline.evaluation.suite import Suite

RECORDS = "openlm"
_COPIED = ("run.json", "ledger.jsonl", "environments.jsonl")
_ROLES = {"README.md": "card", "verify.py": "check", "tokenizer.json": "tokenizer", "config.json": "model"}
_HOW_TO_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

## Check

`python verify.py` follows each number on this page to the items that were scored, the weights to the checkpoint of the
run, and the run to its data and the hashes of the raw files. It needs Python 3.9 and nothing else. `openlm verify
THIS_FOLDER` does more: `--deep` scores items again, `--replay STEPS` trains again.
"""
_DEEP_ITEMS = 50
_TOLERANCE = {"fp32": 1e-4}
_OTHER_TOLERANCE = 5e-2
"""Most difference in a log-probability, nats: by fp32 that of other kernels, else that of rounding."""


def release(name: str, milestone: str, out: Path, home: Home, report: Say, *, licence: str | None = None) -> Path:
    """Write a milestone of a run as a folder that proves its own numbers.

    Args:
        name: of the run, `NAME` or `NAME/VERSION`.
        milestone: its label or tokens; empty for the last one that is scored.
        out: a new folder, or a release, which is replaced.

    Raises:
        MissingInputError: there is no such milestone, or it has no scorecard.
        DataError: something it is made of is damaged.
        IdentityError: `out` holds something else.
    """
    from openlm_pipeline.checkpoints.model_export import export_huggingface
    from openlm_pipeline.evaluation.scorecard import check_items, load_scorecard
    from openlm_pipeline.evaluation.scored import milestone_digest
    from openlm_pipeline.evaluation.suite import load_suite

    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise IdentityError(f"{out} holds something else than a release; name another folder")
    run = find_run(home, name)
    experiment = run.experiment()
    checkpoint = _milestone(run, experiment, milestone, home)
    cards = home.scorecard(experiment.name, experiment.version, checkpoint.milestone)
    if not (cards / CARD).exists():
        named = f"{experiment.name}@{checkpoint.milestone}"
        raise MissingInputError(f"{named} has no scorecard, which a release proves; `openlm evaluate {named}` makes it")
    check_items(cards / CARD)
    card = load_scorecard(cards / CARD)
    if card.checkpoint_digest != milestone_digest(checkpoint, card.precision, card.average_of_weights):
        raise DataError(f"{cards / CARD} scores other weights than {checkpoint.path} has; score the milestone again")
    suite = load_suite(experiment.evaluation.suite)
    if suite.digest != card.suite_digest:
        raise DataError(f"{cards / CARD} was made with another suite {suite.name} than there is now; score it again")
    report(f"checking {checkpoint.path.name}")
    verify(checkpoint)
    building = out.with_name(f".{out.name}.building")
    with folder_lock(building, "making a release"):
        shutil.rmtree(building, ignore_errors=True)
        report("writing weights")
        tokenizer = home.tokenizer(experiment.tokenizer.name)
        export_huggingface(
            checkpoint.path, building, tokenizer, eot=experiment.tokenizer.eot, average=card.average_of_weights
        )
        report("copying records")
        _records(run, checkpoint, cards, building / RECORDS)
        _data(experiment, home, building / RECORDS, report)
        seen = _contamination(experiment, home, checkpoint.milestone, building / RECORDS, report)
        write_text(building / "README.md", _readme(experiment, card, licence, seen))
        write_json(building / RECORDS / "suite.json", suite.model_dump(mode="json", exclude_unset=True))
        about = {"licence": licence, "averages": about_averages(suite, card)}
        write_json(building / RECORDS / "release.json", about)
        shutil.copyfile(verify_release.__file__, building / "verify.py")
        _seal(building)
        if out.exists():
            shutil.rmtree(out)
        rename(building, out)
    return out


def _milestone(run: RunFolder, experiment: Experiment, wanted: str, home: Home) -> Checkpoint:
    home.pull(run.path)
    saved = [c for c in run.saved() if c.milestone]
    if wanted:
        label = milestone_named(experiment, wanted)
        saved = [c for c in saved if c.milestone == label]
    elif scored := [c for c in saved if _is_scored(experiment, c, home)]:
        saved = scored
    if not saved:
        raise MissingInputError(f"{run.path} has no milestone {wanted}; `openlm train {experiment.name}` makes it")
    return saved[-1]


def _is_scored(experiment: Experiment, checkpoint: Checkpoint, home: Home) -> bool:
    return (home.scorecard(experiment.name, experiment.version, checkpoint.milestone) / CARD).exists()


def _records(run: RunFolder, checkpoint: Checkpoint, cards: Path, out: Path) -> None:
    """What the run, its checkpoint and its scores say of themselves."""
    from openlm_pipeline.checkpoints.reading import SafeReader, model_without_weights
    from openlm_pipeline.evaluation.items import read_items

    make_folder(out)
    for name in _COPIED:
        if (run.path / name).exists():
            shutil.copyfile(run.path / name, out / name)
    recipe = recipe_of(run.path)
    if recipe is None:
        raise MissingInputError(f"{run.path} has no experiment.yaml, the recipe that it was trained by")
    shutil.copyfile(recipe, out / "experiment.yaml")
    shutil.copyfile(checkpoint.path / INFO, out / "checkpoint.json")
    described = SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    write_json(
        out / "parameters.json", [name for name, _ in model_without_weights(checkpoint, described).named_parameters()]
    )
    with _compressed(out / "metrics.jsonl.gz") as packed, run.metrics_file.open("rb") as f:
        shutil.copyfileobj(f, packed)
    for name in (CARD, "items.parquet"):
        shutil.copyfile(cards / name, out / name)
    items, _ = read_items(cards / "items.parquet")
    _write_rows(items, out / "items.jsonl.gz")


def _write_rows(table: "pa.Table", path: Path) -> None:
    """A line of JSON for each row."""
    with _compressed(path) as packed:
        for batch in table.to_batches(max_chunksize=1024):
            packed.writelines(json.dumps(row).encode() + b"\n" for row in batch.to_pylist())


@contextmanager
def _compressed(path: Path) -> Iterator[gzip.GzipFile]:
    """Of equal content always the same bytes."""
    with path.open("wb") as f, gzip.GzipFile(filename="", mode="wb", fileobj=f, mtime=0) as packed:
        yield packed


def _segments(opened: Opened) -> tuple[list[ShardedDataset], int | None]:
    """What a dataset is made of, nothing where it was made elsewhere; how many samples of it, where not all."""
    if isinstance(opened, FirstSamples):
        return _segments(opened.whole)[0], len(opened)
    if isinstance(opened, ExtendedDataset):
        return opened.segments, None
    ours = isinstance(opened, ShardedDataset) and (opened.folder / SHARDS).exists()
    return ([opened] if ours and read_version(opened.folder) == opened.version else []), None


def _data(experiment: Experiment, home: Home, out: Path, report: Say) -> None:
    """Manifests, and lists of raw files, of all that a run was trained on."""
    about = []
    for dataset in experiment.training_datasets():
        segments, samples = _segments(open_dataset(dataset, home))
        names = [f"{dataset.name}/{segment.folder.name}" for segment in segments]
        for segment, name in zip(segments, names):
            make_folder(folder := out / "data" / name)
            for file in (SHARDS, DATASET):
                shutil.copyfile(segment.folder / file, folder / file)
            write_json(folder / "raw_files.json", _raw_files(dataset, segment, home, report))
        about.append({"name": dataset.name, "segments": names, "samples": samples})
    write_json(out / "data.json", about)


def _raw_files(dataset: Dataset, segment: ShardedDataset, home: Home, report: Say) -> dict[str, dict[str, Any]]:
    """Name -> sha256, bytes and URL of each raw file, as far as they are known; no paths of this machine."""
    made = {f.name: f.stamp for f in results(home.tokenized(dataset.name, segment.folder.name))}
    urls: dict[str, str] = {}
    try:
        urls = {raw.name: raw.url for raw in discover(dataset, home)}
    except (MissingInputError, OSError) as e:
        report(f"the raw files of {dataset.name} are not here, so that their URLs are not told: {e}")
    found = {}
    for name, identity in segment.info["inputs"].items():
        size = made.get(name, "").partition("-")[0]
        found[name] = {
            "sha256": identity["raw_sha256"],
            "bytes": int(size) if size.isdigit() else None,
            "url": _source(urls[name]) if name in urls else None,
        }
    return found


def _source(url: str) -> str | None:
    """Where others find a raw file: its URL, or that from which it was downloaded."""
    if is_remote(url):
        return public(url)
    path = Path(url)
    brought = recorded_downloads(path.parent) if (path.parent / RECORD_NAME).exists() else {}
    return public(brought[path.name].source) if path.name in brought else None


def _contamination(experiment: Experiment, home: Home, label: str, out: Path, report: Say) -> dict[str, Any] | None:
    """Write which items the run had read by a milestone, where its data was scanned for them; what the card says."""
    found, why = joined_if_scanned(experiment, home, [label])
    if not found:
        report(f"the release says nothing of contamination: {why}")
        return None
    (joined,) = found
    _write_rows(joined.table, out / "contamination.jsonl.gz")
    facts = {**joined.facts, "items": joined.table.num_rows, "seen": len(joined.seen()), "notes": joined.notes()}
    write_json(out / "contamination.json", facts)
    return facts


def about_averages(suite: "Suite", card: "Scorecard") -> dict[str, Any]:
    """The weights and chances that a card's averages are taken with, by `NAME/KIND`."""
    from openlm_pipeline.evaluation.averages import suite_averages

    scored = {t.name: t for t in card.tasks if t.status == "scored"}
    chances = {name: t.chance for name, t in scored.items() if t.chance is not None}
    found = {}
    for made in suite_averages(suite, {name: t.num_items for name, t in scored.items()}):
        known = all(name in chances for name in made.weights) and made.kind != "bits_per_byte"
        found[f"{made.name}/{made.kind}"] = {
            "weights": dict(made.weights),
            "chances": made.chances(chances) if known else {},
        }
    return found


def _readme(
    experiment: Experiment, card: "Scorecard", licence: str | None, contamination: dict[str, Any] | None
) -> str:
    from openlm_pipeline.reports.model_card import model_card

    text = model_card(experiment, card, license=licence).replace("---\n", "---\nlibrary_name: transformers\n", 1)
    seen = "Whether items of the suite were seen in training was not looked at."
    if contamination is not None:
        count = f"{contamination['seen']:,} of {contamination['items']:,} items were seen in training."
        seen = " ".join([count, *contamination["notes"]])
    return f"{text}\n## Contamination\n\n{seen}\n{_HOW_TO_USE}"


def _seal(folder: Path) -> None:
    """Write the hashes of all files."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        role = _ROLES.get(name) or (
            "weights" if name.endswith(".safetensors") else "evidence" if "/" in name else "model"
        )
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path), "role": role}
    write_sealed(folder / MANIFEST, {"format": 1, "files": files})


def examine(
    folder: Path, home: Home, report: Say, *, deep: bool = False, steps: int = 0, device: str | None = None
) -> Iterator[Link]:
    """All links of a release, those of `verify.py` first.

    Args:
        deep: score some items again, on `device`.
        steps: the last ones are trained again.

    Raises:
        MissingInputError: there is no release in the folder.
    """
    if not (folder / MANIFEST).exists():
        raise MissingInputError(
            f"{folder.absolute()} is no release: it has no {MANIFEST}; the tokens of a run are counted with --tokens"
        )
    yield from links(folder)
    checks = {"verify.py": _same_program, "scorecard, made again": _same_card, "recipe -> run": _recipe}
    asked = {name: partial(check, folder) for name, check in checks.items()}
    if deep:
        asked["weights -> scores"] = partial(_score_again, folder, home, report, device)
    if steps:
        asked["run -> weights"] = partial(_replay, folder, steps, home, report)
    for name, check in asked.items():
        try:
            yield name, *check()
        except (OpenLMError, OSError, ValueError, KeyError) as e:
            yield name, DIFFERS, str(e)


def _same_program(folder: Path) -> tuple[str, str]:
    if (folder / "verify.py").read_bytes() == Path(verify_release.__file__).read_bytes():
        return OK, "it is this version's own"
    return DIFFERS, "verify.py is not this version's own; trust this command's lines, not those that it prints"


def _suite_and_card(folder: Path) -> "tuple[Suite, Scorecard]":
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.evaluation.suite import Suite

    return Suite(**read_json(folder / RECORDS / "suite.json")), load_scorecard(folder / RECORDS / CARD)


def _same_card(folder: Path) -> tuple[str, str]:
    """The scorecard summed up once more, intervals and all, and the card of the model."""
    from openlm_pipeline.evaluation.items import read_items
    from openlm_pipeline.evaluation.scorecard import Provenance, make_scorecard

    records = folder / RECORDS
    suite, card = _suite_and_card(folder)
    items, _ = read_items(records / "items.parquet")
    if list(json_lines(records / "items.jsonl.gz")) != json.loads(json.dumps(items.to_pylist())):
        return DIFFERS, "items.jsonl.gz has other rows than items.parquet"
    files = {t.name: t.task_file_sha256 for t in card.tasks}
    rows = {t.name: t.num_rows for t in card.tasks}
    made = make_scorecard(
        items, None, suite=suite, task_files=files, num_rows=rows, warnings=card.warnings,
        provenance=Provenance(**{name: getattr(card, name) for name in Provenance.model_fields}),
    ).model_copy(update={"changes": card.changes, "against": card.against})  # fmt: skip
    if lines := differences(settings_tree(card), settings_tree(made)):
        return DIFFERS, "; ".join(lines)
    licence = read_json(records / "release.json")["licence"]
    seen = read_json(path) if (path := records / "contamination.json").exists() else None
    experiment = load_experiment(str(records / "experiment.yaml"))
    if _readme(experiment, card, licence, seen) != (folder / "README.md").read_text():
        return DIFFERS, "README.md is not the card of this scorecard"
    return OK, f"{len(card.tasks)} tasks and {len(card.averages)} averages with intervals, and README.md"


def _recipe(folder: Path) -> tuple[str, str]:
    experiment = load_experiment(str(folder / RECORDS / "experiment.yaml"))
    recorded = settled(read_sealed(folder / RECORDS / "run.json")["identity"])
    wanted = settings_identity(experiment)
    if lines := differences({name: recorded.get(name) for name in wanted if name != "parent"}, _without_parent(wanted)):
        return DIFFERS, "; ".join(lines)
    return OK, "experiment.yaml asks for the model, training and seed of run.json"


def _without_parent(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != "parent"}


def _score_again(folder: Path, home: Home, report: Say, device: str | None) -> tuple[str, str]:
    """Score some items with the weights of a release, where the tasks' files are here, and compare."""
    from tokenizers import Tokenizer

    from openlm_pipeline.evaluation.items import read_items
    from openlm_pipeline.evaluation.prepare import prepare_suite
    from openlm_pipeline.evaluation.results import item_row
    from openlm_pipeline.evaluation.scorer import score_questions
    from openlm_pipeline.evaluation.subject import default_device, open_subject
    from openlm_pipeline.registry import RULES

    suite, card = _suite_and_card(folder)
    tokenizer = folder / "tokenizer.json"
    subject = open_subject(
        str(folder), tokenizer=str(tokenizer), device=device or default_device(), precision=card.precision
    )
    try:
        tasks = prepare_suite(suite, home, Tokenizer.from_file(str(tokenizer)), subject.max_seq_len, report)
    except MissingInputError as e:
        return NOT_HERE, str(e)
    rows = read_items(folder / RECORDS / "items.parquet")[0].to_pylist()
    stored = {(row["task"], row["num_fewshot"], row["item"]): row for row in rows}
    files = {t.name: t.task_file_sha256 for t in card.tasks}
    if other := [t.name for t in tasks if t.file.sha256 != files.get(t.name)]:
        return NOT_HERE, f"the file of {other[0]} is another one here"
    asked = [(t, item) for t in tasks for item in t.items if not RULES[t.task.rule].generates and item.requests]
    asked = [(t, i) for t, i in asked if (t.task.label, t.num_fewshot, i.index) in stored]
    chosen = random.Random(card.checkpoint_digest).sample(asked, min(_DEEP_ITEMS, len(asked)))
    report(f"scoring {len(chosen)} items again")
    worst, most = 0.0, _TOLERANCE.get(card.precision, _OTHER_TOLERANCE)
    for (task, item), scores in zip(chosen, score_questions(subject.model, [item.requests for _, item in chosen])):
        row = stored[task.task.label, task.num_fewshot, item.index]
        if item.prompt_hash != row["prompt_hash"]:
            return DIFFERS, f"{task.name} item {item.index} was asked otherwise"
        made = item_row(task.task, task.num_fewshot, item, scores)["choice_logprobs"]
        worst = max([worst, *(abs(a - b) for a, b in zip(made, row["choice_logprobs"], strict=True))])
        if worst > most:
            return DIFFERS, f"{task.name} item {item.index}: a log-probability is off by {worst:.2g}"
    return OK, f"{len(chosen)} items scored again, log-probabilities within {worst:.1g} of those recorded"


def _replay(folder: Path, steps: int, home: Home, report: Say) -> tuple[str, str]:
    """Train the last steps of a released milestone again, from a checkpoint that was kept, and compare the weights.

    In a home of its own below `replays/`, where the shards of this home are linked; through the recipe's launcher.
    """
    told, of = read_json(folder / RECORDS / "checkpoint.json"), read_sealed(folder / RECORDS / "run.json")
    try:
        run = find_run(home, str(of["name"]), str(of["version"]))
    except MissingInputError as e:
        return NOT_HERE, str(e)
    if run.fingerprint != told["run_fingerprint"]:
        return NOT_HERE, f"{run.path} is not the run of this release"
    experiment = run.experiment()  # the release may be a stranger's, and a launcher runs what a recipe says
    kept = [c for c in run.saved() if told["step"] - steps <= c.step < told["step"]]
    if not kept:
        what = f"no checkpoint of the {steps} steps before {told['milestone']} was kept"
        return NOT_HERE, f"{what}; execution.keep_before_milestone keeps one"
    begin = kept[0]
    verify(begin)
    scratch = home.root / "replays" / f"{experiment.name}-{experiment.version}-{told['milestone']}"
    with folder_lock(scratch, "training steps again"):
        shutil.rmtree(scratch, ignore_errors=True)
        own = Home(scratch)
        again = RunFolder(own.run(experiment.name, experiment.version))
        make_folder(again.checkpoints)
        parents = [f"runs/{experiment.parent.run}"] if experiment.parent else []
        for part in ("shards", "tokenizers", "raw", "tokenized", *parents):
            if (home.root / part).exists() and not (scratch / part).exists():
                (scratch / part).symlink_to((home.root / part).absolute())
        for name in ("run.json", "experiment.yaml"):
            shutil.copyfile(run.path / name, again.path / name)
        shutil.copytree(begin.path, again.checkpoints / begin.path.name, copy_function=os.link)
        training = experiment.training.model_copy(update={"horizon": experiment.schedule_horizon()})
        short = experiment.model_copy(update={"milestones": (told["tokens"],), "training": training})
        report(f"training {told['step'] - begin.step} steps again, from step {begin.step}")
        found = None
        for event in train(short, own, told["tokens"], report, allow=frozenset(CONSENTS) - {"supersede"}):
            if isinstance(event, MilestoneReached):
                found = event.checkpoint.weights_digest
    if found != told["weights_digest"]:
        what = f"steps {begin.step} to {told['step']} give weights {found}, not {told['weights_digest']}"
        return DIFFERS, f"{what}; they are in {scratch}"
    shutil.rmtree(scratch)
    return OK, f"steps {begin.step} to {told['step']} give the same weights, bit for bit"
