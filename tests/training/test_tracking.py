"""Tracking: metrics.jsonl is always whole, and wandb can neither stop a run nor learn a secret."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig
from ds_stacking.training import tracking
from ds_stacking.training.metrics_file import MetricsFile
from ds_stacking.training.tracking import (
    FanOut,
    WandbTracker,
    check_run_id,
    known_fields,
    make_tracker,
)

TRAIN = {
    "kind": "train",
    "step": 10,
    "stage": 0,
    "layers": 2,
    "loss": 5.5,
    "tokens": 2048,
    "flops": 1e20,
    "seconds": 3.5,
}
EVAL = {"kind": "eval", "step": 10, "stage": 0, "layers": 2, "eval_loss": 5.25, "tokens": 2048, "flops": 1e20}
GROWTH = {"kind": "growth", "step": 10, "stage": 1, "from_layers": 2, "to_layers": 4, "eval_loss_before": None}
LATER = {"kind": "after_growth", "step": 12, "stage": 1, "layers": 4, "copy_cosine_master": {"2": 0.5, "3": None}}
KEY = "0123456789" * 4


def read_lines(path: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_file_appends_and_replaces_what_json_cannot_say(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.log(TRAIN | {"loss": float("nan"), "nested": [float("inf"), {"x": -float("inf")}, 1.5]})
    assert read_lines(path) == [TRAIN | {"loss": None, "nested": [None, {"x": None}, 1.5]}]  # flushed, not yet closed
    first.close()
    second = MetricsFile(path)
    second.log(EVAL)
    second.close()
    assert [record["kind"] for record in read_lines(path)] == ["train", "eval"]


def test_metrics_file_drops_the_line_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(TRAIN) + '\n{"kind": "tra')
    file = MetricsFile(path)
    file.log(EVAL)
    file.close()
    assert read_lines(path) == [TRAIN, EVAL]


@pytest.mark.parametrize("written", [None, 7])
def test_metrics_wait_while_the_disk_is_full(tmp_path, monkeypatch, caplog, written):
    """The disk takes nothing of a line, or its beginning."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(TRAIN)
    whole = file.file

    class Full:
        name = whole.name
        seek, truncate = whole.seek, whole.truncate

        def write(self, content):
            if written is None:
                raise OSError(28, "No space left on device")
            return whole.write(content[:written])

    file.file = Full()
    file.log(EVAL)
    assert read_lines(path) == [TRAIN] and "its lines wait" in caplog.text
    file.file = whole
    file.log(TRAIN)
    file.close()
    assert read_lines(path) == [TRAIN, EVAL, TRAIN]


def test_metrics_file_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="output_dir"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl")


def test_other_ranks_write_nothing(tmp_path):
    tracker = make_tracker(tmp_path, tracking="wandb", name="run", config={}, rank=1)
    tracker.log(TRAIN)
    tracker.close()
    assert not tracker.trackers
    assert not list(tmp_path.iterdir())


def test_tracking_none_does_not_touch_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    tracker = make_tracker(tmp_path, tracking="none", name="run", config={})
    tracker.log(TRAIN)
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_known_fields_reach_wandb():
    config = RunConfig(stages="2:3,4:5").to_dict()
    secret = {"api_key": KEY, "model": config["model"] | {"token": KEY}, "stages": [{"layers": 2, "password": KEY}]}
    assert known_fields(config) == config
    assert KEY not in json.dumps(known_fields(config | secret))


class Fake(ModuleType):
    """A wandb, its settings and its run in one, that works until the call named in `fails`."""

    def __init__(self, fails: str = "", mode: str = "offline") -> None:
        super().__init__("wandb")
        self.fails, self.mode, self.calls, self.init_options = fails, mode, [], {}
        self.base_url, self.project, self.run_name, self.url, self.dir = (
            "http://localhost:9",
            None,
            None,
            "",
            "x/files",
        )
        self.settings, self.Settings = self, Call(self, "Settings")

    def __getattr__(self, name: str):
        return Call(self, name)


class Call:
    """One function of the fake."""

    model_fields = ()

    def __init__(self, fake: Fake, name: str) -> None:
        self.fake, self.name = fake, name

    def __call__(self, *args, **kwargs):
        self.fake.calls.append(self.name)
        if self.name == self.fake.fails:
            raise RuntimeError("wandb lost its temper")
        if self.name == "init":
            self.fake.init_options = kwargs
            self.fake.offline = kwargs["mode"] == "offline"
        return self.fake


@pytest.mark.parametrize("fails", ["setup", "Settings", "init", "define_metric", "log", "finish"])
def test_a_failing_wandb_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog, fails):
    fake = Fake(fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = make_tracker(tmp_path, tracking="wandb", name="run", config={})
    for step in range(3):
        tracker.log(TRAIN | {"step": step})
    tracker.close()
    tracker.trackers[1].close()
    assert fails in fake.calls
    assert fake.calls.count(fails) == 1
    assert caplog.text.count("wandb failed (RuntimeError: wandb lost its temper)") == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_a_hanging_wandb_delays_only_the_end_and_its_service_is_stopped(tmp_path, monkeypatch, caplog):
    fake, hang = Fake(), threading.Event()
    fake.log = lambda row: hang.wait()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "QUEUE_LENGTH", 5)
    (tmp_path / "wandb-core").symlink_to(shutil.which("sleep"))
    service = subprocess.Popen([tmp_path / "wandb-core", "20"])
    tracker = WandbTracker(tmp_path, name="run", config={})
    for step in range(20):
        tracker.log(TRAIN | {"step": step})
    tracker.close()
    hang.set()
    assert service.wait() == -signal.SIGKILL
    assert "did not finish" in caplog.text


def test_a_slow_start_loses_no_record(tmp_path, monkeypatch):
    fake, rows = Fake(), []
    fake.log = rows.append
    fake.setup = lambda: time.sleep(0.3) or fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracking, "START_SECONDS", 0.01)
    tracker = WandbTracker(tmp_path, name="run", config={})
    assert tracker.where == "not started yet"
    tracker.log(TRAIN)
    tracker.close()
    assert [row["train/loss"] for row in rows] == [5.5]


def test_a_missing_wandb_is_only_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = WandbTracker(tmp_path, name="run", config={})
    tracker.log(TRAIN)
    tracker.close()
    assert "metrics.jsonl has it all" in caplog.text


@pytest.mark.parametrize(
    ("reachable", "key", "mode"), [(True, True, "online"), (True, False, "offline"), (False, True, "offline")]
)
def test_online_needs_a_network_and_a_key(tmp_path, monkeypatch, reachable, key, mode):
    fake = Fake(mode="online")
    fake.login = lambda prompt: key
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = WandbTracker(tmp_path, name="run", config={}, answers=lambda url: reachable)
    assert fake.init_options["mode"] == mode
    assert fake.init_options["resume"] == "allow"
    assert fake.init_options["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert tracker.where.startswith("offline") == (mode == "offline")


def test_a_refused_key_means_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", Fake("login", mode="online"))
    tracker = WandbTracker(tmp_path, name="run", config={}, answers=lambda url: True)
    assert tracker.where.startswith("offline")
    assert "refuses to log in" in caplog.text


def test_nothing_answers_at_a_closed_port():
    assert not tracking.reachable("http://127.0.0.1:9")


SCRIPT = """
import json, sys
from ds_stacking.training.tracking import make_tracker
run_dir, records, config = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tracker = make_tracker(run_dir, tracking="wandb", name="quickstart", config=config)
for record in records:
    tracker.log(record)
tracker.close()
"""


def run_wandb(run_dir: Path, **env: str) -> subprocess.CompletedProcess:
    """The real wandb in a process of its own, with secrets on its command line, in its environment and its config."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    config = RunConfig().to_dict() | {"api_key": KEY}
    arguments = [str(run_dir), json.dumps([TRAIN, EVAL, GROWTH, LATER]), json.dumps(config), f"--token={KEY}"]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=clean | {"WANDB_API_KEY": KEY} | env,
        cwd=run_dir,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def logged(run_dir: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Configuration and rows of the newest offline run: a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = max(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime).read_bytes()
    config, rows, place, parts = {}, [], 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768  # the rest of a block is padding
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a record ends here
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {"/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json) for item in items}
                )
            for item in record.run.config.update:
                config[item.key] = json.loads(item.value_json)
    return config, rows


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run_wandb(run_dir, WANDB_MODE="offline")


def test_offline_wandb_keeps_what_was_logged(offline_run):
    run_dir, _ = offline_run
    config, rows = logged(run_dir)
    assert config["lr"] == RunConfig().lr
    assert config["model"]["hidden_size"] == RunConfig().model.hidden_size
    train, evaluation, growth, later = ({key: row[key] for key in row if not key.startswith("_")} for row in rows)
    shared = {"step": 10, "stage": 0, "layers": 2, "tokens": 2048, "flops": 1e20}
    assert train == shared | {"train/loss": 5.5, "seconds": 3.5}
    assert evaluation == shared | {"eval/loss": 5.25}
    assert growth == {"step": 10, "stage": 1, "growth/from_layers": 2, "growth/to_layers": 4}
    assert later == {"step": 12, "stage": 1, "layers": 4, "after_growth/copy_cosine_master/2": 0.5}


def test_wandb_is_quiet_and_keeps_no_secret(offline_run):
    run_dir, process = offline_run
    assert process.stdout == process.stderr == ""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_resumed_run_keeps_its_id(offline_run):
    run_dir, _ = offline_run
    first = (run_dir / "wandb_id.txt").read_text().strip()
    run_wandb(run_dir, WANDB_MODE="offline")
    runs = {path.name for path in run_dir.glob("wandb/offline-run-*/*.wandb")}
    assert runs == {f"run-{first}.wandb"}
    assert len(read_lines(run_dir / "metrics.jsonl")) == 8


def test_disabled_wandb_leaves_no_files(tmp_path):
    run_wandb(tmp_path, WANDB_MODE="disabled")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_fan_out_reaches_every_tracker(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    tracker = FanOut([MetricsFile(path) for path in paths])
    tracker.log(TRAIN)
    tracker.close()
    assert [read_lines(path) for path in paths] == [[TRAIN], [TRAIN]]


@pytest.mark.parametrize("content", ["", "password = hunter2", "A" * 16, "a" * 65, "../x", "a b", "a" * 5000])
def test_what_is_no_id_is_not_sent(tmp_path, content):
    (tmp_path / "wandb_id.txt").write_text(content)
    with pytest.raises(UserError, match="wandb_id.txt (holds no id|has more than 1,000 bytes)"):
        check_run_id(tmp_path)


def test_an_id_is_not_read_through_a_link(tmp_path):
    (tmp_path / "secret").write_text("0123456789abcdef")
    (tmp_path / "run").mkdir()
    assert check_run_id(tmp_path / "run") is None
    (tmp_path / "run" / "wandb_id.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link to"):
        check_run_id(tmp_path / "run")


def test_an_id_is_kept(tmp_path):
    first = tracking.make_run_id(tmp_path)
    assert tracking.make_run_id(tmp_path) == check_run_id(tmp_path) == first


def test_wandb_does_not_write_through_a_link(tmp_path, monkeypatch, caplog):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "outside")
    tracker = WandbTracker(tmp_path / "run", name="run", config={})
    tracker.close()
    assert tracker.where == "off" and "is a link to" in caplog.text
