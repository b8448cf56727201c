"""The fast engine. It differs from the reference on some code points, which are listed and go to the reference."""

from functools import cache
from pathlib import Path

import numpy as np
import orjson

from openlm_pipeline.registry import ENGINES
from openlm_pipeline.tokenizers.engines import Encoded, Engine

_RESET_BYTES = 256 << 20
"""gigatoken 0.10 caches every distinct word it sees; a new tokenizer starts with an empty cache."""
_ALWAYS, _MARK, _ENDS_IN_MARK = 1, 2, 4


@cache
def _guarded_code_points() -> np.ndarray:
    """uint8[0x110000] of flags: where the engines' ideas of Unicode differ; see benchmarks/probe_fast_engine.py."""
    table = np.zeros(0x110000, dtype=np.uint8)
    found = orjson.loads(Path(__file__).parents[1].joinpath("guard_codepoints.json").read_bytes())
    for kind, flag in (("always", _ALWAYS), ("marks", _MARK), ("ends_in_mark", _ENDS_IN_MARK)):
        for first, last in found[kind]:
            table[first : last + 1] |= flag
    return table


def is_guarded(text: str) -> bool:
    """Whether a text holds a code point, or a run of combining marks, on which the engines may differ."""
    if text.isascii():
        return False
    flags = _guarded_code_points()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    if not flags.any():
        return False
    return bool((flags & _ALWAYS).any() or ((flags[1:] & _MARK) & ((flags[:-1] & _ENDS_IN_MARK) >> 1)).any())


@ENGINES.register("gigatoken")
class GigatokenEngine(Engine):
    """gigatoken: byte-level BPE only, several times as fast as the reference, which it is checked against."""

    title = "gigatoken"

    def __init__(self, tokenizer_json: Path) -> None:
        import gigatoken

        self._load = lambda: gigatoken.Tokenizer(str(tokenizer_json))
        self._fast = self._load()
        self._bytes = 0

    @classmethod
    def unfit(cls, tokenizer_json: Path) -> str | None:
        """Only byte-level BPE was compared with the reference."""
        config = orjson.loads(tokenizer_json.read_bytes())
        if config["model"].get("type") != "BPE":
            return f"it is a {config['model'].get('type')} model, not BPE"
        if (config.get("pre_tokenizer") or {}).get("type") != "ByteLevel":
            return "its pre-tokenizer is not plain ByteLevel"
        if (config.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
            return "its normalizer is not NFC"
        return None

    def encode_batch(self, texts: list[str]) -> Encoded:
        if self._bytes > _RESET_BYTES:
            self._fast, self._bytes = self._load(), 0
        self._bytes += sum(map(len, texts))
        # One at a time: the batched call imports awkward, which costs as much CPU time as 20 MB of text.
        return Encoded.of([self._fast.encode(text) for text in texts])

    def is_doubtful(self, text: str) -> bool:
        return is_guarded(text)
