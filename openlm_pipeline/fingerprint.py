"""Fingerprints are trees of fields, so that a difference can be named.

A tree holds only what changes results. Paths, devices, worker counts and dates never go in. Values are str, int,
float, bool, None, lists and dicts with str keys; anything else is refused rather than turned into a string.
"""

import hashlib
import json
import math
from typing import Any

Tree = dict[str, Any]


def _check(value: Any, path: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"fingerprint field {path} is {value}, which is not a stable value")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"fingerprint field {path} has the key {key!r}; keys must be str")
            _check(item, f"{path}.{key}" if path else key)
        return
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, f"{path}[{i}]")
        return
    raise TypeError(f"fingerprint field {path} is a {type(value).__name__}, which has no stable form")


def fingerprint(tree: Tree) -> str:
    """sha256 hex digest of the canonical JSON of `tree`.

    Raises:
        TypeError: a value has no stable form.
    """
    _check(tree, "")
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def short(digest: str) -> str:
    """The first 12 characters of a digest, for people to read."""
    return digest[:12]


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in _leaves(value[key], f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value:
        return {k: v for i, item in enumerate(value) for k, v in _leaves(item, f"{path}[{i}]").items()}
    return {path: value}


def differences(old: Tree, new: Tree) -> list[str]:
    """Each changed field as one line: `train.lr 0.0003 -> 0.0002`; an absent side reads `(absent)`."""
    a, b = _leaves(old, ""), _leaves(new, "")
    lines = []
    for path in [*a, *(p for p in b if p not in a)]:
        # As JSON, because Python holds 1, 1.0 and True for equal and a fingerprint does not.
        before, after = (json.dumps(x[path], ensure_ascii=False) if path in x else "(absent)" for x in (a, b))
        if before != after:
            plain = before.strip('"'), after.strip('"')
            lines.append(f"{path} {' -> '.join(plain if plain[0] != plain[1] else (before, after))}")
    return lines
