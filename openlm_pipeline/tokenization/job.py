"""Stage 1 over the raw files of a dataset: what is done stays, what is missing is made on a pool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openlm_pipeline.corpus.discovery import RawFile
from openlm_pipeline.corpus.formats import format_of
from openlm_pipeline.corpus.maps import map_identity
from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.pools import Call, Pool, PoolFactory, TaskProgress
from openlm_pipeline.result import Say
from openlm_pipeline.storage.files import folder_lock, remove_leftovers
from openlm_pipeline.tokenization.documents import (
    FileTokens,
    finished,
    join_parts,
    leave_in,
    leave_out,
    left_out,
    remove_parts,
    results_of_others,
    take_over,
    tokenize_part,
)
from openlm_pipeline.tokenization.exchange import PARTS, Exchange
from openlm_pipeline.tokenization.tasks import Meter, raise_all, run_all
from openlm_pipeline.tokenizers.tokenizer import TokenizerInfo

_MIN_PART_BYTES = 32 << 20
_PART = " part "


def tokenize_files(
    dataset: Dataset,
    raw_files: list[RawFile],
    tokenizer: TokenizerInfo,
    tokenizer_folder: Path,
    folder: Path,
    pools: PoolFactory,
    report: Say,
    *,
    min_part_bytes: int = _MIN_PART_BYTES,
    whole: bool = False,
    exchange: Exchange | None = None,
) -> tuple[list[FileTokens], list[str]]:
    """Stage 1 over `raw_files`: results in their order, and the names of those that had to be done.

    Args:
        min_part_bytes: a raw file is not cut into parts of fewer bytes.
        exchange: through which workers hand on what they make, where they share no disk.
        whole: `raw_files` are all of the dataset, so a result of another name is of a file that is gone, or was moved.

    Raises:
        DataError: files are damaged, all of which are named; the others stay. With the source's `on_bad_file: skip`
            they are left out of the results instead, see `left_out`.
        BusyError: another process is tokenizing this dataset.
    """

    def call(function: Callable[..., Any], raw: RawFile, *part: Any) -> Call:
        """What a worker does with a raw file, or a part of it."""
        if exchange:
            return exchange.call(dataset, raw, tokenizer, *part)
        return function, dataset, raw, *part, tokenizer, tokenizer_folder, folder

    with folder_lock(folder, "tokenizing"):
        skipped = left_out(dataset, raw_files, tokenizer, folder)
        there = exchange.sizes() if exchange else {}
        elsewhere = {folder / name: size for name, size in there.items()}
        done: dict[str, FileTokens | None] = {}
        damaged: dict[str, DataError] = {}
        for raw in raw_files:
            if raw.name not in skipped:
                try:
                    if f"{raw.name}.json" in there and not (folder / f"{raw.name}.json").exists():
                        exchange.fetch(raw.name, folder, there)
                    done[raw.name] = finished(dataset, raw, tokenizer, folder, elsewhere)
                except DataError as e:
                    damaged[raw.name] = e
        missing = [raw for raw in raw_files if done.get(raw.name, raw) is None]
        names = {raw.name for raw in raw_files}
        gone = results_of_others(folder, names) if missing and whole and not exchange else []
        for raw in missing if gone else []:
            if moved := take_over(dataset, raw, tokenizer, folder, gone):
                done[raw.name] = moved
        missing = [raw for raw in missing if done[raw.name] is None]
        remove_parts(folder, {name for name, result in done.items() if result})
        if missing:
            remove_leftovers(folder)
            if exchange:
                exchange.give_tokenizer(tokenizer, tokenizer_folder)
            with pools(report) as pool:
                parts = {
                    raw.name: format_of(raw.url, raw.format).cut(raw.size_bytes, count)
                    for raw, count in _part_counts(missing, _workers(pool, exchange), min_part_bytes).items()
                }
                calls: dict[str, Call] = {}
                sizes: dict[str, int] = {}
                largest_first = sorted(missing, key=lambda raw: -raw.size_bytes)  # so that no large one is left over
                for raw in largest_first:
                    cut = parts[raw.name] if len(parts[raw.name]) > 1 else []
                    if not cut:
                        calls[raw.name] = call(tokenize_whole, raw)
                        sizes[raw.name] = raw.size_bytes
                    for number, part in enumerate(cut):
                        name = f"{raw.name}{_PART}{number}"
                        calls[name] = call(tokenize_part, raw, part, number)
                        sizes[name] = (part.end or raw.size_bytes) - part.begin
                meter = Meter(f"tokenizing {dataset.name}", sum(sizes.values()), report)
                found, wrong = run_all(pool, meter, sizes, calls)
                meter.say()
                damaged |= {name.partition(_PART)[0]: error for name, error in wrong.items()}
                joins = {
                    raw.name: exchange.sum_up(dataset, raw, tokenizer, len(parts[raw.name]))
                    if exchange
                    else (join_parts, dataset, raw, len(parts[raw.name]), tokenizer, folder)
                    for raw in largest_first
                    if len(parts[raw.name]) > 1 and raw.name not in damaged
                }
                if joins:
                    sizes = {raw.name: raw.size_bytes for raw in missing}
                    what = f"joining the parts of {dataset.name}"
                    more, wrong = run_all(pool, Meter(what, sum(sizes[n] for n in joins), report), sizes, joins)
                    found, damaged = found | more, damaged | wrong
            done |= {raw.name: found[raw.name] for raw in missing if raw.name not in damaged}
            there = exchange.sizes() if exchange else {}
            for name in done.keys() & found.keys() if exchange else ():
                exchange.fetch(name, folder, there)
            remove_parts(folder, {name for name, result in done.items() if result})  # of one that cut in another way
        if dataset.source.on_bad_file == "fail":
            raise_all(damaged)
        for raw in raw_files:
            if raw.name in damaged:
                leave_out(dataset, raw, tokenizer, folder, str(damaged[raw.name]))
                report(f"left out: {damaged[raw.name]}")
        made = [result for raw in raw_files if (result := done.get(raw.name))]
        _check_map(dataset, made)
        for result in made:
            leave_in(folder, result.name)
    return made, sorted(raw.name for raw in missing if raw.name not in damaged)


def _check_map(dataset: Dataset, made: list[FileTokens]) -> None:
    """
    Raises:
        ConfigError: workers have another file of the map's module than this machine.
    """
    if dataset.source.map:
        own = map_identity(dataset.source.map)["map_sha256"]
        for result in made:
            if result.identity["map_sha256"] != own:
                raise ConfigError(
                    f"{dataset.source.map.function} of {dataset.name} is another here than where {result.name} was "
                    "tokenized; give all workers the same file"
                )


def _workers(pool: Pool, exchange: Exchange | None) -> int:
    """For how many workers to cut; without a shared disk for more, so that a part is little of one's disk."""
    return pool.workers if exchange is None else max(PARTS, pool.workers)


def _part_counts(files: list[RawFile], workers: int, min_part_bytes: int) -> dict[RawFile, int]:
    """How many parts to cut each file into, so that all workers stay busy; a compressed file is read from its start for
    each of them, so no more than that takes."""
    total = sum(raw.size_bytes for raw in files)
    target = max(min_part_bytes, total // (2 * workers))
    return {raw: 1 if workers == 1 else min(workers, -(-raw.size_bytes // target) or 1) for raw in files}


def tokenize_whole(
    dataset: Dataset,
    raw: RawFile,
    tokenizer: TokenizerInfo,
    tokenizer_folder: Path,
    folder: Path,
    *,
    progress: TaskProgress,
) -> FileTokens:
    """Stage 1 of a raw file that is not cut."""
    [part] = format_of(raw.url, raw.format).cut(raw.size_bytes, 1)
    tokenize_part(dataset, raw, part, 0, tokenizer, tokenizer_folder, folder, progress=progress)
    return join_parts(dataset, raw, 1, tokenizer, folder, progress=progress)
