"""Typed settings, frozen, that refuse unknown keys; and the YAML files that people write them in."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openlm_pipeline.errors import ConfigError, nearest, public


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
                    raise ValueError(f"unknown key {key!r}; {nearest(str(key), keys, 'valid keys')}")
        return data


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times faster, where PyYAML has it
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_MOST_VALUES = 1_000_000
_MOST_ERRORS = 20
"""Told of one document: each is looked for in its text."""
SECRET_NAME = re.compile(r"(.*_)?(KEY|TOKEN|SECRET|PASSWORD|WEBHOOK)S?(_.*)?", re.IGNORECASE)
"""Whole names of environment variables that hold secrets."""
_CREDENTIALS = re.compile(
    r"://[^\s/@]*:[^\s/@]*@"
    r"|://\S*[?&]([\w.]+-)*(sig|signature|secret|password|token|credential|(api_?|access_?)?key|AWSAccessKeyId)=",
    re.IGNORECASE,
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its variables not yet replaced.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except OSError as e:
        raise ConfigError(f"{path} can't be read: {e.strerror}") from e
    except yaml.MarkedYAMLError as e:
        line = f" ({path}:{e.problem_mark.line + 1})" if e.problem_mark else ""
        raise ConfigError(f"{path} is not valid YAML: {e.problem}{line}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: no UTF-8, or a date such as 2020-13-45
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a YAML mapping")
    if _num_values(document, {}) > _MOST_VALUES:
        raise ConfigError(f"{path}: its aliases stand for more than {_MOST_VALUES:,} values")
    return document


def _num_values(value: Any, known: dict[int, float]) -> float:
    """Values in a document whose aliases are written out; infinite for one that contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(value)]


Origin = tuple[Path | str, str]
"""A file, or the words for what is none; and its YAML text."""


def place(origins: Sequence[Origin], loc: Sequence[object], message: str = "") -> str:
    """Where the key of an error stands, such as ` (mine.yaml:7)`; empty where no origin has it.

    Args:
        origins: the first that has the key is named.
        loc: the keys to the value that is wrong.
        message: it may name a key below `loc`, or quote a value.
    """
    words = [word.strip(".").split(".") for word in re.findall(r"[A-Za-z_][\w.-]*", message.partition(";")[0])]
    paths = [*([*loc, *word] for word in words), *(loc[:n] for n in range(len(loc), 0, -1))]
    nodes = [(name, yaml.compose(text, Loader=_LOADER)) for name, text in origins]
    found = [(name, line) for keys in paths for name, node in nodes if (line := _line(node, keys))]
    for value in re.findall(r"'[^']+'|\$\{\w+", message):
        lines = ((name, n, line) for name, text in origins for n, line in enumerate(text.splitlines(), 1))
        found += [(name, n) for name, n, line in lines if value.strip("'") in line]
    return next((f" ({name}:{line})" if isinstance(name, Path) else f" ({name})" for name, line in found), "")


def _line(node: yaml.Node, keys: Sequence[object]) -> int | None:
    """The line on which the last of the keys stands, or None where one is missing."""
    line = None
    for key in map(str, keys):
        if isinstance(node, yaml.MappingNode):
            found = [(name.start_mark.line + 1, value) for name, value in node.value if name.value == key]
        else:
            items = node.value if isinstance(node, yaml.SequenceNode) else []
            found = [(value.start_mark.line + 1, value) for i, value in enumerate(items) if str(i) == key]
        if not found:
            return None
        line, node = found[-1]
    return line


def explain(error: ValidationError, where: str, origins: Sequence[Origin] = ()) -> ConfigError:
    """One line for each thing that is wrong, with its path in the document `where`, and its place in `origins`."""
    lines = []
    errors = error.errors()
    for item in errors[:_MOST_ERRORS]:
        depth = len(item["loc"])
        if item["type"] == "too_short" and any(e["loc"][:depth] == item["loc"] for e in errors if e is not item):
            continue  # pydantic counts only the items that are right
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append((f"{path}: {message}" if path else message) + place(origins, item["loc"], message))
    if len(errors) > _MOST_ERRORS:
        lines.append(f"and {len(errors) - _MOST_ERRORS:,} more")
    return ConfigError(f"{where} is not valid:" + (f" {lines[0]}" if len(lines) == 1 else "\n  ".join(["", *lines])))


def expand_variables(value: Any, path: Path, prefix: str = "") -> Any:
    """Put environment variables into all strings of a document.

    Args:
        prefix: how their names begin; those of a file that strangers share must not reach others.

    Raises:
        ConfigError: a variable without a default is not set, or has another name; or it holds a secret, by its name,
            or a URL holds credentials, which would be sent to its server, shown and stored.
    """

    def replace(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if not name.startswith(prefix):
            raise ConfigError(f"{path}: only variables {prefix}* are put in here, not ${{{name}}}; rename it")
        if (found := os.environ.get(name) or default) is None:
            raise ConfigError(f"{path} needs the environment variable ${{{name}}}, which is not set")
        return found

    if isinstance(value, str):
        expanded = _VARIABLE.sub(replace, value)
        secret = next((m[0] for m in _VARIABLE.finditer(value) if SECRET_NAME.fullmatch(m[1])), None)
        if secret and "://" not in expanded:
            raise ConfigError(
                f"{path}: {secret} would be put in and stored with the run; in a shell line write "
                f"${secret[2:-1].partition(':')[0]}, which launcher.slurm.environment takes along by its name"
            )
        if _CREDENTIALS.search(expanded) or secret:
            raise ConfigError(
                f"{path}: the URL {public(value)} holds credentials, which would be sent, shown and stored with it; "
                "give them in the environment, as the library for its protocol takes them"
            )
        return expanded
    if isinstance(value, dict):
        return {k: expand_variables(v, path, prefix) for k, v in value.items()}
    if isinstance(value, list):
        return [expand_variables(v, path, prefix) for v in value]
    return value
