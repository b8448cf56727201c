"""`openlm show`: all of one run, or of one of its milestones, on a page of the terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlm_pipeline.cli.options import Price
from openlm_pipeline.cli.runs import Version, score_text

if TYPE_CHECKING:
    from openlm_pipeline.experiments import Experiment
    from openlm_pipeline.runs.folder import RunFolder
    from openlm_pipeline.storage.home import Home

_WIDTH = 40


def show(
    run: Annotated[
        str, typer.Argument(metavar="RUN[@MILESTONE]", help="A run (`openlm runs`), or one of its milestones.")
    ],
    version: Version = None,
    price: Price = None,
) -> None:
    """Show a run: its data and settings, how good it is, what it took, how it ended, and what to do next.

    Examples:

    openlm show demo

    openlm show demo@400K
    """
    from openlm_pipeline.pipeline.items import milestone_named
    from openlm_pipeline.pipeline.overview import experiment_of, find_run
    from openlm_pipeline.storage.home import Home

    home = Home.from_env()
    name, _, milestone = run.partition("@")
    folder = find_run(home, name, version)
    experiment = experiment_of(folder)
    if milestone:
        facts = _milestone(experiment, home, folder, milestone_named(experiment, milestone), price)
    else:
        facts = _run(experiment, home, folder, price)
    for title, text in facts:
        typer.echo(f"{title:<11} {text}")


def _run(experiment: "Experiment", home: "Home", folder: "RunFolder", price: float | None) -> Iterator[tuple[str, str]]:
    from openlm_pipeline.pipeline.overview import state_of
    from openlm_pipeline.runs import ledger
    from openlm_pipeline.runs.dry_run import size_line
    from openlm_pipeline.runs.rates import drawn
    from openlm_pipeline.units import format_bytes, format_tokens

    state, why = state_of(experiment, home, folder)
    history, saved = ledger.History(folder), folder.saved()
    records = history.losses.records()
    trained = [r for r in records if "loss" in r]
    tokens = trained[-1]["tokens"] if trained else 0
    yield (
        "run",
        f"{experiment.name} {folder.path.name}: {state}, {format_tokens(tokens, 4)} of "
        + (f"{format_tokens(experiment.milestones[-1])} tokens"),
    )
    if why:
        yield "why", why
    if experiment.description:
        yield "about", experiment.description
    yield "folder", str(folder.path)
    size = size_line(experiment.model_config_resolved(), experiment.seq_len)
    yield "model", f"{experiment.model.get('name', 'own shape')}, {size}"
    if parent := experiment.parent:
        yield "parent", f"{parent.run} {parent.version} at {format_tokens(parent.milestone)} tokens"
    yield from _data(experiment, home, folder, tokens)
    yield from _settings(experiment)
    time = history.account()
    sessions = time.sessions
    for code in dict.fromkeys(s["code"] for s in sessions):
        yield "code", code
    if sessions:
        yield "machine", ledger.machine(sessions[-1])
        ends = [s["end"]["status"] if s["end"] else "killed" for s in sessions]
        if state == "running" and sessions[-1]["end"] is None:
            ends[-1] = "running"
        yield "sessions", f"{len(ends)}: " + ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    for event in time.stragglers:
        yield "straggler", f"rank {event['rank']} ({event['name']}) {event['why']}, at step {event['step']:,}"
    if trained:
        at = [trained[i * (len(trained) - 1) // (_WIDTH - 1)]["loss"] for i in range(_WIDTH)]
        yield "loss", f"{at[0]:.4f} |{drawn(at, min(at))}| {at[-1]:.4f} at {format_tokens(tokens, 4)} tokens"
    if validated := [r for r in records if "validation_loss" in r]:
        at_tokens = format_tokens(validated[-1]["tokens"], 4)
        yield "validation", f"loss {validated[-1]['validation_loss']:.4f} at {at_tokens} tokens"
    scored = False
    for checkpoint in (c for c in saved if c.milestone):
        score = _score(home, folder, checkpoint.milestone)
        scored = scored or bool(score)
        size = format_bytes(sum(f["bytes"] for f in checkpoint.files.values()))
        yield checkpoint.milestone, f"step {checkpoint.step:,}, {size}, {score or 'not scored'}"
    if rotating := [c for c in saved if c.rotates]:
        size = format_bytes(sum(f["bytes"] for c in rotating for f in c.files.values()))
        yield "rotating", f"{len(rotating)} checkpoints, {size}, the last at step {rotating[-1].step:,}"
    yield "cost", _cost(time.facts(), price)
    yield "next", _next(experiment, state, scored)


def _score(home: "Home", folder: "RunFolder", label: str) -> str:
    from openlm_pipeline.pipeline.overview import scores

    score = scores(home, folder, label)
    return f"{score['name']} {score_text(score)}" if score else ""


def _cost(facts: dict[str, Any], price: float | None) -> str:
    from openlm_pipeline.runs import ledger

    money = f", {facts['gpu_hours'] * price:,.2f} at {price:g} each" if facts and price is not None else ""
    return ledger.sentence(facts) + money


def _data(experiment: "Experiment", home: "Home", folder: "RunFolder", tokens: int) -> Iterator[tuple[str, str]]:
    """Each dataset that the run trains on, as its identity has it."""
    from openlm_pipeline.errors import OpenLMError
    from openlm_pipeline.fingerprint import short
    from openlm_pipeline.shards.opening import open_dataset
    from openlm_pipeline.units import format_tokens

    recorded = {data["name"]: data for data in folder.identity["data"]}
    weights = sum(source.weight for source in experiment.sources)
    for dataset in experiment.training_datasets():
        digest = recorded[dataset.name]["manifest_sha256"]
        share = max(0, tokens - experiment.start_tokens()) * dataset.source.weight / weights
        text = f"{dataset.name} {dataset.source.version} ({short(digest)}), {share / max(1, tokens):.0%} of the tokens"
        try:
            opened = open_dataset(dataset, home)
        except OpenLMError:
            yield "data", f"{text}; its shards are not here"
            continue
        size = len(opened) * experiment.seq_len
        changed = "" if opened.version == digest else "; the shards that are here now are others"
        yield "data", f"{text}: {format_tokens(size, 4)} tokens, {share / size:.2f} epochs{changed}"


def _settings(experiment: "Experiment") -> Iterator[tuple[str, str]]:
    """What differs from the recipe of that name, as it is now."""
    from openlm_pipeline.errors import ConfigError
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.fingerprint import differences

    try:
        recipe = load_experiment(experiment.name)
    except ConfigError:
        yield "settings", f"there is no recipe {experiment.name} here to compare with; all are in experiment.yaml"
        return
    changed = differences(recipe.model_dump(mode="json"), experiment.model_dump(mode="json"))
    if not changed:
        yield "settings", f"those of recipe {experiment.name}"
    yield from (("changed", line) for line in changed)


def _next(experiment: "Experiment", state: str, scored: bool) -> str:
    name = experiment.name
    if state in ("running", "queued"):
        return f"`openlm logs {name} -f` follows it; `openlm stop {name}` has it save and stop"
    if state == "completed":
        is_next = scored or experiment.evaluation is None
        return (
            f"`openlm report {name}` writes its report"
            if is_next
            else f"`openlm evaluate {name}` scores its milestones"
        )
    return f"`openlm launch {name}` or `openlm train {name}` {'begins' if state == 'not begun' else 'resumes'} it"


def _milestone(
    experiment: "Experiment", home: "Home", folder: "RunFolder", label: str, price: float | None
) -> Iterator[tuple[str, str]]:
    from openlm_pipeline.errors import MissingInputError
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.fingerprint import short
    from openlm_pipeline.pipeline.evaluation import CARD
    from openlm_pipeline.runs import ledger
    from openlm_pipeline.units import format_bytes, format_tokens

    checkpoint = next((c for c in folder.saved() if c.milestone == label), None)
    if checkpoint is None:
        raise MissingInputError(
            f"{experiment.name} has not reached its milestone {label}; `openlm show` says where it is"
        )
    yield "milestone", f"{experiment.name} {folder.path.name} at {format_tokens(checkpoint.tokens)} tokens"
    yield "step", f"{checkpoint.step:,}"
    yield "folder", str(checkpoint.path)
    size = format_bytes(sum(f["bytes"] for f in checkpoint.files.values()))
    yield "size", f"{size} in {len(checkpoint.files)} files"
    yield "digest", short(checkpoint.digest)
    if checkpoint.weights_digest:
        yield "weights", short(checkpoint.weights_digest)
    for name, value in checkpoint.metrics.items():
        yield "measured", f"{name} {value:,.5g}"
    yield "cost", f"since the milestone before: {_cost(ledger.facts(folder, label), price)}"
    card = home.scorecard(folder.path.parent.name, folder.path.name, label) / CARD
    if not card.exists():
        yield "next", f"`openlm evaluate {experiment.name} --milestone {label}` scores it"
        return
    scorecard = load_scorecard(card)
    for average in scorecard.averages:
        yield "average", f"{average.name} {score_text(average.model_dump())}"
    for task in scorecard.tasks:
        score = {"value": task.accuracy, "ci_low": task.ci_low, "ci_high": task.ci_high}
        yield "task", f"{task.name} {score_text(score)}"
