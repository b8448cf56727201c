"""JSON lines: one record per line, read in parts."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from openlm_pipeline.corpus import blocks as limits
from openlm_pipeline.corpus.formats import Found, RawFormat, Reading
from openlm_pipeline.corpus.line_content import LineContent, Raw, line_content, lines_of
from openlm_pipeline.errors import DataError
from openlm_pipeline.registry import RAW_FORMATS

_STRING_OR_CONSTANT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?(?:NaN|Infinity)', re.DOTALL)
_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


_ABSENT = object()


class BadText(Exception):
    """Why a record is bad."""


class NotJson(BadText):
    """It is no JSON, as the half of a record isn't."""


def record_of(data: bytes | None, text_key: str) -> tuple[str, dict[str, Any]]:
    """The text of a JSON record, and all of the record; `data` is None for one of more than `blocks.MAX_RECORD_BYTES`.

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
    text = _inner(value, text_key)
    if text is _ABSENT:
        raise BadText(f"no field {text_key!r}")
    if not isinstance(text, str):
        raise BadText(f"field {text_key!r} is a {_NAMES[type(text)]}, not a string")
    return text, value


def _inner(value: Any, key: str) -> Any:
    """A field of a record, by its own name or by the dots in it; `_ABSENT` where there is none."""
    if key in value:
        return value[key]
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _fields(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a record, None where it has none."""
    found = {key: _inner(record, key) for key in keys}
    return {key: None if value is _ABSENT else value for key, value in found.items()}


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


@RAW_FORMATS.register("json lines")
class JsonLines(RawFormat):
    """One JSON object per line."""

    suffixes = (".jsonl", ".ndjson")
    seekable = True

    def records(self, file: BinaryIO, reading: Reading) -> Iterator[Found]:
        content = line_content(file, reading)
        if content is None:
            return
        for raw in self._pieces(content, reading):
            reading.lines += 1
            if raw.data is not None and not raw.data.strip():
                continue
            try:
                text, record = record_of(raw.data, reading.text_key)
            except BadText as e:
                if not raw.ended and isinstance(e, NotJson):
                    raise DataError(
                        f"raw file {reading.url} is truncated: it ends inside line {raw.line}, which begins at byte "
                        f"{raw.offset} of its content ({e}). Fetch it again."
                    ) from None
                yield Found(raw.line, raw.offset, None, str(e), raw.size)
            else:
                yield Found(
                    raw.line, raw.offset, text, fields=_fields(record, reading.fields) if reading.fields else {}
                )

    def _pieces(self, content: LineContent, reading: Reading) -> Iterator[Raw]:
        """What should be JSON records."""
        return lines_of(content.blocks, content.offset, content.past_end)
