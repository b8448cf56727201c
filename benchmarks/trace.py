"""Traces at the size of a real run: seconds and memory of step -> documents, document -> steps, and counting all steps.

    python benchmarks/trace.py [--sizes 300e9,1e12] [--markdown OUT.md]

A dataset of samples of 2,049 tokens, 8,192 in a shard, 1,430 tokens in a document, as the Pile has, is made up: its
manifest, its whole index of documents (gigabytes in the temporary folder), and provenance of the shards that are looked
into, but no tokens. A run of so many tokens reads it in batches of 1,280 samples. Each figure is
a process of its own, its imports left out. `text` searches the shards of the embedded corpus.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace

from benchmarks.measure import machine, make_shards, run, show, table

SEQ_LEN, PER_SHARD, DOCUMENT, BATCH = 2048, 8192, 1430, 1280
FILES = 30
NAMES = [f"{n:02d}.jsonl.zst" for n in range(FILES)]
CASES = ("step to documents", "document to steps", "all samples counted once", "text")


def opened(folder: Path, tokens: int):
    """The made-up dataset."""
    from openlm_pipeline.shards.dataset import ShardedDataset
    from openlm_pipeline.shards.manifest import DOCUMENTS, ShardEntry

    shards = int(tokens // ((SEQ_LEN + 1) * PER_SHARD))
    width = (SEQ_LEN + 1) * PER_SHARD
    entries = [
        ShardEntry(f"{k:08d}", PER_SHARD, 0, "0" * 64, width, "made up", beside=None if k else {DOCUMENTS: "0" * 64})
        for k in range(shards)
    ]
    info = {"seq_len": SEQ_LEN, "dtype": "uint16", "eot_id": 0, "totals": {}, "inputs": dict.fromkeys(NAMES, {})}
    return ShardedDataset(folder, made=(entries, info, "made up", None))


def places(documents: int):
    """(place in the order of documents) of each id in chunks of 1M, as packing permutes them."""
    import numpy as np

    from openlm_pipeline.ordering.permutation import unpermute_array

    for first in range(0, documents, 1 << 20):
        ids = np.arange(first, min(first + (1 << 20), documents))
        yield ids, unpermute_array(ids, documents, 0)


def write_index(dataset, path: Path) -> int:
    """Documents of `DOCUMENT` tokens each, in the order that packing gives them; how many."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = len(dataset) * (SEQ_LEN + 1) // DOCUMENT
    per_file = -(-documents // FILES)
    numbers = {"record": pa.int64(), "start": pa.int64(), "tokens": pa.int64()}
    schema = pa.schema({"file": pa.dictionary(pa.int32(), pa.string()), **numbers})
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["file"]) as out:
        for ids, place in places(documents):
            file = pa.DictionaryArray.from_arrays(pa.array((ids // per_file).astype("i4")), pa.array(NAMES))
            columns = [
                file,
                pa.array(ids % per_file),
                pa.array(place * DOCUMENT),
                pa.array(np.full(len(ids), DOCUMENT)),
            ]
            out.write_table(pa.table(columns, schema=schema), row_group_size=1 << 16)
    return documents


def write_provenance(dataset, k: int) -> None:
    """Of a shard, by the same order of documents."""
    import numpy as np

    from openlm_pipeline.ordering.permutation import permute_array
    from openlm_pipeline.shards.provenance import provenance_path
    from openlm_pipeline.tokenization.packing import Spans, _write_parquet, provenance

    width = SEQ_LEN + 1
    documents = len(dataset) * width // DOCUMENT
    per_file = -(-documents // FILES)
    begin, end = k * PER_SHARD * width, (k + 1) * PER_SHARD * width
    order = np.arange(begin // DOCUMENT, -(-end // DOCUMENT))
    ids = permute_array(order[order < documents], documents, 0)
    begins = np.maximum(order[: len(ids)] * DOCUMENT, begin)
    spans = Spans(ids // per_file, ids % per_file, begins, begins - order[: len(ids)] * DOCUMENT)
    sha256 = _write_parquet(provenance_path(dataset, k), provenance(NAMES, spans, begin, end, width))
    dataset.entries[k] = replace(dataset.entries[k], provenance_sha256=sha256)  # which each reader compares


def child(case: str, folder: Path, tokens: int) -> None:
    """Print the seconds of one case, and what it found."""
    import numpy as np

    from openlm_pipeline.ordering.continued import recorded_order, seen
    from openlm_pipeline.shards.document_index import find_document
    from openlm_pipeline.shards.provenance import spans_of

    dataset = opened(folder, tokens)
    record = {"sampling": "permutation", "settings": {}, "seed": 1, "samples": len(dataset)}
    record |= {"data": [{"weight": 1, "manifest_sha256": "made up"}]}
    sizes = {"made up": dataset.shard_sizes}
    if case == "text":
        from openlm_pipeline.shards.dataset import ShardedDataset
        from openlm_pipeline.shards.inspect import tokenizer_of
        from openlm_pipeline.shards.search import find_text

        real = ShardedDataset(folder / "real" / "shards" / "embedded" / "v1")
        began = time.perf_counter()
        found = sum(1 for _ in find_text(real, tokenizer_of(real.folder), "the function of"))
        seconds = time.perf_counter() - began
        print(
            json.dumps(
                [seconds, f"{sum(e.tokens for e in real.entries) / seconds / 1e6:.1f}M tokens/s, {found} places"]
            )
        )
        return
    if case == "step to documents":
        step = len(dataset) // BATCH // 2
        _, samples = recorded_order(record, sizes).picks(step * BATCH, BATCH)
        for k in np.unique(dataset.shards_of(samples)).tolist():
            write_provenance(dataset, k)
        before, began, found = bytes_read(), time.perf_counter(), set()
        _, samples = recorded_order(record, sizes).picks(step * BATCH, BATCH)
        for sample in samples.tolist():
            k = sample // PER_SHARD
            spans = spans_of(dataset, k, sample)
            begin = sample % PER_SHARD * (SEQ_LEN + 1)
            rows = (spans.begin < begin + SEQ_LEN + 1) & (spans.begin + spans.length > begin)
            found |= {spans.document(row) for row in np.flatnonzero(rows).tolist()}
        seconds = time.perf_counter() - began
        shards, read = len(np.unique(samples // PER_SHARD)), (bytes_read() - before) / 1e6
        print(json.dumps([seconds, f"{len(found):,} documents in {shards:,} shards, {read:.0f} MB read"]))
    elif case == "document to steps":
        documents = len(dataset) * (SEQ_LEN + 1) // DOCUMENT
        rng = random.Random(0)
        wanted = [divmod(rng.randrange(documents), -(-documents // FILES)) for _ in range(10)]
        for file, number in wanted:
            start = find_start(documents, file, number)
            write_provenance(dataset, start // ((SEQ_LEN + 1) * PER_SHARD))
        before, began, steps = bytes_read(), time.perf_counter(), []
        for file, number in wanted:
            place = find_document(dataset, NAMES[file], number)
            _, at = seen({**record, "samples": 4 * len(dataset)}, sizes, "made up", place.samples(dataset))
            steps += (at // BATCH).tolist()
        seconds = (time.perf_counter() - began) / len(wanted)
        times, read = len(steps) / len(wanted), (bytes_read() - before) / len(wanted) / 1e6
        print(json.dumps([seconds, f"{times:.1f} times in four epochs, {read:.1f} MB read; means of 10 documents"]))
    else:
        order, counts = recorded_order(record, sizes), np.zeros(len(dataset), np.uint16)
        began, some = time.perf_counter(), min(1 << 24, len(dataset))
        for start in range(0, some, 1 << 16):
            np.add.at(counts, order.picks(start, 1 << 16)[1], 1)
        seconds = (time.perf_counter() - began) * len(dataset) / some
        print(json.dumps([seconds, f"{len(dataset):,} samples, from the first {some:,}"]))


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def find_start(documents: int, file: int, number: int) -> int:
    """First token of a document."""
    import numpy as np

    from openlm_pipeline.ordering.permutation import unpermute_array

    return int(unpermute_array(np.array([file * -(-documents // FILES) + number]), documents, 0)[0]) * DOCUMENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="300e9,1e12", help="tokens")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], Path(arguments.child[1]), int(arguments.child[2]))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "real").mkdir()
        make_shards(Path(scratch, "real"), SEQ_LEN)
        for tokens in (int(float(size)) for size in arguments.sizes.split(",")):
            folder = Path(scratch)
            index = folder / "documents.parquet"
            for left in folder.glob("*.parquet"):
                left.unlink()
            documents = write_index(opened(folder, tokens), index)
            size = f"{tokens / 1e9:,.0f}B tokens, {documents / 1e6:,.0f}M documents"
            size += f", index {index.stat().st_size / 1e9:.1f} GB"
            print(size, flush=True)
            for case in CASES:
                usage = run(
                    [sys.executable, __file__, "--child", case, scratch, str(tokens)], OPENLM_HOME=f"{scratch}/real"
                )
                seconds, found = json.loads(usage.output.splitlines()[-1])
                rows.append([size, case, f"{seconds:.2g}", f"{usage.peak_mib:.0f}", found])
                print(rows[-1], flush=True)
    text = f"{machine('numpy', 'pyarrow')}; n = 1\n\n" + table(["size", "what", "seconds", "peak MiB", "found"], rows)
    show(text, arguments.markdown)
    return None


if __name__ == "__main__":
    main()
