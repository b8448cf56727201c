"""`openlm trace`: from a step to its documents and raw text, from a document or text to the steps that read it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.cli.runs import Version
from openlm_pipeline.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from openlm_pipeline.lineage.spikes import Spike
    from openlm_pipeline.lineage.trace import Part, Trace, TracedDocument
    from openlm_pipeline.runs.folder import RunFolder
    from openlm_pipeline.storage.home import Home

_console = Console(highlight=False, soft_wrap=True)
_tables = Console(highlight=False, soft_wrap=True, width=1000)
"""They are as wide as what stands in them."""
_progress = Console(stderr=True)
_DOCUMENTS = 10
"""Of a spike in its table; JSON has all."""


def _say(line: str) -> None:
    _console.print(printable(line), markup=False)


def _print(columns: Iterable[str], rows: Iterable[Iterable[Any]], numbers: str = "") -> None:
    """A table; the columns in `numbers` are flush right."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers.split() else "left", no_wrap=True)
    for row in rows:
        table.add_row(*("" if cell is None else _line(str(cell)) for cell in row))
    _tables.print(table)


def _line(text: str) -> str:
    """Text as one line, without what would steer the terminal or be taken for markup."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t")).replace("[", "\\[")


def _json(value: Any) -> None:
    typer.echo(json.dumps(asdict(value), ensure_ascii=False))


def trace(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN[@MILESTONE]", help="A run (`openlm runs`); with a milestone, where it came from."),
    ],
    step: Annotated[int | None, typer.Option(help="What this step read: its documents, by row of the batch.")] = None,
    row: Annotated[int | None, typer.Option(help="With --step: this row of the batch alone, from 0.", min=0)] = None,
    document: Annotated[
        str | None,
        typer.Option(metavar="FILE:RECORD", help="Which steps read this document: a raw file's name, and its record."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Which documents have this exact text, and which steps read it.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="MILESTONE", help="Only up to this milestone or number of tokens, trained or not."),
    ] = None,
    spike: Annotated[
        bool, typer.Option("--spike", help="The steps of the worst loss and gradient, and those left out.")
    ] = False,
    number: Annotated[int, typer.Option("-n", help="With --spike: so many of each kind.", min=1)] = 5,
    raw: Annotated[bool, typer.Option("--raw", help="Also the whole text of each record, from the raw file.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Tokenize the raw records again; exit code 4 at the first difference.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="With a milestone: sizes of shards and raw files, not their hashes.")
    ] = False,
    version: Version = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Trace a run's steps to documents and raw text, documents and texts to steps, a milestone to raw files.

    Steps are counted as in metrics.jsonl, the first is 1. A fork's parents are walked. Steps that were left out are
    marked: their samples were read, and not learned from. --text reads all shards, some 7M tokens a second. Of a
    milestone each link from its scorecard to the raw files is compared by hash: ok, differs (exit code 4) or not here.

    Examples:

    openlm trace demo --step 23 --row 0 --raw --check

    openlm trace demo --document 00.jsonl.zst:2314 --until 400K

    openlm trace demo --text "It was the best of times"

    openlm trace demo --spike -n 3

    openlm trace demo@400K
    """
    from openlm_pipeline.lineage.run_order import RunOrder
    from openlm_pipeline.lineage.spikes import spikes
    from openlm_pipeline.lineage.trace import Trace
    from openlm_pipeline.pipeline.items import milestone_named
    from openlm_pipeline.pipeline.overview import experiment_of, find_run
    from openlm_pipeline.storage.home import Home

    name, _, milestone = run.partition("@")
    asked = sum([step is not None, document is not None, text is not None, spike])
    if asked > 1 or not (asked or milestone):
        raise ConfigError("say what to trace: one of --step, --document, --text and --spike, or RUN@MILESTONE alone")
    if milestone and (step is not None or spike):
        raise ConfigError("a milestone goes with --document and --text, where it means --until, or stands alone")
    if (raw or check) and step is None and document is None:
        raise ConfigError("--raw and --check go with --step or --document")
    home = Home.from_env()
    folder = find_run(home, name, version)
    if not asked:
        _chain(folder, milestone_named(experiment_of(folder), milestone), home, quick, as_json)
        return
    order = RunOrder(folder, home)
    traced, limit = Trace(order), order.until(until or milestone or None)
    if step is not None:
        _parts(traced, traced.step(step, row), raw, check, as_json)
        if step * order.last.batch > order.last.end:
            _progress.print(f"{order.name} is not trained up to step {step} yet: this is what it will read")
    elif document is not None:
        file, _, record = document.rpartition(":")
        if not file or not record.isdecimal():
            raise ConfigError(f"--document {document}: write FILE:RECORD, such as 00.jsonl.zst:2314")
        for found in traced.document(file, int(record), limit):
            _document(found, as_json)
            if raw or check:
                _parts(traced, traced.document_parts(found), raw, check, as_json, one_document=True)
    elif text is not None:
        _text(traced, text, limit, as_json)
    else:
        _spikes(spikes(traced, number), as_json)
    for note in order.notes:
        _progress.print(f"note: {note}", markup=False)


def _parts(
    traced: "Trace", parts: "Iterable[Part]", raw: bool, check: bool, as_json: bool, one_document: bool = False
) -> None:
    """
    Args:
        one_document: they are of one, whose text is shown once.
    """
    parts = list(traced.raw(parts, check=check) if raw or check else parts)
    if as_json:
        for part in parts:
            _json(part)
        return
    columns = "step row source sample tokens file record document offset text"
    rows = (
        [p.step, p.row, p.source, p.sample, _range(p.start, p.tokens), p.file, p.record]
        + [None if p.document_start is None else _range(p.document_start, p.tokens), p.offset, p.text]
        for p in parts
    )
    _print(columns.split(), rows, "step row sample record offset")
    for part in [p for p in parts if p.raw is not None][: 1 if one_document else None] if raw else []:
        _say(f"\n{part.file}:{part.record}\n{part.raw}")
    if parts and parts[0].left_out:
        _say(f"read, not learned from: {parts[0].left_out}")
    if any(p.file is None for p in parts):
        _say("a part without a file is padding, or of ready-made shards, which have no provenance")
    if check:
        count = sum(p.file is not None for p in parts)
        _say(f"{count} parts have the tokens of their raw records, which were tokenized again")


def _range(start: int, count: int) -> str:
    return f"{start}..{start + count}"


def _document(found: "TracedDocument", as_json: bool) -> None:
    from openlm_pipeline.units import format_tokens

    if as_json:
        _json(found)
        return
    name = f"{found.file}:{found.record}" if found.file else "a document that no provenance names"
    facts = [f"{name} of {found.source}"]
    facts += [f"{found.tokens:,} tokens"] if found.tokens is not None else []
    facts += [f"at byte {found.offset:,}"] if found.offset is not None else []
    shown = ", ".join(map(str, found.samples[:8])) + (", ..." if len(found.samples) > 8 else "")
    facts += [f"in samples {shown}" if shown else "in no sample", *([found.note] if found.note else [])]
    _say("; ".join(facts))
    if learned := found.learned:
        first, last = learned[0], learned[-1]
        _say(
            f"read {max(seen.time for seen in learned)} times; first in step {first.step} of {first.run}, after "
            f"{format_tokens(first.tokens_before)} tokens; last in step {last.step} of {last.run}"
        )
    else:
        _say("no step up to there learned from it")
    columns = "time run step row sample tokens_before"
    rows = (
        [s.time, s.run, s.step, s.row, s.sample, f"{s.tokens_before:,}", _note(s.left_out, s.trained)]
        for s in found.seen
    )
    if found.seen:
        _print([*columns.split(), "note"], rows, "time step row sample tokens_before")


def _note(left_out: str | None, trained: bool) -> str:
    if not trained:
        return "not trained yet"
    return f"read, not learned from: {left_out}" if left_out else ""


def _text(traced: "Trace", text: str, limit: int | None, as_json: bool) -> None:
    count = 0
    with _progress.status("searching") as status:

        def told(dataset: str, shard: int, shards: int) -> None:
            status.update(f"{dataset}: {shard:,} of {shards:,} shards searched, {count:,} documents found")

        for found in traced.text(text, limit, told):
            count += 1
            _document(found, as_json)
    if not as_json:
        _say(f"{count:,} documents of {traced.order.name} have this text")


def _spikes(found: "list[Spike]", as_json: bool) -> None:
    for spike in found:
        if as_json:
            _json(spike)
            continue
        _say(spike.title)
        _print(["source", "file", "record", "samples"], spike.documents[:_DOCUMENTS], "record samples")
        if len(spike.documents) > _DOCUMENTS:
            _say(f"... {len(spike.documents):,} documents in all; --json lists them")
        if spike.looked_up < spike.samples:
            _say(f"of {spike.samples:,} samples the documents of the first {spike.looked_up:,} were looked up")
        _say("")
    if not found and not as_json:
        _say("no step stands out: no loss or gradient norm is above all of the 20 records before it")


def _chain(folder: "RunFolder", label: str, home: "Home", quick: bool, as_json: bool) -> None:
    from openlm_pipeline.pipeline.chain import links

    found = []
    with _progress.status("comparing hashes") as status:
        for link in links(folder, label, home, quick=quick):
            found.append(link)
            status.update(f"{link.kind} {link.name}: {link.state}")
            if as_json:
                _json(link)
    if not as_json:
        _print(["state", "what", "name", "why"], ([link.state, link.kind, link.name, link.why] for link in found))
    if differing := [link for link in found if link.state == "differs"]:
        names = ", ".join(f"{link.kind} {link.name}" for link in differing[:5])
        raise DataError(f"{len(differing)} of {len(found)} links of {folder.path.parent.name}@{label} differ: {names}")
