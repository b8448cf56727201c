"""The values of OpenLM's flags, from a command line or the file of `--config`; refused flags end here, with reasons."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.strict import read_mapping
from train.openlm.flag_table import FLAGS, GROUPS, Flag


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """
        Raises:
            ConfigError: always, with the flag that was probably meant.
        """
        hint = ""
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(unknown[1], [f"--{f.name}" for f in FLAGS.values()], n=1)
            hint = f"; did you mean {near[0]}?" if near else " (`python -m train --help` lists all)"
        raise ConfigError(f"OpenLM's flags: {message}{hint}")


def make_parser() -> argparse.ArgumentParser:
    """A parser of all flags of OpenLM; those that are refused are parsed too."""
    parser = _Parser(
        prog="torchrun -m train",
        description="OpenLM's flags.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text = f"refused: {flag.note}" if flag.kind == "refused" else flag.note
            default = flag.default if flag.default not in (None, False, "") else None
            text = text.replace("%", "%%") + (f" [{default}]" if default is not None else "")
            if flag.type is bool:
                group.add_argument(f"--{flag.name}", action="store_true", help=text)
            else:
                group.add_argument(
                    f"--{flag.name}",
                    type=flag.type,
                    default=flag.default,
                    choices=flag.choices,
                    help=text,
                    nargs="+" if flag.many else None,
                    metavar=None if flag.choices else "X",
                )
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The value of every flag, from the command line or from the file of `--config`.

    Raises:
        ConfigError: an unknown flag, a bad value, a flag beside `--config`, or flags that are refused, with reasons.
    """
    values = make_parser().parse_args(arguments)
    if values.config is not None:
        others = [a for a in arguments if a.startswith("--") and a.partition("=")[0] != "--config"]
        if others:
            raise ConfigError(f"--config takes the place of all other flags, but {', '.join(others)} is there too")
        values = _from_file(Path(values.config))
    refused = [
        f"--{flag.name}: {flag.note}"
        for flag in FLAGS.values()
        if flag.kind == "refused" and getattr(values, flag.key) != flag.default
    ]
    if refused:
        raise ConfigError("these flags of OpenLM do not work here:\n  " + "\n  ".join(refused))
    return values


def _from_file(path: Path) -> argparse.Namespace:
    """Flags of a YAML or JSON file (which is YAML too), with underscores or dashes."""
    values = {flag.key: flag.default for flag in FLAGS.values()}
    for name, value in read_mapping(path).items():
        key = str(name).replace("-", "_")
        if key not in FLAGS:
            near = difflib.get_close_matches(key, FLAGS, n=1)
            raise ConfigError(f"{path}: unknown flag {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values[key] = value if value is None else _typed(FLAGS[key], value, path)
    return argparse.Namespace(**{**values, "config": str(path)})


def _typed(flag: Flag, value: Any, path: Path) -> Any:
    def one(item: Any) -> Any:
        if flag.type is bool or isinstance(item, (bool, list, dict)):
            if flag.type is not bool or not isinstance(item, bool):
                raise ValueError
            return item
        made = flag.type(item)
        if flag.choices is not None and made not in flag.choices:
            raise ValueError
        return made

    try:
        if flag.many:
            return [one(item) for item in (value if isinstance(value, list) else [value])]
        return one(value)
    except ValueError:
        kind = "true or false" if flag.type is bool else f"one of {', '.join(flag.choices)}" if flag.choices else None
        kind = kind or f"{'a list of ' if flag.many else ''}{flag.type.__name__}"
        raise ConfigError(f"{path}: {flag.key}: {value!r} is not {kind}") from None
