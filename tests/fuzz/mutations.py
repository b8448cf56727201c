"""Mutations of files, each a function of a generator and bytes: of bytes, of texts, and of what JSON means."""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

NASTY = (
    b"\x00", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00", b"\xed\xa0\x80", b"\\ud800",
    b"\xef\xbb\xbf", b"\r\n", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"[" * 3000, b'{"a":' * 3000, b"../../x",
    b"${HOME}", b"!!python/name:os.system", b"&a [*a, *a]", b"*a", b"<<: *a", b": ", b"- ", b"\x1b[31m", b'"', b"{}",
    b"null", b"true", b"-1", b"0", b"18446744073709551616", b"2020-13-45", b"0x1F", b"%", b"@", b"|", b">", b"?",
    b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"PAR1", b"PK\x03\x04", b"\x80\x02", b"cos\nsystem\n", b"R.", b"}]",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, -(2**63), 2**64, 1e308, 0.5, "", "x", "\x00", "\ud800", "../x",
    "a" * 5000, "${HOME}", "(a|aa)+$", "[", [], {}, [[]], [None], {"": {}}, "250B", "NaN",
    "<|endoftext|>", "/", ".", "é",
)  # fmt: skip

Mutation = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    at, new = rng.randrange(len(data)), rng.choice((*NASTY, rng.randbytes(4)))
    return data[:at] + new + data[at + len(new) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(NASTY) * rng.choice((1, 1, 1, 20)) + data[at:]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _stretch(rng: random.Random, data: bytes) -> tuple[int, int]:
    begin = rng.randrange(len(data))
    return begin, min(len(data), begin + rng.choice((1, 4, 30, 500, 5000)))


def drop(rng: random.Random, data: bytes) -> bytes:
    begin, end = _stretch(rng, data)
    return data[:begin] + data[end:]


def duplicate(rng: random.Random, data: bytes) -> bytes:
    begin, end = _stretch(rng, data)
    return data[:begin] + data[begin:end] * rng.choice((2, 2, 3, 40)) + data[end:]


def splice(rng: random.Random, data: bytes) -> bytes:
    begin, end = _stretch(rng, data)
    at = rng.randrange(len(data))
    return data[:at] + data[begin:end] + data[at:]


BYTES: tuple[Mutation, ...] = (flip, flip, overwrite, insert, cut, drop, duplicate, splice)


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """One mutation of bytes, or a few."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(BYTES)(rng, data) if data else data
    return data[: 100 << 10]


def of_value(rng: random.Random, value: Any) -> Any:
    """A document of JSON or YAML with one of its values, keys or lists changed, or a few."""
    value = deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(islice(_places(value), 2000))
        if not places:
            return value
        owner, key = rng.choice(places)
        what = rng.randrange(6)
        if what == 0:
            del owner[key]
        elif what == 1 and isinstance(owner, dict):
            owner[str(rng.choice(VALUES))] = owner.pop(key)
        elif what == 2:
            owner[key] = [deepcopy(owner[key]) for _ in range(rng.choice((1, 2, 300)))]
        elif what == 3:
            other, at = rng.choice(places)
            if isinstance(other, dict) and at in other:
                owner[key] = deepcopy(other[at])
        elif what == 4 and isinstance(owner[key], (int, float)):
            owner[key] = owner[key] * rng.choice((-1, 0, 1e3, 1e9, 1e30))
        else:
            owner[key] = deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (owner, key) in a document, of long lists and mappings the first 200."""
    waiting = [value]
    while waiting:
        owner = waiting.pop()
        if isinstance(owner, (dict, list)):
            for key, inner in list(owner.items() if isinstance(owner, dict) else enumerate(owner))[:200]:
                yield owner, key
                waiting.append(inner)
