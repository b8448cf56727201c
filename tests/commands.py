"""The `openlm` command in the test's own process, which saves the seconds that another one takes to import."""

import contextlib
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from openlm_pipeline.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def openlm(*arguments: object, variables: Mapping[str, str]) -> Ended:
    """`openlm ARGUMENTS` with more environment variables."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["openlm", *map(str, arguments)])
        patch.setattr(main, "freeze", lambda: None)  # it is for the end of a process
        code = None
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                main.main()
            except SystemExit as e:
                code = e.code
    assert code is None or isinstance(code, int), code
    return Ended(code or 0, stdout.getvalue(), stderr.getvalue())
