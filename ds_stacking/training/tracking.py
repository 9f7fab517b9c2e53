"""Where event records go: metrics.jsonl always, Weights & Biases when wanted.

wandb is a guest: it may lose its network, its key or its temper, and the run goes on. Every call is guarded; the first
failure gives one warning and ends its part, while metrics.jsonl still holds everything. Only rank 0 tracks.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import queue
import re
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_text
from ds_stacking.common.own_files import make_inside, read_inside
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.training.metrics_file import MetricsFile, Record
from ds_stacking.training.run_directory import METRICS, WANDB, WANDB_ID

logger = logging.getLogger(__name__)

AXES = ("step", "tokens", "flops", "seconds", "training_seconds", "cpu_seconds")
"""What a loss may be drawn against."""
SHARED = (*AXES, "stage", "layers")
"""Fields that keep their name in wandb; the others are prefixed by the record's kind."""
INIT_SECONDS = 20
"""Longest time that wandb may take to reach its server."""
START_SECONDS = 30
"""Longest time that a run waits for wandb before it goes on without having heard from it."""
UPLOAD_SECONDS = 60
"""Longest time that the upload of what is left may take at the end."""
FINISH_SECONDS = 90
"""Longest time that a run waits for wandb at the end."""
Answers = Callable[[str], bool]
"""Whether a server answers."""
RUN_ID = re.compile(r"[a-z0-9]{1,64}")
QUEUE_LENGTH = 10_000
"""Records that may wait for wandb; later ones are dropped."""


class Tracker(Protocol):
    """Takes event records: dictionaries with "kind" (train, eval, growth), "step" and the ledger's totals."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def flush(self) -> None:
        """Write what had to wait, if possible."""

    def close(self, exit_code: int = 0) -> None:
        """Write what is left."""


class FanOut:
    """Hands every record to each of several trackers, or to none."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers

    def log(self, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()

    def close(self, exit_code: int = 0) -> None:
        for tracker in self.trackers:
            tracker.close(exit_code)


class WandbTracker:
    """A wandb run in `run_dir`/wandb: online with a key and a network, else offline (`wandb sync` sends it later).

    The run's id is made once and kept in `run_dir`/wandb_id.txt, so a resumed run goes on in the same wandb run. wandb
    lives on a thread of its own, because its calls block for ever when its service process hangs.
    """

    def __init__(self, run_dir: Path, *, name: str, config: Mapping[str, Any], answers: Answers | None = None) -> None:
        self.where = "not started yet"
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LENGTH)
        self._started = threading.Event()
        self._exit_code, self._answers = 0, answers or reachable
        self._thread = threading.Thread(target=self._work, args=(run_dir, name, config), daemon=True)
        self._thread.start()
        self._started.wait(START_SECONDS)

    def log(self, record: Record) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # wandb hangs; `close` says so
                self._rows.put_nowait(_wandb_row(record))

    def flush(self) -> None:
        """Its own thread sends what waits."""

    def close(self, exit_code: int = 0) -> None:
        if not self._thread.is_alive():
            return
        self._exit_code = exit_code
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("wandb did not finish in %d s and was stopped; metrics.jsonl has it all.", FINISH_SECONDS)
            _kill_service()

    def _work(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            run = _start(run_dir, name, config, self._answers)
            if run is None:
                self.where = "off (wandb is disabled)"
                return
            self.where = f"offline; send it with: wandb sync {Path(run.dir).parent}" if run.offline else run.url
            self._started.set()
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self.where = "off"
            kind = type(error).__name__
            logger.warning("wandb failed (%s: %s); the run goes on without it, metrics.jsonl has it all.", kind, error)
        finally:
            self._started.set()


def make_tracker(run_dir: str | Path, *, tracking: str, name: str, config: Mapping[str, Any], rank: int = 0) -> FanOut:
    """The tracker of a rank: metrics.jsonl, and wandb if `tracking` is "wandb", on rank 0; nothing elsewhere."""
    if rank != 0:
        return FanOut()
    trackers: list[Tracker] = [MetricsFile(Path(run_dir) / METRICS)]
    if tracking == "wandb":
        trackers.append(WandbTracker(Path(run_dir), name=name, config=config))
    return FanOut(trackers)


def known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of `config` a run configuration defines; anything else, which may be a secret, stays here."""
    kept = _keep(config, RunConfig().to_dict())
    if isinstance(kept.get("stages"), list):
        kept["stages"] = [_keep(stage, StageConfig.__dataclass_fields__) for stage in kept["stages"]]
    return kept


def _keep(values: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _keep(value, template[key]) if isinstance(template[key], dict) else value
        for key, value in values.items()
        if key in template
    }


def _wandb_row(record: Record) -> dict[str, Any]:
    """`{"kind": "eval", "eval_loss": ...}` becomes `{"eval/loss": ...}`; axes, stage and layers keep their names."""
    kind = record["kind"]
    row: dict[str, Any] = {}
    for key, value in record.items():
        name = key if key in SHARED else f"{kind}/{key.removeprefix(f'{kind}_')}"
        parts = value.items() if isinstance(value, Mapping) else [(None, value)]
        row |= {name if part is None else f"{name}/{part}": v for part, v in parts if key != "kind" and v is not None}
    return row


def _start(run_dir: Path, name: str, config: Mapping[str, Any], answers: Answers) -> Any:
    """A started wandb run, or None where the user's environment or settings files disable wandb."""
    import wandb  # takes a second, and only rank 0 with tracking needs it

    defaults = wandb.setup().settings
    if defaults.mode == "disabled":
        return None
    make_inside(run_dir, WANDB)  # which refuses a link
    online = defaults.mode == "online" and _ready(wandb, defaults.base_url, answers)
    run = wandb.init(
        project=defaults.project or "ds-stacking",
        name=defaults.run_name or name,
        id=make_run_id(run_dir),
        resume="allow",
        mode="online" if online else "offline",
        dir=str(run_dir),
        config=known_fields(config),
        settings=_settings(wandb),
    )
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    for metrics in ("train/*", "eval/*", "growth/*", "after_growth/*", "trial/*", "stage", "layers"):
        run.define_metric(metrics, step_metric="step")
    return run


def check_run_id(run_dir: Path) -> str | None:
    """The wandb id of the run; None where it has none yet. Raises UserError for what is none: it would be sent."""
    path = run_dir / WANDB_ID
    try:
        found = read_inside(run_dir, WANDB_ID, limit=1000).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions, or delete it.") from None
    if not RUN_ID.fullmatch(found):
        raise UserError(
            f"{path} holds no id of a wandb run, which has 1 to 64 small letters and digits; delete it, and a new "
            f"wandb run begins."
        )
    return found


def make_run_id(run_dir: Path) -> str:
    if check_run_id(run_dir) is None:
        write_text(run_dir / WANDB_ID, uuid.uuid4().hex[:16] + "\n", inside=run_dir)
    found = check_run_id(run_dir)
    assert found is not None
    return found


def _settings(wandb: Any) -> Any:
    """Quiet, bounded in time, and without code, command line, console output or git remote, which may hold secrets."""
    wanted = {
        "save_code": False,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "console": "off",
        "silent": True,
        "init_timeout": INIT_SECONDS,
        "finish_timeout": UPLOAD_SECONDS,
    }
    # wandb refuses settings that it does not know, and its versions differ.
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})


def _ready(wandb: Any, url: str, answers: Answers) -> bool:
    """True when the server answers and takes the configured key; False without a key. Never asks for one."""
    if not answers(url):
        return False
    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:
        logger.warning("wandb refuses to log in (%s); the run is tracked offline.", error)
        return False


def reachable(url: str) -> bool:
    """True when anything at all answers at `url`, through the user's proxy if there is one."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


def _kill_service() -> None:
    """End this process's hanging wandb service, for which wandb would wait again when the process exits."""
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
