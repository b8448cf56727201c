"""Suites: which tasks score a model, in LLM Foundry's `icl_tasks` YAML format.

Keys and defaults are those of llm-foundry 0.22; `name` and `version` at the top are ours. A setting that this harness
would not follow is refused, never ignored (`batch_size` alone is read and unused: it changes no result).
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.lineage.fingerprint import fingerprint
from openlm_pipeline.strict import Strict, explain
from openlm_pipeline.yaml_files import expand_variables, read_mapping

HARNESS_VERSION = "2"
"""Raised whenever prompts or scores change for the same checkpoint and files; tasks scored by another are redone."""
SHIPPED = Path(__file__).parent / "suites"
METRICS = {
    "multiple_choice": "InContextLearningMultipleChoiceAccuracy",
    "schema": "InContextLearningMultipleChoiceAccuracy",
    "language_modeling": "InContextLearningLMAccuracy",
}
"""Task type -> LLM Foundry's accuracy metric, the one computed here."""


def task_name(label: str, num_fewshot: int) -> str:
    """`copa/0-shot`: a task with its number of few-shot rows, as LLM Foundry names it."""
    return f"{label}/{num_fewshot}-shot"


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]
"""A task's name; used in file names."""


class IclTask(Strict):
    """One task: a JSONL file and how its rows become prompts. Defaults are LLM Foundry's."""

    label: Label
    dataset_uri: str = Field(min_length=1)
    """JSONL file: any fsspec URL, an absolute path, or a path below `OPENLM_HOME`."""
    num_fewshot: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """The task is scored once for each entry, with that many solved rows before the question."""
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    continuation_delimiter: str = " "
    """Between a question and its answer."""
    example_delimiter: str = "\n"
    """Between solved rows."""
    prompt_string: str = ""
    """Text at the very start of each prompt."""
    question_prelimiter: str = ""
    """Text before each question, those of the solved rows included."""
    metric_names: tuple[str, ...] = ()
    """Empty, or the accuracy metric of the task type."""
    has_categories: bool = False
    """Rows carry `category`: each is a task of its own, whose few-shot rows come from the same category."""
    fewshot_random_seed: int = 1234
    strip_dataset: bool = True
    """Strip white space around the string fields of a row and at the end of a context."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens; by default the model's."""
    batch_size: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, data: Any) -> Any:
        """Runs before unknown keys are refused, so that a task type with keys of its own is what gets reported."""
        if not isinstance(data, dict):
            return data
        kind = data.get("icl_task_type")
        if kind is not None and kind not in METRICS:
            raise ValueError(
                f"task {data.get('label')!r} has icl_task_type {kind!r}, which this harness does not score; "
                f"it scores {', '.join(METRICS)}. Leave the task out"
            )
        return {key: value for key, value in data.items() if value is not None}  # `prompt_string:` means the default

    @model_validator(mode="after")
    def _known_metrics(self) -> "IclTask":
        if other := [m for m in self.metric_names if m != self.metric]:
            raise ValueError(f"task {self.label!r} asks for {', '.join(other)}; {self.icl_task_type} has {self.metric}")
        if len(set(self.num_fewshot)) != len(self.num_fewshot):
            raise ValueError(f"task {self.label!r} repeats an entry of num_fewshot")
        return self

    @property
    def metric(self) -> str:
        return METRICS[self.icl_task_type]

    @property
    def rule(self) -> Literal["mean", "argmax"]:
        """What makes an item correct: lowest mean cross-entropy, or every token the argmax."""
        return "argmax" if self.icl_task_type == "language_modeling" else "mean"

    def settings(self) -> dict[str, Any]:
        """The fields that change results: all but where the file is and how many rows go into a batch."""
        exclude = {"dataset_uri", "num_fewshot", "metric_names", "batch_size"}
        return self.model_dump(mode="json", exclude=exclude)


class Suite(Strict):
    """Tasks that are scored together."""

    name: Label
    version: str = "v1"
    """Raise it when a change of the tasks makes scores incomparable with earlier ones."""
    icl_tasks: tuple[IclTask, ...] = Field(min_length=1)
    averages: dict[Label, tuple[str, ...]] = Field(default_factory=dict)
    """Name -> tasks (`copa/0-shot`) whose plain mean it is. The first is the headline; by default that of all tasks."""
    categories: dict[Label, tuple[str, ...]] = Field(default_factory=dict)
    """Name -> tasks whose centred accuracies it is the mean of, as in LLM Foundry's gauntlet."""
    random_baselines: Label = "v1"
    """Version of the accuracies of guessing that centred scores are measured from."""

    @model_validator(mode="after")
    def _known_tasks(self) -> "Suite":
        known = [task_name(task.label, k) for task, k in self.runs()]
        for kind in ("averages", "categories"):
            for name, members in getattr(self, kind).items():
                if not members or len(set(members)) < len(members):
                    raise ValueError(f"{kind}.{name} is empty or names a task twice")
                if unknown := [m for m in members if m not in known]:
                    raise ValueError(f"{kind}.{name} names {unknown[0]!r}, which is not a task of the suite")
        return self

    @property
    def headline(self) -> tuple[str, ...]:
        """The tasks of the headline average."""
        return next(iter(self.averages.values()), tuple(task_name(task.label, k) for task, k in self.runs()))

    @model_validator(mode="after")
    def _unique_labels(self) -> "Suite":
        labels = [task.label for task in self.icl_tasks]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two tasks are labelled {repeated[0]!r}; list the shots of one task in num_fewshot")
        return self

    @property
    def digest(self) -> str:
        """Fingerprint of the tasks' settings; file contents are not in it, each has its own hash."""
        tasks = [{**task.settings(), "num_fewshot": list(task.num_fewshot)} for task in self.icl_tasks]
        return fingerprint({"icl_tasks": tasks})

    def runs(self) -> Iterator[tuple[IclTask, int]]:
        """Each task with each of its numbers of few-shot rows."""
        return ((task, k) for task in self.icl_tasks for k in task.num_fewshot)


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite of a shipped name or of a YAML file; a file without `name` is named after itself.

    Raises:
        ConfigError: no such suite, bad YAML, an unknown key or task type, a bad value.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"there is no suite file {path}")
    else:
        path = SHIPPED / f"{text}.yaml"
        if text not in suite_names():
            near = difflib.get_close_matches(text, suite_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(suite_names())}"
            raise ConfigError(f"there is no suite {text!r}; {hint} A suite of your own is given by its .yaml path")
    document = expand_variables(read_mapping(path), path)
    try:
        return Suite(**{"name": path.stem, **document})
    except ValidationError as e:
        raise explain(e, f"suite {path}") from e
