"""What is fuzzed: for each kind of file, valid ones, how they are mutated, and the function of ours that reads them."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zstandard
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from openlm_pipeline.checkpoints.folders import INFO, MODEL_CONFIG, commit
from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.evaluation.items import items_table, read_items, write_items
from openlm_pipeline.evaluation.scorecard import load_scorecard
from openlm_pipeline.evaluation.suite import load_suite
from openlm_pipeline.experiments import TokenizerSpec, load_experiment
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.shards.manifest import DATASET, MANIFEST, read_dataset
from openlm_pipeline.shards.openlm_formats import read_shard
from openlm_pipeline.storage.copies import describe_file
from openlm_pipeline.storage.files import write_json
from openlm_pipeline.tokenizers.engines.huggingface import HuggingFaceEngine
from openlm_pipeline.tokenizers.tokenizer import make_tokenizer

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["the cat sat on a mat", "naïve 文字 😀 \x00", "a b\n\n c\t" * 20, "<|endoftext|> def f(x): return x"]


class Kind(ABC):
    """One kind of file; `prepare` runs once, `write` and `read` for each input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def prepare(self) -> None:
        """Make valid files in `folder`, and import whatever reading needs."""

    @abstractmethod
    def write(self, rng: random.Random, out: Path) -> Path:
        """A mutated one in the empty folder `out`; what is to be read."""

    @abstractmethod
    def read(self, path: Path) -> None:
        """Read it as the project does.

        Raises:
            OpenLMError: it is refused.
        """


def _records(rng: random.Random) -> list[dict[str, Any]]:
    return [{"id": n, "text": rng.choice(TEXTS) * rng.choice((0, 1, 5)), "meta": {"a": [n, 1.5]}} for n in range(30)]


class RawFiles(Kind):
    """JSON lines and arrays, plain and compressed."""

    packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

    def prepare(self) -> None:
        self.packed = {**self.packers, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}

    def write(self, rng: random.Random, out: Path) -> Path:
        suffix = rng.choice(list(self.packed))
        records = [mutations.of_value(rng, r) if rng.random() < 0.1 else r for r in _records(rng)]
        name, content = "a.json", json.dumps(records, indent=rng.choice((None, 1))).encode()
        if rng.random() < 0.6:
            name, content = "a.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in records)
        inside = not suffix or rng.random() < 0.4
        content = mutations.of_bytes(rng, content) if inside else content
        data = self.packed[suffix](content)
        path = out / (name + suffix)
        path.write_bytes(data if inside else mutations.of_bytes(rng, data))
        return path

    def read(self, path: Path) -> None:
        for _ in RecordReader(str(path), max_bad_fraction=1, on_bad=lambda bad: None):
            pass


class Zstandard(RawFiles):
    """zstd: frames of all kinds, a skippable one, windows up to the largest, runs that stand for much."""

    def prepare(self) -> None:
        content = b"".join(json.dumps(r).encode() + b"\n" for r in _records(random.Random(0)))
        long = b'{"text": "' + b"x" * (64 << 20) + b'"}\n'
        self.valid = list(self._frames(content))
        self.valid += [zstandard.ZstdCompressor(level=1).compress(long)]

    def _frames(self, content: bytes):
        for options in ({}, {"write_checksum": True}, {"write_content_size": False}, {"level": 19}):
            yield zstandard.ZstdCompressor(**options).compress(content)
        wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
        yield zstandard.ZstdCompressor(compression_params=wide).compress(content)
        yield b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + zstandard.compress(content)
        yield b"".join(zstandard.compress(content[i : i + 400]) for i in range(0, len(content), 400))

    def write(self, rng: random.Random, out: Path) -> Path:
        path = out / "a.jsonl.zst"
        data = rng.choice(self.valid[:-1] if rng.random() < 0.98 else self.valid[-1:])
        if rng.random() < 0.5:  # the header: window, sizes, the kind of block
            at = rng.randrange(min(14, len(data)))
            data = data[:at] + rng.randbytes(rng.choice((1, 1, 4))) + data[at + 1 :]
        else:
            data = mutations.of_bytes(rng, data)
        path.write_bytes(data)
        return path


class Parquet(RawFiles):
    """Raw files of Parquet, in all encodings of texts."""

    encodings = ("PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY")

    def prepare(self) -> None:
        self.valid = []
        texts = [r["text"] for r in _records(random.Random(0))]
        for kind in (pa.string(), pa.large_binary()):
            table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts).cast(kind)})
            for options in (
                {"compression": "zstd"},
                {"compression": "snappy", "row_group_size": 7},
                *({"use_dictionary": False, "column_encoding": {"text": e, "id": "PLAIN"}} for e in self.encodings),
            ):
                out = io.BytesIO()
                pq.write_table(table, out, **options)
                self.valid.append(out.getvalue())
        self.read(self._written(self.folder, self.valid[0]))

    def _written(self, out: Path, data: bytes) -> Path:
        path = out / "a.parquet"
        path.write_bytes(data)
        return path

    def write(self, rng: random.Random, out: Path) -> Path:
        return self._written(out, mutations.of_bytes(rng, rng.choice(self.valid)))


class Items(Parquet):
    """The per-item table of scores."""

    def prepare(self) -> None:
        row = {
            "run": "r", "suite": "s", "suite_version": "1", "task": "t", "num_fewshot": 0, "item_hash": "h",
            "prompt_hash": "p", "num_choices": 2, "gold": 0, "choice_logprobs": [-1.0, -2.0], "choice_tokens": [1, 2],
            "correct": True, "nll": 1.0, "num_tokens": 3, "metric": "m", "value": 1.0, "value_kind": "correct",
        }  # fmt: skip
        path = self.folder / "items.parquet"
        write_items(path, items_table([row | {"item": n} for n in range(40)]), {"a": 1})
        self.valid = [path.read_bytes()]
        self.read(path)

    def read(self, path: Path) -> None:
        read_items(path)


class Tokenizers(Kind):
    """tokenizer.json: bytes and meaning."""

    def prepare(self) -> None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = {"vocab_size": 280, "special_tokens": ["<|endoftext|>"], "show_progress": False}
        bpe.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
        words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        unigram = Tokenizer(models.Unigram([("<|endoftext|>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
        self.valid = [made.to_str().encode() for made in (bpe, bpe, words, unigram)]

    def write(self, rng: random.Random, out: Path) -> Path:
        path, data = out / "tokenizer.json", rng.choice(self.valid)
        if rng.random() < 0.7:
            data = json.dumps(mutations.of_value(rng, json.loads(data))).encode()
        else:
            data = mutations.of_bytes(rng, data)
        path.write_bytes(data)
        return path

    def read(self, path: Path) -> None:
        made = path.parent / "made"
        make_tokenizer(TokenizerSpec(name="x", source=str(path)), [], "text", made)
        HuggingFaceEngine(made / "tokenizer.json").encode_batch(TEXTS)


class Yaml(Kind):
    """Recipes and suites."""

    def prepare(self) -> None:
        folders = (("openlm_pipeline/experiments/recipes", True), ("openlm_pipeline/evaluation/suites", False))
        found = [(p, is_recipe) for f, is_recipe in folders for p in sorted((REPOSITORY / f).rglob("*.y*ml"))]
        self.valid = [(p.read_bytes(), is_recipe) for p, is_recipe in found if p.stat().st_size < 8000]
        assert {is_recipe for _, is_recipe in self.valid} == {True, False}

    def write(self, rng: random.Random, out: Path) -> Path:
        data, is_recipe = rng.choice(self.valid)
        if rng.random() < 0.6:
            changed = mutations.of_value(rng, yaml.safe_load(data))
            data = yaml.safe_dump(changed, allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")
        else:
            data = mutations.of_bytes(rng, data)
        path = out / ("recipe.yaml" if is_recipe else "suite.yaml")
        path.write_bytes(data)
        return path

    def read(self, path: Path) -> None:
        if path.name == "recipe.yaml":
            load_experiment(str(path))
        else:
            load_suite(path)


class Checkpoints(Kind):
    """A checkpoint's folder: description, DCP's metadata and data; .pt and safetensors of the same weights."""

    files = ("a.pt", "bare.pt", "a.safetensors")

    def prepare(self) -> None:
        config = ModelConfig(hidden_dim=8, n_layers=1, n_heads=2, seq_len=16, vocab_size=16)
        model = Transformer(config)
        model.init_buffers()
        state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        tmp = self.folder / ".tmp-step-00000001"
        tmp.mkdir()
        save_distributed({"model": state}, storage_writer=FileSystemWriter(tmp), no_dist=True)
        write_json(tmp / MODEL_CONFIG, config.model_dump(mode="json"))
        self.ours = commit(tmp, "f", 1, 256, "t256", {}, {}).path
        torch.save({"state_dict": state, "model_config": config.model_dump(mode="json")}, self.folder / "a.pt")
        torch.save(state, self.folder / "bare.pt", _use_new_zipfile_serialization=False)
        save_file({k: v.contiguous() for k, v in state.items()}, self.folder / "a.safetensors")
        for path in (self.ours, self.folder / "a.pt"):
            load_checkpoint(path)

    def write(self, rng: random.Random, out: Path) -> Path:
        name = rng.choice((".metadata", ".metadata", "__0_0.distcp", INFO, MODEL_CONFIG, *self.files))
        if name in self.files:
            path = out / name
            path.write_bytes(mutations.of_bytes(rng, (self.folder / name).read_bytes()))
            return path
        folder = out / self.ours.name
        shutil.copytree(self.ours, folder)
        data = (folder / name).read_bytes()
        if name.endswith(".json") and rng.random() < 0.7:
            (folder / name).write_text(json.dumps(mutations.of_value(rng, json.loads(data))))
        else:
            (folder / name).write_bytes(mutations.of_bytes(rng, data))
        if name != INFO and rng.random() < 0.8:  # as a stranger sends it: with the hashes of what is in it
            info = json.loads((folder / INFO).read_text())
            info["files"][name] = describe_file(folder / name)
            del info["sha256"]
            write_json(folder / INFO, {**info, "sha256": fingerprint(info)})
        return folder

    def read(self, path: Path) -> None:
        load_checkpoint(path, warn=lambda note: None)


class Datasets(Kind):
    """What stands beside shards, scorecards, and OpenLM's tar files."""

    def prepare(self) -> None:
        from small_run import write_dataset

        from openlm_pipeline.shards.openlm_formats import write_openlm_shard
        from openlm_pipeline.storage.home import Home

        home = Home(self.folder / "home")
        write_dataset(home, "d", 40, seed=0)
        self.dataset = home.shards("d", "v1")
        self.tars = []
        self.card = next((REPOSITORY / "tests/compatibility").glob("scorecard_*.json")).read_bytes()
        for form in ("json.gz", "json", "txt"):
            path = self.folder / f"{form}.tar"
            write_openlm_shard(path, np.arange(40, dtype=np.uint16).reshape(8, 5), 0, format=form)
            self.tars.append(path.read_bytes())

    def write(self, rng: random.Random, out: Path) -> Path:
        what = rng.randrange(3)
        if what == 0:
            path, data = out / "a.tar", mutations.of_bytes(rng, rng.choice(self.tars))
        elif what == 1:
            path, data = out / "scorecard.json", self.card
        else:
            shutil.copytree(self.dataset, out / "d")
            path = out / "d" / rng.choice((MANIFEST, DATASET))
            data = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.7:
            data = json.dumps(mutations.of_value(rng, json.loads(data))).encode()
        elif what:
            data = mutations.of_bytes(rng, data)
        path.write_bytes(data)
        return path

    def read(self, path: Path) -> None:
        if path.suffix == ".tar":
            read_shard(path, seq_len=4, vocab_size=100, eot_id=0, pad_id=None)
        elif path.name == "scorecard.json":
            load_scorecard(path)
        else:
            read_dataset(path.parent)


KINDS: dict[str, type[Kind]] = {
    "raw files": RawFiles,
    "zstd": Zstandard,
    "parquet": Parquet,
    "items": Items,
    "tokenizers": Tokenizers,
    "yaml": Yaml,
    "checkpoints": Checkpoints,
    "datasets": Datasets,
}
