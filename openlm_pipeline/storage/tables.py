"""Parquet files with a JSON document on their table, which show a damaged bit wherever it is.

Each page has a checksum, as Parquet has them; a seal in the file's metadata is the hash of the document, the columns'
names and types and the number of rows.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.storage.files import atomic_writer

_DOCUMENT, _SEAL = b"openlm", b"openlm_seal_sha256"


def write_table(path: Path, table: pa.Table, document: Mapping[str, Any], **how: bool) -> None:
    """Write a table atomically, with a JSON document; `how` as in `atomic_writer`."""
    said = json.dumps(document)
    table = table.replace_schema_metadata({_DOCUMENT: said, _SEAL: _seal(table, said)})
    with atomic_writer(path, **how) as f:
        pq.write_table(table, f, compression="zstd", write_page_checksum=True)


def read_table(path: Path, *, again: str = "") -> tuple[pa.Table, dict[str, Any]]:
    """What `write_table` wrote, or a release before the seal.

    Args:
        again: what makes it again, for an error.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is not Parquet, or not what was written.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        metadata = table.schema.metadata or {}
        said = metadata.get(_DOCUMENT, b"{}").decode()
        if metadata.get(_SEAL, b"").decode() in ("", _seal(table, said)):
            return table.replace_schema_metadata(None), json.loads(said)
        wrong = "it is not what was written"
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist") from None
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as e:  # names of columns may be no UTF-8
        wrong = f"it is not a readable Parquet file: {e}"
    raise DataError(f"{path} is damaged: {wrong}" + (f". {again}" if again else ""))


def _seal(table: pa.Table, said: str) -> str:
    # What a list calls its items changes on the way.
    columns = [(field.name, str(field.type).partition("<")[0]) for field in table.schema]
    return hashlib.sha256(json.dumps([said, columns, table.num_rows]).encode()).hexdigest()
