"""Fixed scorecards of an imaginary run of the demo recipe: one task falls, one rises beyond noise, one fails once.

`OPENLM_UPDATE_GOLDEN=1 pytest tests/reports` writes the golden files anew; look at what git says has changed.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from openlm_pipeline.evaluation.baselines import QuotedBaseline
from openlm_pipeline.evaluation.comparison import Difference
from openlm_pipeline.evaluation.scorecard import Average, Scorecard, TaskScore
from openlm_pipeline.experiments import Experiment, load_experiment


def _task(name: str, accuracy: float | None, half: float = 0.05, chance: float = 0.25, **fields) -> TaskScore:
    common = {"task": name, "num_fewshot": 0, "metric": "accuracy", "rule": "mean"}
    if accuracy is None:
        return TaskScore(**common, **fields)
    return TaskScore(
        **common,
        num_items=400,
        accuracy=accuracy,
        ci_low=accuracy - half,
        ci_high=accuracy + half - 0.01,
        standard_error=half / 1.96,
        chance=chance,
        centred=(accuracy - chance) / (1 - chance),
        mde=0.098,
        accuracy_sum=accuracy - 0.01 if chance else None,
        accuracy_norm=accuracy + 0.01 if chance else None,
        majority=0.2625 if chance else None,
        bits_per_byte=2 - accuracy,
        bits_low=1.9 - accuracy,
        bits_high=2.1 - accuracy,
        status="scored",
        task_file_sha256=name[0] * 64,
        **fields,
    )


def _difference(measure: str, against: str, delta: float, p_holm: float, kind: str = "accuracy") -> Difference:
    return Difference(
        measure=measure,
        against=against,
        kind=kind,
        delta=delta,
        ci_low=delta - 0.04,
        ci_high=delta + 0.04,
        p_value=p_holm / 2,
        p_holm=p_holm,
        significant=p_holm < 0.05,
        mde=0.06,
    )


def _average(name: str, kind: str, tasks: tuple[TaskScore, ...]) -> Average:
    common = {"name": name, "kind": kind, "tasks": tuple(t.name for t in tasks)}
    common["random_baselines"] = "v1" if kind == "centred" else None
    if missing := tuple(t.name for t in tasks if t.status != "scored"):
        status = "failed" if any(t.status == "failed" for t in tasks) else "not run"
        return Average(**common, status=status, missing=missing)
    if kind == "bits_per_byte":
        value = sum(t.bits_per_byte for t in tasks) / len(tasks)
        return Average(**common, value=value, ci_low=value - 0.05, ci_high=value + 0.05, status="scored")
    value = sum(t.accuracy if kind == "accuracy" else t.centred for t in tasks) / len(tasks)
    chance = sum(t.chance for t in tasks) / len(tasks) if kind == "accuracy" else 0.0
    ends = {"ci_low": value - 0.03, "ci_high": value + 0.03, "standard_error": 0.0153, "mde": 0.06}
    return Average(**common, value=value, chance=chance, status="scored", **ends)


def _card(milestone: str | None, tokens: int | None, tasks: tuple[TaskScore, ...], loss: float | None, **fields):
    missing = tuple(t.name for t in tasks if t.status != "scored")
    settings = {"run": "demo", "run_version": "v1", "data_fingerprint": "d" * 64} | fields
    return Scorecard(
        milestone=milestone,
        tokens=tokens,
        step=None if tokens is None else tokens // 8192,
        checkpoint_digest=f"{tokens or 0:064x}",
        tokenizer="demo_bpe",
        validation_loss=loss,
        suite="demo",
        suite_version="v1",
        suite_digest="5" * 64,
        random_baselines="v1",
        harness_version="1",
        tasks=tasks,
        averages=(
            _average("all_tasks", "accuracy", tasks),
            _average("all_tasks_centred", "centred", tasks),
            _average("all_tasks_bits_per_byte", "bits_per_byte", tasks),
        ),
        status="incomplete" if missing else "complete",
        missing=missing,
        **settings,
    )


def golden_file(name: str, text: str) -> None:
    """`text` is that of the golden file."""
    path = Path(__file__).parent / "golden" / name
    if os.environ.get("OPENLM_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.fixture(scope="session")
def golden() -> Callable[[str, str], None]:
    return golden_file


@pytest.fixture(scope="session")
def experiment() -> Experiment:
    fixed = ["milestones=[250K,500K,1M]", "model.n_heads=4", "training.global_batch=8192", "training.warmup=65536"]
    return load_experiment("demo", fixed)  # the golden files do not follow the recipe


@pytest.fixture(scope="session")
def of_tasks() -> Callable[..., Scorecard]:
    """A scorecard of accuracies by task, as `of_tasks(accuracies, milestone, tokens, run=...)`."""
    return lambda accuracies, milestone, tokens, **fields: _card(
        milestone, tokens, tuple(_task(name, value) for name, value in accuracies.items()), loss=2.2, **fields
    )


@pytest.fixture(scope="session")
def first_card() -> Scorecard:
    tasks = (_task("choice", 0.31), _task("cloze", 0.12, chance=0.0), _task("harder", 0.30))
    return _card("t0250K", 253952, tasks, loss=5.75)


@pytest.fixture(scope="session")
def failed_card() -> Scorecard:
    tasks = (
        _task("choice", 0.40),
        _task("cloze", 0.14, chance=0.0),
        _task("harder", None, status="failed", problem="row 7 has no answer"),
    )
    changes = (
        _difference("choice/0-shot", "t0250K", 0.09, 0.01),
        _difference("cloze/0-shot", "t0250K", 0.02, 0.4),
        _difference("cloze/0-shot", "t0250K", -0.02, 0.001, "bits_per_byte"),
    )
    return _card("t0500K", 507904, tasks, loss=5.25, changes=changes)


@pytest.fixture(scope="session")
def last_card() -> Scorecard:
    tasks = (_task("choice", 0.45), _task("cloze", 0.06, chance=0.0), _task("harder", 0.36))
    changes = (
        _difference("choice/0-shot", "t0500K", 0.05, 0.2),
        _difference("cloze/0-shot", "t0500K", -0.08, 0.003),
        _difference("choice/0-shot", "t0500K", 0.04, 0.004, "bits_per_byte"),
        _difference("cloze/0-shot", "t0500K", 0.08, 0.002, "bits_per_byte"),
    )
    against = (_difference("all_tasks", "t0250K", 0.047, 0.004), _difference("all_tasks", "tiny_lm", -0.02, 0.4))
    return _card("t0001M", 1007616, tasks, loss=4.5, changes=changes, against=against)


@pytest.fixture(scope="session")
def cards(first_card: Scorecard, failed_card: Scorecard, last_card: Scorecard) -> list[Scorecard]:
    return [first_card, failed_card, last_card]


@pytest.fixture(scope="session")
def baseline() -> Scorecard:
    """Another model, scored on the same items."""
    tasks = (_task("choice", 0.44), _task("cloze", 0.10, chance=0.0), _task("harder", 0.39))
    return _card(None, None, tasks, loss=None, run="tiny_lm", run_version="main", data_fingerprint=None)


@pytest.fixture(scope="session")
def published() -> QuotedBaseline:
    return QuotedBaseline(
        name="paper_lm",
        family="paper_lm",
        title="Paper-LM",
        source="https://example.org/paper",
        harness="a harness of theirs",
        scores={"choice/0-shot": 0.5, "cloze/0-shot": 0.08},
        average=0.29,
        average_tasks=("choice/0-shot", "cloze/0-shot"),
    )


@pytest.fixture(scope="session")
def metrics() -> list[dict]:
    """Records as in `metrics.jsonl`, with one loss that is not a number."""
    training = [
        {
            "step": step,
            "tokens": step * 8192,
            "loss": float("nan") if step == 40 else 8.3 / step**0.12,
            "lr": 3e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 14000.0 + step,
        }
        for step in range(5, 124, 5)
    ]
    validation = [{"step": s, "tokens": s * 8192, "validation_loss": 8.4 / s**0.12} for s in (31, 62, 123)]
    return training + validation
