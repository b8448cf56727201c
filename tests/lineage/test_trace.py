"""What a trace says of steps, documents and texts is what the loader of training read, and what is in the raw files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from traced_run import BATCH, PLANTED, TracedRun, record, recorded

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.lineage.run_order import left_out_steps
from openlm_pipeline.lineage.spikes import spikes
from openlm_pipeline.lineage.trace import Trace
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import DaskSettings
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.shard_export import export_shards
from openlm_pipeline.units import format_tokens

Read = dict[tuple[str, int], list[tuple[int, int]]]
"""(source, sample) -> (step, row) of each time."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> TracedRun:
    return TracedRun.make(tmp_path_factory.mktemp("packed")).pack()


@pytest.fixture(scope="module")
def trained(packed: TracedRun, tmp_path_factory: pytest.TempPathFactory) -> TracedRun:
    made = packed.copy(tmp_path_factory.mktemp("trained"))
    made.train()
    return made


def agrees(run: TracedRun, name: str, read: Read) -> None:
    """Whether the trace of each document in some rows has the times that its samples were read, and no others."""
    trace, rng = run.trace(name), np.random.default_rng(0)
    steps = sorted({step for times in read.values() for step, _ in times})
    for step in rng.choice(steps, 4, replace=False).tolist():
        row = int(rng.integers(trace.order.last.batch))
        for part in trace.step(step, row):
            (document,) = trace.document(part.file, part.record)
            times = {(s.step, s.row, s.sample) for s in document.seen}
            assert (step, row, part.sample) in times
            expected = {(*time, x) for x in document.samples for time in read.get((part.source, x), ())}
            assert {(s.step, s.row, s.sample) for s in document.seen if s.run == trace.order.name} == expected
            by_sample = [[s.time for s in document.seen if s.sample == x] for x in document.samples]
            assert all(numbers == list(range(1, 1 + len(numbers))) for numbers in by_sample)


@pytest.mark.parametrize("sampling", ["permutation", "windowed", "resampled", "manifest"])
def test_a_document_of_a_step_was_read_by_that_step_and_all_others_that_are_named(
    packed: TracedRun, tmp_path: Path, sampling: str
):
    run = packed.copy(tmp_path)
    settings = (f"training.sampling={sampling}", *(["training.window_shards=2"] if sampling == "windowed" else []))
    folder = run.train(*settings, until=30)
    run.train(*settings)  # resumed
    for processes in (1, 2, 3):
        read = recorded(run.experiment(*settings), run.home, folder.identity, 1, 80, processes)
        agrees(run, "small", read)


@pytest.mark.parametrize(("batch", "weight"), [(BATCH, 1), (2 * BATCH, 1), (BATCH, 3)])
def test_a_fork_is_traced_into_its_parent(trained: TracedRun, tmp_path: Path, batch: int, weight: int):
    """With another mixture, another batch, and neither."""
    run = trained.copy(tmp_path)
    begin = 40 * BATCH // batch
    overrides = (
        "name=twig", f"parent={{run: small, milestone: {40 * BATCH}}}", f"training.global_batch={batch}",
        f"milestones=[{60 * BATCH}, {90 * BATCH}]", f"sources.0.weight={weight}",
    )  # fmt: skip
    twig = run.train(*overrides)
    own = recorded(run.experiment(*overrides), run.home, twig.identity, begin + 1, 90 * BATCH // batch)
    agrees(run, "twig", own)
    parents = recorded(run.experiment(), run.home, RunFolder(run.home.run("small", "v1")).identity, 1, 40)
    (document,) = run.trace("twig").document("a.jsonl", 5)
    for name, read in (("small/v1", parents), ("twig/v1", own)):
        expected = {(*time, x) for x in document.samples for time in read.get((document.source, x), ())}
        assert {(s.step, s.row, s.sample) for s in document.seen if s.run == name} == expected
    assert [s.tokens_before for s in document.seen] == sorted(s.tokens_before for s in document.seen)
    trace = run.trace("twig")
    if batch == BATCH:
        assert list(trace.step(3)) == list(run.trace().step(3))
    else:
        with pytest.raises(ConfigError, match="has no step 3: it begins after 20, and before that are other steps"):
            list(trace.step(3))
    leaf = (f"parent={{run: twig, milestone: {60 * BATCH}}}", f"milestones=[{70 * BATCH}]", "sources.0.weight=2")
    run.train("name=leaf", *leaf)
    of_leaf = [s for s in run.trace("leaf").document("a.jsonl", 5)[0].seen if s.run != "leaf/v1"]
    assert of_leaf == [s for s in document.seen if s.tokens_before < 60 * BATCH]
    shutil.rmtree(run.home.run("small", "v1"))
    orphan = run.trace("twig")
    assert "small/v1 is not in" in orphan.order.notes[0]
    (again,) = orphan.document("a.jsonl", 5)
    assert [(s.tokens_before, s.sample) for s in again.seen if s.run == "twig/v1"] == [
        (s.tokens_before, s.sample) for s in document.seen if s.run == "twig/v1"
    ]
    assert len(again.seen) == len(document.seen)
    assert {s.step for s in again.seen if s.run == "small/v1"} == {None}
    run.train("seed=9", until=40)
    later = run.trace("twig")
    assert "small/v1 in" in later.order.notes[0] and "is another run by now" in later.order.notes[0]
    assert later.document("a.jsonl", 5) == [again]


def test_a_planted_text_is_found_at_exactly_the_steps_that_read_it(trained: TracedRun):
    run = trained
    read = recorded(run.experiment(), run.home, RunFolder(run.home.run("small", "v1")).identity, 1, 80)
    trace = run.trace()
    for text in (PLANTED, "Kitezh", PLANTED[10:]):
        (found,) = trace.text(text)
        assert (found.file, found.record) == ("b.jsonl", 9)
        expected = sorted((*time, x) for x in found.samples for time in read[found.source, x])
        assert sorted((s.step, s.row, s.sample) for s in found.seen) == expected
    whole = next(trace.text(PLANTED)).samples
    assert set(whole) < set(trace.document("b.jsonl", 9)[0].samples)  # only those with a part of the text
    assert set(next(trace.text("Kitezh")).samples) <= set(whole)
    assert list(trace.text("The eight lanterns")) == []
    ended = run.openlm("trace", "small", "--text", PLANTED, "--json")
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["record"] == 9


@pytest.mark.parametrize("block_tokens", [5, 1 << 20])
def test_a_text_is_found_across_samples_and_shards_and_not_across_documents(
    trained: TracedRun, block_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("openlm_pipeline.shards.search._BLOCK_TOKENS", block_tokens)
    trace = trained.trace()
    source = next(s for s in trace.order.sources.values() if s.name == "text/v1")
    lines = [json.loads(line) for line in trained.raw("text/a.jsonl").read_text().splitlines()]
    bounds = np.cumsum(source.opened.shard_sizes)[:-1].tolist()
    across = next(trace.parts(source, bounds[0]))
    assert across.document_start > 0  # a document goes on from one shard to the next
    for number in (3, 17, across.record if across.file == "a.jsonl" else 4):
        (found,) = trace.text(lines[number]["text"])
        assert (found.file, found.record) == ("a.jsonl", number)
        (document,) = trace.document("a.jsonl", number)
        assert set(found.samples) >= set(document.samples[:-1])
    end, start = lines[3]["text"][-9:], lines[4]["text"][:9]
    assert list(trace.text(end + start)) == []
    letter = [(d.file, d.record, d.samples) for d in trace.text("é")]
    assert letter and letter == [
        (d.file, d.record, d.samples) for d in trace.text("e\u0301")
    ]  # as the tokenizer has it
    lines += [json.loads(line) for line in trained.raw("text/b.jsonl").read_text().splitlines() if line]
    lines += [json.loads(line) for line in trained.raw("code/c.jsonl").read_text().splitlines()]
    missing = sum("é" in line.get("text", "") for line in lines) - len(letter)
    assert 0 <= missing <= 2  # those of the last tokens of each dataset, which fill no sample


def test_steps_left_out_and_milestones_are_told_apart(packed: TracedRun, tmp_path: Path):
    run = packed.copy(tmp_path)
    folder = run.train("training.skip_steps=[7, 50]")
    trace = run.trace()
    assert set(trace.order.last.left_out) == {7, 50}
    (part, *_) = trace.step(7, 0)
    assert part.left_out == "it is one of training.skip_steps"
    (document,) = trace.document(part.file, part.record)
    assert [s.left_out is not None for s in document.seen] == [s.step in (7, 50) for s in document.seen]
    limit = trace.order.until(str(40 * BATCH))
    (early,) = trace.document(part.file, part.record, limit)
    assert early.seen == [s for s in document.seen if s.step <= 40]
    (later,) = trace.document(part.file, part.record, 100 * BATCH)
    assert {s.trained for s in later.seen if s.step > 80} == {False}
    usual = next(record for record in reversed(folder.last_records()) if "loss" in record)
    for step in range(81, 121):  # of a run that went on, once set back
        for again in [step] if step != 111 else [104, 105, 106, 107, 108, 109, 110, 111]:
            loss, grad_norm = 5 + again % 3 / 10 + 4 * (again == 101), 1 + again % 2 / 10 + 9 * (again == 105)
            measured = {"step": again, "tokens": again * BATCH, "loss": loss, "grad_norm": grad_norm}
            folder.append_metrics({**usual, **measured})
    found = spikes(trace, 2)
    assert [(s.kind, s.last_step) for s in found if s.spreads is None or s.spreads > 10] == [
        ("loss", 101), ("grad_norm", 105), ("skipped", 7), ("skipped", 50),
    ]  # fmt: skip
    assert [s.why for s in found[-2:]] == ["it is one of training.skip_steps"] * 2
    for spike in found:
        rows = {(p.source, p.file, p.record) for p in trace.step(spike.last_step)}
        assert {document[:3] for document in spike.documents} == rows
    run.openlm("report", "small")
    page, text = ((run.home.report("small", "v1") / f"report.{form}").read_text() for form in ("html", "md"))
    (skipped,) = [line for line in text.splitlines() if "step 50 was read, not learned from" in line]
    for place in skipped.rpartition(": ")[2].split(", ")[:8]:
        file, _, number = place.partition(":")
        assert (file, int(number)) in {(p.file, p.record) for p in trace.step(50)}
        assert place in page
    shown = run.openlm("trace", "small", "--spike", "-n", "1").stdout
    assert "step 50 was read, not learned from: it is one of training.skip_steps" in shown


def test_a_step_left_out_and_then_trained_was_learned_from(packed: TracedRun, tmp_path: Path):
    run = packed.copy(tmp_path)
    folder = run.train("training.skip_steps=[3, 20, 28]", until=30)
    assert set(left_out_steps(folder)) == {3, 20, 28}
    run.train("training.skip_steps=[33]", until=36)
    assert set(left_out_steps(folder)) == {3, 20, 28, 33}
    for step in (30, 36):
        shutil.rmtree(folder.checkpoints / f"step-{step:08d}")
    run.train("training.skip_steps=[9, 28]")
    assert set(left_out_steps(folder)) == {9, 28}
    folder.ledger_file.unlink()  # as of the first release
    (folder.path / "outcome.json").unlink()
    assert set(left_out_steps(folder)) == {9, 28}


def test_check_ends_with_4_at_the_first_record_that_was_changed(trained: TracedRun, tmp_path: Path):
    run = trained.copy(tmp_path)
    equal = run.openlm("trace", "small", "--step", 23, "--raw", "--check")
    assert equal.returncode == 0 and "have the tokens of their raw records" in equal.stdout
    part = next(p for p in run.trace().step(23) if p.file == "a.jsonl")
    lines = run.raw("text/a.jsonl").read_text().splitlines()
    text = json.loads(lines[part.record])["text"]
    assert text in equal.stdout
    lines[part.record] = json.dumps({"text": text.replace("a", "b")}, ensure_ascii=False)
    run.raw("text/a.jsonl").write_text("\n".join(lines) + "\n")
    ended = run.openlm("trace", "small", "--step", 23, "--check")
    assert ended.returncode == 4
    assert f"record {part.record} of a.jsonl differs in the shards from its raw text" in ended.stderr
    assert "the raw file is not the one that was tokenized" in ended.stderr
    by_document = run.openlm("trace", "small", "--document", f"a.jsonl:{part.record}", "--check")
    assert by_document.returncode == 4
    run.raw("text/a.jsonl").unlink()
    gone = run.openlm("trace", "small", "--step", 23, "--raw")
    assert gone.returncode == 3 and "a.jsonl" in gone.stderr


def test_offsets_are_those_of_the_raw_file_and_none_is_told_where_none_is_recorded(trained: TracedRun, tmp_path: Path):
    run = trained.copy(tmp_path)
    raw = run.raw("text/b.jsonl").read_bytes()
    (document,) = run.trace().document("b.jsonl", 9)
    assert PLANTED in json.loads(raw[document.offset :].split(b"\n", 1)[0])["text"]
    shutil.rmtree(run.home.root / "tokenized")
    (without,) = run.trace().document("b.jsonl", 9)
    assert without.offset is None and without.seen == document.seen
    assert run.openlm("trace", "small", "--document", "b.jsonl:9", "--raw", "--check").returncode == 0


@pytest.mark.parametrize("first_release", [False, True])
def test_a_segment_a_part_of_it_and_a_store_are_traced(
    packed: TracedRun, tmp_path: Path, first_release: bool, monkeypatch: pytest.MonkeyPatch
):
    run = packed.copy(tmp_path)
    texts = [f"new text {n} " + record(1000 + n) for n in range(40)]
    url = f"memory://{tmp_path.name}"
    settings = ["sources.0.version=v2", "sources.0.extends=v1", f"milestones=[{60 * BATCH}]"]
    if first_release:  # no index of documents
        (run.home.shards("code", "v1") / "documents.parquet").rename(tmp_path / "gone")
        monkeypatch.setattr("openlm_pipeline.shards.document_index.recorded_beside", lambda entries: {})
    else:
        settings += [f"execution.shards_url={url}", "execution.keep_local_shards=false"]
        run.pack(*settings[3:])
    run.write("text/d.jsonl", texts)
    run.pack(*settings)
    whole = len(data_stages.open_dataset(run.experiment(*settings).training_datasets()[0], run.home))
    settings.append(f"sources.0.max_tokens={(whole - 20) * 17}")
    folder = run.train(*settings)
    read = recorded(run.experiment(*settings), run.home, folder.identity, 1, 60)
    agrees(run, "small", read)
    trace = run.trace()
    source = next(s for s in trace.order.sources.values() if s.name == "text/v2")
    assert len(source.opened) == whole - 20
    new = next(p for p in trace.parts(source, whole - 30) if p.file == "d.jsonl")
    (document,) = trace.document("d.jsonl", new.record)
    assert new.sample in document.samples and max(document.samples) < whole - 20
    list(trace.raw(trace.step(5), check=True))
    notes = {d.note for n in range(20, 40) for d in trace.document("d.jsonl", n)}
    assert "its last tokens are past max_tokens" in notes or "it is past max_tokens" in notes
    if not first_release:
        for shard in run.home.shards("text", "v2").glob("*.tar"):
            shard.unlink()
        again = run.trace()
        in_store = {p.row for p in again.step(5) if p.text is None}
        assert in_store and next(again.step(5, min(in_store))).text is not None
        assert list(run.home.shards("text", "v1").glob("*.provenance.parquet")) == []
    (found, *_) = trace.text("new text 1 1001: ")
    assert (found.file, found.record) == ("d.jsonl", 1)


def ready_made(run: TracedRun, shards: str, name: str) -> Trace:
    """A run of its own on one source of ready-made shards."""
    tokenizer = f"tokenizer={{name: bpe, train: null, source: {run.home.tokenizer('bpe')}}}"
    sources = f"sources=[{{name: {name}, shards: {shards}}}]"
    run.train(f"name={name}", tokenizer, sources, f"milestones=[{20 * BATCH}]")
    return run.trace(name)


def test_shards_without_provenance_are_traced_as_far_as_they_tell(packed: TracedRun, tmp_path: Path):
    run = packed.copy(tmp_path / "run")
    export_shards(
        run.home.shards("text", "v1"), tmp_path / "openlm", DaskSettings(workers=1).pool, lambda line: None,
        format="json.gz", eot_as="id", count_key="num_sequences",
    )  # fmt: skip
    trace = ready_made(run, str(tmp_path / "openlm"), "openlm")
    parts = list(trace.step(2))
    assert len(parts) == 6 and {(p.file, p.tokens) for p in parts} == {(None, 17)} and all(p.text for p in parts)
    ended = run.openlm("trace", "openlm", "--step", 2)
    assert ended.returncode == 0 and "ready-made shards, which have no provenance" in ended.stdout
    with pytest.raises(MissingInputError, match="nothing says which raw records"):
        list(trace.raw(parts))
    with pytest.raises(ConfigError, match="nothing says what they were made from"):
        trace.document("a.jsonl", 1)
    (found,) = trace.text(PLANTED)
    assert found.file is None and {s.sample for s in found.seen} <= set(found.samples)
    assert [d[:3] for d in spikes(trace, 1)[0].documents] == [("openlm/v1", None, None)]
    assert run.openlm("verify", "openlm", "--tokens").returncode == 0
    chain = run.openlm("trace", f"openlm@{format_tokens(20 * BATCH)}")
    assert chain.returncode == 0 and "whose manifest has no hashes" in chain.stdout


def test_synthetic_samples_have_steps_and_no_documents(packed: TracedRun, tmp_path: Path):
    run = packed.copy(tmp_path)
    trace = ready_made(run, "synthetic://100/7", "made_up")
    assert [(p.file, p.text, p.tokens) for p in trace.step(3, 1)] == [(None, None, 17)]
    assert list(trace.text("a")) == []
    assert run.openlm("verify", "made_up", "--tokens").returncode == 0
    assert run.openlm("trace", "made_up", "--spike").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["small"], 2, "say what to trace: one of --step"),
        (["small", "--step", "1", "--spike"], 2, "say what to trace"),
        (["small@5K", "--step", "1"], 2, "where it means --until"),
        (["small", "--step", "0"], 2, "its first is 1"),
        (["small", "--step", "1", "--row", "9"], 2, "rows 0 to 5"),
        (["small", "--document", "a.jsonl"], 2, "write FILE:RECORD"),
        (["small", "--document", "aa.jsonl:1"], 2, "did you mean 'a.jsonl'?"),
        (["small", "--document", "a.jsonl:4000"], 3, "quarantined, dropped"),
        (["small", "--document", "a.jsonl:1", "--until", "soon"], 2, "the milestones are"),
        (["small", "--text", ""], 2, "--text is empty"),
        (["small", "--text", "a", "--raw"], 2, "--raw and --check go with"),
        (["smal", "--spike"], 3, "did you mean 'small'?"),
    ],
)
def test_what_cannot_be_traced_is_said_in_a_line(trained: TracedRun, arguments: list[str], code: int, said: str):
    ended = trained.openlm("trace", *arguments)
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, False)
    assert said in ended.stderr


def test_an_index_that_names_another_place_is_damage(trained: TracedRun, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = trained.copy(tmp_path)
    path = run.home.shards("text", "v1") / "documents.parquet"
    table = pq.read_table(path)
    starts = np.roll(table["start"].to_numpy(), 1)
    pq.write_table(table.set_column(2, "start", pa.array(starts)), path)
    with pytest.raises(DataError, match=r"documents.parquet is damaged: its record 5 of a.jsonl does not begin"):
        run.trace().document("a.jsonl", 5)
