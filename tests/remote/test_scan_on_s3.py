"""A scan that one machine made serves another, where the home is at a URL."""

import json
from pathlib import Path

import pytest
from faulty_s3 import Bucket
from test_home_on_s3 import machine

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline import contamination as stage
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import DaskSettings

INLINE = DaskSettings(workers=1).pool
ITEM = "The keeper of the lighthouse counted every ship that passed in the night, and wrote their names into a book."


def test_what_one_machine_scanned_another_joins(bucket: Bucket, tmp_path: Path):
    texts = [
        f"{n} is the number of this text, which says little more. " * 9 + (ITEM if n == 5 else "") for n in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": ITEM[:-6], "continuation": ITEM[-6:]}) + "\n")
    task = {"label": "ships", "dataset_uri": str(tmp_path / "task.jsonl"), "num_fewshot": [0]}
    suite = {"name": "ships", "icl_tasks": [{**task, "icl_task_type": "language_modeling"}]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    experiment = Experiment(
        name="remote", tokenizer={"name": "bpe", "train": {"vocab_size": 300}}, seq_len=32, samples_per_shard=64,
        sources=[{"name": "text", "files": [str(tmp_path / "a.jsonl")]}],
        model={"hidden_dim": 8, "n_layers": 1, "n_heads": 1}, training={"global_batch": 32, "lr": 1e-3},
        milestones=[32 * 2000], evaluation={"suite": str(tmp_path / "suite.yaml")},
    )  # fmt: skip
    first, second = machine(bucket, tmp_path / "one"), machine(bucket, tmp_path / "two")
    data_stages.ensure_tokenizer(experiment, first, print)
    [dataset] = experiment.datasets()
    files, _ = data_stages.tokenize(dataset, first, INLINE, print)
    data_stages.make_shards(dataset, files, first, INLINE, print)
    [made] = stage.scan_recipe(experiment, first, INLINE, print)
    assert made.facts["occurrences"] > 30

    def refuse(report):
        pytest.fail("it scanned what was scanned")

    [again] = stage.scan_recipe(experiment, second, refuse, print)
    assert again.version == made.version
    label = next(name for name, _ in experiment.labelled_milestones())
    here, there = (stage.joined(experiment, home, [label])[0].table for home in (first, second))
    assert here.equals(there) and here["overlap"].to_pylist() == [1.0]
