"""The table is the same, byte for byte, at any number of processes; one failure ends all."""

from pathlib import Path

import pytest
import torch
import yaml
from gloo_workers import run_in_processes
from scoring_worker import score, score_and_fail

TYPES = {
    "last_word": "language_modeling",
    "continuation": "multiple_choice",
    "context_choice": "schema",
    "answer": "generation_task_with_answers",
}


@pytest.fixture
def folder(tmp_path, model, tokenizer, write_rows, task_rows) -> Path:
    """A model and a suite with one task of each type, for the worker."""
    answers = [{"context": row["context"], "answer": row["continuation"]} for row in task_rows["last_word"]]
    tasks = [
        {
            "label": label,
            "dataset_uri": str(write_rows(f"{label}.jsonl", task_rows.get(label, answers))),
            "num_fewshot": [0, 1],
            "icl_task_type": kind,
        }
        for label, kind in TYPES.items()
    ]
    suite = {"name": "four", "version": "1", "icl_tasks": tasks}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    torch.save({"config": model.config.model_dump(), "state": model.state_dict()}, tmp_path / "model.pt")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tables_are_byte_equal_at_any_number_of_processes_and_one_failure_ends_all(folder):
    score(folder, folder / "of-1", last=False)
    names = sorted(str(path.relative_to(folder / "of-1")) for path in (folder / "of-1").rglob("*.parquet"))
    assert len(names) == 1 + 2 * len(TYPES)
    for processes in (2, 3):
        run_in_processes(processes, score_and_fail, folder)
        for name in names:
            alone, together = (folder / f"of-{n}" / name for n in (1, processes))
            assert together.read_bytes() == alone.read_bytes(), name
        reports = [(folder / f"of-{processes}-report-{rank}.txt").read_text() for rank in range(processes)]
        assert "last_word/0-shot: 12 of 12 requests" in reports[0]
        assert not any(reports[1:])
        errors = [(folder / f"error-{processes}-{rank}.txt").read_text() for rank in range(processes)]
        last = processes - 1
        assert errors[last] == "OpenLMError: these weights are unreadable"
        expected = f"ScoringError: process {last} of {processes}: these weights are unreadable"
        assert errors[:last] == [expected] * last
        assert not (folder / f"broken-{processes}" / "items.parquet").exists()
