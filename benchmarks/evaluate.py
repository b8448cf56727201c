"""Scoring of four tasks against LLM Foundry's own evaluation: CPU-seconds, paired and interleaved, and equal answers.

    python benchmarks/evaluate.py --model FOLDER --data FOLDER [--foundry-python PYTHON] [--runs 1] [--markdown OUT.md]

copa, winograd and the first rows of lambada_openai and arc_easy are scored with a Hugging Face folder such as that of
SmolLM2-135M (`python tests/pretrained.py FOLDER`), by one process with one thread, in fp32. LLM Foundry pads every row
to `max_seq_len`. It gets the shortest that fits each task, which its users seldom set, at two batch sizes; and 2048, as
in OpenLM's YAML, on a few rows of each task, since the time of a padded row does not depend on the row.
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
import tempfile
import time
from typing import Any

from benchmarks.measure import ROOT, installed, machine, ratios, run, show, spread, table

TASKS = {
    "copa": ("copa.jsonl", "multiple_choice", " "),
    "winograd": ("winograd_wsc.jsonl", "schema", " "),
    "lambada_openai": ("lambada_openai.jsonl", "language_modeling", " "),
    "arc_easy": ("arc_easy.jsonl", "multiple_choice", "\nAnswer: "),
}
CUT = ("lambada_openai", "arc_easy")
LONG = 2048
OURS, THEIRS = "openlm", "LLM Foundry"
SETTINGS = {"tuned, batch 8": 8, "tuned, batch 16": 16, f"{LONG}, batch 8": 8}


def write_tasks(data: Path, out: Path, num_rows: dict[str, int | None]) -> Path:
    """Slices of the task files and a suite of them."""
    out.mkdir()
    tasks = []
    for label, (name, kind, delimiter) in TASKS.items():
        with (data / name).open() as f:
            (out / name).write_text("".join(itertools.islice(f, num_rows[label])))
        tasks.append(
            {
                "label": label,
                "dataset_uri": str(out / name),
                "num_fewshot": [0],
                "icl_task_type": kind,
                "continuation_delimiter": delimiter,
            }
        )
    (out / "suite.yaml").write_text(json.dumps({"name": "benchmark", "version": "1", "icl_tasks": tasks}))
    return out / "suite.yaml"


def fitting_lengths(suite: Path, model: Path) -> dict[str, int]:
    """The longest context with its continuation of each task, in tokens."""
    from openlm_pipeline.evaluation.prepare import prepare_suite
    from openlm_pipeline.evaluation.subject import open_subject
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.storage.home import Home

    tokenizer = open_subject(str(model)).tokenizer
    prepared = prepare_suite(load_suite(suite), Home(suite.parent), tokenizer, LONG, False, print)
    return {
        t.task.label: max(len(r.context_ids) + len(r.continuation_ids) for i in t.items for r in i.requests)
        for t in prepared.tasks
    }


def score_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Score as `openlm evaluate` does. Prompts and files count as scoring; loading the weights does not."""
    from openlm_pipeline.evaluation.scorer import score_suite
    from openlm_pipeline.evaluation.subject import open_subject
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.storage.home import Home

    suite = load_suite(job["suite"])
    subject = open_subject(job["model"])
    assert subject.model.end_ids is not None  # loads it
    context = {"run": "r", "run_version": "v", "milestone": "m", "step": 0, "tokens": 0}
    with tempfile.TemporaryDirectory() as out:
        began, began_wall = time.process_time(), time.monotonic()
        result = score_suite(
            subject.model, subject.tokenizer, suite, Home(Path(out)), Path(out), context,
            checkpoint_digest=subject.digest, max_seq_len=LONG,
        )  # fmt: skip
        took, wall = time.process_time() - began, time.monotonic() - began_wall
    answers: dict[str, list[int]] = {}
    for row in result.items.to_pylist():
        chosen = int(row["correct"]) if row["choice_mean"] is None else row["choice_mean"]
        answers.setdefault(row["task"], []).append(chosen)
    return {"scoring": took, "wall": wall, "answers": answers}


def score_theirs(job: dict[str, Any]) -> dict[str, Any]:
    """Score by LLM Foundry. Only Composer's evaluation loop counts as scoring; its datasets are made before."""
    sys.path.insert(0, str(ROOT / "openlm_pipeline" / "evaluation" / "foundry"))
    import cpu_torchvision  # noqa: F401  isort: skip

    from composer.trainer import Trainer
    from llmfoundry.models.hf import ComposerHFCausalLM
    from llmfoundry.utils.builders import build_icl_evaluators
    from transformers import AutoTokenizer

    answers: list[int] = []

    class Model(ComposerHFCausalLM):
        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> dict:
            found = super().update_metric(batch, outputs, metric)
            answers.extend(map(int, found.get("selected_choice_idx") or found["result"]))
            return found

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = Model(
        tokenizer=tokenizer,
        pretrained_model_name_or_path=job["model"],
        use_train_metrics=False,
        trust_remote_code=False,
    )
    trainer = Trainer(model=model, precision="fp32", progress_bar=False)
    os.chdir(tempfile.mkdtemp(dir=job["work"]))  # where it puts copies of the task files
    all_answers, scoring, wall = {}, 0.0, 0.0
    for task in json.loads(Path(job["suite"]).read_text())["icl_tasks"]:
        length = job["lengths"][task["label"]]
        evaluators, _ = build_icl_evaluators([task | {"max_seq_len": length}], tokenizer, length, job["batch"])
        began, began_wall = time.process_time(), time.monotonic()
        trainer.eval(eval_dataloader=evaluators)
        scoring += time.process_time() - began
        wall += time.monotonic() - began_wall
        all_answers[task["label"]], answers[:] = list(answers), []
    return {"scoring": scoring, "wall": wall, "answers": all_answers}


def measure(python: str, who: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One process of one of the two."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job | {"work": str(work)}))
    out = folder / "out.json"
    command = [python, str(Path(__file__).resolve()), "--child", who, "--job", str(folder / "job.json")]
    usage = run(
        [*command, "--out", str(out)], OMP_NUM_THREADS="1", HF_HOME=str(work), HF_HUB_OFFLINE="1", TQDM_DISABLE="1"
    )
    return {**json.loads(out.read_text()), "process": usage.cpu_seconds, "peak_mib": usage.peak_mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, help="folder with the task files of OpenLM")
    parser.add_argument("--foundry-python", default=os.environ.get("OPENLM_FOUNDRY_PYTHON", ".foundry/bin/python"))
    parser.add_argument("--rows", type=int, default=200, help=f"of {' and '.join(CUT)}")
    parser.add_argument("--most-rows", type=int, help="of each of the others; by default all")
    parser.add_argument("--long-rows", type=int, default=2, help=f"of each task at {LONG} tokens; 0 leaves it out")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    parser.add_argument("--child", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        score = score_ours if arguments.child == OURS else score_theirs
        arguments.out.write_text(json.dumps(score(json.loads(arguments.job.read_text()))))
        return
    if not arguments.model or not arguments.data:
        parser.error("--model and --data are needed")
    if not installed("sys", arguments.foundry_python):
        parser.error(f"there is no interpreter {arguments.foundry_python}; `make foundry` makes it")
    rows = []
    equal, num_items = True, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        full = {label: arguments.rows if label in CUT else arguments.most_rows for label in TASKS}
        few = dict.fromkeys(TASKS, arguments.long_rows)
        suites = {False: write_tasks(arguments.data, folder / "full", full)}
        if arguments.long_rows:
            suites[True] = write_tasks(arguments.data, folder / "few", few)
        lengths = fitting_lengths(suites[False], arguments.model)
        model = str(arguments.model.resolve())
        for setting in arguments.settings:
            is_long = setting.startswith(str(LONG))
            if is_long and not arguments.long_rows:
                continue
            job = {
                "model": model,
                "suite": str(suites[is_long]),
                "lengths": dict.fromkeys(TASKS, LONG) if is_long else lengths,
                "batch": SETTINGS[setting],
            }
            seen: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
            for n in range(arguments.runs):
                for who, python in ((OURS, sys.executable), (THEIRS, arguments.foundry_python)):
                    found = measure(python, who, job, folder)
                    seen[who].append(found)
                    numbers = ", ".join(f"{k} {found[k]:.1f} s" for k in ("scoring", "wall", "process"))
                    print(f"{setting}, round {n + 1}, {who}: {numbers}", flush=True)
                for label in TASKS:
                    ours, theirs = (seen[who][-1]["answers"][label] for who in (OURS, THEIRS))
                    num_items += len(ours)
                    if differ := [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]:
                        equal = False
                        print(f"{setting}, {label}: answers differ at rows {differ}")
            for part in ("scoring", "process"):
                taken = {who: [found[part] for found in seen[who]] for who in seen}
                slower = ratios(taken, OURS)[THEIRS]
                name = "scoring alone" if part == "scoring" else "whole process"
                rows.append([setting, name, *(spread(taken[who], 1) for who in (OURS, THEIRS)), spread(slower, 1)])
    text = "\n\n".join(
        [
            f"{machine('torch', 'transformers')}; one thread, fp32; {arguments.model.name}, n = {arguments.runs}",
            f"Shortest lengths that fit: {', '.join(f'{k} {v}' for k, v in lengths.items())}. "
            f"All {num_items} answers are {'equal' if equal else 'NOT EQUAL'}.",
            table(
                ["LLM Foundry's padding", "what", f"{OURS}, CPU-s", f"{THEIRS}, CPU-s", "openlm is faster by, paired"],
                rows,
            ),
        ]
    )
    show(text, arguments.markdown)
    if not equal:
        raise SystemExit("the answers are not equal")


if __name__ == "__main__":
    main()
