"""Several strings at once, looked for in texts."""

import re
from collections.abc import Iterable


class Strings:
    """Strings to be found in texts, at the speed of `in` where a text holds none of their beginnings."""

    def __init__(self, strings: Iterable[str]) -> None:
        longest_first = sorted(set(strings) - {""}, key=len, reverse=True)
        self._beginnings = {s[:2] for s in longest_first}
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._beginnings)

    def count(self, text: str) -> int:
        """How often one of them stands in a text; of two that overlap the first counts, and the longer at one place."""
        if not any(beginning in text for beginning in self._beginnings):
            return 0
        return sum(1 for _ in self._pattern.finditer(text))

    def are_in(self, text: str) -> bool:
        """Whether one of them stands in a text."""
        return any(beginning in text for beginning in self._beginnings) and bool(self._pattern.search(text))
