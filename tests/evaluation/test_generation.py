"""Texts written in batches are those that each prompt gives alone, without a cache; transformers agrees."""

from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from openlm_pipeline.evaluation.generation import generation_batches
from openlm_pipeline.evaluation.huggingface import HuggingFaceModel
from openlm_pipeline.evaluation.model import NativeModel
from openlm_pipeline.evaluation.scorer import generate_texts
from openlm_pipeline.evaluation.tasks import GenerationRequest

if TYPE_CHECKING:  # each process that runs tests imports this file
    from transformers import PreTrainedModel

NEW = 12
COMMON = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": ("LlamaConfig", {"intermediate_size": 48, "num_key_value_heads": 2, **NARROW, **COMMON}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 48, **NARROW, **COMMON}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 128, **NARROW, **COMMON},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **COMMON}),
}


def prompts(sizes: list[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(3, 320, (n,), generator=generator).tolist()) for n in sizes]


PROMPTS = prompts([3, 9, 9, 1, 30, 14, 5, 47, 9, 20])


def requests(stop: tuple[str, ...] = (), new: int = NEW) -> list[GenerationRequest]:
    return [GenerationRequest(ids, new, stop) for ids in PROMPTS]


def random_model(name: str) -> "PreTrainedModel":
    """With weights wide enough that logits differ by much more than rounding."""
    import transformers

    config = getattr(transformers, CONFIGS[name][0])(**CONFIGS[name][1])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_those_of_transformers_generate(name, tmp_path, tokenizer):
    reference = random_model(name)
    reference.save_pretrained(tmp_path)
    expected = []
    for ids in PROMPTS:
        # Shown alone, as a padded batch would hide what it does to positions.
        out = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, attention_mask=None)[0]
        written = out[len(ids) :].tolist()
        expected.append(written[: written.index(2)] if 2 in written else written)
    found = generate_texts(HuggingFaceModel(str(tmp_path)), requests(), tokenizer, batch_tokens=300)
    assert [text.num_tokens for text in found] == [len(ids) for ids in expected]
    assert [text.text for text in found] == [tokenizer.decode(ids) for ids in expected]
    assert len({text.text for text in found}) > 5


def alone(model, ids: tuple[int, ...], new: int = NEW) -> list[int]:
    """Greedy, one prompt, no cache."""
    out = list(ids)
    with torch.no_grad():
        for _ in range(new):
            out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("batch_tokens", [1, 120, 100_000])
def test_our_model_writes_what_it_does_without_a_cache(model, tokenizer, batch_tokens):
    found = generate_texts(NativeModel(lambda: model), requests(), tokenizer, batch_tokens=batch_tokens)
    for ids, text in zip(PROMPTS, found, strict=True):
        written = alone(model, ids)
        expected = written[: written.index(0)] if 0 in written else written  # the tokenizer names no end: id 0
        assert (text.text, text.num_tokens) == (tokenizer.decode(expected), len(expected))


def test_a_text_ends_before_its_stop_and_the_others_go_on(model, tokenizer):
    whole = generate_texts(NativeModel(lambda: model), requests(), tokenizer)
    stop = next(c for c in whole[4].text[2:] if c.isascii() and any(c not in text.text for text in whole))
    found = generate_texts(NativeModel(lambda: model), requests((stop, "never written")), tokenizer)
    assert [text.text for text in found] == [text.text.split(stop)[0] for text in whole]
    assert found[4].num_tokens < whole[4].num_tokens
    assert all(cut == text for text, cut in zip(whole, found) if stop not in text.text)


class Counting:
    """Passes everything on, and counts the texts that each step reads."""

    max_branched_len = 0

    def __init__(self, inner, end_ids: tuple[int, ...]) -> None:
        self.inner, self.end_ids, self.device, self.sizes = inner, end_ids, inner.device, []

    def decoding(self, batch_size: int, max_len: int):
        decoding = self.inner.decoding(batch_size, max_len)
        step = decoding.step

        def counted(ids_BS):
            self.sizes.append(tuple(ids_BS.shape))
            return step(ids_BS)

        decoding.step = counted
        return decoding


def test_finished_texts_leave_the_batch_and_no_token_is_read_twice(model, tokenizer):
    asked = [GenerationRequest(ids, new, ()) for new, ids in enumerate(prompts([6] * 5), start=1)]
    counting = Counting(NativeModel(lambda: model), end_ids=(100_000,))
    found = generate_texts(counting, asked, tokenizer)
    assert counting.sizes == [(5, 6), (4, 1), (3, 1), (2, 1), (1, 1)]
    assert [text.num_tokens for text in found] == [1, 2, 3, 4, 5]


def test_end_tokens_of_the_model_end_a_text(model, tokenizer):
    ids = PROMPTS[1]
    written = alone(model, ids)
    end = written[4]
    counting = Counting(NativeModel(lambda: model), end_ids=(end, 100_000))
    (text,) = generate_texts(counting, [GenerationRequest(ids, NEW, ())], tokenizer)
    assert text.text == tokenizer.decode(written[: written.index(end)])


def test_prompts_of_a_batch_are_of_about_one_length_and_fit():
    asked = [GenerationRequest((7,) * (n + 1), 10, ()) for n in range(60)]
    batches = list(generation_batches(asked, 200))
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    for batch in batches:
        sizes = [len(asked[i].context_ids) for i in batch]
        assert max(sizes) - min(sizes) <= 16
        assert len(batch) == 1 or len(batch) * (max(sizes) + 10) <= 200
    assert len(batches) < 30


def test_the_tokenizers_end_of_text_ends_a_text_where_the_model_names_none(model):
    written = alone(model, PROMPTS[1])
    end = written[3]
    vocabulary = {("<|endoftext|>" if i == end else f"w{i}"): i for i in range(320)}
    (text,) = generate_texts(
        NativeModel(lambda: model), [GenerationRequest(PROMPTS[1], NEW, ())], Tokenizer(WordLevel(vocabulary))
    )
    assert text.text == " ".join(f"w{i}" for i in written[: written.index(end)])
