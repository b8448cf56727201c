"""YAML files as people write them: one mapping, with `${VAR}` and `${VAR:-default}` for environment variables."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from openlm_pipeline.errors import ConfigError

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
