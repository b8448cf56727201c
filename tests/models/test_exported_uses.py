"""Exported folders do in transformers what people do with them, in every version from 4.48 on."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.checkpoints.model_export import export_huggingface
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import ModelConfig

transformers = pytest.importorskip("transformers")
REPOSITORY = Path(__file__).parents[2]
USES = Path(__file__).with_name("exported_uses.py")
WITHOUT_MORE_PACKAGES = ("logits", "generate", "card", "save_pretrained", "outputs", "loss")
ALL_USES = (*WITHOUT_MORE_PACKAGES, "accumulation", "checkpointing", "lora")
VERSIONS = ("4.48.3", "4.57.6", importlib.metadata.version("transformers"))
TINY = ModelConfig(hidden_dim=48, n_layers=2, n_heads=3, seq_len=32, vocab_size=61)
GROUPED = {"n_heads": 4, "n_kv_heads": 2, "ffn_hidden_dim": 80}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lp_layer_norm": {"norm": "lp_layer_norm"},
    "gain_only": {"norm": "gain_only_layer_norm"},
    "gain_only_lp_qk_norm": {"norm": "gain_only_lp_layer_norm", "qk_norm": True, "ffn": "swiglu_torch"},
    "no_wb": {"norm": "no_wb_layer_norm"},
    "rms_rotary": {"norm": "rms_norm"},
    "rms_narrow_heads": {"norm": "rms_norm", "hidden_dim": 50},
    "rms_llama_rotary": {"norm": "rms_norm", "positional_embedding": "llama_rotary"},
    "rms_llama_rotary_tied": {"norm": "rms_norm", "positional_embedding": "llama_rotary", "weight_tying": True},
    "rms_swiglu_torch_tied": {"norm": "rms_norm", "ffn": "swiglu_torch", "weight_tying": True},
    "gqa": {"norm": "rms_norm", "norm_eps": 1e-6, "rope_theta": 5e5, **GROUPED},
    "rms_qk_norm": {"norm": "rms_norm", "qk_norm": True},
    "qk_norm": {"qk_norm": True},
    "head_rotary": {"positional_embedding": "head_rotary"},
    "no_positions": {"positional_embedding": "none"},
    "gelu": {"ffn": "gelu"},
    "geglu": {"ffn": "gemma_geglu"},
    "post_embed_norm": {"post_embed_norm": True},
    "rounded_rotary_tied": {"rope_freq_dtype": "bfloat16", "weight_tying": True},
}
VARIANTS["gqa_qk_norm_per_head"] = {**VARIANTS["gqa"], "qk_norm": True, "qk_norm_per_head": True, "weight_tying": True}
QWEN3 = "gqa_qk_norm_per_head"
"""As a Llama it is transformers' Qwen3, which came with 4.51."""
LLAMAS = {"gqa", QWEN3, "rms_rotary", "rms_llama_rotary", "rms_llama_rotary_tied", "rms_swiglu_torch_tied"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each variant, and one more for those that are a Llama; as `exported_uses.py` reads them."""
    root = tmp_path_factory.mktemp("exports")
    words = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"w{i}": i for i in range(2, 61)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tokenizer.save(str(root / "tokenizer.json"))
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    for name, variant in VARIANTS.items():
        model = create_model(TINY, **variant).eval()
        greedy = torch.tensor([[5, 9, 14, 33]])
        with torch.no_grad():
            for _ in range(8):
                following = 1 + model(greedy)[:, -1:, 1:].argmax(-1)  # `generate` goes on, so that none is end-of-text
                greedy = torch.cat((greedy, following), dim=1)
            expected = {"ids": ids, "logits": model(ids), "greedy": greedy}
        folders = [root / name]
        if name in LLAMAS:
            folders.append(root / f"{name}_as_llama")
            export_huggingface(model, folders[1] / "model", root / "tokenizer.json", llama=True)
            classes = transformers.Qwen3ForCausalLM if name == QWEN3 else transformers.LlamaForCausalLM
            theirs = classes.from_pretrained(folders[1] / "model", attn_implementation="eager")
            with torch.no_grad():
                found = theirs(ids, output_hidden_states=True, output_attentions=True)
            expected["states"] = [*found.hidden_states, *found.attentions]
        export_huggingface(model, folders[0] / "model", root / "tokenizer.json")
        for folder in folders:
            torch.save(expected, folder / "expected.pt")
    return root


def tried(python: Path, exports: Path, home: Path, uses: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Uses by export that did not work, with their errors."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch would look for this package, which gives it an extension
    for what, path in (("register", str(REPOSITORY)), (",".join(uses), "")):
        command = [python, USES, exports, what]
        subprocess.run(command, check=True, env=environment | {"PYTHONPATH": path}, cwd=home)
    for saved in exports.glob("*/saved"):  # what that version wrote is read here
        expected = torch.load(saved.parent / "expected.pt")
        with torch.no_grad():
            torch.testing.assert_close(load_checkpoint(saved)(expected["ids"]), expected["logits"], rtol=0, atol=1e-5)
        shutil.rmtree(saved)
    results = json.loads((exports / "uses.json").read_text())
    assert len(results) == len(VARIANTS) + len(LLAMAS) and all(set(r) == set(uses) for r in results.values())
    return {n: bad for n, r in results.items() if (bad := {use: e for use, e in r.items() if e != "ok"})}


def test_exports_work_in_transformers(exports: Path, tmp_path: Path):
    assert tried(Path(sys.executable), exports, tmp_path, WITHOUT_MORE_PACKAGES) == {}


@pytest.mark.parametrize("name", VARIANTS)
def test_only_what_is_exactly_a_llama_is_exported_as_one(tmp_path: Path, name: str):
    model = create_model(TINY, **VARIANTS[name])
    if name in LLAMAS:
        export_huggingface(model, tmp_path, llama=True)
        assert not list(tmp_path.glob("*.py"))
        return
    with pytest.raises(ConfigError, match="not exactly a Llama") as refused:
        export_huggingface(model, tmp_path, llama=True)
    for field, value in VARIANTS[name].items():
        if field != "weight_tying" and value not in ("rms_norm", "swiglu_torch"):
            assert {"rope_freq_dtype": "rounded to bfloat16"}.get(field, field) in str(refused.value)
    assert VARIANTS[name].get("norm") == "rms_norm" or "norm is" in str(refused.value)


def environment_of(version: str) -> Path:
    """The Python of an environment with this transformers, and what Trainer and LoRA take; torch is the tests' own."""
    folder = REPOSITORY / ".transformers" / version
    ready = folder / ".ready"
    if not ready.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "torch.pth").write_text(sysconfig.get_path("purelib"))
        packages = [f"transformers=={version}", "accelerate==1.15.0", "peft==0.21.2"]
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.touch()
    return folder / "bin/python"


@pytest.mark.drill
@pytest.mark.parametrize("version", VERSIONS)
def test_every_use_of_every_export_in_every_version(exports: Path, tmp_path: Path, version: str):
    python = environment_of(version)
    code = "import importlib.metadata as m, importlib.util as u; "
    code += "print(m.version('transformers'), u.find_spec('openlm_pipeline'))"
    found = subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path).stdout
    assert found.split() == [version, "None"]
    failed = tried(python, exports, tmp_path, ALL_USES)
    if version < "4.51":
        refused = failed.pop(f"{QWEN3}_as_llama")
        assert refused.keys() == set(ALL_USES) and all("`qwen3`" in error for error in refused.values())
    assert failed == {}
