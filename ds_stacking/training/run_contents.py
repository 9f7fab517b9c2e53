"""What a run writes in its directory, told from what its user keeps there; only the first is ever deleted."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ds_stacking.checkpoint.format import CHECKPOINT_NAME, TEMPORARY
from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.common.own_files import open_folder

CONFIG, SUMMARY, METRICS, STOP = "config.json", "summary.json", "metrics.jsonl", "stop"
SAVED, CHECKPOINTS, EXPORT, REPORT, OWNERS = "saved.json", "checkpoints", "export", "report", ".owner"
"""saved.json names the newest checkpoint, beside their folder, which may get lost."""
TILES = "tiles.json"
WANDB_ID, WANDB = "wandb_id.txt", "wandb"
FOLDERS = (CHECKPOINTS, EXPORT, REPORT, WANDB)
OURS = (SUMMARY, METRICS, STOP, SAVED, TILES, WANDB_ID, *FOLDERS, CONFIG)
"""What a run writes; the record by which a run is known is last, so that it is also the last to be deleted."""
REMAINS = re.compile(r"post_mortem-step-\d+\.json|traceback-rank\d+\.txt")
"""What tells of failures; it is no run by itself."""
STAGE = re.compile(r"stage-\d{1,4}-\d{1,5}L")
"""A stage's folder in export/."""
_UNFINISHED = r"|\..+\.[0-9a-f]{16}\.tmp"
MADE_IN = {
    CHECKPOINTS: re.compile(rf"{CHECKPOINT_NAME.pattern}|{re.escape(TEMPORARY)}.+"),
    EXPORT: re.compile(rf"{STAGE.pattern}|final{_UNFINISHED}"),
    f"{REPORT}/attention": re.compile(rf"attention\.json|(heads|distances|layers|copies)\.(png|svg){_UNFINISHED}"),
    REPORT: re.compile(rf"report\.html|(curves|growths)\.png{_UNFINISHED}"),
}
"""Names that this program makes in a run's folders, inner folders first; wandb's folder is wandb's as a whole."""


class _Record(TypedDict):
    """What config.json of every run has, and of nothing else."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    data_fingerprint: str
    versions: dict[str, str]
    stages: list[dict[str, Any]]


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a run: its config.json is the record that a run writes first."""
    try:
        read_json(path / CONFIG, _Record, mend="", inside=path)
    except (OSError, UserError):
        return False
    return True


def refuse_foreign(path: Path) -> None:
    """Raise UserError where what a new run would delete in `path` was not written by a run."""
    standing = [name for name in OURS if name != STOP and os.path.lexists(path / name)]
    why = f"and no {CONFIG} that a run of this program wrote"
    if is_run(path):
        # a file in the place of checkpoints/ was put there so that a run cannot save; it is no work of anybody
        standing = [n for n in standing if n != CHECKPOINTS and (path / n).is_dir() != (n in FOLDERS)]
        why = f"which is no {'folder' if set(standing) & set(FOLDERS) else 'file'} as a run makes it"
    if standing:
        names = ", ".join(f"{name}/" if (path / name).is_dir() else name for name in standing)
        raise UserError(f"output_dir {path} holds {names}, {why}; choose another --output_dir, or remove that.")


def remove_run(path: Path) -> None:
    """Delete what the run in `path` wrote, all but its config.json; what else is in its folders stays, and so do they.

    A request to stop stays too. Where there is no run, nothing is deleted but what tells of failures.
    """
    names = OURS if is_run(path) else ()
    remove_made(path, (name for name in names if name not in (STOP, CONFIG)))
    remove_remains(path)


def remove_remains(path: Path, begin: str = "") -> None:
    """Delete what tells of failures, where its name begins with `begin`."""
    for name in os.listdir(path):
        if REMAINS.fullmatch(name) and name.startswith(begin):
            _remove(path, name)


def remove_made(path: Path, names: Iterable[str]) -> None:
    """Delete of these files and folders in `path`, names of OURS, what a run makes of them."""
    for name in names:
        inner = [folder for folder in MADE_IN if folder.split("/")[0] == name]
        if not inner or (path / name).is_symlink() or not (path / name).is_dir():
            _remove(path, name)
            continue
        for folder in inner:
            with suppress(FileNotFoundError):
                _remove_in(path, folder, MADE_IN[folder])


def remove_request(path: Path, name: str) -> None:
    """Delete a request to stop, which may be anything but a folder with something in it. Raises UserError for that."""
    with open_folder(path) as parent, suppress(FileNotFoundError):
        try:
            if _is_folder(name, parent):
                os.rmdir(name, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(
                f"{path / name} asks a run to stop and cannot be removed ({error.strerror}); move it away, or choose "
                f"another --output_dir."
            ) from None


def _remove_in(path: Path, folder: str, made: re.Pattern[str]) -> None:
    """Delete what a run made in its folder, and the folder if nothing else is there."""
    with open_folder(path, *folder.split("/")) as handle:
        names = [name for name in os.listdir(handle) if made.fullmatch(name)]
    for name in names:
        _remove(path, name, *folder.split("/"))
    *above, last = folder.split("/")
    with open_folder(path, *above) as parent, suppress(OSError):
        os.rmdir(last, dir_fd=parent)


def _remove(path: Path, name: str, *folders: str) -> None:
    """Delete a file, a link itself, or a folder with all that is in it, links not followed."""
    with open_folder(path, *folders) as parent:
        try:
            if _is_folder(name, parent):
                shutil.rmtree(name, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
