"""The fast engine, for byte-level BPE. What it may do otherwise than the reference goes to the reference.

`exact_form` decides, from what the reference made of the file, whether the engine is tried on a tokenizer at all, in
which form it is given, and which strings in a document send that document to the reference. Why each rule is there was
read from the sources of gigatoken 0.10 and `tokenizers` 0.23; tests/data/random_tokenizers.py looks for more.
"""

import string
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from openlm_pipeline.registry import ENGINES
from openlm_pipeline.tokenizers.engine import largest_id, load_reference
from openlm_pipeline.tokenizers.engines import Encoded, Engine
from openlm_pipeline.tokenizers.strings import Strings

if TYPE_CHECKING:
    from tokenizers import AddedToken

_RESET_BYTES = 256 << 20
"""gigatoken 0.10 caches every distinct word it sees; a new tokenizer starts with an empty cache."""
_MAX_ID = 1 << 21
"""gigatoken makes a table of as many rows as the largest id says, and `tokenizers` counts up to it when it is saved."""
_ASCII = 127
_ALWAYS, _MARK, _ENDS_IN_MARK = 1, 2, 4

_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _REST % r"\p{N}{1,3}",
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _REST % r"\p{N}",
}
"""Regular expressions of a `Split` before `ByteLevel` for which benchmarks/probe_fast_engine.py compared the engines,
as it did for the one that `ByteLevel` has itself (GPT-2, GPT-NeoX)."""

COMPOSES = frozenset(string.ascii_letters + "<=>")
"""ASCII characters that NFC makes one with a combining mark after them."""
COMPOSED = frozenset("K;`")
"""ASCII characters that NFC puts in the place of others: U+212A, U+037E, U+1FEF."""


class Unfit(Exception):
    """Why the engine must not be tried on a tokenizer."""


@cache
def _guarded_code_points() -> np.ndarray:
    """uint8[0x110000] of flags: where the engines' ideas of Unicode differ; see benchmarks/probe_fast_engine.py."""
    table = np.zeros(0x110000, dtype=np.uint8)
    found = orjson.loads(Path(__file__).parents[1].joinpath("guard_codepoints.json").read_bytes())
    for kind, flag in (("always", _ALWAYS), ("marks", _MARK), ("ends_in_mark", _ENDS_IN_MARK)):
        for first, last in found[kind]:
            table[first : last + 1] |= flag
    return table


@cache
def _guarded_units() -> np.ndarray:
    """uint8[0x10000]: not 0 for the UTF-16 code units of guarded code points, and for all surrogates."""
    table = _guarded_code_points()[:0x10000].copy()
    table[0xD800:0xE000] = _ALWAYS
    return table


def is_guarded(text: str, nfc: bool = True) -> bool:
    """Whether a text holds a code point, or with `nfc` a run of combining marks, on which the engines may differ."""
    if text.isascii():
        return False
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    if not _guarded_units()[units[units > _ASCII]].any():  # most are ASCII in most texts
        return False
    flags = _guarded_code_points()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    if (flags & _ALWAYS).any():
        return True
    return nfc and bool(((flags[1:] & _MARK) & ((flags[:-1] & _ENDS_IN_MARK) >> 1)).any())


@dataclass(frozen=True)
class ExactForm:
    """A tokenizer as gigatoken is given it."""

    content: bytes
    """Of a tokenizer.json."""
    nfc: bool
    watched: Strings
    """A document that holds one of them, before or after normalization, is left to the reference."""


def exact_form(tokenizer_json: Path, special_as_text: bool) -> ExactForm:
    """
    Raises:
        Unfit: gigatoken may give other ids in documents that cannot be told beforehand.
    """
    about = tokenizer_json.stat()
    return _exact_form(tokenizer_json, special_as_text, about.st_mtime_ns, about.st_size, about.st_ino)


@lru_cache(maxsize=2)
def _exact_form(tokenizer_json: Path, special_as_text: bool, *stamp: int) -> ExactForm:
    reference = load_reference(tokenizer_json)
    if largest_id(reference) >= _MAX_ID:
        raise Unfit(f"it has ids from {_MAX_ID:,} on")
    config = orjson.loads(reference.to_str())  # all defaults filled in, of equal merges the one that counts
    nfc = check_parts(config)
    vocab, merges = _check_model(config["model"], reference.get_vocab_size(with_added_tokens=False))
    plain, watched = _sort_added_tokens(reference.get_added_tokens_decoder(), nfc, special_as_text)
    model = {**config["model"], "vocab": vocab, "merges": merges, "unk_token": None}
    content = {**config, "model": model, "added_tokens": plain, "post_processor": None, "decoder": None}
    return ExactForm(orjson.dumps(content), nfc, Strings(watched))


def check_parts(config: dict[str, Any]) -> bool:
    """Whether a tokenizer of known parts normalizes to NFC: byte-level BPE with one of the known splits.

    Args:
        config: its tokenizer.json with all defaults filled in.

    Raises:
        Unfit: it has other parts.
    """
    if config["model"]["type"] != "BPE":
        raise Unfit(f"it is a {config['model']['type']} model, not BPE")
    if (config["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise Unfit("its normalizer is not NFC")
    first = config["pre_tokenizer"] or {"type": None}
    if first["type"] == "Sequence" and [p["type"] for p in first["pretokenizers"]] == ["Split", "ByteLevel"]:
        split, first = first["pretokenizers"]
        if split["pattern"].get("Regex") not in SPLITS.values() or split["behavior"] != "Isolated" or split["invert"]:
            raise Unfit("its pre-tokenizer splits by another rule than GPT-2's, Llama 3's or Qwen 2's")
        if first["use_regex"]:
            raise Unfit("its ByteLevel splits what its Split made")
    elif first["type"] != "ByteLevel":
        raise Unfit("its pre-tokenizer is not plain ByteLevel, nor a Split with ByteLevel after it")
    elif not first["use_regex"]:
        raise Unfit("its ByteLevel does not split (use_regex: false)")
    if first["add_prefix_space"]:
        raise Unfit("its ByteLevel adds spaces (add_prefix_space)")
    return config["normalizer"] is not None


def _check_model(model: dict[str, Any], size: int) -> tuple[dict[str, int], list[list[str]]]:
    """The vocabulary and the merges that gigatoken needs.

    Args:
        size: number of tokens that the reference knows.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise Unfit(f"its model has {option}")
    if len(model["vocab"]) != size:
        raise Unfit("two of its tokens have one id")
    # Other strings can't come out of bytes; gigatoken would take them for the bytes of their UTF-8.
    alphabet = set(ByteLevel.alphabet())
    if alphabet.issuperset("".join(model["vocab"])):
        return model["vocab"], model["merges"]
    vocab = {token: i for token, i in model["vocab"].items() if alphabet.issuperset(token)}
    # gigatoken takes ids for ranks while they rise, so all merges that make one token have one rank. That is exact:
    # what becomes a token merges as it does when it stands alone, so only one of them ever meets its two parts.
    return vocab, [pair for pair in model["merges"] if pair[0] in vocab and pair[1] in vocab]


def _sort_added_tokens(
    tokens: dict[int, "AddedToken"], nfc: bool, special_as_text: bool
) -> tuple[list[dict[str, Any]], set[str]]:
    """Those that gigatoken finds as the reference does, and the strings of the others."""
    plain: dict[str, dict[str, Any]] = {}
    watched: set[str] = set()
    exact = [t.content for t in tokens.values() if not t.normalized]
    for i, token in tokens.items():
        letters = set(token.content)
        if nfc and not token.content.isascii():
            raise Unfit(f"NFC may change its added token {token.content!r}")
        if len(token.content.encode()) == 1:
            raise Unfit(f"its added token {token.content!r} is one byte")
        if (
            (token.special and special_as_text)
            or token.lstrip
            or token.rstrip
            or token.single_word
            or (nfc and letters & (COMPOSES | COMPOSED if token.normalized else COMPOSED))
            # The reference first looks for all tokens that are not normalized, then for the others.
            or (token.normalized and any(_overlap(token.content, other) for other in exact))
        ):
            watched.add(token.content)
        else:
            plain[token.content] = {"id": i, "content": token.content, "special": token.special}
    return list(plain.values()), watched


def _overlap(a: str, b: str) -> bool:
    """Whether both can be found in a text with letters that belong to both."""
    if not set(a) & set(b):
        return False
    return a in b or b in a or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))


@ENGINES.register("gigatoken")
class GigatokenEngine(Engine):
    """gigatoken: byte-level BPE only, several times as fast as the reference, which it is checked against."""

    title = "gigatoken"

    def __init__(self, tokenizer_json: Path, *, special_as_text: bool = False) -> None:
        from gigatoken import Tokenizer

        self._form = exact_form(tokenizer_json, special_as_text)
        self._load = lambda: Tokenizer.from_json(self._form.content)
        self._fast = self._load()
        self._bytes = 0

    @classmethod
    def unfit(cls, tokenizer_json: Path) -> str | None:
        try:
            exact_form(tokenizer_json, special_as_text=False)
        except Unfit as e:
            return str(e)
        return None

    def encode_batch(self, texts: list[str]) -> Encoded:
        if self._bytes > _RESET_BYTES:
            self._fast, self._bytes = self._load(), 0
        self._bytes += sum(map(len, texts))
        # One at a time: the batched call imports awkward, which costs as much CPU time as 20 MB of text.
        return Encoded.of([self._fast.encode(text) for text in texts])

    def is_doubtful(self, text: str) -> bool:
        form = self._form
        if form.watched.are_in(text) or is_guarded(text, form.nfc):
            return True
        if not form.nfc or not form.watched or text.isascii():
            return False
        return form.watched.are_in(unicodedata.normalize("NFC", text))
