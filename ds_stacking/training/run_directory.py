"""The run directory: looked at before anything is computed, taken when an engine stands; no link in it is followed.

It may come from somebody else, and it may itself be a link, for its user has named it; what a run writes in it may
not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.common.own_files import make_inside
from ds_stacking.config import RunConfig
from ds_stacking.training.run_contents import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    METRICS,
    OURS,
    OWNERS,
    REMAINS,
    REPORT,
    SAVED,
    STAGE,
    STOP,
    SUMMARY,
    TILES,
    WANDB,
    WANDB_ID,
    refuse_foreign,
    remove_made,
    remove_remains,
    remove_request,
    remove_run,
)

WANDBS_LINKS = re.compile(r"latest-run|debug[\w.-]*\.log")
"""Links that wandb makes in its folder, and replaces without following them."""
SCRATCH = (
    "what a run writes is not reached through links: remove the link, or to keep the run on other storage move the "
    "run directory itself there and give a link to it as --output_dir"
)


class _Summary(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    finished: NotRequired[bool]


class _Saved(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    newest: str


def stop_names() -> tuple[str, ...]:
    """The files that ask this run to stop: a person's, and that of its own SLURM job alone, for the batch script."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return (STOP, f"{STOP}-{job}") if job.isalnum() else (STOP,)


def check_run_directory(config: RunConfig) -> None:
    """Raise UserError where the run directory holds another run or cannot be one. Writes nothing."""
    path = Path(config.run_dir)
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it; give one of them.")
    _refuse_another_user(path, shared=config.shared)
    refuse_place(path)
    _check_place(path)
    refuse_links_in(path)
    if config.overwrite and config.branch_from and _lies_in(config.branch_from, path):
        raise UserError(
            f"--overwrite would delete {config.branch_from}, which --branch_from begins with; "
            f"choose another --output_dir."
        )
    if config.overwrite:
        refuse_foreign(path)
    if config.resume == "auto" and not _has_entries(path / CHECKPOINTS) and not os.path.lexists(path / SUMMARY):
        refuse_lost_checkpoints(path)  # before the data are prepared
    goes_on = config.resume and (config.resume == "auto" or _lies_in(config.resume, path))
    if not (config.overwrite or goes_on) and any(os.path.lexists(path / name) for name in OURS):
        raise UserError(
            f"output_dir {path} holds another run; give --resume auto, --overwrite, or another --output_dir."
        )


def refuse_place(path: Path) -> None:
    """Raise UserError where `path` is the root, the user's home or a checkout of git: nobody means it for a run."""
    place = os.path.realpath(path)
    what = "the root of the file system" if place == os.path.realpath("/") else None
    if place == os.path.realpath(os.path.expanduser("~")):
        what = "your home folder"
    elif os.path.lexists(os.path.join(place, ".git")):
        what = "a checkout of git (it has .git)"
    if what:
        raise UserError(
            f"output_dir {path} is {what}, where a run may not write; name a folder in it as --output_dir."
        )


def _has_entries(folder: Path) -> bool:
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False


def _check_place(path: Path) -> None:
    """Raise UserError where `path` is no folder and cannot become one."""
    # The functions of os.path, unlike Path.exists, answer False where a parent may not be searched.
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not os.path.isdir(existing):
        raise UserError(f"output_dir {path} cannot be made: {existing} is no folder; choose another --output_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir {path} cannot be made: no permission to write in {existing}; choose another --output_dir."
        )
    longest = max(len(os.fsencode(part)) for part in path.absolute().parts)
    if longest > 255 or len(os.fsencode(path.absolute())) > 3800:  # names of checkpoints' files come behind it
        raise UserError(
            f"output_dir {str(path)[:40]}... is too long: a name may have 255 bytes, the path 3,800; choose a shorter "
            f"--output_dir."
        )


def _refuse_another_user(path: Path, *, shared: bool) -> None:
    """Raise UserError for the run of somebody else, unless the run is to be shared or root asks."""
    if shared or os.geteuid() == 0 or not os.path.isdir(path):
        return
    owner = os.stat(path).st_uid
    if owner != os.geteuid():
        raise UserError(
            f"output_dir {path} belongs to another user (number {owner}); choose another --output_dir, or where both "
            f"of you are to write there, start it with --shared."
        )


def refuse_links_in(path: Path) -> None:
    """Raise UserError where one of a run's own files in `path` is a link, or `export/final` leads out of its folder.

    A request to stop may be anything, since it is never opened.
    """
    if not os.path.isdir(path):
        return
    for name in (*OURS, OWNERS):
        if name != STOP and (path / name).is_symlink():
            raise UserError(f"{path / name} is a link to {ascii(os.readlink(path / name))}; {SCRATCH}.")
    try:
        for entry in _entries(path):
            if entry.is_symlink() and not _may_be_a_link(entry.path, path):
                raise UserError(f"{entry.path} is a link to {ascii(os.readlink(entry.path))}; {SCRATCH}.")
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); mend its permissions, or choose another "
            f"--output_dir."
        ) from None
    final = path / EXPORT / "final"
    if os.path.lexists(final) and not final.is_symlink():
        raise UserError(f"{final} is no link to the last stage beside it, as a run makes it; remove it.")


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a run directory, and in the folders that a run makes in it; what is in checkpoints, they check."""
    inner = [path / name for name in (EXPORT, REPORT, OWNERS, CHECKPOINTS, WANDB)]
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        yield from (entry for entry in entries if REMAINS.fullmatch(entry.name))
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path / EXPORT) as entries:
        inner += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for folder in inner:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            yield from entries


def _may_be_a_link(name: str, path: Path) -> bool:
    folder, name = os.path.relpath(os.path.dirname(name), path), os.path.basename(name)
    if folder == EXPORT and name == "final":
        return STAGE.fullmatch(os.readlink(path / EXPORT / name)) is not None
    return folder == WANDB and WANDBS_LINKS.fullmatch(name) is not None


def _lies_in(inner: str, folder: Path) -> bool:
    """Whether `inner` is `folder` or in it, by its name or through links (the run directory may be one)."""
    by_name = Path(os.path.abspath(inner)).is_relative_to(os.path.abspath(folder))
    try:
        return by_name or Path(inner).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return by_name


def refuse_lost_checkpoints(run_dir: Path) -> None:
    """Raise UserError where a run that has saved checkpoints has none; a start afresh would delete the rest of it.

    Called where there is nothing to go on from, so also for what is no run's, which such a start would delete.
    """
    folder = run_dir / CHECKPOINTS
    try:
        mend = "delete that file if the run has no checkpoints that are worth keeping"
        newest = read_json(run_dir / SAVED, _Saved, mend=mend, inside=run_dir)["newest"]
    except FileNotFoundError:
        newest = None
    if newest is None and (folder.is_dir() or not os.path.lexists(folder)):
        refuse_foreign(run_dir)
        return
    what = f"{folder} has none"
    if not folder.is_dir():
        what = f"{folder} is no folder" if os.path.lexists(folder) else f"{folder} is gone"
    raise UserError(
        f"The run in {run_dir} {f'saved {ascii(newest)[1:-1][:80]}' if newest else 'was to save checkpoints'}, but "
        f"{what}; mount or restore that folder, or start again with --overwrite in the place of --resume."
    )


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds a run that reached its end. Raises UserError for a damaged summary.json."""
    run_dir = Path(config.run_dir)
    mend = "delete it, and the run goes on from its newest checkpoint"
    try:
        summary = read_json(run_dir / SUMMARY, _Summary, mend=mend, inside=run_dir)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return summary.get("finished") is True


def set_umask(config: RunConfig) -> None:
    """What this process writes from here on is its user's alone, or of a shared run its group's too."""
    os.umask(0o007 if config.shared else 0o077)


def make_run_directory(path: Path, *, shared: bool) -> list[Path]:
    """Make the run directory and its parents; those that were made, innermost first. A shared one hands its group on.

    Raises OSError.
    """
    missing = []
    for folder in (path, *path.absolute().parents):
        if os.path.lexists(folder):
            break
        missing.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    if missing and shared:
        os.chmod(path, 0o2770)
    return missing


def remove_stop_files(path: Path) -> None:
    """A request to stop was for the run before. Raises UserError for a folder of that name with something in it."""
    for name in stop_names():
        remove_request(path, name)


def claim_run_directory(config: RunConfig, resolved: Mapping[str, Any], *, keep: bool = False) -> tuple[str, ...]:
    """Write the resolved configuration into the run directory, which this process owns.

    What an earlier run left is deleted first, or where this one goes on with it (`keep`) only its tracebacks. A
    request to stop that came meanwhile stays.

    Returns:
        Names of what this run makes there before its first step, for `give_back`.
    """
    path = Path(config.run_dir)
    if keep:
        remove_remains(path, "traceback-")
    else:
        remove_run(path)
    names = (METRICS, CHECKPOINTS, TILES, *((WANDB_ID, WANDB) if config.tracking == "wandb" else ()))
    made = (*(name for name in names if not os.path.lexists(path / name)), CONFIG)
    try:
        write_json(path / CONFIG, resolved, inside=path)
        make_inside(path, CHECKPOINTS)
    except BaseException:
        if not keep:
            give_back(path, made)
        raise
    return made


def give_back(path: Path, made: Iterable[str]) -> None:
    """Delete what a run that has not made its first step has written, `made` at its claim; all else is not its own."""
    with suppress(OSError, UserError):
        remove_remains(path)
        remove_made(path, made)
