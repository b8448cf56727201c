"""Find the code points on which the fast engine and Hugging Face `tokenizers` disagree, and write them as ranges.

    python -m benchmarks.probe_fast_engine [OUT.json]

The engines know different versions of Unicode, so every code point that was unassigned in Unicode 14 is taken
(`always`). They also order some runs of combining marks differently, so a mark after a mark, or after a character whose
decomposition ends in one, is taken as well (`marks` after `ends_in_mark`). Each of the other code points is put into
short contexts that exercise normalization and each pre-tokenizer that the fast engine is trusted with; those that
differ join `always`. The tokenizers of the probe merge every pair of bytes, in an order drawn at random, so a word that
ends elsewhere shows in the ids. Documents that hold what was found are encoded by Hugging Face `tokenizers`. Run it
again when either library changes its version, or a pre-tokenizer is added; it takes seven CPU-minutes, and needs Python
3.11, whose `unicodedata` is Unicode 14.
"""

import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import gigatoken
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from openlm_pipeline.tokenizers.engines.gigatoken import SPLITS

CONTEXTS = (
    *("a{}b", " {}", "{}{}", "\u0939{}", "\uac00{}\u11a8", "1{} {}.", "\u0bc6{}", "'{}s", "{}\n{}"),
    *("'{}", "'v{}", "'{}e", "'{}l", "'L{}a", "{}'s", "  {}a", "12{}34", ".{}\r\n", "\r{}\n {} "),
)
AFTER = ("{}\u0323", "{}\u0301", "{}\u093c", "{}\u3099")
BATCH = 1 << 15
ORDERS = 2


def all_points() -> list[int]:
    """Every code point but surrogates and the first private use area."""
    return [p for p in range(0x110000) if not 0xD800 <= p < 0xF900]


def starts_in_mark(char: str) -> bool:
    """Whether it is a combining mark, or decomposes into some."""
    return unicodedata.combining(unicodedata.normalize("NFD", char)[0]) != 0


def ends_in_mark(char: str) -> bool:
    return unicodedata.combining(unicodedata.normalize("NFD", char)[-1]) != 0


def contexts(char: str) -> list[str]:
    """Texts around one character, in which no mark follows another."""
    made = CONTEXTS if ends_in_mark(char) else (*CONTEXTS, *AFTER)
    return [c.replace("{}", char) for c in made if not (starts_in_mark(char) and "{}{}" in c)]


def dense_tokenizers() -> Iterator[tuple[str, str]]:
    """Name and tokenizer.json for each pre-tokenizer, with NFC and without."""
    alphabet = sorted(ByteLevel.alphabet())
    for number in range(ORDERS):
        pairs = [[a, b] for a in alphabet for b in alphabet]
        random.Random(number).shuffle(pairs)
        vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
        for name, pattern in {"GPT-2": None, **SPLITS}.items():
            last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for normalizer in ({"type": "NFC"}, None):
                config = {
                    "added_tokens": [],
                    "normalizer": normalizer,
                    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, last]} if pattern else last,
                    "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
                }
                yield f"{name}, {'NFC' if normalizer else 'no normalizer'}, order {number}", json.dumps(config)


def differing(tokenizer_json: str, known: set[int]) -> set[int]:
    """Code points outside `known` that have a context which the two engines encode differently."""
    reference = tokenizers.Tokenizer.from_str(tokenizer_json)
    fast = gigatoken.Tokenizer.from_json(tokenizer_json)
    found: set[int] = set()
    texts, owners = [], []

    def flush() -> None:
        want = reference.encode_batch_fast(texts, add_special_tokens=False)
        got = fast.encode_batch(texts, parallel=False).to_list()
        found.update(p for p, w, g in zip(owners, want, got) if w.ids != g)
        texts.clear()
        owners.clear()

    for p in all_points():
        if p in known or p >= 0xE0000:  # tags, variation selectors and private use: no properties that matter
            continue
        made = contexts(chr(p))
        texts.extend(made)
        owners.extend([p] * len(made))
        if len(texts) >= BATCH:
            flush()
    flush()
    return found


def ranges(points: list[int]) -> list[list[int]]:
    """[first, last] of each run of consecutive numbers."""
    breaks = [i for i in range(1, len(points)) if points[i] != points[i - 1] + 1]
    return [[points[a], points[b - 1]] for a, b in zip([0, *breaks], [*breaks, len(points)]) if points]


def main() -> None:
    if unicodedata.unidata_version != "14.0.0":
        sys.exit(f"this Python knows Unicode {unicodedata.unidata_version}, not 14.0.0: use Python 3.11")
    points = {p for p in all_points() if unicodedata.category(chr(p)) == "Cn"}
    unassigned = len(points)
    for name, tokenizer_json in dense_tokenizers():
        found = differing(tokenizer_json, points)
        print(f"{name}: {len(found)} more: {' '.join(f'U+{p:04X}' for p in sorted(found)[:20])}", file=sys.stderr)
        points |= found
    table = {
        "made_with": {name: version(name) for name in ("gigatoken", "tokenizers")},
        "splits": ["GPT-2", *SPLITS],
        "always": ranges(sorted(points)),
        "marks": ranges([p for p in all_points() if starts_in_mark(chr(p))]),
        "ends_in_mark": ranges([p for p in all_points() if ends_in_mark(chr(p))]),
    }
    print(f"{len(points)} code points are guarded, {len(points) - unassigned} of them assigned", file=sys.stderr)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
