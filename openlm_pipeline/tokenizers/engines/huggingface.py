"""The reference: Hugging Face `tokenizers` itself.

It takes some 120 bytes of memory per byte of a text, so a long text is encoded in pieces, where that gives the same
ids: it is cut between an ASCII letter and a space, at which the known pre-tokenizers always split.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson

from openlm_pipeline.registry import ENGINES
from openlm_pipeline.tokenizers.engine import is_panic, load_reference
from openlm_pipeline.tokenizers.engines import CUT, Encoded, EncodingError, Engine, pieces
from openlm_pipeline.tokenizers.engines.gigatoken import Unfit, check_parts

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PIECE_CHARACTERS = 1 << 18


@ENGINES.register("huggingface")
class HuggingFaceEngine(Engine):
    """Hugging Face `tokenizers`: takes every tokenizer, at about a tenth of the fast engine's speed."""

    title = "Hugging Face tokenizers"

    def __init__(self, tokenizer_json: Path, *, special_as_text: bool = False) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a Dask worker is one core; more threads cost CPU and give none
        self._tokenizer = load_reference(tokenizer_json, special_as_text=special_as_text)

    @cached_property
    def can_cut(self) -> bool:
        return can_cut(self._tokenizer)

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Token ids of the texts, without special tokens added.

        Raises:
            EncodingError: the library fails on a text, as it does on some added tokens that overlap.
        """
        long = {i for i, text in enumerate(texts) if len(text) > PIECE_CHARACTERS and self.can_cut}
        short = [i for i in range(len(texts)) if i not in long]
        encodings = dict(zip(short, self._encode([texts[i] for i in short], short)))
        return Encoded.of(
            [
                self._in_pieces(text, i) if i in long else np.array(encodings[i].ids, dtype=np.uint32)
                for i, text in enumerate(texts)
            ]
        )

    def _encode(self, texts: list[str], places: list[int]) -> "list[Encoding]":
        try:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as e:
            if not isinstance(e, Exception) and not is_panic(e):
                raise
            if len(texts) == 1:
                raise EncodingError(f"Hugging Face tokenizers can't encode it ({e})", places[0]) from None
            return [encoding for text, place in zip(texts, places) for encoding in self._encode([text], [place])]

    def _in_pieces(self, text: str, place: int) -> np.ndarray:
        ids = (self._encode([piece], [place])[0].ids for piece in pieces(text, PIECE_CHARACTERS))
        return np.concatenate([np.array(some, dtype=np.uint32) for some in ids])


def can_cut(tokenizer: "Tokenizer") -> bool:
    """Whether the ids of a text are those of its `pieces`, one after the other."""
    try:
        check_parts(orjson.loads(tokenizer.to_str()))
    except Unfit:
        return False
    # Such a token would reach over a cut, take the spaces behind it, or ask what stands before it.
    return not any(
        CUT.search(token.content) or token.single_word or (token.rstrip and token.content[-1:].isalpha())
        for token in tokenizer.get_added_tokens_decoder().values()
    )
