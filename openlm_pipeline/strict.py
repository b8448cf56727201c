"""The base of every typed setting: frozen, refuses unknown keys, and names the nearest valid one."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openlm_pipeline.errors import ConfigError


class Strict(BaseModel):
    """A frozen pydantic model; an unknown key is an error that suggests the key that was probably meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r}; {hint}")
        return data


def explain(error: ValidationError, where: str) -> ConfigError:
    """One line for each thing that is wrong, with its path in the document `where`."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"  {path}: {message}" if path else f"  {message}")
    return ConfigError(f"{where} is not valid:\n" + "\n".join(lines))
