"""A real Slurm on this machine: munged, slurmctld and two slurmd as nodes `a` and `b`, all from a temporary folder.

Needs root and Debian's packages `slurmctld slurmd slurm-client munge`; a test that asks for it is skipped without.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
CLEAR_STATE = "-c"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmUser=root
SlurmdUser=root
MpiDefault=none
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=main Nodes=a,b Default=YES MaxTime=INFINITE
"""


def command(*arguments: str) -> str:
    """Output of a Slurm program, which must succeed."""
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=300).stdout


def job_ids() -> list[str]:
    """Jobs that did not end."""
    return command("squeue", "--noheader", "--format=%i").split()


def job_field(job_id: str, name: str) -> str:
    """A field of `scontrol show job`."""
    fields = command("scontrol", "--oneliner", "show", "job", job_id).split()
    return dict(field.partition("=")[::2] for field in fields)[name]


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class SlurmCluster:
    """The daemons, and what happens to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, psutil.Popen] = {}

    def start(self, *command: str) -> psutil.Popen:
        """Start a daemon that ends with this process, in the place of one of the same command line that was killed."""
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            process = psutil.Popen(["setpriv", "--pdeathsig=TERM", *command], stdout=out, stderr=subprocess.STDOUT)
        self._daemons[" ".join(word for word in command if word != CLEAR_STATE)] = process
        return process

    def kill_controller(self) -> None:
        """As a crash of its machine would, once its state is on disk: it writes jobs seconds after they change."""
        marks = {job_id: uuid.uuid4().hex for job_id in job_ids()}
        for job_id, mark in marks.items():
            command("scontrol", "update", f"JobId={job_id}", f"Comment={mark}")
        state = self.folder / "state" / "job_state"
        wait_until(lambda: all(mark.encode() in state.read_bytes() for mark in marks.values()), seconds=120)
        process = self._daemons["slurmctld -D"]
        process.kill()
        process.wait()

    def start_controller(self) -> None:
        """Start it again with the state that it left, and wait until it answers."""
        wait_until(lambda: len(_states()) == 2, self.start("slurmctld", "-D"), seconds=300)

    def stop(self) -> None:
        for process in reversed(self._daemons.values()):
            process.terminate()
            process.wait(timeout=30)


def _start(folder: Path) -> Iterator[list[str]]:
    """The commands of the daemons in the foreground, each when the one before may be there."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    paths = [
        f"--{option}={folder}/munge.{option.removesuffix('-file')}"
        for option in ("socket", "pid-file", "log-file", "seed-file")
    ]
    yield ["munged", "--foreground", "--force", f"--key-file={key}", *paths]
    yield ["slurmctld", "-D", CLEAR_STATE]
    yield ["slurmd", "-D", "-N", "a"]
    yield ["slurmd", "-D", "-N", "b"]


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A running cluster, which `SLURM_CONF` names while tests use it."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"Slurm is not installed: there is no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root only")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))  # a socket's path is short
        (folder / "state").mkdir()
        host = socket.gethostname().partition(".")[0]
        configuration = folder / "slurm.conf"
        settings = {"host": host, "folder": folder, "ports": _free_ports(3), "cpus": psutil.cpu_count()}
        configuration.write_text(CONFIGURATION.format(**settings))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(configuration))
        cluster = SlurmCluster(folder)
        stack.callback(cluster.stop)
        for daemon in _start(folder):
            process = cluster.start(*daemon)
            if daemon[0] == "munged":
                wait_until((folder / "munge.socket").exists, process, seconds=300)
        wait_until(lambda: _states() == ["idle", "idle"], process, seconds=300)
        stack.callback(_cancel_all)
        yield cluster


def _states() -> list[str]:
    """State of each node; none while the controller does not answer."""
    done = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%T"], capture_output=True, text=True)
    return done.stdout.split()


def _cancel_all() -> None:
    for job_id in job_ids():
        command("scancel", "--full", "--signal=KILL", job_id)
        command("scancel", job_id)
    wait_until(lambda: not job_ids(), seconds=300)
