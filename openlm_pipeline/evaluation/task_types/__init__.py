"""Task types: `icl_task_type` of a suite names one. What a row holds, and how it becomes a prompt.

The prompt rules, their oddities included, are those of llm-foundry 0.22's
`eval/datasets/in_context_learning_evaluation.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, StringConstraints

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask

Text = Annotated[str, StringConstraints(min_length=1)]


class RowFields(BaseModel):
    """Fields of a row that a task type uses; others are let be."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    category: Text | None = None


@dataclass(frozen=True)
class Options:
    """A row as contexts and continuations, one of which is a single text. Options are all pairs of the two."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    """In generation the one text that answers the question in few-shot prompts, its chain of thought included."""
    gold: int = 0
    """Index of the right option; 0 where there is only one."""
    answers: tuple[str, ...] = ()
    """Answer and aliases as they stand in the file; in generation only."""
    responses: tuple[str, ...] = ()
    """Each of the answers after the chain of thought, as it stands in the file."""
    has_chain_of_thought: bool = False


class TaskType(ABC):
    """How the rows of a task are read and asked."""

    Fields: ClassVar[type[RowFields]]
    """What a row must have."""
    metric: ClassVar[str]
    """What its accuracy is called."""
    rule: ClassVar[str]
    """The name in `RULES` that says when an item is right."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `IclTask` that it has and the other types have not."""
    whole_texts: ClassVar[bool] = False
    """Each row is one text, scored token by token as it stands; there is no question and no solved row."""
    old_names: ClassVar[tuple[str, ...]] = ()
    old_metrics: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def options(cls, fields: Any, task: "IclTask") -> Options:
        """A row's `Fields` as contexts and continuations.

        Raises:
            ValueError: the row cannot be asked.
        """

    @classmethod
    def question(cls, task: "IclTask", context: str, preceded: bool) -> str:
        """A question up to its answer, as the solved rows have it.

        Args:
            preceded: text stands before it.
        """
        delimiter = task.example_delimiter if preceded else ""
        return f"{delimiter}{task.question_prelimiter}{context}{task.continuation_delimiter}"

    @classmethod
    def contexts(cls, task: "IclTask", contexts: tuple[str, ...], preceded: bool) -> tuple[str, ...]:
        """The texts between the preamble and the continuation of the row that is asked."""
        texts = (cls.question(task, context, preceded) for context in contexts)
        return tuple(text.rstrip() if task.strip_dataset else text for text in texts)


def stripped(text: str, task: "IclTask") -> str:
    """LLM Foundry strips the string fields of a row where `strip_dataset` says so; texts in lists stay as they are."""
    return text.strip() if task.strip_dataset else text
