"""Fixed scorecards of an imaginary run of the demo recipe: one task falls, one rises beyond noise, one fails once."""

import pytest

from openlm_pipeline.evaluation.scorecard import Change, Scorecard, TaskScore
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
        status="scored",
        task_file_sha256=name[0] * 64,
        **fields,
    )


def _change(name: str, previous: str, delta: float, p_holm: float) -> Change:
    return Change(
        task=name,
        num_fewshot=0,
        previous_milestone=previous,
        delta=delta,
        p_value=p_holm / 2,
        p_holm=p_holm,
        significant=p_holm < 0.05,
    )


def _card(milestone: str, tokens: int, tasks: tuple[TaskScore, ...], loss: float, **fields) -> Scorecard:
    complete = all(t.status == "scored" for t in tasks)
    averages = {}
    if complete:
        average = sum(t.accuracy for t in tasks) / len(tasks)
        averages = {
            "average": average,
            "average_ci_low": average - 0.03,
            "average_ci_high": average + 0.03,
            "centred_average": sum(t.centred for t in tasks) / len(tasks),
        }
    return Scorecard(
        run="demo",
        run_version="v1",
        milestone=milestone,
        tokens=tokens,
        step=tokens // 8192,
        checkpoint_digest=f"{tokens:064x}",
        data_fingerprint="d" * 64,
        tokenizer="demo_bpe",
        validation_loss=loss,
        suite="demo",
        suite_version="v1",
        suite_digest="5" * 64,
        harness_version="1",
        tasks=tasks,
        status="complete" if complete else "incomplete",
        missing=tuple(t.name for t in tasks if t.status != "scored"),
        **averages,
        **fields,
    )


@pytest.fixture(scope="session")
def experiment() -> Experiment:
    fixed = ["milestones=[250K,500K,1M]", "model.n_heads=4", "training.global_batch=8192", "training.warmup=65536"]
    return load_experiment("demo", fixed)  # the golden files do not follow the recipe


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
    changes = (_change("choice", "t0250K", 0.09, 0.01), _change("cloze", "t0250K", 0.02, 0.4))
    return _card("t0500K", 507904, tasks, loss=5.25, changes=changes)


@pytest.fixture(scope="session")
def last_card() -> Scorecard:
    tasks = (_task("choice", 0.45), _task("cloze", 0.06, chance=0.0), _task("harder", 0.36))
    changes = (_change("choice", "t0500K", 0.05, 0.2), _change("cloze", "t0500K", -0.08, 0.003))
    return _card("t0001M", 1007616, tasks, loss=4.5, changes=changes)


@pytest.fixture(scope="session")
def cards(first_card: Scorecard, failed_card: Scorecard, last_card: Scorecard) -> list[Scorecard]:
    return [first_card, failed_card, last_card]


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
