"""Items of a suite are found in the tokens that a run has read, and when it first read them is exact."""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from gloo_workers import forked_workers
from tokenizers import Tokenizer
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.lineage.contamination import BOILERPLATE, SEEN, by_task, join, read_scan
from openlm_pipeline.lineage.windows import RULES
from openlm_pipeline.ordering.continued import recorded_order
from openlm_pipeline.pipeline import contamination as stage
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import DaskSettings, Pool
from openlm_pipeline.result import Say
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenizers.tokenizer import tokenizer_file

SEQ_LEN, BATCH = 64, 64 * 8
INLINE = DaskSettings(workers=1).pool
KINDS = {
    "words": "language_modeling",
    "more_words": "language_modeling",
    "choice": "multiple_choice",
    "asked": "multiple_choice",
    "twins": "schema",
    "answered": "generation_task_with_answers",
}
TASKS = tuple(KINDS)
ROWS = 60
_WORDS = """
river stone window people garden morning table music letter doctor market silver yellow winter summer bridge castle
farmer butter kitchen teacher mountain village picture question answer number system paper It's wasn't they're station
harbor engine circle country forest island animal nobody everything somewhere quietly suddenly always never perhaps
because although between through against without towards
"""
WORDS = _WORDS.split()


def quiet(line: str) -> None:
    pass


def sentence(rng: random.Random, words: int) -> str:
    made = [rng.choice(WORDS) + rng.choice(["", "", "", "", ",", " -"]) for _ in range(words)]
    return " ".join(made).capitalize() + "."


def row_of(kind: str, rng: random.Random) -> dict:
    """A row of a task, 25 words or more of it right."""
    text, answer = sentence(rng, rng.randint(20, 45)), sentence(rng, rng.randint(5, 14))
    if kind == "language_modeling":
        return {"context": text, "continuation": answer}
    if kind == "multiple_choice":
        return {"query": f"Question: {text}\n", "choices": [sentence(rng, 9), answer], "gold": 1}
    if kind == "schema":
        return {"context_options": [sentence(rng, 20), text], "continuation": answer, "gold": 1}
    return {"context": text, "answer": answer, "aliases": []}


def text_of(row: dict) -> str:
    """Question and right answer, as they would stand in a book."""
    if "query" in row:
        return row["query"].removeprefix("Question: ") + " " + row["choices"][row["gold"]]
    if "context_options" in row:
        return row["context_options"][row["gold"]] + " " + row["continuation"]
    return f"{row['context']} {row.get('continuation') or row['answer']}"


def wrapped(text: str) -> str:
    return re.sub(r"(.{30,40}) ", "\\1\n    ", text)


VARIANTS: dict[str, Callable[[str], str]] = {
    "as it is": lambda t: t,
    "upper case": str.upper,
    "wrapped": wrapped,
    "curly quotes": lambda t: "“" + t.replace("'", "’") + "”",
    "half": lambda t: t[: len(t) // 2],
}


def letters(text: str) -> str:
    return re.sub("[^0-9a-z]", "", text.lower())


@dataclass
class Corpus:
    """A home with two sources of raw text and a suite, made once."""

    root: Path
    planted: list[tuple[str, int, str]]
    """(task, item, variant)."""

    @property
    def home(self) -> Home:
        return Home(self.root)

    def experiment(self, **changes) -> Experiment:
        sources = [
            {"name": "books", "files": ["raw/books/*.jsonl"], "weight": 3},
            {"name": "pages", "files": ["raw/pages/*.jsonl"]},
        ]
        usual = {
            "name": "planted", "tokenizer": {"name": "bpe", "train": {"vocab_size": 600}}, "seq_len": SEQ_LEN,
            "samples_per_shard": 128, "sources": sources, "model": {"hidden_dim": 8, "n_layers": 1, "n_heads": 1},
            "training": {"global_batch": BATCH, "lr": 1e-3}, "milestones": [BATCH * 20, BATCH * 100],
            "evaluation": {"suite": str(self.root / "suite.yaml")},
        }  # fmt: skip
        return Experiment(**{**usual, **changes})

    def make(self, experiment: Experiment) -> None:
        data_stages.ensure_tokenizer(experiment, self.home, quiet)
        for dataset in experiment.datasets():
            files, _ = data_stages.tokenize(dataset, self.home, INLINE, quiet)
            data_stages.make_shards(dataset, files, self.home, INLINE, quiet)

    def rows(self, task: str) -> list[dict]:
        return [json.loads(line) for line in (self.root / "eval" / f"{task}.jsonl").read_text().split("\n") if line]

    @cached_property
    def letters_of_ids(self) -> list[str]:
        tokenizer = Tokenizer.from_file(str(tokenizer_file(self.home.tokenizer("bpe"))))
        return [letters(tokenizer.decode([i], skip_special_tokens=False)) for i in range(tokenizer.get_vocab_size())]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_corpus(root: Path, plant: bool, real: dict[str, tuple[str, list[dict]]] | None = None) -> Corpus:
    """
    Args:
        real: task -> its kind and rows, in place of made-up ones.
    """
    rng, corpus = random.Random(7), Corpus(root, [])
    tasks = []
    for task, kind in KINDS.items() if real is None else [(task, kind) for task, (kind, _) in real.items()]:
        rows = real[task][1] if real else [row_of(kind, rng) for _ in range(ROWS)]
        write(root / "eval" / f"{task}.jsonl", rows)
        uri = f"{root}/eval/{task}.jsonl"
        tasks.append({"label": task, "dataset_uri": uri, "num_fewshot": [0], "icl_task_type": kind})
    (root / "suite.yaml").write_text(json.dumps({"name": "six", "icl_tasks": tasks}))
    documents = [" ".join(sentence(rng, rng.randint(6, 20)) for _ in range(rng.randint(1, 25))) for _ in range(420)]
    chosen = [(task["label"], item) for task in tasks for item in range(ROWS)]
    rng.shuffle(chosen)
    for n, (task, item) in enumerate(chosen[:200] if plant else []):
        variant = list(VARIANTS)[n % len(VARIANTS)]
        corpus.planted.append((task, item, variant))
        text = VARIANTS[variant](text_of(corpus.rows(task)[item]))
        for _ in range(1 + n % 3 // 2):  # every third one twice
            at = rng.randrange(len(documents))
            documents[at] = f"{documents[at]} {text} {sentence(rng, 12)}"
    write(root / "raw" / "books" / "a.jsonl", [{"text": d} for d in documents[:200]])
    write(root / "raw" / "books" / "b.jsonl", [{"text": d} for d in documents[200:300]])
    write(root / "raw" / "pages" / "a.jsonl", [{"text": d} for d in documents[300:]])
    corpus.make(corpus.experiment())
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = make_corpus(tmp_path_factory.mktemp("planted"), plant=True)
    for window in RULES:
        stage.scan_recipe(made.experiment(), made.home, INLINE, quiet, window)
    return made


def found_in(corpus: Corpus, experiment: Experiment, record: dict, tokens: int, window: str = "50") -> list[dict]:
    windows, found, sizes = None, {}, {}
    for version, (dataset, opened) in stage.datasets_read(experiment, corpus.home, record).items():
        windows = stage.suite_windows_of(experiment, corpus.home, window)
        found[version] = read_scan(stage.scan_of(dataset, opened, "six", windows, corpus.home))
        sizes[version] = opened.shard_sizes
    return join(windows, found, record, sizes, SEQ_LEN, tokens)[0].to_pylist()


def expected(corpus: Corpus, experiment: Experiment, record: dict, tokens: int) -> dict[tuple[str, int], tuple]:
    """(first seen tokens, times seen, share of windows) by reading what the order picks, sample by sample, and looking
    for each of an item's windows in the text."""
    datasets = stage.datasets_read(experiment, corpus.home, record)
    read: dict[tuple[str, int], list[int]] = {}
    part, end = record, tokens // SEQ_LEN
    sizes = {version: opened.shard_sizes for version, (_, opened) in datasets.items()}
    while part is not None:
        begin = part.get("start", 0)
        if begin < end:
            source, sample = recorded_order(part, sizes).picks(begin, end - begin)
            for place, (s, x) in enumerate(zip(source.tolist(), sample.tolist()), begin):
                read.setdefault((part["data"][s]["manifest_sha256"], x), []).append(place)
        part, end = part.get("before"), min(begin, end)
    places: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for version, (_, opened) in datasets.items():
        ids = opened.gather(np.arange(len(opened))).reshape(-1)
        pieces = ["\0" if i == opened.info["eot_id"] else corpus.letters_of_ids[i] for i in ids.tolist()]
        of_sample = np.repeat(np.arange(len(ids)) // (SEQ_LEN + 1), [len(p) for p in pieces])
        text, there = "".join(pieces), places.setdefault(version, {})
        for at in range(len(text) - 49):
            there.setdefault(text[at : at + 50], []).append((int(of_sample[at]), int(of_sample[at + 49])))
    made = {}
    for task, item in ((task, item) for task in TASKS for item in range(ROWS)):
        whole = letters(text_of(corpus.rows(task)[item]))
        windows = [whole[k : k + 50] for k in range(len(whole) - 49)]
        first, times = [], []
        for window in windows:
            ends = [
                [read.get((version, sample), []) for sample in samples]
                for version, there in places.items()
                for samples in there.get(window, [])
            ]
            first += [max(map(min, both)) for both in ends if all(both)]
            times.append(sum(min(map(len, both)) for both in ends))
        share = sum(map(bool, times)) / len(windows)
        made[task, item] = ((min(first) + 1) * SEQ_LEN if first else None, max(times), share)
    return made


def as_expected(rows: list[dict]) -> dict[tuple[str, int], tuple]:
    return {(r["task"], r["item"]): (r["first_seen_tokens"], r["times_seen"], r["overlap"]) for r in rows}


@pytest.mark.parametrize("tokens", [BATCH * 20, BATCH * 400])
def test_when_each_item_was_first_seen_is_exact(corpus: Corpus, tokens: int):
    experiment = corpus.experiment(milestones=[tokens])
    record, at = stage.record_of(experiment, corpus.home, last_label(experiment))
    assert at == tokens
    assert as_expected(found_in(corpus, experiment, record, tokens)) == expected(corpus, experiment, record, tokens)


def test_all_full_copies_are_found_whole(corpus: Corpus):
    """After more than an epoch of both sources."""
    tokens = BATCH * 1000
    experiment = corpus.experiment(milestones=[tokens])
    for window in RULES:
        rows = stage.joined(experiment, corpus.home, [last_label(experiment)], window)[0].table.to_pylist()
        found = {(r["task"], r["item"]): r for r in rows if r["verdict"] == SEEN}
        assert {(task, item) for task, item, _ in corpus.planted} == found.keys()
        copies = [found[task, item] for task, item, variant in corpus.planted if variant != "half"]
        assert len(copies) == 160
        # A window that is cut by the border of two samples is read once both are: after an epoch all of them.
        assert [r for r in copies if (r["overlap"], r["overlap_answer"]) != (1.0, 1.0)] == []
        halves = [found[task, item]["overlap"] for task, item, variant in corpus.planted if variant == "half"]
        assert len(halves) == 40 and all(0.05 < share < 0.6 for share in halves)


def test_nothing_is_found_that_is_not_there(tmp_path: Path):
    corpus = make_corpus(tmp_path, plant=False)
    experiment = corpus.experiment()
    for window in RULES:
        made = stage.scan_recipe(experiment, corpus.home, INLINE, quiet, window)
        assert [m.facts["occurrences"] for m in made] == [0, 0]
        rows = stage.joined(experiment, corpus.home, [last_label(experiment)], window)[0].table
        assert set(rows["verdict"].to_pylist()) == {"clean"}


def last_label(experiment: Experiment) -> str:
    return [name for name, _ in experiment.labelled_milestones()][-1]


def test_a_fork_has_what_its_parents_read(corpus: Corpus):
    """With another mixture, at a milestone of its own and at one of its parent's."""
    experiment = corpus.experiment()
    versions = data_stages.dataset_versions(experiment, corpus.home)
    parent, _ = stage.record_of(experiment, corpus.home, last_label(experiment))
    data = [{"weight": w, "manifest_sha256": versions[n]} for n, w in (("pages", 5), ("books", 1))]
    record = {**parent, "data": data, "samples": 2400, "start": parent["samples"], "before": parent}
    for tokens in (BATCH * 60, 2400 * SEQ_LEN):
        rows = as_expected(found_in(corpus, experiment, record, tokens))
        assert rows == expected(corpus, experiment, record, tokens)
        assert any(first and first > parent["samples"] * SEQ_LEN for first, *_ in rows.values()) == (
            tokens > BATCH * 100
        )


class Refusing:
    """For scans that must find nothing to do."""

    def __call__(self, report: Say) -> contextlib.AbstractContextManager[Pool]:
        raise AssertionError("a scan asked for a pool though all was done")


def test_another_milestone_or_mixture_scans_nothing(corpus: Corpus):
    sources = [{**s.model_dump(), "weight": 1} for s in reversed(corpus.experiment().sources)]
    for changes in ({"milestones": [BATCH * 777]}, {"sources": sources, "name": "other"}, {"seed": 3}):
        stage.scan_recipe(corpus.experiment(**changes), corpus.home, Refusing(), quiet)


def test_a_window_of_several_items_and_many_documents_counts_for_nothing(tmp_path: Path):
    """A notice in two items and twelve documents is boilerplate; an item in as many documents is not."""
    rng, corpus = random.Random(3), Corpus(tmp_path, [])
    notice, own = sentence(rng, 14), sentence(rng, 30)
    rows = [f"{sentence(rng, 12)} {notice}", f"{notice} {sentence(rng, 12)}", own, notice]
    write(tmp_path / "eval" / "words.jsonl", [{"context": r, "continuation": "Yes."} for r in rows])
    uri, kind = f"{tmp_path}/eval/words.jsonl", "language_modeling"
    task = {"label": "words", "dataset_uri": uri, "num_fewshot": [0], "icl_task_type": kind}
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "six", "icl_tasks": [task]}))
    documents = [{"text": f"{sentence(rng, 30)} {notice if n < BOILERPLATE + 2 else ''} {own}"} for n in range(40)]
    for source, some in (("books", documents[:30]), ("pages", documents[30:])):
        write(tmp_path / "raw" / source / "a.jsonl", some)
    corpus.make(experiment := corpus.experiment(milestones=[BATCH * 40]))
    made = stage.scan_recipe(experiment, corpus.home, INLINE, quiet)
    assert made[0].facts["boilerplate_windows"] > 20 and made[1].facts["boilerplate_windows"] == 0
    [found] = stage.joined(experiment, corpus.home, [last_label(experiment)])
    first, second, third, fourth = found.table.to_pylist()
    assert (first["verdict"], second["verdict"]) == ("clean", "clean")
    assert (third["verdict"], third["overlap_question"], third["times_seen"] > BOILERPLATE) == (SEEN, 1.0, True)
    assert (fourth["verdict"], fourth["overlap_question"]) != (SEEN, 1.0)  # nothing of its question is left
    assert any("don't count" in note for note in found.notes())


class DiesAfter:
    """A pool whose process is killed after so many shards, as far as files tell."""

    workers = 1

    def __init__(self, shards: int) -> None:
        self.left = shards

    def run(self, calls: dict, on_progress: Callable) -> Iterator[tuple[str, Any]]:
        for name, (function, *arguments) in calls.items():
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield name, function(*arguments, progress=lambda facts: None)


def test_a_scan_that_was_killed_goes_on_and_finds_the_same_on_dask(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.root, tmp_path / "copy")
    copy, experiment = Corpus(tmp_path / "copy", corpus.planted), corpus.experiment()
    shutil.rmtree(copy.root / "contamination")
    with pytest.raises(KeyboardInterrupt):
        stage.scan_recipe(experiment, copy.home, lambda report: contextlib.nullcontext(DiesAfter(5)), quiet)
    (left,) = (copy.root / "contamination").rglob("*/00000004.parquet")
    left.write_bytes(left.read_bytes()[:-9])
    with forked_workers():
        made = stage.scan_recipe(experiment, copy.home, DaskSettings(workers=2).pool, quiet)
    assert [m.facts["shards_scanned"] for m in made] == [12 - 4, 5]
    tables = [stage.joined(experiment, home, [last_label(experiment)])[0].table for home in (corpus.home, copy.home)]
    assert tables[0].equals(tables[1])
    for file in (corpus.root / "contamination" / "datasets").rglob("50/*.parquet"):
        if "v2" not in file.parts:
            assert pq.read_table(file).equals(pq.read_table(copy.root / file.relative_to(corpus.root)))


def test_a_dataset_that_extends_another_and_a_part_of_one_reuse_its_scan(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.root, tmp_path / "copy")
    copy = Corpus(tmp_path / "copy", corpus.planted)
    [words] = [text_of(row) for row in copy.rows("words")[:1]]
    texts = [sentence(random.Random(n), 60) + (words if n == 30 else "") for n in range(50)]
    write(copy.root / "raw" / "pages" / "more.jsonl", [{"text": text} for text in texts])
    books, pages = (s.model_dump() for s in corpus.experiment().sources)
    part = copy.experiment(sources=[books, {**pages, "max_tokens": 9000}])
    stage.scan_recipe(part, copy.home, Refusing(), quiet)
    whole = copy.experiment(sources=[books, {**pages, "version": "v2", "extends": "v1"}], milestones=[BATCH * 600])
    copy.make(whole)
    made = stage.scan_recipe(whole, copy.home, INLINE, quiet)
    v1, v2 = (len(stage.open_dataset(e.datasets()[1], copy.home).entries) for e in (corpus.experiment(), whole))
    assert [m.facts["shards_scanned"] for m in made] == [0, v2 - v1]
    for experiment in (part, whole):
        record, tokens = stage.record_of(experiment, copy.home, last_label(experiment))
        rows = as_expected(found_in(copy, experiment, record, tokens))
        assert rows == expected(copy, experiment, record, tokens)
    assert rows["words", 0][1] > 0


def test_accuracy_of_seen_items_stands_beside_that_of_clean_ones():
    hashes = [f"h{n}" for n in range(100)]
    seen = [SEEN] * 20 + ["clean"] * 70 + ["too short to tell"] * 10
    table = pa.table({"task": ["t"] * 100, "item_hash": hashes, "verdict": seen})
    right = [n < 18 or (n >= 20 and n % 2 == 0) for n in range(100)]
    scored = {"task": ["t"] * 100, "num_fewshot": [0] * 100, "item_hash": hashes[::-1], "correct": right[::-1]}
    [row] = by_task(table, pa.table(scored))
    assert (row["items"], row["seen"], row["clean"], row["too_short"]) == (100, 20, 70, 10)
    assert (row["accuracy_seen"], row["accuracy_clean"]) == (0.9, 0.5)
    assert row["difference"] == pytest.approx(0.4)
    # Newcombe's method 10 from the two Wilson intervals, 0.6990-0.9721 and 0.3859-0.6141.
    assert row["difference_low"] == pytest.approx(0.4 - (0.2010**2 + 0.1141**2) ** 0.5, abs=1e-3)
    assert row["difference_high"] == pytest.approx(0.4 + (0.0721**2 + 0.1141**2) ** 0.5, abs=1e-3)
    assert "difference" not in by_task(table, None)[0]


def test_the_command_lists_what_was_seen_and_writes_json(corpus: Corpus, tmp_path: Path, monkeypatch):
    recipe = tmp_path / "planted.yaml"
    recipe.write_text(yaml.safe_dump(corpus.experiment().model_dump(mode="json", exclude_unset=True)))
    monkeypatch.setenv("OPENLM_HOME", str(corpus.root))
    told = CliRunner().invoke(app, ["contamination", str(recipe), "--list", "2", "--workers", "1"])
    assert told.exit_code == 0, told.output
    assert "12 reused" in told.output and "seen at 51.2K" in told.output and "more; --list" in told.output
    as_json = CliRunner().invoke(app, ["contamination", str(recipe), "--task", "twins", "--json", "--window", "13w"])
    found = json.loads(as_json.output)
    assert {row["task"] for row in [*found["tasks"], *found["seen"]]} == {"twins"} and found["window"] == "13w"
    for wrong, said in ((["--task", "twin"], "did you mean 'twins'?"), (["--window", "13"], "did you mean '13w'?")):
        refused = CliRunner().invoke(app, ["contamination", str(recipe), *wrong])
        assert said in str(refused.exception)


def test_documents_that_are_removed_are_counted_and_leave_nothing_behind(corpus: Corpus, tmp_path: Path):
    experiment = corpus.experiment()
    before = {d.name: stage.open_dataset(d, corpus.home).info["totals"] for d in experiment.datasets()}
    counts = stage.write_removals(experiment, corpus.home, corpus.root / "removed.jsonl")
    assert 50 < sum(counts.values()) < 200 and set(counts) == {"books", "pages"}
    listed = [json.loads(line) for line in (corpus.root / "removed.jsonl").read_text().splitlines()]
    raw = {s: (corpus.root / "raw" / s) for s in counts}
    for row in listed:
        line = (raw[row["source"]] / row["file"]).read_bytes()[row["offset"] :].splitlines()[0]
        assert json.loads(line) == json.loads(
            (raw[row["source"]] / row["file"]).read_bytes().splitlines()[row["record"]]
        )
    named = {tuple(item.split()) for row in listed for item in row["items"]}
    assert named == {(task, str(item)) for task, item, _ in corpus.planted}
    sources = [s.model_copy(update={"version": "v2", "exclude": "removed.jsonl"}) for s in experiment.sources]
    clean = corpus.experiment(sources=[s.model_dump() for s in sources])
    corpus.make(clean)
    for dataset in clean.datasets():
        info = stage.open_dataset(dataset, corpus.home).info
        assert info["dropped"] == {stage.CONTAMINATED: counts[dataset.name]}
        assert info["totals"]["documents"] + info["totals"]["dropped"] == before[dataset.name]["documents"]
        assert info["totals"]["text_bytes"] < before[dataset.name]["text_bytes"]
    assert [made.facts["occurrences"] for made in stage.scan_recipe(clean, corpus.home, INLINE, quiet)] == [0, 0]
    (corpus.root / "removed.jsonl").write_text("".join(json.dumps({**row, "offset": 1}) + "\n" for row in listed))
    with pytest.raises(ConfigError, match="write it again"):
        corpus.make(clean)
    (corpus.root / "removed.jsonl").write_text('{"file": "a.jsonl"}\n')
    with pytest.raises(ConfigError, match="line 1 is no record to leave out"):
        corpus.make(clean)


REAL = {
    "lambada_openai": "language_modeling",
    "piqa": "multiple_choice",
    "boolq": "multiple_choice",
    "copa": "multiple_choice",
    "winogrande": "schema",
    "arc_easy": "multiple_choice",
}


@pytest.mark.parametrize("plant", [True, False])
def test_planted_items_of_six_published_tasks_are_found(shared_data: Path, tmp_path: Path, plant: bool):
    real = {}
    for task, kind in REAL.items():
        rows = map(json.loads, (shared_data / "eval" / f"{task}.jsonl").open())
        real[task] = kind, sorted(rows, key=lambda row: -len(letters(text_of(row))))[30 : 30 + ROWS]
    corpus = make_corpus(tmp_path, plant, real)
    for window in RULES:
        experiment = corpus.experiment(milestones=[BATCH * 2000])
        stage.scan_recipe(experiment, corpus.home, INLINE, quiet, window)
        [found] = stage.joined(experiment, corpus.home, [last_label(experiment)], window)
        overlaps = {(r["task"], r["item"]): r["overlap"] for r in found.seen()}
        whole = {(t, i) for t, i, how in corpus.planted if how != "half"}
        if window == "13w":
            whole = {(t, i) for t, i in whole if len(text_of(real[t][1][i]).split()) > 13}
        assert whole <= overlaps.keys()
        assert all(overlaps[item] > 0.9 for item in whole)
        if plant:  # more than these are seen: rows of a task share passages, or are twins
            assert len(whole) >= 130
        else:
            assert overlaps == {}


def test_passages_that_real_text_shares_with_published_tasks_are_listed(shared_data: Path, tmp_path: Path):
    tasks = [
        {"label": task, "dataset_uri": str(shared_data / "eval" / f"{task}.jsonl"), "num_fewshot": [0],
         "icl_task_type": kind} for task, kind in REAL.items()
    ]  # fmt: skip
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "six", "icl_tasks": tasks}))
    corpus = Corpus(tmp_path, [])
    experiment = corpus.experiment(
        tokenizer={"name": "neox", "source": str(shared_data / "tokenizers" / "gpt-neox-20b")},
        sources=[{"name": "pile", "files": [str(shared_data / "raw" / "*.jsonl.zst")]}],
        seq_len=2048, samples_per_shard=2048, training={"global_batch": 65536, "lr": 1e-3}, milestones=[22_000_000],
    )  # fmt: skip
    corpus.make(experiment)
    [made] = stage.scan_recipe(experiment, corpus.home, INLINE, quiet)
    [found] = stage.joined(experiment, corpus.home, [last_label(experiment)])
    overlaps = {f"{r['task']} {r['item']}": round(r["overlap"], 2) for r in found.seen()}
    assert overlaps == {
        "lambada_openai 1934": 0.41,
        "lambada_openai 2814": 0.01,
        "lambada_openai 3453": 0.53,
        "lambada_openai 3934": 0.01,
        "boolq 2962": 0.01,
    }
    assert made.facts["tokens"] > 21_000_000
