"""No foreign module in our programs' place, nor ours in another's, whatever the working folder and the path hold."""

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from small_run import SmallRun
from waiting import wait_until

from openlm_pipeline.runs.programs import dagster_home, programs_folder, starting

REPOSITORY = Path(__file__).parents[1]
NAMES = ("train", "assets", "orchestration")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A working folder with a program and packages of our names, each of which ends whoever runs it."""
    folder = tmp_path / "work"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('another {name} was imported')")
    (folder / "train.py").write_text("raise SystemExit('another train.py was run')")
    return folder


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_programs_start_as_ours_in_a_folder_with_others(foreign: Path) -> None:
    for path in ("", str(foreign)):
        helped = run([sys.executable, *starting("train"), "--help"], foreign, PYTHONPATH=path)
        assert "torchrun -m train" in helped.stdout and "another" not in helped.stderr, helped.stderr
        variables = {"PYTHONPATH": path, "DAGSTER_HOME": str(foreign / "dagster")}
        refused = run([sys.executable, *starting("orchestration"), "nosuch"], foreign, **variables)
        assert "there is no job 'nosuch'" in refused.stderr, refused.stderr
        assert (foreign / "dagster" / "dagster.yaml").exists()


def workers(launcher: psutil.Popen) -> list[psutil.Process]:
    """The trainers below torchrun, or below what started it."""
    return [process for process in launcher.children(recursive=True) if "LOCAL_RANK" in process.environ()]


def test_training_is_ours_in_a_folder_with_others_and_ctrl_c_saves_and_stops_it(foreign: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to `openlm train` and all that it started at once."""
    small = SmallRun(tmp_path, (10, 5000))
    command = [sys.executable, "-m", "openlm_pipeline", "train", str(small.recipe), "--allow=repeat_data"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OPENLM_HOME": str(small.home.root), "PYTHONSAFEPATH": "1"}
    with (tmp_path / "openlm.log").open("wb") as log:
        terminal = psutil.Popen(command, cwd=foreign, stdout=log, stderr=log, env=environment, start_new_session=True)
    wait_until(lambda: max(small.losses(), default=0) > 12, terminal)
    trainers = workers(terminal)
    assert trainers
    os.killpg(terminal.pid, signal.SIGINT)
    assert terminal.wait(timeout=300) != 0
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in trainers)
    outcome = small.run.read_outcome()
    assert outcome["status"] == "preempted"
    assert outcome["step"] in small.steps_on_disk()


def test_another_program_does_not_find_ours(tmp_path: Path) -> None:
    """As an editable install: only the library is importable from elsewhere."""
    find = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) for n in sys.argv[1:]))"
    assert run([sys.executable, "-c", find, *NAMES], tmp_path).returncode == 0


def test_dagsters_home_is_found_or_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert dagster_home() == tmp_path / "home" / "dagster"
    ours = (programs_folder() / "orchestration" / "dagster.yaml").read_text()
    assert (tmp_path / "home" / "dagster" / "dagster.yaml").read_text() == ours
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "mine"))
    assert dagster_home() == tmp_path / "mine"
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.chdir(REPOSITORY)
    assert dagster_home() == REPOSITORY / ".dagster"
    assert (REPOSITORY / ".dagster" / "dagster.yaml").read_text() == ours


@pytest.mark.drill
def test_a_wheel_is_the_whole_product(foreign: Path, tmp_path: Path) -> None:
    """Unpacked where nothing of the checkout is found, it trains in a folder with others of our names."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "dist"), "."]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(source)], check=True)
    subprocess.run(build, cwd=source, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    assert {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")} == {"openlm_pipeline"}
    for name in NAMES:
        inside = site / "openlm_pipeline" / "programs" / name
        shipped = {
            str(p.relative_to(source / name)) for p in (source / name).rglob("*") if p.suffix in (".py", ".yaml")
        }
        assert {str(p.relative_to(inside)) for p in inside.rglob("*") if p.is_file()} == shipped
    small = SmallRun(tmp_path, (2,))
    openlm = [sys.executable, "-m", "openlm_pipeline", "train", str(small.recipe)]
    variables = {"OPENLM_HOME": str(small.home.root), "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    trained = run(openlm, foreign, **variables)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    where = run([sys.executable, "-c", "import openlm_pipeline; print(openlm_pipeline.__file__)"], foreign, **variables)
    assert where.stdout.strip().startswith(str(site))
