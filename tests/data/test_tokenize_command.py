"""`openlm tokenize` with make_2048.py's arguments: the same shards as the recipe's, moved to a store where asked."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
from commands import Ended
from gloo_workers import forked_trainers
from small_dataset import SmallDataset, documents
from whole_documents import iterate_documents

from openlm_pipeline.cli.main import with_repeated_options
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset

Small = Callable[..., SmallDataset]


def openlm(*arguments: object, **variables: str) -> Ended:
    return commands.openlm(*arguments, variables=variables)


def test_make_2048_arguments_make_a_dataset(three_files: SmallDataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["tokenize", "--input-files", *sorted((three_files.root / "raw").iterdir()), "--output-dir", out]
    arguments += ["--tokenizer", three_files.root / "small_bpe.json", "--num-workers", 1, "--num-consumers", 1]
    done = openlm(*arguments, "--seqlen", 16)
    assert done.returncode == 0, done.stderr
    made = ShardedDataset(out / "16-v1")
    made.verify()
    assert made.info["totals"]["documents"] == 20 + 35 + 8
    found = {(file, record) for file, record, _ in iterate_documents(out / "16-v1")}
    assert len(found) >= 62  # the tail may cut one
    of_environment = [a for a in arguments if a not in ("--tokenizer", three_files.root / "small_bpe.json")]
    again = openlm(*of_environment, "--seq-len", 16, OPENLM_TOKENIZER=str(three_files.root / "small_bpe.json"))
    assert again.returncode == 0 and "packing" not in again.stdout
    other = openlm(*arguments, "--seqlen", 32)
    assert other.returncode == 0 and (out / "32-v1" / "manifest.jsonl").exists()


def test_upload_moves_the_shards_to_s3_base(three_files: SmallDataset, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    arguments = ["tokenize", "--input-files", three_files.raw("*.jsonl"), "--output-dir", out, "--seqlen", 16]
    arguments += ["--tokenizer", three_files.root / "small_bpe.json", "--num-workers", 1, "--upload-to-s3"]
    unset = openlm(*arguments, S3_BASE="")
    assert unset.returncode == 2 and "S3_BASE" in unset.stderr and not out.exists()
    done = openlm(*arguments, S3_BASE=f"file://{store}/")
    assert done.returncode == 0, done.stderr
    assert not list(out.rglob("*.tar"))
    read = ShardedDataset(tmp_path / "cache", remote=f"file://{store}")
    assert len(read) > 3 and len(read[len(read) - 1]) == 17


def test_padding_keeps_the_tail(three_files: SmallDataset, small: Small, inline: PoolFactory) -> None:
    totals = three_files.run(inline).facts
    padded = small("padded", {"pad_id": 399})
    padded.write({"a.jsonl": documents(20), "b.jsonl": documents(35, 100), "c.jsonl": documents(8, 200)})
    made = padded.run(inline).facts
    assert 0 < totals["tail_tokens"] == 17 - made["padding_tokens"] and made["tail_tokens"] == 0
    dataset = ShardedDataset(padded.shards)
    padded.manifest()
    assert dataset.info["pad_id"] == 399
    last = dataset[len(dataset) - 1].tolist()
    assert last[totals["tail_tokens"] :] == [399] * made["padding_tokens"] != []
    recovered = padded.recovered()
    assert len(recovered) == 20 + 35 + 8
    assert sum(map(len, recovered.values())) == totals["tokens"]


def test_one_option_takes_many_files() -> None:
    given = ["tokenize", "--input-files", "a", "b", "--seed", "1", "x=2"]
    assert with_repeated_options(given) == [
        "tokenize", "--input-files", "a", "--input-files", "b", "--seed", "1", "x=2",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["tokenize"], ["tokenize", "demo", "--input-files", "x", "--output-dir", "y"]])
def test_a_recipe_or_files_but_not_both(arguments: list[str]) -> None:
    done = openlm(*arguments)
    assert done.returncode == 2 and "give a recipe, or --input-files and --output-dir" in done.stderr


def test_a_folder_of_something_else_is_not_emptied(three_files: SmallDataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    precious = out / "16-v1" / "shard-0000000.tar"
    precious.parent.mkdir(parents=True)
    precious.write_text("of make_2048.py")
    done = openlm(
        "tokenize", "--input-files", three_files.raw("a.jsonl"), "--output-dir", out, "--seqlen", 16,
        "--tokenizer", three_files.root / "small_bpe.json", "--num-workers", 1,
    )  # fmt: skip
    assert done.returncode == 5 and "shard-0000000.tar" in done.stderr
    assert precious.read_text() == "of make_2048.py"


def test_a_recipe_reads_ready_made_shards_of_openlm(
    three_files: SmallDataset, inline: PoolFactory, tmp_path: Path
) -> None:
    made = three_files.run(inline)
    exported = tmp_path / "exported"
    done = openlm("shards", "export", made.path, "-o", exported, "--format", "json.gz", "--count-key", "num_chunks")
    assert done.returncode == 0, done.stderr
    assert "num_chunks" in json.loads((exported / "manifest.jsonl").read_text().splitlines()[0])
    recipe = tmp_path / "ready.yaml"
    recipe.write_text(
        json.dumps(
            {
                "name": "ready",
                "tokenizer": {"name": "small_bpe", "source": str(three_files.root / "small_bpe.json")},
                "seq_len": 16,
                "sources": [{"name": "ready", "shards": str(exported)}],
                "model": {"hidden_dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 512},
                "training": {"global_batch": 64, "lr": 1e-3},
                "milestones": [256],
            }
        )
    )
    home = {"OPENLM_HOME": str(tmp_path / "home")}
    done = openlm("tokenize", recipe, **home)
    assert done.returncode == 0 and "ready-made" in done.stdout, done.stderr
    with forked_trainers():
        trained = openlm("train", recipe, **home)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    shards = list((tmp_path / "home" / "shards" / "ready" / "v1").glob("*.tar"))
    assert shards and all(os.path.getsize(s) for s in shards)  # noqa: PTH202
