"""The fast engine gives the ids of Hugging Face `tokenizers`, whatever the tokenizer.json holds, or is not used."""

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import random_tokenizers
from random_tokenizers import Search, byte_level
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.tokenizers import engine as engines
from openlm_pipeline.tokenizers.engine import load_reference, make_engine
from openlm_pipeline.tokenizers.engines import EncodingError, gigatoken
from openlm_pipeline.tokenizers.engines.gigatoken import SPLITS, GigatokenEngine
from openlm_pipeline.tokenizers.engines.huggingface import HuggingFaceEngine
from openlm_pipeline.tokenizers.strings import Strings

Change = Callable[[dict[str, Any]], None]


def added(config: dict[str, Any], content: str, **flags: Any) -> None:
    """Give a tokenizer one more added token."""
    plain = {"special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    config["added_tokens"].append({"id": 9_999, "content": content, **plain, **flags})


def set_in(part: str, **options: Any) -> Change:
    return lambda config: config[part].update(options)


def suffix_is_a_token(config: dict[str, Any]) -> None:
    config["model"].update(end_of_word_suffix="</w>")


def newline_before_its_byte(config: dict[str, Any]) -> None:
    """An added token of one byte whose id comes first."""
    vocab = config["model"]["vocab"]
    vocab.update({"\n": vocab["!"], "!": len(vocab)})
    added(config, "\n")


def made(folder: Path, change: Change | None = None) -> Path:
    """A byte-level BPE with NFC and `<|end|>`, changed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat, a b, the dog didn't 12 123", "e\u0301 \u4e2d"] * 9, trainer)
    config = json.loads(tokenizer.to_str())
    config["normalizer"] = {"type": "NFC"}
    if change:
        change(config)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(config))
    return path


def texts(seed: int, contents: tuple[str, ...] = ("<|end|>", "the", "th", "he", "the =", "\n")) -> list[str]:
    rng = random.Random(seed)
    return [random_tokenizers.text(rng, list(contents)) for _ in range(300)]


def check_equal(path: Path, documents: list[str], special_as_text: bool = False) -> int:
    """That the engine chosen gives the ids of `tokenizers`; how many documents the fast one took."""
    reference = Tokenizer.from_file(str(path))
    reference.encode_special_tokens = special_as_text
    engine, line = make_engine(path, verify_every=10**9, special_as_text=special_as_text)
    for text, ids in zip(documents, engine.encode_batch(documents).split(), strict=True):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids, text
    if not isinstance(engine, engines.CheckedEngine):
        return 0
    return sum(not engine._engine.is_doubtful(text) for text in documents)


REFUSED: dict[str, tuple[Change, str]] = {
    "no split": (set_in("pre_tokenizer", use_regex=False), "use_regex"),
    "prefix space": (set_in("pre_tokenizer", add_prefix_space=True), "add_prefix_space"),
    "byte_fallback": (set_in("model", byte_fallback=True), "byte_fallback"),
    "suffix": (suffix_is_a_token, "end_of_word_suffix"),
    "another split": (lambda c: c.update(pre_tokenizer=byte_level(r"\s+|\S+")), "splits by another rule"),
    "removed": (lambda c: c.update(pre_tokenizer=byte_level("Llama 3", behavior="Removed")), "another rule"),
    "inverted": (lambda c: c.update(pre_tokenizer=byte_level("Qwen 2", invert=True)), "another rule"),
    "two splits": (
        lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [byte_level(), byte_level()]}),
        "not plain ByteLevel",
    ),
    "NFKC": (lambda c: c.update(normalizer={"type": "NFKC"}), "not NFC"),
    "one byte": (newline_before_its_byte, "one byte"),
    "not ASCII": (lambda c: added(c, "\u00e9", normalized=True), "NFC may change"),
    "one id twice": (lambda c: c["model"]["vocab"].update({"xyz": c["model"]["vocab"]["a"]}), "one id"),
    "a huge id": (lambda c: c["model"]["vocab"].update({"xyz": 1 << 31}), "ids from 2,097,152 on"),
}
SERVED: dict[str, tuple[Change, int]] = {
    "as it is": (lambda c: None, 240),
    "Llama 3": (lambda c: c.update(pre_tokenizer=byte_level("Llama 3"), normalizer=None), 290),
    "Qwen 2": (lambda c: c.update(pre_tokenizer=byte_level("Qwen 2")), 240),
    "lstrip": (lambda c: c["added_tokens"][0].update(lstrip=True), 150),
    "rstrip": (lambda c: c["added_tokens"][0].update(rstrip=True), 150),
    "single_word": (lambda c: added(c, "the", single_word=True), 150),
    "NFC makes it": (lambda c: added(c, "``"), 240),
    "NFC changes it": (lambda c: added(c, "the =", normalized=True), 150),
    "two kinds that overlap": (lambda c: (added(c, "th", normalized=True), added(c, "he")), 120),
    "ids that are not consecutive": (lambda c: added(c, "the"), 240),
    "ids in the vocabulary": (lambda c: added(c, "on", id=c["model"]["vocab"]["on"]), 240),
    "ignore_merges": (set_in("model", ignore_merges=True), 240),
    "a token that bytes can't make": (
        lambda c: c["model"].update(ignore_merges=True, vocab={**c["model"]["vocab"], "\u4e2d": 400}),
        240,
    ),
    "merges said twice": (lambda c: c["model"]["merges"].extend(c["model"]["merges"][:20]), 240),
    "merges in another order": (lambda c: random.Random(1).shuffle(c["model"]["merges"]), 240),
    "merges missing": (lambda c: c["model"].update(merges=c["model"]["merges"][:30]), 240),
    "a post-processor": (
        lambda c: c.update(post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        240,
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_that_it_may_take_otherwise_is_left_to_the_reference(kind, tmp_path):
    change, reason = REFUSED[kind]
    path = made(tmp_path, change)
    assert check_equal(path, texts(1)) == 0
    assert reason in make_engine(path)[1]
    with pytest.raises(ConfigError, match="tokenizer_engine=gigatoken does not work"):
        make_engine(path, "gigatoken")


@pytest.mark.parametrize("kind", SERVED)
def test_a_tokenizer_that_it_takes_gets_the_ids_of_the_reference(kind, tmp_path):
    change, at_least = SERVED[kind]
    assert check_equal(made(tmp_path, change), [*texts(2), "\u1fef\u1fef", "the =\u0338"]) >= at_least


def test_generated_tokenizers_get_the_ids_of_the_reference(tmp_path):
    """A short run of `python tests/data/random_tokenizers.py SECONDS`."""
    search = Search()
    for seed in range(90):
        search.look(seed, tmp_path, texts=30)
    assert search.differences == []
    assert search.tokenizers >= 50
    assert search.documents - search.doubtful >= 1_000
    assert len(search.refused) >= 5


def converted_from_tiktoken(folder: Path, split: str) -> Path:
    """A tokenizer as Meta's and Qwen's are: merges by every pair that makes a token, special tokens outside of them."""
    tokenizer = Tokenizer(models.BPE())
    splitting = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splitting, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    modules = [json, random, pytest, np, unicodedata, sys.modules["argparse"]]
    sources = [Path(m.__file__).read_text("utf-8") for m in modules if str(m.__file__).endswith(".py")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        sources, trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    )
    config = json.loads(tokenizer.to_str())
    vocab = config["model"]["vocab"]
    config["model"]["merges"] = [
        pair
        for token in sorted(vocab, key=vocab.get)
        for pair in sorted(
            ([token[:n], token[n:]] for n in range(1, len(token)) if token[:n] in vocab and token[n:] in vocab),
            key=lambda pair: [vocab[part] for part in pair],
        )
    ]
    assert len(config["model"]["merges"]) > 1.3 * (len(vocab) - 256)
    config["model"]["ignore_merges"] = split == "Llama 3"
    config["normalizer"] = None if split == "Llama 3" else {"type": "NFC"}
    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.add_special_tokens(["<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(20))])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("split", SPLITS)
def test_llama_3_and_qwen_2_style_tokenizers_are_served(split, tmp_path):
    path = converted_from_tiktoken(tmp_path, split)
    documents = [
        Path(json.__file__).read_text(),
        Path(random.__file__).read_text(),
        *texts(3, ("<|end_of_text|>", "a")),
    ]
    assert check_equal(path, documents) >= 240
    assert check_equal(path, documents, special_as_text=True) >= 150


def test_the_guard_was_probed_for_each_split():
    table = orjson.loads(Path(gigatoken.__file__).parents[1].joinpath("guard_codepoints.json").read_bytes())
    assert table["splits"] == ["GPT-2", *SPLITS]


def test_what_nfc_does_to_ascii_is_known():
    """No ASCII character outside of those that make an added token doubtful is touched by NFC."""
    composes, composed = set(), set()
    for char in map(chr, [*range(0x80, 0xD800), *range(0xE000, 0x30000)]):
        first, *rest = unicodedata.normalize("NFD", char)
        if first.isascii() and rest and unicodedata.normalize("NFC", first + rest[0]) != first + rest[0]:
            composes.add(first)
        composed |= {c for c in unicodedata.normalize("NFC", char) if c.isascii()}
    assert composes <= gigatoken.COMPOSES
    assert composed == gigatoken.COMPOSED


def test_special_tokens_as_text(tmp_path):
    path = made(tmp_path, lambda c: (added(c, "the", special=True), added(c, "at the mat")))
    documents = ["<|end|>", "a <|end|> b", "on the mat", "at the mat", *texts(4)]
    assert check_equal(path, documents, special_as_text=True) >= 150
    end = load_reference(path).token_to_id("<|end|>")
    for special_as_text in (False, True):
        engine, _ = make_engine(path, special_as_text=special_as_text)
        assert (end in engine.encode_batch(documents[:2]).ids) is not special_as_text


def test_an_engine_without_the_option_is_not_used_where_special_tokens_are_text(tmp_path, monkeypatch):
    monkeypatch.setattr(GigatokenEngine, "__init__", lambda self, tokenizer_json: None)
    engine, line = make_engine(made(tmp_path), special_as_text=True)
    assert isinstance(engine, HuggingFaceEngine)
    assert "special_as_text" in line


@pytest.mark.parametrize(
    ("strings", "text", "count"),
    [
        (["<|end|>", "<|pad|>"], "<|end|><|pad|> <|end", 2),
        (["ab", "abc"], "abcab", 2),
        (["aa"], "aaa", 1),
        (["x"], "axxb", 2),
        ([], "anything", 0),
        (["(", "a.b"], "(aab", 1),
    ],
)
def test_strings_are_counted(strings, text, count):
    found = Strings(strings)
    assert (found.count(text), found.are_in(text), bool(found)) == (count, count > 0, bool(strings))


def strips_what_another_strips(config: dict[str, Any]) -> None:
    added(config, "\n", lstrip=True, normalized=True)
    added(config, "|>", rstrip=True, single_word=True, normalized=True)


def test_a_document_on_which_tokenizers_itself_fails_is_named(tmp_path):
    """It panics where one added token takes the white space that another has taken."""
    engine, line = make_engine(made(tmp_path, strips_what_another_strips))
    assert line.startswith("Hugging Face tokenizers, because")
    documents = ["fine", "fine too", "|>\r\n\u00a0'"]
    with pytest.raises(EncodingError, match="Hugging Face tokenizers can't encode it") as raised:
        engine.encode_batch(documents)
    assert raised.value.position == 2
    assert len(engine.encode_batch(documents[:2]).lengths) == 2
