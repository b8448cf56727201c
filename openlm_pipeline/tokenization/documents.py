"""Stage 1: one raw file -> one stream of token ids and an index of its documents.

Files of `tokenized/<dataset>/<version>/`, for a raw file F: `F.tokens` (ids, little-endian, end-of-text after each
document), `F.documents.npy` (int64[n, 2]: record number, tokens with the end-of-text), `F.quarantine.jsonl` (bad
records), and `F.json`, written last, with identity, counts and hashes. A file is done when its `F.json` says so for the
same identity; a stage that was killed redoes at most the files it was in.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.reader import QuarantineWriter, RecordReader
from openlm_pipeline.errors import DataError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.files import atomic_writer, read_json, write_json
from openlm_pipeline.lineage.fingerprint import fingerprint
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.tokenization.engine import EngineMismatch, make_engine
from openlm_pipeline.tokenization.raw_hash import sha256_url
from openlm_pipeline.tokenization.tokenizer import TokenizerInfo, tokenizer_file

STAGE_VERSION = 1
"""Raised when the same text and tokenizer would give another stream."""

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class FileTokens:
    """A finished file of stage 1: the content of its `F.json`."""

    name: str
    identity: dict[str, Any]
    stamp: str
    """The raw file's stamp when it was read: an equal one means that the content need not be hashed again."""
    documents: int
    quarantined: int
    tokens: int
    """End-of-text tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    tokens_sha256: str
    engine: str
    """Which engine encoded it, and why that one."""

    @property
    def version(self) -> str:
        """Content hash of the stream and its document boundaries."""
        return fingerprint({"tokens": self.tokens_sha256, "documents": self.documents, "identity": self.identity})


def _identity(dataset: Dataset, tokenizer: TokenizerInfo, raw_sha256: str) -> dict[str, Any]:
    return {
        "raw_sha256": raw_sha256,
        "text_key": dataset.source.text_key,
        "max_bad_fraction": dataset.source.max_bad_fraction,
        "tokenizer_sha256": tokenizer.sha256,
        "eot_id": tokenizer.eot_id,
        "code": STAGE_VERSION,
    }


def finished(dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, folder: Path) -> FileTokens | None:
    """The result of a file that is done for this content, tokenizer and settings, else None."""
    path = folder / f"{raw.name}.json"
    if not path.exists():
        return None
    done = FileTokens(**read_json(path))
    raw_sha256 = done.identity["raw_sha256"] if done.stamp == raw.stamp else sha256_url(raw.url)
    if done.identity != _identity(dataset, tokenizer, raw_sha256):
        return None
    width = SampleFormat.for_vocabulary(1, tokenizer.vocab_size).numpy_dtype.itemsize
    stream = folder / f"{raw.name}.tokens"
    others = (folder / f"{raw.name}.documents.npy", folder / f"{raw.name}.quarantine.jsonl")
    whole = stream.exists() and stream.stat().st_size == done.tokens * width and all(p.exists() for p in others)
    return done if whole else None


def tokenize_file(
    dataset: Dataset, raw: RawFile, tokenizer: TokenizerInfo, tokenizer_folder: Path, folder: Path
) -> FileTokens:
    """Tokenize one raw file; runs in a Dask worker.

    Raises:
        DataError: the file is damaged, or more of its records are bad than the source allows.
    """
    (folder / f"{raw.name}.json").unlink(missing_ok=True)  # what it describes is about to be replaced
    engine, engine_reason = make_engine(tokenizer_file(tokenizer_folder), dataset.engine, dataset.verify_every)
    dtype = SampleFormat.for_vocabulary(1, tokenizer.vocab_size).numpy_dtype
    digest = hashlib.sha256()
    index: list[tuple[int, int]] = []
    text_bytes = 0
    raw_sha256 = sha256_url(raw.url)
    with (
        QuarantineWriter(folder / f"{raw.name}.quarantine.jsonl") as quarantine,
        atomic_writer(folder / f"{raw.name}.tokens") as out,
    ):

        def flush(numbers: list[int], texts: list[str]) -> None:
            try:
                encoded = engine.encode_batch(texts)
            except EngineMismatch as e:
                raise DataError(
                    f"{raw.url}, record {numbers[e.position]}: {e}. Set execution.tokenizer_engine=huggingface to use "
                    "the slower one alone, and please report the document"
                ) from e
            for number, ids in zip(numbers, encoded):
                data = np.append(ids, tokenizer.eot_id).astype(dtype).tobytes()
                out.write(data)
                digest.update(data)
                index.append((number, len(ids) + 1))

        numbers: list[int] = []
        texts: list[str] = []
        characters = 0
        reader = RecordReader(
            raw.url,
            text_key=dataset.source.text_key,
            max_bad_fraction=dataset.source.max_bad_fraction,
            on_bad=quarantine,
        )
        for record in reader:
            numbers.append(record.number)
            texts.append(record.text)
            characters += len(record.text)
            text_bytes += len(record.text.encode())
            if characters >= _BATCH_CHARACTERS:
                flush(numbers, texts)
                numbers, texts, characters = [], [], 0
        flush(numbers, texts)
    documents = np.array(index, dtype=np.int64).reshape(-1, 2)
    with atomic_writer(folder / f"{raw.name}.documents.npy") as f:
        np.save(f, documents)
    result = FileTokens(
        name=raw.name,
        identity=_identity(dataset, tokenizer, raw_sha256),
        stamp=raw.stamp,
        documents=len(documents),
        quarantined=reader.bad,
        tokens=int(documents[:, 1].sum()),
        text_bytes=text_bytes,
        tokens_sha256=digest.hexdigest(),
        engine=engine_reason,
    )
    write_json(folder / f"{raw.name}.json", asdict(result))
    return result
