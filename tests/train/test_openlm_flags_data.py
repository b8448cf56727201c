"""What OpenLM's flags say of data: lists of tars, manifests, folders, keys, weights, validation, random tokens."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.shards.openlm_formats import write_openlm_shard
from openlm_pipeline.storage.home import Home
from train.openlm.flags import translate
from train.openlm.parser import parse

SEQ_LEN = 16
SIZES = (3, 5, 2)


def samples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 64, (count, SEQ_LEN + 1)).astype(np.uint16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three tars without a manifest, and the config of a model for them."""
    folder = tmp_path / "data"
    for k, size in enumerate(SIZES):
        write_openlm_shard(folder / f"shard-{k:07d}.tar", samples(size, k), 10 * k, format="txt")
    config = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 64}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    return folder


def experiment_of(data: Path, *arguments: str) -> Experiment:
    usual = ("--model", str(data.parent / "tiny.json"), "--global-batch-size", "2", "--epochs", "2")
    logs = ("--logs", str(data.parent), "--name", "run")
    return translate(parse([*usual, *logs, *arguments]), Home(data.parent / "home")).experiment


def rows_of(experiment: Experiment, data: Path, source: int = 0) -> np.ndarray:
    opened = open_dataset(experiment.datasets()[source], Home(data.parent / "home"))
    return opened.gather(np.arange(len(opened)))


ALL_ROWS = np.concatenate([samples(size, k) for k, size in enumerate(SIZES)])


@pytest.mark.parametrize("form", ["braces", "arguments", "colons"])
def test_listed_tars_are_one_source_in_their_order(data: Path, form: str):
    tars = [str(data / f"shard-{k:07d}.tar") for k in range(3)]
    forms = {"braces": [str(data / "shard-{0000000..0000002}.tar")], "arguments": tars, "colons": ["::".join(tars)]}
    experiment = experiment_of(data, "--train-data", *forms[form])
    assert len(experiment.sources) == 1
    np.testing.assert_array_equal(rows_of(experiment, data), ALL_ROWS)
    assert experiment.training.sampling == "permutation"
    assert experiment.milestones == (10 * SEQ_LEN, 20 * SEQ_LEN)  # without --train-num-samples an epoch is all


def test_counts_come_from_sizes_json_or_the_manifest_or_one_count(data: Path):
    pattern = ("--train-data", str(data / "shard-{0000000..0000002}.tar"))
    counted = experiment_of(data, *pattern)
    assert len(rows_of(counted, data)) == 10
    noted = data.parent / "home" / "shards" / counted.sources[0].name / "v1" / "counts.json"
    assert list(json.loads(noted.read_text()).values()) == list(SIZES)
    (data / "sizes.json").write_text(json.dumps({f"shard-{k:07d}.tar": n + 1 for k, n in enumerate(SIZES)}))
    assert len(rows_of(counted, data)) == 10  # counted once, and not asked again
    noted.unlink()
    for path in sorted(noted.parent.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(DataError, match="3 samples, but the manifest says 4"):
        rows_of(counted, data)


def test_weights_make_sources_of_arguments(data: Path):
    tars = [str(data / f"shard-{k:07d}.tar") for k in range(2)]
    experiment = experiment_of(data, "--train-data", *tars, "--train-data-mix-weights", "0.75", "0.25")
    assert [s.weight for s in experiment.sources] == [0.75, 0.25]
    np.testing.assert_array_equal(rows_of(experiment, data, 1), samples(SIZES[1], 1))
    with pytest.raises(ConfigError, match="1 --train-data-mix-weights for 2 sources"):
        experiment_of(data, "--train-data", *tars, "--train-data-mix-weights", "1")


@pytest.mark.parametrize("flag", ["--dataset-manifest", "--dataset-metadata", "--train-data"])
@pytest.mark.parametrize("name", ["manifest.jsonl", "other.jsonl"])
def test_a_manifest_names_the_tars_beside_it(data: Path, flag: str, name: str):
    lines = [{"shard": f"shard-{k:07d}", "num_sequences": n} for k, n in enumerate(SIZES)]
    (data / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = experiment_of(data, flag, str(data / name))
    np.testing.assert_array_equal(rows_of(experiment, data), ALL_ROWS)
    assert experiment.training.sampling == ("permutation" if flag == "--train-data" else "manifest")
    if flag != "--train-data":
        assert experiment_of(data, flag, str(data / name), "--disable-buffer").training.sampling == "manifest"


def test_a_wrong_data_key_names_the_right_one(data: Path):
    tar = data / "gz.tar"
    write_openlm_shard(tar, samples(2, 0), 0, format="json.gz")
    with pytest.raises(ConfigError, match="give --data-key json.gz"):
        experiment_of(data, "--train-data", str(tar))
    np.testing.assert_array_equal(
        rows_of(experiment_of(data, "--train-data", str(tar), "--data-key", "json.gz"), data), samples(2, 0)
    )
    with pytest.raises(ConfigError, match="give --val-data-key txt"):
        train, val = str(tar), str(data / "shard-0000000.tar")
        experiment_of(data, "--train-data", train, "--data-key", "json.gz", "--val-data", val)


def test_openlms_end_of_text_is_id_0(data: Path):
    """As make_2048.py writes it: a string, in a tar that may lack its end."""
    tar = data / "strings.tar"
    rows = samples(2, 5)
    rows[:, 3] = 0
    write_openlm_shard(tar, rows, 0, format="txt", eot_as_string=0)
    tar.write_bytes(tar.read_bytes()[:-1024])
    np.testing.assert_array_equal(rows_of(experiment_of(data, "--train-data", str(tar)), data), rows)


def test_validation_has_its_source_pace_and_size(data: Path):
    flags = ("--train-data", str(data / "shard-0000001.tar"), "--train-num-samples", "320")
    val = ("--val-data", str(data / "shard-0000000.tar"))
    plain = experiment_of(data, *flags, *val).validation
    assert (plain.every, plain.intervals, plain.max_samples > 10**9) == (320, False, True)
    set_ = experiment_of(data, *flags, *val, "--val-num-samples", "40", "--val-frequency", "3", "--val-seq-ci")
    assert (set_.validation.every, set_.validation.intervals, set_.validation.max_samples) == (960, True, 2)
    np.testing.assert_array_equal(rows_of(set_, data, 1), samples(SIZES[0], 0))
    assert experiment_of(data, *flags, *val, "--val-data-key", "txt").validation == plain


def test_validation_has_as_many_sources_as_keys_or_folders(data: Path, tmp_path: Path):
    flags = ("--train-data", str(data / "shard-0000001.tar"), "--train-num-samples", "320", "--val-data")
    tars = [str(data / f"shard-000000{i}.tar") for i in (0, 1)]
    (one,) = experiment_of(data, *flags, *tars).validation.sources
    assert one.shards == "::".join(tars)
    apart = experiment_of(data, *flags, *tars, "--val-data-key", "txt", "txt")
    assert [s.shards for s in apart.validation.sources] == tars
    for i in (0, 1):
        np.testing.assert_array_equal(rows_of(apart, data, 1 + i), samples(SIZES[i], i))
    elsewhere = shutil.copy(tars[1], tmp_path / "shard.tar")
    assert len(experiment_of(data, *flags, tars[0], str(elsewhere)).validation.sources) == 2


def test_what_is_not_there_or_no_tar_is_named(data: Path):
    with pytest.raises(MissingInputError, match="nowhere"):
        experiment_of(data, "--train-data", str(data / "nowhere.tar"))
    (data / "bad.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match="bad.tar"):
        experiment_of(data, "--train-data", str(data / "bad.tar"))
    with tarfile.open(data / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match="empty.tar"):
        experiment_of(data, "--train-data", str(data / "empty.tar"))
    tar = str(data / "shard-0000000.tar")
    with pytest.raises(ConfigError, match="named twice"):
        experiment_of(data, "--train-data", f"{tar}::{tar}")


def test_random_tokens_are_seeded_uniform_and_new_in_each_sample(data: Path):
    flags = ("--dataset-type", "synthetic", "--train-num-samples", str(500 * SEQ_LEN))
    rows = rows_of(experiment_of(data, *flags), data)
    assert rows.shape == (500, SEQ_LEN + 1)
    assert len({hashlib.sha256(row.tobytes()).digest() for row in rows}) == 500
    counts = np.bincount(rows.ravel(), minlength=64)
    assert len(counts) == 64
    assert 80 < counts.min() < counts.max() < 190  # 133 expected, standard deviation 11
    np.testing.assert_array_equal(rows, rows_of(experiment_of(data, *flags), data))
    assert not np.array_equal(rows, rows_of(experiment_of(data, *flags, "--seed", "1"), data))
