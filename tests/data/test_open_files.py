"""Many more shards than a process may have files open."""

import os
import shutil
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
    samples = rng.permutation(len(dataset))
    for start in range(0, len(samples), 4000):
        assert (dataset.gather(samples[start : start + 4000]) == [7, 8, 9]).all()
    for index in samples[:50].tolist():
        assert dataset[index].tolist() == [7, 8, 9]
"""


def many_shards(folder: Path, count: int) -> None:
    """Shards of one sample, links to a few files: ext4 counts up to 65,000 to each."""
    samples, sample_format = np.array([[7, 8, 9]], np.uint16), SampleFormat(3, "uint16")
    made = write_shard(folder / "00000000.tar", samples, 0, sample_format)
    sums = write_sums(folder / "00000000.sums", samples)
    entries = [ShardEntry(shard=f"{n:08d}", source="many", sums_sha256=sums, **made) for n in range(count)]
    for n, entry in enumerate(entries[1:], 1):
        put = shutil.copyfile if n % 50_000 == 0 else os.link
        original = f"{n // 50_000 * 50_000 if n % 50_000 else 0:08d}"
        put(folder / f"{original}.tar", folder / entry.tar)
        put(folder / f"{original}.sums", folder / entry.sums)
    finish_dataset(folder, entries, {"name": "many", "seq_len": 2, "dtype": "uint16"})


@pytest.mark.parametrize("counts", [(1_500, 700, 600), (5_000,), pytest.param((100_000,), marks=pytest.mark.drill)])
def test_shards_beyond_the_limit_of_open_files(counts: tuple[int, ...], tmp_path: Path) -> None:
    folders = [tmp_path / str(count) for count in counts]
    for folder, count in zip(folders, counts):
        many_shards(folder, count)
    done = subprocess.run([sys.executable, "-c", READ, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
