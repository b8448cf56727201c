"""Errors for the person who must act: what was wrong, with which file, line or value, and what to do.

`exit_code` is what the `openlm` command returns when such an error ends it.
"""

import difflib
import errno
import re
from collections.abc import Iterable

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_URL_SECRETS = re.compile(r"(?<=://)[^\s/@'\"]+@|(?<=\?)[^\s'\"]*=[^\s'\"]*")


def printable(text: str) -> str:
    """Text whose control characters, line breaks and tabs aside, are written as escapes: a terminal obeys none."""
    return _CONTROLS.sub(lambda m: repr(m[0])[1:-1], text)


def public(text: str) -> str:
    """A URL, or a message with URLs, without user names, passwords and what follows a question mark."""
    return _URL_SECRETS.sub(lambda m: "...@" if m[0].endswith("@") else "...", text)


def nearest(name: str, known: Iterable[str], otherwise: str = "there are") -> str:
    """The name that was meant, as the end of an error: `did you mean 'x'?`, or all that there are."""
    near = difflib.get_close_matches(name, names := list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(names) or 'none'}"


_WAYS_ON = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or set OPENLM_HOME to a larger disk"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "Have it writable, or set OPENLM_HOME to a place that is"
    ),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "Look at the disk, or the connection to it"),
}


def disk_trouble(error: OSError) -> str | None:
    """What the person who runs a command must know of a disk that takes or gives nothing; None of another error."""
    if (way_on := _WAYS_ON.get(error.errno)) is None:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}. {way_on}; then run the same command again, and what is done stays done"


class OpenLMError(Exception):
    """Base of every expected failure; its text is shown without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(OpenLMError):
    """A recipe, flag or environment variable is wrong."""

    exit_code = 2


class MissingInputError(OpenLMError):
    """An input that should be there is not: raw files, a tokenizer, shards, a checkpoint, a task file."""

    exit_code = 3


class DataError(OpenLMError):
    """Data is there but broken: a truncated archive, too many bad records, a wrong shard."""

    exit_code = 4


class IdentityError(OpenLMError):
    """A folder belongs to something else: its recorded identity differs from the one asked for."""

    exit_code = 5


class ConsentError(IdentityError):
    """What was asked for needs a consent that was not given: it would set aside, repeat or spend something."""


class TrainingError(OpenLMError):
    """The trainer ended without reaching its goal."""

    exit_code = 6


class BusyError(OpenLMError):
    """Another process holds the lock of this folder."""

    exit_code = 7


class ClusterError(OpenLMError):
    """The cluster that runs the tasks failed: workers died, the scheduler went away."""

    exit_code = 8
