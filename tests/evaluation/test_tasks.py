"""Task files are checked before any scoring, and prompts are those of LLM Foundry."""

import hashlib
import json
import random

import pytest
from tokenizers import Tokenizer, processors

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.evaluation.task_files import read_task_file
from openlm_pipeline.evaluation.tasks import build_items, fewshot_indices

ROWS = {
    "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 1},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a", "continuation": "b"},
}


def task(kind: str, uri: str = "task.jsonl", **settings) -> IclTask:
    return IclTask(**{"label": "it", "dataset_uri": uri, "num_fewshot": (0,), "icl_task_type": kind, **settings})


def texts(item, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(tokenizer.decode(r.context_ids), tokenizer.decode(r.continuation_ids)) for r in item.requests]


@pytest.fixture
def prompts(home, write_rows, tokenizer):
    """(task, rows, shots) -> the texts of each item's requests."""

    def build(spec: IclTask, rows, shots=0, max_seq_len=10_000):
        write_rows("task.jsonl", rows)
        items = build_items(spec, read_task_file(spec, home), shots, tokenizer, max_seq_len)
        return [texts(item, tokenizer) for item in items]

    return build


def test_multiple_choice_strips_the_query_and_spaces_the_choices(prompts):
    spec = task("multiple_choice", continuation_delimiter="Answer: ")
    rows = [{"query": " Why?\n", "choices": ["so", " spaced", "end "], "gold": 0}]
    assert prompts(spec, rows) == [[("Why?Answer:", " so"), ("Why?Answer:", " spaced"), ("Why?Answer:", " end ")]]


def test_a_line_break_in_the_delimiter_is_kept(prompts):
    spec = task("multiple_choice", continuation_delimiter="\nAnswer: ")
    rows = [{"query": "Why?\n", "choices": ["so", "no"], "gold": 0}]
    assert prompts(spec, rows)[0][0] == ("Why?\nAnswer:", " so")


def test_language_modeling_strips_both_texts(prompts):
    assert prompts(task("language_modeling"), [{"context": " a b\n", "continuation": " c "}]) == [[("a b", " c")]]


def test_schema_scores_one_continuation_after_each_context(prompts):
    rows = [{"context_options": ["the cat ", "the dog"], "continuation": " ran ", "gold": 1}]
    assert prompts(task("schema"), rows) == [[("the cat ", " ran"), ("the dog", " ran")]]


def test_few_shot_prompts_show_solved_rows_before_the_question(prompts):
    spec = task("multiple_choice", prompt_string="P", question_prelimiter="Q: ", continuation_delimiter=" A: ")
    rows = [{"query": "one", "choices": ["x", "y"], "gold": 1}, {"query": "two", "choices": ["z", "w"], "gold": 0}]
    first, second = prompts(spec, rows, shots=1)
    assert first[0] == ("P\nQ: two A: z\nQ: one A:", " x")
    assert second[1] == ("P\nQ: one A: y\nQ: two A:", " w")


def test_the_first_solved_row_has_no_delimiter_before_it(prompts):
    rows = [{"context": "a", "continuation": "b"}, {"context": "c", "continuation": "d"}]
    assert prompts(task("language_modeling"), rows, shots=1)[0] == [("c d\na", " b")]


def test_few_shot_schema_puts_the_prelimiter_before_the_delimiter(prompts):
    rows = [
        {"context_options": ["a", "b"], "continuation": "x", "gold": 1},
        {"context_options": ["c", "d"], "continuation": "y", "gold": 0},
    ]
    spec = task("schema", question_prelimiter="Q", continuation_delimiter=" | ")
    assert prompts(spec, rows, shots=1)[0] == [("Qc | yQ\na |", " x"), ("Qc | yQ\nb |", " x")]


def test_few_shot_rows_come_from_the_same_category(prompts):
    rows = [{"context": f"{c} {i}", "continuation": "x", "category": c} for i in range(3) for c in ("red", "big")]
    items = prompts(task("language_modeling", has_categories=True), rows, shots=2)
    for row, [(context, _)] in zip(rows, items):
        assert context.count(row["category"]) == 3


@pytest.mark.parametrize(("rows", "shots"), [(100, 5), (4, 3), (3, 10), (1, 2)])
def test_few_shot_draws_are_repeatable_distinct_and_never_the_question(rows, shots):
    for index in range(rows):
        drawn = fewshot_indices(rows, shots, index, random.Random(index))
        assert drawn == fewshot_indices(rows, shots, index, random.Random(index))
        assert index not in drawn
        assert len(drawn) == len(set(drawn)) == min(shots, rows - 1)


def test_a_long_context_loses_its_left(home, write_rows, tokenizer):
    write_rows("task.jsonl", [{"context": "the cat sat on a mat", "continuation": "and then"}])
    spec = task("language_modeling")
    file = read_task_file(spec, home)
    (whole,), (cut,) = (build_items(spec, file, 0, tokenizer, n)[0].requests for n in (1000, 5))
    room = 5 - len(whole.continuation_ids)
    assert 0 < room < len(whole.context_ids)
    assert cut.context_ids == whole.context_ids[-room:]
    assert cut.continuation_ids == whole.continuation_ids


def test_the_tasks_own_max_seq_len_wins(home, write_rows, tokenizer):
    write_rows("task.jsonl", [{"context": "the cat sat on a mat", "continuation": "and then"}])
    spec = task("language_modeling", max_seq_len=5)
    (request,) = build_items(spec, read_task_file(spec, home), 0, tokenizer, 1000)[0].requests
    assert len(request.context_ids) + len(request.continuation_ids) == 5


@pytest.mark.parametrize("row", [{"context": "a", "continuation": "b " * 9}, {"context": " ", "continuation": "b"}])
def test_what_cannot_be_scored_names_file_and_line(home, write_rows, tokenizer, row):
    write_rows("task.jsonl", [{"context": "a", "continuation": "b"}, row])
    spec = task("language_modeling", continuation_delimiter="")
    with pytest.raises(DataError, match=r"task\.jsonl, line 2 .* cannot be scored within 8 tokens"):
        build_items(spec, read_task_file(spec, home), 0, tokenizer, 8)


def test_bos_starts_a_prompt_once_and_eos_never_ends_its_preamble(home, write_rows, tokenizer):
    marked = Tokenizer.from_str(tokenizer.to_str())
    marked.add_special_tokens(["<s>", "</s>"])
    bos, eos = marked.token_to_id("<s>"), marked.token_to_id("</s>")
    marked.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", bos), ("</s>", eos)])
    marked.enable_truncation(2)
    marked.enable_padding(length=64)
    write_rows("task.jsonl", [{"context": "a", "continuation": "b"}, {"context": "c", "continuation": "d"}])
    spec = task("language_modeling")
    for shots, expected in ((0, "a"), (1, "c d\na")):
        (request,) = build_items(spec, read_task_file(spec, home), shots, marked, 100)[0].requests
        assert request.context_ids[0] == bos
        assert eos not in request.context_ids
        assert marked.decode(request.context_ids[1:]) == expected
    assert marked.truncation and marked.padding  # the caller's tokenizer is as it was


def test_hashes_follow_the_row_and_the_prompt(home, write_rows, tokenizer):
    def hashes(row, **settings):
        path = write_rows("task.jsonl", [row])
        spec = task("multiple_choice", **settings)
        file = read_task_file(spec, home)
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        (item,) = build_items(spec, file, 0, tokenizer, 100)
        return item.item_hash, item.prompt_hash

    row = ROWS["multiple_choice"]
    item, prompt = hashes(row)
    assert hashes({**row, "note": "not used"}) == (item, prompt)
    assert hashes(row, continuation_delimiter=": ")[0] == item
    assert hashes(row, continuation_delimiter=": ")[1] != prompt
    assert hashes({**row, "gold": 0})[0] != item
    assert hashes({**row, "gold": 0})[1] == prompt


BAD = {
    "broken": ("language_modeling", b'{"context": "a"', "JSON"),
    "not an object": ("language_modeling", b"[1]", "language_modeling"),
    "invalid UTF-8": ("language_modeling", b'{"context": "\xff", "continuation": "b"}', "language_modeling"),
    "no continuation": ("language_modeling", b'{"context": "a"}', "continuation"),
    "blank continuation": ("language_modeling", b'{"context": "a", "continuation": " "}', "blank"),
    "one choice": ("multiple_choice", b'{"query": "q", "choices": ["a"], "gold": 0}', "choices"),
    "empty choice": ("multiple_choice", b'{"query": "q", "choices": ["a", ""], "gold": 0}', "choices"),
    "gold too large": ("multiple_choice", b'{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2"),
    "gold negative": ("schema", b'{"context_options": ["a", "b"], "continuation": "c", "gold": -1}', "gold"),
    "gold is text": ("schema", b'{"context_options": ["a", "b"], "continuation": "c", "gold": "0"}', "gold"),
    "gold is a bool": ("schema", b'{"context_options": ["a", "b"], "continuation": "c", "gold": true}', "gold"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_row_names_file_and_line(home, case):
    kind, line, says = BAD[case]
    path = home.root / "task.jsonl"
    path.parent.mkdir()
    path.write_bytes(json.dumps(ROWS[kind]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=r"task\.jsonl, line 3") as e:
        read_task_file(task(kind), home)
    assert says in str(e.value)


def test_a_row_without_the_needed_category_is_named(home, write_rows):
    write_rows("task.jsonl", [ROWS["language_modeling"]])
    with pytest.raises(DataError, match="line 1 has no category"):
        read_task_file(task("language_modeling", has_categories=True), home)


def test_a_category_that_the_suite_names_and_the_file_lacks_is_an_error(home, write_rows):
    rows = [{**ROWS["language_modeling"], "category": c} for c in ("a", "b")]
    write_rows("task.jsonl", rows)
    kwargs = {"has_categories": True}
    assert len(read_task_file(task("language_modeling", category_names=("b", "a"), **kwargs), home).rows) == 2
    with pytest.raises(DataError, match="lacks c; also has b"):
        read_task_file(task("language_modeling", category_names=("a", "c"), **kwargs), home)


def test_a_pinned_file_that_changed_is_refused(home, write_rows):
    path = write_rows("task.jsonl", [ROWS["language_modeling"]])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_task_file(task("language_modeling", sha256=sha256), home).sha256 == sha256
    with pytest.raises(DataError, match=f"{sha256}.*pins {'0' * 64}"):
        read_task_file(task("language_modeling", sha256="0" * 64), home)


def test_a_relative_file_may_stand_in_the_working_folder(home, write_rows, tmp_path, monkeypatch):
    write_rows("task.jsonl", [ROWS["language_modeling"]]).rename(tmp_path / "task.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read_task_file(task("language_modeling"), home).path == str(tmp_path / "task.jsonl")


def test_an_empty_file_is_refused(home, write_rows):
    write_rows("task.jsonl", [])
    with pytest.raises(DataError, match="has no rows"):
        read_task_file(task("schema"), home)


def test_a_missing_file_says_where_it_comes_from(home):
    for uri, says in (("raw/embedded/eval/x.jsonl", "openlm demo"), ("eval/copa.jsonl", "mosaicml/llm-foundry")):
        with pytest.raises(MissingInputError, match=says) as e:
            read_task_file(task("schema", uri), home)
        assert str(home.root / uri) in str(e.value)


def test_an_unknown_protocol_is_a_config_error(home):
    with pytest.raises(ConfigError, match="nowhere://"):
        read_task_file(task("schema", "nowhere://x.jsonl"), home)


def test_copa_with_the_neox_tokenizer(home, shared_data):
    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers" / "gpt-neox-20b" / "tokenizer.json"))
    spec = task("multiple_choice", str(shared_data / "eval" / "copa.jsonl"))
    items = build_items(spec, read_task_file(spec, home), 0, tokenizer, 2048)
    assert len(items) == 100
    assert texts(items[0], tokenizer) == [
        ("The man turned on the faucet, therefore", " the toilet filled with water."),
        ("The man turned on the faucet, therefore", " water flowed from the spout."),
    ]
    assert all(tokenizer.id_to_token(r.continuation_ids[0]).startswith("Ġ") for i in items for r in i.requests)


def test_real_task_files_are_read_whole(home, shared_data):
    kinds = {
        "arc_easy": ("multiple_choice", 2376),
        "piqa": ("multiple_choice", 1838),
        "winograd_wsc": ("schema", 273),
        "lambada_openai": ("language_modeling", 5153),
        "jeopardy_all": ("language_modeling", 2117),
    }
    for name, (kind, count) in kinds.items():
        spec = task(kind, str(shared_data / "eval" / f"{name}.jsonl"), has_categories=name == "jeopardy_all")
        assert len(read_task_file(spec, home).rows) == count
