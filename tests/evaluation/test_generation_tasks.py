"""Generation tasks: prompts, room for the answer, and when a text is right, as LLM Foundry has them."""

import pytest

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.rules.prefix import is_right, normalize_answer
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.evaluation.task_files import read_task_file
from openlm_pipeline.evaluation.tasks import build_items

KIND = "generation_task_with_answers"
ROWS = [
    {"context": "the cat sat on\n", "answer": "a mat", "aliases": ["mat", "the big red mat"]},
    {"context": "the dog ran to", "answer": "its ball"},
    {"context": "what did it see", "answer": "the house", "aliases": []},
]


def task(**settings) -> IclTask:
    return IclTask(label="it", dataset_uri="task.jsonl", num_fewshot=(0,), icl_task_type=KIND, **settings)


@pytest.fixture
def build(home, write_rows, tokenizer):
    def items(spec: IclTask, rows=ROWS, shots=0, max_seq_len=500):
        write_rows("task.jsonl", rows)
        return build_items(spec, read_task_file(spec, home), shots, tokenizer, max_seq_len)

    return items


def test_an_item_asks_for_a_text_and_knows_the_answers(build, tokenizer):
    first, second, _ = build(task(question_prelimiter="Q: ", continuation_delimiter=" A:"))
    assert tokenizer.decode(first.generation.context_ids) == "Q: the cat sat on A:"
    assert (first.requests, first.answers) == ((), ("a mat", "mat", "the big red mat"))
    assert second.answers == ("its ball",)


def test_as_many_tokens_as_the_longest_answer_may_be_written_and_are_kept_free(build, tokenizer):
    longest = max(len(tokenizer.encode(a).ids) for row in ROWS for a in [row["answer"], *row.get("aliases", [])])
    whole = build(task())[0].generation
    assert whole.max_new_tokens == longest
    cut = build(task(), max_seq_len=longest + 2)[0].generation
    assert cut.context_ids == whole.context_ids[-2:]
    assert build(task(cot_delimiter="So: "))[0].generation.max_new_tokens == longest + 10
    assert build(task(generation_kwargs={"max_new_tokens": 3}))[0].generation.max_new_tokens == 3
    with pytest.raises(DataError, match="task.jsonl, line 1"):
        build(task(), max_seq_len=longest)


def test_solved_rows_show_their_chain_of_thought(build, tokenizer):
    rows = [{**ROWS[0], "chain_of_thought": "it was red. "}, {**ROWS[1], "chain_of_thought": "it was big. "}]
    item = build(task(cot_delimiter="So: "), rows, shots=1)[0]
    assert tokenizer.decode(item.generation.context_ids) == "the dog ran to it was big.So: its ball\nthe cat sat on"


def test_the_prompt_hash_follows_what_ends_the_text(build):
    assert build(task())[0].prompt_hash != build(task(early_stopping_criteria=["\n"]))[0].prompt_hash


def test_normalized_texts_have_no_case_articles_or_punctuation():
    assert normalize_answer(" The  Quick_brown, fox’s (an) A! ") == "quick brown fox s"


@pytest.mark.parametrize(
    ("generated", "settings", "right"),
    [
        (" The Mat, and more", {}, True),
        ("on the mat", {}, False),
        ("mat\n\nQuestion: dog", {"early_stopping_criteria": ["\n\n"]}, True),
        ("red. The answer is mat", {"cot_delimiter": "The answer is "}, True),
        ("red. The answer is mat", {}, False),
        (" Mat", {"do_normalization": False}, False),
        (" mats", {"do_normalization": False}, True),
        ("no\n\nmat", {"early_stopping_criteria": ["\n\n"]}, False),
    ],
)
def test_a_text_is_right_if_it_starts_with_an_answer(generated, settings, right):
    assert is_right(generated, ["a mat", "mat"], task(**settings)) == right


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": None}, "answer"),
        ({"answer": 2}, "answer"),
        ({"answer": " "}, "an answer is blank"),
        ({"aliases": "mat"}, "aliases"),
        ({"aliases": ["mat", ""]}, "aliases.1"),
        ({"aliases": ["mat", " "]}, "an answer is blank"),
        ({"context": ["mat"]}, "context"),
        ({"chain_of_thought": None}, "chain_of_thought"),
        ({"chain_of_thought": "it was red"}, "all rows must have a chain_of_thought, or none"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(build, change, says):
    with pytest.raises(DataError, match=r"task\.jsonl, line 2") as e:
        build(task(), [ROWS[0], {**ROWS[1], **change}])
    assert says in str(e.value)
