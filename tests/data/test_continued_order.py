"""A fork with another mixture takes from each source what its parent has not seen."""

import itertools

import numpy as np
import pytest

from openlm_pipeline.ordering.continued import recorded_order
from openlm_pipeline.ordering.continued import seen as seen_at

SIZES = {"a": np.array([500, 501]), "b": np.array([300, 300]), "c": np.array([400])}
SETTINGS = {"permutation": {}, "windowed": {"window_shards": 2}, "resampled": {"source_batch": 4}}


def record(mixture: dict[str, float], samples: int, sampling: str = "permutation", seed: int = 0, **before) -> dict:
    data = [{"manifest_sha256": name, "weight": weight} for name, weight in mixture.items()]
    return {
        "sampling": sampling, "settings": SETTINGS[sampling], "seed": seed, "data": data, "samples": samples, **before,
    }  # fmt: skip


def seen(made_of: dict, begin: int, end: int) -> list[tuple[str, int]]:
    source, sample = recorded_order(made_of, SIZES).picks(begin, end - begin)
    names = [d["manifest_sha256"] for d in made_of["data"]]
    return [(names[s], int(x)) for s, x in zip(source, sample)]


@pytest.mark.parametrize("sampling", ["permutation", "windowed"])
def test_nothing_repeats_while_there_is_something_unseen(sampling: str):
    """Through a fork, and a fork of it with the sources in another order, another seed and one source more."""
    first = record({"a": 3, "b": 1}, 600, sampling)
    second = record({"a": 1, "b": 3}, 900, sampling, start=600, before=first)
    third = record({"c": 2, "b": 1, "a": 1}, 0, seed=5, start=900, before=second)
    samples = seen(first, 0, 600) + seen(second, 600, 900) + seen(third, 900, 1100)
    assert len(set(samples)) == len(samples) == 1100
    shares = {name: sum(s == name for s, _ in samples[900:]) for name in "abc"}
    assert shares == pytest.approx({"a": 50, "b": 50, "c": 100}, abs=2)


def test_an_epoch_begun_by_the_parent_is_ended_by_the_fork():
    first = record({"a": 1, "b": 1}, 400)
    second = record({"a": 1, "b": 3}, 0, start=400, before=first)
    samples = seen(first, 0, 400) + seen(second, 400, 2000)
    for name, size in (("a", 1001), ("b", 600)):
        of_source = [x for s, x in samples if s == name]
        epochs = [of_source[i : i + size] for i in range(0, len(of_source), size)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert len(epochs) == {"a": 1, "b": 3}[name]


def test_a_source_left_out_for_a_while_is_taken_up_where_it_was_left():
    first = record({"a": 1, "b": 1}, 400)
    second = record({"a": 1}, 600, start=400, before=first)
    third = record({"a": 1, "b": 1}, 0, start=600, before=second)
    samples = seen(first, 0, 400) + seen(second, 400, 600) + seen(third, 600, 1000)
    assert len(set(samples)) == len(samples)


def test_the_same_mixture_is_the_parents_order_going_on():
    first = record({"a": 3, "b": 1}, 600)
    second = record({"a": 1, "b": 3}, 900, start=600, before=first)
    again = record({"a": 1, "b": 3}, 0, start=900, before=second)
    assert seen(again, 900, 1300) == seen(second, 900, 1300)


def test_an_order_is_a_function_of_the_sample_alone():
    first = record({"a": 3, "b": 1}, 600, "resampled")
    second = record({"b": 3, "a": 1}, 0, "resampled", start=600, before=first)
    whole = seen(second, 600, 1000)
    pieces = itertools.chain(*(seen(second, at, at + 50) for at in reversed(range(600, 1000, 50))))
    assert sorted(pieces) == sorted(whole)
    assert seen(second, 777, 800) == whole[177:200]


@pytest.mark.parametrize("sampling", ["permutation", "windowed", "resampled"])
def test_places_of_samples_are_found_in_a_fork_and_its_parents(sampling: str):
    first = record({"a": 3, "b": 1}, 2600, sampling)
    second = record({"b": 3, "a": 1}, 3900, sampling, start=2600, before=first)
    third = record({"b": 3, "a": 1}, 5000, sampling, start=3900, before=second)
    fourth = record({"c": 2, "b": 1, "a": 1}, 9000, seed=5, start=5000, before=third)
    read = seen(first, 0, 2600) + seen(second, 2600, 3900) + seen(third, 3900, 5000) + seen(fourth, 5000, 9000)
    samples = np.array([0, 7, 399])
    for name in "abcd":
        index, places = seen_at(fourth, SIZES, name, samples)
        expected = [i for i, (source, sample) in enumerate(read) if source == name and sample in samples]
        assert places.tolist() == expected
        assert [(name, samples[i]) for i in index] == [read[place] for place in places]
        until = seen_at(fourth, SIZES, name, samples, until=3000)[1]
        assert until.tolist() == [place for place in expected if place < 3000]
