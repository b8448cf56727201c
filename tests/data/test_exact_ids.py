"""A document's ids in the shards are all of those that `tokenizers` gives, whatever else the tokenizer.json says."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import random_tokenizers
from small_dataset import EOT, SmallDataset, documents
from tokenizers import Tokenizer

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import ConfigError, ConsentError
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.round_trip import round_trip
from openlm_pipeline.storage.files import read_json, read_sealed, write_json
from openlm_pipeline.tokenizers.engines.huggingface import can_cut, pieces
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info

Small = Callable[..., SmallDataset]

TRUNCATION = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>"}
FAR = 70_000


def change(made: SmallDataset, **options: Any) -> None:
    """Other top-level entries of the user's tokenizer.json; `vocab` and `dropout` are the model's."""
    path = made.root / "small_bpe.json"
    config = json.loads(path.read_text())
    model = {key: options.pop(key) for key in ("vocab", "dropout") if key in options}
    path.write_text(json.dumps({**config, **options, "model": {**config["model"], **model}}))


def move_an_id(made: SmallDataset) -> str:
    """Give the id 70,000 to a token, which is returned."""
    vocab = json.loads((made.root / "small_bpe.json").read_text())["model"]["vocab"]
    token = max(vocab, key=vocab.get)
    change(made, vocab={**vocab, token: FAR})
    return token


@pytest.mark.parametrize("engine", ["auto", "huggingface"])
def test_truncation_and_padding_are_switched_off(engine: str, small: Small, inline: PoolFactory) -> None:
    settings = {"execution": {"tokenizer_engine": engine}}
    plain, saved = (small(folder, settings) for folder in ("plain", "saved"))
    change(saved, truncation=TRUNCATION, padding=PADDING)
    for made in (plain, saved):
        made.write({"a.jsonl": documents(30)})
        made.run(inline)
    assert saved.recovered() == plain.recovered()
    assert ShardedDataset(saved.shards).info["totals"] == ShardedDataset(plain.shards).info["totals"]
    kept = saved.home.tokenizer("small_bpe") / "tokenizer.json"
    assert kept.read_bytes() == (saved.root / "small_bpe.json").read_bytes()
    found = round_trip(ShardedDataset(saved.shards), discover(saved.dataset, saved.home), "text")
    assert found.damaged == ()


def test_that_they_are_switched_off_is_said(small: Small) -> None:
    made, said = small(), []
    made.write({"a.jsonl": documents(30)})
    change(made, truncation=TRUNCATION, padding=PADDING)
    data_stages.ensure_tokenizer(made.experiment, made.home, said.append)
    assert said == ["tokenizer small_bpe: truncation and padding of its tokenizer.json are switched off"]


def test_streams_that_were_cut_by_an_earlier_release_are_made_again(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(30)})
    change(made, truncation=TRUNCATION)
    made.run(inline)
    as_first_release_wrote_it(made)
    done = made.tokenized / "a.jsonl.json"
    fields = read_sealed(done)
    del fields["identity"]["switched_off"]
    write_json(done, fields)
    assert made.tokenize(inline)[1] == ["a.jsonl"]
    assert made.tokenize(inline)[1] == []


def as_first_release_wrote_it(made: SmallDataset) -> None:
    path = made.home.tokenizer("small_bpe") / "tokenizer_info.json"
    old = ("name", "sha256", "vocab_size", "eot_id", "identity", "stamps")
    write_json(path, {key: value for key, value in read_json(path).items() if key in old})


def test_dropout_is_refused_by_name(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(30)})
    change(made, dropout=0.1)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has dropout 0\.1.*null"):
        made.run(inline)


def test_no_dropout_is_no_dropout(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(30)})
    change(made, dropout=0.0)
    assert not made.run(inline).reused


def test_the_largest_id_decides_the_width(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(60)})
    token = move_an_id(made)
    made.run(inline)
    shards = ShardedDataset(made.shards)
    assert shards.info["dtype"] == "uint32"
    assert shards.info["tokenizer"] | {"sha256": ""} == {
        "name": "small_bpe",
        "sha256": "",
        "vocab_size": 400,
        "largest_id": FAR,
    }
    tokenizer = Tokenizer.from_file(str(made.root / "small_bpe.json"))
    assert tokenizer.token_to_id(token) == FAR
    texts = documents(60)
    assert any(FAR in ids for ids in made.recovered().values())
    for (_, record), ids in made.recovered().items():
        expected = [*tokenizer.encode(texts[record], add_special_tokens=False).ids, 0]
        assert ids == expected[: len(ids)]  # one document reaches into the tail


def test_a_tokenizer_that_an_earlier_release_described_is_looked_at_again(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(60)})
    move_an_id(made)
    made.run(inline)
    before = read_tokenizer_info(made.home.tokenizer("small_bpe"))
    as_first_release_wrote_it(made)
    info = read_tokenizer_info(made.home.tokenizer("small_bpe"))
    assert info == before
    assert (info.vocab_size, info.largest_id, info.num_rows) == (400, FAR, FAR + 1)
    assert made.tokenize(inline)[1] == []
    stream = made.tokenized / "a.jsonl.tokens"
    stream.write_bytes(stream.read_bytes()[::2])  # of two bytes per id, as it was then
    assert made.tokenize(inline)[1] == ["a.jsonl"]


def test_an_id_that_has_no_row_is_not_trained_on(small: Small, inline: PoolFactory) -> None:
    from train.data import Batches

    made = small()
    made.write({"a.jsonl": documents(60)})
    move_an_id(made)
    made.run(inline)
    shards = ShardedDataset(made.shards)
    with pytest.raises(ConfigError, match=r"may hold the id 70000.*has 512 rows.*model\.vocab_size to 70001"):
        Batches(made.experiment, [shards], 0, 1)
    bigger = replace(made, settings={"model": {"hidden_dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": FAR + 1}})
    Batches(bigger.experiment, [shards], 0, 1)


def test_strings_of_special_tokens_become_their_ids_or_text(small: Small, inline: PoolFactory) -> None:
    texts = [*documents(20), f"{EOT}{EOT} and <|padding|>", "<|endoftext"]
    said: dict[str, list[str]] = {}
    streams = {}
    for kind in ("ids", "text"):
        made = small(kind, {"execution": {"verify_every": 1}}, special_tokens=kind)
        made.write({"a.jsonl": texts})
        made.tokenizer()
        said[kind] = []
        files, _ = data_stages.tokenize(made.dataset, made.home, inline, said[kind].append)
        made.make_shards(files, inline)
        streams[kind] = made.recovered()
        assert [f.special_strings for f in files] == [4]
        assert ShardedDataset(made.shards).info["totals"]["special_strings"] == 4
        assert round_trip(ShardedDataset(made.shards), discover(made.dataset, made.home), "text").damaged == ()
    assert "strings of special tokens stand in documents 4 times and became their tokens" in said["ids"][-1]
    assert "4 times and became ordinary text" in said["text"][-1]
    tokenizer = Tokenizer.from_file(str(made.root / "small_bpe.json"))
    with_ids, as_text = (streams[kind]["a.jsonl", 3] for kind in ("ids", "text"))
    assert with_ids.count(0) == 2 and as_text.count(0) == 1  # the last one ends the document
    assert tokenizer.decode(as_text[:-1], skip_special_tokens=False) == texts[3]
    assert streams["ids"]["a.jsonl", 0] == streams["text"]["a.jsonl", 0]


def test_the_setting_changes_the_streams_identity_only_where_it_is_not_the_usual(
    small: Small, inline: PoolFactory
) -> None:
    made = small()
    made.write({"a.jsonl": documents(30)})
    made.run(inline)
    assert "special_tokens" not in read_json(made.tokenized / "a.jsonl.json")["identity"]
    usual = replace(made, source={"special_tokens": "ids"})
    assert usual.tokenize(inline)[1] == []
    as_text = replace(made, source={"special_tokens": "text"})
    files, done = as_text.tokenize(inline)
    assert done == ["a.jsonl"]
    with pytest.raises(ConsentError, match="files.a.jsonl"):
        data_stages.make_shards(as_text.dataset, files, as_text.home, inline, print)


def test_how_often_is_not_known_of_streams_of_an_earlier_release(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(30), "b.jsonl": documents(20)})
    made.tokenizer()
    made.tokenize(inline)
    done = made.tokenized / "a.jsonl.json"
    fields = read_sealed(done)
    del fields["special_strings"]
    write_json(done, fields)
    files, again = made.tokenize(inline)
    assert again == [] and [f.special_strings for f in files] == [None, 1]
    assert made.make_shards(files, inline).facts["special_strings"] is None


def test_a_tokenizer_file_that_cannot_be_read_is_named(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(30)})
    (made.root / "small_bpe.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"small_bpe\.json is not a tokenizer\.json"):
        made.run(inline)


def test_a_long_text_in_pieces_has_the_ids_of_the_whole() -> None:
    cuts = 0
    for seed in range(120):
        rng = random.Random(seed)
        made = Tokenizer.from_str(json.dumps(random_tokenizers.tokenizer(rng)))
        made.no_truncation()
        made.no_padding()
        if made.model.dropout or not can_cut(made):
            continue
        for _ in range(4):
            whole = "".join(rng.choices([*random_tokenizers.BITS, *random_tokenizers.CONTENTS, "a ", "s  "], k=40))
            cut = list(pieces(whole, rng.randint(1, 9)))
            ids = [made.encode(piece, add_special_tokens=False).ids for piece in cut]
            assert sum(ids, []) == made.encode(whole, add_special_tokens=False).ids, f"seed {seed}: {cut}"
            cuts += len(cut) - 1
    assert cuts > 500


def test_a_token_that_begins_each_document(small: Small, inline: PoolFactory) -> None:
    plain = small("plain")
    plain.write({"a.jsonl": documents(30)})
    plain.run(inline)
    source = {"name": "small_bpe", "source": str(plain.root / "small_bpe.json")}
    made = small("bos", {"tokenizer": {**source, "bos": "<|padding|>"}})
    made.write({"a.jsonl": documents(30)})
    made.run(inline)
    bos = Tokenizer.from_file(source["source"]).token_to_id("<|padding|>")
    with_bos, without = made.recovered(), plain.recovered()
    assert {key: ids[0] for key, ids in with_bos.items()} == dict.fromkeys(with_bos, bos)
    whole = [key for key in with_bos if len(with_bos[key]) == len(without.get(key, [])) + 1]
    assert len(whole) > 20 and all(with_bos[key][1:] == without[key] for key in whole)
    found = round_trip(ShardedDataset(made.shards), discover(made.dataset, made.home), "text")
    assert found.exact > 5 and not found.damaged
    other = small("other", {"tokenizer": {**source, "bos": "<s>"}})
    other.write({"a.jsonl": documents(3)})
    with pytest.raises(ConfigError, match=r"no token '<s>'; set `tokenizer\.bos`, or --bos"):
        other.run(inline)
