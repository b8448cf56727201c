"""Numbers measured on items, with intervals that know that some items go together, and weighted sums of them.

Items that share a question or a passage, or one question at two numbers of shots, err together: a *cluster* of items is
one observation. Leaves (a task, or a category of one) have intervals of their own kind; a sum of leaves has that of
Zou and Donner (2008, Statistics in Medicine 27:1693), which of a single leaf is the leaf's own, and is never empty.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from openlm_pipeline.evaluation import statistics

Array = np.ndarray
NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class Estimate:
    """A mean over items, or a weighted sum of such."""

    value: float
    low: float
    high: float
    """95% interval."""
    error: float
    """Standard error; NaN where it is not known."""
    codes: Array
    """The clusters, uint64[G], in order."""
    influence: Array
    """float64[G]: how much each cluster moves the value away from what it would be if it were like the rest."""
    clusters: int
    """Independent observations."""


@dataclass(frozen=True)
class Tested:
    """A difference with the test of its being 0."""

    estimate: Estimate
    p_value: float


def cluster_codes(table: pa.Table) -> Array:
    """A number for each row's cluster, the same wherever the cluster is: uint64[rows]."""
    named = table["cluster"] if "cluster" in table.column_names else pa.nulls(table.num_rows, pa.string())
    keys = pa.compute.coalesce(named, table["item_hash"]).combine_chunks().dictionary_encode()
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.dictionary.to_pylist()]
    return np.frombuffer(b"".join(digests), np.uint64)[keys.indices.to_numpy()]


def accuracy(correct: Array, codes: Array) -> Estimate:
    """Share of right items, bool[n], with Wilson's interval for as many items as the clusters are worth."""
    n, p = len(correct), float(correct.mean())
    distinct, sums, effect = _clustered(correct - p, codes)
    low, high = statistics.wilson_interval(p * n / effect, n / effect)
    error = statistics.standard_error(p, n) * math.sqrt(effect)
    return Estimate(p, low, high, error, distinct, sums / n, len(distinct))


def bits_per_byte(nll: Array, text_bytes: Array, codes: Array) -> Estimate:
    """Bits to code a byte of the texts, from the nats of each, float64[n], and its bytes; intervals by Student's t."""
    total = text_bytes.sum() * NATS_PER_BIT
    value = float(nll.sum() / total)
    return _mean_like(value, (nll - value * text_bytes * NATS_PER_BIT) / total, codes)


def accuracy_difference(ours: Array, theirs: Array, codes: Array) -> Tested:
    """Of the share of right items over the same items, bool[n] each: Bonett and Price's interval and the exact test of
    signs, which without clusters is McNemar's."""
    n = len(ours)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    difference = ours.astype(int) - theirs
    value = float(difference.mean())
    distinct, sums, effect = _clustered(difference - value, codes)
    low, high = statistics.paired_interval(gained, lost, n, effect=effect)
    error = statistics.paired_standard_error(gained, lost, n) * math.sqrt(effect)
    p_value = statistics.sign_flip_exact(_sums(difference, codes)[1].round().astype(int))
    return Tested(Estimate(value, low, high, error, distinct, sums / n, len(distinct)), p_value)


def unpaired_difference(ours: Estimate, theirs: Estimate) -> tuple[float, float, float]:
    """One estimate minus another over other items, with its 95% interval from both of theirs (Newcombe 1998, Statistics
    in Medicine 17:873, method 10)."""
    value = ours.value - theirs.value
    low = value - math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    return value, low, value + math.hypot(ours.high - ours.value, theirs.value - theirs.low)


def likelihood_difference(ours: Array, theirs: Array, text_bytes: Array, codes: Array) -> Tested:
    """Of `bits_per_byte` over the same items: negative where ours are the likelier texts."""
    total = text_bytes.sum() * NATS_PER_BIT
    difference = (ours - theirs) / total
    value = float(difference.sum())
    found = _mean_like(value, difference - value / len(difference), codes)
    return Tested(found, statistics.student_p_value(value, found.error, found.clusters))


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The sum of estimates, each times its weight."""
    weights, leaves = [w for w, _ in parts], [e for _, e in parts]
    if len(parts) == 1 and weights[0] == 1:
        return leaves[0]
    value = math.fsum(w * e.value for w, e in parts)
    codes = np.unique(np.concatenate([e.codes for e in leaves]))
    influence = np.zeros(len(codes))
    for w, e in parts:
        influence[np.searchsorted(codes, e.codes)] += w * e.influence
    related = _correlations(leaves)

    def spread(sizes: Callable[[Estimate], float]) -> float:
        scaled = np.array([w * sizes(e) for w, e in parts])
        return math.sqrt(max(0.0, _sum(scaled[:, None] * related * scaled)))

    low, high = value - spread(lambda e: e.value - e.low), value + spread(lambda e: e.high - e.value)
    return Estimate(value, low, high, spread(lambda e: e.error), codes, influence, len(codes))


def combined_difference(parts: Sequence[tuple[float, Tested]]) -> Tested:
    """The sum of differences, each times its weight, with a normal interval and test."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    alone = parts[0][1].p_value if len(parts) == 1 else None
    found = combined([(w, t.estimate) for w, t in parts])
    half = statistics.half_width(found.error)
    estimate = replace(found, low=found.value - half, high=found.value + half)
    return Tested(estimate, statistics.normal_p_value(found.value, found.error) if alone is None else alone)


def _mean_like(value: float, influence: Array, codes: Array) -> Estimate:
    """An estimate whose error is that of the clusters' sums of influence, with Student's interval."""
    distinct, sums = _sums(influence, codes)
    clusters = len(distinct)
    if clusters < 2:
        return Estimate(value, -math.inf, math.inf, math.nan, distinct, sums, clusters)
    error = math.sqrt(float((sums**2).sum()) * clusters / (clusters - 1))
    half = statistics.student_half_width(error, clusters)
    return Estimate(value, value - half, value + half, error, distinct, sums, clusters)


def _sums(values: Array, codes: Array) -> tuple[Array, Array]:
    distinct, inverse = np.unique(codes, return_inverse=True)
    return distinct, np.bincount(inverse, values, len(distinct))


def _clustered(residuals: Array, codes: Array) -> tuple[Array, Array, float]:
    """The clusters, their sums of residuals, and how many times the variance of a mean is that of as many independent
    items; at least 1, as less is chance."""
    distinct, sums = _sums(residuals, codes)
    n, clusters = len(residuals), len(distinct)
    alone = float((residuals**2).sum())
    if clusters == n:
        return distinct, sums, 1.0
    if clusters == 1 or not alone:
        return distinct, sums, n / clusters
    together = float((sums**2).sum()) * clusters / (clusters - 1)
    return distinct, sums, max(1.0, together / (alone * n / (n - 1)))


def _sum(values: Array) -> float:
    """Rounded once: BLAS adds in an order that depends on the machine, and a scorecard is the same on each."""
    return math.fsum(values.ravel().tolist())


def _correlations(leaves: Sequence[Estimate]) -> Array:
    """Of the errors of estimates, float64[L, L]: 0 where they have no cluster in common, never negative."""
    related = np.eye(len(leaves))
    if len(np.unique(np.concatenate([e.codes for e in leaves]))) == sum(len(e.codes) for e in leaves):
        return related
    for i, a in enumerate(leaves):
        for j, b in enumerate(leaves[:i]):
            shared, at_a, at_b = np.intersect1d(a.codes, b.codes, assume_unique=True, return_indices=True)
            sizes = math.sqrt(_sum(a.influence**2) * _sum(b.influence**2))
            if not len(shared):
                continue
            if sizes:
                found = _sum(a.influence[at_a] * b.influence[at_b]) / sizes
            else:  # all of them right, or all wrong: nothing says how they go together
                found = len(shared) / math.sqrt(len(a.codes) * len(b.codes))
            related[i, j] = related[j, i] = min(1.0, max(0.0, found))
    return related
