"""A user's session: from raw text to a model that others load, and that training begins from again.

`python tests/journey.py` runs its commands as they are typed; the test runs the same ones in its own process.
"""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.ordering import order_of
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home

AVERAGE = "ema_0.9_1"
MODERN = f"""
extends: modern_160m
name: modern
tokenizer: {{name: modern_bpe, source: null, train: {{vocab_size: 300}}}}
seq_len: 64
sources:
  - {{name: web, files: [raw/web], weight: 3}}
  - {{name: code, files: [raw/code]}}
model: {{vocab_size: 304, hidden_dim: 64, n_layers: 2, n_heads: 4, ffn_hidden_dim: 96, n_kv_heads: 2}}
training: {{global_batch: 512, warmup: 2K, decay: 4K, averages: [{AVERAGE}], precision: fp32, document_mask: false}}
milestones: [16K, 20K]
evaluation: null
execution: {{micro_batch: 8, log_every: 1, checkpoint_every: 8K, compile: false}}
launcher: {{processes: 1}}
"""
AGAIN = """
extends: modern
name: again
init_from: exported
milestones: [3K]
training: {decay: 0}
"""
MORE_CODE = "sources=[{name: web, files: [raw/web]}, {name: code, files: [raw/code], weight: 3}]"


def prepare(folder: Path) -> dict[str, str]:
    """Raw text and two recipes, as a user has them; the environment of the session."""
    home, recipes = folder / "home", folder / "recipes"
    recipes.mkdir()
    (recipes / "modern.yaml").write_text(MODERN)
    (recipes / "again.yaml").write_text(AGAIN)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [module.read_text(errors="replace")[:4000] for module in modules]
    for name, part in (("web", texts[::2]), ("code", texts[1::2])):
        (home / "raw" / name).mkdir(parents=True)
        (home / "raw" / name / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return {"OPENLM_HOME": str(home), "OPENLM_RECIPES": str(recipes), "OMP_NUM_THREADS": "1"}


def session(openlm: Callable[[str], str], folder: Path, layout: str) -> None:
    """All that is typed, and what must come of it.

    Args:
        openlm: runs a command; gives what it printed, and raises where it does not end with exit code 0.
        layout: of the exported folder, as `openlm export --format` names it.
    """
    home = Home(folder / "home")
    out, tokenizer = home.root / "exported", home.tokenizer("modern_bpe")

    assert "checkpoint/modern/t0020K" in openlm("plan modern")
    openlm("tokenize modern --workers 1")
    openlm("train modern")
    openlm(f"fork modern@16K cooled training.decay=7K milestones=[24K] '{MORE_CODE}'")
    planned = openlm("plan cooled")
    assert "warning" not in planned and "refusal" not in planned, planned
    openlm("train cooled")
    last = RunFolder(home.run("cooled", "v1")).saved()[-1].path
    openlm(f"export {last} -o {out} --tokenizer {tokenizer} --average {AVERAGE} --dtype bf16 --format {layout}")
    openlm("train again")

    records = {run: RunFolder(home.run(run, "v1")).read_metrics() for run in ("modern", "cooled", "again")}
    rates = [record["lr"] for record in records["cooled"]]
    assert max(records[run][-1]["loss"] for run in records) < records["modern"][0]["loss"] - 1
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 10
    remote_code = layout == "huggingface"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=remote_code, dtype=torch.bfloat16).eval()
    words = AutoTokenizer.from_pretrained(out, trust_remote_code=remote_code)
    prompt = words("import os\n", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert words.decode(written[0]).startswith("import os\n") and written.shape[1] > prompt["input_ids"].shape[1]
    loss = first_loss(model, home)
    assert abs(records["again"][0]["loss"] - loss) < 1e-5 * loss, (records["again"][0]["loss"], loss)


@torch.no_grad()
def first_loss(model: torch.nn.Module, home: Home) -> float:
    """The loss, by transformers in fp32, of the first batch of `again`."""
    again = load_experiment(str(Path(os.environ["OPENLM_RECIPES"]) / "again.yaml"))
    datasets = [open_dataset(dataset, home) for dataset in again.training_datasets()]
    picks = order_of(again, [d.shard_sizes for d in datasets]).picks(0, again.training.global_batch // again.seq_len)
    ids = torch.stack([torch.from_numpy(datasets[source][sample].astype("int64")) for source, sample in zip(*picks)])
    logits = model.float()(input_ids=ids[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _typed(line: str) -> str:
    print(f"$ openlm {line}", flush=True)
    command = [sys.executable, "-m", "openlm_pipeline", *shlex.split(line)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed, flush=True)
    return printed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= prepare(Path(temporary))
        session(_typed, Path(temporary), *(sys.argv[1:] or ["huggingface"]))
