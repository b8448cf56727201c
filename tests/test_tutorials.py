"""The tutorial on own data works as it stands; that on Slurm as far as there is no cluster."""

import json
import shlex
import sysconfig
from pathlib import Path

import yaml
from commands import openlm

from openlm_pipeline.experiments import load_experiment

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return (DOCS / page).read_text().split("```")[1::2]


def test_a_model_of_own_text(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    rows = [json.dumps({"text": path.read_text(errors="replace")}) + "\n" for path in sources]
    for n in range(3):
        (tmp_path / "texts" / f"{n}.jsonl").write_text("".join(rows[n::3]))
    monkeypatch.chdir(tmp_path)
    exported = next(block for block in blocks("tutorial_own_data.md") if block.strip().startswith("export "))
    variables = dict(word.split("=", 1) for word in shlex.split(exported.replace("$PWD", str(tmp_path)))[1:])
    variables["OMP_NUM_THREADS"] = "1"
    recipe = next(block.removeprefix("yaml\n") for block in blocks("tutorial_own_data.md") if block.startswith("yaml"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(recipe)
    lines = [
        line for block in blocks("tutorial_own_data.md") for line in block.splitlines() if line.startswith("openlm")
    ]
    said = {}
    for line in lines:
        result = openlm(*shlex.split(line)[1:], variables=variables)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        said[line] = result.stdout
    assert "my_text has about" in said["openlm plan mine"]
    assert "milestone t0400K" in said["openlm train mine"] and "completed" in said["openlm show mine"]
    assert (tmp_path / "home" / "reports" / "mine" / "v1" / "report.html").exists()


def test_the_recipe_for_slurm_is_valid(tmp_path, monkeypatch):
    (recipe,) = [block.removeprefix("yaml\n") for block in blocks("tutorial_slurm.md") if block.startswith("yaml")]
    assert yaml.safe_load(recipe)["name"] == "big"
    (tmp_path / "big.yaml").write_text(recipe)
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path))
    assert load_experiment("big").launcher.world_size == 16
    variables = {"OPENLM_RECIPES": str(tmp_path), "OPENLM_HOME": str(tmp_path)}
    result = openlm("launch", "big", "--dry-run", variables=variables)
    assert "#SBATCH --nodes=2" in result.stdout, result.stderr
