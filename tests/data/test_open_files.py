"""Many more shards than a process may have files open."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import ShardEntry, finish_dataset
from openlm_pipeline.shards.sums import write_sums

READ = """
import resource, sys
from pathlib import Path
import numpy as np
from openlm_pipeline.shards.dataset import ShardedDataset
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
datasets = [ShardedDataset(Path(folder)) for folder in sys.argv[1:]]
rng = np.random.default_rng(0)
for dataset in datasets * 2:
    samples = rng.permutation(len(dataset))[:4000]
    assert (dataset.gather(samples) == [7, 8, 9]).all()
    for index in samples[:50].tolist():
        assert dataset[index].tolist() == [7, 8, 9]
"""


def many_shards(folder: Path, count: int) -> None:
    """Shards of one sample, all of them links to one."""
    samples, sample_format = np.array([[7, 8, 9]], np.uint16), SampleFormat(3, "uint16")
    made = write_shard(folder / "00000000.tar", samples, 0, sample_format)
    sums = write_sums(folder / "00000000.sums", samples)
    entries = [ShardEntry(shard=f"{n:08d}", source="many", sums_sha256=sums, **made) for n in range(count)]
    for entry in entries[1:]:
        os.link(folder / "00000000.tar", folder / entry.tar)
        os.link(folder / "00000000.sums", folder / entry.sums)
    finish_dataset(folder, entries, {"name": "many", "seq_len": 2, "dtype": "uint16"})


@pytest.mark.parametrize("counts", [(1_500, 700, 600), (5_000,)])
def test_shards_beyond_the_limit_of_open_files(counts: tuple[int, ...], tmp_path: Path) -> None:
    folders = [tmp_path / str(count) for count in counts]
    for folder, count in zip(folders, counts):
        many_shards(folder, count)
    done = subprocess.run([sys.executable, "-c", READ, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
