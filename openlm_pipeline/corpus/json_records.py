"""The text of one JSON record."""

import contextlib
import re
from typing import Any

import orjson

from openlm_pipeline.corpus import blocks as limits

_STRING_OR_CONSTANT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?(?:NaN|Infinity)', re.DOTALL)


class BadText(Exception):
    """Why a record is bad."""


class NotJson(BadText):
    """It is no JSON, as the half of a record isn't."""


def text_of(data: bytes | None, text_key: str) -> str:
    """The text of a JSON record; `data` is None for one of more than `blocks.MAX_RECORD_BYTES`.

    Raises:
        BadText: it is no JSON object with a string at `text_key`.
    """
    if data is None:
        raise NotJson(f"longer than {limits.MAX_RECORD_BYTES >> 20} MiB")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as e:
        value = _without_constants(data, e)
    if not isinstance(value, dict):
        raise BadText(f"not a JSON object but a {_NAMES[type(value)]}")
    if text_key in value:
        text = value[text_key]
    else:
        text = value
        for key in text_key.split("."):
            if not isinstance(text, dict) or key not in text:
                raise BadText(f"no field {text_key!r}")
            text = text[key]
    if not isinstance(text, str):
        raise BadText(f"field {text_key!r} is a {_NAMES[type(text)]}, not a string")
    return text


def _without_constants(data: bytes, error: orjson.JSONDecodeError) -> Any:
    """A record that is JSON but for NaN and Infinity, which Python's own `json` writes and reads; they become null.

    Raises:
        NotJson: it is none either.
    """
    if b"NaN" in data or b"Infinity" in data:
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(_STRING_OR_CONSTANT.sub(lambda m: m[0] if m[0][:1] == b'"' else b"null", data))
    try:
        data.decode()
    except UnicodeDecodeError as u:
        raise NotJson(f"invalid UTF-8 at byte {u.start} of the record") from None
    raise NotJson(f"not valid JSON: {error}") from None


_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
