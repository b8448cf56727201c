"""Exports give back the logits of the model they were made from, in OpenLM's files and in transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import SmallRun
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.loading import find_model_config, load_checkpoint
from openlm_pipeline.checkpoints.model_export import export_huggingface, export_openlm
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.checkpoints.weights_digest import digest_of_parts, local_part
from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.storage.export_record import read_record
from openlm_pipeline.storage.files import read_sealed

TINY = ModelConfig(hidden_dim=48, n_layers=2, n_heads=3, seq_len=32, vocab_size=61)
IDS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "gain_only_lp_layer_norm", "qk_norm": True, "ffn": "swiglu_torch"},
    {"norm": "rms_norm", "positional_embedding": "llama_rotary", "weight_tying": True},
    {"norm": "no_wb_layer_norm", "positional_embedding": "head_rotary", "ffn": "gelu"},
    {"positional_embedding": "none", "ffn": "gemma_geglu", "post_embed_norm": True},
    {"rope_freq_dtype": "bfloat16"},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(tmp_path_factory.mktemp("export"), (2,))
    small.train()
    return small


def silent(note: str) -> None:
    raise AssertionError(f"an export of ours leaves nothing to assume: {note}")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_openlm_files_give_the_same_model_back(tmp_path: Path, variant: dict):
    model = create_model(TINY, **variant)
    path = export_openlm(model, tmp_path / "run", epoch=4)
    assert path == tmp_path / "run" / "checkpoints" / "epoch_4.pt"
    loaded = load_checkpoint(path, warn=silent)
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS), model(IDS))
    document = torch.load(path, weights_only=True)
    assert {"epoch", "name", "step", "state_dict", "evaluation_metrics"} <= document.keys()


@pytest.mark.parametrize("fsdp", [False, True])
def test_optimizer_and_stats_of_a_run_are_openlms(trained: SmallRun, tmp_path: Path, fsdp: bool):
    checkpoint = trained.run.checkpoints / "step-00000002"
    path = export_openlm(checkpoint, tmp_path / "run", fsdp=fsdp)
    model = load_checkpoint(path, warn=silent)
    assert torch.equal(model(IDS), load_checkpoint(checkpoint)(IDS))

    saved = torch.load(path.with_name("optimizer_1.pt"), weights_only=True)["optimizer"]
    names = [name for name, _ in model.named_parameters()]
    assert [g["params"] for g in saved["param_groups"]] == [[], names if fsdp else list(range(len(names)))]
    assert saved["param_groups"][1]["weight_decay"] == trained.experiment().training.weight_decay
    if not fsdp:  # the very optimizer that OpenLM builds takes it
        groups = [{"params": [], "weight_decay": 0.0}, {"params": list(model.parameters())}]
        optimizer = torch.optim.AdamW(groups)
        optimizer.load_state_dict(saved)
        state = optimizer.state[model.output.weight]
        assert state["step"] == 2 and state["exp_avg"].shape == model.output.weight.shape
        assert state["exp_avg"].abs().sum() > 0

    stats = torch.load(path.with_name("stats_1.pt"), weights_only=True)
    assert (stats["step"], stats["samples_seen"], stats["is_final_checkpoint"]) == (2, 2 * 256 // 32, True)
    assert stats["evaluation_metrics"][0]["loss"] == trained.validation_losses()[2]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"w{i}": i for i in range(2, 61)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_transformers_gives_the_same_logits_and_generates(tmp_path: Path, tokenizer_json: Path, variant: dict):
    transformers = pytest.importorskip("transformers")
    from openlm_pipeline.checkpoints.hf import register

    register()
    model = create_model(TINY, **variant).eval()
    folder = export_huggingface(model, tmp_path / "hf", tokenizer_json, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert find_model_config(folder).config == model.config
    assert torch.equal(load_checkpoint(folder, warn=silent)(IDS), model(IDS))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=0, atol=1e-5)
        loss = theirs(IDS, labels=IDS).loss
        ce, _ = model(IDS[:, :-1], IDS[:, 1:])
    torch.testing.assert_close(loss, ce / IDS[:, 1:].numel())

    expected = IDS[:1].clone()
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    padded = torch.cat((torch.full((1, 5), 1), IDS[:1]), dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    for cache in (True, False):
        assert torch.equal(theirs.generate(IDS[:1], use_cache=cache, **greedy), expected)
        left = theirs.generate(padded, attention_mask=mask, use_cache=cache, **greedy)
        assert torch.equal(left[:, 5:], expected)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (0, 1, "left")


def test_the_folder_works_without_this_package(tmp_path: Path):
    pytest.importorskip("transformers")
    model = create_model(TINY)
    export_huggingface(model, tmp_path / "hf")
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained('hf', trust_remote_code=True)\n"
        "torch.save(m(torch.load('ids.pt')).logits.detach(), 'logits.pt')\n"
        "sys.exit('openlm_pipeline.models' in sys.modules)"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["params_args_dict", "params"])
def test_dclms_config_loads_with_the_registered_classes(place: str):
    transformers = pytest.importorskip("transformers")
    from openlm_pipeline.checkpoints.hf import register

    register()
    old = {"dim": 48, "n_layers": 2, "n_heads": 3, "vocab_size": 61, "norm_type": "gain_only_lp_layer_norm"}
    old |= {"apply_qk_norm": True, "ffn_type": "swiglu_torch", "model": "open_lm_7b", "weight_tying": False}
    config = transformers.AutoConfig.for_model("openlm", **{place: old})
    assert (config.hidden_size, config.norm_type, config.apply_qk_norm) == (48, "gain_only_lp_layer_norm", True)
    keys = transformers.AutoModelForCausalLM.from_config(config).state_dict().keys()
    ours = create_model(TINY, norm="gain_only_lp_layer_norm", qk_norm=True)
    assert keys == {f"model.{name}" for name in ours.state_dict()}


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path, tokenizer_json: Path):
    small = create_model(TINY, vocab_size=20)
    with pytest.raises(ConfigError, match="ids up to 60, the model only 20"):
        export_huggingface(small, tmp_path / "hf", tokenizer_json)
    with pytest.raises(ConfigError, match="no token '</s>'"):
        export_huggingface(create_model(TINY), tmp_path / "hf", tokenizer_json, eot="</s>")
    with pytest.raises(MissingInputError, match="absent"):
        export_huggingface(small, tmp_path / "hf", tmp_path / "absent.json")


def of_file(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of an exported folder, by OpenLM's names."""
    state = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    return {name: value for name, value in state.items() if not name.endswith("inv_freq")}


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    return digest_of_parts([{name: local_part(value) for name, value in tensors.items()}])


def test_an_export_names_its_checkpoint_and_its_weights(trained: SmallRun, tmp_path: Path):
    (checkpoint,) = list_checkpoints(trained.run.checkpoints, trained.run.fingerprint, pytest.fail)
    export_huggingface(checkpoint.path, tmp_path / "fp32", licence="apache-2.0")
    said = json.loads((tmp_path / "fp32" / "export.json").read_text())
    origin = said["checkpoint"]
    assert (origin["run"], origin["step"], origin["tokens"]) == ("small/v1", 2, checkpoint.tokens)
    assert origin["weights_digest"] == said["weights_digest"] == checkpoint.weights_digest
    assert digest_of(of_file(tmp_path / "fp32")) == said["weights_digest"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "fp32").iterdir())
    card = (tmp_path / "fp32" / "README.md").read_text()
    parameters = sum(p.numel() for p in load_checkpoint(checkpoint.path).parameters())
    for text in (f"{parameters:,}", "text, code", f"{checkpoint.tokens:,}", checkpoint.weights_digest):
        assert text in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"

    export_huggingface(checkpoint.path, tmp_path / "bf16", dtype="bf16")
    card, said = ((tmp_path / "bf16" / name).read_text() for name in ("README.md", "export.json"))
    assert "| licence | not stated |" in card and "license" not in card
    said = json.loads(said)
    assert said["checkpoint"] == origin and said["dtype"] == "bfloat16"
    assert digest_of(of_file(tmp_path / "bf16")) == said["weights_digest"] != checkpoint.weights_digest


@pytest.mark.parametrize("llama", [False, True])
def test_bf16_rounds_the_weights_and_no_rotary_frequency(tmp_path: Path, llama: bool):
    transformers = pytest.importorskip("transformers")
    from openlm_pipeline.checkpoints.hf import register

    register()
    model = create_model(TINY, norm="rms_norm")
    folder = export_huggingface(model, tmp_path, llama=llama, dtype="bf16")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    long = torch.randint(0, 61, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(long).logits, model(long), rtol=0, atol=1e-5)
    if not llama:
        assert torch.equal(load_checkpoint(folder, warn=silent)(long), model(long))
    as_stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert as_stored.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(as_stored(long).logits.float(), model(long), rtol=0, atol=0.05)

    model.get_buffer("layers.0.attention.pos_embed.inv_freq").mul_(1.5)
    with pytest.raises(ConfigError, match="not those of the formula"):
        export_huggingface(model, tmp_path / "other", llama=llama, dtype="bf16")


def test_an_average_is_exported_in_place_of_the_weights(tmp_path: Path):
    small = SmallRun(tmp_path, (2,))
    small.train("training.averages=[ema_0.5_1]", "model.norm=rms_norm")
    (checkpoint,) = list_checkpoints(small.run.checkpoints, small.run.fingerprint, pytest.fail)
    export_huggingface(checkpoint.path, tmp_path / "hf", average="ema_0.5_1")
    found = of_file(tmp_path / "hf")
    for name, value in load_model(checkpoint, average="ema_0.5_1").named_parameters():
        assert torch.equal(found[name], value)
    said = read_sealed(tmp_path / "hf" / "export.json")
    assert said["average"] == "ema_0.5_1" and said["checkpoint"]["weights_digest"] == checkpoint.weights_digest
    assert said["weights_digest"] == digest_of(found) != checkpoint.weights_digest
    alone = shutil.copytree(checkpoint.path, tmp_path / "some" / "where" / "step")
    export_huggingface(alone, tmp_path / "alone", average="ema_0.5_1")
    del said["files"]
    assert read_record(tmp_path / "alone") == {**said, "checkpoint": said["checkpoint"] | {"run": None}}
    assert "| run | not stated |" in (tmp_path / "alone" / "README.md").read_text()
    with pytest.raises(ConfigError, match="no average 'ema_0.9_1'; it has ema_0.5_1"):
        export_huggingface(checkpoint.path, tmp_path / "hf", average="ema_0.9_1")
    with pytest.raises(ConfigError, match="no average 'ema_0.5_1'; it has none"):
        export_huggingface(tmp_path / "hf", tmp_path / "again", average="ema_0.5_1")


def test_the_command_exports_both_forms(trained: SmallRun, tmp_path: Path):
    import typer

    from openlm_pipeline.cli.export import export

    app = typer.Typer()
    app.command()(export)
    checkpoint = str(trained.run.checkpoints / "step-00000002")
    for form, made in (("openlm", "checkpoints/epoch_1.pt"), ("huggingface", "config.json")):
        out = tmp_path / form
        result = CliRunner().invoke(app, [checkpoint, "--format", form, "--output-dir", str(out)])
        assert result.exit_code == 0, result.output
        assert (out / made).is_file()
    for options, message in {
        ("--format", "llama"): "not exactly a Llama: its norm is default_layer_norm, not rms_norm",
        ("--format", "openlm", "--dtype", "bf16"): "go with --format huggingface or llama",
    }.items():
        refused = CliRunner().invoke(app, [checkpoint, "-o", str(tmp_path / "no"), *options])
        assert isinstance(refused.exception, ConfigError) and message in str(refused.exception)
    wrong = CliRunner().invoke(app, [checkpoint, "--format", "openlm", "-o", str(tmp_path), "--tokenizer", "t.json"])
    assert isinstance(wrong.exception, ConfigError)
