"""The stages of evaluation as plain functions: score a milestone, a baseline or any model.

Like those of `stages`, they do only what is missing and say whether they reused what was there. Under torchrun every
process calls the same function; the first one writes and reports.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, OpenLMError
from openlm_pipeline.experiments import Baseline, Evaluation, Experiment
from openlm_pipeline.fingerprint import fingerprint, settings_tree
from openlm_pipeline.pipeline.training import open_run
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.runs.launch import milestone_checkpoints, passed_over
from openlm_pipeline.runs.launchers.job import signal_in
from openlm_pipeline.runs.programs import dying_with_us
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.files import folder_lock, set_aside, write_json
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenizers.engine import load_reference
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info, tokenizer_file
from openlm_pipeline.units import milestone_label

if TYPE_CHECKING:
    import pyarrow as pa

    from openlm_pipeline.evaluation.results import SuiteResult
    from openlm_pipeline.evaluation.scorecard import Provenance, Scorecard
    from openlm_pipeline.evaluation.subject import Subject
    from openlm_pipeline.evaluation.suite import Part, Suite

_ITEMS, CARD = "items.parquet", "scorecard.json"
_LINES_KEPT = 200
"""Of what scorers print, which is where their error stands."""


def is_first_process() -> bool:
    """Whether this is the one process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def on_first_process(report: Say) -> Say:
    """`report` on the first process; elsewhere a report that nobody reads."""
    return report if is_first_process() else lambda line: None


def _writing(out: Path) -> AbstractContextManager[None]:
    """The lock of a folder that scores are written to, held by the first process."""
    return folder_lock(out, "scoring") if is_first_process() else nullcontext()


def _run_suite(
    subject: "Subject", suite: "Suite", home: Home, out: Path, context: Mapping[str, Any], report: Say, **how: Any
) -> "SuiteResult":
    """Score by the backend that is asked for; `how` has `backend`, `max_seq_len`, `batch_tokens` and `part`."""
    options = {"checkpoint_digest": subject.digest, "max_seq_len": how["max_seq_len"] or subject.max_seq_len}
    if how["backend"] == "foundry":
        if how["part"].limit is not None:
            raise ConfigError("LLM Foundry as a backend scores all rows; leave --limit out")
        from openlm_pipeline.evaluation.foundry.backend import score_suite_with_foundry

        with tempfile.TemporaryDirectory(prefix="openlm-foundry-") as folder:
            model = subject.huggingface_folder(Path(folder))
            return score_suite_with_foundry(
                model, suite, home, out, context, tokenizer=subject.tokenizer, python=None, report=report, **options
            )
    from openlm_pipeline.evaluation.scorer import score_suite

    return score_suite(
        subject.model,
        subject.tokenizer,
        suite,
        home,
        out,
        context,
        batch_tokens=how["batch_tokens"],
        part=how["part"],
        report=report,
        **options,
    )


def items_of(folder: Path | None) -> "pa.Table | None":
    """The items of a folder of scores; None where there are none.

    Raises:
        OpenLMError: they are damaged, or not those of the scorecard beside them.
    """
    from openlm_pipeline.evaluation.items import read_items
    from openlm_pipeline.evaluation.scorecard import check_items

    if folder and (folder / CARD).exists():
        check_items(folder / CARD)
    return read_items(folder / _ITEMS)[0] if folder and (folder / _ITEMS).exists() else None


def _summed_up(
    result: "SuiteResult",
    suite: "Suite",
    provenance: "Provenance",
    out: Path,
    before: "pa.Table | None" = None,
    against: "Iterable[tuple[str, pa.Table]]" = (),
) -> "tuple[Scorecard, bool]":
    """The scorecard of scored items, written where it is new; and whether it was there already."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard, make_scorecard, save_scorecard

    card = make_scorecard(
        result.items,
        before,
        suite=suite,
        provenance=provenance,
        task_files=result.task_files,
        against=against,
        warnings=result.warnings,
        num_rows=result.num_rows,
    )
    there = None
    if not result.scored and (out / CARD).exists():
        with suppress(DataError):  # it is written again
            there = load_scorecard(out / CARD)
    if there != card and is_first_process():  # of the same items another release may say more
        save_scorecard(out, card)
    return card, there is not None and there.checkpoint_digest == card.checkpoint_digest


def _facts(card: "Scorecard", result: "SuiteResult") -> dict[str, Any]:
    accuracies = {f"accuracy_{t.name}": t.accuracy for t in card.tasks if t.accuracy is not None}
    bits = {f"bits_per_byte_{t.name}": t.bits_per_byte for t in card.tasks if t.bits_per_byte is not None}
    head = card.headline
    score = f"{head.name} {head.value:.3f}" if head.value is not None else None
    if score and head.ci_low is not None:
        score += f" ± {(head.ci_high - head.ci_low) / 2:.3f} (95%)"
    since = next(
        (d for d in card.changes if (d.measure, d.kind) == (head.name, "accuracy") and d.delta is not None), None
    )
    if since:
        verdict = "more than noise" if since.significant else "within noise"
        change = f"{since.delta:+.3f} since {since.against}, 95% {since.ci_low:+.3f} to {since.ci_high:+.3f}: {verdict}"
    facts = {"score": score, "change": change if since else None, "average": card.average}
    facts |= {"validation_loss": card.validation_loss, "tokens": card.tokens, **accuracies, **bits}
    names = {"accuracy": "{}", "bits_per_byte": "{} bits per byte"}
    fell = {names[d.kind].format(d.measure): d.delta for d in card.changes if d.better is False}
    return facts | {
        "significant_regressions": fell,
        "scored_tasks": list(result.scored),
        "reused_tasks": list(result.reused),
    }


def score(
    experiment: Experiment,
    home: Home,
    label: str,
    report: Say,
    *,
    part: "Part | None" = None,
    device: str | None = None,
) -> StageResult:
    """Score one milestone with the experiment's suite; tasks that are scored already are not scored again.

    Args:
        part: of the suite; its scores are filed apart.
        device: by default what is there.

    Raises:
        ConfigError: the experiment has no evaluation, or no such milestone.
        MissingInputError: the milestone is not trained, or a task's file is missing.
    """
    from openlm_pipeline.evaluation.scorecard import Provenance
    from openlm_pipeline.evaluation.subject import default_device, milestone_subject
    from openlm_pipeline.evaluation.suite import WHOLE, load_suite

    evaluation, part = evaluation_of(experiment), part or WHOLE
    labels = [name for name, _ in experiment.labelled_milestones()]
    if label not in labels:
        raise ConfigError(f"recipe {experiment.name} has no milestone {label}; it has {', '.join(labels)}")
    run = open_run(experiment, home)
    checkpoint = milestone_checkpoints(experiment, run).get(label)
    if checkpoint is None:
        why = f"milestone {label} is not in {run.checkpoints}; `openlm train {experiment.name}` makes it"
        raise MissingInputError(passed_over(experiment, run).get(label, why))
    home.pull(home.tokenizer(experiment.tokenizer.name))
    info = read_tokenizer_info(home.tokenizer(experiment.tokenizer.name))
    made_with = open_dataset(experiment.training_datasets()[0], home).info["tokenizer"]["sha256"]
    if made_with not in (None, info.sha256):  # OpenLM's shards don't say
        raise DataError(f"tokenizer {info.name} is not the one this run's shards were made with; tokenize again")
    if evaluation.processes > 1 and "RANK" not in os.environ:
        what = ["--milestone", label, *part.options(device)]
        _score_by_processes(experiment, home, what, report)  # what follows finds all tasks scored
    suite = part.of(load_suite(evaluation.suite))
    out = part.folder(home.scorecard(experiment.name, experiment.version, label))
    context = {
        "run": experiment.name,
        "run_version": experiment.version,
        "milestone": label,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
    }
    subject = milestone_subject(
        experiment.name,
        checkpoint,
        load_reference(tokenizer_file(home.tokenizer(info.name))),
        eot=experiment.tokenizer.eot,
        average=evaluation.average,
        device=device or default_device(),
        precision=evaluation.precision,
    )
    how = {"backend": evaluation.backend, "batch_tokens": evaluation.batch_tokens, "max_seq_len": None, "part": part}
    with home.artefact(out), _writing(out):
        result = _run_suite(subject, suite, home, out, context, report, **how)
        home.pull(home.root / "scorecards" / experiment.name / experiment.version)
        others = items_of_others(experiment, home, suite, labels[: labels.index(label)], part)
        card, reused = _summed_up(
            result,
            suite,
            Provenance(
                **context,
                checkpoint_digest=subject.digest,
                data_fingerprint=fingerprint({"data": run.identity["data"]}),
                tokenizer=info.name,
                validation_loss=checkpoint.metrics.get("validation_loss"),
                precision=evaluation.precision,
                average_of_weights=evaluation.average,
            ),
            out,
            *others,
        )
    average = f"{card.headline.name} {card.average:.3f}" if card.average is not None else "no average"
    report(f"scorecard {experiment.name} {label} {'reused' if reused else 'made'}: {average}")
    return StageResult(out, fingerprint({"scorecard": settings_tree(card)}), reused, _facts(card, result))


def items_of_others(
    experiment: Experiment,
    home: Home,
    suite: "Suite",
    earlier: list[str],
    part: "Part | None" = None,
    among: Collection[str] | None = None,
) -> "tuple[pa.Table | None, Iterator[tuple[str, pa.Table]]]":
    """What a milestone is compared with: the items of the milestone before (of a fork's first one, its parent), and
    those of others by name, read one after the other.

    Args:
        among: names of those that are wanted; by default all.
    """
    folders = {label: home.scorecard(experiment.name, experiment.version, label) for label in earlier}
    for baseline in evaluation_of(experiment).baselines:
        if (among is None or baseline.name in among) and not baseline_staleness(experiment, home, baseline, suite):
            folders[baseline.name] = home.model_scorecard(baseline.name, suite.name)
    previous = earlier[-1] if earlier else None
    if previous is None and (parents := parent_scorecard(experiment, home)):
        previous = milestone_label(experiment.parent.milestone)
        folders[previous] = parents
    if among is not None:
        folders = {name: folder for name, folder in folders.items() if name in (previous, *among)}
    if part:
        folders = {name: part.folder(folder) for name, folder in folders.items()}

    def of_suite(folder: Path | None) -> "pa.Table | None":
        items = items_of(folder)
        return items if items is not None and set(items["suite"].unique().to_pylist()) <= {suite.name} else None

    before = of_suite(folders.pop(previous, None))
    return before, ((name, items) for name, folder in folders.items() if (items := of_suite(folder)) is not None)


def staleness(card: "Scorecard", suite: "Suite", evaluation: Evaluation, digest: str | None = None) -> list[str]:
    """Why a scorecard is not what the recipe's evaluation of this model would give now; empty where it is.

    Args:
        digest: of the weights as they are scored, where they are there.
    """
    from openlm_pipeline.evaluation.suite import HARNESS_VERSION

    average = evaluation.average if card.milestone else None
    pairs = {
        "weights": (card.checkpoint_digest, digest or card.checkpoint_digest),
        "suite": (card.suite, suite.name),
        "settings of the suite": (card.suite_digest, suite.digest),
        "harness version": (card.harness_version, HARNESS_VERSION),
        "precision": (card.precision, evaluation.precision),
        "average of the weights": (card.average_of_weights or "none", average or "none"),
    }
    if digest and pairs["weights"][0] == pairs["weights"][1]:  # it has the last two in it, which old scorecards don't
        del pairs["precision"], pairs["average of the weights"]
    return [f"{what} {old[:12]} -> {new[:12]}" for what, (old, new) in pairs.items() if old != new]


def baseline_staleness(experiment: Experiment, home: Home, baseline: Baseline, suite: "Suite") -> list[str]:
    """Why there is no scorecard of a baseline as the recipe has it now; empty where there is one."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.evaluation.subject import place_of

    path = home.model_scorecard(baseline.name, suite.name) / CARD
    if not path.exists():
        return ["it was not scored yet"]
    card = load_scorecard(path)
    model, stamp = place_of(baseline.model, baseline.revision)
    if card.model is None:  # of the first release, which wrote down one of the two
        model, card_model = baseline.tokenizer or baseline.model, card.tokenizer
    else:
        card_model = card.model
    changed = [f"model {card_model} -> {model}"] if card_model != model else []
    if card.model and card.tokenizer != (baseline.tokenizer or baseline.model):
        changed.append(f"tokenizer {card.tokenizer} -> {baseline.tokenizer or baseline.model}")
    if not changed and card.weights_stamp not in (None, stamp):
        changed.append("its files were changed since")
    return [*changed, *staleness(card, suite, evaluation_of(experiment))]


def parent_scorecard(experiment: Experiment, home: Home) -> Path | None:
    """The folder of the scores of the milestone that a fork continues from; None where there is no parent."""
    if experiment.parent is None:
        return None
    parent = experiment.parent
    folder = home.scorecard(parent.run, parent.version, milestone_label(parent.milestone))
    home.pull(folder)
    return folder


def evaluation_of(experiment: Experiment) -> Evaluation:
    """Raises ConfigError if the experiment has none."""
    if experiment.evaluation is None:
        raise ConfigError(f"recipe {experiment.name} has no `evaluation.suite`")
    return experiment.evaluation


def _score_by_processes(experiment: Experiment, home: Home, what: list[str], report: Say) -> None:
    """Have torchrun start the processes that score; they put each task's items where this process finds them."""
    with tempfile.TemporaryDirectory(prefix="openlm-score-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={evaluation_of(experiment).processes}",
            "-m",
            "openlm_pipeline",
            "evaluate",
            str(recipe),
            *what,
        ]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **home.variables}
        lines = deque[str](maxlen=_LINES_KEPT)
        with subprocess.Popen(
            dying_with_us(command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                for line in process.stdout:
                    lines.append(line.rstrip())
                    report(line.rstrip())
            finally:
                process.terminate()
        if process.returncode:
            error = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
            why = error or signal_in("\n".join(lines)) or next(reversed(lines), "they said nothing")
            raise OpenLMError(f"the processes that score ended with exit code {process.returncode}: {why}")


def score_baseline(
    experiment: Experiment,
    home: Home,
    name: str,
    report: Say,
    *,
    part: "Part | None" = None,
    device: str | None = None,
) -> StageResult:
    """Score one of the recipe's baselines with its suite; arguments as for `score`."""
    from openlm_pipeline.evaluation.suite import WHOLE

    evaluation, part = evaluation_of(experiment), part or WHOLE
    found = [b for b in evaluation.baselines if b.name == name]
    if not found:
        raise ConfigError(f"recipe {experiment.name} has no baseline {name}")
    (baseline,) = found
    if evaluation.processes > 1 and "RANK" not in os.environ:
        _score_by_processes(experiment, home, ["--baseline", name, *part.options(device)], report)
    return score_model(
        baseline.model,
        evaluation.suite,
        home,
        report,
        name=baseline.name,
        tokenizer=baseline.tokenizer,
        revision=baseline.revision,
        precision=evaluation.precision,
        backend=evaluation.backend,
        batch_tokens=evaluation.batch_tokens,
        part=part,
        device=device,
    )


def score_model(
    path_or_name: str,
    suite_name: str,
    home: Home,
    report: Say,
    *,
    name: str | None = None,
    out_dir: Path | None = None,
    model: str | None = None,
    flags: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    max_seq_len: int | None = None,
    backend: str = "native",
    precision: str = "fp32",
    batch_tokens: int | None = None,
    part: "Part | None" = None,
    device: str | None = None,
) -> StageResult:
    """Score a model that no run here made, or a checkpoint by its path, into `out_dir`.

    Args:
        name: what it is filed under; by default made of the path. What another model of that name scored is set aside.
        out_dir: by default `scorecards/models/NAME/SUITE` under the home.
        flags: OpenLM's model flags, such as `{"model_norm": "rms_norm"}`.
        part, device: as for `score`.

    Returns:
        Its facts hold `metrics` (`metrics/copa/0-shot/...` -> accuracy, as LLM Foundry prints them) and `seconds`.
    """
    from openlm_pipeline.evaluation.scorecard import Provenance
    from openlm_pipeline.evaluation.subject import default_device, open_subject, place_of
    from openlm_pipeline.evaluation.suite import WHOLE, load_suite
    from openlm_pipeline.models.openlm_settings import settings_of_flags

    if backend == "foundry" and precision != "fp32":
        raise ConfigError("LLM Foundry as a backend computes in fp32")
    part = part or WHOLE
    suite = part.of(load_suite(suite_name))
    if suite.ignored:
        report(f"{suite_name}: left out, as they only say how to run: {', '.join(suite.ignored)}")
    place, stamp = place_of(path_or_name, revision)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", name):
        raise ConfigError(f"--name {name!r}: letters, digits, `_`, `-` and `.` only, as scores are filed under it")
    name = name or _default_name(path_or_name, place, suite, home)
    out = part.folder(out_dir or home.model_scorecard(name, suite.name))
    started = time.monotonic()
    subject = open_subject(
        path_or_name,
        model=model,
        tokenizer=tokenizer,
        revision=revision,
        device=device or default_device(),
        precision=precision,
        report=report,
        **settings_of_flags(flags or {}, "the command line"),
    )
    context = {"run": name, "run_version": None, "milestone": None, "step": None, "tokens": None}
    how = {"backend": backend, "batch_tokens": batch_tokens, "max_seq_len": max_seq_len, "part": part}
    with home.artefact(out), _set_aside_others(out, place, report), _writing(out):
        result = _run_suite(subject, suite, home, out, context, report, **how)
        provenance = Provenance(
            run=name,
            checkpoint_digest=subject.digest,
            tokenizer=tokenizer or path_or_name,
            precision=precision,
            model=place,
            weights_stamp=stamp,
        )
        card, reused = _summed_up(result, suite, provenance, out)
        metrics = _metrics(card)
        if is_first_process() and not (reused and (out / "results.json").exists()):
            write_json(out / "results.json", {"model": path_or_name, "suite": suite.name, "metrics": metrics})
    facts = _facts(card, result) | {"metrics": metrics, "seconds": time.monotonic() - started}
    return StageResult(out, fingerprint({"scorecard": settings_tree(card)}), reused, facts)


def _scored_model(folder: Path) -> str | None:
    """Which model a folder has the scores of; None where none, or one of the first release."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard

    return load_scorecard(folder / CARD).model if (folder / CARD).exists() else None


@contextmanager
def _set_aside_others(folder: Path, place: str, report: Say) -> Iterator[None]:
    """Scores of another model that stand in a folder are kept beside it."""
    if is_first_process() and (other := _scored_model(folder)) not in (None, place):
        report(f"the scores of {other} in {folder} are kept in {set_aside(folder)}")
    yield


def _default_name(path_or_name: str, place: str, suite: "Suite", home: Home) -> str:
    """Of the last two parts of a path or hub name; where another model has that one, with a digest of the place."""
    last = re.sub(r"\.(pt|pth|bin|safetensors)$", "", "_".join(Path(path_or_name).parts[-2:]).lower())
    name = re.sub(r"[^a-z0-9]+", "_", last).strip("_") or "model"
    if _scored_model(home.model_scorecard(name, suite.name)) in (None, place):
        return name
    return f"{name}_{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def _metrics(card: "Scorecard") -> dict[str, float]:
    """Accuracies under LLM Foundry's names: one per category where a task has those."""
    whole = [t for t in card.tasks if t.num_categories is None]
    return {f"metrics/{t.name}/{t.metric}": t.accuracy for t in (*whole, *card.categories) if t.accuracy is not None}


def milestones_and_scores(experiment: Experiment, home: Home) -> Iterator[tuple[str, Checkpoint, list[str]]]:
    """Each milestone on disk: label, checkpoint, and why its scorecard is none of this checkpoint and suite.

    Raises:
        OpenLMError: the run folder is not this experiment's, or its data is not there.
    """
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.evaluation.scored import milestone_digest
    from openlm_pipeline.evaluation.suite import load_suite

    evaluation = evaluation_of(experiment)
    suite = load_suite(evaluation.suite)
    for label, checkpoint in milestone_checkpoints(experiment, open_run(experiment, home)).items():
        path = home.scorecard(experiment.name, experiment.version, label) / CARD
        card = load_scorecard(path) if path.exists() else None
        digest = milestone_digest(checkpoint, evaluation.precision, evaluation.average)
        yield label, checkpoint, ["not scored yet"] if card is None else staleness(card, suite, evaluation, digest)
