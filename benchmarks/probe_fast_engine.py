"""Find the code points on which the fast engine and Hugging Face `tokenizers` disagree, and write them as ranges.

    python benchmarks/probe_fast_engine.py TOKENIZER.json [OUT.json]

The engines know different versions of Unicode, so every code point that was unassigned in Unicode 14 is taken
(`always`). They also order some runs of combining marks differently, so a mark after a mark, or after a character whose
decomposition ends in one, is taken as well (`marks` after `ends_in_mark`). Each of the other code points is put into
short contexts that exercise normalisation and pre-tokenization; those that differ join `always`. Documents that hold
what was found are encoded by Hugging Face `tokenizers`. Run it again when either library changes its version; it needs
Python 3.11, whose `unicodedata` is Unicode 14.
"""

import json
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path

import gigatoken
import tokenizers

CONTEXTS = ("a{}b", " {}", "{}{}", "\u0939{}", "\uac00{}\u11a8", "1{} {}.", "\u0bc6{}", "'{}s", "{}\n{}")
AFTER = ("{}\u0323", "{}\u0301", "{}\u093c", "{}\u3099")
BATCH = 1 << 15


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


def differing(path: Path) -> list[int]:
    """Code points that are unassigned in Unicode 14, or have a context that the two engines encode differently."""
    reference = tokenizers.Tokenizer.from_file(str(path))
    fast = gigatoken.Tokenizer(str(path))
    found = {p for p in all_points() if unicodedata.category(chr(p)) == "Cn"}
    texts, owners = [], []

    def flush() -> None:
        want = reference.encode_batch_fast(texts, add_special_tokens=False)
        got = fast.encode_batch(texts, parallel=False).to_list()
        found.update(p for p, w, g in zip(owners, want, got) if w.ids != g)
        texts.clear()
        owners.clear()

    for p in all_points():
        if p in found or p >= 0xE0000:  # tags, variation selectors and private use: no properties that matter
            continue
        made = contexts(chr(p))
        texts.extend(made)
        owners.extend([p] * len(made))
        if len(texts) >= BATCH:
            flush()
    flush()
    return sorted(found)


def ranges(points: list[int]) -> list[list[int]]:
    """[first, last] of each run of consecutive numbers."""
    breaks = [i for i in range(1, len(points)) if points[i] != points[i - 1] + 1]
    return [[points[a], points[b - 1]] for a, b in zip([0, *breaks], [*breaks, len(points)]) if points]


def main() -> None:
    if unicodedata.unidata_version != "14.0.0":
        sys.exit(f"this Python knows Unicode {unicodedata.unidata_version}, not 14.0.0: use Python 3.11")
    points = differing(Path(sys.argv[1]))
    made_with = {name: version(name) for name in ("gigatoken", "tokenizers")}
    table = {
        "made_with": made_with,
        "always": ranges(points),
        "marks": ranges([p for p in all_points() if starts_in_mark(chr(p))]),
        "ends_in_mark": ranges([p for p in all_points() if ends_in_mark(chr(p))]),
    }
    text = json.dumps(table)
    unassigned = sum(unicodedata.category(chr(p)) == "Cn" for p in points)
    print(f"{len(points)} code points are guarded, {len(points) - unassigned} of them assigned", file=sys.stderr)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")


if __name__ == "__main__":
    main()
