"""Shared by all tests. Multi-rank tests count themselves: a session in which one was skipped fails.

Tests on a SLURM cluster are skipped on a machine without SLURM, unless REQUIRE_CLUSTER is set, as CI does.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

COUNTED = ("distributed", "cluster")
MUST_RUN = COUNTED if os.environ.get("REQUIRE_CLUSTER") else ("distributed",)
seen: dict[str, set[str]] = {marker: set() for marker in COUNTED}
passed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note which tests there were and which passed; with several workers, in the process that hears of all."""
    for marker in COUNTED:
        if marker in report.keywords:
            seen[marker].add(report.nodeid)
    if report.when == "call" and report.passed:
        passed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail where a test that must run did not."""
    missing = [node for marker in MUST_RUN for node in seen[marker] if node not in passed]
    if missing and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of the tests that must run did."""
    for marker, nodes in seen.items():
        if nodes:
            terminalreporter.write_line(f"{marker}: {len(nodes & passed)} of {len(nodes)} ran and passed")
