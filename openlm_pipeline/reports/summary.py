"""What a report says beside its numbers: how to read the table, how the run was made, what was scored."""

from collections.abc import Sequence

from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.evaluation.suite import task_name
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.experiments.choices import Choice
from openlm_pipeline.registry import OPTIMIZERS, RULES
from openlm_pipeline.reports.noise import ABOVE_CHANCE, stuck_tasks
from openlm_pipeline.reports.table import Table
from openlm_pipeline.units import format_tokens

Facts = list[tuple[str, str]]
"""Names and values, for people."""


def problems(table: Table, cards: Sequence[Scorecard]) -> list[str]:
    """Why a task or an average has no score, and what a reader of a score must know, one sentence each."""
    titles = {row.label: row.heading for row in table.rows}
    return [
        f"{task.name} at {titles[card.label]} {'failed' if task.status == 'failed' else 'was not run'}"
        + (f": {task.problem}" if task.problem else ".")
        for card in cards
        for task in card.tasks
        if task.status != "scored"
    ] + list(dict.fromkeys(warning for card in cards for warning in card.warnings))


def notes(table: Table, cards: Sequence[Scorecard]) -> Facts:
    """How to read the table: its signs and terms."""
    said = [
        ("±", "the longer side of the 95% interval; it covers the sampling of items, not the seed of training"),
        (
            "▲ ▼",
            "better and worse than at the milestone above, where a paired test over the same items finds it "
            "significant at 5%: Holm's correction over all that this page says; a change without a mark may be noise",
        ),
        ("detectable", "smallest difference found four times in five between two models that err independently"),
        (
            "detectable change",
            "the same of the change to the last scored milestone, tested pair by pair over the same items",
        ),
    ]
    if table.likelihoods:
        said.append(("△ ▽", "accuracy can't tell, but the right answers became significantly more, or less, likely"))
        said.append(("bits per byte", "what it takes to code the right answers; lower is better, and it moves sooner"))
    rules = dict.fromkeys(column.rule for column in table.columns if column.rule)
    said.append(("rule", "; ".join(f"{name}: {RULES[name].__doc__.split(chr(10))[0]}" for name in rules).rstrip(".")))
    if any(name == "majority" for name, _ in table.footer()):
        said.append(("majority", "accuracy of always choosing the option that is right most often"))
    if any(column.small for column in table.columns):
        said.append(("*", "a task of fewer than 300 items: what moves it is mostly noise"))
    if any(column.key == ABOVE_CHANCE for column in table.columns):
        names = ", ".join(column.heading for column in stuck_tasks(table))
        said.append(
            (
                "average above chance",
                f"the headline's tasks without those whose interval includes chance, or that are 0, at every scored "
                f"milestone ({names}); picked by these very scores, so it has neither interval nor test",
            )
        )
    micro = [
        f"{column.title} {cell.score.accuracy_micro:.3f} at {row.title}"
        for column in table.columns
        for row in reversed(table.milestones)
        if (cell := table.cell(row, column.key)).score and cell.score.accuracy_micro is not None
    ]
    if micro:
        said.append(("categories", f"a task with categories counts as their mean; over its items alone: {micro[0]}"))
    for card in cards[-1:]:
        for average in card.averages:
            what = "mean of " + ", ".join(t.removesuffix("/0-shot") for t in average.tasks)
            if average.kind == "bits_per_byte":
                what = f"mean bits per byte of the right answers over {len(average.tasks)} tasks"
            elif average.kind != "accuracy":
                what = f"mean of (accuracy − guessing) / (1 − guessing), random baselines {average.random_baselines}"
                what += f", over {len(average.tasks)} tasks"
            said.append((average.name, f"{what}; given only where all of them are scored"))
    kinds = {row.kind for row in table.rows}
    if "re-run" in kinds:
        said.append(("re-run", "scored here, on the same items with the same harness"))
    if "quoted" in kinds:
        said.append(("quoted", "as published, to two decimals, by another harness; n/a: not published"))
    return said


def categories(table: Table, cards: Sequence[Scorecard]) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """Each task with categories: its name, the models that it is scored for, and their scores by category."""
    titles = {row.label: row.heading for row in table.rows}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for card in cards:
        for part in card.categories:
            task = found.setdefault(task_name(part.task, part.num_fewshot), {})
            measured = (part.accuracy, part.ci_low, part.ci_high)
            value, low, high = (
                measured if part.accuracy is not None else (part.bits_per_byte, part.bits_low, part.bits_high)
            )
            half = "" if low is None or high is None else f" ±{max(high - value, value - low):.2f}"
            task.setdefault(part.category, {})[titles[card.label]] = f"{value:.2f}{half}"
    return [
        (name, models, [(category, [scores.get(m, "not run") for m in models]) for category, scores in parts.items()])
        for name, parts in found.items()
        for models in [list(dict.fromkeys(m for scores in parts.values() for m in scores))]
    ]


def made_from(experiment: Experiment) -> Facts:
    """The settings that a reader asks for first."""
    model, training = experiment.model_config_resolved(), experiment.training
    name = experiment.model.get("name", "own shape")
    sources = ", ".join(
        f"{s.name} {s.version}" + (f" (weight {s.weight:g})" if len(experiment.sources) > 1 else "")
        for s in experiment.sources
    )
    tokenizer = experiment.tokenizer
    origin = f"trained here on {experiment.sources[0].name}" if tokenizer.train else f"from {tokenizer.source}"
    horizon = experiment.schedule_horizon()
    schedule = f"{training.schedule}, warm-up over {_count(training.warmup)} tokens"
    if horizon:
        schedule += f", to {training.lr_min:g} at {format_tokens(horizon)} tokens"
    return [
        (
            "Model",
            f"{name}: width {model.hidden_dim}, {model.n_layers} layers, {model.n_heads} heads, vocabulary "
            f"{model.vocab_size}, {model.norm}, {model.ffn}, {model.positional_embedding} positions",
        ),
        *(
            [("Parent", f"{p.run} {p.version} at {format_tokens(p.milestone)} tokens")]
            if (p := experiment.parent)
            else []
        ),
        ("Data", sources),
        ("Tokenizer", f"{tokenizer.name}, {origin}"),
        ("Sequence length", f"{experiment.seq_len} tokens"),
        ("Global batch", f"{_count(training.global_batch)} tokens"),
        ("Learning rate", f"{training.lr:g}, {schedule}"),
        (
            "Optimizer",
            f"{_settings(OPTIMIZERS[training.optimizer](training))}, "
            + (f"gradient clipped at {training.grad_clip:g}" if training.grad_clip else "no gradient clipping"),
        ),
        ("Precision", training.precision),
        ("Seeds", f"{experiment.seed} (weights and order), {experiment.shuffle_seed} (documents)"),
        ("Milestones", ", ".join(format_tokens(t) for t in experiment.milestones) + " tokens"),
        ("Validation", _validation(experiment)),
    ]


def _settings(choice: Choice) -> str:
    """A choice by its name, with the value of all that it reads but the learning rate."""
    training = choice.training
    read = {name: getattr(training, name) for name in choice.settings if name != "lr"} | choice.own.model_dump()
    shown = {
        name: " and ".join(value) or "nothing" if isinstance(value, tuple) else value for name, value in read.items()
    }
    return ", ".join([getattr(training, choice.field), *(f"{name} {value}" for name, value in shown.items())])


def _count(tokens: int) -> str:
    """`250B`, or `8,192` where the short form would not be short."""
    short = format_tokens(tokens)
    return short if len(short) <= 5 else f"{tokens:,}"


def _validation(experiment: Experiment) -> str:
    if experiment.validation is None:
        return "none"
    names = ", ".join(f"{source.name} {source.version}" for source in experiment.validation.held_out)
    return f"{names}, at most {experiment.validation.max_samples} samples"


def evaluation_facts(cards: Sequence[Scorecard]) -> Facts:
    """What is the same for all scorecards of a report; empty without one."""
    if not cards:
        return []
    last = cards[-1]
    data = dict.fromkeys(card.data_fingerprint for card in cards if card.data_fingerprint)
    return [
        ("Suite", f"{last.suite} {last.suite_version}"),
        ("Suite digest", last.suite_digest),
        ("Harness version", last.harness_version),
        ("Precision", last.precision),
        ("Random baselines", last.random_baselines),
        ("Tokenizer", last.tokenizer),
        *(("Data fingerprint", digest) for digest in data),
    ]


def origin(table: Table, cards: Sequence[Scorecard]) -> str:
    """Where the best milestone's numbers came from, in one sentence; empty without a score."""
    best = table.best()
    card = next((c for c in cards if best is not None and c.label == best.label), None)
    if card is None:
        return ""
    data = f", trained on data {card.data_fingerprint[:12]}" if card.data_fingerprint else ""
    return (
        f"From checkpoint {card.checkpoint_digest[:12]} at step {card.step:,}{data}; suite {card.suite} "
        f"{card.suite_version}, harness version {card.harness_version}."
    )


def checkpoints(table: Table, cards: Sequence[Scorecard]) -> list[tuple[str, str, str]]:
    """Model, where training stood there, and digest of its checkpoint."""
    titles = {row.label: row.heading for row in table.rows}
    return [(titles[card.label], _reached(card), card.checkpoint_digest) for card in cards]


def _reached(card: Scorecard) -> str:
    if card.tokens is None:
        return f"revision {card.run_version}" if card.run_version else "a model of others"
    return f"step {card.step:,}, {card.tokens:,} tokens"


def task_files(cards: Sequence[Scorecard]) -> Facts:
    """Task and sha256 of the file that its items came from."""
    return list(dict.fromkeys((t.name, t.task_file_sha256) for card in cards for t in card.tasks if t.task_file_sha256))


def sources(table: Table) -> Facts:
    """Published rows and where they were published, one line for all of one source."""
    rows: dict[str, list[str]] = {}
    for row in table.rows:
        if row.source:
            rows.setdefault(row.source, []).append(row.title)
    return [(", ".join(titles), source) for source, titles in rows.items()]
