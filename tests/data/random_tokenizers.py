"""Tokenizers and texts made to find where the fast engine and Hugging Face `tokenizers` differ."""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from openlm_pipeline.errors import DataError
from openlm_pipeline.tokenizers import engine as engines
from openlm_pipeline.tokenizers.engines.gigatoken import SPLITS, GigatokenEngine
from openlm_pipeline.tokenizers.engines.huggingface import HuggingFaceEngine

CONTENTS = (
    *("<|end|>", "<a>", "<a>b", "|>", "ab", "ba", "a b", "a=", "K;", "``", "é", "b"),
    *("  ", "   ", " a", "\n", "\n\n", "12"),
)
BITS = (
    *"ab eé'’sSdDkK;`=<|>12٣½\n\t.,!-_中가\u200d🦊\x00",
    *("  ", "   ", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\x85", "'s", "'LL", "'ve", "'\u017f", "1234567"),
    *("\u0301", "\u0323", "\u0338", "\u093c", "\u212a", "\u037e", "\u1fef", "e\u0301", "=\u0338", "aaaaaaa", "ababab"),
)


def byte_level(split: str | None = None, **options: Any) -> dict[str, Any]:
    """A pre-tokenizer: `ByteLevel`, or one of the names of `SPLITS` before it."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split is None}
    if split is None:
        return {**last, **options}
    first = {"type": "Split", "pattern": {"Regex": SPLITS.get(split, split)}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [{**first, **options}, last]}


def tokenizer(rng: random.Random) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE with options that are rare in the wild."""

    def rarely(value: Any, usual: Any, chance: float = 0.08) -> Any:
        return value if rng.random() < chance else usual

    alphabet = sorted(ByteLevel.alphabet())
    if rng.random() < 0.3:
        rng.shuffle(alphabet)
    merges = _merges(rng, alphabet)
    tokens = list(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))
    contents = rng.sample(CONTENTS, rng.randint(0, 5))
    inside = [c for c in contents if rng.random() < 0.3]
    tokens = [*inside, *tokens] if rng.random() < 0.5 else [*tokens, *inside]
    tokens = list(dict.fromkeys([*tokens, *rarely(["中", " b", "Ġ中"], [])]))
    if rng.random() < 0.3:
        rng.shuffle(tokens)
    gap = rng.choice([0, 0, 0, 70_000])
    vocab = {token: i + (gap if i > len(tokens) // 2 else 0) for i, token in enumerate(tokens)}
    added = [
        {
            "id": vocab.get(content, len(tokens) + n),
            "content": content,
            "special": rng.random() < 0.5,
            "normalized": rng.random() < 0.5,
            **{flag: rarely(True, False) for flag in ("lstrip", "rstrip", "single_word")},
        }
        for n, content in enumerate(contents)
    ]
    split = rng.choice([None, *SPLITS])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rarely({"type": "NFKC"}, rng.choice([None, {"type": "NFC"}]), 0.03),
        "pre_tokenizer": rarely(
            rng.choice([None, byte_level(add_prefix_space=True), byte_level(use_regex=False), byte_level(r"\s+")]),
            byte_level(split),
        ),
        "post_processor": rarely({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}, None),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": rarely(tokens[0], None),
            "continuing_subword_prefix": rarely("", None),
            "end_of_word_suffix": rarely(rng.choice(["", "</w>"]), None),
            "fuse_unk": rarely(True, False),
            "byte_fallback": rarely(True, False, 0.03),
            "ignore_merges": rng.random() < 0.4,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _merges(rng: random.Random, alphabet: list[str]) -> list[list[str]]:
    """Few letters, so that merges meet; some tokens are made in several ways, some merges are said twice."""
    letters = ["a", "b", "Ġ", "'", "s", "1", "2", "Ċ", "<", "|", ">", "Ã", "©", "Ì", "ģ", *rng.sample(alphabet, 5)]
    weights = [8, 6, 6, *([1] * (len(letters) - 3))]
    pieces, merges = list(letters), []
    for _ in range(rng.randint(0, 60)):
        if rng.random() < 0.5:
            left, right = rng.choices(letters, weights)[0], rng.choices(letters, weights)[0]
        else:
            left, right = rng.choice(pieces), rng.choice(pieces)
        if len(left + right) <= 20:
            pieces.append(left + right)
            merges.append([left, right])
    known = {*alphabet, *pieces}
    if rng.random() < 0.4:  # as converted from tiktoken: each token by every pair that makes it
        merges = [[t[:n], t[n:]] for t in dict.fromkeys(a + b for a, b in merges) for n in range(1, len(t))]
        merges = [pair for pair in merges if known.issuperset(pair)]
    if rng.random() < 0.3:
        rng.shuffle(merges)
    if merges and rng.random() < 0.2:
        merges.insert(rng.randrange(len(merges)), rng.choice(merges))
    return merges


def text(rng: random.Random, contents: list[str]) -> str:
    """A text of up to some 25 pieces, added tokens and parts of them among these."""
    pieces = []
    for _ in range(rng.randint(0, rng.choice([4, 12, 25]))):
        if contents and rng.random() < 0.15:
            content = rng.choice(contents)
            pieces.append(content if rng.random() < 0.7 else content[: rng.randint(1, len(content))])
        elif rng.random() < 0.4:
            pieces.append(rng.choice("ab "))
        else:
            pieces.append(rng.choice(BITS))
    return "".join(pieces)


@dataclass
class Search:
    """Documents that the fast engine encodes otherwise than the reference, and how much was looked at."""

    tokenizers: int = 0
    documents: int = 0
    doubtful: int = 0
    """Documents that the engine left to the reference, or in pieces."""
    failed: int = 0
    """Documents that the reference could not encode."""
    refused: Counter[str] = field(default_factory=Counter)
    differences: list[tuple[int, str, list[int], list[int]]] = field(default_factory=list)
    """Seed, text, ids of the engine, ids of the reference."""

    def look(self, seed: int, folder: Path, texts: int) -> None:
        """Make a tokenizer and encode `texts` texts with both engines."""
        rng = random.Random(seed)
        config = tokenizer(rng)
        path = folder / f"{seed}.json"
        path.write_text(json.dumps(config), "utf-8")
        options = {"special_as_text": rng.random() < 0.3}
        reference = HuggingFaceEngine(path, **options)
        if reason := GigatokenEngine.unfit(path):
            self.refused[reason] += 1
            return
        engine = GigatokenEngine(path, **options)
        path.unlink()
        contents = [token["content"] for token in config["added_tokens"]]
        made = [text(rng, contents) for _ in range(texts)]
        trusted = [t for t in made if not engine.is_doubtful(t)]
        self.tokenizers += 1
        self.documents += len(made)
        self.doubtful += len(made) - len(trusted)
        in_pieces = engines.CheckedEngine(engine, reference, 10**9)
        for t, encoder in [*((t, engine) for t in trusted), *((t, in_pieces) for t in made)]:
            try:
                want = reference.encode_batch([t]).ids
            except DataError:  # `tokenizers` itself fails on some tokens that overlap
                self.failed += 1
                continue
            with mock.patch.object(engines, "_PIECE_CHARACTERS", 2):
                got = encoder.encode_batch([t]).ids
            if not np.array_equal(got, want):
                self.differences.append((seed, t, got.tolist(), want.tolist()))


def main() -> None:
    """Search for so many seconds, from a seed on: `python tests/data/random_tokenizers.py SECONDS [SEED]`."""
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    search, end = Search(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            search.look(seed, Path(folder), texts=60)
            seed += 1
    print(search)


if __name__ == "__main__":
    main()
