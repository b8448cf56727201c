"""`openlm shards`: check, count, look into and export finished datasets; thin over `openlm_pipeline.shards`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, printable
from openlm_pipeline.storage.home import Home

if TYPE_CHECKING:
    from openlm_pipeline.experiments import Dataset
    from openlm_pipeline.shards.foreign import ForeignStats
    from openlm_pipeline.shards.inspect import DatasetStats

shards_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Check, count, look into and export finished datasets of shards.",
)
console = Console(highlight=False, soft_wrap=True)
_FULL_WIDTH = 100_000  # where the output is no terminal, no line is to be broken

Target = Annotated[
    str, typer.Argument(metavar="PATH_OR_RECIPE", help="Folder with manifest.jsonl, or a recipe, for its datasets.")
]
DatasetName = Annotated[
    str | None, typer.Option("--dataset", help="Of a recipe: only this dataset, named like its source.")
]


def _say(line: str) -> None:
    console.print(printable(line), markup=False)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds OpenLM's shards."""
    from openlm_pipeline.shards.manifest import DATASET, MANIFEST

    return (folder / MANIFEST).exists() and not (folder / DATASET).exists()


def _folders(target: str, dataset: str | None, *, foreign: bool = False) -> list[Path]:
    """The folders of datasets that a path or recipe stands for.

    Args:
        foreign: take OpenLM's too.
    """
    from openlm_pipeline.shards.manifest import DATASET

    path = Path(target)
    if path.is_dir():
        if dataset is not None:
            raise ConfigError("--dataset chooses among the datasets of a recipe, but a folder was given")
        if _is_foreign(path) and not foreign:
            raise DataError(f"{path} has no {DATASET}: it holds OpenLM's shards, or an export, and no dataset of ours")
        return [path]
    if path.suffix not in (".yaml", ".yml") and os.sep in target:
        raise MissingInputError(f"there is no folder {target}")
    from openlm_pipeline.experiments import load_experiment

    experiment, home = load_experiment(target), Home.from_env()
    folders = {d.name: _place(d, home) for d in experiment.datasets()}
    if dataset is None:
        return list(folders.values())
    if dataset not in folders:
        raise ConfigError(f"recipe {experiment.name} has no dataset {dataset!r}; it has {', '.join(folders)}")
    return [folders[dataset]]


def _place(dataset: "Dataset", home: Home) -> Path:
    """The folder of a dataset's shards; of ready-made ones in a store or a list the local copies."""
    from openlm_pipeline.shards.foreign import is_list

    shards = dataset.source.shards
    if shards and not is_list(shards) and Path(home.resolve(shards)).is_dir():
        return Path(home.resolve(shards))
    return home.shards(dataset.name, dataset.version)


def _folder(target: str, dataset: str | None, *, foreign: bool = False) -> Path:
    """The one folder that is meant."""
    folders = _folders(target, dataset, foreign=foreign)
    if len(folders) > 1:
        names = ", ".join(folder.parent.name for folder in folders)
        raise ConfigError(f"{target} has several datasets; choose one with --dataset: {names}")
    return folders[0]


@shards_app.command()
def verify(
    target: Target,
    dataset: DatasetName = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only that all shards are there in their size.")] = False,
) -> None:
    """Compare every shard with its sha256 in the manifest, and its provenance with its tokens.

    OpenLM's own shards, which have no hashes, are read as training would read them. Names each damaged shard, and ends
    with exit code 4 if there is one.

    Example: openlm shards verify pretrain_1b --quick
    """
    from openlm_pipeline.shards.foreign import check_foreign
    from openlm_pipeline.shards.inspect import check_shards
    from openlm_pipeline.shards.manifest import MANIFEST

    progress = Console(stderr=True)
    damaged = 0
    for folder in _folders(target, dataset, foreign=True):
        foreign = _is_foreign(folder)
        if not (folder / MANIFEST).exists():
            raise MissingInputError(f"there are no finished shards in {folder}; `openlm tokenize RECIPE` makes them")
        count = sum(1 for _ in (folder / MANIFEST).open("rb"))
        checks = track(
            check_foreign(folder, quick=quick) if foreign else check_shards(folder, quick=quick),
            "verifying",
            count + (not foreign),
            console=progress,
            transient=True,
            disable=not progress.is_terminal,
        )
        problems = [problem for _, problem in checks if problem]
        for problem in problems:
            _say(problem)
        damaged += len(problems)
        good = "all there" if quick else "all whole"
        if not foreign:
            good = f"all of the right {'size' if quick else 'sha256'}"
        _say(f"{folder}: {count} shards, {f'{len(problems)} problems' if problems else good}")
    if damaged:
        raise DataError(
            f"{damaged} problems found, listed above. Restore these files from a copy, or delete them: "
            "`openlm tokenize RECIPE` makes shards that are missing again, and nothing else."
        )


@shards_app.command()
def stats(
    target: Target,
    dataset: DatasetName = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Read all shards, and count documents that are there more than once.")
    ] = False,
) -> None:
    """Count shards, samples, tokens and documents, in all, by the field of a breakdown, and for each raw file.

    Of OpenLM's own shards, whose manifest says little, all tars are read.

    Example: openlm shards stats demo --dataset embedded --duplicates
    """
    from openlm_pipeline.shards.foreign import foreign_stats
    from openlm_pipeline.shards.inspect import dataset_stats, exact_duplicates

    for folder in _folders(target, dataset, foreign=True):
        if _is_foreign(folder):
            _print_foreign(folder, foreign_stats(folder))
            continue
        _print_stats(dataset_stats(folder))
        if duplicates:
            same, compared = exact_duplicates(folder)
            _say(f"exact duplicates: {same:,} of {compared:,} documents have the tokens of an earlier one")


def _print_foreign(folder: Path, found: "ForeignStats") -> None:
    rows = {
        "folder": f"{folder}, of OpenLM's shards",
        "shards": f"{found.shards:,}",
        "samples": f"{found.samples:,} of {found.sample_tokens:,} tokens",
        "tokens": f"{found.samples * found.sample_tokens - found.padding:,}, end-of-text included",
        "  padding": f"{found.padding:,}",
        "documents": f"about {found.ends:,}, by their end-of-text (id 0)",
        "on disk": f"{found.bytes:,} bytes, {found.bytes / max(1, found.samples * found.sample_tokens):.2f} per token",
        "largest id": f"{found.largest_id:,}",
    }
    _print_table(Table(show_header=False, box=None), ([name, value] for name, value in rows.items()))


def _print_stats(found: "DatasetStats") -> None:
    from openlm_pipeline.corpus.maps import largest_first

    info, totals = found.dataset.info, found.dataset.info["totals"]
    tokenizer = info["tokenizer"]
    rows = {
        "dataset": f"{info['name']} {info['version']}",
        "folder": found.dataset.folder,
        "shards": f"{totals['shards']:,}",
        "samples": f"{totals['samples']:,} of {found.dataset.format.sample_tokens:,} tokens",
        "tokens": f"{totals['tokens']:,} of {totals['files']:,} raw files, end-of-text included",
        "  in no sample": f"{totals['tail_tokens']:,}",
        "  padding added": f"{totals.get('padding_tokens', 0):,}",
        "documents": f"{totals['documents']:,}",
        "quarantined": f"{totals['quarantined']:,}",
        "text": f"{totals['text_bytes']:,} bytes, {totals['text_bytes'] / max(1, totals['tokens']):.2f} per token",
        "on disk": f"{found.shard_bytes:,} bytes, {found.bytes_per_token:.2f} per token",
        "dtype": info["dtype"],
        "tokenizer": f"{tokenizer['name']}, {tokenizer['vocab_size']:,} ids, sha256 {tokenizer['sha256'][:12]}",
        "end-of-text id": info["eot_id"],
        "padding id": "none" if info["pad_id"] is None else info["pad_id"],
    }
    if (special := totals.get("special_strings")) is not None:
        rows["special tokens' strings in documents"] = f"{special:,}"
    if lengths := found.document_tokens:
        rows["tokens per document"] = ", ".join(f"{_quantile(q)} {tokens:,}" for q, tokens in lengths.items())
    if "dropped" in totals:
        rows["left out by the source's map or list"] = f"{totals['dropped']:,}"
        rows |= {f"  {reason}": f"{count:,}" for reason, count in info.get("dropped", {}).items()}
        rows["changed by its map"] = f"{totals['changed']:,}"
    _print_table(Table(show_header=False, box=None), ([name, str(value)] for name, value in rows.items()))
    if breakdown := info.get("breakdown"):
        field = next(iter(info["inputs"].values()))["breakdown"]
        table = Table(field, box=None)
        for column in ("documents", "text bytes", "tokens"):
            table.add_column(column, justify="right")
        _print_table(table, ([name, *(f"{n:,}" for n in counts)] for name, counts in largest_first(breakdown)))
    if found.files:
        table = Table("raw file", box=None)
        for column in ("tokens", "documents"):
            table.add_column(column, justify="right")
        _print_table(table, ([name, f"{f.tokens:,}", f"{f.documents:,}"] for name, f in found.files.items()))


def _quantile(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{share:.0%}")


def _print_table(table: Table, rows: Iterable[list[str]]) -> None:
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # a name is not markup
    Console(width=None if console.is_terminal else _FULL_WIDTH).print(table)


@shards_app.command()
def inspect(
    target: Target,
    sample: Annotated[int, typer.Argument(min=0, help="Number of the sample in the dataset, from 0.")],
    dataset: DatasetName = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the dataset; by default looked for beside the shards.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids as well.")] = False,
) -> None:
    """Decode one sample and name the documents it is made of: raw file, record, token span.

    OpenLM's own shards need --tokenizer, and say only where documents end.

    Where a sample cuts a letter of several tokens, `\ufffd` stands for what is missing.

    Example: openlm shards inspect demo 17 --dataset embedded
    """
    from openlm_pipeline.shards.inspect import sample_spans, tokenizer_of

    folder = _folder(target, dataset, foreign=True)
    if _is_foreign(folder):
        _inspect_foreign(folder, sample, tokenizer, ids)
        return
    spans = sample_spans(folder, sample)
    path = tokenizer_of(folder, tokenizer)
    from openlm_pipeline.tokenizers.engine import load_any

    decoder = load_any(path)
    _say(f"sample {sample} of {folder}, {sum(len(s.ids) for s in spans):,} tokens, {len(spans)} parts")
    for span in spans:
        place = f"tokens {span.start} to {span.start + len(span.ids) - 1}: "
        if span.file is None:
            _say(f"\n{place}padding")
        else:
            last = span.document_start + len(span.ids) - 1
            _say(f"\n{place}{span.file}, record {span.record}, its tokens {span.document_start} to {last}")
        if ids:
            _say(" ".join(map(str, span.ids.tolist())))
        _say(_visible(decoder.decode(span.ids.tolist(), skip_special_tokens=False)))


def _inspect_foreign(folder: Path, sample: int, tokenizer: Path | None, ids: bool) -> None:
    from openlm_pipeline.shards.foreign import foreign_sample
    from openlm_pipeline.tokenizers.engine import load_any

    if tokenizer is None:
        raise ConfigError(
            f"{folder} holds OpenLM's shards, which don't say of which tokenizer: name its file, --tokenizer"
        )
    parts = foreign_sample(folder, sample)
    decoder = load_any(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer)
    _say(f"sample {sample} of {folder}, {sum(map(len, parts)):,} tokens, {len(parts)} parts by their end-of-text")
    for part in parts:
        _say("")
        if ids:
            _say(" ".join(map(str, part.tolist())))
        _say(_visible(decoder.decode(part.tolist(), skip_special_tokens=False)))


def _visible(text: str) -> str:
    """Text without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


@shards_app.command()
def export(
    target: Target,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the export; made if need be.")],
    dataset: DatasetName = None,
    format: Annotated[
        Literal["json.gz", "json", "txt"],
        typer.Option(help="json.gz is the newest OpenLM's own; that of August 2023 reads json and txt."),
    ] = "json.gz",
    eot_as: Annotated[
        Literal["id", "string"],
        typer.Option(help="Write the end-of-text token as its id, or as <|endoftext|> like make_2048.py."),
    ] = "id",
    count_key: Annotated[
        Literal["num_sequences", "num_chunks"],
        typer.Option(help="What the manifest calls the number of samples; num_chunks is the older name."),
    ] = "num_sequences",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: CPUs.")] = None,
) -> None:
    """Write a dataset as tars and a manifest that OpenLM reads. Resumes after any interruption.

    OpenLM takes the string <|endoftext|> for id 0 or, in its version of August 2023, for 50256, which GPT-NeoX uses for
    a run of spaces, as OpenLM does with its padding. Ids mean the same everywhere, so they are the default.

    Example: openlm shards export pretrain_1b -o /data/openlm --format json.gz --workers 16
    """
    from openlm_pipeline.pools import DaskSettings
    from openlm_pipeline.shards.shard_export import export_shards

    pools = DaskSettings.from_env(workers=workers).pool
    made = export_shards(
        _folder(target, dataset), output_dir, pools, _say, format=format, eot_as=eot_as, count_key=count_key
    )
    done = "was exported already" if made.reused else "exported"
    _say(f"{made.path}: {made.facts['samples']:,} samples in {made.facts['shards']:,} shards {done}")
