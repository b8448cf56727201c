"""What is wrong with a recipe is named by its plan, before anything runs; what makes no sense at all is no recipe."""

import shutil

import pytest
from small_run import BATCH, SmallRun

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.pipeline.plan import plan

TO_8 = f"milestones=[{8 * BATCH}]"
COSINE = "training.schedule=cosine"
LONG = 1000 * BATCH


def ready(heldout: str, code: str = "shards/code/v1") -> list[str]:
    """Overrides that take ready-made shards from folders of the home."""
    return [
        f"sources=[{{name: text, shards: shards/text/v1, weight: 3}}, {{name: code, shards: {code}}}]",
        f"validation={{source: {{name: heldout, files: [], shards: {heldout}}}, max_samples: 21}}",
        "tokenizer={name: bytes, source: tokenizer.json, train: null}",
    ]


EXTRA = {"training.warmup=1T": [COSINE]}
"""A constant schedule may warm up for ever."""


@pytest.mark.parametrize(
    ("overrides", "level", "message"),
    [
        ([COSINE, f"training.horizon={6 * BATCH}"], "refusal", "would train about 512 tokens at a learning rate of 0"),
        ([COSINE, "training.lr_min=0.02"], "refusal", "climbs after its warm-up, to 0.0"),
        (["training.lr_floor=0.02"], "refusal", "climbs after its warm-up, to 0.02 where training.lr is 0.01"),
        (["training.schedule=wsd", "training.decay=256", "training.horizon=1M"], "warning", "after its last milestone"),
        ([f"milestones=[{200 * BATCH}]"], "warning", "sees each text of code 6.0 times"),
        ([f"milestones=[{LONG}]"], "refusal", "would see each text of code 30 times"),
        (
            [TO_8, "parent={run: begun, milestone: 1024}", "training.lr=0.02"],
            "refusal",
            "jumps from 0.01, the parent's, to 0.02",
        ),
        (
            [TO_8, "parent={run: begun, milestone: 1024}", "model.n_layers=3"],
            "refusal",
            "a fork has its parent's model; here differ: n_layers 2 -> 3",
        ),
        (
            [TO_8, "parent={run: begun, milestone: 1024}", "training.optimizer=muon"],
            "refusal",
            "the optimizer's state of the parent does not fit: optimizer adamw -> muon",
        ),
        (
            [TO_8, "parent={run: begun, milestone: 1024}", "training.global_batch=96"],
            "refusal",
            "no whole number of its steps of 96 tokens",
        ),
        (
            [TO_8, "parent={run: begun, milestone: 1024}", "training.lr=0.001"],
            "warning",
            "falls from 0.01, the parent's",
        ),
        (
            [TO_8, "parent={run: begun, milestone: 1024, schedule: restart}", "training.warmup=0", "training.lr=0.02"],
            "refusal",
            "jumps from 0.01, the parent's, to 0.02",
        ),
        (
            ['validation={source: {name: heldout, files: ["raw/text/*.jsonl"]}, max_samples: 21}'],
            "warning",
            "1 of the validation set's files are also in text",
        ),
        (["sources=[{name: text, files: [a]}, {name: code, files: [b], weight: 1e-9}]"], "refusal", "less than 1/4096"),
        (
            ['validation={source: {name: heldout, files: ["raw/*/l*.jsonl"]}}'],
            "warning",
            "1 of the validation set's files are also in text, such as",
        ),
        (
            ready("shards/text/v1"),
            "warning",
            "2 of the validation set's files are also in text, such as 00000000.tar",
        ),
        (ready("linked"), "warning", "2 of the validation set's files are also in text"),
        (ready("copied"), "warning", "2 of the validation set's files are also in text"),
        (
            ['sources=[{name: text, files: ["raw/text/*"]}, {name: code, files: ["raw/linked/l.jsonl"]}]'],
            "warning",
            "1 files of text are also in code",
        ),
        (ready("shards/heldout/v1", code="copied"), "warning", "2 files of text are also in code, such as"),
        (
            ["training.sampling=resampled", "seed=2", f"milestones=[{30 * BATCH}]"],
            "warning",
            "the order of text is drawn with replacement (resampled): about 50% of it is read twice or more, and 50%",
        ),
        (
            [TO_8, "parent={run: begun, milestone: 1024}", "training.sampling=windowed"],
            "warning",
            "text continues in its parent's order; training.sampling=windowed holds for sources that the parent did",
        ),
    ],
)
def test_a_plan_names_it(small: SmallRun, overrides: list[str], level: str, message: str):
    raw = small.home.root / "raw" / "text"
    raw.mkdir(parents=True)
    (raw / "a.jsonl").write_text('{"text": "a"}\n')
    (raw.with_name("linked")).mkdir()
    (raw.with_name("linked") / "l.jsonl").symlink_to(raw / "a.jsonl")
    shards = small.home.shards("text", "v1")
    (small.home.root / "linked").symlink_to(shards)
    shutil.copytree(shards, small.home.root / "copied")
    if any("begun" in o for o in overrides):
        small.train("name=begun", "milestones=[1024]")
    said = [(f.level, f.what) for f in plan(small.experiment(*overrides), small.home).findings]
    assert any(found == level and message in what for found, what in said), said


def test_the_plan_draws_the_learning_rate(small: SmallRun):
    (line,) = [line for line in plan(small.experiment(COSINE), small.home).lines() if line.startswith("learning rate")]
    first, drawn, last = line.split("|")
    assert float(first.split()[-1]) == pytest.approx(0.002)
    assert len(drawn) == 40
    assert drawn[0] < drawn[len(drawn) * 2 // 3] == "█" > drawn[-1]
    assert "at most 0.01" in last


@pytest.mark.parametrize(
    "override",
    [
        "training.lr=inf", "training.lr=nan", "training.lr=0", "training.lr=-1", "training.weight_decay=inf",
        "training.eps=inf", "training.eps=0", "training.grad_clip=inf", "training.beta2=1", "training.global_batch=0",
        "training.global_batch=33", "training.global_batch=1e30", "milestones=[]", "milestones=[0]", "milestones=[5,4]",
        "milestones=[99999999999T]", "milestones=[inf]", "seq_len=0", "seq_len=1000000000000", "seed=1e400",
        "seed=99999999999999999999999", "model.hidden_dim=1000000000", "model.n_layers=1000000000", "model.n_heads=0",
        "model.vocab_size=99999999999999", "execution.micro_batch=0", "execution.log_every=0", "execution.replicas=0",
        "execution.loss_chunk=0", "launcher.processes=0", "training.warmup=inf", "training.skip_steps=[0]",
        "training.z_loss=inf", "training.spike_factor=inf", "sources.0.weight=inf", "training.schedule=cosin",
        "training.warmup=1T", "validation.max_samples=0", "validation.every=0", "init_from=''",
        "execution.hang_seconds=inf",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_a_line(small: SmallRun, override: str):
    with pytest.raises(ConfigError) as refused:
        plan(small.experiment(override, *EXTRA.get(override, [])), small.home)
    assert 1 <= len(str(refused.value).splitlines()) <= 4
