"""The bytes of ids add up to those of the text, for the kinds of tokenizer that people train with."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.experiments import TokenizerSpec
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.tokenizers.token_bytes import bytes_of_ids

TEXTS = ("The naïve café costs 3 €.\n\n\tif x:  return 🦜", "plain words again, and 日本語 too", "a\x00b")
SPEC = TokenizerSpec(name="some", source="nowhere")


def byte_level(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["  "])  # as GPT-NeoX-20B's runs of spaces
    return tokenizer


def sentencepiece(folder: Path) -> Tokenizer:
    """As Llama 2's: spaces are marked, and what has no token of its own is made of bytes."""
    letters = sorted({c for text in TEXTS[:1] for c in text.replace(" ", "▁") if c.isascii() or c == "▁"})
    tokens = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁c", "os", "▁cos"]
    merges = [("▁", "c"), ("o", "s"), ("▁c", "os")]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_bytes_of_ids_are_those_of_the_text(make, tmp_path: Path):
    tokenizer = make(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = bytes_of_ids(SPEC, tmp_path, sha256_file(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert len(ids) <= len(text.encode())
        assert sizes[ids].sum() == len(text.encode())
    (end,) = (i for t in ("<|endoftext|>", "</s>") if (i := tokenizer.token_to_id(t)) is not None)
    assert sizes[end] == 0
    assert sizes.dtype == np.int32 and len(sizes) == tokenizer.get_vocab_size()


def test_gpt_neox_20b(shared_data: Path, tmp_path: Path):
    folder = shared_data / "tokenizers" / "gpt-neox-20b"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sizes = bytes_of_ids(TokenizerSpec(name="neox", source=str(folder)), tmp_path, None)
    for text in (*TEXTS, "def f():\n        return 1"):
        assert sizes[tokenizer.encode(text).ids].sum() == len(text.encode())


def test_what_does_not_tell_its_bytes_is_named(tmp_path: Path):
    with pytest.raises(MissingInputError, match="`openlm tokenize` fetches it"):
        bytes_of_ids(SPEC, tmp_path, None)
    path = tmp_path / "tokenizer.json"
    byte_level(tmp_path).save(str(path))
    with pytest.raises(DataError, match="not the tokenizer that the samples were made with"):
        bytes_of_ids(SPEC, tmp_path, "0" * 64)
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": {"type": "WordPiece"}}))
    with pytest.raises(DataError, match="neither a byte-level tokenizer nor one of SentencePiece's"):
        bytes_of_ids(SPEC, tmp_path, None)
