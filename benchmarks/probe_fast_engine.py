"""Find the code points on which the fast engine and Hugging Face `tokenizers` disagree, and write them as ranges.

    python benchmarks/probe_fast_engine.py TOKENIZER.json [OUT.json]

The engines know different versions of Unicode, so every code point that was unassigned in Unicode 14 is taken. Each of
the others is put into short contexts that exercise normalisation and pre-tokenization, combining marks beside marks of
every other class. Documents that hold one of the code points found are encoded by Hugging Face `tokenizers`. Run it
again when either library changes its version; it needs Python 3.11, whose `unicodedata` is Unicode 14.
"""

import json
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path

import gigatoken
import tokenizers

CONTEXTS = ("a{}b", " {}", "{}{}", "e\u0301{}", "{}\u0323\u0301", "1{} {}.", "\u0bc6{}", "'{}s", "{}\n{}")
BATCH = 1 << 15


def contexts(point: int, marks: list[str]) -> list[str]:
    """Texts around one code point; for a combining mark also before and after marks of the other classes."""
    char = chr(point)
    texts = [c.replace("{}", char) for c in CONTEXTS]
    if unicodedata.combining(char):
        texts += [base + pair for m in marks for pair in (char + m, m + char) for base in ("a", "\u0939", " ")]
    return texts


def differing(path: Path) -> list[int]:
    """Code points that are unassigned in Unicode 14, or have a context that the two engines encode differently."""
    reference = tokenizers.Tokenizer.from_file(str(path))
    fast = gigatoken.Tokenizer(str(path))
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000 and not 0xE000 <= p < 0xF900]
    found = {p for p in points if unicodedata.category(chr(p)) == "Cn"}
    classes = {unicodedata.combining(chr(p)): chr(p) for p in points if unicodedata.combining(chr(p))}
    texts, owners = [], []

    def flush() -> None:
        want = reference.encode_batch_fast(texts, add_special_tokens=False)
        got = fast.encode_batch(texts, parallel=False).to_list()
        found.update(p for p, w, g in zip(owners, want, got) if w.ids != g)
        texts.clear()
        owners.clear()

    for p in points:
        if p in found or p >= 0xE0000:  # tags, variation selectors and private use: no properties that matter
            continue
        made = contexts(p, list(classes.values()))
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
    text = json.dumps({"made_with": made_with, "ranges": ranges(points)})
    print(f"{len(points)} code points differ in {len(ranges(points))} ranges", file=sys.stderr)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")


if __name__ == "__main__":
    main()
