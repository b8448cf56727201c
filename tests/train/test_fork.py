"""A fork continues from a milestone of another run; a finished schedule is not made longer in silence."""

import json
import shutil

import pytest
import torch
from small_run import BATCH, SameSamples, SmallRun, train_here
from typer.testing import CliRunner

from openlm_pipeline.checkpoints.folders import Checkpoint, read_checkpoint
from openlm_pipeline.checkpoints.model_export import export_huggingface
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.cli.main import app
from openlm_pipeline.errors import ConfigError, ConsentError, DataError, IdentityError, MissingInputError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.ordering import order_of
from openlm_pipeline.pipeline.new_recipe import fork as make_fork
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.parent import initial_weights, parent_identity
from openlm_pipeline.runs.rates import rate_findings
from openlm_pipeline.runs.repeats import repeated
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.files import read_json

TO_8 = f"milestones=[{8 * BATCH}]"


class Fork:
    """A run that continues from step 4 of a small run."""

    def __init__(self, small: SmallRun, *overrides: str, name: str = "twig") -> None:
        parent = f"parent={{run: small, milestone: {4 * BATCH}}}"
        self.home = small.home
        self.experiment = load_experiment(str(small.recipe), [f"name={name}", parent, TO_8, *overrides])
        self.run = RunFolder(self.home.run(name, "v1"))

    def train(self) -> "Fork":
        train_here(self.experiment, self.home)
        return self

    def records(self) -> dict[int, dict[str, float]]:
        return {r["step"]: r for r in self.run.read_metrics() if "loss" in r}

    def losses(self) -> dict[int, float]:
        return {step: r["loss"] for step, r in self.records().items()}


def _at(run: RunFolder, step: int) -> Checkpoint:
    return read_checkpoint(run.checkpoints / f"step-{step:08d}")


def _weights(run: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return load_model(_at(run, step)).state_dict()


@pytest.fixture
def parent(small: SmallRun, trained: SmallRun) -> SmallRun:
    """A trained run of 4, then 8 steps, of this test alone."""
    shutil.copytree(trained.home.root, small.home.root, dirs_exist_ok=True)
    return small


def _tail(small: SmallRun) -> dict[int, float]:
    return {step: loss for step, loss in small.losses().items() if step > 4}


def test_a_fork_that_changes_nothing_is_the_run_itself_bitwise(parent):
    fork = Fork(parent).train()
    assert fork.losses() == _tail(parent)
    theirs, ours = _weights(parent.run, 8), _weights(fork.run, 8)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert fork.run.identity["parent"]["checkpoint"] == _at(parent.run, 4).digest
    assert fork.run.fingerprint != parent.run.fingerprint


def test_changed_settings_hold_from_the_fork_on(parent):
    slower = Fork(parent, "training.lr=1e-3").train()
    assert {r["lr"] for r in slower.records().values()} == {1e-3}
    losses, tail = slower.losses(), _tail(parent)
    assert losses[5] == tail[5]
    assert all(losses[step] != tail[step] for step in (6, 7, 8))
    undecayed = Fork(parent, "training.weight_decay=0", name="undecayed").train().losses()
    assert undecayed[5] == tail[5]
    assert undecayed[8] != tail[8]


def test_a_schedule_goes_on_or_begins_again(parent):
    cosine = ("training.schedule=cosine", "training.warmup=512", f"milestones=[{12 * BATCH}]")
    lrs = [r["lr"] for r in Fork(parent, *cosine, name="goes_on").train().records().values()]
    again = [r["lr"] for r in Fork(parent, *cosine, "parent.schedule=restart", name="again").train().records().values()]
    whole = 2  # warm-up steps
    assert again[:whole] == pytest.approx([0.005, 0.01])
    assert again[whole:] == sorted(again[whole:], reverse=True)
    assert again[whole] == pytest.approx(0.01)
    assert lrs == sorted(lrs, reverse=True)
    assert lrs[0] < 0.01


def test_a_new_optimizer_gives_other_steps_from_the_same_weights(parent):
    losses, tail = Fork(parent, "parent.optimizer=reset").train().losses(), _tail(parent)
    assert losses[5] == tail[5]
    assert losses[6] != tail[6]
    with pytest.raises(ConfigError, match=r"optimizer adamw -> muon; parent.optimizer=reset"):
        Fork(parent, "training.optimizer=muon", name="muon").train()
    assert Fork(parent, "training.optimizer=muon", "parent.optimizer=reset", name="muon").train().losses()[5] == tail[5]


def test_another_batch_goes_on_at_the_same_tokens_and_samples(parent):
    fork = Fork(parent, f"training.global_batch={2 * BATCH}").train()
    assert [(r["step"], r["tokens"]) for r in fork.records().values()] == [(3, 6 * BATCH), (4, 8 * BATCH)]
    first = sum(_tail(parent)[step] for step in (5,))  # the same weights saw half of these samples
    assert fork.losses()[3] == pytest.approx(first, abs=0.2)
    with pytest.raises(ConfigError, match="no whole number of its steps of 384 tokens"):
        Fork(parent, "training.global_batch=384", name="uneven").train()


def test_averages_go_on_where_the_parent_has_them(small):
    averaged = "training.averages=[ema_0.9_1]"
    small.train(averaged)
    kept = Fork(small, averaged).train()
    theirs, ours = (load_model(_at(r, 8), average="ema_0.9_1").state_dict() for r in (small.run, kept.run))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    fresh = Fork(small, "training.averages=[ema_0.5_1]", name="fresh").train()
    half = load_model(_at(fresh.run, 8), average="ema_0.5_1").state_dict()
    assert all(torch.isfinite(value).all() for value in half.values())
    assert not torch.equal(half["tok_embeddings.weight"], ours["tok_embeddings.weight"])


def test_a_fork_of_a_fork_resumes_and_needs_its_parent_only_to_begin(parent):
    twig = Fork(parent, f"milestones=[{6 * BATCH}]").train()
    shutil.rmtree(parent.run.path)
    longer = Fork(parent, f"milestones=[{6 * BATCH}, {8 * BATCH}]").train()
    assert sorted(longer.losses()) == [5, 6, 7, 8]
    leaf = Fork(parent, f"parent={{run: twig, milestone: {6 * BATCH}}}", name="leaf").train()
    assert leaf.losses() == {step: loss for step, loss in twig.losses().items() if step > 6}
    with pytest.raises(MissingInputError, match=r"`openlm train small --until 1\.024K` makes it"):
        Fork(parent, name="orphan").train()


def test_what_does_not_fit_or_is_damaged_is_named(parent):
    with pytest.raises(ConfigError, match=r"a fork has its parent's model; here differ: n_layers 2 -> 3"):
        Fork(parent, "model.n_layers=3").train()
    with pytest.raises(ConfigError, match="is less than one global batch after the parent's 1.024K"):
        Fork(parent, f"milestones=[{4 * BATCH}]")
    with pytest.raises(ConfigError, match="a run cannot be its own parent"):
        Fork(parent, name="small")
    damaged = next(_at(parent.run, 4).path.glob("__0_*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="does not have its recorded sha256"):
        Fork(parent, name="twig2").train()


def test_a_finished_cosine_is_extended_by_explicit_choice_only(small):
    cosine = ("training.schedule=cosine", "training.lr_min=1e-4")
    small.train(*cosine)
    before = {p: p.stat().st_mtime_ns for p in small.run.path.rglob("*") if p.is_file()}
    longer = f"milestones=[{4 * BATCH}, {8 * BATCH}, {12 * BATCH}]"
    for allow in ((), {"supersede"}):
        with pytest.raises(IdentityError, match=r"cosine schedule of small ended at 2\.048K tokens") as refused:
            small.train(*cosine, longer, allow=allow)
        for choice in ("openlm fork small@", "training.horizon=3.072K", "training.horizon=2.048K: continue at the"):
            assert choice in str(refused.value)
        assert small.steps_on_disk() == {4: "t1024", 8: "t2048"}
    small.train(*cosine, longer, f"training.horizon={8 * BATCH}")
    lrs = {r["step"]: r["lr"] for r in small.run.read_metrics() if "lr" in r}
    assert [lrs[step] for step in (10, 11, 12)] == pytest.approx([1e-4] * 3)
    checkpoints = {p: time for p, time in before.items() if p.parent.parent == small.run.checkpoints}
    assert checkpoints
    assert {p: p.stat().st_mtime_ns for p in checkpoints} == checkpoints
    small.train(*cosine, longer, f"training.horizon={12 * BATCH}", allow={"supersede"})
    assert small.run.path.with_name("v1.superseded-1").exists()
    assert len(small.losses()) == 12


def test_a_finished_schedule_is_extended_by_consent(small):
    cosine = ("training.schedule=cosine", f"milestones=[{8 * BATCH}]")
    longer = ("training.schedule=cosine", f"milestones=[{8 * BATCH}, {16 * BATCH}]")
    small.train(*cosine)
    fingerprint, losses = small.run.fingerprint, small.losses()
    with pytest.raises(IdentityError, match="`--allow extend`: continue at the rates that the longer schedule has"):
        small.train(*longer)
    ready = [{"name": n, "shards": str(small.home.shards(n, "v1")), "weight": w} for n, w in (("text", 3), ("code", 1))]

    def consents() -> list[str]:
        made = ("tokenizer.train=null", "tokenizer.source=tokenizer.json", f"sources={json.dumps(ready)}")
        found = plan(small.experiment(*longer, *made), small.home).findings
        return [f.consent for f in found if f.level == "refusal" and f.consent]

    assert consents() == ["extend"]
    small.train(*longer, allow=["extend"])
    lrs = {r["step"]: r["lr"] for r in small.run.read_metrics() if "lr" in r}
    assert lrs[9] == small.experiment(*longer).learning_rates(0)(8) > lrs[8]
    assert small.run.fingerprint == fingerprint
    assert {step: small.losses()[step] for step in losses} == losses
    small.train(*longer)  # consent was given
    assert consents() == []


def test_a_wsd_run_goes_on_from_before_its_decay(small):
    wsd = ("training.schedule=wsd", f"training.decay={2 * BATCH}")
    small.train(*wsd)
    with pytest.raises(IdentityError, match=r"the one at 1\.024K is the last before the decay"):
        small.train(*wsd, f"milestones=[{4 * BATCH}, {8 * BATCH}, {16 * BATCH}]")
    fork = Fork(small, *wsd, f"milestones=[{16 * BATCH}]").train()
    lrs = {r["step"]: r["lr"] for r in fork.run.read_metrics() if "lr" in r}
    assert [lrs[step] for step in (5, 12)] == [0.01, 0.01]
    assert lrs[16] == pytest.approx(0.005)


def test_a_constant_schedule_is_simply_extended(small):
    small.train()
    fingerprint = read_json(small.run.path / "run.json")["fingerprint"]
    saved = {p: p.stat().st_mtime_ns for p in small.run.checkpoints.rglob("*") if p.is_file()}
    small.train(f"milestones=[{4 * BATCH}, {8 * BATCH}, {10 * BATCH}]")
    assert read_json(small.run.path / "run.json")["fingerprint"] == fingerprint
    assert {p: p.stat().st_mtime_ns for p in saved} == saved
    trained = [r["step"] for r in small.run.new_metrics(0)[0] if "loss" in r]
    assert trained == list(range(1, 11))


def test_a_fork_with_other_weights_repeats_nothing_while_there_is_unseen_text(parent):
    """The mixture of a cooldown: of `text` 24 samples were seen, of `code` 8."""
    sources = (
        'sources=[{name: text, files: ["raw/text/*.jsonl"]}, {name: code, files: ["raw/code/*.jsonl"], weight: 3}]'
    )
    fork = Fork(parent, sources).train()
    datasets = [open_dataset(d, fork.home) for d in fork.experiment.training_datasets()]
    sizes = [d.shard_sizes for d in datasets]
    began = zip(*order_of(parent.experiment(), sizes, parent.run.identity).picks(0, 32))
    went_on = list(zip(*order_of(fork.experiment, sizes, fork.run.identity).picks(32, 32)))
    assert len({*began, *went_on}) == 64
    assert sum(source for source, _ in went_on) == 24
    losses = fork.losses()
    shutil.rmtree(fork.run.path)
    assert Fork(parent, sources).train().losses() == losses


def test_a_jump_of_the_rate_is_refused_with_the_ways_on(parent):
    steeper = Fork(parent, "training.lr=3e-2")
    with pytest.raises(ConsentError, match=r"jumps from 0.01, the parent's, to 0.03\nSet training.lr=0.01 to"):
        steeper.train()
    assert not steeper.run.path.exists()
    train_here(steeper.experiment, steeper.home, allow=["rate"])
    assert {r["lr"] for r in steeper.records().values()} == {3e-2}
    Fork(parent, "training.lr=3e-2", "training.warmup=512", "parent.schedule=restart", name="again").train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.schedule=cosine", f"training.horizon={6 * BATCH}"],
            "train about 512 tokens at a learning rate of 0, as",
        ),
        (
            ["training.schedule=cosine", "training.lr_min=2e-2"],
            "climbs after its warm-up, to 0.0.* where training.lr is 0.01",
        ),
        (["training.lr_floor=0.5"], "climbs after its warm-up, to 0.5 where training.lr is 0.01"),
        ([f"training.horizon={9 * BATCH}"], None),
    ],
)
def test_rates_that_nobody_wants_are_refused(small: SmallRun, overrides: list[str], message: str | None):
    experiment = small.experiment(*overrides)
    found = list(rate_findings(experiment, small.home, 8 * BATCH))
    assert [f.consent for f in found] == (["rate"] if message else [])
    if message:
        with pytest.raises(ConsentError, match=message):
            small.train(*overrides)


def test_a_decay_after_the_last_milestone_is_said(small: SmallRun):
    wsd = ["training.schedule=wsd", f"training.decay={BATCH}", f"training.horizon={20 * BATCH}"]
    (finding,) = rate_findings(small.experiment(*wsd), small.home, 8 * BATCH)
    assert finding.level == "warning" and "begins at 4.864K tokens, after its last milestone" in finding.what


def test_a_written_cooldown_begins_at_its_parents_rate(tmp_path, monkeypatch):
    """From a cosine with a horizon of its own: the fork has neither the peak rate nor that horizon."""
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path))
    recipe = "extends: demo\nname: cos\ntraining: {schedule: cosine, horizon: 2M}"
    (tmp_path / "cos.yaml").write_text(recipe)
    cooled = ["training.schedule=wsd", "training.decay=100K", "milestones=[500K]"]
    fork = make_fork("cos", 400_000, "cooled", cooled, tmp_path).experiment
    parent, begin = load_experiment("cos"), fork.steps(400_000)
    rates = fork.learning_rates(400_000)
    assert rates(begin) == pytest.approx(parent.learning_rates(0)(begin - 1), rel=0.02)
    assert rates(fork.steps(500_000) - 1) < rates(begin) / 10


def test_tokens_between_milestones_are_trained_and_kept(small: SmallRun):
    """Until six steps, then to the last milestone, from there on; the same weights as in one go."""
    experiment = small.experiment()
    assert train_here(experiment, small.home, until=experiment.limit(None, 6)).step == 6
    assert small.steps_on_disk() == {4: "t1024", 6: None}
    first = small.losses()
    assert max(first) == 6
    assert train_here(experiment, small.home, until=experiment.limit(6 * BATCH, None)).step == 6  # nothing to do
    small.train()
    assert {**small.losses(), **first} == small.losses()
    for until, steps, message in ((None, 99, "is not between"), (1, 1, "give one")):
        with pytest.raises(ConfigError, match=message):
            experiment.limit(until, steps)


def test_a_run_is_forked_from_its_newest_checkpoint(small: SmallRun, monkeypatch: pytest.MonkeyPatch):
    """Which is kept from then on, while the run goes on and its others rotate."""
    folder = small.recipe.parent
    for name, value in {"OPENLM_RECIPES": folder, "OPENLM_HOME": small.home.root}.items():
        monkeypatch.setenv(name, str(value))
    arguments = ["fork", "small@latest", "twig", f"milestones=[{8 * BATCH}]", "--recipes", str(folder)]
    assert "has no checkpoint yet" in str(CliRunner().invoke(app, arguments).exception)
    experiment = small.experiment(f"execution.checkpoint_every={BATCH}", "execution.keep_checkpoints=1")
    train_here(experiment, small.home, until=experiment.limit(None, 6))
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 0, made.output
    fork = load_experiment("twig")
    assert fork.parent.milestone == 6 * BATCH
    train_here(experiment, small.home)
    assert sorted(small.steps_on_disk()) == [4, 6, 7, 8]
    train_here(fork, small.home)
    losses = {r["step"]: r["loss"] for r in RunFolder(small.home.run("twig", "v1")).read_metrics() if "loss" in r}
    assert losses == {step: small.losses()[step] for step in (7, 8)}


def test_a_recipe_begins_with_the_weights_of_a_milestone_or_an_export(parent: SmallRun, tmp_path):
    """The same first loss, at whatever place they stand; other weights are another run."""
    export_huggingface(_at(parent.run, 8).path, tmp_path / "exported")
    first, digests = {}, []
    for name, place in (("run", f"small@{8 * BATCH}"), ("folder", tmp_path / "exported"), ("drawn", None)):
        begins = [f"init_from={place}"] if place else []
        experiment = parent.experiment(f"name={name}", f"milestones=[{2 * BATCH}]", *begins)
        train_here(experiment, parent.home)
        run = RunFolder(parent.home.run(name, "v1"))
        (first[name],) = [r["loss"] for r in run.read_metrics() if r.get("loss") and r["step"] == 1]
        digests.append(run.identity.get("initial_weights"))
        train_here(experiment, parent.home)  # nothing to do, and the same run
    assert first["run"] == pytest.approx(first["folder"], rel=1e-6)
    assert first["run"] < first["drawn"] - 0.5
    assert digests[0] != digests[1] and digests[2] is None
    with pytest.raises(MissingInputError, match="small@1B, a milestone not in"):
        train_here(parent.experiment("name=none", "init_from=small@1B"), parent.home)
    with pytest.raises(ConfigError, match="init_from=small@main: 'main' is not a number of tokens"):
        train_here(parent.experiment("name=none", "init_from=small@main"), parent.home)
    with pytest.raises(ConfigError, match="a fork has its parent's weights"):
        Fork(parent, "init_from=small@1B")


def test_a_recipe_begins_with_a_milestone_of_another_version(parent: SmallRun, tmp_path):
    train_here(parent.experiment("version=v2", "seed=5", f"milestones=[{2 * BATCH}]"), parent.home)
    (of_v2,) = RunFolder(parent.home.run("small", "v2")).saved()
    at = f"@{2 * BATCH}"
    assert initial_weights(parent.experiment("name=x", f"init_from=small/v2{at}"), parent.home) == {of_v2.path: 1.0}
    with pytest.raises(MissingInputError, match=f"small{at}, a milestone not in .*runs/small/v1"):
        initial_weights(parent.experiment("name=x", f"init_from=small{at}"), parent.home)
    folder = parent.home.root / f"small/v2{at}"
    folder.mkdir(parents=True)  # a place that is there is that place
    assert initial_weights(parent.experiment("name=x", f"init_from=small/v2{at}"), parent.home) == {folder: 1.0}


def test_a_folder_to_begin_with_is_hashed_once_until_it_changes(parent: SmallRun, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = export_huggingface(_at(parent.run, 8).path, tmp_path / "exported")
    experiment = parent.experiment("name=x", f"init_from={folder}")
    hashed = tmp_path / "cache" / "openlm_pipeline" / "file_hashes.jsonl"
    first = parent_identity(experiment, parent.home)
    names = [json.loads(line)[0] for line in hashed.read_text().splitlines()]
    assert sorted(names) == sorted(str(p) for p in folder.iterdir())
    assert parent_identity(experiment, parent.home) == first
    assert len(hashed.read_text().splitlines()) == len(names)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert parent_identity(experiment, parent.home) != first
    assert len(hashed.read_text().splitlines()) == len(names) + 1


@pytest.mark.parametrize("fields", [{"weight_tying": True}, {"ffn": "gelu"}], ids=str)
def test_a_run_begins_with_weights_that_stand_under_two_names(tmp_path, fields: dict):
    config = ModelConfig(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=260, seq_len=32, **fields)
    model = create_model(config, seed=3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    small = SameSamples(tmp_path, config.model_dump_json(exclude_none=True))
    sample = small.sample[None]
    with torch.no_grad():
        loss = model(sample[:, :-1], sample[:, 1:])[0].item() / 32
    assert small.first_loss("begun", f"init_from={tmp_path / 'weights.pt'}") == pytest.approx(loss, abs=1e-4)


def test_a_source_that_a_fork_adds_is_counted_from_there(small: SmallRun):
    """Not from the first token of its parent, which would be four epochs of it."""
    small.train('sources=[{name: text, files: ["raw/text/*.jsonl"]}]', f"milestones=[{24 * BATCH}]")
    code = 'sources=[{name: code, files: ["raw/code/*.jsonl"]}]'
    fork = Fork(small, f"parent={{run: small, milestone: {24 * BATCH}}}", code, f"milestones=[{36 * BATCH}]")
    assert list(repeated(fork.experiment, fork.home, 36 * BATCH)) == []
    (finding,) = repeated(fork.experiment, fork.home, 60 * BATCH)
    assert finding.what == "twig sees each text of code 4.3 times"
