"""`openlm shards`, and documents recovered from the shards through their provenance alone."""

import itertools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_dataset import SmallDataset, documents, message_of
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result
from whole_documents import document_tokens, find_document, iterate_documents

from openlm_pipeline.cli.shards import shards_app
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.inspect import QUANTILES, check_shards, dataset_stats, sample_spans, tokenizer_of
from openlm_pipeline.shards.openlm_formats import write_openlm_shard
from openlm_pipeline.storage.files import read_json

TEXTS = {"a.jsonl": documents(20), "b.jsonl": documents(35, 100), "c.jsonl": documents(8, 200)}


@pytest.fixture
def made(three_files: SmallDataset, inline: PoolFactory) -> SmallDataset:
    """Three raw files in several shards, with a dropped tail."""
    three_files.run(inline)
    return three_files


@pytest.fixture
def padded(small: Callable[..., SmallDataset], inline: PoolFactory) -> SmallDataset:
    """The same, with the tail in a padded sample."""
    padded = small("padded", {"pad_id": 1})
    padded.write(TEXTS)
    padded.run(inline)
    return padded


def run(*arguments: object) -> Result:
    return CliRunner().invoke(shards_app, [str(a) for a in arguments])


def output(*arguments: object) -> str:
    """What a command that succeeds prints, blanks run together."""
    result = run(*arguments)
    assert result.exit_code == 0, repr(result.exception) + result.output
    return "\n".join(" ".join(line.split()) for line in result.stdout.splitlines())


def lengths(made: SmallDataset) -> dict[str, list[int]]:
    """Tokens of each document by raw file, as stage 1 counted them."""
    found = {name: np.fromfile(made.tokenized / f"{name}.documents", "<i8").reshape(-1, 2) for name in TEXTS}
    return {name: rows[:, 1].tolist() for name, rows in found.items()}


def decoder(made: SmallDataset) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_of(made.shards)))


@pytest.mark.parametrize("kind", ["made", "padded"])
def test_every_whole_document_comes_back_byte_for_byte(kind: str, request: pytest.FixtureRequest) -> None:
    made: SmallDataset = request.getfixturevalue(kind)
    found = list(iterate_documents(made.shards))
    tokenizer = decoder(made)
    for file, record, ids in found:
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert text.encode() == unicodedata.normalize("NFC", TEXTS[file][record]).encode()
        assert np.array_equal(document_tokens(made.shards, file, record), ids)
    missing = {(f, n) for f, texts in TEXTS.items() for n in range(len(texts))} - {(f, n) for f, n, _ in found}
    totals = read_json(made.shards / "dataset.json")["totals"]
    assert totals["documents"] == len(found) + len(missing) == sum(map(len, TEXTS.values()))
    tokens = sum(lengths(made)[file][record] for file, record in missing)
    if kind == "padded":
        assert tokens == totals["tail_tokens"] == 0 < totals["padding_tokens"]
    else:
        # What did not come back is what the tail cut: no more documents than have a token there.
        assert 0 < len(missing) <= totals["tail_tokens"] <= tokens
    for file, record in missing:
        assert sum(find_document(ShardedDataset(made.shards), file, record)) > totals["tokens"] - totals["tail_tokens"]


def test_real_text_comes_back_byte_for_byte(shared_data: Path, tmp_path: Path, inline: PoolFactory) -> None:
    reader = RecordReader(str(shared_data / "raw" / "01.jsonl.zst"), on_bad=lambda bad: None)
    texts = [record.text for record in itertools.islice(reader, 400)]
    reader.close()
    source = shared_data / "tokenizers" / "gpt-neox-20b"
    fields = {"seq_len": 128, "training": {"global_batch": 128, "lr": 1e-3}, "milestones": [128]}
    fields |= {"model": {"name": "open_lm_11m"}, "samples_per_shard": 512}
    made = SmallDataset(tmp_path, {"tokenizer": {"name": "gpt_neox_20b", "source": str(source)}, **fields})
    made.write({"a.jsonl": texts})
    made.run(inline)
    tokenizer = decoder(made)
    found = [
        (n, tokenizer.decode(ids.tolist(), skip_special_tokens=False)) for _, n, ids in iterate_documents(made.shards)
    ]
    assert len(ShardedDataset(made.shards).entries) > 3 and 397 <= len(found) <= 400
    assert [n for n, text in found if text.encode() != unicodedata.normalize("NFC", texts[n]).encode()] == []


def test_provenance_that_is_not_the_shards_is_refused(made: SmallDataset) -> None:
    first, second = (made.shards / f"{n:08d}.provenance.parquet" for n in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=f"{first} has sha256 .* it is damaged"):
        list(iterate_documents(made.shards))
    made.make_first_release()
    with pytest.raises(DataError, match=f"{first} is damaged, or of another shard"):
        list(iterate_documents(made.shards))
    first.write_bytes(content[:-10])
    with pytest.raises(DataError, match=f"{first} is damaged"):
        list(iterate_documents(made.shards))
    table = pq.read_table(second)
    first.write_bytes(content)
    pq.write_table(table.set_column(5, "document_start", [(table["document_start"].to_numpy() + 1)]), second)
    with pytest.raises(DataError, match=f"{second}"):
        list(iterate_documents(made.shards))
    second.unlink()
    with pytest.raises(MissingInputError, match=f"{second} does not exist"):
        list(iterate_documents(made.shards))


def test_verify_finds_sound_shards_sound(made: SmallDataset) -> None:
    count = len(ShardedDataset(made.shards).entries)
    assert output("verify", made.shards) == f"{made.shards}: {count} shards, all of the right sha256"
    assert output("verify", made.shards, "--quick") == f"{made.shards}: {count} shards, all of the right size"


def damage(made: SmallDataset) -> list[Path]:
    """Break every kind of thing: a missing, a shorter and a changed shard, another shard's provenance."""
    paths = [made.shards / name for name in ("00000000.tar", "00000001.tar", "00000002.tar", "00000003.tar")]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-512])
    data = bytearray(paths[2].read_bytes())
    data[700] ^= 1
    paths[2].write_bytes(data)
    provenance = [made.shards / f"{n:08d}.provenance.parquet" for n in (3, 4)]
    provenance[0].write_bytes(provenance[1].read_bytes())
    return [*paths[:3], provenance[0]]


def test_verify_names_each_damaged_shard(made: SmallDataset) -> None:
    broken = damage(made)
    for quick, expected in ((True, broken[:2]), (False, broken)):
        problems = [problem for _, problem in check_shards(made.shards, quick=quick) if problem]
        assert len(problems) == len(expected)
        assert all(str(path) in problem for path, problem in zip(expected, problems))
        result = run("verify", made.shards, *(["--quick"] if quick else []))
        assert result.stdout.splitlines()[:-1] == problems
        assert isinstance(result.exception, DataError) and result.exception.exit_code == 4
        message_of(result.exception, f"{len(expected)} problems found")


def test_verify_reads_openlms_shards(tmp_path: Path) -> None:
    rows = np.arange(90).reshape(10, 9)
    for k in range(3):
        write_openlm_shard(tmp_path / f"{k}.tar", rows, 10 * k, format="json.gz")
    lines = [json.dumps({"shard": str(k), "num_sequences": 10}) for k in range(4)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines[:3]))
    assert output("verify", tmp_path) == f"{tmp_path}: 3 shards, all whole"

    damaged = bytearray((tmp_path / "1.tar").read_bytes())
    damaged[512 * 9 + 12] ^= 1
    (tmp_path / "1.tar").write_bytes(damaged)
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    result = run("verify", tmp_path)
    assert isinstance(result.exception, DataError)
    message_of(result.exception, "2 problems found")
    assert "1.tar, member 000000000014.json.gz" in result.stdout
    assert "3.tar is missing though the manifest lists it" in result.stdout
    assert isinstance(run("inspect", tmp_path, 0).exception, ConfigError)


def test_verify_compares_manifest_and_dataset(made: SmallDataset) -> None:
    manifest = made.shards / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    result = run("verify", made.shards, "--quick")
    assert isinstance(result.exception, DataError)
    assert f"{manifest} is damaged" in result.stdout


@pytest.mark.parametrize("kind", ["made", "padded"])
def test_stats_count_what_stage_1_wrote(kind: str, request: pytest.FixtureRequest) -> None:
    made: SmallDataset = request.getfixturevalue(kind)
    by_file, found = lengths(made), dataset_stats(made.shards)
    totals = found.dataset.info["totals"]
    left_out = sum(map(sum, by_file.values())) - sum(f.tokens for f in found.files.values())
    assert left_out == totals["tail_tokens"]
    assert all(f.tokens <= sum(by_file[name]) for name, f in found.files.items())
    if kind == "padded":
        assert {name: f.tokens for name, f in found.files.items()} == {n: sum(x) for n, x in by_file.items()}
        assert {name: f.documents for name, f in found.files.items()} == {n: len(x) for n, x in by_file.items()}
    # The last document before a tail is not counted, as nobody can tell whether it is whole.
    whole = [len(ids) + 1 for _, _, ids in iterate_documents(made.shards)]
    ranked = [sorted(whole), sorted(whole[:-1])]
    quantiles = [{q: x[int(np.ceil(q * (len(x) - 1)))] for q in QUANTILES} for x in ranked]
    assert found.document_tokens == quantiles[0] if kind == "padded" else found.document_tokens in quantiles

    text = output("stats", made.shards)
    assert f"\ntokens {totals['tokens']:,} of 3 raw files" in text
    assert f"\nshards {totals['shards']}\n" in text
    assert "\ndtype uint16\n" in text
    assert f"\nb.jsonl {found.files['b.jsonl'].tokens:,} {found.files['b.jsonl'].documents}" in text
    on_disk = sum(p.stat().st_size for p in made.shards.glob("*.tar"))
    assert f"\non disk {on_disk:,} bytes, " in text


def test_inspect_decodes_a_sample_and_names_its_documents(padded: SmallDataset) -> None:
    dataset, tokenizer = ShardedDataset(padded.shards), decoder(padded)
    texts: dict[tuple[str, int], list[int]] = defaultdict(list)
    for sample in range(len(dataset)):
        spans = sample_spans(padded.shards, sample)
        assert np.concatenate([s.ids for s in spans]).tolist() == dataset[sample].tolist()
        for s in spans:
            if s.file is not None:
                assert s.document_start == len(texts[s.file, s.record])
                texts[s.file, s.record] += s.ids.tolist()
    assert spans[-1].file is None and set(spans[-1].ids) == {1}
    for (file, record), ids in texts.items():
        text = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        assert text == unicodedata.normalize("NFC", TEXTS[file][record])

    spans = next(s for n in range(len(dataset)) if len(s := sample_spans(padded.shards, n)) > 1)
    number = next(n for n in range(len(dataset)) if len(sample_spans(padded.shards, n)) > 1)
    text = run("inspect", padded.shards, number, "--ids").stdout
    assert text.startswith(f"sample {number} of {padded.shards}, 17 tokens, {len(spans)} parts\n")
    for s in spans[:2]:
        last = s.document_start + len(s.ids) - 1
        assert f": {s.file}, record {s.record}, its tokens {s.document_start} to {last}\n" in text
        assert " ".join(map(str, s.ids)) in text
    assert "<|endoftext|>" in text
    assert "\npadding\n" not in text and ": padding\n" in run("inspect", padded.shards, len(dataset) - 1).stdout


def test_inspect_shows_no_control_characters(padded: SmallDataset) -> None:
    shown = "".join(run("inspect", padded.shards, n).stdout for n in range(len(ShardedDataset(padded.shards))))
    assert "\\x00" in shown and "\x00" not in shown


def test_inspect_takes_only_the_datasets_own_tokenizer(made: SmallDataset, tmp_path: Path) -> None:
    own = made.home.tokenizer("small_bpe")
    assert tokenizer_of(made.shards) == tokenizer_of(made.shards, own) == own / "tokenizer.json"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((own / "tokenizer.json").read_text())))
    with pytest.raises(IdentityError, match=f"{other} is not the tokenizer small_bpe"):
        tokenizer_of(made.shards, other)
    result = run("inspect", made.shards, 0, "--tokenizer", tmp_path / "none.json")
    assert isinstance(result.exception, MissingInputError)
    message_of(result.exception, "small_bpe", str(tmp_path / "none.json"))


def test_a_sample_that_is_not_there_is_named(made: SmallDataset) -> None:
    samples = len(ShardedDataset(made.shards))
    result = run("inspect", made.shards, samples)
    assert isinstance(result.exception, ConfigError)
    message_of(result.exception, f"has samples 0 to {samples - 1}, and no sample {samples}")


def test_a_recipe_stands_for_its_datasets(made: SmallDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLM_HOME", str(made.root))
    recipe = tmp_path / "small.yaml"
    fields: dict[str, Any] = made.experiment.model_dump(mode="json", exclude_none=True)
    recipe.write_text(json.dumps(fields))
    assert f"{made.shards}: " in output("verify", recipe)
    assert "\nb.jsonl " in output("stats", recipe, "--dataset", "text")
    assert output("inspect", recipe, 0).startswith("sample 0 of ")
    message_of(run("verify", recipe, "--dataset", "txt").exception, "no dataset 'txt'; it has text")
    recipe.write_text(json.dumps({**fields, "sources": [*fields["sources"], {**fields["sources"][0], "name": "more"}]}))
    message_of(run("inspect", recipe, 0).exception, "choose one with --dataset: text, more")
    message_of(run("stats", made.root / "none").exception, f"there is no folder {made.root / 'none'}")
    message_of(run("stats", made.root).exception, f"no finished shards in {made.root}")
    message_of(run("stats", made.shards, "--dataset", "text").exception, "a folder was given")


def test_export_writes_what_openlm_reads(made: SmallDataset, tmp_path: Path) -> None:
    arguments = ("export", made.shards, "-o", tmp_path / "out", "--format", "txt", "--workers", "1")
    samples, shards = len(ShardedDataset(made.shards)), len(ShardedDataset(made.shards).entries)
    assert output(*arguments).endswith(f"{tmp_path / 'out'}: {samples} samples in {shards} shards exported")
    assert output(*arguments) == f"{tmp_path / 'out'}: {samples} samples in {shards} shards was exported already"
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == shards
    assert "of OpenLM's shards" in output("stats", tmp_path / "out")


def test_exact_duplicates_are_counted_as_a_slow_reader_does(small, inline: PoolFactory):
    made = small("twice")
    texts = documents(30)
    made.write({"a.jsonl": texts, "b.jsonl": [*texts[:10], *documents(9, 300)]})
    made.run(inline)
    ids = [tuple(found) for _, _, found in iterate_documents(made.shards)]
    assert len(ids) - len(set(ids)) > 0
    said = output("stats", made.shards, "--duplicates")
    assert f"exact duplicates: {len(ids) - len(set(ids))} of {len(ids)} documents" in said


def test_stats_and_samples_of_openlms_shards(made: SmallDataset, tmp_path: Path):
    dataset = ShardedDataset(made.shards)
    end, folder = dataset.info["eot_id"], tmp_path / "openlm"
    output("export", made.shards, "-o", folder, "--workers", 1, "--eot-as", "string")
    said = output("stats", folder)
    samples, width = len(dataset), dataset.format.sample_tokens
    ids = np.stack([dataset[n] for n in range(samples)])
    for line in (
        f"shards {len(dataset.entries)}",
        f"samples {samples:,} of {width} tokens",
        f"tokens {samples * width:,}, end-of-text included",
        f"documents about {(ids == end).sum() + (ids == 0).sum() * (end != 0):,}, by their end-of-text (id 0)",
        f"largest id {ids[ids != end].max():,}",
    ):
        assert line in said, said
    shown = run("inspect", folder, 3, "--tokenizer", made.root / "small_bpe.json", "--ids")
    assert f"sample 3 of {folder}, {width} tokens" in shown.output
    expected = [0 if token == end else token for token in dataset[3].tolist()]
    assert [
        int(n) for line in shown.output.splitlines() if re.fullmatch(r"[\d ]+", line) for n in line.split()
    ] == expected
    assert "name its file, --tokenizer" in str(run("inspect", folder, 3).exception)
    assert f"no sample {samples}" in str(
        run("inspect", folder, samples, "--tokenizer", made.root / "small_bpe.json").exception
    )
