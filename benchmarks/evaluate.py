"""Scoring beside LLM Foundry's own evaluation and lm-evaluation-harness: CPU-seconds, paired, and equal answers.

    python benchmarks/evaluate.py --model FOLDER --data FOLDER [--foundry-python PYTHON] [--lm-eval-python PYTHON]
        [--runs 1] [--markdown OUT.md]

Both score a Hugging Face folder such as that of SmolLM2-135M (`python tests/pretrained.py FOLDER`) in turn with OpenLM,
each by one process with one thread, in fp32.

LLM Foundry gets copa, winograd and the first rows of lambada_openai and arc_easy. It pads every row to `max_seq_len`:
the shortest that fits each task, which its users seldom set, at two batch sizes; and 2048, as in OpenLM's YAML, on a
few rows of each task, since the time of a padded row does not depend on the row.

lm-evaluation-harness gets our prompts as tasks of local files, through `simple_evaluate`, at the batch size that is
fastest on the first rows. Of its time only `loglikelihood` counts.
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
PIQA = ("piqa.jsonl", "multiple_choice", "\nAnswer: ")
SETS = {
    "zero-shot": (0, {k: v for k, v in TASKS.items() if k != "winograd"} | {"piqa": PIQA}),
    "5-shot": (5, {"arc_easy": TASKS["arc_easy"], "piqa": PIQA}),
}
"""What lm-evaluation-harness gets."""
BATCHES = (1, 8, 16, 32)
TOLERANCE = 1e-4
"""Nats a token."""
LONG = 2048
OURS, THEIRS, HARNESS = "openlm", "LLM Foundry", "lm-evaluation-harness"
SETTINGS = {"tuned, batch 8": 8, "tuned, batch 16": 16, f"{LONG}, batch 8": 8}


def write_tasks(
    data: Path, out: Path, num_rows: dict[str, int | None], which: dict[str, tuple] = TASKS, num_fewshot: int = 0
) -> Path:
    """Slices of the task files and a suite of them."""
    out.mkdir()
    tasks = []
    for label, (name, kind, delimiter) in which.items():
        with (data / name).open() as f:
            (out / name).write_text("".join(itertools.islice(f, num_rows[label])))
        tasks.append(
            {
                "label": label,
                "dataset_uri": str(out / name),
                "num_fewshot": [num_fewshot],
                "icl_task_type": kind,
                "continuation_delimiter": delimiter,
            }
        )
    (out / "suite.yaml").write_text(json.dumps({"name": "benchmark", "version": "1", "icl_tasks": tasks}))
    return out / "suite.yaml"


def prepared(suite: Path, model: Path) -> tuple[Any, Any]:
    """The tasks of a suite with their prompts, and the tokenizer."""
    from openlm_pipeline.evaluation.prepare import prepare_suite
    from openlm_pipeline.evaluation.subject import open_subject
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.storage.home import Home

    tokenizer = open_subject(str(model)).tokenizer
    return prepare_suite(load_suite(suite), Home(suite.parent), tokenizer, LONG, print), tokenizer


def fitting_lengths(suite: Path, model: Path) -> dict[str, int]:
    """The longest context with its continuation of each task, in tokens."""
    return {
        t.task.label: max(len(r.context_ids) + len(r.continuation_ids) for i in t.items for r in i.requests)
        for t in prepared(suite, model)[0]
    }


def write_prompts(suite: Path, model: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Our prompts as tasks of lm-evaluation-harness.

    Raises:
        SystemExit: read as one text, a prompt and its continuation would have other tokens.
    """
    tasks, tokenizer = prepared(suite, model)
    configs = []
    for t in tasks:
        rows = []
        for item in t.items[:limit]:
            context, *others = {tokenizer.decode(r.context_ids, skip_special_tokens=False) for r in item.requests}
            texts = [tokenizer.decode(r.continuation_ids, skip_special_tokens=False) for r in item.requests]
            for r, text in zip(item.requests, texts, strict=True):
                if others or tuple(tokenizer.encode(context + text).ids) != r.context_ids + r.continuation_ids:
                    raise SystemExit(f"{t.name}, row {item.index}: the two would score other tokens")
            choices = [text.removeprefix(" ") for text in texts]
            rows.append({"context": context, "choices": choices, "gold": item.gold, "continuation": choices[item.gold]})
        path = suite.parent / f"{t.task.label}-{limit}-prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        choosing = len(rows[0]["choices"]) > 1
        configs.append(
            {
                "task": t.task.label,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(path)}},
                "test_split": "test",
                "output_type": "multiple_choice" if choosing else "loglikelihood",
                "doc_to_text": "context",
                "target_delimiter": " ",
                "doc_to_target": "gold" if choosing else "{{' ' + continuation}}",
                **({"doc_to_choice": "choices"} if choosing else {}),
                "metric_list": [{"metric": metric} for metric in (["acc", "acc_norm"] if choosing else ["acc"])],
            }
        )
    return configs


def share_of_peak(model: Any, tasks: Any, seconds: float) -> tuple[float, float]:
    """GFLOP/s of the products that the rows' own tokens need, and their share of what those products reach alone.

    Each is timed with 512 tokens, the output's with 128 positions.
    """
    import torch

    from openlm_pipeline.evaluation.batches import question_rows
    from openlm_pipeline.evaluation.model import computing

    rows = [r for t in tasks for i in t.items for r in question_rows(list(enumerate(i.requests)), LONG)]
    num_tokens, num_scored = sum(len(row.ids) for row in rows), sum(row.num_scored for row in rows)
    flops = needed = 0.0
    with torch.no_grad(), computing(torch.device("cpu"), "fp32"):
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                is_output = module is model.model.output
                size, count = (128, num_scored) if is_output else (512, num_tokens)
                x = torch.randn(size, module.in_features)
                times = []
                for _ in range(4):
                    began = time.process_time()
                    module(x)
                    times.append(time.process_time() - began)
                needed += min(times) / size * count
                flops += 2 * module.weight.numel() * count
    return flops / seconds / 1e9, needed / seconds


def score_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Score as `openlm evaluate` does. Prompts and files count as scoring; loading the weights does not."""
    from openlm_pipeline.evaluation.scorer import score_suite
    from openlm_pipeline.evaluation.subject import open_subject
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.storage.home import Home

    suite_path = Path(job["suite"])
    suite = load_suite(suite_path)
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
    found = {"scoring": took, "wall": wall, "answers": answers, "rows": result.items.to_pylist()}
    if job.get("peak"):
        found["gflops"], found["peak"] = share_of_peak(subject.model, prepared(suite_path, job["model"])[0], took)
    return found


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


def score_harness(job: dict[str, Any]) -> dict[str, Any]:
    """Score by lm-evaluation-harness. Prompts are tokenized in what counts as scoring; its datasets are made before."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=job["model"], device="cpu", dtype="float32", batch_size=job["batch"])
    inner, took = lm.loglikelihood, []

    def loglikelihood(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        answers = inner(*arguments, **named)
        took.append(time.process_time() - began)
        return answers

    lm.loglikelihood = loglikelihood
    found = lm_eval.simple_evaluate(lm, tasks=job["tasks"], bootstrap_iters=0)
    rows = {
        task: [
            {
                "logprobs": [float(r[0][0]) for r in sample["resps"]],
                "acc": bool(sample["acc"]),
                "acc_norm": sample.get("acc_norm"),
            }
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        for task, samples in found["samples"].items()
    }
    return {"scoring": sum(took), "rows": rows}


def differences(ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> tuple[list[str], float]:
    """Where picks or verdicts differ, and the largest gap in nats a token."""
    found, largest, seen = [], 0.0, dict.fromkeys(theirs, 0)
    for row in ours:
        other = theirs[row["task"]][seen[row["task"]]]
        seen[row["task"]] += 1
        mine = row["choice_logprobs"] or [-row["nll"]]
        counts = row["choice_tokens"] or [row["num_tokens"]]
        gaps = [abs(a - b) / n for a, b, n in zip(mine, other["logprobs"], counts, strict=True)]
        largest = max(largest, *gaps)
        where = f"{row['task']}, row {row['item']}"
        if len(mine) == 1:
            verdicts = {"acc": (row["correct"], other["acc"])}
        else:
            verdicts = {
                "choice by sum": (row["choice_sum"], other["logprobs"].index(max(other["logprobs"]))),
                "acc": (row["correct_sum"], other["acc"]),
                "acc_norm": (row["correct_norm"], bool(other["acc_norm"])),
            }
        found += [f"{where}: {name} {a}, theirs {b}" for name, (a, b) in verdicts.items() if a != b]
    assert seen == {task: len(rows) for task, rows in theirs.items()}
    return found, largest


def beside_harness(arguments: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """Tables of all sets, and whether all answers are equal."""
    rows, notes, equal = [], [], True
    for name, (num_fewshot, which) in SETS.items():
        num_rows = arguments.harness_rows // (2 if num_fewshot else 1)
        suite = write_tasks(arguments.data, folder / name, dict.fromkeys(which, num_rows), which, num_fewshot)
        job = {"model": str(arguments.model.resolve()), "suite": str(suite), "peak": True}
        trial = job | {"tasks": write_prompts(suite, arguments.model, max(4, num_rows // 16))}
        tried = {
            batch: measure(arguments.lm_eval_python, HARNESS, trial | {"batch": batch}, folder)["scoring"]
            for batch in BATCHES
        }
        best = min(tried, key=tried.__getitem__)
        print(f"{name}, batch sizes: {', '.join(f'{k} {v:.1f} s' for k, v in tried.items())}", flush=True)
        job |= {"tasks": write_prompts(suite, arguments.model), "batch": best}
        taken: dict[str, list[float]] = {OURS: [], HARNESS: []}
        for n in range(arguments.runs):
            ours = measure(sys.executable, OURS, job, folder)
            theirs = measure(arguments.lm_eval_python, HARNESS, job, folder)
            for who, found in ((OURS, ours), (HARNESS, theirs)):
                taken[who].append(found["scoring"])
                print(
                    f"{name}, round {n + 1}, {who}: {found['scoring']:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True
                )
        found, gap = differences(ours["rows"], theirs["rows"])
        equal = equal and not found and gap <= TOLERANCE
        print("\n".join(found))
        verdict = "NOT EQUAL" if found else "equal"
        notes.append(
            f"{name}: {len(ours['rows'])} rows, answers {verdict}, largest gap {gap:.1e} nats a token; "
            f"the rows' own products at {ours['gflops']:.0f} GFLOP/s, {ours['peak']:.0%} of what they reach alone"
        )
        slower = ratios(taken, OURS)[HARNESS]
        rows.append([name, str(best), *(spread(taken[who], 1) for who in (OURS, HARNESS)), spread(slower)])
    head = ["rows", "its batch size", f"{OURS}, CPU-s", f"{HARNESS}, CPU-s", "openlm is faster by, paired"]
    return "\n\n".join([*notes, table(head, rows)]), equal


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


def beside_foundry(arguments: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """Table of all settings, and whether all answers are equal."""
    rows = []
    equal, num_items = True, 0
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
    notes = (
        f"Shortest lengths that fit: {', '.join(f'{k} {v}' for k, v in lengths.items())}. "
        f"All {num_items} answers are {'equal' if equal else 'NOT EQUAL'}."
    )
    head = ["LLM Foundry's padding", "what", f"{OURS}, CPU-s", f"{THEIRS}, CPU-s", "openlm is faster by, paired"]
    return f"{notes}\n\n{table(head, rows)}", equal


SCORERS = {OURS: score_ours, THEIRS: score_theirs, HARNESS: score_harness}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, help="folder with the task files of OpenLM")
    parser.add_argument("--foundry-python", help="of an environment such as `make foundry` makes")
    parser.add_argument("--lm-eval-python", help="of an environment with lm_eval[hf]")
    parser.add_argument("--rows", type=int, default=200, help=f"of {' and '.join(CUT)}, for LLM Foundry")
    parser.add_argument("--most-rows", type=int, help="of each of the others; by default all")
    parser.add_argument("--long-rows", type=int, default=2, help=f"of each task at {LONG} tokens; 0 leaves it out")
    parser.add_argument("--harness-rows", type=int, default=100, help="of each task for lm-evaluation-harness")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    parser.add_argument("--child", choices=SCORERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = SCORERS[arguments.child](json.loads(arguments.job.read_text()))
        arguments.out.write_text(json.dumps(found))
        return
    others = {"foundry": arguments.foundry_python, "lm_eval": arguments.lm_eval_python}
    if not arguments.model or not arguments.data or not any(others.values()):
        parser.error("--model and --data are needed, and --foundry-python or --lm-eval-python")
    for python in filter(None, others.values()):
        if not installed("sys", python):
            parser.error(f"there is no interpreter {python}")
    parts = []
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.lm_eval_python:
            parts.append(beside_harness(arguments, Path(temporary)))
        if arguments.foundry_python:
            parts.append(beside_foundry(arguments, Path(temporary)))
    head = f"{machine('torch', 'transformers')}; one thread, fp32; {arguments.model.name}, n = {arguments.runs}"
    show("\n\n".join([head, *(text for text, _ in parts)]), arguments.markdown)
    if not all(equal for _, equal in parts):
        raise SystemExit("the answers are not equal")


if __name__ == "__main__":
    main()
