"""What commands and watchers take on homes of the sizes that are promised, and how it grows: CPU-seconds, peak memory.

    python benchmarks/bounds.py [--cases metrics,checkpoints,...] [--scale 1.0] [--markdown OUT.md]

Each case is a home in a temporary folder: a real small run, made by the commands, whose one growing part is then
multiplied, at a tenth of the size and at the size: 2 GB of metrics.jsonl, 10,000 checkpoints (hard links), 2,000 raw
files, 5,000 scored milestones, two runs of 60 milestones with 60 tasks each. Each command is a process of its own. The
last three are what Dagster does for a run that trains or was trained, and the trainer's copy to a store.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import itertools
import json
import os
import shutil
import sysconfig
import tempfile
import time
import zlib

from benchmarks.measure import Usage, machine, run, show, table

MOST_MIB = 500
BATCH = 1024
CASES = {"metrics": 2 << 30, "checkpoints": 10_000, "raw_files": 2_000, "milestones": 5_000, "tasks": 60}
"""The whole size of each: bytes, or how many."""
COMMANDS = {
    "report": ["report", "bounds"],
    "show": ["show", "bounds"],
    "runs": ["runs"],
    "plan": ["plan", "bounds"],
    "logs": ["logs", "bounds"],
    "fsck --quick": ["fsck", "--quick"],
    "gc": ["gc"],
    "compare": ["compare", "bounds", "twin", "--html", "compare.html"],
}
CHILDREN = ("observe", "sensor", "upload", "upload again")


def recipe(name: str, raw: int, milestones: int, tasks: int) -> dict:
    return {
        "name": name, "seq_len": 32, "milestones": [BATCH * (n + 1) for n in range(milestones)],
        "tokenizer": {"name": "bounds", "train": {"vocab_size": 300}},
        "sources": [{"name": "text", "files": ["raw/text/*.jsonl"]}],
        "model": {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 304},
        "training": {"global_batch": BATCH, "lr": 1e-3, "schedule": "constant"},
        "evaluation": {"suite": "${OPENLM_HOME}/suite.yaml"},
        "execution": {"log_every": 1}, "launcher": {"processes": 1},
    }  # fmt: skip


def openlm(home: Path, *arguments: str) -> Usage:
    """Run a command on a home, its recipes beside it."""
    environment = {"OPENLM_HOME": str(home), "OPENLM_RECIPES": str(home / "recipes"), "OMP_NUM_THREADS": "1"}
    return run([sys.executable, "-m", "openlm_pipeline", *arguments], **environment)


def make_home(home: Path, case: str, size: int) -> None:
    """A home whose runs `bounds` and `twin` have one trained and scored milestone."""
    raw = size if case == "raw_files" else 4
    milestones = {"milestones": size, "tasks": 60}.get(case, 1)
    num_tasks = size if case == "tasks" else 2
    for folder in ("recipes", "raw/text", "raw/tasks"):
        (home / folder).mkdir(parents=True)
    for name in ("bounds", "twin"):
        settings = recipe(name, raw, milestones, num_tasks) | {"seed": 1 + (name == "twin")}
        (home / "recipes" / f"{name}.yaml").write_text(json.dumps(settings))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = itertools.cycle([t for t in (p.read_text(errors="replace")[:2000] for p in sources) if len(t) == 2000])
    for number in range(raw):
        lines = [json.dumps({"text": next(texts)}) for _ in range(max(1, 40 // raw))]
        (home / "raw" / "text" / f"{number:05d}.jsonl").write_text("\n".join(lines) + "\n")
    tasks = []
    for number in range(num_tasks):
        words = [[w[:6] for w in line.split()[:3]] for line in next(texts).splitlines() if len(line.split()) > 3][:20]
        rows = [{"context": " ".join(line[:-1]), "continuation": line[-1]} for line in words]
        file = home / "raw" / "tasks" / f"{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(
            {"label": f"task_{number}", "dataset_uri": f"raw/tasks/{number}.jsonl", "num_fewshot": [0]}
            | {"icl_task_type": "language_modeling"}
        )
    (home / "suite.yaml").write_text(json.dumps({"name": "bounds", "icl_tasks": tasks}))
    openlm(home, "tokenize", "bounds", "--workers", "1")
    for name in ("bounds", "twin"):
        openlm(home, "train", name, "--steps", "1")
        openlm(home, "evaluate", name, "--milestone", "t1024")


def enlarge(home: Path, case: str, size: int) -> None:
    """Child process: multiply the part that the case is about."""
    from openlm_pipeline.runs.folder import RunFolder

    os.fsync = lambda descriptor: None
    for name in ("bounds", "twin"):
        folder = RunFolder(home / "runs" / name / "v1")
        if case == "metrics":
            add_metrics(folder, size)
        elif case in ("checkpoints", "milestones", "tasks"):
            add_checkpoints(folder, 60 if case == "tasks" else size, is_milestone=case != "checkpoints")
        if case in ("milestones", "tasks"):
            add_scores(home, folder, size if case == "milestones" else 60)


def add_metrics(folder, size: int) -> None:
    """Lines as the trainer writes them, of ever new steps, until the file has `size` bytes."""
    seed, record = folder._seed, next(r for r in folder.read_metrics() if "loss" in r)
    with folder.metrics_file.open("ab") as f:
        for step in itertools.count(2):
            at = {"step": step, "tokens": BATCH * step, "time": record["time"] + step}
            made = [record | at | {"loss": 3 + 5 / step}]
            made += [] if step % 100 else [at | {"validation_loss": 3.1 + 5 / step}]
            for line in map(json.dumps, made):
                f.write(f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode(), seed):08x}"}}\n'.encode())
            if f.tell() > size:
                break


def add_checkpoints(folder, count: int, *, is_milestone: bool) -> None:
    """Hard links of the files of the one checkpoint, each folder with a description and a mark of its own."""
    from openlm_pipeline.checkpoints.folders import commit, unfinished
    from openlm_pipeline.units import milestone_label

    (real,), record = folder.saved(), next(r for r in folder.read_metrics() if "loss" in r)
    for step in range(2, count + 1):
        tmp = unfinished(folder.checkpoints, step)
        for name in real.files:
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(real.path / name, tmp / name)
        label = milestone_label(BATCH * step) if is_milestone else None
        what = {"milestone": label, "metrics": real.metrics, "weights_digest": real.weights_digest}
        commit(tmp, real.run_fingerprint, step, BATCH * step, hashed=real.files, **what)
        folder.append_metrics(record | {"step": step, "tokens": BATCH * step})
        folder.append_ledger("saved", step=step, tokens=BATCH * step, stall_seconds=0.1)


def add_scores(home: Path, folder, count: int) -> None:
    """The scores of the first milestone for each of the others, a few answers changed."""
    import numpy as np
    import pyarrow as pa

    from openlm_pipeline.evaluation.items import read_items, with_context, write_items
    from openlm_pipeline.evaluation.scorecard import load_scorecard, save_scorecard

    run, rng = folder.path.parent.name, np.random.default_rng(1)
    saved = folder.saved()
    first = home / "scorecards" / run / "v1" / saved[0].milestone
    items, metadata = read_items(first / "items.parquet")
    card = load_scorecard(first / "scorecard.json")
    for checkpoint in saved[1:count]:
        context = {"milestone": checkpoint.milestone, "step": checkpoint.step, "tokens": checkpoint.tokens}
        made = with_context(
            items,
            {"run": run, "run_version": "v1", "suite": card.suite, "suite_version": card.suite_version, **context},
        )
        right = pa.array(rng.random(items.num_rows) < 0.3)
        for name, values in (("correct", right), ("value", right.cast(pa.float64()))):
            made = made.set_column(made.schema.get_field_index(name), name, values)
        out = home / "scorecards" / run / "v1" / checkpoint.milestone
        write_items(out / "items.parquet", made, metadata)
        save_scorecard(out, card.model_copy(update={**context, "checkpoint_digest": checkpoint.digest}))


def child(what: str, home: Path) -> None:
    """One observation of a run that trains, one look of the sensor at all its checkpoints, or one pass of uploads."""
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.runs.folder import RunFolder

    folder = RunFolder(home / "runs" / "bounds" / "v1")
    if what.startswith("upload"):
        from openlm_pipeline.runs.upload import Uploads

        uploads = Uploads(folder, f"file://{home}/store", keep=2, warn=print)
        uploads.start(folder.saved()[-1].step)
        uploads.finish()
        return
    import dagster as dg

    experiment = load_experiment("bounds")
    if what == "observe":
        from assets import training
        from openlm_pipeline.runs.ledger import History

        class Context:
            log_event = print

        history = History(folder)
        training._observe(Context, experiment, history, 0)
        began = time.process_time()
        history.update()
        training._observe(Context, experiment, history, 0)
        print(f"the next took {time.process_time() - began:.2f} CPU-seconds")
        return
    from orchestration.automation import checkpoint_sensor

    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(instance)
        checkpoint_sensor([experiment])(context)


def measure(home: Path, case: str) -> dict[str, Usage]:
    found = {}
    for name, command in COMMANDS.items():
        if name != "compare" or case in ("metrics", "milestones", "tasks"):
            found[name] = openlm(home, *[str(home / a) if a.endswith(".html") else a for a in command])
            print(f"{case}: {name}: {found[name].cpu_seconds:.1f} s, {found[name].peak_mib:.0f} MiB", flush=True)
    environment = {"OPENLM_HOME": str(home), "OPENLM_RECIPES": str(home / "recipes")}
    for name in CHILDREN:
        command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--home", str(home)]
        found[name] = run(command, **environment)
        print(f"{case}: {name}: {found[name].cpu_seconds:.1f} s, {found[name].peak_mib:.0f} MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes; 0.1 is a quick look")
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    parser.add_argument("--child", choices=("enlarge", *CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="make the homes in this folder and leave them there")
    arguments = parser.parse_args()
    if arguments.child == "enlarge":
        return enlarge(arguments.home, arguments.cases, round(arguments.scale))
    if arguments.child:
        return child(arguments.child, arguments.home)
    rows, load = [], os.getloadavg()[0]
    for case in arguments.cases.split(","):
        found = []
        for tenth in (0.1, 1.0):
            size = max(2, round(CASES[case] * arguments.scale * tenth))
            folder = arguments.keep or Path(tempfile.mkdtemp(prefix="openlm-bounds-"))
            home = folder / f"{case}-{size}"
            try:
                if not home.exists():
                    make_home(home, case, size)
                    what = ["--child", "enlarge", "--home", str(home), "--cases", case, "--scale", str(size)]
                    run([sys.executable, __file__, *what], OPENLM_HOME=str(home))
                began = time.monotonic()
                found.append((size, measure(home, case)))
                print(f"{case} {size}: {time.monotonic() - began:.0f} s", flush=True)
            finally:
                if not arguments.keep:
                    shutil.rmtree(folder)
        (small, less), (large, more) = found
        for name in less:
            cpu, mib = ([f"{u[name].cpu_seconds:.1f}" for u in (less, more)], [u[name].peak_mib for u in (less, more)])
            over = " **over**" if max(mib) > MOST_MIB else ""
            rows.append([f"{case} {small:,} / {large:,}", name, " / ".join(cpu), f"{mib[0]:.0f} / {mib[1]:.0f}{over}"])
    load = f"load {load:.1f} to {os.getloadavg()[0]:.1f}"
    text = f"{machine('dagster', 'pyarrow')}; {load}\n\n" + table(["size", "what", "CPU-seconds", "peak MiB"], rows)
    show(text, arguments.markdown)
    return None


if __name__ == "__main__":
    main()
