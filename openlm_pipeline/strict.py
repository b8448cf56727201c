"""Typed settings, frozen, that refuse unknown keys; and the YAML files that people write them in."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openlm_pipeline.errors import ConfigError


class Strict(BaseModel):
    """A frozen pydantic model without infinities; an unknown key is an error that suggests the key that was meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that it may have."""
        return list(cls.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in (keys := cls.keys()):
                    near = difflib.get_close_matches(str(key), keys, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(keys) or 'none'}"
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


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times faster, where PyYAML has it
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its variables not yet replaced.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
    """
    try:
        document = yaml.load(path.read_text(), Loader=_LOADER)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a YAML mapping")
    return document


def expand_variables(value: Any, path: Path) -> Any:
    """Put environment variables into all strings of a document.

    Raises:
        ConfigError: a variable without a default is not set.
    """

    def replace(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if (found := os.environ.get(name) or default) is None:
            raise ConfigError(f"{path} needs the environment variable {name}, which is not set")
        return found

    if isinstance(value, str):
        return _VARIABLE.sub(replace, value)
    if isinstance(value, dict):
        return {k: expand_variables(v, path) for k, v in value.items()}
    if isinstance(value, list):
        return [expand_variables(v, path) for v in value]
    return value
