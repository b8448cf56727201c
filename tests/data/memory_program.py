"""memory_program.py ROOT MIB: raw text to shards, with at most MIB more private memory than an idle start takes."""

import resource
import sys
from pathlib import Path

import gigatoken  # noqa: F401 - what is imported now does not count
import pyarrow.parquet  # noqa: F401
import tokenizers  # noqa: F401
from small_dataset import SmallDataset

from openlm_pipeline.pools import DaskSettings

if __name__ == "__main__":
    sizes = {"seq_len": 2048, "samples_per_shard": 1024, "milestones": [2048]}
    settings = {**sizes, "training": {"global_batch": 2048, "lr": 1e-3}}
    made = SmallDataset(Path(sys.argv[1]), settings, {"files": ["raw/*.zst"]})
    made.tokenizer()
    status = Path("/proc/self/status").read_text()
    data_kib = int(status.partition("VmData:")[2].split()[0])
    limit = (data_kib << 10) + (int(sys.argv[2]) << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    made.run(DaskSettings(workers=1).pool)
    print("done")
