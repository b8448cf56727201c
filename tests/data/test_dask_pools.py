"""Clusters of every kind that can run here give the same shards, and lose nothing when a worker dies."""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import zstandard
from distributed import LocalCluster
from small_dataset import SmallDataset, documents, message_of

from openlm_pipeline.errors import ClusterError, ConfigError, MissingInputError
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import DaskPool, DaskSettings, PoolFactory
from openlm_pipeline.tokenization.documents import FileTokens
from openlm_pipeline.tokenization.job import tokenize_files
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info

Small = Callable[..., SmallDataset]
REFERENCE_ENGINE = {"samples_per_shard": 4096, "execution": {"tokenizer_engine": "huggingface"}}


def quiet(line: str) -> None:
    pass


def test_a_running_scheduler_is_joined_by_its_address(
    three_files: SmallDataset, small: Small, inline: PoolFactory
) -> None:
    other = small("other")
    other.write({"a.jsonl": documents(20), "b.jsonl": documents(35, 100), "c.jsonl": documents(8, 200)})
    other.run(inline)
    lines: list[str] = []
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
        with DaskSettings(address=cluster.scheduler_address).pool(lines.append) as pool:
            assert pool.workers == 1
        three_files.run(DaskSettings(address=cluster.scheduler_address).pool)
    assert three_files.manifest() == other.manifest()
    assert any(line.startswith("Dask dashboard: http://") for line in lines)


def test_the_wait_for_a_scheduler_is_a_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MissingInputError) as caught, DaskSettings(address=address, wait_seconds=0.3).pool(quiet):
            pass
    message_of(caught.value, address, "within 0.3 s")


def test_settings_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dask.yaml"
    file.write_text("cluster: slurm\nworkers: 3\noptions: {queue: '${MY_QUEUE:-short}', cores: 1}\n")
    monkeypatch.setenv("OPENLM_DASK", str(file))
    settings = DaskSettings.from_env(workers=None, address=None)
    assert (settings.cluster, settings.workers, settings.options) == ("slurm", 3, {"queue": "short", "cores": 1})
    assert DaskSettings.from_env(workers=5).workers == 5
    file.write_text("clusters: slurm\n")
    with pytest.raises(ConfigError) as caught:
        DaskSettings.from_env()
    message_of(caught.value, str(file), "did you mean 'cluster'?")


def test_an_address_and_a_cluster_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="not both"):
        DaskSettings.from_env(address="tcp://host:8786", cluster="slurm")


def test_a_missing_cluster_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dask_kubernetes.operator", None)
    with pytest.raises(ConfigError) as caught, DaskSettings(cluster="kubernetes").pool(quiet):
        pass
    message_of(caught.value, "pip install dask-kubernetes")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Slurm's two commands that dask-jobqueue calls: a job runs at once on this machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    jobs = folder / "jobs"
    (folder / "sbatch").write_text(
        f'#!/bin/bash\ncp "$1" {folder}/script\nsetsid bash {folder}/script >{folder}/log 2>&1 &\n'
        f'echo $! >>{jobs}\necho "Submitted batch job $!"\n'
    )
    (folder / "scancel").write_text('#!/bin/bash\nkill -- "-$1"\n')
    for name in ("sbatch", "scancel"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder
    for job in jobs.read_text().split() if jobs.exists() else []:
        try:
            os.killpg(int(job), signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_slurm_cluster_is_started_and_stopped(
    three_files: SmallDataset, small: Small, inline: PoolFactory, sbatch: Path
) -> None:
    other = small("other")
    other.write({"a.jsonl": documents(20), "b.jsonl": documents(35, 100), "c.jsonl": documents(8, 200)})
    other.run(inline)
    settings = DaskSettings(
        cluster="slurm",
        workers=1,
        options={
            "queue": "cpu",
            "cores": 1,
            "processes": 1,
            "memory": "2GB",
            "interface": "lo",
            "log_directory": str(sbatch),
        },
    )
    three_files.run(settings.pool)
    assert three_files.manifest() == other.manifest()
    assert "#SBATCH -p cpu" in (sbatch / "script").read_text()


class KillsOneWorker(DaskPool):
    """Kills a busy worker process at the first sign of progress, and remembers its process id."""

    killed: int | None = None

    def run(
        self, calls: dict[str, Any], on_progress: Callable[[str, dict[str, int]], None]
    ) -> Iterator[tuple[str, Any]]:
        pids = self.client.run(os.getpid)
        killers: list[threading.Thread] = []

        def kill() -> None:
            busy = next(address for address, keys in self.client.processing().items() if keys)
            self.killed = pids[busy]
            os.kill(self.killed, signal.SIGKILL)

        def watch(name: str, facts: dict[str, int]) -> None:
            on_progress(name, facts)
            if not killers:  # the client calls this in its event loop, which must continue
                killers.append(threading.Thread(target=kill))
                killers[0].start()

        yield from super().run(calls, watch)
        killers[0].join()


def test_a_worker_killed_in_the_middle_of_a_file_loses_nothing(small: Small, inline: PoolFactory) -> None:
    texts = {f"{n}.jsonl": documents(2500, 5000 * n) for n in range(3)}
    whole, made = small("whole", REFERENCE_ENGINE), small("killed", REFERENCE_ENGINE)
    for dataset in (whole, made):
        dataset.write(texts)
    whole.run(inline)
    made.tokenizer()
    with DaskSettings(workers=2).pool(quiet) as pool:
        killer = KillsOneWorker(pool.client, 2)
        files, _ = made.tokenize(lambda report: contextlib.nullcontext(killer))
        assert killer.killed is not None
        assert killer.killed not in pool.client.run(os.getpid).values()
        made.make_shards(files, lambda report: contextlib.nullcontext(pool))
    assert made.manifest() == whole.manifest()


def die(*, progress: Callable[[dict[str, int]], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_every_worker_is_named() -> None:
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), DaskSettings(workers=2).pool(quiet) as pool:
        with pytest.raises(ClusterError) as caught:
            list(pool.run({"big.jsonl": (die,)}, lambda name, facts: None))
        message_of(caught.value, "1 workers died", "'big.jsonl'", "too little memory")


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.zst"])
def test_one_large_file_keeps_all_workers_busy(
    small: Small, inline: PoolFactory, two_workers: PoolFactory, name: str
) -> None:
    texts = [f"{text} {n * 7919 % 10007:x}" for n, text in enumerate(documents(9000))]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode() + b"{broken\n" + b'{"text": "last"}\n'
    made, whole = (small(folder, {"samples_per_shard": 4096}, files=["raw/big*"]) for folder in ("parts", "whole"))
    for dataset in (made, whole):
        dataset.root.joinpath("raw").mkdir()
        dataset.raw(name).write_bytes(zstandard.compress(data, 1) if name.endswith(".zst") else data)
        dataset.tokenizer()
    lines: list[str] = []

    def tokenize(dataset: SmallDataset, pools: PoolFactory) -> FileTokens:
        raw = data_stages.discover(dataset.dataset, dataset.home)
        folder = dataset.home.tokenizer("small_bpe")
        info = read_tokenizer_info(folder)
        [result], _ = tokenize_files(
            dataset.dataset, raw, info, folder, dataset.tokenized, pools, lines.append, min_part_bytes=1 << 17
        )
        return result

    expected = tokenize(whole, inline)
    assert not any("parts" in line for line in lines)
    result = tokenize(made, two_workers)
    assert result.version == expected.version and result.quarantined == 1
    for kind in ("tokens", "documents", "quarantine.jsonl"):
        one, two = ((d.tokenized / f"{name}.{kind}").read_bytes() for d in (made, whole))
        assert one.replace(bytes(made.root), b"") == two.replace(bytes(whole.root), b"")
    assert not list(made.tokenized.glob("*.part-*"))
    made.make_shards([result], inline), whole.make_shards([expected], inline)
    assert made.manifest() == whole.manifest()
