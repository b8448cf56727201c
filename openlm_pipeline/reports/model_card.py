"""A Hugging Face model card for one milestone: its scores as `model-index` in the front matter, and in a table."""

from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.reports.rows import milestones_table
from openlm_pipeline.reports.summary import evaluation_facts, made_from, task_files
from openlm_pipeline.reports.table import escape_markdown
from openlm_pipeline.units import format_tokens


def model_card(
    experiment: Experiment, scorecard: Scorecard, *, license: str | None = None, language: str | None = None
) -> str:
    """The text of `README.md` for the weights of `scorecard`'s milestone.

    Args:
        license: SPDX identifier, as the hub spells it (`apache-2.0`); left out if None.
        language: code of the training text's language (`en`).

    Raises:
        DataError: the scorecard is of another run.
    """
    from huggingface_hub import EvalResult, ModelCardData

    milestone = [tokens for label, tokens in experiment.labelled_milestones() if label == scorecard.milestone]
    table = milestones_table(experiment.name, experiment.version, [scorecard], milestone)
    (row,) = table.rows
    name = f"{experiment.name}-{experiment.version}-{row.title}"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.task,
            dataset_name=f"{task.task} ({task.num_fewshot}-shot)",
            metric_type="accuracy",
            metric_name=f"accuracy, {task.num_fewshot}-shot",
            metric_value=round(task.accuracy, 4),
            dataset_args={"num_few_shot": task.num_fewshot},
        )
        for task in scorecard.tasks
        if task.accuracy is not None
    ]
    data = ModelCardData(
        license=license,
        language=language,
        pipeline_tag="text-generation",
        tags=["openlm"],
        model_name=name,
        eval_results=results or None,
    )
    parts = [f"---\n{data.to_yaml().strip()}\n---", f"# {escape_markdown(name)}"]
    if experiment.description:
        parts.append(escape_markdown(experiment.description))
    parts.append(
        f"Trained on {format_tokens(row.tokens)} tokens of {escape_markdown(_sources(experiment))}. These are the "
        f"weights after step {scorecard.step:,}."
    )
    heads = ("measure", "score", "95% interval", "rule", "acc", "acc_norm", "bits per byte", "chance", "items")
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for column, cell in zip(table.columns, row.cells):
        interval = "–" if cell.low is None else f"{cell.low:.3f} to {cell.high:.3f}".replace("-", "−")
        others = [getattr(cell.score, name, None) for name in ("accuracy_sum", "accuracy_norm", "bits_per_byte")]
        numbers = ["–" if n is None else f"{n:.3f}" for n in (*others, column.chance)]
        items = "–" if column.num_items is None else f"{column.num_items:,}"
        lines.append([escape_markdown(column.heading), cell.number, interval, column.rule or "–", *numbers, items])
    parts += ["## Scores", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    parts.append(
        "The score of a task is its accuracy by its rule; acc and acc_norm are those of lm-evaluation-harness, by "
        "total log-probability and by that over characters."
    )
    facts = [
        ("Checkpoint", scorecard.checkpoint_digest),
        *evaluation_facts([scorecard]),
        *((f"Task file of {task}", digest) for task, digest in task_files([scorecard])),
    ]
    for title, said in (("How it was made", made_from(experiment)), ("Provenance", facts)):
        parts += [f"## {title}", "\n".join(f"- {escape_markdown(k)}: {escape_markdown(v)}" for k, v in said)]
    return "\n\n".join(parts) + "\n"


def _sources(experiment: Experiment) -> str:
    return ", ".join(f"{source.name} {source.version}" for source in experiment.sources)
