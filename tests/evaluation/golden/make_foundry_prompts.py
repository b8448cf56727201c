"""Writes foundry_prompts.json beside it: the token ids that LLM Foundry itself makes of a few rows, in its environment.

.foundry/bin/python tests/evaluation/golden/make_foundry_prompts.py
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "openlm_pipeline/evaluation/foundry"))
import cpu_torchvision  # noqa: E402, F401  isort: skip

import datasets  # noqa: E402
from llmfoundry.eval.datasets import in_context_learning_evaluation as icl  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

KINDS = {
    "multiple_choice": icl.InContextLearningMultipleChoiceTaskDataset,
    "schema": icl.InContextLearningSchemaTaskDataset,
    "language_modeling": icl.InContextLearningLMTaskDataset,
    "generation_task_with_answers": icl.InContextLearningGenerationTaskWithAnswersDataset,
}
ROWS = {
    "multiple_choice": [
        {"query": " Is ice hot?\n", "choices": ["no", " a bit ", "yes"], "gold": 0, "category": "heat"},
        {"query": "Can fish fly?", "choices": ["the flying ones", "none"], "gold": 0, "category": "fish"},
        {"query": "Is tea\twarm?\n", "choices": ["yes", "no"], "gold": 0, "category": "heat"},
        {"query": "Where is the eel?", "choices": ["at the sea", "in tea"], "gold": 0, "category": "fish"},
        {"query": "à", "choices": ["à point", "the end"], "gold": 1, "category": "heat"},
    ],
    "schema": [
        {"context_options": ["Tea hid a cup as tea ", "Tea hid a cup as it"], "continuation": " was big.", "gold": 0},
        {"context_options": [" Ann saw Eve as Ann", " Ann saw Eve as Eve"], "continuation": "had helped", "gold": 1},
        {"context_options": ["It is the ant", "It is the hen"], "continuation": "that eats the ant.\n", "gold": 1},
    ],
    "language_modeling": [
        {"context": "HEAT: the heat of the\n", "continuation": " tea ", "category": "heat"},
        {"context": "the a", "continuation": "the", "category": "heat"},
        {"context": "  the hat at the", "continuation": "theatre", "category": "fish"},
        {"context": "an ant", "continuation": "at a hat", "category": "fish"},
    ],
    "generation_task_with_answers": [
        {"context": "Question: what heats the tea?\nAnswer:", "answer": "The heat ", "aliases": ["heat", "a Fire"]},
        {"context": " what is at the\n", "answer": "hat", "aliases": []},
        {"context": "the 1 + 1", "answer": "2", "aliases": ["the number that is two"]},
    ],
}  # fmt: skip
ROWS["chain_of_thought"] = [
    {**row, "chain_of_thought": thought}
    for row, thought in zip(ROWS["generation_task_with_answers"], [" that is hot. ", "", "1 and 1 are 2.\n"])
]
PLAIN = {}
FEW = {"num_fewshot": 2}
ALL = {
    "num_fewshot": 2,
    "prompt_string": "Answer these. ",
    "question_prelimiter": "Q: ",
    "example_delimiter": "\n\n",
    "continuation_delimiter": "\nAnswer: ",
    "fewshot_random_seed": 7,
}
OPTIONS = [
    PLAIN,
    FEW,
    ALL,
    {**ALL, "num_fewshot": 0},
    {**ALL, "strip_dataset": False},
    {"num_fewshot": 9, "continuation_delimiter": "Answer: "},
    {**ALL, "max_seq_len": 60},
]
GENERATION_OPTIONS = [{"cot_delimiter": " So: ", **ALL}, {**FEW, "generation_kwargs": {"max_new_tokens": 3}}]


def tokenizers() -> dict[str, Tokenizer]:
    """Byte-level ones with a few merges: with a token " a", without it, and with a BOS."""
    made = {}
    for name, merges in {"spaced": ["Ġ a", "Ġ t", "h e", "Ġt he"], "unspaced": ["Ġ t", "h e", "Ġt he"]}.items():
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in merges]
        vocab = {piece: i for i, piece in enumerate(["<eos>", "<bos>", *pieces])}
        tokenizer = Tokenizer(models.BPE(vocab, [tuple(m.split()) for m in merges]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<eos>", "<bos>"])
        made[name] = tokenizer
    made["bos"] = Tokenizer.from_str(made["spaced"].to_str())
    made["bos"].post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    return made


def prompts(tokenizer: Tokenizer, file: Path, kind: str, options: dict, folder: Path) -> list:
    """For each item [[context, continuation] of each option], or [context, max_new_tokens] in generation."""
    options = {"num_fewshot": 0, "max_seq_len": 400, **options}
    if "question_prelimiter" in options:
        options["prelimiter"] = options.pop("question_prelimiter")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    parts = {None: str(file)}
    if options.pop("has_categories", False):
        parts = icl.partition_dataset_by_category(str(file), str(folder / "parts.jsonl"), {}, {})
    found = []
    for category in sorted(parts, key=str):
        copy = str(folder / f"{category}_copy.jsonl")
        data = KINDS[kind](
            dataset_uri=parts[category], tokenizer=wrapped, pad_tok_id=0, destination_path=copy, **options
        )
        for i in range(len(data)):
            item = data[i]
            context, spans = item[data.context_key], item.get("continuation_indices")
            if kind == "generation_task_with_answers":
                ids = list(itertools.dropwhile(lambda i: i == 0, context))
                found.append([ids, data.base_batch["generation_kwargs"]["max_new_tokens"]])
                continue
            if kind == "language_modeling":
                context, spans = [context], [spans]
            found.append([[ids[: s[0]], ids[s[0] : s[-1] + 1]] for ids, s in zip(context, spans)])
    return found


def main() -> None:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    cases = []
    made = tokenizers()
    for name, rows in ROWS.items():
        kind = name if name in KINDS else "generation_task_with_answers"
        options = [*OPTIONS, *(GENERATION_OPTIONS if kind == "generation_task_with_answers" else [])]
        wanted = [("spaced", o) for o in options] + [("unspaced", ALL), ("bos", PLAIN), ("bos", ALL)]
        if "category" in rows[0]:
            wanted.append(("spaced", {**FEW, "has_categories": True}))
        for tokenizer, settings in wanted:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "rows.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                items = prompts(made[tokenizer], file, kind, settings, Path(folder))
            case = {"rows": name, "kind": kind, "tokenizer": tokenizer, "settings": settings, "items": items}
            cases.append(json.dumps(case, separators=(",", ":")))
    head = json.dumps({n: t.to_str() for n, t in made.items()}), json.dumps(ROWS)
    text = f'{{"tokenizers":{head[0]},\n"rows":{head[1]},\n"cases":[\n' + ",\n".join(cases) + "\n]}\n"
    (HERE / "foundry_prompts.json").write_text(text)


if __name__ == "__main__":
    main()
