"""The workspace for wandb: serialised as its server gets it, and every panel's metric is one that a run logs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.reports.workspace import build_workspace, save_workspace, workspace_json
from ds_stacking.training.tracking import AXES

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """What wandb's server answers to its client, as far as a workspace needs it; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.saved: list[dict[str, Any]] = []
        self.takes = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(content) if self.path == "/graphql" else {"query": "telemetry"}
        answer: dict[str, Any] = {"data": {"viewer": {"id": "1", "entity": "team", "username": "me", "flags": "{}"}}}
        if "upsertView" in asked["query"]:
            self.server.saved.append(asked["variables"])
            view = {"id": "1", "name": asked["variables"]["name"]}
            answer = {"data": {"upsertView": {"view": view, "inserted": True}}}
            if not self.server.takes:
                answer = {"data": None, "errors": [{"message": "permission denied"}]}
        reply = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send(server: Server, home: Path) -> subprocess.CompletedProcess[str]:
    """Call the launcher as a user with a key does."""
    address = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40}
    environment = os.environ | address | {"WANDB_MODE": "online", "HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launchers" / "dashboard.py"), "--project", "stacking"]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)


def test_it_serialises_with_every_section() -> None:
    workspace = json.loads(workspace_json(build_workspace("team", "stacking")))
    assert (workspace["entity"], workspace["project"]) == ("team", "stacking")
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Loss", "Growths", "Blocks after a growth", "Speed and optimisation", "Comparison of arms",
    ]  # fmt: skip
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    metrics = {metric for panel in panels for metric in panel["metrics"] or []}
    kinds = {metric.split("/")[0] for metric in metrics}
    assert kinds <= {"train", "eval", "growth", "layers"}
    assert {panel.get("xAxis") for panel in panels} - {None} <= set(AXES)
    patterns = [panel["metricRegex"] for panel in panels if panel.get("metricRegex")]
    assert any(re.fullmatch(pattern, "after_growth/weight_norm/11") for pattern in patterns)
    assert sum(bool(panel.get("groupBy")) for panel in panels) >= 4, "seeds of an arm become one band"


def test_without_a_network_it_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="give --out FILE"):  # WANDB_MODE is offline in all tests
        save_workspace("team", "stacking")


def test_it_is_sent_whole_and_its_address_is_printed(server: Server, tmp_path: Path) -> None:
    sent = send(server, tmp_path)
    assert sent.returncode == 0, sent.stderr
    assert re.fullmatch(rf"http://127.0.0.1:{server.server_port}/team/stacking\?nw=\w+", sent.stdout.strip())
    (saved,) = server.saved
    assert (saved["entityName"], saved["projectName"]) == ("team", "stacking")
    spec, expected = json.loads(saved["spec"]), json.loads(workspace_json(build_workspace("team", "stacking")))["spec"]
    titles = [
        [panel["config"].get("chartTitle") for section in one["section"]["panelBankConfig"]["sections"]
         for panel in section["panels"]] for one in (spec, expected)
    ]  # fmt: skip
    assert titles[0] == titles[1] and len(titles[0]) > 15


def test_what_the_server_refuses_is_said_in_one_sentence(server: Server, tmp_path: Path) -> None:
    server.takes = False
    sent = send(server, tmp_path)
    last = sent.stderr.strip().splitlines()[-1]
    assert sent.returncode == 2, sent.stderr
    assert last.startswith("error: wandb did not take the workspace") and "--out FILE" in last


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WANDB_MODE": "bogus"}, "wandb did not take the workspace"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "wandb did not take the workspace"),
        ({"WANDB_MODE": "online", "WANDB_BASE_URL": "nonsense"}, "wandb did not take the workspace"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": ""}, "wandb knows no key"),
    ],
)
def test_wandb_without_key_or_with_bad_settings_is_one_sentence(
    tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launchers" / "dashboard.py"), "--project", "stacking"]
    sent = subprocess.run(
        command, env=environment | settings, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    last = sent.stderr.strip().splitlines()[-1]
    assert sent.returncode == 2 and "Traceback" not in sent.stderr, sent.stderr
    assert last.startswith(f"error: {words}") and "--out FILE" in last and len(last) < 400
