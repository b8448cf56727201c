"""webdataset's own reader finds in our tars and in their exports what we put there."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openlm_pipeline.shards.format import SampleFormat, open_shard, write_shard
from openlm_pipeline.shards.openlm_formats import write_openlm_shard

samples = st.sampled_from(["uint16", "uint32"]).flatmap(
    lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(1, 4), st.integers(2, 400)))
)


def read(*paths: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False).decode())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=samples, first=st.integers(0, 10**8 - 4))
def test_it_reads_our_shards_as_we_map_them(samples: np.ndarray, first: int, tmp_path: Path) -> None:
    path, sample_format = tmp_path / "00000000.tar", SampleFormat(samples.shape[1], samples.dtype.name)
    write_shard(path, samples, first, sample_format)
    found = read(path)
    assert [item["__key__"] for item in found] == [f"{first + n:08d}" for n in range(len(samples))]
    assert all(item["npy"].dtype == samples.dtype for item in found)
    mapped = open_shard(path, len(samples), sample_format)
    assert mapped.tolist() == [item["npy"].tolist() for item in found] == samples.tolist()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=samples, eot_as_string=st.none() | st.integers(0, 3))
def test_it_reads_exports_in_each_format(samples: np.ndarray, eot_as_string: int | None, tmp_path: Path) -> None:
    # One sample per shard: keys that began anew in each would run into one sample.
    expected = [["<|endoftext|>" if i == eot_as_string else i for i in row] for row in samples.tolist()]
    for format in ("json.gz", "json", "txt"):
        paths = [tmp_path / f"{n:08d}.tar" for n in range(len(samples))]
        for n, path in enumerate(paths):
            write_openlm_shard(path, samples[n : n + 1], n, format=format, eot_as_string=eot_as_string)
        found = read(*paths)
        assert [item["__key__"] for item in found] == [f"{n:012d}" for n in range(len(samples))]
        values = [ast.literal_eval(item[format]) if format == "txt" else item[format] for item in found]
        assert values == expected
