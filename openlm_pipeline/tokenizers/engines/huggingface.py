"""The reference: Hugging Face `tokenizers` itself."""

import os
from pathlib import Path

import numpy as np

from openlm_pipeline.registry import ENGINES
from openlm_pipeline.tokenizers.engine import load_reference
from openlm_pipeline.tokenizers.engines import Encoded, Engine


@ENGINES.register("huggingface")
class HuggingFaceEngine(Engine):
    """Hugging Face `tokenizers`: takes every tokenizer, at about a tenth of the fast engine's speed."""

    title = "Hugging Face tokenizers"

    def __init__(self, tokenizer_json: Path, *, special_as_text: bool = False) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a Dask worker is one core; more threads cost CPU and give none
        self._tokenizer = load_reference(tokenizer_json, special_as_text=special_as_text)

    def encode_batch(self, texts: list[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return Encoded.of([np.array(e.ids, dtype=np.uint32) for e in encodings])
