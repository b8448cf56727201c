"""A derived recipe is trained by one command, beside a recipe that does not load."""

import subprocess
import sys
from collections.abc import Callable

import dagster as dg
import pytest
from tiny_pipeline import LABELS, REPOSITORY, FinishedPipeline, TinyPipeline, environment


@pytest.mark.drill
def test_a_launch_with_settings_makes_a_run_of_its_own_and_twice_the_same(
    finished: FinishedPipeline, tmp_path, wait_until, instance_of: Callable[[TinyPipeline], dg.DagsterInstance]
):
    """The first run stays as it was; OPENLM_ONLY hides nothing from the command."""
    pipeline = finished.copy(tmp_path)
    (pipeline.root / "recipes" / "bad.yaml").write_text("extends: tiny\nname: bad\ntraining:\n  lrr: 1\n")
    before, instance = pipeline.snapshot("runs", "tiny"), instance_of(pipeline)
    name = "tiny_lr_2e_3_milestones_10k"
    for said in ("checkpoint", "nothing to do"):
        launched = subprocess.run(
            [sys.executable, "-m", "openlm_pipeline", "launch", "tiny", "training.lr=2e-3", "milestones=[10K]"],
            cwd=REPOSITORY, env=environment(pipeline, OPENLM_ONLY="demo"), capture_output=True, text=True,
        )  # fmt: skip
        assert launched.returncode == 0 and said in launched.stdout, launched.stdout + launched.stderr
        run_id = launched.stdout.split(f"launched {name}: run ")[1].split()[0]
        wait_until(lambda: all(run.is_finished for run in instance.get_runs()), "the launched run to end")
        assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.SUCCESS
    assert pipeline.snapshot("runs", "tiny") == before
    assert (pipeline.home / "scorecards" / name / "v1" / LABELS[0]).is_dir()
    assert [path.stem for path in (pipeline.home / "recipes").iterdir()] == [name]


def test_the_job_of_a_bad_recipe_says_its_error(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    bad = pipeline.root / "recipes" / "bad.yaml"
    bad.write_text("extends: tiny\nname: bad\ntraining:\n  lrr: 1\n")
    command = [sys.executable, "-m", "orchestration", "bad"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment(pipeline), capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"training: unknown key 'lrr'; did you mean 'lr'? ({bad}:4)" in " ".join(ended.stdout.split())
