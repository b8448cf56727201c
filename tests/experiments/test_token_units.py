"""Token counts and milestone names: what is written comes back."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_pipeline.units import format_tokens, milestone_label, parse_tokens

SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
counts = st.integers(0, 10**15) | st.builds(
    lambda n, unit: n * SCALE[unit], st.integers(0, 2000), st.sampled_from(list(SCALE))
)


@settings(deadline=None)
@given(tokens=counts)
def test_what_is_formatted_parses_back(tokens: int) -> None:
    assert parse_tokens(format_tokens(tokens)) == parse_tokens(tokens) == parse_tokens(str(tokens)) == tokens


@settings(deadline=None)
@given(tokens=counts.filter(bool))
def test_a_label_is_a_name_that_tells_the_count(tokens: int) -> None:
    label = milestone_label(tokens)
    match = re.fullmatch(r"t(\d{4,})([KMBT]?)", label)
    assert match and int(match[1]) * SCALE[match[2]] == tokens


@settings(deadline=None)
@given(tokens=st.lists(st.integers(1, 9999), min_size=2, unique=True), unit=st.sampled_from(list(SCALE)))
def test_labels_of_one_unit_sort_as_their_counts(tokens: list[int], unit: str) -> None:
    same = [t * SCALE[unit] for t in sorted(tokens) if t % 1000]
    assert sorted(map(milestone_label, same)) == [milestone_label(t) for t in same]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("250B", 250 * 10**9),
        ("1.5m", 1_500_000),
        (" 2 K ", 2000),
        ("2_000_000", 2_000_000),
        ("1.6T", 1_600 * 10**9),
        (7, 7),
    ],
)
def test_counts_as_people_write_them(text: Any, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "value", ["1.5", "0.0001K", "-1", -1, "", "B", "1G", "1e9", "ten", True, None, 1.5, "1.5.0M", "1 0"]
)
def test_what_is_no_whole_count_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens; write for example 250B"):
        parse_tokens(value)


@pytest.mark.parametrize(
    ("tokens", "label"), [(250 * 10**9, "t0250B"), (1_500_000, "t1500K"), (10**12, "t0001T"), (7, "t0007")]
)
def test_labels(tokens: int, label: str) -> None:
    assert milestone_label(tokens) == label


def test_no_milestone_at_zero() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        milestone_label(0)
