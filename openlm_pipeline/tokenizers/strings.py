"""Several strings at once, looked for in texts."""

import re
from collections.abc import Iterable


class Strings:
    """Strings to be found in texts, at the speed of `in` where a text holds none of their beginnings."""

    def __init__(self, strings: Iterable[str]) -> None:
        longest_first = sorted(set(strings) - {""}, key=len, reverse=True)
        self._beginnings = {s[:2] for s in longest_first}
        self._rare = {min(s, key=_commonness) for s in longest_first}
        """A character of each; looking for one character is many times as fast as for two."""
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._beginnings)

    def count(self, text: str) -> int:
        """How often one of them stands in a text; of two that overlap the first counts, and the longer at one place."""
        return sum(1 for _ in self._pattern.finditer(text)) if self._may_be_in(text) else 0

    def are_in(self, text: str) -> bool:
        """Whether one of them stands in a text."""
        return self._may_be_in(text) and bool(self._pattern.search(text))

    def _may_be_in(self, text: str) -> bool:
        return any(c in text for c in self._rare) and any(beginning in text for beginning in self._beginnings)


def _commonness(character: str) -> int:
    """How likely a character is to stand in a text, from 0."""
    if not character.isascii() or character in "|~^`\\":
        return 0
    return 2 if character.isalnum() or character.isspace() else 1
