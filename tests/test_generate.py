"""`openlm generate`: what a model writes is what its logits say, in whole characters, and ends where it should."""

from types import SimpleNamespace

import pytest
import torch
from commands import Ended, openlm
from tiny_pipeline import FinishedPipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from openlm_pipeline.pipeline.generate import Writer, choose
from openlm_pipeline.storage.home import Home

PROMPT = "import os"


def generate(finished: FinishedPipeline, *arguments: str) -> Ended:
    return openlm("generate", *arguments, variables=finished.pipeline.variables)


def test_greedy_text_is_the_most_probable_token_of_whole_forward_passes(finished):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLM_HOME", str(finished.pipeline.home))
        patch.setenv("OPENLM_RECIPES", finished.pipeline.variables["OPENLM_RECIPES"])
        writer = Writer("tiny@10K", Home(finished.pipeline.home))
    tokenizer, model = writer.subject.tokenizer, writer.subject.model.model
    start = tokenizer.encode(PROMPT).ids
    ids = list(start)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    result = generate(finished, "tiny@10K", "--prompt", PROMPT, "--greedy", "--max-tokens", "12")
    assert result.stdout == tokenizer.decode(ids) + "\n"
    assert len(result.stdout) > len(PROMPT) + 1


def test_without_a_milestone_the_last_one_writes(finished):
    texts = [generate(finished, name, "--prompt", PROMPT).stdout for name in ("tiny", "tiny/v1@40K", "tiny@latest")]
    assert texts[0] == texts[1] == texts[2] != generate(finished, "tiny@10K", "--prompt", PROMPT).stdout


def test_a_seed_gives_the_same_text_and_each_sample_has_its_own(finished):
    one, other = (generate(finished, "tiny", "--prompt", PROMPT, "--seed", seed).stdout for seed in "78")
    both = generate(finished, "tiny", "--prompt", PROMPT, "--seed", "7", "--num-samples", "2").stdout
    assert one != other
    assert both == f"{one}\n{other}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiny", "--max-tokens", "33"], 2, "tiny was made for 32"),
        (["tiny", "--prompt", "word " * 60], 2, "shorten the prompt"),
        (["tiny@20K"], 2, "recipe tiny has no milestone 20K"),
        (["tiny/v9"], 3, "no checkpoint tiny/v9"),
        (["no_such"], 3, "there is no run 'no_such'"),
        (["tiny", "--greedy", "--num-samples", "2"], 2, "--greedy"),
        (["tiny", "--device", "nowhere"], 2, "--device nowhere"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_line(finished, arguments, code, message):
    result = generate(finished, "--prompt", PROMPT, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_room_for_less_than_the_default_is_filled(finished):
    text = generate(finished, "tiny", "--prompt", PROMPT).stdout  # 32 positions, and 64 tokens by default
    assert generate(finished, "tiny", "--prompt", PROMPT, "--max-tokens", "20").stdout.strip() in text


class _Dictated:
    """A model that writes given ids."""

    device, end_ids = torch.device("cpu"), ()

    def __init__(self, ids: list[int]) -> None:
        self.ids = iter(ids)

    def decoding(self, batch_size: int, max_len: int) -> "_Dictated":
        return self

    def step(self, ids_BS: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.ids)]), 257).float()


def _written(text: str, max_tokens: int | None = None) -> list[str]:
    """Pieces of a text that a model writes byte by byte, after which it ends its document and begins another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    writer = Writer.__new__(Writer)
    writer.end_ids = (tokenizer.token_to_id("<|endoftext|>"),)
    model = _Dictated([*tokenizer.encode(text).ids, *writer.end_ids, *tokenizer.encode("more").ids])
    writer.subject = SimpleNamespace(name="dictated", tokenizer=tokenizer, model=model, max_seq_len=64)
    return list(writer.write("é", temperature=0, max_tokens=max_tokens))


def test_text_comes_in_whole_characters_and_ends_with_its_document():
    assert _written("naïve 🙂 漢") == ["é", *"naïve 🙂 漢"]


def test_a_character_that_is_not_finished_is_not_shown():
    assert _written("a🙂", max_tokens=3) == ["é", "a"]


def test_draws_follow_the_softmax_of_what_is_left():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_k: int | None = None, top_p: float = 1.0) -> torch.Tensor:
        drawn = [choose(logits, temperature, top_k, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    def softmax(temperature: float, *left: int) -> torch.Tensor:
        kept = torch.full((4,), -torch.inf)
        kept[list(left)] = logits[list(left)] / temperature
        return kept.softmax(-1)

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=0.03)
        assert ((a > 0) == (b > 0)).all()

    close(shares(1.0), softmax(1.0, 0, 1, 2, 3))
    close(shares(2.0, top_k=2), softmax(2.0, 1, 2))
    close(shares(1.0, top_p=0.7), softmax(1.0, 1, 2))  # 0.64 alone is less than 0.7
    close(shares(1.0, top_p=0.6), softmax(1.0, 1))
    close(shares(1.0, top_k=1), softmax(1.0, 1))
    assert choose(logits, 0, None, 1.0, generator) == 1
