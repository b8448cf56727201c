"""Where a tokenizer comes from: a missing one is named; the fast engine gives the ids of the reference."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import TokenizerSpec
from openlm_pipeline.tokenizers import engine as engines
from openlm_pipeline.tokenizers.engines.gigatoken import GigatokenEngine
from openlm_pipeline.tokenizers.engines.huggingface import HuggingFaceEngine
from openlm_pipeline.tokenizers.tokenizer import make_tokenizer, read_tokenizer_info


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|eot|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog did not"] * 9, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_missing_path_is_named(tmp_path):
    spec = TokenizerSpec(name="t", source=str(tmp_path / "none.json"))
    with pytest.raises(MissingInputError, match="none.json.*OPENLM_TOKENIZER"):
        make_tokenizer(spec, [], "text", tmp_path / "out")


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    spec = TokenizerSpec(name="t", source="nobody/none")
    with pytest.raises(MissingInputError, match="nobody/none.*OPENLM_TOKENIZER"):
        make_tokenizer(spec, [], "text", tmp_path / "out")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(MissingInputError, match="openlm tokenize"):
        read_tokenizer_info(tmp_path)


def test_a_tokenizer_without_the_end_of_text_token_is_refused(tmp_path, bpe):
    with pytest.raises(ConfigError, match="tokenizer.eot"):
        make_tokenizer(TokenizerSpec(name="t", source=str(bpe)), [], "text", tmp_path / "out")


def test_the_fast_engine_gives_the_ids_of_the_reference(bpe):
    fast, reason = engines.make_engine(bpe, verify_every=1)
    assert reason.startswith("gigatoken, 1 in 1 documents"), reason
    texts = [
        "the cat",
        "",
        "  na\u00efve \u4e2d\u6587 \U0001f600\n\n\tthe",
        "e\u0301\u0323 \u0900",
        "<|eot|>the",
        "\U0001e900 x",
    ]
    reference = HuggingFaceEngine(bpe).encode_batch(texts)
    for got, want in zip(fast.encode_batch(texts).split(), reference.split(), strict=True):
        assert np.array_equal(got, want)


def test_a_difference_is_found_and_its_document_told(bpe, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(bpe.read_text().replace('"<|eot|>"', '"<|eos|>"'))
    fast = engines.CheckedEngine(GigatokenEngine(bpe), HuggingFaceEngine(other), verify_every=1)
    with pytest.raises(engines.EngineMismatch) as error:
        fast.encode_batch(["the cat", "<|eot|>"])
    assert error.value.position == 1


def test_the_reference_is_taken_where_the_fast_engine_was_not_compared(bpe):
    tokenizer = Tokenizer.from_file(str(bpe))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(bpe))
    chosen, reason = engines.make_engine(bpe)
    assert isinstance(chosen, HuggingFaceEngine)
    assert "ByteLevel" in reason
    with pytest.raises(ConfigError, match="tokenizer_engine=gigatoken does not work .*ByteLevel"):
        engines.make_engine(bpe, "gigatoken")
    with pytest.raises(ConfigError, match="did you mean 'gigatoken'"):
        engines.make_engine(bpe, "gigatokens")
