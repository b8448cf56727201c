"""Held-out loss: when it is measured, against a plain loop, at any world size, and how sure it is."""

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_workers import train_in_processes
from small_run import BATCH, SmallRun, write_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.cli.main import progress_line
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.storage.files import sha256_file
from train.hooks.validation import bootstrap_interval

INTERVALS = "validation.intervals=true"


def validations(small: SmallRun) -> dict[int, dict]:
    return {r["step"]: r for r in small.run.read_metrics() if "validation_loss" in r}


def sample_losses(small: SmallRun) -> np.ndarray:
    """Mean loss of each of the 21 validation samples with the last checkpoint, one at a time, by torch alone."""
    checkpoint = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)[-1]
    model = load_model(checkpoint)
    dataset = ShardedDataset(small.home.shards("heldout", "v1"))
    losses = []
    for i in range(21):
        sample = torch.from_numpy(dataset[i].astype(np.int64))
        with torch.no_grad():
            logits = model(sample[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, sample[1:]).item())
    return np.array(losses)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(tmp_path_factory.mktemp("one"), (4,))
    small.train(INTERVALS)
    return small


def test_the_loss_is_the_mean_over_the_first_samples(one_process: SmallRun):
    assert validations(one_process)[4]["validation_loss"] == pytest.approx(sample_losses(one_process).mean(), rel=1e-6)


def test_the_interval_is_the_bootstrap_over_samples(one_process: SmallRun):
    """Against a bootstrap written out here, with other random numbers."""
    record, losses = validations(one_process)[4], sample_losses(one_process)
    draws = np.random.default_rng(7).integers(0, 21, (20_000, 21))
    low, high = np.percentile(losses[draws].mean(1), [2.5, 97.5])
    width = high - low
    assert record["validation_loss_lower_95"] == pytest.approx(low, abs=0.05 * width)
    assert record["validation_loss_upper_95"] == pytest.approx(high, abs=0.05 * width)


def test_loss_and_interval_are_the_same_at_two_processes(one_process: SmallRun, tmp_path: Path):
    """21 samples do not divide over them."""
    two = SmallRun(tmp_path, (4,))
    train_in_processes(two, 2, INTERVALS)
    here, there = validations(one_process)[4], validations(two)[4]
    keys = {key for key in here if key.startswith("validation_")}
    assert keys == {f"validation_{k}" for k in ("loss", "perplexity", "tokens", "loss_lower_95", "loss_upper_95")}
    assert {k: there[k] for k in keys} == pytest.approx({k: here[k] for k in keys}, rel=1e-6)


def test_batches_change_nothing_but_rounding(one_process: SmallRun, small: SmallRun):
    small.train("milestones=[1024]", "execution.micro_batch=4")
    expected = validations(one_process)[4]["validation_loss"]
    assert small.validation_losses()[4] == pytest.approx(expected, rel=1e-6)


def test_validation_comes_at_its_interval_and_at_milestones(small: SmallRun):
    small.train("validation.every=768")
    assert list(small.validation_losses()) == [3, 4, 6, 8]


def test_validation_does_not_change_the_run(small: SmallRun, tmp_path: Path):
    often = SmallRun(tmp_path / "often", (4, 8))
    often.train("validation.every=256", INTERVALS)
    small.train()
    assert often.losses() == small.losses()


def test_a_milestone_keeps_its_validation(one_process: SmallRun):
    (checkpoint,) = list_checkpoints(one_process.run.checkpoints, one_process.run.fingerprint, warn=pytest.fail)
    record = validations(one_process)[4]
    assert checkpoint.metrics == {k: v for k, v in record.items() if k.startswith("validation_")}


def test_each_of_several_sources_has_its_loss_and_bits_per_byte(small: SmallRun):
    """The first one's stand without a name too; a token of this tokenizer stands for 1, 2 or 3 bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbols[i % 256] * (1 + i % 3): i for i in range(251)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    folder = small.home.tokenizer("bytes")
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    sha256 = sha256_file(folder / "tokenizer.json")
    write_dataset(small.home, "other", 9, seed=7, tokenizer_sha256=sha256)
    sources = [{"name": name, "files": ["x"]} for name in ("other", "heldout")]
    small.train("milestones=[1024]", "validation.source=null", f"validation.sources={json.dumps(sources)}")
    record = validations(small)[4]
    assert record["validation_loss"] == record["validation_loss/other"] != record["validation_loss/heldout"]
    assert record["validation_tokens/other"] == 9 * 32 and record["validation_tokens/heldout"] == 21 * 32
    dataset = ShardedDataset(small.home.shards("other", "v1"))
    text = sum(1 + int(i) % 3 for n in range(9) for i in dataset[n][1:])
    bits = record["validation_loss"] / math.log(2) * 9 * 32 / text
    assert record["validation_bits_per_byte"] == record["validation_bits_per_byte/other"] == pytest.approx(bits)
    assert "validation_bits_per_byte/heldout" not in record  # made with another tokenizer, which the console says
    alone = SmallRun(small.home.root / "alone", (4,))
    alone.train()
    assert record["validation_loss/heldout"] == alone.validation_losses()[4]
    (checkpoint,) = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)
    assert checkpoint.metrics["validation_loss/heldout"] == record["validation_loss/heldout"]
    assert "validation loss other " in (line := progress_line(record)) and ", heldout " in line


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ("{max_samples: 3}", "exactly one of 'source' and 'sources'"),
        ("{sources: []}", "exactly one of 'source' and 'sources'"),
        ("{source: {name: a, files: [a]}, sources: [{name: b, files: [b]}]}", "exactly one"),
        ("{sources: [{name: a, files: [a]}, {name: a, files: [b]}]}", "needs its own name"),
        ("{sources: [{name: text, files: [b]}]}", "needs its own name"),
    ],
)
def test_sources_are_given_once_and_named(small: SmallRun, validation: str, message: str):
    small.recipe.write_text(re.sub("(?m)^validation: .*$", f"validation: {validation}", small.recipe.read_text()))
    with pytest.raises(ConfigError, match=message):
        small.experiment()


def test_masked_targets_do_not_count(small: SmallRun):
    small.train("milestones=[1024]", "training.mask_token=7")
    tokens = validations(small)[4]["validation_tokens"]
    dataset = ShardedDataset(small.home.shards("heldout", "v1"))
    assert tokens == sum(int((dataset[i][1:] != 7).sum()) for i in range(21)) < 21 * 32


def test_an_interval_is_seeded_and_weighs_samples_by_their_tokens():
    losses, tokens = np.array([10.0, 40.0, 0.0, 90.0]), np.array([10.0, 20.0, 0.0, 30.0])
    low, high = bootstrap_interval(losses, tokens)
    assert (low, high) == bootstrap_interval(losses, tokens)
    assert (low, high) == (1.0, 3.0)  # all draws of the first, and all of the last, are likely enough: 1 in 27
    assert bootstrap_interval(losses[:1], tokens[:1]) == (1.0, 1.0)


@pytest.mark.parametrize("at", ["a milestone", "between"])
def test_a_signal_while_validating_ends_it_within_a_batch(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint is kept, and the run that resumes validates and goes on as one that was never stopped."""
    small, whole = (SmallRun(tmp_path / name, (4, 8)) for name in ("small", "whole"))
    every = [] if at == "a milestone" else [f"validation.every={2 * BATCH}"]
    step, gathered = (4 if at == "a milestone" else 2), []
    gather = ShardedDataset.gather

    def gather_and_stop(self: ShardedDataset, samples: np.ndarray) -> np.ndarray:
        if self.folder.parent.name == "heldout":
            gathered.append(samples)
            if len(gathered) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return gather(self, samples)

    settings = [INTERVALS, *every]
    with monkeypatch.context() as patched:
        patched.setattr(ShardedDataset, "gather", gather_and_stop)
        small.train(*settings)
    assert len(gathered) == 2
    assert small.run.read_outcome()["status"] == "preempted"
    assert small.steps_on_disk() == {step: None}
    assert not validations(small)
    small.train(*settings)
    whole.train(*settings)
    assert small.losses() == whole.losses()
    expected = {s: r["validation_loss"] for s, r in validations(whole).items()}
    if at == "between":
        del expected[2]  # between steps nothing waits for it
    assert {s: r["validation_loss"] for s, r in validations(small).items()} == expected
