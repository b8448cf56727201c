"""The order of a fork: its own mixture, each source from where the parent left it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openlm_pipeline.ordering.mixture import MixedOrder
from openlm_pipeline.registry import SAMPLINGS

Sizes = Mapping[str, np.ndarray]
"""Samples in each shard of a dataset, by its version."""


class ContinuedOrder(MixedOrder):
    """A mixture that begins at sample `start` of the run. Positions of its sources are counted from there."""

    def __init__(self, own: MixedOrder, start: int, left: Sequence[tuple[MixedOrder, int, int] | None]) -> None:
        """
        Args:
            own: the mixture as if it began at sample 0, and the order of sources that the parent did not have.
            left: for each other source the parent's order, the source's number there, and how many positions of it are
                taken.
        """
        super().__init__(own.mixture)
        self.own, self.start, self.left = own, start, left

    def samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        if (left := self.left[source]) is None:
            return self.own.samples(source, positions)
        order, number, taken = left
        return order.samples(number, positions + taken)

    def find(self, source: int, samples: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        if (left := self.left[source]) is None:
            return self.own.find(source, samples, first, last)
        order, number, taken = left
        index, positions = order.find(number, samples, first + taken, last + taken)
        return index, positions - taken

    def occurrences(self, source: int, samples: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        index, places = super().occurrences(source, samples, begin, end)
        return index, places + self.start

    def of_source(self, source: int) -> tuple[MixedOrder, int, int]:
        if (left := self.left[source]) is None:
            return self.own, source, 0
        order, number, before = left[0].of_source(left[1])
        return order, number, before + left[2]

    def picks(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return super().picks(start - self.start, count)

    def taken(self, samples: int) -> np.ndarray:
        return super().taken(samples - self.start)


def order_record(identity: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """What the order of a run is made of, and of its parents, from the run's identity.

    Args:
        tokens: after which a fork leaves it.
    """
    training, sampling = identity["training"], SAMPLINGS[identity["training"].get("sampling", "permutation")]
    record = {
        "sampling": training.get("sampling", "permutation"),
        "settings": {name: training[name] for name in sampling.settings},
        "seed": identity["seed"],
        "data": [{"weight": d["weight"], "manifest_sha256": d["manifest_sha256"]} for d in identity["data"]],
        "samples": tokens // identity["seq_len"],
    }
    if before := identity.get("parent", {}).get("order"):
        record |= {"start": identity["parent"]["tokens"] // identity["seq_len"], "before": before}
    return record


def is_same_mixture(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of one mixture in one order."""
    return all(record[name] == other[name] for name in ("sampling", "settings", "seed", "data"))


def recorded_order(record: Mapping[str, Any], sizes: Sizes) -> MixedOrder:
    """The order that a record is of. Sources that are not in `sizes` are not asked for samples."""
    absent = np.ones(1, np.int64)
    shard_sizes = [sizes.get(d["manifest_sha256"], absent) for d in record["data"]]
    weights = [d["weight"] for d in record["data"]]
    own = SAMPLINGS[record["sampling"]](shard_sizes, weights, record["seed"], **record["settings"])
    if (before := record.get("before")) is None:
        return own
    if is_same_mixture(record, before):
        return recorded_order(before, sizes)
    return ContinuedOrder(own, record["start"], [_left(d["manifest_sha256"], before, sizes) for d in record["data"]])


def seen(
    record: Mapping[str, Any], sizes: Sizes, dataset: str, samples: np.ndarray, until: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where samples of a dataset come in a run, what it has of its parents included.

    Args:
        record: `order_record` of the run, whose `samples` are all that it trains on.
        samples: numbers in the dataset, each once.
        until: only the first so many samples of the run.

    Returns:
        Indices in `samples`, and the samples of the run, both int64[n] and sorted by the latter.
    """
    end = record["samples"] if until is None else min(until, record["samples"])
    found = []
    part: Mapping[str, Any] | None = record
    while part is not None:
        begin, order = part.get("start", 0), recorded_order(part, sizes)
        for source, data in enumerate(part["data"]):
            if data["manifest_sha256"] == dataset and begin < end:
                found.insert(0, order.occurrences(source, samples, begin, end))
        part, end = part.get("before"), min(begin, end)
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    index, places = map(np.concatenate, zip(*found))
    by_place = np.argsort(places, kind="stable")
    return index[by_place], places[by_place]


def _left(dataset: str, record: Mapping[str, Any] | None, sizes: Sizes) -> tuple[MixedOrder, int, int] | None:
    """Where the last of a run and its parents that had a dataset left it, as for `ContinuedOrder`."""
    if record is None:
        return None
    datasets = [d["manifest_sha256"] for d in record["data"]]
    if dataset not in datasets:
        return _left(dataset, record.get("before"), sizes)
    order, number = recorded_order(record, sizes), datasets.index(dataset)
    return order, number, int(order.taken(record["samples"])[number])
