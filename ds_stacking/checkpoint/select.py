"""Which checkpoint a run goes on from: the newest valid one, chosen by rank 0 and read by all ranks, a share each."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ds_stacking.checkpoint.format import CHECKPOINT_NAME, MANIFEST
from ds_stacking.checkpoint.manifest import Manifest, Unusable, read_manifest
from ds_stacking.checkpoint.share import from_first_rank, side_by_side
from ds_stacking.checkpoint.store import CheckpointReader, find_fault
from ds_stacking.checkpoint.verify import content_fault, describe_faults, find_faults, verify_cheaply
from ds_stacking.common.errors import UserError
from ds_stacking.growth.exchange import Exchange


def _any(_: CheckpointReader) -> None:
    """Every checkpoint fits."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The checkpoint to load."""

    path: Path
    step: int
    """Optimizer steps made."""
    notes: tuple[str, ...] = field(default=())
    """One line for everything newer or strange that was passed over."""
    branch: bool = False
    """Whether it is another run's, and a new run begins with its state."""


MOST_NOTES = 5
"""Foreign files that are named."""
Fits = Callable[[CheckpointReader], None]
"""Raises UserError where a checkpoint is whole, but what a run has put into it is not what a run needs."""
Search = Generator[tuple[Path, Manifest], str | None, Found | None]
"""A search yields a checkpoint whose content is to be read, and is sent its fault or None."""


def published(folder: Path) -> list[tuple[Path, Manifest | Unusable]]:
    """Every checkpoint of `folder`, newest first, with its manifest or why there is none; no other file is opened.

    What cannot be dated comes first: it may have been the newest.
    """
    found: list[tuple[Path, Manifest | Unusable]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if CHECKPOINT_NAME.fullmatch(path.name):
            try:
                found.append((path, read_manifest(path)))
            except Unusable as reason:
                found.append((path, reason))
    return sorted(found, key=_age, reverse=True)


def newest_valid(folder: Path, identity: Mapping[str, Any] | None = None, fits: Fits = _any) -> Found | None:
    """The newest checkpoint of `folder` that is whole, of a run with this `identity`, and `fits`; None if it is empty.

    Raises UserError where something is there but nothing valid: a run never starts afresh by mistake.
    """
    return _alone(_search_folder(folder, identity, fits))


def find(path: Path, identity: Mapping[str, Any] | None = None, fits: Fits = _any) -> Found:
    """The checkpoint that a user means by `path`: itself, or the newest valid one of a run directory or its folder.

    Raises UserError where `path` names one checkpoint and that one is unusable, or where nothing is there.
    """
    found = _alone(_search(path, identity, fits))
    assert found is not None
    return found


def find_together(
    path: Path,
    exchange: Exchange,
    *,
    identity: Mapping[str, Any] | None = None,
    fits: Fits = _any,
    exact: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> Found | None:
    """`newest_valid(path)`, or with `exact` `find(path)`. All ranks call it together.

    Rank 0 searches, and all ranks read the files of what it finds, a share each; `alive` is called while that gets on.
    What the files say is then judged by rank 0 for all.
    Raises UserError on every rank, also where some rank cannot see the folder.
    """
    search = (_search if exact else _search_folder)(path, identity, fits)
    fault: str | None = None
    while True:
        answer = from_first_rank(lambda: _next(search, fault), exchange)  # noqa: B023 -- called before it returns
        if answer is None:
            return None
        if "found" in answer:
            return Found(path=Path(answer["found"]), step=answer["step"], notes=tuple(answer["notes"]))
        fault = _check_together(Path(answer["check"]), answer["manifest"], exchange, alive)


def _search_folder(folder: Path, identity: Mapping[str, Any] | None, fits: Fits) -> Search:
    """`newest_valid`, which yields what it wants to have read and is sent the fault that was found there."""
    foreign = [path for path in _visible(folder) if not _is_checkpoint_name(path)]
    notes = [f"{path} is passed over: it is no checkpoint." for path in foreign[:MOST_NOTES]]
    if len(foreign) > MOST_NOTES:
        notes.append(f"{len(foreign) - MOST_NOTES} more files in {folder} are passed over.")
    for path, _ in published(folder):
        step, reason = yield from _judge(path, identity, fits)
        if reason is None:
            return Found(path=path, step=step, notes=tuple(notes))
        notes.append(f"Checkpoint {path} is skipped: {reason}.")
    if not notes:
        return None
    raise UserError(
        f"{folder} holds no valid checkpoint, so the run cannot be resumed; restore one, or start again in another "
        f"folder. {' '.join(notes)}"
    )


def _search(path: Path, identity: Mapping[str, Any] | None, fits: Fits) -> Search:
    """`find` in the same way."""
    if not path.is_dir():
        raise UserError(f"There is no folder {path} to resume from; give a run directory or a checkpoint.")
    if (path / MANIFEST).exists() or _is_checkpoint_name(path):
        step, reason = yield from _judge(path, identity, fits)
        if reason is None:
            return Found(path=path, step=step)
        raise UserError(f"Checkpoint {path} cannot be loaded: {reason}; choose another one.")
    inner = path / "checkpoints"
    within = inner.is_dir() or any(map(_is_checkpoint_name, _visible(path)))
    found = (yield from _search_folder(inner if inner.is_dir() else path, identity, fits)) if within else None
    if found is None:
        raise UserError(f"There is no checkpoint in {path} to resume from; give another folder, or start a new run.")
    return found


def _judge(
    path: Path, identity: Mapping[str, Any] | None, fits: Fits
) -> Generator[tuple[Path, Manifest], str | None, tuple[int, str | None]]:
    """The step of a checkpoint and why it must not be loaded, None where it may; what must be read is yielded."""
    try:
        manifest = verify_cheaply(path, identity)
    except Unusable as unusable:
        return 0, str(unusable)
    fault = yield path, manifest
    return manifest.step, fault or find_fault(path, fits)


def _alone(search: Search) -> Found | None:
    fault = None
    try:
        while True:
            fault = content_fault(*search.send(fault))
    except StopIteration as end:
        return end.value


def _next(search: Search, fault: str | None) -> dict[str, Any] | None:
    """Rank 0: what is to be read next, or what was found, as JSON values."""
    try:
        path, manifest = search.send(fault)
    except StopIteration as end:
        found: Found | None = end.value
        if found is None:
            return None
        return {"found": str(found.path.absolute()), "step": found.step, "notes": found.notes}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend its permissions.") from None
    return {"check": str(path.absolute()), "manifest": _fingerprint(manifest)}


def _check_together(path: Path, fingerprint: str, exchange: Exchange, alive: Callable[[], None]) -> str | None:
    """What is wrong with the content of a checkpoint's files, each of which is read by one rank."""
    manifest = side_by_side(lambda: _see(path, fingerprint), exchange)
    blind = exchange.all_reduce_sum(int(manifest is None))
    if blind or manifest is None:
        raise UserError(f"{blind} ranks do not see {path}; put the run directory on storage that all nodes share.")
    sizes = [record.size for record in manifest.files.values()]
    names, mine = list(manifest.files), shares(sizes, exchange.world_size)[exchange.rank]
    read = [0]

    def count(size: int) -> None:
        read[0] += size  # threads may lose each other's number, which is a sign of life and no sum

    def work() -> list[int]:
        return find_faults(path, manifest, [names[index] for index in mine], count)

    faults = torch.zeros(len(names), dtype=torch.int64)
    faults[mine] = torch.tensor(side_by_side(work, exchange, progress=lambda: read[0], alive=alive), dtype=torch.int64)
    return describe_faults(names, exchange.all_reduce_tensor(faults).tolist())


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of files by rank, each given to one: the largest first, to whoever has the least.

    Where there are fewer files than ranks, every n-th rank takes one, so that they are spread over the nodes.
    """
    takers = min(len(sizes), ranks)
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, taker * ranks // takers) for taker in range(takers)]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, rank = heapq.heappop(loads)
        taken[rank].append(index)
        heapq.heappush(loads, (load + sizes[index], rank))
    return taken


def _see(path: Path, fingerprint: str) -> Manifest | None:
    """The manifest, where this rank sees the same one as rank 0."""
    try:
        manifest = read_manifest(path)
    except Unusable:
        return None
    return manifest if _fingerprint(manifest) == fingerprint else None


def _fingerprint(manifest: Manifest) -> str:
    return sha256(manifest.to_bytes()).hexdigest()


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _is_checkpoint_name(path: Path) -> bool:
    return CHECKPOINT_NAME.fullmatch(path.name) is not None


def _age(item: tuple[Path, Manifest | Unusable]) -> tuple[float, int, int]:
    path, manifest = item
    name = CHECKPOINT_NAME.fullmatch(path.name)
    assert name is not None
    sequence = manifest.sequence if isinstance(manifest, Manifest) else float("inf")
    return sequence, int(name[1]), int(name[2] or 1)
