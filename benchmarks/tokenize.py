"""Raw text to shards against other tokenizer pipelines: CPU of whole processes, paired and interleaved.

    python benchmarks/tokenize.py --input FILE.jsonl.zst --tokenizer tokenizer.json [--runs 3] [--markdown OUT.md]

`openlm` reads, tokenizes, shuffles and writes shards with provenance, in one process (`--workers 1`). The others:
`tokenizers` only reads and encodes with Hugging Face's `encode_batch_fast`, on all cores and on one; `datatrove` runs
JsonlReader and DocumentTokenizer, and with the merger also its shuffle over files. All must come to the same number of
tokens. The competitors are those of the extra `benchmarks`; one that is not installed is left out.
"""

import sys
from pathlib import Path

# This file has the name of a standard module, so its own folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import tempfile
from collections.abc import Callable

from benchmarks.measure import Usage, installed, machine, openlm_tokenize, ratios, run, show, spread, table

EOT = "<|endoftext|>"
BATCH_CHARACTERS = 1 << 20


def openlm_totals(home: Path) -> dict[str, int]:
    return json.loads((home / "shards" / "raw" / "v1" / "dataset.json").read_text())["totals"]


def encode(raw: Path, tokenizer_file: Path) -> None:
    """Child process: read and encode, and print the number of tokens with an end-of-text for each document."""
    import zstandard
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens = characters = 0
    texts: list[str] = []

    def flush() -> int:
        return sum(len(e.ids) + 1 for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    with zstandard.open(raw, "rt", encoding="utf-8", newline="\n") as f:
        for line in f:
            texts.append(json.loads(line)["text"])
            characters += len(texts[-1])
            if characters >= BATCH_CHARACTERS:
                tokens += flush()
                texts.clear()
                characters = 0
    print(tokens + flush())


def datatrove(raw: Path, tokenizer_file: Path, out: Path, merge: bool) -> None:
    """Child process: datatrove's pipeline; prints the number of tokens written."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    written = out / "tokens"
    tokenizer = DocumentTokenizer(str(written), str(tokenizer_file), eos_token=EOT, seed=0)
    reader = JsonlReader(str(raw.parent), glob_pattern=raw.name)
    LocalPipelineExecutor([reader, tokenizer], tasks=1, workers=1, logging_dir=str(out / "logs")).run()
    if merge:
        merger = DocumentTokenizerMerger(str(written), str(out / "merged"), "merged", seed=0, progress=False)
        LocalPipelineExecutor([merger], tasks=1, workers=1, logging_dir=str(out / "merge_logs")).run()
        written = out / "merged"
    print(sum(path.stat().st_size for path in written.glob("*.ds")) // 2)


def measure(arguments: argparse.Namespace) -> tuple[dict[str, list[Usage]], int]:
    """Rounds of all engines, each round in another order, and the bytes of the text; checks that they agree on the
    number of tokens."""
    raw, tokenizer = arguments.input.resolve(), arguments.tokenizer.resolve()
    text_bytes: set[int] = set()

    def child(python: str, name: str, *more: str) -> list[str]:
        return [python, __file__, "--child", name, "--input", str(raw), "--tokenizer", str(tokenizer), *more]

    def ours(workers: int) -> Callable[[Path], tuple[Usage, int]]:
        def go(folder: Path) -> tuple[Usage, int]:
            usage = run(openlm_tokenize(raw, tokenizer, folder, workers=workers), OPENLM_HOME=str(folder))
            totals = openlm_totals(folder)
            text_bytes.add(totals["text_bytes"])
            return usage, totals["tokens"]

        return go

    def theirs(command: list[str], **environment: str) -> Callable[[Path], tuple[Usage, int]]:
        def go(folder: Path) -> tuple[Usage, int]:
            usage = run([*command, "--out", str(folder)], **environment)
            return usage, int(usage.output.split()[-1])

        return go

    engines = {"openlm": ours(1)}
    if arguments.dask_workers:
        engines[f"openlm, Dask with {arguments.dask_workers} workers"] = ours(arguments.dask_workers)
    engines["tokenizers encode_batch_fast, one thread"] = theirs(
        child(sys.executable, "encode"), TOKENIZERS_PARALLELISM="false"
    )
    engines["tokenizers encode_batch_fast, all threads"] = theirs(
        child(sys.executable, "encode"), TOKENIZERS_PARALLELISM="true"
    )
    if installed("datatrove", arguments.datatrove_python):
        engines["datatrove"] = theirs(child(arguments.datatrove_python, "datatrove"))
        engines["datatrove with merger"] = theirs(child(arguments.datatrove_python, "datatrove", "--merge"))
    else:
        print("datatrove is not installed, so it is left out: pip install 'openlm-pipeline[benchmarks]'")
    usages: dict[str, list[Usage]] = {name: [] for name in engines}
    counts = set()
    names = list(engines)
    for n in range(arguments.runs):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                usage, tokens = engines[name](Path(folder))
            counts.add(tokens)
            usages[name].append(usage)
            print(f"round {n + 1}, {name}: {usage.cpu_seconds:.2f} CPU-seconds, {usage.peak_mib:.0f} MiB", flush=True)
            if len(counts) > 1:
                raise SystemExit(f"{name} made {tokens} tokens, another engine did not: {counts}")
    print(f"all made {counts.pop():,} tokens")
    return usages, text_bytes.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a .jsonl.zst file with a `text` field")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json with an <|endoftext|> token")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dask-workers", type=int, default=0, help="measure a local Dask cluster of this size as well")
    parser.add_argument("--datatrove-python", default=sys.executable, help="interpreter that has datatrove")
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    parser.add_argument("--child", choices=("encode", "datatrove"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "encode":
        return encode(arguments.input, arguments.tokenizer)
    if arguments.child == "datatrove":
        return datatrove(arguments.input, arguments.tokenizer, arguments.out, arguments.merge)
    usages, text_bytes = measure(arguments)
    hours_per_tb = 1e12 / text_bytes / 3600
    cpu = {name: [u.cpu_seconds for u in series] for name, series in usages.items()}
    against = ratios(cpu, "openlm")
    rows = [
        [
            name,
            spread(cpu[name]),
            spread([seconds * hours_per_tb for seconds in cpu[name]], 1),
            spread(against[name], 1),
            f"{max(u.peak_mib for u in usages[name]):.0f}",
        ]
        for name in usages
    ]
    about = f"{arguments.input.name}, {text_bytes / 1e6:.1f} MB of text, n = {arguments.runs}"
    header = ["engine", "CPU-seconds, median (range)", "CPU-hours per TB", "times openlm's, paired", "peak MiB"]
    text = f"{machine('gigatoken', 'tokenizers', 'datatrove', 'numpy')}; {about}\n\n{table(header, rows)}"
    show(text, arguments.markdown)
    return None


if __name__ == "__main__":
    main()
