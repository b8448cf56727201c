"""The table of kills: process x signal x moment. The same command again makes the same, to the byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from signal_table import CASES, Case, Drill

pytestmark = pytest.mark.drill
SEEDS = os.environ.get("OPENLM_DRILL_SEED", "1 2 3").split()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_signal_changes_no_byte(case: Case, seed: str, undisturbed, tmp_path: Path, record_property) -> None:
    tally = Drill(case, undisturbed, tmp_path, seed).run()
    record_property("counted", str(tally))
    record_property("kills", [tally.valid.total(), tally.equal])
    assert tally.wrong == []
    assert tally.equal == tally.valid.total() == 4 * case.times
