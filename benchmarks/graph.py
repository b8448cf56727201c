"""The graph at size: a dataset of thousands of raw files and many recipes, with the programs that people start.

    python benchmarks/graph.py [--files 3000] [--recipes 20] [--rounds 3] [--screenshots FOLDER] [--markdown OUT.md]

In each round: programs that load the definitions, with the shipped recipes and with the added ones; then, in a new
home, the job of the dataset (all files, nothing to do, one file changed), and the UI on what it left, in a Chromium
where playwright is installed. Texts are slices of the standard library's source.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.measure import ROOT, installed, machine, run, show, spread, table

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from tokenizers import Tokenizer

DATASET = "many_files"
CHARACTERS = 2000
RECIPE = {
    "tokenizer": {"name": "many_bpe", "source": "${OPENLM_HOME}/many_bpe.json"},
    "seq_len": 128,
    "sources": [{"name": DATASET, "files": [f"raw/{DATASET}/*.jsonl"]}],
    "model": {"hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "training": {"global_batch": 1024, "lr": 1e-3, "schedule": "constant"},
    "milestones": ["10K", "20K", "40K", "80K", "160K", "320K"],
    "evaluation": {"suite": "openlm"},
}
Figures = dict[str, list[float]]


class Home:
    """Raw files, recipes and all state of one round."""

    def __init__(self, root: Path, files: int, recipes: int) -> None:
        self.root, self.files = root, files
        self.raw = root / "home" / "raw" / DATASET
        for folder in (root / "recipes", root / "dagster", self.raw):
            folder.mkdir(parents=True)
        shutil.copy(ROOT / ".dagster" / "dagster.yaml", root / "dagster")
        for number in range(recipes):
            name = f"many_{number:02d}"
            (root / "recipes" / f"{name}.yaml").write_text(json.dumps({"name": name, **RECIPE}))
        texts = list(islice(_texts(), files))
        _tokenizer(texts[:30]).save(str(root / "home" / "many_bpe.json"))
        for number, text in enumerate(texts):
            (self.raw / f"{number:05d}.jsonl").write_text(json.dumps({"text": text}) + "\n")

    def variables(self, *, added: bool = True) -> dict[str, str]:
        """The environment of a program that works here, with or without the added recipes."""
        kept = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR") if k in os.environ}
        own = {"OPENLM_HOME": str(self.root / "home"), "DAGSTER_HOME": str(self.root / "dagster")}
        own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **({"OPENLM_RECIPES": str(self.root / "recipes")} if added else {})}


def _texts() -> Iterator[str]:
    """Slices of the standard library's source, over and over."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    whole = [path.read_text(errors="replace") for path in sources]
    return cycle([text[i : i + CHARACTERS] for text in whole for i in range(0, len(text), CHARACTERS)])


def _tokenizer(texts: list[str]) -> "Tokenizer":
    """A small one that no raw file changes, as one that is trained by a recipe would."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    return made


def program(name: str) -> str:
    """A program of this interpreter's environment."""
    return str(Path(sys.executable).parent / name)


def loads(home: Home, seconds: Figures, cpu: Figures, peaks: Figures) -> None:
    """Programs that load the definitions; what they share is `import dagster`."""
    definitions = [sys.executable, "-W", "ignore", "-c", "import orchestration.definitions"]
    commands = [
        ("`import dagster`", [sys.executable, "-c", "import dagster"], True),
        ("`import orchestration.definitions`, shipped recipes", definitions, False),
        ("the same, with the added recipes", definitions, True),
        ("`dagster definitions validate`", [program("dagster"), "definitions", "validate"], True),
        ("`dagster job list`", [program("dagster"), "job", "list"], True),
        ("`dg list defs`", [program("dg"), "list", "defs"], True),
    ]
    for name, command, added in commands:
        if not Path(command[0]).exists():
            continue
        started = time.monotonic()
        usage = run(command, **home.variables(added=added))
        seconds[name].append(time.monotonic() - started)
        cpu[name].append(usage.cpu_seconds)
        peaks[name].append(usage.peak_mib)
        print(f"{name}: {seconds[name][-1]:.1f} s, {usage.cpu_seconds:.1f} CPU-seconds", flush=True)


class Watched:
    """CPU-seconds of a run's process and all below it, and its own largest resident memory, as last seen."""

    def __init__(self, pid: int) -> None:
        self._run = psutil.Process(pid)
        self._cpu: dict[int, float] = {}
        self.peak_mib = 0.0

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def look(self) -> None:
        """Read the numbers; a process that ended keeps its last ones."""
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, IndexError):
            status = Path(f"/proc/{self._run.pid}/status").read_text()
            self.peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
            for process in (self._run, *self._run.children(recursive=True)):
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system


def launch(home: Home, what: str, seconds: Figures, cpu: Figures, peaks: Figures) -> None:
    """`dagster job launch` of the dataset's job, until its run has ended."""
    import dagster as dg

    os.environ["DAGSTER_HOME"] = home.variables()["DAGSTER_HOME"]
    run_id = str(uuid.uuid4())
    command = [program("dagster"), "job", "launch", "-j", f"tokenize_{DATASET}", "--run-id", run_id]
    command += ["--tags", json.dumps({"openlm/allow": "supersede"})]  # a changed file makes other shards
    started, clock = time.monotonic(), time.time()
    with (home.root / "launch.log").open("ab") as log:
        subprocess.run(command, cwd=ROOT, env=home.variables(), stdout=log, stderr=subprocess.STDOUT, check=True)
    seconds[f"{what}: `dagster job launch` returns"].append(time.monotonic() - started)
    watched = None
    with dg.DagsterInstance.get() as instance:
        while not (run := instance.get_run_record_by_id(run_id)) or not run.dagster_run.is_finished:
            if watched is None and (begun := instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_START)):
                watched = Watched(begun[0].dagster_event.pid)
            if watched:
                watched.look()
            time.sleep(0.25)
        if run.dagster_run.status != dg.DagsterRunStatus.SUCCESS:
            raise SystemExit(f"{what}: the run ended as {run.dagster_run.status.value}")
        kinds = (dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.ASSET_MATERIALIZATION)
        events = len(instance.all_logs(run_id, of_type=set(kinds)))
    seconds[f"{what}: to the run's start"].append(run.start_time - clock)
    seconds[f"{what}: to its end"].append(run.end_time - clock)
    cpu[f"{what}: the run's process"].append(watched.cpu_seconds)
    peaks[f"{what}: the run's process"].append(watched.peak_mib)
    print(
        f"{what}: {run.end_time - clock:.1f} s, {watched.cpu_seconds:.1f} CPU-seconds, {events} asset events, "
        f"{watched.peak_mib:.0f} MiB",
        flush=True,
    )


class Requests:
    """GraphQL operations that the UI made: seconds and bytes of each, by the place that was open."""

    def __init__(self, page: "Page") -> None:
        self.place, self.seconds, self.bytes = "", defaultdict(list), {}
        page.on("requestfinished", self._finished)

    def _finished(self, request: Any) -> None:
        if "/graphql" in request.url and request.post_data:
            name = f"{self.place}: {json.loads(request.post_data).get('operationName')}"
            self.seconds[name].append(request.timing["responseEnd"] / 1000)
            self.bytes[name] = request.sizes()["responseBodySize"]


def ui(home: Home, seconds: Figures, queries: Figures, screenshots: Path | None) -> None:
    """The webserver's start and the pages that people look at, each until it shows what it is for."""
    sys.path.insert(1, str(ROOT / "tests" / "browser"))
    from dagster_ui import browser_page, open_graph, webserver

    def timed(name: str, act: Callable[[], None]) -> None:
        requests.place = name
        started = time.monotonic()
        act()
        seconds[f"UI: {name}"].append(time.monotonic() - started)
        if screenshots:
            page.screenshot(path=screenshots / f"{name.replace(' ', '_')}.png")
        page.wait_for_load_state("networkidle")

    started = time.monotonic()
    source = ["-m", "orchestration.definitions"]
    with webserver(source, ROOT, home.variables(), home.root / "webserver.log") as address:
        seconds["UI: webserver answers"].append(time.monotonic() - started)
        with browser_page() as page:
            requests = Requests(page)

            def partitions() -> None:
                page.goto(f"{address}/assets/tokenized/{DATASET}?view=partitions")
                page.get_by_text(re.compile(f"^Materialized .{home.files:,}|^Materialized .{home.files}")).wait_for()

            def runs() -> None:
                page.goto(f"{address}/runs")
                page.get_by_text(f"tokenize_{DATASET}").first.wait_for()

            timed("asset graph", lambda: open_graph(page, address))
            timed("partitions of tokenized", partitions)
            timed("runs", runs)
    for name, series in requests.seconds.items():
        queries[f"{name}, {requests.bytes[name] / 1024:.0f} KiB"].append(max(series))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--recipes", type=int, default=20, help="added to the shipped ones; all share one dataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of the UI")
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    with_ui = installed("playwright")
    seconds, cpu, peaks, queries = (defaultdict(list) for _ in range(4))
    for number in range(arguments.rounds):
        print(f"round {number + 1}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            home = Home(Path(folder), arguments.files, arguments.recipes)
            loads(home, seconds, cpu, peaks)
            launch(home, "all files", seconds, cpu, peaks)
            launch(home, "nothing to do", seconds, cpu, peaks)
            changed = home.raw / "00000.jsonl"
            changed.write_text(changed.read_text() + json.dumps({"text": "One more document."}) + "\n")
            launch(home, "one file changed", seconds, cpu, peaks)
            if with_ui:
                ui(home, seconds, queries, arguments.screenshots)
    slowest = sorted(queries, key=lambda name: -statistics.median(queries[name]))[:8]
    columns = ((seconds, 1), (cpu, 1), (peaks, 0))
    text = "\n\n".join(
        [
            f"{machine('dagster', 'dask')}; {arguments.files} files, {arguments.recipes} added recipes, "
            f"n = {arguments.rounds}",
            table(
                ["what", "seconds, median (range)", "CPU-seconds", "peak MiB"],
                [
                    [n, *(spread(f[n], d) if n in f else "" for f, d in columns)]
                    for n in dict.fromkeys([*seconds, *cpu])
                ],
            ),
            table(["slowest GraphQL query", "seconds, median (range)"], [[n, spread(queries[n])] for n in slowest]),
        ]
    )
    show(text, arguments.markdown)


if __name__ == "__main__":
    main()
