"""Flags, recipes and moments that nobody wants: each is refused in a line, said, or harmless."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gloo_workers import trainer
from small_run import BATCH, SmallRun, train_here
from waiting import wait_until

from openlm_pipeline.errors import ConfigError, DataError, OpenLMError, TrainingError
from openlm_pipeline.storage.home import Home
from train import __main__ as program
from train import loop
from train.openlm.flags import translate
from train.openlm.parser import parse

FORK = "parent={run: small, milestone: 1024}"
TO_10 = f"milestones=[{4 * BATCH},{8 * BATCH},{10 * BATCH}]"
SYNTHETIC = "--model open_lm_11m --dataset-type synthetic --train-num-samples 1000000 --global-batch-size 4 --name run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs, --save-frequency and --val-frequency are at least 1"),
        ("--val-frequency 0", "--epochs, --save-frequency and --val-frequency are at least 1"),
        ("--save-frequency 0", "--epochs, --save-frequency and --val-frequency are at least 1"),
        ("--train-num-samples 0", r"an epoch of 0 tokens \(--train-num-samples\) is under a step of 8,192"),
        ("--train-num-samples 100", r"an epoch of 100 tokens \(--train-num-samples\) is under a step of 8,192"),
        ("--accum-freq 3", "4 sequences of a process do not divide into --accum-freq 3"),
        ("--resume other/epoch_1.pt", "To begin with the weights of another, use --pretrained"),
        ("--averagers median", "averages: 'median' is neither ema_GAMMA_EVERY"),
        ("--averagers ema_2", "averages: 'ema_2' is neither ema_GAMMA_EVERY"),
        ("--averagers ema_0.9,", "averages: '' is neither ema_GAMMA_EVERY"),
        ("--workers -1", "--workers -1: say 0 or more"),
        ("--name ../x", "--name ../x is outside of --logs"),
        ("--target-mask-left 99999", "training.mask_left 99999 is no id of the model, which has 50432"),
        ("--target-mask-individual -99999", "training.mask_token: Input should be greater than or equal to 0"),
        ("--grad-clip-norm 0", "training.grad_clip: Input should be greater than 0"),
        ("--log-every-n-steps 0", "execution.log_every: Input should be greater than or equal to 1"),
        ("--warmup -5", "training.warmup: .* is not a number of tokens"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(tmp_path: Path, flags: str, message: str):
    with pytest.raises(ConfigError, match=message):
        translate(parse([*SYNTHETIC.split(), "--logs", str(tmp_path), *flags.split()]), Home(tmp_path / "home"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.averages=[ema_2]"], "averages: 'ema_2' is neither"),
        (["execution.checkpoint_every=0"], "execution.checkpoint_every: Input should be greater than or equal to 1"),
        (["name=twig", "parent={run: small, milestone: 0}"], "parent.milestone: Input should be greater"),
        (["training.mask_left=260"], "training.mask_left 260 is no id of the model, which has 260"),
        (["training.mask_token=9999"], "training.mask_token 9999 is no id of the model"),
        (
            ["name=twig", FORK, "milestones=[2048]", "training.schedule=cosine", "training.horizon=512"],
            "longer than the schedule",
        ),
        (["milestones=[1024.5]"], "1024.5 is not a number of tokens"),
        (["version=../../x"], "version: String should match pattern"),
        (["name=twig", 'parent={run: small, version: "..", milestone: 1024}'], "parent.version: String should match"),
        (["launcher.max_restarts=-1"], "launcher.max_restarts: Input should be greater"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(small: SmallRun, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        small.experiment(*overrides)


def ready(small: SmallRun, heldout: str) -> list[str]:
    text = str(small.home.shards("text", "v1"))
    validation = json.dumps(
        {"source": {"name": "heldout", "files": [], "shards": str(small.home.shards(heldout, "v1"))}}
    )
    tokenizer = ["tokenizer.train=null", "tokenizer.source=tokenizer.json"]
    return [f"sources={json.dumps([{'name': 'text', 'shards': text}])}", f"validation={validation}", *tokenizer]


CODE_ALONE = 'sources=[{name: code, files: ["raw/code/*.jsonl"]}]'


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["training.skip_steps=[100]"], "training.skip_steps has [100]: trained already, or after the last step, 8"),
        (["execution.profile_steps=[50,60]"], "no step of [50, 60] (profile_steps) was trained here"),
        ([CODE_ALONE, f"milestones=[{40 * BATCH}]"], "small sees each text of code 4.8 times"),
        ([CODE_ALONE, f"milestones=[{40 * BATCH}]", "training.sampling=manifest"], "sees each text of code 4.8 times"),
        (["training.sampling=resampled", "seed=2", f"milestones=[{30 * BATCH}]"], "and 50% never"),
        (["execution.replicas=5"], "1 groups with all weights, not 5"),
    ],
)
def test_what_is_asked_for_without_effect_is_said(small: SmallRun, overrides: list[str], sentence: str, capfd):
    small.train(*overrides)
    assert sentence in capfd.readouterr().out


def test_the_trainer_says_that_it_validates_on_what_it_trains_on(small: SmallRun, capfd):
    small.train(*ready(small, "heldout"))
    assert "validation set's" not in capfd.readouterr().out
    small.train("version=v2", *ready(small, "text"))
    assert "2 of the validation set's files are also in text" in capfd.readouterr().out


def test_a_step_that_is_trained_already_is_not_left_out_in_silence(small: SmallRun, capfd):
    small.train("milestones=[1024]", "training.skip_steps=[3]")
    small.train("training.skip_steps=[2,3]")
    printed = capfd.readouterr().out
    assert "training.skip_steps has [2]: trained already" in printed and "has [3]" not in printed


@pytest.mark.parametrize(
    "overrides",
    [
        ["validation.every=1"],
        ["validation.max_samples=100000"],
        ["execution.checkpoint_every=1", "execution.keep_checkpoints=1"],
    ],
)
def test_a_setting_beyond_all_bounds_is_harmless(small: SmallRun, trained: SmallRun, overrides: list[str]):
    small.train(*overrides)
    losses = small.losses()
    assert losses and losses == {step: loss for step, loss in trained.losses().items() if step in losses}
    assert set(trained.steps_on_disk().items()) <= set(small.steps_on_disk().items())


def test_fewer_records_than_milestones_there_are_not(small: SmallRun, trained: SmallRun):
    """A record's loss is the mean since the one before it."""
    small.train("execution.log_every=1000000")
    losses = list(trained.losses().values())
    assert small.losses() == pytest.approx({4: sum(losses[:4]) / 4, 8: sum(losses[4:]) / 4})


@pytest.fixture
def copy(small: SmallRun, trained: SmallRun) -> SmallRun:
    shutil.copytree(trained.home.root, small.home.root, dirs_exist_ok=True)
    return small


def test_tokens_that_are_trained_already_are_not_trained_again(copy: SmallRun):
    before = copy.run.metrics_file.read_bytes()
    train_here(copy.experiment(), copy.home, until=copy.experiment().limit(2 * BATCH, None))
    assert copy.run.metrics_file.read_bytes() == before
    assert copy.steps_on_disk() == {4: "t1024", 8: "t2048"}
    assert copy.run.read_outcome()["status"] == "completed"


def test_a_fork_from_a_checkpoint_without_a_milestone_names_a_way_that_works(small: SmallRun):
    half = f"milestones=[{4 * BATCH}, {6 * BATCH}, {8 * BATCH}]"
    train_here(small.experiment(), small.home, until=small.experiment().limit(6 * BATCH, None))
    fork = small.experiment("name=twig", f"parent={{run: small, milestone: {6 * BATCH}}}", f"milestones=[{8 * BATCH}]")
    with pytest.raises(OpenLMError, match="with it among its milestones, `openlm train small --until 1.536K` makes it"):
        train_here(fork, small.home)
    train_here(small.experiment(half), small.home, until=6 * BATCH)
    assert train_here(fork, small.home).step == 8


def test_a_fork_whose_parent_was_made_anew_names_its_checkpoint(copy: SmallRun):
    fork = ("name=twig", FORK)
    copy.train(*fork, "milestones=[2048]")
    copy.train("training.lr=2e-2", allow={"supersede"})
    with pytest.raises(OpenLMError, match=r"runs/twig/v1 holds another run. What differs:\n  parent.checkpoint"):
        copy.train(*fork, TO_10.replace("1024,", ""))


def _file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")


def _full(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/full")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _broken_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize(
    ("damage", "place", "message"),
    [
        (lambda path: path.write_text("{}"), "run.json", "run.json is damaged: it does not say which run this is"),
        (lambda path: path.write_text("{"), "run.json", "run.json is not valid JSON"),
        (_full, "metrics.jsonl", "metrics.jsonl can't be written: No space left on device"),
        (_folder, "metrics.jsonl", "metrics.jsonl can't be written: Is a directory"),
        (_broken_link, "checkpoints", "checkpoint of step 4 could not be written"),
        (lambda path: _file(path.parent), "../../other/v1", "can't be made or locked: File exists"),
    ],
)
def test_damage_in_a_run_folder_is_named(copy: SmallRun, damage: Callable[[Path], None], place: str, message: str):
    damage(copy.run.path / place)
    if place == "metrics.jsonl":
        copy.run.ledger_file.unlink()  # which says how long it was
    with pytest.raises(OpenLMError, match=message):
        copy.train(TO_10, *(["name=other"] if "other" in place else []))
    if place == "metrics.jsonl":
        assert copy.run.read_outcome()["status"] == "failed"


@pytest.mark.parametrize("place", ["metrics.jsonl", "outcome.json"])
def test_half_a_line_is_no_damage(copy: SmallRun, place: str):
    path = copy.run.path / place
    whole = path.read_text()
    path.write_text(whole[:-20] if place == "outcome.json" else whole + whole.splitlines()[0][:-20])
    copy.train(TO_10)
    assert sorted(copy.losses()) == list(range(1, 11))
    assert copy.run.read_outcome()["step"] == 10


def test_shards_without_a_sample_are_refused(small: SmallRun):
    folder = small.home.root / "foreign"
    folder.mkdir()
    (folder / "manifest.jsonl").write_text('{"shard": "a", "num_sequences": 0}\n')
    source = json.dumps([{"name": "a", "shards": f"{folder}/manifest.jsonl"}])
    with pytest.raises(DataError, match="there is not one sample in"):
        small.train(f"sources={source}", "tokenizer.train=null", "tokenizer.source=tokenizer.json")


def test_a_checkpoint_that_is_damaged_as_it_is_loaded_is_named(copy: SmallRun, monkeypatch):
    def verify(checkpoint, **share) -> None:
        next(checkpoint.path.glob("*.distcp")).write_bytes(b"")

    monkeypatch.setattr(loop, "verify", verify)
    with pytest.raises(DataError, match="step-00000008 was verified, but can't be loaded"):
        copy.train(TO_10)


def test_a_clock_that_goes_back_changes_no_result(small: SmallRun, trained: SmallRun, monkeypatch):
    now = [2e9]
    monkeypatch.setattr(time, "time", lambda: now.__setitem__(0, now[0] - 100) or now[0])
    small.train()
    assert small.losses() == trained.losses()


def test_ctrl_c_before_the_first_step_is_one_line(small: SmallRun, monkeypatch, capsys):
    monkeypatch.setattr(program, "load_experiment", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["train", str(small.recipe)])
    assert program.main() == 130
    assert capsys.readouterr().err == "stopped before the first step: nothing was trained\n"


LONG = (f"milestones=[{4000 * BATCH}]", "validation=null")


def test_three_signals_while_it_saves_are_one(small: SmallRun):
    training = trainer(small, *LONG, "execution.checkpoint_every=256")
    wait_until(lambda: any(small.run.checkpoints.glob(".tmp-*")), training)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        training.send_signal(number)
    assert training.wait(60) == 0, small.log()
    outcome = small.run.read_outcome()
    assert outcome["status"] == "preempted" and max(small.steps_on_disk()) == outcome["step"]


def test_a_run_folder_that_is_moved_under_way_ends_the_run_in_a_line(small: SmallRun):
    training = trainer(small, *LONG)
    wait_until(lambda: small.run.metrics_file.exists(), training)
    small.run.path.rename(small.home.root / "elsewhere")
    assert training.wait(60) == TrainingError.exit_code
    assert small.log().splitlines()[-1].endswith("metrics.jsonl can't be written: No such file or directory")
    assert "Traceback" not in small.log()
