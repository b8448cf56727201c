"""What a report says in words: the headline, the notes under the table, how the run was made, what was scored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.evaluation.suite import task_name
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.reports.table import AVERAGE, LOSS, Cell, Row, Table
from openlm_pipeline.units import format_tokens

Facts = list[tuple[str, str]]
"""Names and values, for people."""


@dataclass(frozen=True)
class Headline:
    """What a reader takes away in five seconds, and the sentences that bear it out."""

    main: str
    details: tuple[str, ...] = ()


def headline(table: Table) -> Headline:
    """Which milestone is best on average, by how much, whether that is more than noise and more than chance."""
    scored = [(row, cell) for row in table.rows if (cell := table.cell(row, AVERAGE)).value is not None]
    if not scored:
        return Headline("No milestone has an average score yet.", _loss_sentence(table))
    best = table.best()
    cell = table.cell(best, AVERAGE)
    chance = next(c.chance for c in table.columns if c.key == AVERAGE)
    name = format_tokens(best.tokens)
    only = "the only scored milestone" if len(scored) == 1 else f"the best of {len(scored)} scored milestones"
    details = []
    if len(scored) > 1:
        second, second_cell = max((p for p in scored if p[0] is not best), key=lambda pair: pair[1].value)
        details.append(_lead(cell, second, second_cell))
    last, last_cell = scored[-1]
    if last is not best and len(scored) > 2:
        details.append(f"The last scored milestone, {format_tokens(last.tokens)}, stands at {last_cell.text}.")
    details += _loss_sentence(table)
    main = f"{name} tokens is {only}: average accuracy {cell.number} {cell.half_width}".rstrip()
    return Headline(f"{main}, {_against_chance(cell, chance)}.", tuple(details))


def _against_chance(cell: Cell, chance: float | None) -> str:
    if chance is None:
        return "with no chance level to compare with"
    if cell.low is None or cell.high is None:
        return f"with no interval to compare with chance ({chance:.3f})"
    if cell.low > chance:
        return f"above chance ({chance:.3f})"
    if cell.high < chance:
        return f"below chance ({chance:.3f})"
    return f"not distinguishable from chance ({chance:.3f})"


def _lead(cell: Cell, second: Row, second_cell: Cell) -> str:
    """The lead over the runner-up, with a 95% interval that takes the two milestones' errors as independent."""
    lead = cell.value - second_cell.value
    text = f"It leads the runner-up, {format_tokens(second.tokens)}, by {lead:.3f}"
    if None in (cell.low, cell.high, second_cell.low, second_cell.high):
        return f"{text}; how much of this is noise is not known."
    half = math.hypot(cell.high - cell.low, second_cell.high - second_cell.low) / 2
    return f"{text} ±{half:.3f}, {'more than noise' if lead > half else 'which is within noise'}."


def _loss_sentence(table: Table) -> tuple[str, ...]:
    losses = [(row, cell.value) for row in table.rows if (cell := table.cell(row, LOSS)).value is not None]
    if len(losses) < 2:
        return ()
    (first, start), (last, end) = losses[0], losses[-1]
    verb = "fell" if end < start else "rose" if end > start else "stayed"
    return (
        f"Held-out loss {verb} from {start:.3f} at {format_tokens(first.tokens)} to {end:.3f} at "
        f"{format_tokens(last.tokens)} (nats per token).",
    )


def notes(table: Table, cards: Sequence[Scorecard]) -> list[str]:
    """How to read the table, and why a task has no score."""
    said = [
        "± is the longer side of the 95% interval, which covers the sampling of items and not the seed of training. "
        "▲ and ▼ mark a change from the milestone before that a paired test over the same items (McNemar) finds "
        "significant at 5% after Holm's correction over the tasks; a change without a mark may be noise.",
        "Detectable is the smallest difference that would be found four times in five between two models that err "
        "independently. The interval of the lead takes two milestones' errors as independent too, which is cautious.",
        "Average is the plain mean over tasks, given only where all of them are scored; the centred average first "
        "rescales each task so that guessing is 0 and a perfect score is 1.",
    ]
    tokens = {row.label: format_tokens(row.tokens) for row in table.rows}
    for card in cards:
        said += [
            f"{task.name} at {tokens[card.milestone]} {'failed' if task.status == 'failed' else 'was not run'}"
            + (f": {task.problem}" if task.problem else ".")
            for task in card.tasks
            if task.status != "scored"
        ]
    return said


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
        ("Data", sources),
        ("Tokenizer", f"{tokenizer.name}, {origin}"),
        ("Sequence length", f"{experiment.seq_len} tokens"),
        ("Global batch", f"{_count(training.global_batch)} tokens"),
        ("Learning rate", f"{training.lr:g}, {schedule}"),
        (
            "Optimizer",
            f"AdamW, betas {training.beta1:g} and {training.beta2:g}, weight decay {training.weight_decay:g}, "
            + (f"gradient clipped at {training.grad_clip:g}" if training.grad_clip else "no gradient clipping"),
        ),
        ("Precision", training.precision),
        ("Seeds", f"{experiment.seed} (weights and order), {experiment.shuffle_seed} (documents)"),
        ("Milestones", ", ".join(format_tokens(t) for t in experiment.milestones) + " tokens"),
        ("Validation", _validation(experiment)),
    ]


def _count(tokens: int) -> str:
    """`250B`, or `8,192` where the short form would not be short."""
    short = format_tokens(tokens)
    return short if len(short) <= 5 else f"{tokens:,}"


def _validation(experiment: Experiment) -> str:
    if experiment.validation is None:
        return "none"
    source = experiment.validation.source
    return f"{source.name} {source.version}, at most {experiment.validation.max_samples} samples"


def evaluation_facts(cards: Sequence[Scorecard]) -> Facts:
    """What is the same for all scorecards of a report; empty without one."""
    if not cards:
        return []
    last = cards[-1]
    return [
        ("Suite", f"{last.suite} {last.suite_version}"),
        ("Suite digest", last.suite_digest),
        ("Harness version", last.harness_version),
        ("Tokenizer", last.tokenizer),
        *(("Data fingerprint", digest) for digest in dict.fromkeys(card.data_fingerprint for card in cards)),
    ]


def checkpoints(table: Table, cards: Sequence[Scorecard]) -> list[tuple[str, str, str]]:
    """Milestone, where training stood there, and digest of its checkpoint."""
    names = {row.label: format_tokens(row.tokens) for row in table.rows}
    return [(names[c.milestone], f"step {c.step:,}, {c.tokens:,} tokens", c.checkpoint_digest) for c in cards]


def task_files(cards: Sequence[Scorecard]) -> Facts:
    """Task and sha256 of the file that its items came from."""
    return list(
        dict.fromkeys(
            (task_name(t.task, t.num_fewshot), t.task_file_sha256)
            for card in cards
            for t in card.tasks
            if t.task_file_sha256
        )
    )
