"""`openlm launch --dry-run`: what would be submitted, and nothing started or shown that is secret."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_run import BATCH, RECIPE, REPOSITORY, SmallRun

SECRET = "not-for-anybody-to-see"
LAUNCHERS = {
    "local": "launcher: {processes: 2}",
    "slurm": "launcher: {kind: slurm, nodes: 2, slurm: {partition: gpu, setup: ['export MY=$MY_API_TOKEN']}}",
    "kubernetes": "launcher: {kind: kubernetes, kubernetes: {image: i, volume_claim: c, env_from_secrets: [wandb]}}",
}


@pytest.fixture
def dry_run(tmp_path: Path):
    """Run the command on the recipe of a launcher's kind, and check that the home is as it was."""
    small = SmallRun(tmp_path, (2,))
    (tmp_path / "recipes").mkdir()
    text = RECIPE.format(batch=BATCH, milestones=[2 * BATCH])
    for kind, launcher in LAUNCHERS.items():
        recipe = text.replace("name: small\n", f"name: {kind}_run\n") + launcher + "\n"
        (tmp_path / "recipes" / f"{kind}_run.yaml").write_text(recipe)

    def run(kind: str, *more: str) -> subprocess.CompletedProcess[str]:
        before = sorted(small.home.root.rglob("*"))
        command = [sys.executable, "-m", "openlm_pipeline", "launch", f"{kind}_run", "--dry-run", *more]
        own = {"OPENLM_HOME": str(small.home.root), "OPENLM_RECIPES": str(tmp_path / "recipes")}
        own |= {"DAGSTER_HOME": str(tmp_path / "dagster"), "PYTHONPATH": str(REPOSITORY)}
        own |= {"WANDB_API_KEY": SECRET, "MY_API_TOKEN": SECRET + "-either", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env={**os.environ, **own}, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(small.home.root.rglob("*")) == before
        assert not (tmp_path / "dagster").exists()
        assert SECRET not in done.stdout + done.stderr
        return done

    return run


def test_a_local_run_is_a_torchrun_command(dry_run, tmp_path: Path):
    words = shlex.split(dry_run("local").stdout)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in words
    assert words[-2:] == [f"{tmp_path}/home/runs/local_run/v1/experiment.yaml", f"--until={2 * BATCH}"]


def test_a_slurm_run_is_its_batch_script_with_variables_by_name(dry_run):
    done = dry_run("slurm")
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --partition=gpu\n" in done.stdout
    (export,) = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH --export=")]
    assert "WANDB_API_KEY" in export
    assert "\nexport MY=$MY_API_TOKEN\n" in done.stdout
    assert "slurm_run" in done.stderr
    checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_kubernetes_run_is_its_manifest_with_secrets_by_name(dry_run):
    job = yaml.safe_load(dry_run("kubernetes").stdout)
    assert (job["kind"], job["metadata"]["name"]) == ("Job", "openlm-kubernetes-run-v1")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert container["command"][-1] == f"--until={2 * BATCH}"


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_only_the_consent_to_a_cpu_is_passed_on_to_the_trainer(dry_run, kind: str):
    assert "--allow=" not in dry_run(kind, "--allow", "supersede,remake").stdout
    assert dry_run(kind, "--allow", "supersede,cpu").stdout.count("--allow=cpu") == 1
