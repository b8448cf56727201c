"""Runs in LLM Foundry's environment: its models, datasets, metrics and loop, and what they found of every item."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.trainer import Trainer
from llmfoundry.models.hf import ComposerHFCausalLM
from llmfoundry.utils.builders import build_icl_evaluators
from prompt_digest import prompt_digest
from torch.nn import functional as F
from transformers import AutoTokenizer


class RecordingModel(ComposerHFCausalLM):
    """LLM Foundry's model, which also keeps what its metrics said of each item."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record: Callable[[list[dict[str, Any]]], None] = lambda items: None
        self._written_ids: list[list[int]] = []

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ids = super().generate(input_ids, **kwargs)
        self._written_ids = ids[:, input_ids.shape[1] :].tolist()
        return ids

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> dict:
        found = super().update_metric(batch, outputs, metric)
        if batch["mode"] == "generate":
            items = generated_items(batch, outputs, found, self._written_ids)
        else:
            items = chosen_items(batch, outputs, found)
        self.record(list(items))
        return found


def chosen_items(batch: dict[str, Any], logits: torch.Tensor, found: dict[str, list]) -> Iterator[dict[str, Any]]:
    """Items of a batch whose options are scored: the cross-entropies are computed as the metrics do.

    Args:
        logits: [rows, max_seq_len, vocabulary]; a row is an option.
        found: lists with one entry an item, from the metric.
    """
    spans = batch["continuation_indices"]
    groups = batch.get("choice_groupings") or [(i, i + 1) for i in range(len(spans))]
    selected = found.get("selected_choice_idx") or [None] * len(groups)
    for (start, end), choice, right in zip(groups, selected, found["result"], strict=True):
        prompts, losses, num_tokens = [], [], []
        for row in range(start, end):
            ids, span = batch["input_ids"][row], spans[row]
            losses.append(float(F.cross_entropy(logits[row].index_select(0, span - 1), ids[span])))
            num_tokens.append(len(span))
            prompts.append([ids[: span[0]].tolist(), ids[span].tolist()])
        yield {
            "prompt_digest": prompt_digest(prompts),
            "cross_entropies": losses,
            "num_tokens": num_tokens,
            "choice": choice,
            "correct": bool(right),
        }


def generated_items(
    batch: dict[str, Any], texts: list[str], found: dict[str, list], written_ids: list[list[int]]
) -> Iterator[dict[str, Any]]:
    """Items of a batch of texts that the model wrote."""
    most, end_id = (batch["generation_kwargs"][name] for name in ("max_new_tokens", "eos_token_id"))
    for ids, mask, text, right, written in zip(
        batch["input_ids"], batch["attention_mask"], texts, found["result"], written_ids, strict=True
    ):
        written = written[: written.index(end_id)] if end_id in written else written
        prompt = ids[int(mask.int().argmax()) :].tolist()  # padded on the left
        yield {
            "prompt_digest": prompt_digest([prompt, most]),
            "generated": text,
            "written_ids": written,
            "correct": bool(right),
        }


def score_tasks(job: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Score the tasks of a job (see `runner`) in its order; `say` is told of progress and of each that is done."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=job["trust_remote_code"])
    model = RecordingModel(
        tokenizer=tokenizer,
        pretrained_model_name_or_path=job["model"],
        trust_remote_code=job["trust_remote_code"],
        use_train_metrics=False,
    )
    trainer = Trainer(model=model, precision="fp32", progress_bar=False)
    torch.set_float32_matmul_precision("highest")  # on a GPU Composer has allowed TF32
    for task in job["tasks"]:
        evaluators, _ = build_icl_evaluators([task["icl_task"]], tokenizer, job["max_seq_len"], job["batch_size"])
        total, done, metrics = sum(len(e.dataloader.dataloader.dataset) for e in evaluators), 0, {}
        with Path(task["output"]).open("w") as f:

            def record(
                items: list[dict[str, Any]], name: str = task["name"], f: TextIO = f, total: int = total
            ) -> None:
                nonlocal done
                f.writelines(json.dumps(item) + "\n" for item in items)
                done += len(items)
                say({"task": name, "items": done, "of": total})

            model.record = record
            for evaluator in evaluators:
                trainer.eval(eval_dataloader=evaluator)
                for name, metric in trainer.state.eval_metrics[evaluator.label].items():
                    metrics[f"metrics/{evaluator.label}/{name}"] = metric.compute().item()
        say({"task": task["name"], "metrics": metrics})
