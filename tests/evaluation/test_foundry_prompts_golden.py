"""Prompts are those of LLM Foundry 0.22, token by token, in every task type and with every option that shapes them.

The expected ids were made by LLM Foundry itself: golden/make_foundry_prompts.py.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.evaluation.task_files import read_task_file
from openlm_pipeline.evaluation.tasks import build_items

GOLDEN = json.loads((Path(__file__).parent / "golden" / "foundry_prompts.json").read_text())


def _name(case) -> str:
    options = ",".join(f"{k}={v!r}" for k, v in case["settings"].items())
    return f"{case['rows']}-{case['tokenizer']}-{options or 'defaults'}"


@pytest.mark.parametrize("case", [pytest.param(c, id=_name(c)) for c in GOLDEN["cases"]])
def test_prompts_are_llm_foundrys(home, write_rows, case):
    write_rows("rows.jsonl", GOLDEN["rows"][case["rows"]])
    settings = {"num_fewshot": 0, "max_seq_len": 400, **case["settings"]}
    shots = settings.pop("num_fewshot")
    task = IclTask(label="it", dataset_uri="rows.jsonl", num_fewshot=(shots,), icl_task_type=case["kind"], **settings)
    tokenizer = Tokenizer.from_str(GOLDEN["tokenizers"][case["tokenizer"]])
    items = build_items(task, read_task_file(task, home), shots, tokenizer, 100)
    items.sort(key=lambda item: item.category or "")
    found = [
        [list(item.generation.context_ids), item.generation.max_new_tokens]
        if item.generation
        else [[list(r.context_ids), list(r.continuation_ids)] for r in item.requests]
        for item in items
    ]
    assert found == case["items"]
