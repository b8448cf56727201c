"""Suites: which tasks score a model, in LLM Foundry's `icl_tasks` YAML format.

Keys and defaults are those of llm-foundry 0.22; `name` and `version` at the top are ours. A setting that this harness
would not follow is refused, never ignored (`batch_size` alone is read and unused: it changes no result). Whole
configuration files of OpenLM's and LLM Foundry's evaluation scripts load too: their keys that only say how to run are
left out and named in `Suite.ignored`.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from openlm_pipeline.errors import ConfigError, nearest
from openlm_pipeline.evaluation.suite_files import read_suite_file, suite_path
from openlm_pipeline.evaluation.task_types import TaskType
from openlm_pipeline.fingerprint import Neutral, fingerprint, settings_tree
from openlm_pipeline.registry import RULES, TASK_TYPES, RuleName
from openlm_pipeline.strict import Strict, explain

HARNESS_VERSION = "2"
"""Raised whenever prompts or scores change for the same checkpoint and files; tasks scored by another are redone."""


_ROWS_SEED = 1234
_LONGEST_NAME = 100


def task_name(label: str, num_fewshot: int) -> str:
    """`copa/0-shot`: a task with its number of few-shot rows, as LLM Foundry names it."""
    return f"{label}/{num_fewshot}-shot"


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]
"""A task's name; used in file names."""


class GenerationSettings(Strict):
    """LLM Foundry's `generation_kwargs`, as far as the text stays the greedy one."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens written at most; by default those of the file's longest answer."""
    do_sample: Literal[False] = False
    num_beams: Literal[1] = 1
    num_return_sequences: Literal[1] = 1
    use_cache: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    """These four are read and not used: without sampling they change no text."""


class IclTask(Strict):
    """One task: a JSONL file and how its rows become prompts. Defaults are LLM Foundry's."""

    label: Label
    dataset_uri: str = Field(min_length=1)
    """JSONL file: any fsspec URL, an absolute path, or one below `OPENLM_HOME`, else below the working folder."""
    num_fewshot: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """The task is scored once for each entry, with that many solved rows before the question."""
    icl_task_type: str
    """A name in `TASK_TYPES`, or an old name of one, such as `question_answering`."""
    continuation_delimiter: str = " "
    """Between a question and its answer."""
    example_delimiter: str = "\n"
    """Between solved rows."""
    prompt_string: str = ""
    """Text at the very start of each prompt."""
    question_prelimiter: str = ""
    """Text before each question, those of the solved rows included; also called `prelimiter`."""
    metric_names: tuple[str, ...] = ()
    """Empty, or the accuracy metric of the task type."""
    has_categories: bool = False
    """Rows carry `category`: each is a task of its own, whose few-shot rows come from the same category."""
    category_names: tuple[str, ...] = ()
    """The categories that the file must have; by default whatever it has."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """The file's hash; any other file is refused."""
    published_sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$"), Neutral(None)] = None
    """Hash of the file that published scores are of; of any other the scores say so."""
    cot_delimiter: str = ""
    """In generation: between a chain of thought and the answer."""
    early_stopping_criteria: tuple[str, ...] = ()
    """In generation: texts that end the answer."""
    do_normalization: bool = True
    """In generation: compare without case, punctuation and articles."""
    generation_kwargs: GenerationSettings = GenerationSettings()
    fewshot_random_seed: int = 1234
    strip_dataset: bool = True
    """Strip white space around the string fields of a row and at the end of a context."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens; by default the model's."""
    scored_by: Annotated[RuleName | None, Neutral(None)] = None
    """Rule that says when an item is right; by default the task type's."""
    cluster: Annotated[str, StringConstraints(min_length=1), Neutral("cluster")] = "cluster"
    """Field that is the same in rows that go together, beside those of one question or passage, which are found."""
    chance: Annotated[float | None, Field(ge=0, lt=1), Neutral(None)] = None
    """Accuracy of guessing; by default that of the suite's `random_baselines`, else the mean of 1 / options."""
    batch_size: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, data: Any) -> Any:
        """Runs before unknown keys are refused, so that a task type with keys of its own is what gets reported."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}  # `prompt_string:` means the default
        if "prelimiter" in data:
            if "question_prelimiter" in data:
                raise ValueError(
                    f"task {data.get('label')!r} has both question_prelimiter and prelimiter, its other name"
                )
            data["question_prelimiter"] = data.pop("prelimiter")
        types = dict(TASK_TYPES)
        kind = data.get("icl_task_type")
        if kind is not None:
            kind = next((name for name, known in types.items() if kind in known.old_names), kind)
            if str(kind) not in types:
                raise ValueError(
                    f"task {data.get('label')!r} has icl_task_type {kind!r}, which this harness does not score; "
                    f"{nearest(str(kind), types, 'it scores')} Leave the task out"
                )
            data["icl_task_type"] = kind
        if isinstance(metrics := data.get("metric_names"), (list, tuple)):
            now = {old: known.metric for known in types.values() for old in known.old_metrics}
            data["metric_names"] = [now.get(m, m) for m in metrics]
        return data

    @model_validator(mode="after")
    def _known_metrics(self) -> "IclTask":
        if other := [m for m in self.metric_names if m != self.metric]:
            raise ValueError(f"task {self.label!r} asks for {', '.join(other)}; {self.icl_task_type} has {self.metric}")
        kinds = [(RULES[rule].generates, RULES[rule].judges) for rule in (self.rule, self.type.rule)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"task {self.label!r}: rule {self.rule!r} does not judge what {self.icl_task_type} has; one judges "
                "written texts, or none, the other probabilities. Leave scored_by out"
            )
        if len(set(self.num_fewshot)) != len(self.num_fewshot):
            raise ValueError(f"task {self.label!r} repeats an entry of num_fewshot")
        if self.type.whole_texts and (self.num_fewshot != (0,) or self.prompt_string):
            raise ValueError(f"task {self.label!r}: {self.icl_task_type} has num_fewshot [0] and no prompt_string")
        owners = {field: name for name, known in TASK_TYPES for field in known.settings}
        if unused := sorted(self._settings_of_other_types() & self.model_fields_set):
            raise ValueError(f"task {self.label!r}: {unused[0]} goes with {owners[unused[0]]} only")
        if odd := [c for c in self.early_stopping_criteria if not _matches_itself(c)]:
            raise ValueError(
                f"task {self.label!r}: LLM Foundry reads early_stopping_criteria {odd[0]!r} as a regular expression "
                "in one place and as plain text in another; give one that is the same in both"
            )
        if self.category_names and not self.has_categories:
            raise ValueError(f"task {self.label!r} has category_names without has_categories")
        return self

    @property
    def type(self) -> type[TaskType]:
        return TASK_TYPES[self.icl_task_type]

    @property
    def metric(self) -> str:
        """LLM Foundry's accuracy metric of the task type, the one computed here."""
        return self.type.metric

    @property
    def rule(self) -> str:
        """The name in `RULES` of what makes an item correct."""
        return self.scored_by or self.type.rule

    def _settings_of_other_types(self) -> set[str]:
        return {name for _, known in TASK_TYPES for name in known.settings}.difference(self.type.settings)

    def settings(self) -> dict[str, Any]:
        """The fields that change results: all but where the file is and how many rows go into a batch."""
        exclude = {"dataset_uri", "num_fewshot", "metric_names", "batch_size", "sha256", "category_names", "chance"}
        exclude.add("published_sha256")
        found = settings_tree(self, exclude | self._settings_of_other_types())
        if "generation_kwargs" in found:
            found["generation_kwargs"] = self.generation_kwargs.max_new_tokens  # the one that changes a text
        return found


def _matches_itself(text: str) -> bool:
    """Whether a text, taken as a regular expression, is found where the text is."""
    try:
        return bool(text) and re.fullmatch(text, text) is not None
    except re.error:
        return False


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
    centred: dict[Label, Label] = Field(default_factory=dict)
    """Name -> version of random baselines: means of the headline's tasks centred by it, of which the first is the
    headline then. By default there is one, by `random_baselines`, beside the headline."""
    random_baselines: Label | None = None
    """Version of the accuracies of guessing, by label, that centred scores are measured from; else the rows say."""
    ignored: tuple[str, ...] = Field(default=(), exclude=True)
    """Keys of the file that only said how to run."""

    @model_validator(mode="after")
    def _known_tasks(self) -> "Suite":
        labels = [task.label for task in self.icl_tasks]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two tasks are labelled {repeated[0]!r}; list the shots of one task in num_fewshot")
        known = [task_name(task.label, k) for task, k in self.runs()]
        for kind in ("averages", "categories"):
            for name, members in getattr(self, kind).items():
                if not members or len(set(members)) < len(members):
                    raise ValueError(f"{kind}.{name} is empty or names a task twice")
                if not all(RULES[t.rule].judges for t, k in self.runs() if task_name(t.label, k) in members):
                    raise ValueError(f"{kind}.{name} is of accuracies, which a task of it does not have")
                if unknown := [m for m in members if m not in known]:
                    raise ValueError(f"{kind}.{name} names {unknown[0]!r}, which is not a task of the suite")
        return self

    @property
    def headline(self) -> tuple[str, ...]:
        """The tasks of the headline average: by default all, or all that have accuracies if some have none."""
        runs = list(self.runs())
        judged = [(task, k) for task, k in runs if RULES[task.rule].judges]
        return next(iter(self.averages.values()), tuple(task_name(task.label, k) for task, k in judged or runs))

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the tasks' settings; file contents are not in it, each has its own hash."""
        tasks = [{**task.settings(), "num_fewshot": list(task.num_fewshot)} for task in self.icl_tasks]
        return fingerprint({"icl_tasks": tasks})

    def runs(self) -> Iterator[tuple[IclTask, int]]:
        """Each task with each of its numbers of few-shot rows."""
        return ((task, k) for task in self.icl_tasks for k in task.num_fewshot)


@dataclass(frozen=True)
class Part:
    """Some tasks of a suite, or some rows of each: quicker than the whole, and filed apart from it."""

    tasks: tuple[str, ...] = ()
    """Labels; none means all."""
    limit: int | None = None
    """Rows of a task, drawn by a fixed seed; more of them have these among them."""

    def of(self, suite: Suite) -> Suite:
        """The suite with these tasks alone, whose mean is then named after how many they are.

        Raises:
            ConfigError: it has no such task.
        """
        labels = [task.label for task in suite.icl_tasks]
        for name in self.tasks:
            if name not in labels:
                raise ConfigError(f"suite {suite.name} has no task {name!r}; {nearest(name, labels, 'it has')}")
        if not self.tasks:
            return suite
        kept = tuple(task for task in suite.icl_tasks if task.label in self.tasks)
        of_these = tuple(task_name(task.label, k) for task in kept for k in task.num_fewshot)
        averages = {f"{len(of_these)}_of_{len(list(suite.runs()))}_tasks": of_these}
        return suite.model_copy(update={"icl_tasks": kept, "averages": averages, "categories": {}})

    def options(self, device: str | None) -> list[str]:
        """This part, and a device, as `openlm evaluate` takes them."""
        given = {"--tasks": ",".join(self.tasks), "--limit": self.limit, "--device": device}
        return [word for option, value in given.items() if value for word in (option, str(value))]

    def folder(self, whole: Path) -> Path:
        """Where its scores are, beside those of the whole suite."""
        if not self.tasks and self.limit is None:
            return whole
        names = "+".join(sorted(self.tasks)) or "all"
        if len(names) > _LONGEST_NAME:
            names = fingerprint({"tasks": sorted(self.tasks)})[:16]
        return whole / "parts" / (names if self.limit is None else f"{names}-{self.limit}_rows")

    def rows(self, categories: Sequence[str | None]) -> set[int] | None:
        """The numbers of the rows to score, of each category its share; None for all.

        Args:
            categories: of each row of a task's file.
        """
        if self.limit is None or self.limit >= len(categories):
            return None
        members: dict[str | None, list[int]] = {}
        for i, category in enumerate(categories):
            members.setdefault(category, []).append(i)
        return {
            i
            for rows in members.values()
            for i in random.Random(_ROWS_SEED).sample(rows, len(rows))[: -(-self.limit * len(rows) // len(categories))]
        }


WHOLE = Part()


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite of a shipped name or of a YAML file; a file without `name` is named after itself.

    What a file may have beside a suite's own fields: `suite_files.read_suite_file`.

    Raises:
        ConfigError: no such suite, bad YAML, an unknown key or task type, a bad value, or a key that would change
            scores and is not followed.
    """
    path = suite_path(str(name_or_path))
    document, ignored = read_suite_file(path)
    try:
        return Suite(**{"name": path.stem, **document, "ignored": ignored})
    except ValidationError as e:
        raise explain(e, f"suite {path}", [(path, path.read_text(encoding="utf-8"))]) from e
