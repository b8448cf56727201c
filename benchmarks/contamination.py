"""The scan of shards for items of evaluation: tokens per CPU-second, memory, bytes; and the join of a large run.

    python benchmarks/contamination.py --input 'FOLDER/*.jsonl.zst' --tokenizer tokenizer.json --eval DIR [--runs 5]

Each round is a process of its own that scans all shards anew, in one thread, for the items of the six tasks in DIR
(LLM Foundry's files); it counts the scan of the shards, with reading and checking them, and apart from that its start.
Then a run of so many tokens is joined to a million made-up occurrences in a dataset of its size.
"""

import sys
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import tempfile
import time

from benchmarks.measure import machine, openlm_tokenize, run, show, spread, table

TASKS = {
    "lambada_openai": "language_modeling",
    "piqa": "multiple_choice",
    "boolq": "multiple_choice",
    "copa": "multiple_choice",
    "winogrande": "schema",
    "arc_easy": "multiple_choice",
}
OCCURRENCES = 1_000_000
SAMPLES_PER_SHARD = 8192


def suite_of(folder: Path):
    from openlm_pipeline.evaluation.suite import Suite

    rows = [
        {"label": t, "dataset_uri": str(folder / f"{t}.jsonl"), "num_fewshot": [0], "icl_task_type": kind}
        for t, kind in TASKS.items()
    ]
    return Suite(name="six", icl_tasks=rows)


def scan(home: Path, folder: Path, tokenizer: str, window: str) -> None:
    """Child process: scan the shards of `home` and print what it took."""
    from openlm_pipeline.experiments import Dataset, Source, TokenizerSpec
    from openlm_pipeline.lineage.contamination import ScanOf, read_scan
    from openlm_pipeline.lineage.contamination import scan as scan_shards
    from openlm_pipeline.lineage.suite_windows import suite_windows
    from openlm_pipeline.lineage.windows import RULES
    from openlm_pipeline.pools import DaskSettings
    from openlm_pipeline.shards.dataset import ShardedDataset
    from openlm_pipeline.storage.home import Home

    at = Home(home)
    windows = suite_windows(suite_of(folder), at, RULES[window])
    opened = ShardedDataset(at.shards("raw", "v1"))
    source = Source(name="raw", files=("x",))
    spec = TokenizerSpec(name="tokenizer", source=tokenizer)
    dataset = Dataset(
        source=source, tokenizer=spec, seq_len=opened.info["seq_len"], samples_per_shard=1, shuffle_seed=0
    )
    of = ScanOf(dataset, opened, "six", windows, at)
    scan_shards(of, DaskSettings(workers=1).pool, lambda line: None)
    found = read_scan(of)
    written = sum(path.stat().st_size for *_, path in of.shards())
    index = sum(p.stat().st_size for p in at.windows("six", window).iterdir())
    print(json.dumps({**found.facts, "occurrences": len(found.window), "written": written, "shards": len(of.shards()),
                      "windows": len(windows.distinct[0]), "index": index,
                      "memory": windows.to_find().num_bytes}))  # fmt: skip


def join(folder: Path, tokens: int, sampling: str) -> None:
    """Child process: join a run of so many tokens, one epoch of a dataset, to made-up occurrences."""
    import numpy as np

    from openlm_pipeline.lineage import contamination
    from openlm_pipeline.lineage.suite_windows import suite_windows
    from openlm_pipeline.lineage.windows import RULES
    from openlm_pipeline.storage.home import Home

    with tempfile.TemporaryDirectory() as scratch:
        windows = suite_windows(suite_of(folder), Home(Path(scratch)), RULES["50"])
    samples, rng = tokens // 2048, np.random.default_rng(0)
    sizes = np.full(-(-samples // SAMPLES_PER_SHARD), SAMPLES_PER_SHARD)
    sample = np.sort(rng.integers(0, samples - 1, OCCURRENCES))
    last, window = sample + (rng.random(OCCURRENCES) < 0.01), rng.choice(windows.distinct[0], OCCURRENCES)
    facts = {"left_out": 0}
    found = contamination.Occurrences(window, sample, last, np.arange(OCCURRENCES), facts)
    settings = {"window_shards": 64} if sampling == "windowed" else {}
    data = [{"weight": 1.0, "manifest_sha256": "made up"}]
    record = {"sampling": sampling, "settings": settings, "seed": 0, "data": data, "samples": samples}
    begun = time.process_time()
    table, _ = contamination.join(windows, {"made up": found}, record, {"made up": sizes}, 2048, tokens)
    print(json.dumps({"seconds": time.process_time() - begun, "items": len(table)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    me = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        run(openlm_tokenize(args.input, args.tokenizer, home, workers=1), OPENLM_HOME=str(home))
        rows = []
        for window in ("50", "13w"):
            rates, whole, peak = [], [], []
            for _ in range(args.runs):
                for path in home.rglob("contamination/datasets/**/*.parquet"):
                    path.unlink()
                used = run([*me, "--scan", str(home), str(args.eval), args.tokenizer, window], OMP_NUM_THREADS="1")
                facts = json.loads(used.output.splitlines()[-1])
                rates.append(facts["tokens"] / facts["seconds"] / 1e6)
                whole.append(used.cpu_seconds)
                peak.append(used.peak_mib)
            cells = [f"{facts['tokens'] / 1e6:.1f}M", f"{facts['windows']:,}", spread(rates, 1), spread(whole)]
            cells += [spread(peak, 0), f"{facts['memory'] / 1e6:.0f} MB", f"{facts['index'] / 1e6:.0f} MB"]
            rows.append([window, *cells, f"{facts['written'] / facts['shards']:,.0f}", f"{facts['occurrences']:,}"])
    heads = ["window", "tokens", "windows", "M tokens/CPU-s", "CPU-s with start", "peak MiB", "index"]
    text = table([*heads, "index on disk", "bytes a shard", "occurrences"], rows)
    rows = []
    for tokens in (300_000_000_000, 1_000_000_000_000):
        for sampling in ("permutation", "windowed"):
            used = run([*me, "--join", str(args.eval), str(tokens), sampling], OMP_NUM_THREADS="1")
            facts = json.loads(used.output.splitlines()[-1])
            rows.append([f"{tokens // 10**9}B", sampling, f"{facts['seconds']:.1f}", f"{used.peak_mib:,.0f}"])
    text += "\n\n" + table(["tokens", "sampling", "CPU-s of a join of 1M occurrences", "peak MiB"], rows)
    show(f"{machine()}\n\n{text}", args.markdown)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--scan"]:
        scan(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
    elif sys.argv[1:2] == ["--join"]:
        join(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
