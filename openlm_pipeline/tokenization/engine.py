"""Engines turn texts into token ids; all engines give the same ids as Hugging Face `tokenizers`."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np


class Engine(Protocol):
    """What a stage needs of a tokenizer."""

    name: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32[n], without special tokens added."""
        ...


class HuggingFaceEngine:
    """The reference: `tokenizers` itself."""

    name = "huggingface"

    def __init__(self, tokenizer_json: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a Dask worker is one core; more threads cost CPU and give none
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encodings]
