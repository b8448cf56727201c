"""Which rows of a task go together, so that they are one observation: those of one question, or of one passage."""

import hashlib
import os
from collections.abc import Sequence

_PASSAGE = 200
"""Characters that two questions have in common at least, where they have a passage in common."""
_MOST = 50
"""Rows of more than so many with one beginning have a template in common, not a passage."""


def clusters(questions: Sequence[str]) -> list[str | None]:
    """A name for each question that others go with; None for one that stands alone.

    Equal questions go together, and those whose beginning, at least half of the shorter one, is the same; what all
    questions begin with does not count.
    """
    start = len(os.path.commonprefix(questions)) if len(set(questions)) > 1 else 0
    order = sorted(range(len(questions)), key=lambda i: questions[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and _together(questions[groups[-1][-1]][start:], questions[i][start:]):
            groups[-1].append(i)
        else:
            groups.append([i])
    found: list[str | None] = [None] * len(questions)
    for group in groups:
        if len(group) > _MOST:
            same: dict[str, list[int]] = {}
            for i in group:
                same.setdefault(questions[i], []).append(i)
            parts = list(same.values())
        else:
            parts = [group]
        for part in parts:
            if len(part) > 1:
                name = hashlib.sha256(questions[part[0]].encode()).hexdigest()[:32]
                for i in part:
                    found[i] = name
    return found


def _together(first: str, second: str) -> bool:
    """Whether two neighbours in order are one question, or have a passage in common."""
    if first == second:
        return True
    shared = len(os.path.commonprefix([first, second]))
    return shared >= max(_PASSAGE, min(len(first), len(second)) / 2)
