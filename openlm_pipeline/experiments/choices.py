"""What a choice of `training` made by name has: the settings it reads, and settings of its own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import ValidationError

from openlm_pipeline.registry import OPTIMIZERS, SCHEDULES
from openlm_pipeline.strict import Strict, explain

if TYPE_CHECKING:
    from openlm_pipeline.experiments.spec import Training


class Choice:
    """Base of schedules and optimizers. Its documentation's first line is what lists of choices show."""

    field: ClassVar[str]
    """The field of `Training` that names it."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `Training` that it reads."""

    class Settings(Strict):
        """Settings of its own, which a recipe gives as `training.FIELD_settings`; by default there are none."""

    def __init__(self, training: "Training") -> None:
        """
        Raises:
            ConfigError: `training.FIELD_settings` are not settings of this choice; the nearest key is named.
        """
        self.training = training
        try:
            self.own = self.Settings(**getattr(training, f"{self.field}_settings"))
        except ValidationError as e:
            name = getattr(training, self.field)
            raise explain(e, f"training.{self.field}_settings of {self.field} {name!r}") from e


def unread_settings(training: "Training") -> Iterator[str]:
    """One sentence per setting with a value of its own that neither the schedule nor the optimizer of `training` reads.

    Only settings that another schedule or optimizer reads can be unread; the rest of `Training` is the trainer's.
    """
    registries = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS}
    chosen = {kind: registry[getattr(training, kind)] for kind, registry in registries.items()}
    read = {name for choice in chosen.values() for name in choice.settings}
    for kind, registry in registries.items():
        readers: dict[str, list[str]] = {}
        for name, choice in registry:
            for setting in choice.settings:
                readers.setdefault(setting, []).append(name)
        for setting, by in readers.items():
            field = type(training).model_fields[setting]
            if setting not in read and getattr(training, setting) != field.default:
                yield (
                    f"training.{setting} has no effect: the {kind} {getattr(training, kind)!r} does not read it, "
                    f"{', '.join(by)} would"
                )
