"""A Llama or Qwen3 of transformers enters where an OpenLM model does, bitwise; other models are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import SameSamples
from tokenizers import Tokenizer, models

from openlm_pipeline.checkpoints.loading import find_model_config, load_checkpoint
from openlm_pipeline.checkpoints.model_export import export_huggingface, export_openlm
from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.evaluation.scorer import score_questions
from openlm_pipeline.evaluation.subject import open_subject
from openlm_pipeline.evaluation.tasks import Request
from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 260, "seq_len": 32}
LLAMA |= {"norm": "rms_norm", "ffn_hidden_dim": 160, "rope_theta": 5e5, "norm_eps": 1e-6}
QWEN3 = {**LLAMA, "qk_norm": True, "qk_norm_per_head": True}
OPENLMS = {"n_kv_heads": None, "ffn_hidden_dim": None, "rope_theta": 1e4, "norm_eps": 1e-5}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_tied": {**LLAMA, "weight_tying": True},
    "llama_of_openlm": {**LLAMA, **OPENLMS, "positional_embedding": "llama_rotary"},
    "llama_interleaved": {**LLAMA, "positional_embedding": "llama_rotary"},
    "qwen3": QWEN3,
    "qwen3_tied_one_kv_head": {**QWEN3, "weight_tying": True, "n_kv_heads": 1},
}


def made(variant: dict[str, Any]) -> Transformer:
    model, generator = create_model(ModelConfig(**variant)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # gains of 1 would hide one that is left out
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model.eval()


def silent(note: str) -> None:
    raise AssertionError(f"nothing is to be assumed: {note}")


def assert_bitwise(a: Transformer, b: Transformer) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_an_export_comes_back_bitwise(tmp_path: Path, name: str):
    model = made(VARIANTS[name])
    folder = export_huggingface(model, tmp_path / "llama", llama=True, max_shard_bytes=100_000)
    assert (folder / "model.safetensors.index.json").exists() and len(list(folder.glob("*.safetensors"))) > 1
    assert_bitwise(load_checkpoint(folder, config=model.config, warn=silent), model)
    found = load_checkpoint(folder, warn=silent)
    assert found.config == model.config.model_copy(update={"positional_embedding": "rotary"})
    torch.testing.assert_close(found(IDS), model(IDS), rtol=0, atol=1e-5)
    # and out again: the same files as of the first export
    again = export_huggingface(folder, tmp_path / "again", llama=True)
    first = {n: v for p in folder.glob("*.safetensors") for n, v in load_file(p).items()}
    second = load_file(again / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    if not model.config.beyond_openlm:
        assert_bitwise(load_checkpoint(export_openlm(folder, tmp_path / "run"), warn=silent), found)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str, tied: bool):
    """As `save_pretrained` writes a folder, with what each major version says of the rotation."""
    settings = {"hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 260, "max_position_embeddings": 128}
    settings |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
    theirs = getattr(transformers, f"{kind}Config")(**settings)
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": 3e5}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(theirs).eval()
    for p in model.parameters():
        p.normal_(mean=float(p.ndim == 1), std=0.2)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 3e5
    older = {k: v for k, v in written.items() if k != "rope_parameters"} | {"rope_theta": 3e5, "rope_scaling": None}
    for config in (written, older):
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = load_checkpoint(tmp_path, warn=silent)
        assert loaded.config.rope_theta == 3e5 and loaded.config.weight_tying is tied
        torch.testing.assert_close(loaded(IDS), expected, rtol=0, atol=1e-5)
    assert find_model_config(tmp_path).layout == f"{kind.lower()} folder"


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is .*llama3"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters is .*yarn"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"head_dim": 32}, "head_dim is 32"),
        ("llama", {"hidden_act": "relu", "mlp_bias": True}, "hidden_act is 'relu'; its mlp_bias is True"),
        ("llama", {"intermediate_size": ...}, "has no intermediate_size"),
        ("qwen3", {"head_dim": ...}, "head_dim is 128"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types have sliding_attention"),
    ],
)
def test_another_model_is_refused_by_its_fields(tmp_path: Path, kind: str, changed: dict, says: str):
    folder = export_huggingface(made(QWEN3 if kind == "qwen3" else LLAMA), tmp_path, llama=True)
    (folder / "export.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(ConfigError, match=f"is no {kind} that is built here: .*{says}"):
        load_checkpoint(folder)


def test_weights_that_do_not_fit_are_named_as_in_the_file(tmp_path: Path):
    folder = export_huggingface(made({**LLAMA, "weight_tying": True}), tmp_path, llama=True)
    (folder / "export.json").unlink()
    state = load_file(folder / "model.safetensors")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as early Llamas have it
    copied = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone(), **inv_freq}
    save_file(copied, folder / "model.safetensors")
    assert load_checkpoint(folder).config.weight_tying
    wrong = {**copied, "lm_head.weight": copied["lm_head.weight"] + 1, "model.layers.0.mlp.up_proj.bias": torch.ones(1)}
    wrong["model.layers.1.self_attn.k_proj.weight"] = torch.ones(16, 64)
    del wrong["model.norm.weight"]
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(DataError) as refused:
        load_checkpoint(folder)
    for text in (
        "missing model.norm.weight",
        "unknown lm_head.weight",
        "unknown model.layers.0.mlp.up_proj.bias",
        "model.layers.1.self_attn.k_proj.weight is [16, 64], not [32, 64]",
    ):
        assert text in str(refused.value)


@torch.no_grad()
def test_scores_are_those_of_the_same_weights_in_other_forms(tmp_path: Path):
    model = made(QWEN3)
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>")).save(str(tokenizer))
    ids = tuple(IDS[0].tolist())
    scores = []
    for llama in (True, False):
        folder = export_huggingface(model, tmp_path / str(llama), tokenizer, llama=llama)
        subject = open_subject(str(folder), report=silent)
        assert type(subject.model).__name__ == "NativeModel" and subject.max_seq_len == 32
        scores.append(score_questions(subject.model, [[Request(ids[:9], ids[9:])]]))
    assert scores[0] == scores[1]
    logprobs = model(IDS[:1])[0].log_softmax(-1)
    assert scores[0][0][0].sum_logprob == pytest.approx(
        sum(logprobs[i - 1, ids[i]].item() for i in range(9, 24)), abs=1e-3
    )


@pytest.mark.parametrize("name", ["llama_of_openlm", "llama_interleaved", "qwen3_tied_one_kv_head"])
def test_a_run_begins_with_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    """What the recipe says otherwise is noted, or refused where the weights do not fit."""
    model = made(VARIANTS[name])
    folder = export_huggingface(model, tmp_path / "llama", llama=True)
    small = SameSamples(tmp_path, model.config.model_dump_json(exclude_none=True))
    sample, begins = small.sample[None], f"init_from={folder}"
    with torch.no_grad():
        loss = model(sample[:, :-1], sample[:, 1:])[0].item() / 32
    assert small.first_loss("same_model", begins) == pytest.approx(loss, abs=1e-4)
    assert "note:" not in capsys.readouterr().out
    small.first_loss("other_base", begins, "model.rope_theta=2e4")
    assert f"config.json says rope_theta {model.config.rope_theta}, and 20000.0 is taken" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"model.embed_tokens.weight is \[260, 64\], not \[264, 64\]"):
        small.first_loss("wider", begins, "model.vocab_size=264")
