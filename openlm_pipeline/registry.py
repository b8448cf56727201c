"""What can be chosen by name: one registry per kind, each name a class with its settings, documentation and costs.

A registry is filled by the modules of one package, which are imported when the first name is looked up; so they import
nothing heavy at their top. The packages stand here as strings, so that a recipe can be checked by rooms below them.
To add a choice: one new file in the package, with one class under `@REGISTRY.register("name")`. See docs/extending.md.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator

from openlm_pipeline.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name."""

    def __init__(self, kind: str, package: str, base: str) -> None:
        """
        Args:
            kind: what one of them is called in messages, such as `schedule`.
            package: the package whose modules register them.
            base: name of the class in that package that all of them extend.
        """
        self.kind, self.package, self._base = kind, package, base
        self._entries: dict[str, type[T]] = {}
        self._seen: set[str] = set()
        self._looked_in: list[str] = []

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Decorator that puts a class under `name`.

        Raises:
            ConfigError: the name is taken.
        """

        def put(entry: type[T]) -> type[T]:
            known = self._entries.setdefault(name, entry)
            if (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
                raise ConfigError(
                    f"two classes are registered as {self.kind} {name!r}: {_place(known)}, {_place(entry)}"
                )
            self._entries[name] = entry
            return entry

        return put

    def _load(self) -> None:
        """Import the package's modules, and check that each class that should be registered is."""
        package = importlib.import_module(self.package)
        if self._looked_in == (folders := list(package.__path__)):
            return
        modules = [f"{self.package}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
        for name in modules:
            if name not in self._seen:
                module = importlib.import_module(name)
                self._seen.add(name)
                base = getattr(package, self._base)
                for entry in vars(module).values():
                    is_one = inspect.isclass(entry) and entry.__module__ == name and issubclass(entry, base)
                    if (
                        is_one
                        and entry.__name__[0] != "_"
                        and entry is not base
                        and entry not in self._entries.values()
                    ):
                        self._seen.discard(name)
                        raise ConfigError(
                            f"no name is registered for the {self.kind} {_place(entry)}: put "
                            f'`@{self.kind.upper().replace(" ", "_")}S.register("NAME")` above it'
                        )
        self._looked_in = folders

    @property
    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def __getitem__(self, name: str) -> type[T]:
        """The class of a name.

        Raises:
            ConfigError: there is none; the message names the nearest.
        """
        try:
            return self._entries[self.check(name)]
        except ValueError as e:
            raise ConfigError(str(e)) from None

    def __iter__(self) -> Iterator[tuple[str, type[T]]]:
        return iter([(name, self._entries[name]) for name in self.names])

    def check(self, name: str) -> str:
        """`name`, if there is such a choice; for the types of settings.

        Raises:
            ValueError: there is none; the message names the nearest.
        """
        if name not in self._entries and name not in (names := self.names):  # which loads them
            raise ValueError(f"there is no {self.kind} {name!r}; {nearest(name, names)}")
        return name

    def lines(self) -> Iterator[str]:
        """Each name with the first line of its documentation."""
        for name, entry in self:
            yield f"{name}: {(inspect.getdoc(entry) or '').partition(chr(10))[0]}"


def _place(entry: type) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"


SCHEDULES: Registry[Any] = Registry("schedule", "openlm_pipeline.experiments.schedules", "Schedule")
OPTIMIZERS: Registry[Any] = Registry("optimizer", "openlm_pipeline.experiments.optimizers", "OptimizerChoice")
SAMPLINGS: Registry[Any] = Registry("sampling", "openlm_pipeline.ordering.samplings", "Sampling")
LAUNCHERS: Registry[Any] = Registry("launcher", "openlm_pipeline.runs.launchers", "Launcher")
RAW_FORMATS: Registry[Any] = Registry("raw format", "openlm_pipeline.corpus.formats", "RawFormat")
ENGINES: Registry[Any] = Registry("engine", "openlm_pipeline.tokenizers.engines", "Engine")
TASK_TYPES: Registry[Any] = Registry("task type", "openlm_pipeline.evaluation.task_types", "TaskType")
RULES: Registry[Any] = Registry("rule", "openlm_pipeline.evaluation.rules", "Rule")

ScheduleName = Annotated[str, AfterValidator(SCHEDULES.check)]
OptimizerName = Annotated[str, AfterValidator(OPTIMIZERS.check)]
SamplingName = Annotated[str, AfterValidator(SAMPLINGS.check)]
LauncherName = Annotated[str, AfterValidator(LAUNCHERS.check)]
EngineName = Annotated[str, AfterValidator(lambda name: name if name == "auto" else ENGINES.check(name))]
"""An engine, or `auto`, which chooses one."""
RuleName = Annotated[str, AfterValidator(RULES.check)]
