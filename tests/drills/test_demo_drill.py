"""The demo, killed in every phase, makes what an undisturbed one makes."""

import demo_drill
import pytest


@pytest.mark.drill
def test_the_demo_killed_six_times_makes_the_same(tmp_path):
    demo_drill.drill(tmp_path, print)
