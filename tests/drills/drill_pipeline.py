"""A pipeline that leaves time to kill its processes in any phase, what it made, and the programs that run it.

375 steps with a checkpoint every 50, two milestones with eight tasks each, text that the slower engine tokenizes. Given
its seeds, all that it makes is the same to the bit, whatever happened on the way: `results`.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pyarrow.parquet as pq
import requests
from tiny_pipeline import LONG, REPOSITORY, TinyPipeline, environment

from openlm_pipeline.checkpoints.folders import Checkpoint, list_checkpoints, verify
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.files import read_json

FIRST, LAST = "t0008K", "t0024K"
NUM_FILES, NUM_TASKS = 8, 8
POOLS = ("cpu", "training", "evaluation")
WAIT_SECONDS = 1200.0
_RECIPE = """
name: tiny
description: A pipeline that can be killed anywhere.
tokenizer: {{name: tiny_bpe, train: {{vocab_size: {vocab_size}}}}}
seq_len: 32
samples_per_shard: 8192
sources: [{{name: tiny_text, files: ["raw/tiny_text/*.jsonl"]}}]
model: {{hidden_dim: 32, n_layers: 2, n_heads: 2}}
training: {{global_batch: 64, lr: 1.0e-3, schedule: constant}}
milestones: [8K, {last}]
evaluation: {{suite: "${{OPENLM_HOME}}/suite.yaml"}}
execution: {{log_every: 5, checkpoint_every: 3200, tokenizer_engine: huggingface}}
launcher: {{processes: {processes}, max_restarts: {max_restarts}, grace_seconds: 20}}
"""
_SUITE = """
name: tiny
icl_tasks:
  - {label: last_word, dataset_uri: raw/tasks/last_word.jsonl, num_fewshot: [0, 1, 2, 3],
     icl_task_type: language_modeling}
  - {label: choice, dataset_uri: raw/tasks/choice.jsonl, num_fewshot: [0, 1, 2, 3], icl_task_type: multiple_choice}
"""
_PLACE = ("checkpoint_digest", "items_sha256", "seal_sha256")
"""The parts of a scorecard that hash the description of a checkpoint, which holds its path."""


class DrillPipeline(TinyPipeline):
    """A folder with recipes, raw files and all state."""

    name = "tiny"

    @classmethod
    def create(cls, root: Path) -> "DrillPipeline":
        made = cls(TinyPipeline.create(root, LONG).root)
        made.write_recipe()
        (made.home / "suite.yaml").write_text(_SUITE)
        texts = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
        folder = made.home / "raw" / "tiny_text"
        for path in folder.iterdir():
            path.unlink()
        for n in range(NUM_FILES):
            rows = (json.dumps({"text": text}) + "\n" for text in texts[n : 10 * NUM_FILES : NUM_FILES])
            (folder / f"{n}.jsonl").write_text("".join(rows))
        return made

    def write_recipe(self, vocab_size: int = 300, processes: int = 1, max_restarts: int = 0, last: str = "24K") -> None:
        settings = {"vocab_size": vocab_size, "processes": processes, "max_restarts": max_restarts, "last": last}
        (self.root / "recipes" / "tiny.yaml").write_text(_RECIPE.format(**settings))

    def copy(self, to: Path) -> "DrillPipeline":
        return DrillPipeline(super().copy(to).root)

    def change_dagster(self, old: str, new: str) -> None:
        """Change Dagster's settings."""
        file = self.root / "dagster" / "dagster.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    def untrain(self) -> None:
        """As if it had never been trained and scored."""
        self.run_folder.rename(self.root / "old_run")
        shutil.rmtree(self.home / "scorecards", ignore_errors=True)

    def free_slots_at_once(self) -> None:
        """Have the daemon look after dead runs every second: the same work, without the wait."""
        self.change_dagster("free_slots_after_run_end_seconds: 60", "free_slots_after_run_end_seconds: 1")
        self.change_dagster("run_monitoring: {", "run_monitoring: {poll_interval_seconds: 1, ")

    @property
    def run_folder(self) -> Path:
        return self.home / "runs" / self.name / "v1"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.run_folder)

    def last_step(self) -> int:
        return max((record["step"] for record in self.run.new_metrics(0)[0]), default=0)

    def checkpoints(self) -> list[Checkpoint]:
        if not (self.run_folder / "run.json").exists():
            return []
        return list_checkpoints(self.run.checkpoints, self.run.fingerprint, warn=lambda line: None)

    def milestones(self) -> set[str]:
        return {c.milestone for c in self.checkpoints() if c.milestone}

    def tokenized(self) -> set[str]:
        """Raw files that are tokenized, as `dataset/name`."""
        return {f"{p.parts[-3]}/{p.stem}" for p in self.home.glob("tokenized/*/v1/*.jsonl*.json")}

    def scored(self, label: str) -> set[str]:
        """Files of the tasks of a milestone that are scored."""
        return {p.name for p in self.home.glob(f"scorecards/{self.name}/v1/{label}/tasks/*.parquet")}

    def finished_work(self) -> dict[str, tuple[int, int]]:
        """Size and modification time of each file that is done for ever; a later run must leave it as it is."""
        marks = [*self.home.glob("tokenizers/*/tokenizer_info.json"), *self.home.glob("shards/*/v1/manifest.jsonl")]
        folders = [mark.parent for mark in marks] + [c.path for c in self.checkpoints() if c.milestone]
        done = {path for folder in folders for path in folder.rglob("*")}
        for info in self.home.glob("tokenized/*/v1/*.jsonl*.json"):
            done |= {path for path in info.parent.glob(f"{info.stem}.*") if ".part-" not in path.name}
        done |= set(self.home.glob(f"scorecards/{self.name}/v1/*/tasks/*.parquet"))
        names = {str(path.relative_to(self.home)) for path in done if path.suffix not in (".lock", ".tmp")}
        return {name: stamp for name, stamp in self.snapshot().items() if name in names}

    def losses(self) -> dict[int, float]:
        """By step. The first one after a stop is a mean over fewer steps where the stop was between two records."""
        return {r["step"]: r["loss"] for r in self.run.read_metrics() if "loss" in r}

    def results(self) -> dict[str, Any]:
        """All that the pipeline made, less times and paths."""
        states = {}
        for checkpoint in self.checkpoints():
            verify(checkpoint)
            if checkpoint.milestone:
                states[checkpoint.milestone] = {n: f for n, f in checkpoint.files.items() if n.endswith(".distcp")}
        cards = {
            path.parent.name: path.parent for path in self.home.glob(f"scorecards/{self.name}/v1/*/scorecard.json")
        }
        infos = {path.parent.name: read_json(path) for path in self.home.glob("tokenizers/*/tokenizer_info.json")}
        return {
            "tokenizers": {name: info["sha256"] for name, info in infos.items()},
            "shards": {path.parts[-3]: path.read_text() for path in self.home.glob("shards/*/v1/manifest.jsonl")},
            "weights and optimizer": states,
            "items": {label: pq.read_table(folder / "items.parquet").to_pylist() for label, folder in cards.items()},
            "scorecards": {label: _without_place(read_json(path / "scorecard.json")) for label, path in cards.items()},
        }

    def processes(self) -> list[psutil.Process]:
        """All that run with this home, whoever started them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("OPENLM_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def torchruns(self) -> list[psutil.Process]:
        return [p for p in self.processes() if "torch.distributed.run" in _arguments(p) and "setpriv" not in p.name()]

    def ranks(self) -> dict[int, list[psutil.Process]]:
        """Rank -> the trainers that are it: never more than one."""
        found: dict[int, list[psutil.Process]] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "train" in _arguments(process) and "LOCAL_RANK" in process.environ():
                    same = found.setdefault(int(process.environ()["LOCAL_RANK"]), [])
                    if process.ppid() not in [one.pid for one in same]:  # that is about to become another program
                        same.append(process)
        return found


def _without_place(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_place(v) for k, v in tree.items() if k not in _PLACE}
    return [_without_place(v) for v in tree] if isinstance(tree, list) else tree


def _arguments(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def wait_until(
    condition: Callable[[], Any], what: str, process: psutil.Popen | None = None, seconds: float = WAIT_SECONDS
) -> None:
    """Poll until `condition()`; fails when the time is up, or `process` ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        assert process is None or process.poll() is None, f"the program ended before {what}"
        time.sleep(0.02)


def kill(*processes: psutil.Process) -> None:
    """SIGKILL, all of them before any is waited for."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert psutil.wait_procs(processes, timeout=60)[1] == []


class Programs:
    """Programs on one pipeline; what they print goes to files."""

    def __init__(self, pipeline: DrillPipeline, logs: Path) -> None:
        self.pipeline, self._logs = pipeline, logs
        self._started = 0
        self._services: list[psutil.Popen] = []

    def start(self, program: str, *arguments: str, **variables: str) -> psutil.Popen:
        """Start a program of this Python's environment, or `-m module`."""
        python = Path(sys.executable)
        command = [str(python), program, *arguments] if program == "-m" else [str(python.parent / program), *arguments]
        self._started += 1
        self._logs.mkdir(exist_ok=True)
        name = "-".join([program, *arguments]).strip("-").replace("/", "_")[:60]
        with (self._logs / f"{self._started:02d}-{name}.log").open("wb") as log:
            return psutil.Popen(
                command, cwd=REPOSITORY, env=environment(self.pipeline, **variables),
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def printed(self) -> str:
        """The end of what each program printed, for the message of a failure."""
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(self._logs.iterdir()))

    def last_printed(self) -> str:
        return sorted(self._logs.iterdir())[-1].read_text()

    def finish(self, *command: str) -> str:
        """Run a program to its end, which must be well; what it printed."""
        program = self.start(*command)
        printed = sorted(self._logs.iterdir())[-1]
        assert program.wait(timeout=2 * WAIT_SECONDS) == 0, self.printed()
        return printed.read_text()

    def daemon(self) -> psutil.Popen:
        return self.start("dagster-daemon", "run")

    def webserver(self) -> tuple[psutil.Popen, str]:
        """A webserver that answers, and its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = self.start("dagster-webserver", "-h", "127.0.0.1", "-p", str(port))
        address = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                return requests.get(f"{address}/server_info", timeout=30).ok
            return False

        wait_until(answers, "the webserver to answer", server)
        return server, address

    def close(self) -> None:
        """Kill what is left of this pipeline's programs."""
        while left := self.pipeline.processes():
            kill(*left)


_LAUNCH = """
mutation($job: String!) {
  launchRun(executionParams: {runConfigData: {}, selector: {
    repositoryLocationName: "openlm_pipeline", repositoryName: "__repository__", jobName: $job}}) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  }
}"""
_HISTORY = "{ runsOrError { ... on Runs { results { runId status } } } }"


def graphql(address: str, query: str, **variables: Any) -> dict[str, Any]:
    answer = requests.post(f"{address}/graphql", json={"query": query, "variables": variables}, timeout=WAIT_SECONDS)
    assert answer.ok and "errors" not in answer.json(), answer.text
    return answer.json()["data"]


def launch_by_ui(address: str, job: str) -> str:
    """Launch a job as the UI's launchpad does; its run id."""
    launched = graphql(address, _LAUNCH, job=job)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    return launched["run"]["runId"]


def history_by_ui(address: str) -> dict[str, str]:
    """Run id -> status, as the UI's page of runs shows them."""
    return {run["runId"]: run["status"] for run in graphql(address, _HISTORY)["runsOrError"]["results"]}


def newest_run(instance: dg.DagsterInstance) -> str | None:
    runs = instance.get_runs(limit=1)
    return runs[0].run_id if runs else None


def run_process(instance: dg.DagsterInstance, run_id: str) -> psutil.Process | None:
    """The process that executes the steps of a run, once the first one has begun."""
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_START)
    return psutil.Process(events[-1].dagster_event.pid) if events else None


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    return instance.get_run_by_id(run_id).status


def held_slots(instance: dg.DagsterInstance) -> dict[str, set[str]]:
    """Pool -> runs that hold its slot."""
    held = {pool: instance.event_log_storage.get_concurrency_info(pool).active_run_ids for pool in POOLS}
    return {pool: runs for pool, runs in held.items() if runs}


def reason(instance: dg.DagsterInstance, run_id: str) -> str:
    """What the first failed step of a run says to a person."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        failure = entry.dagster_event.step_failure_data
        if failure.user_failure_data:
            return failure.user_failure_data.description
    return ""


def times_scored(instance: dg.DagsterInstance, label: str) -> list[list[str]]:
    """For each time that a scorecard was made, the tasks that were scored for it."""
    made = instance.fetch_materializations(dg.AssetKey(["scorecard", "tiny", label]), limit=100).records
    facts = [record.asset_materialization.metadata for record in made]
    return [found["scored_tasks"].value for found in facts if "scored_tasks" in found]


@contextlib.contextmanager
def one_trainer(pipeline: DrillPipeline) -> Iterator[None]:
    """Fails if there were ever two processes that are the same rank of the run, or two torchruns with ranks."""
    ended, seen = threading.Event(), []

    def watch() -> None:
        while not ended.wait(0.5):  # importing torch alone takes a trainer longer
            seen.append(max((len(same) for same in pipeline.ranks().values()), default=0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert max(seen, default=0) <= 1
