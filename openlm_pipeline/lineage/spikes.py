"""Steps that stand out in a run's metrics, and the documents that they read."""

import itertools
import statistics
from collections import Counter
from dataclasses import dataclass

from openlm_pipeline.lineage.run_order import RunOrder
from openlm_pipeline.lineage.trace import Trace

_BEFORE, _FEWEST_BEFORE = 20, 5
"""Records before one that say what is usual: so many, and never fewer than that."""
_MOST_SAMPLES = 4096
"""Of a spike, whose documents are looked up."""


@dataclass(frozen=True)
class Spike:
    """Steps that stand out in the metrics."""

    kind: str
    """`loss`, `grad_norm` or `skipped`."""
    first_step: int
    last_step: int
    """The record is of the steps from the first to this one."""
    value: float | None
    usual: float | None
    """Median of the records before."""
    spreads: float | None
    """How far the value is above it, in median deviations from it of these records."""
    why: str
    documents: list[tuple[str, str | None, int | None, int]]
    """(source, file, record, samples that have a part of it), those with most samples first."""
    samples: int
    looked_up: int
    """Of them, whose documents these are."""

    def sentence(self, documents: int) -> str:
        """Its documents, at most so many, in a line."""
        named = [f"{file}:{record}" if file else source for source, file, record, _ in self.documents[:documents]]
        more = [f"{len(self.documents) - documents:,} more"] * (len(self.documents) > documents)
        part = f" (of the first {self.looked_up:,} of {self.samples:,} samples)" * (self.looked_up < self.samples)
        return ", ".join([*named, *more]) + part

    @property
    def title(self) -> str:
        """What stands out, as a sentence."""
        steps = f"step {self.last_step}"
        if self.first_step < self.last_step:
            steps = f"steps {self.first_step} to {self.last_step}"
        if self.kind == "skipped":
            return f"{steps} was read, not learned from: {self.why}"
        name, above = self.kind.replace("_", " "), f"{self.spreads:.1f} median deviations above"
        return f"{steps}: {name} {self.value:.4g}, {above} the {self.usual:.4g} of the records before"


def spikes(trace: Trace, count: int, most_samples: int = _MOST_SAMPLES) -> list[Spike]:
    """The steps of a run's metrics whose loss and gradient norm are farthest above all of the 20 records before, and
    the last ones that were left out; at most `count` of each.

    The first records of a run have too few before them. Where a record is of several steps, so is the spike.

    Args:
        most_samples: of each, whose documents are looked up, at some 5 ms each.
    """
    left_out = list(trace.order.last.left_out.items())[-count:]
    skipped = [("skipped", step, step, None, None, None, why) for step, why in left_out]
    return [_with_documents(trace, most_samples, *one) for one in (*_worst(trace.order, count), *skipped)]


def _worst(order: RunOrder, count: int) -> list[tuple[str, int, int, float, float, float, str]]:
    """The first fields of a `Spike` of each."""
    before: dict[str, dict[int, float]] = {"loss": {}, "grad_norm": {}}
    """Step -> value of the last records."""
    found: dict[str, dict[int, tuple[float, tuple]]] = {kind: {} for kind in before}
    last, every = order.last.begin // order.last.batch, order.experiment.execution.log_every
    for _, record in order.run.records():
        if "loss" not in record:
            continue
        step = record["step"]
        if step <= last:  # the run was set back, and only what was measured last stands
            last = (step - 1) // every * every
            before, found = (
                {kind: {s: one for s, one in of.items() if s < step} for kind, of in steps.items()}
                for steps in (before, found)
            )
        for kind, values in before.items():
            value = record[kind]
            if len(values) >= _FEWEST_BEFORE and value > max(values.values()):
                usual = statistics.median(values.values())
                above = (value - usual) / max(statistics.median(abs(v - usual) for v in values.values()), 1e-9)
                found[kind][step] = above, (kind, last + 1, step, value, usual, above, "")
                if len(found[kind]) > 1000 + 2 * count:  # bounded, whatever the length of the run
                    found[kind] = dict(sorted(found[kind].items(), key=lambda item: -item[1][0])[:count])
            values[step] = value
            if len(values) > _BEFORE:
                del values[next(iter(values))]
        last = step
    best = {kind: sorted(of.values(), key=lambda one: -one[0])[:count] for kind, of in found.items()}
    return [one for of in best.values() for _, one in of]


def _with_documents(trace: Trace, most: int, kind: str, first: int, last: int, *measured: float | str | None) -> Spike:
    order = trace.order
    batches = map(order.batch_of, range(first, last + 1))
    picks = ((order.sources[c], s) for batch in batches for c, s in zip(batch.contents, batch.samples.tolist()))
    documents: Counter[tuple[str, str | None, int | None]] = Counter()
    for source, sample in itertools.islice(picks, most):
        documents.update(trace.documents_of(source, sample))
    samples = (last + 1 - first) * order.last.batch
    counted = [(*document, n) for document, n in documents.most_common()]
    return Spike(kind, first, last, *measured, counted, samples, min(samples, most))
