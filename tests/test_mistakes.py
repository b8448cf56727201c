"""Mistakes and faults of every kind, each made on purpose: one line with cause and next step, and its exit code."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable

import pytest
from commands import openlm
from tiny_pipeline import TinyPipeline


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command that can't do what it is asked for."""

    command: str
    """`HOME` stands for the home, `ROOT` for the folder around it."""
    code: int
    says: str
    """What the error must match: its cause, and the next step."""
    prepare: Callable[[TinyPipeline], object] = lambda pipeline: None
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


def recipe(old: str, new: str) -> Callable[[TinyPipeline], None]:
    """Make the mistake in the recipe's file."""

    def edit(pipeline: TinyPipeline) -> None:
        path = pipeline.root / "recipes" / "tiny.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return edit


def write(name: str, content: str | bytes) -> Callable[[TinyPipeline], None]:
    """Write a file below the folder around the home."""

    def edit(pipeline: TinyPipeline) -> None:
        path = pipeline.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def remove(name: str) -> Callable[[TinyPipeline], None]:
    def edit(pipeline: TinyPipeline) -> None:
        path = pipeline.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def flip(pattern: str) -> Callable[[TinyPipeline], None]:
    """Flip a bit in the middle of the first file that matches."""

    def edit(pipeline: TinyPipeline) -> None:
        path = sorted(pipeline.root.glob(pattern))[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return edit


def cut(pattern: str) -> Callable[[TinyPipeline], None]:
    def edit(pipeline: TinyPipeline) -> None:
        path = sorted(pipeline.root.glob(pattern))[0]
        os.truncate(path, path.stat().st_size // 2)

    return edit


def damage_databases(pipeline: TinyPipeline) -> None:
    for path in (pipeline.root / "dagster").rglob("*.db"):
        path.write_bytes(b"no database" + path.read_bytes()[11:])


RUN = "openlm_home/runs/tiny/v1"
SHARDS = "tokenize --output-dir ROOT/out --tokenizer HOME/tokenizers/tiny_bpe"
HALF_TEXT = b'{"text": "a document of some words"}\n' * 40 + bytes(range(128, 256)) * 40
MISTAKES = [
    # recipes
    Mistake("plan tinny", 2, "tinny.*tiny"),
    Mistake("plan tiny training.lrr=1", 2, "'lrr'; did you mean 'lr'"),
    Mistake("plan tiny training.lr=fast", 2, "training.lr"),
    Mistake("plan tiny training.lr=inf", 2, "training.lr"),
    Mistake("plan tiny training.global_batch=0", 2, "global_batch"),
    Mistake("plan tiny training.global_batch=100", 2, "global_batch"),
    Mistake("plan tiny training.schedule=cosin", 2, "schedule.*cosine"),
    Mistake("plan tiny milestones=[20K,10K]", 2, "milestones must increase"),
    Mistake("plan tiny milestones=[]", 2, "at least 1"),
    Mistake("plan tiny milestones=[1X]", 2, "write for example 250B"),
    Mistake("plan tiny name=../x", 2, "name"),
    Mistake("plan tiny version=../../x", 2, "version"),
    Mistake("plan tiny seq_len=0", 2, "seq_len"),
    Mistake("plan tiny model.n_heads=32", 2, "n_heads 32"),
    Mistake("plan tiny model={base:open_lm_1bb}", 2, "open_lm_1b"),
    Mistake("plan tiny tokenizer.train.vocab_size=10", 2, "vocab_size"),
    Mistake("plan tiny launcher.kind=slrm", 2, "slurm"),
    Mistake("plan tiny evaluation.suite=gauntlett", 2, "did you mean 'gauntlet'"),
    Mistake("plan tiny lr", 2, "lr"),
    Mistake("plan tiny", 2, "tiny.yaml:.*", recipe("seq_len: 32", "seq_len: [32")),
    Mistake("plan tiny", 2, "sources", recipe("name: tiny_text", "nam: tiny_text")),
    Mistake("plan tiny", 2, "NOT_SET", recipe("seq_len: 32", "seq_len: ${NOT_SET}")),
    Mistake("plan tiny", 2, "no file .*tiny.yaml", recipe("name: tiny\n", "extends: tiny\nname: tiny\n")),
    Mistake("plan ROOT/recipes", 2, "it is a folder"),
    Mistake("plan tiny", 2, "no-such-folder", variables={"OPENLM_RECIPES": "/no-such-folder"}),
    # data
    Mistake("tokenize tiny version=v2", 3, "raw/tiny_text", remove("openlm_home/raw/tiny_text")),
    Mistake(
        "tokenize tiny version=v2", 5, "b.jsonl.*another name", write("openlm_home/raw/tiny_text/b.jsonl", HALF_TEXT)
    ),
    Mistake(
        f"{SHARDS} --input-files HOME/raw/c.jsonl",
        4,
        "c.jsonl.*text",
        write("openlm_home/raw/c.jsonl", '{"txt": "a"}\n' * 9),
    ),
    Mistake(
        f"{SHARDS} --input-files HOME/raw/x.jsonl.zst",
        4,
        "x.jsonl.zst",
        write("openlm_home/raw/x.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"0" * 99),
    ),
    Mistake(
        f"{SHARDS} --input-files HOME/raw/half.jsonl", 4, "half.jsonl", write("openlm_home/raw/half.jsonl", HALF_TEXT)
    ),
    Mistake(
        "tokenize tiny version=v2 sources.0.files=[s3://bucket/x.jsonl]",
        4,
        "s3://bucket/x.jsonl",
        variables={
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_MAX_ATTEMPTS": "1",
        },
    ),
    Mistake("tokenize tiny --workers 0", 2, "workers"),
    Mistake(
        f"{SHARDS} --input-files HOME/raw/tiny_text/a.jsonl --dask-address tcp://127.0.0.1:9",
        3,
        "127.0.0.1:9",
        variables={"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"},
    ),
    Mistake("tokenize tiny version=v2", 4, "tokenizer", flip("openlm_home/tokenizers/tiny_bpe/tokenizer.json")),
    Mistake("tokenize --input-files HOME/raw/tiny_text/a.jsonl --output-dir ROOT/out --tokenizer ROOT/none", 3, "none"),
    Mistake(f"{SHARDS} --input-files HOME/raw/none.jsonl", 3, "none.jsonl"),
    Mistake("shards verify tiny", 4, "shard", flip("openlm_home/shards/tiny_text/v1/00000000.tar")),
    Mistake("shards verify HOME/none", 3, "none"),
    Mistake("shards stats tinny", 2, "tiny"),
    # training
    Mistake("train tiny", 3, "tokenize", remove("openlm_home/shards")),
    Mistake(
        "train tiny version=v2",
        6,
        "00000000.tar has 524800 bytes.*openlm logs tiny",
        cut("openlm_home/shards/tiny_text/v1/00000000.tar"),
    ),
    Mistake("train tiny training.lr=2e-3", 5, "training.lr.*version"),
    Mistake("train tiny --until 5Q", 2, "5Q"),
    Mistake("train tiny", 4, "run.json", write(f"{RUN}/run.json", "{}")),
    Mistake("train tiny execution.device=cuda", 2, "unknown key 'device'"),
    Mistake("train tiny version=v2 launcher.processes=7", 2, "does not divide over 7 processes; take 4 or 8"),
    Mistake("fork tiny@9999K tiny2", 2, "no milestone at 9.999M tokens; it has 10K"),
    Mistake("fork tiny tiny2", 2, "@"),
    Mistake("train tiny --allow supersed", 2, "supersede"),
    # evaluation
    Mistake("evaluate tiny@t9999K", 2, "t9999K.*t0040K"),
    Mistake("evaluate --checkpoint ROOT/none --eval-yaml HOME/suite.yaml", 3, "none"),
    Mistake("evaluate tiny@t0010K evaluation.suite=HOME/none.yaml", 2, "none.yaml"),
    Mistake(
        "evaluate tiny@t0010K evaluation.suite=ROOT/bad.yaml",
        2,
        "bad.yaml",
        write("bad.yaml", "name: x\nicl_tasks: [{label: a}]\n"),
    ),
    Mistake("items tiny@t0010K --task no_task", 2, "no_task.*last_word"),
    Mistake("compare tiny@t0010K tinny@t0040K", 2, "tinny.*no recipe"),
    Mistake("report tinny", 2, "tiny"),
    Mistake("generate tiny@t9999K --prompt x", 2, "t9999K.*t0040K"),
    Mistake("export HOME/runs/tiny/v1/checkpoints/step-00000158 -o ROOT/out", 3, "step-00000158"),
    Mistake(
        "export HOME/runs/tiny/v1/checkpoints/step-00000157 -o ROOT/out",
        4,
        "damaged",
        flip(f"{RUN}/checkpoints/step-00000157/*.distcp"),
    ),
    Mistake("report tiny", 4, "scorecard.json", cut("openlm_home/scorecards/tiny/v1/t0040K/scorecard.json")),
    Mistake(
        "evaluate tiny@t0040K",
        4,
        "last_word.jsonl.*line 1",
        write("openlm_home/raw/tasks/last_word.jsonl", '{"contxt": "a"}\n'),
    ),
    Mistake("evaluate tiny@t0040K", 3, "last_word.jsonl", remove("openlm_home/raw/tasks/last_word.jsonl")),
    # operation
    Mistake("show tinny", 3, "tinny.*tiny"),
    Mistake("logs tinny", 3, "tinny.*tiny"),
    Mistake("stop tinny", 3, "tinny.*tiny"),
    Mistake("launch tinny", 2, "tinny.*tiny"),
    Mistake("launch tiny training.lrr=1 --name x", 2, "did you mean 'lr'"),
    Mistake("runns", 2, "runs"),
    Mistake("plan --jsn tiny", 2, "No such option: --jsn"),
    Mistake("runs", 2, "hostname, which is a file", variables={"OPENLM_HOME": "/etc/hostname"}),
    Mistake("tokenize tiny version=v2", 2, "hostname, which is a file", variables={"OPENLM_HOME": "/etc/hostname"}),
    Mistake("tokenize tiny", 2, "none.yaml", variables={"OPENLM_DASK": "/none.yaml"}),
    Mistake("cost tiny", 2, "OPENLM_PRICE", variables={"OPENLM_PRICE": "cheap"}),
    Mistake("plan tiny", 2, "nope://", variables={"OPENLM_HOME": "nope://bucket/x"}),
    Mistake("download nothing -o ROOT/out", 2, "nothing"),
    Mistake("launch tiny", 1, "file is not a database.*what is done stays done", damage_databases),
    Mistake("ui --port 99999999", 2, "port"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: re.sub(r"[^\w]+", "_", m.command))
def test_a_mistake_ends_in_one_line_with_cause_and_next_step(mistake, finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    mistake.prepare(pipeline)
    monkeypatch.chdir(tmp_path)
    command = mistake.command.replace("HOME", str(pipeline.home)).replace("ROOT", str(pipeline.root))
    ended = openlm(*command.split(), variables={**pipeline.variables, **mistake.variables})
    said = ended.stderr.replace(str(pipeline.root), "ROOT")
    assert ended.returncode == mistake.code, said
    assert re.search(mistake.says, said, re.DOTALL), said
    lines = [line for line in said.splitlines() if line]
    assert lines[0].startswith(("error: ", "Usage: ")) and len(lines) <= 5 and "Traceback" not in said, said
