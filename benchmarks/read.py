"""Shuffled reading of samples against webdataset's pipelines: tokens per CPU-second, paired and interleaved.

    python benchmarks/read.py --input FILE.jsonl.zst --tokenizer tokenizer.json [--runs 3] [--markdown OUT.md]

The same samples are read from our shards (a seeded permutation of all samples, gathered from memory-mapped files), by
webdataset from the same shards, and by webdataset from their export to OpenLM's json.gz, as OpenLM reads: tar, shuffle
buffer, decompress, parse, cut, batch. Each reader makes int64 arrays [batch, seq_len + 1], from files that are in the
page cache; the time to import and to open is left out. `openlm without sums` leaves out the checksum of each sample.
webdataset comes with the extra `benchmarks`.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measure import installed, machine, openlm_tokenize, ratios, run, show, spread, table

BATCHES = (16, 512)
SAMPLES_PER_SHARD = 1024
SHUFFLE_BUFFER = 20_000
"""OpenLM's."""
MIN_CPU_SECONDS = 2.0
OURS, UNCHECKED, WDS_NPY, WDS_GZ = "openlm", "openlm without sums", "webdataset npy", "webdataset json.gz"


def export(shards: Path, out: Path) -> None:
    """Child process: write the shards as OpenLM's json.gz."""
    from openlm_pipeline.pools import DaskSettings
    from openlm_pipeline.shards.shard_export import export_shards

    export_shards(shards, out, DaskSettings(workers=1).pool, print, format="json.gz")


def read_ours(shards: Path, batch: int, *, check: bool) -> Iterator[int]:
    """Tokens of each batch, for ever.

    Args:
        check: each sample's checksum, as always.
    """
    import numpy as np

    from openlm_pipeline.ordering.samplings.epochs import DataOrder
    from openlm_pipeline.shards.dataset import ShardedDataset

    dataset = ShardedDataset(shards)
    if not check:
        dataset.entries = [replace(entry, sums_sha256=None) for entry in dataset.entries]
    order = DataOrder([len(dataset)], [1.0], seed=0)
    out = np.empty((batch, dataset.info["seq_len"] + 1), np.int64)
    start = 0
    while True:
        _, samples = order.picks(start, batch)
        out[:] = dataset.gather(samples)
        start += batch
        yield out.size


def read_webdataset(shards: Path, batch: int, key: str) -> Iterator[int]:
    """Tokens of each batch, for ever."""
    import gzip
    import io

    import numpy as np
    import webdataset as wds

    def decode(sample: dict[str, bytes]) -> object:
        if key == "npy":
            return np.lib.format.read_array(io.BytesIO(sample[key]), allow_pickle=False)
        return json.loads(gzip.decompress(sample[key]))[:2049]

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    while True:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(urls),
            wds.tarfile_to_samples(),
            wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER),
            wds.map(decode),
            wds.batched(batch, collation_fn=lambda samples: np.array(samples, dtype=np.int64)),
        )
        for samples in pipeline:
            yield samples.size


def time_reading(batches: Iterator[int], shards: Path) -> None:
    """Child process: read for some CPU-seconds after one batch of warming up, and print tokens per CPU-second."""
    for path in shards.glob("*.tar"):
        path.read_bytes()
    next(batches)
    tokens, began = 0, time.process_time()
    while (took := time.process_time() - began) < MIN_CPU_SECONDS:
        tokens += next(batches)
    print(tokens / took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a raw file with a `text` field")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json with an <|endoftext|> token")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    parser.add_argument("--child", choices=("export", OURS, UNCHECKED, WDS_NPY, WDS_GZ), help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "export":
        return export(arguments.shards, arguments.out)
    if arguments.child in (OURS, UNCHECKED):
        batches = read_ours(arguments.shards, arguments.batch, check=arguments.child == OURS)
        return time_reading(batches, arguments.shards)
    if arguments.child:
        key = "npy" if arguments.child == WDS_NPY else "json.gz"
        return time_reading(read_webdataset(arguments.shards, arguments.batch, key), arguments.shards)
    if not arguments.input or not arguments.tokenizer:
        parser.error("--input and --tokenizer are needed")
    readers = [OURS, UNCHECKED, WDS_NPY, WDS_GZ]
    if not installed("webdataset"):
        print("webdataset is not installed, so it is left out: pip install 'openlm-pipeline[benchmarks]'")
        readers = [OURS, UNCHECKED]
    seen: dict[tuple[str, int], list[float]] = {(name, batch): [] for batch in BATCHES for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        raw, tokenizer = arguments.input.resolve(), arguments.tokenizer.resolve()
        make = openlm_tokenize(raw, tokenizer, home, workers=1, samples_per_shard=SAMPLES_PER_SHARD)
        run(make, OPENLM_HOME=folder)
        ours, exported = home / "shards" / "raw" / "v1", home / "json_gz"
        me = [sys.executable, __file__]
        run([*me, "--child", "export", "--shards", str(ours), "--out", str(exported)])
        places = {OURS: ours, UNCHECKED: ours, WDS_NPY: ours, WDS_GZ: exported}
        for n in range(arguments.runs):
            for name, batch in seen:
                child = [*me, "--child", name, "--shards", str(places[name]), "--batch", str(batch)]
                rate = float(run(child).output.split()[-1])
                seen[name, batch].append(rate)
                print(f"round {n + 1}, {name}, batch {batch}: {rate / 1e6:.1f} M tokens per CPU-second", flush=True)
    rows = []
    for batch in BATCHES:
        slower = ratios({name: [1 / rate for rate in seen[name, batch]] for name in readers}, OURS)
        rows += [
            [name, str(batch), spread([rate / 1e6 for rate in seen[name, batch]], 1), spread(slower[name], 1)]
            for name in readers
        ]
    text = "\n\n".join(
        [
            f"{machine('numpy', 'webdataset')}; {arguments.input.name}, n = {arguments.runs}",
            table(["reader", "batch", "M tokens per CPU-second, median (range)", "openlm is faster by, paired"], rows),
        ]
    )
    show(text, arguments.markdown)
    return None


if __name__ == "__main__":
    main()
