"""Any architecture of transformers scores and writes as it does alone, one text at a time."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from openlm_pipeline.checkpoints.model_export import export_huggingface  # noqa: E402
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError  # noqa: E402
from openlm_pipeline.evaluation.huggingface import HuggingFaceModel  # noqa: E402
from openlm_pipeline.evaluation.model import NativeModel  # noqa: E402
from openlm_pipeline.evaluation.scorer import generate_texts, score_questions  # noqa: E402
from openlm_pipeline.evaluation.tasks import GenerationRequest, Request  # noqa: E402

VOCAB = 320
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = SMALL | {"intermediate_size": 48, "max_position_embeddings": 128}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONFIGS = {
    "llama": lambda t: t.LlamaConfig(**COMMON, num_key_value_heads=2),
    "gpt_neox": lambda t: t.GPTNeoXConfig(**COMMON),
    "opt": lambda t: t.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=128, word_embed_proj_dim=32, **IDS,
    ),
    "gpt2": lambda t: t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS),
    "bloom": lambda t: t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda t: t.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "mistral": lambda t: t.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=8),
    "gemma2": lambda t: t.Gemma2Config(
        **COMMON, num_key_value_heads=2, head_dim=8, sliding_window=16, final_logit_softcapping=3.0,
    ),
}  # fmt: skip
BRANCHING = {"llama", "gpt_neox", "opt", "gpt2", "mistral", "gemma2"}
"""Those that take a mask and positions of ours; ALiBi's positions are the places in the row."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a random model of a type; its weights are larger than at the start of training."""
    made = {}

    def make(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            config = CONFIGS[kind](transformers)
            config.eos_token_id = 2
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.25)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def questions() -> list[list[Request]]:
    g = torch.Generator().manual_seed(1)

    def ids(n):
        return tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist())

    sizes = torch.randint(1, 12, (12, 3), generator=g).tolist()
    choices = [[Request(context, ids(n)) for n in (a, b, 1)] for a, b, c in sizes for context in [ids(c)]]
    schemas = [[Request(s + ids(n), end) for n in (a, b)] for a, b, c in sizes[:5] for s, end in [(ids(c), ids(3))]]
    return choices + schemas + [[Request(ids(a), ids(b))] for a, b, _ in sizes[:5]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_single_plain_forward_passes(folder, questions, kind):
    scoring = HuggingFaceModel(str(folder(kind)))
    assert (scoring.max_branched_len > 0) == (kind in BRANCHING)
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32).eval()
    for question, scores in zip(questions, score_questions(scoring, questions, batch_tokens=200), strict=True):
        expected = []
        for request, score in zip(question, scores, strict=True):
            ids = torch.tensor([request.context_ids + request.continuation_ids])
            with torch.no_grad():
                logprobs = alone(ids).logits[0].float().log_softmax(-1)
            span = range(len(request.context_ids), ids.shape[1])
            expected.append(sum(float(logprobs[i - 1, ids[0, i]]) for i in span))
            assert score.sum_logprob == pytest.approx(expected[-1], abs=1e-4)
            assert score.all_argmax == all(int(logprobs[i - 1].argmax()) == ids[0, i] for i in span)
        got = [s.sum_logprob / s.num_tokens for s in scores]
        means = [e / len(r.continuation_ids) for e, r in zip(expected, question)]
        assert got.index(max(got)) == means.index(max(means))


def test_our_exported_folders_score_as_our_models(model, tokenizer, questions, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    exported = export_huggingface(model, tmp_path / "hf", tmp_path / "tokenizer.json", eot=tokenizer.id_to_token(0))
    ours = score_questions(NativeModel(lambda: model), questions)
    theirs = score_questions(HuggingFaceModel(str(exported)), questions)
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert a.sum_logprob == pytest.approx(b.sum_logprob, abs=1e-4)
        assert a.all_argmax == b.all_argmax


def test_rows_longer_than_a_sliding_window_share_nothing(folder):
    g = torch.Generator().manual_seed(3)
    questions = [
        [Request(tuple(ids[:n].tolist()), tuple(ids[n : n + 3].tolist())) for n in (4, 20)]
        for ids in torch.randint(3, VOCAB, (6, 30), generator=g)
    ]
    for kind in ("mistral", "gemma2"):
        model = HuggingFaceModel(str(folder(kind)))
        together = score_questions(model, questions)
        for question, scores in zip(questions, together, strict=True):
            alone = [score_questions(model, [[request]])[0][0] for request in question]
            assert [s.sum_logprob for s in scores] == pytest.approx([s.sum_logprob for s in alone], abs=1e-4)


def test_a_sliding_window_bounds_what_is_shared(folder):
    assert HuggingFaceModel(str(folder("mistral"))).max_branched_len == 8
    assert HuggingFaceModel(str(folder("gemma2"))).max_branched_len == 16


@pytest.fixture
def prompts() -> list[GenerationRequest]:
    g = torch.Generator().manual_seed(2)
    sizes = [9, 4, 4, 12, 7, 1]
    return [
        GenerationRequest(tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist()), new, ())
        for n, new in zip(sizes, [10, 3, 10, 10, 1, 10], strict=True)
    ]


@pytest.mark.parametrize("kind", ["mpt", "mistral", "gemma2"])
def test_texts_are_those_of_transformers_generate(folder, prompts, tokenizer, kind):
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32).eval()
    expected = []
    for request in prompts:
        ids = torch.tensor([request.context_ids])
        with torch.no_grad():
            out = alone.generate(ids, do_sample=False, max_new_tokens=request.max_new_tokens, pad_token_id=2)
        written = out[0, ids.shape[1] :].tolist()
        expected.append([t for t in written if t != 2])
    found = generate_texts(HuggingFaceModel(str(folder(kind))), prompts, tokenizer)
    assert [g.text for g in found] == [tokenizer.decode(ids) for ids in expected]
    assert [g.num_tokens for g in found] == list(map(len, expected))
    assert len(set(map(tuple, expected))) > 1


def test_what_is_not_a_whole_model_is_refused(folder, tmp_path):
    with pytest.raises(MissingInputError, match="safetensors"):
        torch.save({}, tmp_path / "pytorch_model.bin")
        transformers.LlamaConfig(**COMMON).save_pretrained(tmp_path)
        HuggingFaceModel(str(tmp_path)).logits(*[torch.zeros(1, 1, dtype=torch.int64)] * 3)
    bare = transformers.LlamaModel.from_pretrained(folder("llama"))
    bare.config.tie_word_embeddings = False
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="lm_head"):
        assert HuggingFaceModel(str(tmp_path / "bare")).end_ids
    with pytest.raises(ConfigError, match="causal"):
        transformers.T5Config().save_pretrained(tmp_path / "t5")
        assert HuggingFaceModel(str(tmp_path / "t5")).end_ids
