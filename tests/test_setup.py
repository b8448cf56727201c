"""What sets the project up elsewhere: `make setup`, the lock file, the image."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PIP = """#!/bin/sh
echo "Collecting torch==2.13.0 (from openlm-pipeline==0.1.0)"
echo "  Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)"
echo "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (530.1 MB)"
"""


def _setup(folder: Path, pip: str) -> subprocess.CompletedProcess:
    """`make setup` with programs that stand in for the interpreter and for its environment's pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name, text in {"pip": PIP + pip, "python": "#!/bin/sh\nmkdir -p .venv/bin; cp pip .venv/bin/python\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    command = ["make", "--no-print-directory", "setup", "PYTHON=./python"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_setup_shows_the_large_downloads(tmp_path):
    result = _setup(tmp_path, 'echo "Successfully installed openlm-pipeline-0.1.0"\n')
    assert result.returncode == 0, result.stderr
    shown = [line.split()[1] for line in result.stdout.splitlines() if "Downloading" in line]
    assert shown == ["torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"]
    assert "Collecting" in (tmp_path / ".venv" / "install.log").read_text()
    assert (tmp_path / ".venv" / ".ready").exists()


@pytest.mark.parametrize("ending", ['echo "ERROR: No space left on device" >&2; exit 1\n', "kill -9 $$\n"])
def test_a_failed_install_says_why_and_is_done_again(tmp_path, ending):
    result = _setup(tmp_path, ending)
    assert result.returncode != 0
    assert ("pip failed: No space left on device" in result.stderr) == ("ERROR" in ending)
    assert not (tmp_path / ".venv" / ".ready").exists()


def test_the_lock_file_has_the_pinned_versions_and_this_projects_requirements():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    versions: dict[str, set[str]] = {}
    for package in lock["package"]:
        versions.setdefault(package["name"], set()).add(package.get("version", ""))
    pinned = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert [f"{n}=={v}" for n, v in pinned if v not in versions.get(canonicalize_name(n), ())] == []
    (ours,) = [p for p in lock["package"] if p["name"] == "openlm-pipeline"]
    locked = {(r["name"], str(SpecifierSet(r.get("specifier", "")))) for r in ours["metadata"]["requires-dist"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = map(Requirement, [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])])
    wanted = {(canonicalize_name(r.name), str(r.specifier)) for r in named}
    assert wanted ^ locked <= {("openlm-pipeline", "")}, (
        "`uv lock --default-index https://pypi.org/simple` makes it anew"
    )


def test_the_lock_file_names_no_place_but_the_public_index():
    text = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
    assert "file://" not in text
    assert text.count(", hash = ") == text.count("{ url = ")


def test_the_image_takes_what_is_there_and_runs_as_no_root():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    sources = [s for step in steps if step[0] == "COPY" and "--from=build" not in step for s in step[1:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sources == allowed
    assert all((ROOT / name).exists() for name in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"setup.py", project["readme"], "openlm_pipeline", "train", "assets", "orchestration"} <= set(sources)
    assert [int(step[1]) > 0 for step in steps if step[0] == "USER"] == [True]
    arguments = dict(step[1].partition("=")[::2] for step in steps if step[0] == "ARG")
    assert arguments.keys() == {"PYTHON", "TORCH_INDEX", "EXTRAS"}
    assert set(arguments["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
