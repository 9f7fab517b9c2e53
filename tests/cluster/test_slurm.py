"""The shipped SLURM scripts on a real cluster: growth on two nodes, requeue, time limit, a dead node, a comparison."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import ROOT, Cluster, missing_programs, wait_for
from tests.corpus import small_options, write_corpus

pytestmark = pytest.mark.cluster

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
START = 200
"""Seconds in which a job must have begun and taken its first step, on a busy machine too."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} missing); apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_corpus(folder / "corpus")
    return folder


def options(folder: Path, *more: str) -> list[str]:
    """The small run, its directory left to the script."""
    return [*(o for o in small_options(folder) if not o.startswith("--output_dir")), "--eval_every=0", *more]


def last_step(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def resumptions(log: Path) -> list[int]:
    return [int(step) for step in re.findall(r"^resumed at step (\d+)", log.read_text(), re.MULTILINE)]


def test_a_requeued_array_task_trains_on_two_nodes_through_a_growth(cluster: Cluster, folder: Path) -> None:
    log, run = folder / "array.log", folder / "array" / "seed-7"
    arguments = options(folder, "--stages=1:40,2:260", "--checkpoint_every=0")
    number = cluster.submit([*TWO_NODES, "--array=7", f"--output={log}"], arguments, RUN_DIR=str(run.parent))
    job = f"{number}_7"
    wait_for(lambda: last_step(run) > 60, "steps after the growth", START)
    identity = (run / "wandb_id.txt").read_text()
    cluster.run("scontrol", "requeue", job)
    wait_for(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the end of the job", START)
    assert cluster.job(job)["JobState"] == "COMPLETED" and cluster.job(job)["Restarts"] == "1", log.read_text()
    (resumed,) = resumptions(log)
    assert 60 < resumed < 300
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 301))
    assert [record["step"] for record in records if record["kind"] == "growth"] == [40]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True and summary["world_size"] == 2
    assert json.loads((run / "config.json").read_text())["seed"] == 7
    assert (run / "wandb_id.txt").read_text() == identity
    wandb_runs = {path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")}
    assert wandb_runs == {identity.strip()}, "both starts belong to the same wandb run"


@pytest.mark.slow
def test_a_job_survives_its_time_limit_and_a_dead_node_and_can_be_cancelled(cluster: Cluster, folder: Path) -> None:
    log, run = folder / "long.log", folder / "long"
    arguments = options(folder, "--stages=2:100000", "--checkpoint_every=20", "--tracking=none")
    job = cluster.submit([*TWO_NODES, f"--output={log}"], arguments, RUN_DIR=str(run))
    wait_for(lambda: last_step(run) > 10, "the first steps", START)

    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 does before the time limit
    wait_for(lambda: len(resumptions(log)) == 1, "the requeue after the time limit", START)
    first = resumptions(log)[0]
    assert (run / "checkpoints" / f"step-{first}").is_dir() and cluster.job(job)["Restarts"] == "1"
    assert "ended with code 75 (time), restart 0" in log.read_text()

    wait_for(lambda: last_step(run) > first + 50, "steps after the requeue", START)
    cluster.kill_node("node1")
    wait_for(lambda: cluster.job(job)["Restarts"] == "2", "the requeue after a node's death", START)
    cluster.start_node("node1")
    wait_for(lambda: len(resumptions(log)) == 2, "the resumption on the node that is back", START)
    second = resumptions(log)[1]
    assert second > first and second % 20 == 0

    wait_for(lambda: last_step(run) > second + 10, "steps after the node's return", START)
    cluster.run("scancel", job)
    wait_for(lambda: cluster.job(job)["JobState"] == "CANCELLED", "the cancellation", START)
    wait_for(lambda: not cluster.processes(f"SLURM_JOB_ID={job}"), "the end of all its processes", START)
    saved = max(int(path.name.split("-")[1]) for path in (run / "checkpoints").iterdir())
    assert saved > second + 10 and last_step(run) == saved
    assert "ended with code 75 (cancelled)" in log.read_text()


def test_the_script_refuses_a_run_directory_that_it_does_not_know(cluster: Cluster, folder: Path) -> None:
    log = folder / "refused.log"
    job = cluster.submit([f"--output={log}"], ["--output_dir=elsewhere"])
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", "the refusal")
    assert cluster.job(job)["ExitCode"] == "2:0" and "give the run directory as RUN_DIR" in log.read_text()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose python starts failing_rank.py in the place of pretrain.py."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {ROOT}/tests/launchers/failing_rank.py "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("fault", "killed", "code", "restarts"),
    [
        ("1:raise:stuck", False, "1:0", "0"),  # the alarm ends the rank that waits in C
        # that rank ends by a signal, and yet the error would come again
        pytest.param("1:raise:deaf", True, "1:0", "0", marks=pytest.mark.slow),
        # started again, and killed again
        pytest.param("1:killed:run", False, "137:0", "1", marks=pytest.mark.slow),
    ],
)
def test_an_error_is_not_requeued_and_a_killed_rank_is(
    cluster: Cluster, folder: Path, faulty: Path, fault: str, killed: bool, code: str, restarts: str
) -> None:
    run = folder / fault.replace(":", "-")
    log = run.with_suffix(".log")
    variables = {"RUN_DIR": str(run), "VENV": str(faulty), "FAULT": fault, "MAX_RESTARTS": "1"}
    job = cluster.submit([*TWO_NODES, f"--output={log}"], options(folder, "--tracking=none"), **variables)
    if killed:
        wait_for(lambda: list(folder.glob(f"{run.name}.failed-*")), "the error of rank 1", START)
        for process in cluster.processes("RANK=0", f"SLURM_JOB_ID={job}"):
            process.kill()
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", "the end of the job", START)
    said = log.read_text()
    assert (cluster.job(job)["ExitCode"], cluster.job(job)["Restarts"]) == (code, restarts), said
    assert ("not requeued, it would fail again: rank 1: RuntimeError: injected" in said) == (restarts == "0")
    assert not list(folder.glob(f"{run.name}.failed-*"))


def test_each_rank_gets_its_share_of_the_cores_or_the_job_is_refused(cluster: Cluster, folder: Path) -> None:
    log = folder / "cores.log"
    gpus = ["--ntasks-per-node=2", "--gpus-per-node=2", f"--output={log}", "--open-mode=truncate"]
    job = cluster.submit(gpus, options(folder))
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", "the refusal")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert log.read_text().startswith("error: each rank has one CPU core, which starves its GPU; add --cpus-per-task")
    show = folder / "show.sh"
    show.write_text("#!/bin/bash\nsource launchers/slurm/cores.sh\nsrun sh -c 'echo $SLURM_CPUS_PER_TASK cores'\n")
    for more, cores in ((["--exclusive"], 4), (["--cpus-per-task=3"], 3)):
        cluster.run("sbatch", "--wait", *gpus, *more, str(show))
        assert log.read_text() == f"{cores} cores\n" * 2


@pytest.mark.slow
def test_a_second_job_in_the_same_directory_is_refused_and_harms_nothing(cluster: Cluster, folder: Path) -> None:
    run, logs = folder / "double", [folder / f"double-{number}.log" for number in range(3)]
    arguments = options(folder, "--stages=2:100000", "--checkpoint_every=20", "--tracking=none")
    first = cluster.submit([*TWO_NODES, f"--output={logs[0]}"], arguments, RUN_DIR=str(run))
    wait_for(lambda: last_step(run) > 50, "the first steps", START)

    second = cluster.submit([*TWO_NODES, f"--output={logs[1]}"], arguments, RUN_DIR=str(run))
    wait_for(lambda: cluster.job(second)["JobState"] == "FAILED", "the refusal of the second job", START)
    assert cluster.job(second)["ExitCode"] == "2:0" and cluster.job(second)["Restarts"] == "0"
    assert re.search(rf"is in use by process \d+ of SLURM job {first} on ", logs[1].read_text())
    step = last_step(run)
    wait_for(lambda: last_step(run) > step + 20, "steps of the first job after that", START)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)), "no line is lost"

    cluster.run("scancel", first)
    wait_for(lambda: not cluster.processes(f"SLURM_JOB_ID={first}"), "the end of the first job", START)
    saved = max(int(path.name.split("-")[1]) for path in (run / "checkpoints").iterdir())
    cluster.submit([*TWO_NODES, f"--output={logs[2]}"], arguments, RUN_DIR=str(run))
    wait_for(lambda: logs[2].exists() and resumptions(logs[2]), "the third job's start", START)
    assert resumptions(logs[2]) == [saved] and "looking for up to" not in logs[2].read_text()
    (run / "stop").touch()
    wait_for(lambda: "ended with code 75 (asked)" in logs[2].read_text(), "the end that was asked for", START)


@pytest.mark.slow
def test_a_comparison_is_an_array_whose_tasks_stop_and_go_on(cluster: Cluster, folder: Path) -> None:
    compared = folder / "compared"
    arguments = options(folder, "--stages=1:60,2:240", "--checkpoint_every=0", "--tracking=none")
    arguments += ["--arms=scratch,stack", "--seeds=1"]
    output = f"--output={folder}/compare-%a.log"
    number = cluster.submit(
        ["--array=0-2", "--ntasks=1", output], arguments, script="compare.sbatch", RUN_DIR=str(compared)
    )
    task = f"{number}_2"  # after scratch and shallow_1
    wait_for(lambda: last_step(compared / "stack" / "flops" / "seed-1") > 20, "steps of the last task", START)
    cluster.run("scancel", "--batch", "--signal=USR1", task)  # as --signal=B:USR1@120 does before the time limit
    wait_for(lambda: cluster.job(task)["Restarts"] == "1", "the requeue", START)
    for job in (f"{number}_0", f"{number}_1", task):
        wait_for(lambda job=job: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the end of a task", START)
        assert cluster.job(job)["JobState"] == "COMPLETED", (folder / f"compare-{job[-1]}.log").read_text()
    log = (compared / "stack" / "flops" / "seed-1.log").read_text()
    assert len(re.findall(r"^resumed at step \d+", log, re.MULTILINE)) == 1
    report = json.loads((compared / "report" / "report.json").read_text())
    assert not report["missing"] and not report["failed"]
    assert {end["arm"] for end in report["ends"]} == {"scratch", "shallow_1", "stack"}
