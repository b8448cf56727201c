"""Rules that say when an item is right; a task type names its rule."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.tasks import Item


class Rule(ABC):
    """A pure function from what the model gave for an item to columns of the per-item table."""

    generates: ClassVar[bool] = False
    """The model writes a text; else it gives the probabilities of texts that are there."""
    judges: ClassVar[bool] = True
    """Items are right or wrong; else `value` alone says how good each is."""

    @classmethod
    @abstractmethod
    def judge(cls, task: "IclTask", item: "Item", given: Any) -> dict[str, Any]:
        """`correct`, or `value` and `value_kind` where it judges none, and what else the rule finds.

        Args:
            given: a `RequestScore` for each of the item's requests, or where it generates the `Generated` text.
        """

    @classmethod
    def chance(cls, one_of_options: float) -> float:
        """Accuracy of guessing, where the suite's baselines name none.

        Args:
            one_of_options: mean over the items of 1 / options.
        """
        return 0.0
