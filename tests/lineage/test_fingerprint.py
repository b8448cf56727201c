"""Fingerprints: equal for equal fields in any order, refused for what has no stable form, differences by name."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipeline import environment

from openlm_pipeline.fingerprint import differences, fingerprint, short

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
trees = st.dictionaries(st.text(), values, max_size=5)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


@given(tree=trees)
def test_the_order_of_keys_does_not_matter(tree: dict[str, Any]) -> None:
    digest = fingerprint(tree)
    assert fingerprint(reversed_keys(tree)) == digest
    assert len(digest) == 64 and digest.startswith(short(digest)) and len(short(digest)) == 12
    assert differences(tree, reversed_keys(tree)) == []


@given(tree=trees, key=st.text(), value=values)
def test_another_field_is_another_fingerprint(tree: dict[str, Any], key: str, value: Any) -> None:
    more = {**tree, key: [value, "changed"]}
    if tree.get(key) != more[key]:
        assert fingerprint(more) != fingerprint(tree)


def test_the_order_of_lists_matters() -> None:
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})


def test_values_of_different_types_differ() -> None:
    digests = {fingerprint({"a": value}) for value in (1, 1.0, "1", True, None, [1], {"a": 1}, "", [], {})}
    assert len(digests) == 10


@pytest.mark.parametrize(("old", "new"), [(1, True), (0, False), (1, 1.0)])
def test_a_change_of_type_alone_is_a_difference(old: Any, new: Any) -> None:
    """Whatever changes the fingerprint can be named."""
    assert fingerprint({"a": old}) != fingerprint({"a": new})
    assert len(differences({"a": old}, {"a": new})) == 1


def test_another_process_gives_the_same() -> None:
    tree = {"lr": 3e-4, "betas": [0.9, 0.95], "name": "größe", "none": None}
    code = (
        "import json, sys; from openlm_pipeline.fingerprint import fingerprint;"
        "print(fingerprint(json.loads(sys.argv[1])))"
    )
    digests = {
        subprocess.check_output(
            [sys.executable, "-c", code, json.dumps(tree)], text=True, env=environment(PYTHONHASHSEED=seed)
        ).strip()
        for seed in ("1", "2")
    }
    assert digests == {fingerprint(tree)}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda: 1, "function"),
        (object(), "object"),
        ({1, 2}, "set"),
        ((1, 2), "tuple"),
        (b"bytes", "bytes"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ({1: "a"}, "key 1"),
    ],
)
def test_values_without_a_stable_form_are_refused_by_name(value: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"train\.steps\[1\].*{kind}"):
        fingerprint({"train": {"steps": [0, value]}})


def test_differences_name_the_fields() -> None:
    old = {"train": {"lr": 3e-4, "betas": [0.9, 0.95]}, "name": "a", "gone": 1, "same": {"x": None}}
    new = {"train": {"lr": 2e-4, "betas": [0.9, 0.99]}, "name": "b", "same": {"x": None}, "more": {"y": [True]}}
    assert differences(old, new) == [
        "train.lr 0.0003 -> 0.0002",
        "train.betas[1] 0.95 -> 0.99",
        "name a -> b",
        "gone 1 -> (absent)",
        "more.y[0] (absent) -> true",
    ]


few_leaves = st.sampled_from([0, False, 0.0, -0.0, "0", None, "", [], {}])
few_trees = st.dictionaries(
    st.sampled_from("ab"),
    st.recursive(few_leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner)),
)


@given(old=few_trees, new=few_trees)
def test_there_are_differences_exactly_where_fingerprints_differ(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert (differences(old, new) == []) == (fingerprint(old) == fingerprint(new))


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({"a": None}, {}, "a null -> (absent)"),
        ({"a": {}}, {"a": {"b": 1}}, "a {} -> (absent)"),
        ({"a": [1]}, {"a": [1, 2]}, "a[1] (absent) -> 2"),
        ({"a": "1"}, {"a": 1}, 'a "1" -> 1'),
    ],
)
def test_differences_at_the_edges(old: dict[str, Any], new: dict[str, Any], line: str) -> None:
    assert differences(old, new)[0] == line
