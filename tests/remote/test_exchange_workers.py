"""Two workers with disks of their own and an S3 server: the same shards as one machine, little disk, and a kill."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from openlm_pipeline.shards.manifest import read_manifest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.drill
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
RECIPE = """
name: apart
tokenizer: {name: bpe, source: "${OPENLM_HOME}/bpe.json"}
seq_len: 1024
samples_per_shard: 64
sources: [{name: text, files: ["s3://raw/text/*.jsonl"]}]
model: {hidden_dim: 32, n_layers: 1, n_heads: 2, vocab_size: 512}
training: {global_batch: 2048, lr: 1.0e-3, schedule: constant}
milestones: [2048]
"""
FILES, MOST_OF_SHARDS = 24, 0.10
_OLD_HASHES = "--openssl-legacy-provider"  # with which s3rver makes the marks of long listings


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _disk(folder: Path) -> int:
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += (Path(where) / name).lstat().st_blocks * 512
    return size


class Machines:
    """A server, a scheduler, workers; each worker has a folder for all that it writes."""

    def __init__(self, root: Path, server: str) -> None:
        self.root, self.running, self.workers = root, [], {}
        self.address = f"tcp://127.0.0.1:{_free_port()}"
        port = _free_port()
        keys = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_DEFAULT_REGION": "us-east-1"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.variables = {**kept, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
        self.variables |= {"PYTHONPATH": str(REPOSITORY)}
        if server == "moto":
            self.start("moto.server", "-H", "127.0.0.1", "-p", str(port))
        else:
            (root / "bucket").mkdir()
            self.run(
                [server, "-d", str(root / "bucket"), "-a", "127.0.0.1", "-p", str(port), "--silent"],
                NODE_OPTIONS=_OLD_HASHES,
            )
        there = ("--host", "127.0.0.1", "--no-dashboard")
        self.start("distributed.cli.dask_scheduler", "--port", self.address.rpartition(":")[2], *there)

    def start(self, module: str, *arguments: str, **variables: str) -> subprocess.Popen:
        return self.run([sys.executable, "-m", module, *arguments], **variables)

    def run(self, command: list[str], **variables: str) -> subprocess.Popen:
        with (self.root / "log").open("ab") as log:
            env = self.variables | variables
            process = subprocess.Popen(command, env=env, cwd=self.root, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def worker(self, name: str) -> None:
        folder = self.root / name
        folder.mkdir()
        flags = ("--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard")
        directory = ("--local-directory", str(folder))
        self.workers[name] = self.start(
            "distributed.cli.dask_worker", self.address, *flags, *directory, TMPDIR=str(folder)
        )

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture(params=["moto", "s3rver"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machines]:
    """`s3rver`, of npm, is a server of another make; OPENLM_S3RVER is its path where it is not on PATH."""
    server = request.param
    if server == "s3rver" and not (server := os.environ.get("OPENLM_S3RVER") or shutil.which("s3rver")):
        pytest.skip("s3rver is not installed: npm install s3rver")
    made = Machines(tmp_path, server)
    yield made
    made.close()


def _openlm(machines: Machines, home: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    where = {"OPENLM_HOME": str(home), "OPENLM_RECIPES": str(machines.root / "recipes")}
    return machines.start("openlm_pipeline", *arguments, **where, **variables)


def test_two_workers_with_disks_of_their_own(machines: Machines, tmp_path: Path):
    import s3fs

    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "apart.yaml").write_text(RECIPE)
    url = 'execution: {shards_url: "s3://shards"}\n'
    (tmp_path / "recipes" / "away.yaml").write_text(RECIPE.replace("name: apart", "name: away") + url)
    texts = [p.read_text(errors="replace") for p in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:720]]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machines.variables.items():
            patch.setenv(name, value)
        fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

        def is_up() -> bool:
            with contextlib.suppress(Exception):
                return fs.ls("") is not None
            return False

        wait_until(is_up, machines.running[0], seconds=60)
        for bucket in ("raw", "shards", "exchange"):
            fs.mkdir(bucket)
        for n in range(FILES):
            some = [texts[i][a : a + 3000] for i in range(n, len(texts), FILES) for a in range(0, len(texts[i]), 3000)]
            fs.pipe(f"raw/text/{n:02d}.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in some).encode())
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        bpe.train_from_iterator(texts[:40], special)
        for home in ("one", "client"):
            (tmp_path / home).mkdir()
            bpe.save(str(tmp_path / home / "bpe.json"))
        assert _openlm(machines, tmp_path / "one", "tokenize", "apart", "--workers", "1").wait(300) == 0
        expected = {e.tar: e.sha256 for e in read_manifest(tmp_path / "one" / "shards" / "text" / "v1")}
        shard_bytes = sum(e.bytes for e in read_manifest(tmp_path / "one" / "shards" / "text" / "v1"))

        for name in ("first", "second"):
            machines.worker(name)
        empty, peaks, stop = {}, {}, threading.Event()

        def watch() -> None:
            while not stop.wait(0.02):
                for name in ("first", "second", "third", "client"):
                    used = _disk(tmp_path / name) if (tmp_path / name).exists() else 0
                    peaks[name] = max(peaks.get(name, 0), used - empty.get(name, 0))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            client = _openlm(
                machines, tmp_path / "client", "tokenize", "away", "--dask-address", machines.address,
                OPENLM_EXCHANGE="s3://exchange/scratch",
            )  # fmt: skip
            wait_until(lambda: fs.glob("exchange/scratch/text/v1/packing-*/*.pieces"), client, seconds=300)
            machines.workers["second"].send_signal(signal.SIGKILL)
            machines.worker("third")
            assert client.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            stop.set()
            watcher.join()
        made = {e.tar: e.sha256 for e in read_manifest(tmp_path / "client" / "shards" / "text" / "v1")}
        assert made == expected
        there = {path.rpartition("/")[2]: fs.cat(path) for path in fs.glob("shards/text/v1/*.tar")}
        assert there == {tar: (tmp_path / "one" / "shards" / "text" / "v1" / tar).read_bytes() for tar in expected}
        shares = {name: peak / shard_bytes for name, peak in peaks.items()}
        print(f"\nshards {shard_bytes / 1e6:.1f} MB; peak local disk: { {n: f'{s:.1%}' for n, s in shares.items()} }")
        assert max(shares.values()) < MOST_OF_SHARDS
