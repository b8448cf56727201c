"""Token counts as people write them: `250B`, `1.5M`, `2_000_000`; and milestones as names."""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)", re.IGNORECASE)


def parse_tokens(value: Any) -> int:
    """Turn `250B`, `"1.5M"`, `2_000_000` or an int into a number of tokens (K, M, B, T are powers of 1000).

    Raises:
        ValueError: not a whole, non-negative number of tokens.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _PATTERN.fullmatch(str(value).strip())
    if match:
        number = Decimal(match[1].replace("_", "")) * _SCALE[match[2].upper()]
        if number == int(number):
            return int(number)
    raise ValueError(f"{value!r} is not a number of tokens; write for example 250B, 1.5M or 2000000")


def format_tokens(tokens: int, digits: int | None = None) -> str:
    """The shortest exact form of a count: 1500000 -> `1.5M`, 250000000000 -> `250B`; or rounded to `digits`."""
    if digits and tokens:
        tokens = round(tokens, digits - len(str(tokens)))
    for unit in ("T", "B", "M", "K"):
        if tokens >= _SCALE[unit]:
            text = f"{Decimal(tokens) / _SCALE[unit]:f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + unit
    return str(tokens)


def format_bytes(number: float) -> str:
    """1500000 -> `1.5 MB` (powers of 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"


def format_seconds(seconds: float) -> str:
    """75 -> `1 min 15 s`, 7300 -> `2 h 1 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def milestone_label(tokens: int) -> str:
    """Name of a milestone in paths and asset keys, of letters and digits only: 250B -> `t0250B`, 1.5M -> `t1500K`."""
    for unit in ("T", "B", "M", "K", ""):
        if tokens % _SCALE[unit] == 0 and tokens >= _SCALE[unit]:
            return f"t{tokens // _SCALE[unit]:04d}{unit}"
    raise ValueError("a milestone has at least one token")


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(le=10**18)]
