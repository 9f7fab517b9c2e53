"""A SLURM cluster of two nodes on this host: munged, slurmctld and two slurmd in a temporary folder.

No container and no root are needed: the daemons run as whoever runs the tests.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NODES = ("node0", "node1")
NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")

SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=8
KillWait=30
MinJobAge=600
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:2 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=node0,node1 Default=YES MaxTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM that this machine lacks."""
    return [name for name in NEEDED if shutil.which(name, path=_path()) is None]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until `condition()` holds. Raises AssertionError where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds:.0f} s"
        time.sleep(0.1)


class Cluster:
    """The daemons, and the commands of a user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        values = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "ports": _free_ports(3)}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, **values))
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # no GPUs
        options = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        options |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        places = [f"--{option}={self.folder / name}" for option, name in options.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *places)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.states() == {node: "IDLE" for node in NODES}, "both nodes idle")

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything that runs below it, as when the machine loses its power."""
        self.daemons.pop(node).kill()
        doomed = self.processes(f"SLURMD_NODENAME={node}")
        doomed += [process.parent() for process in doomed if process.parent().name() == "slurmstepd"]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self, *variables: str) -> list[psutil.Process]:
        """Processes of jobs of this cluster that have all of `variables` (NAME=value) in their environment."""
        wanted = dict(variable.split("=", 1) for variable in variables) | {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if "SLURM_JOB_ID" in environment and wanted.items() <= environment.items():
                    found.append(process)
        return found

    def stop(self) -> None:
        """Cancel what runs and end all daemons."""
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, timeout=30)
            wait_for(lambda: not self.run("squeue", "--noheader"), "an empty queue", 40)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, **variables: str) -> str:
        """What a command of SLURM prints. Raises CalledProcessError."""
        environment = self.environment | variables
        done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def submit(
        self, options: list[str], arguments: list[str], script: str = "pretrain.sbatch", **variables: str
    ) -> str:
        """Submit a shipped script; returns the job's number."""
        variables = {"VENV": str(Path(sys.executable).parents[1])} | variables
        script = f"launchers/slurm/{script}"
        return self.run("sbatch", "--parsable", *options, script, *arguments, **variables).split(";")[0]

    def states(self) -> dict[str, str]:
        """State of every node."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return {name: state.upper() for name, state in map(str.split, lines)}

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number)))

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, cwd=self.folder)
        self.daemons[name] = process


def _path() -> str:
    """Daemons lie in sbin folders, which a user's PATH may lack."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/local/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports
