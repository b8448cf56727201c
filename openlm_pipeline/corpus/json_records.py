"""The text of one JSON record."""

import orjson

from openlm_pipeline.corpus import blocks as limits


class BadText(Exception):
    """Why a record is bad."""


def text_of(data: bytes | None, text_key: str) -> str:
    """The text of a JSON record; `data` is None for one of more than `blocks.MAX_RECORD_BYTES`.

    Raises:
        BadText: it is no JSON object with a string at `text_key`.
    """
    if data is None:
        raise BadText(f"longer than {limits.MAX_RECORD_BYTES >> 20} MiB")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as e:
        try:
            data.decode()
        except UnicodeDecodeError as u:
            raise BadText(f"invalid UTF-8 at byte {u.start} of the record") from None
        raise BadText(f"not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise BadText(f"not a JSON object but a {_NAMES[type(value)]}")
    if text_key not in value:
        raise BadText(f"no field {text_key!r}")
    text = value[text_key]
    if not isinstance(text, str):
        raise BadText(f"field {text_key!r} is a {_NAMES[type(text)]}, not a string")
    return text


_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
