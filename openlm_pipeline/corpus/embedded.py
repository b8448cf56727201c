"""The embedded corpus: Python's own text as Pile-like raw files, split into train and held-out, with demo tasks.

`raw/embedded/` holds `train/00.jsonl.zst` to `05`, `heldout/heldout.jsonl.zst`, `eval/*.jsonl` and, written last,
`corpus.json` with the identity and the hash of every file. Equal identities give equal bytes.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import zstandard

from openlm_pipeline.corpus import heldout_tasks, python_text
from openlm_pipeline.corpus.python_text import KINDS, PROSE, Document, environment, select_documents
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.storage.files import atomic_writer, folder_lock, read_json, sha256_file, write_json
from openlm_pipeline.storage.home import Home

NAME = "embedded"
_MANIFEST = "corpus.json"
_TRAIN_FILES = 6
_HELDOUT_FRACTION = 0.05
_MAX_BYTES = {"StdlibDocs": 3_000_000, "PackageDocs": 10_000_000, "StdlibSource": 5_000_000, "PackageSource": 4_000_000}
_MIN_TOTAL_BYTES = 15_000_000
_ZSTD_LEVEL = 6


def _identity() -> Tree:
    code = hashlib.sha256()
    for module in (__file__, python_text.__file__, heldout_tasks.__file__):
        code.update(Path(module).read_bytes())
    return {"corpus": NAME, "code_sha256": code.hexdigest(), "environment": environment()}


def _is_heldout(document: Document) -> bool:
    # The end of the key, because documents are chosen by its beginning.
    return int(document.order[-8:], 16) < _HELDOUT_FRACTION * 2**32


def _jsonl(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def _records(documents: Iterable[Document]) -> bytes:
    return _jsonl({"text": d.text, "meta": {"pile_set_name": d.kind, "path": d.path}} for d in documents)


def _intact(folder: Path, files: dict[str, Any]) -> bool:
    return all((folder / name).is_file() and sha256_file(folder / name) == f["sha256"] for name, f in files.items())


def _existing(folder: Path, identity: Tree, report: Say) -> StageResult | None:
    """What is there, if it is of this identity and undamaged; says why not otherwise."""
    if not (folder / _MANIFEST).is_file():
        return None
    try:
        manifest = read_json(folder / _MANIFEST)
        changed = differences(manifest["identity"], identity)
        whole = not changed and _intact(folder, manifest["files"])
        if whole:
            return StageResult(folder, manifest["version"], reused=True, facts=manifest["facts"])
    except (DataError, KeyError, TypeError) as e:
        report(f"embedded corpus: {folder / _MANIFEST} can't be used ({e}); making the corpus again")
        return None
    why = "; ".join(changed[:3]) if changed else "a file is missing or damaged"
    report(f"embedded corpus: making it again, because {why}")
    return None


def _facts(train: list[Document], heldout: list[Document], tasks: dict[str, list[Any]]) -> dict[str, Any]:
    def text_bytes(documents: Iterable[Document]) -> int:
        return sum(len(d.text.encode()) for d in documents)

    facts: dict[str, Any] = {
        "train_documents": len(train),
        "train_text_bytes": text_bytes(train),
        "heldout_documents": len(heldout),
        "heldout_text_bytes": text_bytes(heldout),
    }
    for kind in KINDS:
        of_kind = [d for d in (*train, *heldout) if d.kind == kind]
        facts[f"{kind}_documents"] = len(of_kind)
        facts[f"{kind}_text_bytes"] = text_bytes(of_kind)
    return facts | {f"{name.removesuffix('.jsonl')}_rows": len(rows) for name, rows in tasks.items()}


def _contents(train: list[Document], heldout: list[Document], tasks: dict[str, list[Any]]) -> dict[str, bytes]:
    """Uncompressed bytes of every file by its path below the corpus folder."""
    files = {f"train/{i:02d}.jsonl.zst": _records(train[i::_TRAIN_FILES]) for i in range(_TRAIN_FILES)}
    files["heldout/heldout.jsonl.zst"] = _records(heldout)
    return files | {f"eval/{name}": _jsonl(rows) for name, rows in tasks.items()}


def build_embedded(home: Home, report: Say) -> StageResult:
    """Make the embedded corpus under `home.raw("embedded")`, or find it whole and of this environment.

    The result's version is a hash of the uncompressed content. Facts count documents, bytes of text and task rows.

    Raises:
        MissingInputError: this Python has too little text, as one without its library's source.
        BusyError: another process is making it.
    """
    folder = home.raw(NAME)
    identity = _identity()
    if found := _existing(folder, identity, report):
        report(f"embedded corpus: reused {folder}")
        return found
    with folder_lock(folder, "making the embedded corpus"):
        (folder / _MANIFEST).unlink(missing_ok=True)
        report(f"embedded corpus: reading Python {identity['environment']['python']} and its packages")
        documents = select_documents(_MAX_BYTES)
        total = sum(len(d.text.encode()) for d in documents)
        if total < _MIN_TOTAL_BYTES:
            raise MissingInputError(
                f"this Python and its packages have only {total / 1e6:.1f} MB of text, less than "
                f"{_MIN_TOTAL_BYTES / 1e6:.0f} MB. Use a Python with its library's source (.py files), and install "
                "this project's dependencies from wheels."
            )
        train = [d for d in documents if not _is_heldout(d)]
        heldout = [d for d in documents if _is_heldout(d)]
        tasks = heldout_tasks.make_tasks(*([d for d in part if d.kind in PROSE] for part in (heldout, train)))
        files = {}
        for name, content in _contents(train, heldout, tasks).items():
            data = zstandard.ZstdCompressor(_ZSTD_LEVEL).compress(content) if name.endswith(".zst") else content
            with atomic_writer(folder / name) as f:
                f.write(data)
            files[name] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size_bytes": len(data),
                "content_sha256": hashlib.sha256(content).hexdigest(),
                "records": content.count(b"\n"),
            }
        version = fingerprint({name: f["content_sha256"] for name, f in files.items()})
        facts = _facts(train, heldout, tasks)
        write_json(folder / _MANIFEST, {"version": version, "identity": identity, "facts": facts, "files": files})
        report(f"embedded corpus: {total / 1e6:.1f} MB of text, {len(documents)} documents in {folder}")
    return StageResult(folder, version, reused=False, facts=facts)
