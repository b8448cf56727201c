"""Raw files to a folder of shards without a recipe, with the arguments of OpenLM's `make_2048.py`.

Shards, manifest and provenance go to `OUT/<seq_len>-v1`, what is needed to resume after an interruption to `OUT/work`.
Unlike make_2048.py it keeps every document, shuffles all of them, and uses the tokenizer it is told.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from openlm_pipeline.corpus.discovery import LIST, discover
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Dataset, Source, TokenizerSpec
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.publish import publish
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import explain
from openlm_pipeline.tokenization.job import tokenize_files
from openlm_pipeline.tokenization.packing_job import pack_shards
from openlm_pipeline.tokenizers.tokenizer import make_tokenizer

S3_BASE = "S3_BASE"
"""Environment variable: where `upload` puts the shards, such as `s3://bucket/prefix/`."""


def upload_url() -> str:
    """The value of S3_BASE; one without a protocol, such as OpenLM's `preproc_data-v1/`, begins with a bucket of S3.

    Raises:
        ConfigError: it is not set, or no bucket's.
    """
    url = os.environ.get(S3_BASE, "").rstrip("/")
    if "://" not in url:
        url = f"s3://{url}"
    if not url.partition("://")[2].strip("/"):
        raise ConfigError(f"--upload-to-s3 needs the environment variable {S3_BASE}, such as s3://bucket/prefix/")
    return url


def make_shards_of_files(
    input_files: list[str],
    output: Path,
    tokenizer: str,
    tokenizing: PoolFactory,
    packing: PoolFactory,
    report: Say,
    *,
    seq_len: int = 2048,
    seed: int = 42,
    pad_id: int | None = None,
    spec: Mapping[str, Any] = MappingProxyType({}),
    source: Mapping[str, Any] = MappingProxyType({}),
    engine: str = "auto",
    upload: str | None = None,
    allow: Collection[str] = (),
) -> StageResult:
    """Make the dataset, or the part of it that is missing.

    Args:
        input_files: paths, globs or fsspec URLs.
        tokenizer: path of a `tokenizer.json`, of its folder, or a Hugging Face hub name.
        tokenizing, packing: where the tasks of each stage run.
        spec, source: fields of `TokenizerSpec` and `Source` that differ from the usual.
        engine: as `execution.tokenizer_engine`.
        upload: URL to which the shards are moved once all are made.
        allow: consents; with `supersede` a dataset made from something else is set aside.

    Raises:
        MissingInputError: no input file, or no tokenizer.
        DataError: an input is damaged.
    """
    name = re.sub(r"\W+", "_", Path(tokenizer).stem.lower()).strip("_") or "tokenizer"
    try:
        dataset = Dataset(
            source=Source(name="text", files=tuple(_absolute(f) for f in input_files), **source),
            tokenizer=TokenizerSpec(name=name, source=tokenizer, **spec),
            seq_len=seq_len,
            samples_per_shard=8192,
            shuffle_seed=seed,
            pad_id=pad_id,
            engine=engine,
        )
    except ValidationError as e:
        raise explain(e, "the options of --input-files") from e
    home = Home((output / "work").absolute())
    raw_files = discover(dataset, home)
    tokenizer_folder, tokenized = home.tokenizer(name), home.tokenized("text", "v1")
    info, _, _ = make_tokenizer(dataset.tokenizer, raw_files, dataset.source.text_key, tokenizer_folder, allow)
    files, _ = tokenize_files(dataset, raw_files, info, tokenizer_folder, tokenized, tokenizing, report)
    folder = output.absolute() / f"{seq_len}-v1"
    reused, changed = pack_shards(dataset, files, info, tokenized, folder, packing, report, allow, local=not upload)
    made = ShardedDataset(folder)
    if upload:
        publish(folder, upload, report, delete_local=True)
    return StageResult(folder, made.version, reused, {**made.info["totals"], "changed": changed})


def _absolute(where: str) -> str:
    if where.startswith(LIST):
        return LIST + _absolute(where[len(LIST) :])
    return where if "://" in where else str(Path(where).absolute())
