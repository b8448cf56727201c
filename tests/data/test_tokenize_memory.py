"""Memory does not grow with the input."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import zstandard
from small_dataset import SmallDataset, documents
from tiny_pipeline import environment

from openlm_pipeline.shards.dataset import ShardedDataset

PROGRAM = Path(__file__).with_name("memory_program.py")
LIMIT_MIB = 112


def test_an_input_larger_than_memory_is_tokenized(small: Callable[..., SmallDataset]) -> None:
    made = small(files=["raw/*.zst"])
    rng = random.Random(0)
    texts = documents(2000)
    raw = made.raw("big.jsonl.zst")
    raw.parent.mkdir()
    size = count = 0
    with raw.open("wb") as f, zstandard.ZstdCompressor(level=1).stream_writer(f) as out:
        while size < 3 * LIMIT_MIB << 19:
            line = orjson.dumps({"text": f"{count} {rng.random()} " + rng.choice(texts) * 8}) + b"\n"
            out.write(line)
            size, count = size + len(line), count + 1
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(made.root), str(LIMIT_MIB)],
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    totals = ShardedDataset(made.shards).info["totals"]
    assert totals["documents"] == count and totals["text_bytes"] > LIMIT_MIB << 20
