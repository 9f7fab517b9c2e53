"""The run directory: what is refused before anything is written, what --overwrite deletes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig
from ds_stacking.training.run_directory import CONFIG, OURS, check_run_directory, claim_run_directory


def config(path: Path, *, overwrite: bool = False) -> RunConfig:
    return RunConfig(output_dir=str(path), overwrite=overwrite)


@pytest.fixture(autouse=True)
def restore_umask() -> object:
    """Claiming a run directory tightens the umask of the process."""
    old = os.umask(0o022)
    yield
    os.umask(old)


def test_a_fresh_folder_is_accepted_and_nothing_written(tmp_path: Path) -> None:
    check_run_directory(config(tmp_path / "a" / "b"))
    check_run_directory(config(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OURS)
def test_another_run_is_refused_unless_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds another run; give .*--overwrite, or another --output_dir"):
        check_run_directory(config(tmp_path))
    check_run_directory(config(tmp_path, overwrite=True))


def test_a_resumption_from_elsewhere_does_not_go_on_in_the_directory_of_another_run(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "checkpoints" / "step-8").mkdir(parents=True)
    here = str(tmp_path / "one")
    for resume in (f"{here}/checkpoints/step-8", here, "auto"):
        check_run_directory(RunConfig(output_dir=here, resume=resume))
    with pytest.raises(UserError, match="holds another run"):
        check_run_directory(RunConfig(output_dir=here, resume=str(tmp_path / "other")))
    check_run_directory(RunConfig(output_dir=str(tmp_path / "new"), resume=str(tmp_path / "other")))
    (tmp_path / "one" / "checkpoints").rename(tmp_path / "scratch")
    (tmp_path / "one" / "checkpoints").symlink_to(tmp_path / "scratch")
    check_run_directory(RunConfig(output_dir=here, resume=f"{here}/checkpoints/step-8"))
    with pytest.raises(UserError, match="--overwrite would delete"):
        check_run_directory(RunConfig(output_dir=here, overwrite=True, branch_from=f"{here}/checkpoints/step-8"))


@pytest.mark.parametrize("branch", [".", "checkpoints/step-8", "link/checkpoints/step-8"])
def test_what_a_branch_begins_with_is_not_deleted(tmp_path: Path, branch: str) -> None:
    (tmp_path / "run" / "checkpoints" / "step-8").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "run")
    source = str(tmp_path / "run" / branch)
    with pytest.raises(UserError, match="--overwrite would delete .*choose another --output_dir"):
        check_run_directory(RunConfig(output_dir=str(tmp_path / "run"), overwrite=True, branch_from=source))
    check_run_directory(RunConfig(output_dir=str(tmp_path / "other"), overwrite=True, branch_from=source))


def test_foreign_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    check_run_directory(config(tmp_path))


@pytest.mark.parametrize("below", [".", "run", "a/b"])
def test_a_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder; choose another --output_dir"):
        check_run_directory(config(tmp_path / "file" / below))


def test_a_dangling_link_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is no folder"):
        check_run_directory(config(tmp_path / "link"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of the operating system is replaced, not its question."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(UserError, match=f"no permission to write in {tmp_path}; choose another --output_dir"):
        check_run_directory(config(tmp_path / "run"))
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_claiming_deletes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "weights").touch()
    (tmp_path / "export" / "stage-1-2L").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(outside)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    claim_run_directory(config(tmp_path, overwrite=True), {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, "mine.txt"]
    assert (outside / "weights").exists()
    assert json.loads((tmp_path / CONFIG).read_text()) == {"seed": 1}


def test_others_cannot_read_a_run(tmp_path: Path) -> None:
    folder = claim_run_directory(config(tmp_path / "run"), {})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / CONFIG).stat().st_mode) == 0o600
