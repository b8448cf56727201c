"""Fetching lists of raw files: a file appears under its name only when it is whole and checked.

A transfer that ended early resumes where it stopped if the remote file is still the same version, else it begins anew;
one file's failure stops no other. `download_folder` says what the output folder holds.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import bracex
import tenacity

from openlm_pipeline.corpus.checksums import Checksum, checksum_for, hash_file, parse_checksums
from openlm_pipeline.corpus.discovery import LIST, expand_pattern
from openlm_pipeline.corpus.download_folder import Ledger, Part, is_taken
from openlm_pipeline.corpus.download_sources import RemoteFile, TransferError, is_http, open_source, public_url
from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError, OpenLMError
from openlm_pipeline.result import Say
from openlm_pipeline.storage.files import folder_lock, rename

_MAX_FILES = 1_000_000
_MAX_WAIT_SECONDS = 60.0

DownloadProgress = Callable[[str, int, int | None], None]
"""Takes a file's name, its bytes so far and, if known, its bytes in all. Called from several threads."""


@dataclass(frozen=True)
class Target:
    """One file to fetch."""

    name: str
    """Path in the output folder."""
    url: str
    source: str
    """The URL without query, for records and messages."""


class _StoppedError(OpenLMError):
    """Another file's error, or the user, ended this transfer."""


@dataclass(frozen=True)
class _Found:
    """A file that a template names, and the folders that none of its braces or wildcards are in, with a slash."""

    url: str
    prefix: str


def expand_templates(templates: Sequence[str], folder: Path | None = None) -> list[Target]:
    """The files that URL templates name, in order.

    Braces are a shell's: `{00..29}` keeps its zeros, `{val,test}` is a list. A store's URL, such as `s3://` or `hf://`,
    may also have `*`, `**`, `?` and `[...]`, which one listing answers. `@PATH_OR_URL` is a file that lists templates,
    one per line. A file is named by its path below the folders that its template, or all of a list, names; if two would
    have one name, below the folders that all have in common.

    Args:
        folder: what was fetched into it earlier under a base name keeps that.

    Raises:
        ConfigError: not a URL, braces that are no range or list, a name that can't be used, or one name twice.
        MissingInputError: a list or folder is not there, or nothing in it fits.
    """
    found: dict[str, _Found] = {}
    for template in templates:
        if template.startswith(LIST):
            listed = [file for line in _lines_of(template[len(LIST) :]) for file in _expand(line)]
            common = _common([file.url.rpartition("/")[0] + "/" for file in listed])
            found |= {file.url: replace(file, prefix=common) for file in listed}
        else:
            found |= {file.url: file for file in _expand(template)}
        if len(found) > _MAX_FILES:
            raise ConfigError(f"the templates name more than {_MAX_FILES:,} files")
    names = {url: _name(url, file.prefix) for url, file in found.items()}
    if len(set(names.values())) < len(names):
        common = _common([file.prefix for file in found.values()])
        names = {url: _name(url, common) for url in names}
    names = _as_recorded(names, Ledger(folder)) if folder and folder.is_dir() else names
    targets: dict[str, Target] = {}
    for url, name in names.items():
        target = Target(name, url, public_url(url))
        other = targets.setdefault(name, target)
        if other is not target:
            raise ConfigError(
                f"two files would be named {name}: {other.source} and {target.source}. Fetch them into two folders."
            )
    return list(targets.values())


def _lines_of(where: str) -> list[str]:
    lines = [line.strip() for line in _text_of(where, "list").splitlines()]
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise MissingInputError(f"the list {public_url(where)} names no files")
    return listed


def _expand(template: str) -> list[_Found]:
    """The files of one template."""
    try:
        urls = bracex.expand(template, limit=_MAX_FILES)
    except bracex.ExpansionLimitException:
        raise ConfigError(f"a template names more than {_MAX_FILES:,} files") from None
    for url in urls:
        _refuse_url(url)
    before = public_url(template.partition("{")[0])
    prefix = before[: before.rfind("/") + 1]
    found = []
    for url in urls:
        if is_http(url) or not any(c in url for c in "*?["):
            found.append(_Found(url, prefix))
            continue
        match = expand_pattern(url)
        if not match.infos:
            raise MissingInputError(f"there is no file {url}")
        places = (match.fs.unstrip_protocol(path) for path in sorted(info["name"] for info in match.infos))
        literal = match.fs.unstrip_protocol(match.prefix.rstrip("/")) + "/"
        found += [_Found(place, min(prefix, literal, key=len)) for place in places]
    return found


def _common(folders: Sequence[str]) -> str:
    """The folders that all begin with, with the slash behind them."""
    shared = os.path.commonprefix([folder.split("/") for folder in folders])
    return "/".join([*shared, ""])


def _refuse_url(url: str) -> None:
    """
    Raises:
        ConfigError: it is no URL of a file, or holds a password.
    """
    try:
        password, source = urlsplit(url).password, public_url(url)
    except ValueError as e:
        raise ConfigError(f"a URL is not valid: {e}") from None
    if password is not None:
        raise ConfigError(f"the address of host {urlsplit(url).hostname} holds a password. Put it into ~/.netrc.")
    if "://" not in url or "::" in url:
        raise ConfigError(f"{source} is not a URL such as https://host/00.jsonl.zst, s3://... or hf://datasets/...")
    if "{" in source or "}" in source:
        raise ConfigError(f"the braces in {source} are no range such as {{00..29}} and no list such as {{val,test}}")


def _name(url: str, prefix: str) -> str:
    """The path of a file in the output folder.

    Raises:
        ConfigError: it can't be used.
    """
    source = public_url(url)
    parts = source[len(prefix) :].split("/")
    parts = [unquote(part) for part in parts] if is_http(url) else parts
    for part in parts:
        if not part or part.startswith(".") or "/" in part or "\\" in part or not part.isprintable() or is_taken(part):
            raise ConfigError(f"{source} gives the file name {part!r}, which can't be used here")
    return "/".join(parts)


def _as_recorded(names: dict[str, str], ledger: Ledger) -> dict[str, str]:
    """`names` by URL, with the base name where the file was fetched under it."""
    kept = {}
    for url, name in names.items():
        base = name.rpartition("/")[2]
        recorded = ledger.files.get(base)
        kept[url] = base if recorded and recorded.source == public_url(url) else name
    return kept


@dataclass
class _Download:
    """What the threads of one `download_files` share."""

    folder: Path
    ledger: Ledger
    checksums: dict[str, Checksum]
    retries: int
    retry_wait_seconds: float
    timeout_seconds: float
    verify: bool
    report: Say
    progress: DownloadProgress
    stop: threading.Event

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise _StoppedError("stopped; what was fetched is kept")

    def run(self, target: Target) -> RemoteFile:
        try:
            self.check_stop()
            return self._existing(target) or self._fetch(target)
        except OSError as e:  # of the local disk; those of the network are TransferErrors
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                self.stop.set()
            raise OpenLMError(
                f"{self.folder / target.name} can't be written: {e.strerror or e}. What was fetched is kept; "
                "make room or repair the folder, and run the same command again."
            ) from e

    def _existing(self, target: Target) -> RemoteFile | None:
        path, entry = self.folder / target.name, self.ledger.files.get(target.name)
        checksum = self.checksums.get(target.name)
        if not path.exists():
            return None
        if checksum is None and entry is None:
            raise IdentityError(
                f"{path} is there already but was not fetched by this command, so it may be another file or a part of "
                "one. Remove it, or give --checksums to check it."
            )
        if checksum is None and entry is not None and entry.source != target.source:
            raise IdentityError(
                f"{path} was fetched from {entry.source}, not from {target.source}. Use another folder, or give "
                "--checksums to check that they are the same."
            )
        size = path.stat().st_size
        known = checksum is None or (entry and checksum.hexdigest == entry.sha256)
        if entry and known and size == entry.size_bytes and not self.verify:
            return entry
        wanted = checksum or Checksum(target.name, "sha256", entry.sha256 if entry else "")
        hashes = hash_file(path, {"sha256", wanted.algorithm}, self.check_stop)
        if hashes[wanted.algorithm] != wanted.hexdigest:
            if entry is None:
                raise DataError(f"{path} was not fetched by this command, and {_mismatch(wanted, hashes)}. Remove it.")
            self.report(f"{target.name}: damaged: {_mismatch(wanted, hashes)}; fetching it again")
            return None
        if entry is None or entry.sha256 != hashes["sha256"]:
            entry = RemoteFile(source=target.source, size_bytes=size, sha256=hashes["sha256"])
            self.ledger.add(target.name, entry)
        return entry

    def _fetch(self, target: Target) -> RemoteFile:
        part = Part(self.folder, target.name)
        failures, furthest = 0, part.size()

        def attempt() -> RemoteFile:
            nonlocal failures, furthest
            try:
                return self._transfer(target, part)
            except TransferError:
                # A file that grows may take any number of attempts.
                failures, furthest = (1 if part.size() > furthest else failures + 1), max(furthest, part.size())
                raise

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_seconds if isinstance(error, TransferError) else 0.0
            return max(asked, min(_MAX_WAIT_SECONDS, self.retry_wait_seconds * 2.0 ** min(failures - 1, 10)))

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self.report(f"{target.name}: {error}; trying again in {state.upcoming_sleep:.0f} s")

        remote = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransferError),
            stop=lambda _: failures > self.retries or self.stop.is_set(),
            wait=wait,
            sleep=tenacity.sleep_using_event(self.stop),
            before_sleep=tell,
            reraise=True,
        )(attempt)
        return self._accept(target, part, remote)

    def _transfer(self, target: Target, part: Part) -> RemoteFile:
        """One attempt: add to the part what is missing, or begin it anew; returns the version that is whole in it."""
        self.check_stop()
        known, offset = part.version(target.source), part.size()
        if known and known.size_bytes == offset and part.path.exists():
            return known
        if known is None or (known.size_bytes is not None and offset > known.size_bytes):
            known, offset = None, 0
        with open_source(target.url, known=known, offset=offset, timeout_seconds=self.timeout_seconds) as opened:
            remote, size = opened.remote, opened.offset
            if size:
                self.report(f"{target.name}: resuming at byte {size:,} of {remote.size_bytes:,}")
            else:
                part.begin(remote)
            missing = (remote.size_bytes or 0) - size
            if missing > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, f"{missing:,} bytes are missing, more than the disk has free")
            with part.path.open("ab") as f:
                for chunk in opened.chunks:
                    self.check_stop()
                    f.write(chunk)
                    f.flush()  # a killed process loses nothing
                    size += len(chunk)
                    self.progress(target.name, size, remote.size_bytes)
                os.fsync(f.fileno())
        if remote.size_bytes is None:
            remote = remote.model_copy(update={"size_bytes": size})
            part.describe(remote)
        elif size != remote.size_bytes:
            raise TransferError(f"{target.source}: got {size:,} of {remote.size_bytes:,} bytes")
        return remote

    def _accept(self, target: Target, part: Part, remote: RemoteFile) -> RemoteFile:
        """Check a whole part, record it and give it its name."""
        checksum = self.checksums.get(target.name)
        if checksum is None and remote.sha256:
            checksum = Checksum(target.name, "sha256", remote.sha256)
        # Hashed from the disk, so that what is checked is what is kept.
        hashes = hash_file(part.path, {"sha256", checksum.algorithm if checksum else "sha256"}, self.check_stop)
        if checksum and hashes[checksum.algorithm] != checksum.hexdigest:
            part.remove()
            raise DataError(
                f"{target.source}: {_mismatch(checksum, hashes)}. The copy is removed; run again, or try a mirror."
            )
        entry = remote.model_copy(update={"size_bytes": part.size(), "sha256": hashes["sha256"]})
        self.ledger.add(target.name, entry)
        rename(part.path, self.folder / target.name)
        part.remove()
        return entry


def _mismatch(wanted: Checksum, found: dict[str, str]) -> str:
    return f"its {wanted.algorithm} is {found[wanted.algorithm]} and should be {wanted.hexdigest}"


def _text_of(where: str, what: str, timeout_seconds: float = 30.0) -> str:
    """A small text file, local or remote.

    Raises:
        MissingInputError, ConfigError: it can't be read, or is no text.
    """
    shown = public_url(where) if "://" in where else where
    try:
        if "://" in where:
            with open_source(where, timeout_seconds=timeout_seconds) as opened:
                return b"".join(opened.chunks).decode()
        return Path(where).read_text()
    except OSError as e:
        raise MissingInputError(f"{what} {shown} can't be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{what} {shown} is not text: {e}") from e


def _load_checksums(where: str, targets: Sequence[Target], timeout_seconds: float) -> dict[str, Checksum]:
    shown = public_url(where) if "://" in where else where
    checksums = parse_checksums(_text_of(where, "checksum file", timeout_seconds), shown)
    return {target.name: checksum_for(target.source, checksums, shown) for target in targets}


def download_files(
    templates: Sequence[str],
    folder: Path,
    *,
    checksums: str | None = None,
    parallel: int = 4,
    retries: int = 5,
    retry_wait_seconds: float = 1.0,
    timeout_seconds: float = 30.0,
    verify: bool = False,
    report: Say,
    progress: DownloadProgress = lambda name, done, total: None,
) -> dict[str, RemoteFile]:
    """Fetch the files of URL templates into `folder`; return the record of each by name.

    Files that are there whole, by size and record, are left alone without a request. A file is tried again after a
    failure that may heal until `retries` attempts in a row added nothing, waiting 1, 2, 4, ... `retry_wait_seconds` or
    what the server asks for.

    Args:
        templates: URLs with shell-like braces, and lists of them (`expand_templates`).
        folder: is made if need be; one process at a time may use it.
        checksums: path or URL of a file in the form of sha256sum, md5sum, sha1sum or sha512sum with all the files.
        parallel: files at a time.
        timeout_seconds: longest silence of a server.
        verify: read files that are there, and fetch the damaged ones again.
        report: takes a line for each file that ends, resumes or is tried again; called from several threads.

    Raises:
        ConfigError: a template or the checksum file is not valid.
        BusyError: another process is downloading into the folder.
        OpenLMError: some files failed; names each and why. All others are whole. If all failed in one way it is of
            that class: MissingInputError (not there), DataError (wrong content), IdentityError (another file has its
            name), TransferError (network).
    """
    targets = expand_templates(templates, folder)
    with folder_lock(folder, "downloading"):
        known = _load_checksums(checksums, targets, timeout_seconds) if checksums else {}
        download = _Download(
            folder=folder,
            ledger=Ledger(folder),
            checksums=known,
            retries=retries,
            retry_wait_seconds=retry_wait_seconds,
            timeout_seconds=timeout_seconds,
            verify=verify,
            report=report,
            progress=progress,
            stop=threading.Event(),
        )
        done: dict[str, RemoteFile] = {}
        failed: dict[str, OpenLMError] = {}
        with ThreadPoolExecutor(parallel) as pool:
            futures = {pool.submit(download.run, target): target.name for target in targets}
            try:
                for future in as_completed(futures):
                    name = futures[future]
                    try:
                        done[name] = future.result()
                    except OpenLMError as e:
                        failed[name] = e
                        report(f"{name}: failed: {e}")
                    else:
                        report(f"{len(done)} of {len(targets)}: {name}, {done[name].size_bytes:,} bytes")
            except BaseException:
                download.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    if failed:
        raise _summary(failed, len(targets), folder)
    return {target.name: done[target.name] for target in targets}


def _summary(failed: dict[str, OpenLMError], num_files: int, folder: Path) -> OpenLMError:
    causes = [e for e in failed.values() if not isinstance(e, _StoppedError)]
    kinds = {type(e) for e in causes}
    kind = kinds.pop() if len(kinds) == 1 else OpenLMError
    lines = "".join(f"\n  {name}: {failed[name]}" for name in sorted(failed))
    return kind(
        f"{len(failed)} of {num_files} files failed; the others are whole in {folder}. The same command resumes from "
        f"here:{lines}"
    )
