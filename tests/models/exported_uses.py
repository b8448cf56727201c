"""What people do with an exported folder, in an environment that has transformers and not this package.

A folder of ROOT holds an export, `model`, and what is expected of it, `expected.pt`.
`python exported_uses.py ROOT USES` tries the uses, named with commas between, on each of them, and writes "ok" or the
error of each as JSON to ROOT/uses.json.
`python exported_uses.py ROOT register` saves each export that this transformers knows anew as `saved`, by classes that
this package registers.
"""

import json
import logging
import re
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEXT = "w5 w9 w14 w33"


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def same_logits(folder, expected):
    with torch.no_grad():
        torch.testing.assert_close(load(folder)(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)


def logits(folder, expected):
    same_logits(folder / "model", expected)


def card(folder, expected):
    """The model card's code runs."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "model" / "README.md").read_text(), re.DOTALL)
    made = {}
    exec(code.replace("THIS_FOLDER", str(folder / "model")), made)
    assert made["made"].shape[1] > 3


def save_pretrained(folder, expected):
    """Saved by one who loaded it with remote code, and by one who has registered classes."""
    with tempfile.TemporaryDirectory() as out:
        load(folder / "model").save_pretrained(out)
        same_logits(out, expected)
    same_logits(folder / "saved", expected)


def generate(folder, expected):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=True)
    prompt = tokenizer(TEXT, return_tensors="pt")
    made = load(folder / "model").generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.tolist() == expected["greedy"].tolist(), f"{made.tolist()} is not {expected['greedy'].tolist()}"


def loss(folder, expected):
    """The gradient of the sum of micro-batches' losses is the whole batch's, with checkpointing too."""
    ids, labels = (torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels"))
    for num_micro, with_checkpointing in ((1, False), (4, False), (4, True)):
        model = load(folder / "model").train()
        if with_checkpointing:
            model.gradient_checkpointing_enable()
        for i, t in zip(ids.chunk(num_micro), labels.chunk(num_micro)):
            model(i, labels=t, num_items_in_batch=(labels != -100).sum()).loss.backward()
        torch.testing.assert_close(norm_of(model), true_norm(folder), rtol=1e-4, atol=0)


def rows():
    """8 rows of 12 ids whose labels leave out some, in each row more."""
    ids = torch.randint(2, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(12) <= torch.arange(8)[:, None], -100)
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels)]


def trainer(model, out, accumulation=1, steps=1, lr=0.0, **settings):
    args = transformers.TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=lr,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return transformers.Trainer(model=model, args=args, train_dataset=rows())


def trained_norm(folder, **settings):
    with tempfile.TemporaryDirectory() as out:
        its = trainer(load(folder / "model"), out, **settings)
        its.train()
        return next(entry["grad_norm"] for entry in its.state.log_history if "grad_norm" in entry)


def true_norm(folder):
    """Of the mean loss of all labels, by torch alone."""
    model = load(folder / "model").train()
    ids, labels = (torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels"))
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return norm_of(model)


def norm_of(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def accumulation(folder, expected):
    norms = [trained_norm(folder, accumulation=n) for n in (1, 4, 8)]
    torch.testing.assert_close(norms, [true_norm(folder)] * 3, rtol=1e-4, atol=0)


def checkpointing(folder, expected):
    for reentrant in (True, False):
        how = {"use_reentrant": reentrant}
        norm = trained_norm(folder, gradient_checkpointing=True, gradient_checkpointing_kwargs=how)
        torch.testing.assert_close(norm, true_norm(folder), rtol=1e-4, atol=0)


def outputs(folder, expected):
    """As transformers' own models give them: last normed, attentions of each layer; the same values where it is one."""
    how = {"attn_implementation": "eager"} if folder.name.endswith("_as_llama") else {}  # ours needs no such request
    model, ids = load(folder / "model", **how), expected["ids"]
    with torch.no_grad():
        found = model(ids, output_hidden_states=True, output_attentions=True)
        states, weights = found.hidden_states, found.attentions
        head = model.get_output_embeddings() or model.get_input_embeddings()
        torch.testing.assert_close(states[-1] @ head.weight.T, expected["logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.logits, expected["logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(ids, return_dict=False)[0], expected["logits"], rtol=0, atol=1e-5)
    assert len(states) == model.config.num_hidden_layers + 1 and len(weights) == model.config.num_hidden_layers
    assert all(w.shape == (len(ids), model.config.num_attention_heads, ids.shape[1], ids.shape[1]) for w in weights)
    assert all(not w.triu(1).any() for w in weights)
    torch.testing.assert_close(torch.stack(weights).sum(-1), torch.ones_like(torch.stack(weights)[..., 0]))
    if "states" in expected:
        torch.testing.assert_close([*states, *weights], expected["states"], rtol=0, atol=1e-5)


def lora(folder, expected):
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        base = load(folder / "model")
        base.enable_input_require_grads()  # as PEFT asks for, where layers are checkpointed
        model = peft.get_peft_model(base, settings)
        its = trainer(model, out, steps=5, lr=0.01, gradient_checkpointing=True)
        its.train()
        losses = [entry["loss"] for entry in its.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0], losses
        model.save_pretrained(out)
        with torch.no_grad():
            again = peft.PeftModel.from_pretrained(load(folder / "model"), out)(expected["ids"]).logits
            torch.testing.assert_close(again, model.eval()(expected["ids"]).logits, rtol=0, atol=1e-5)
            assert not torch.allclose(again, expected["logits"], rtol=0, atol=1e-3)


def main(root, what):
    folders = sorted(path.parent for path in Path(root).glob("*/expected.pt"))
    if what == "register":
        from openlm_pipeline.checkpoints.hf import register

        register()
        for folder in folders:
            if json.loads((folder / "model/config.json").read_text())["model_type"] in CONFIG_MAPPING:
                transformers.AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(folder / "saved")
        return
    logging.disable(logging.WARNING)
    results = {}
    for folder in folders:
        expected, results[folder.name] = torch.load(folder / "expected.pt"), {}
        for use in what.split(","):
            try:
                globals()[use](folder, expected)
                results[folder.name][use] = "ok"
            except Exception:  # noqa: BLE001 - each error is a result, which the caller looks at
                results[folder.name][use] = traceback.format_exc(limit=-3)
    (Path(root) / "uses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
