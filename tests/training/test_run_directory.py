"""The run directory: what is refused before anything is written, what --overwrite deletes."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.checkpoint.durable import make_directory, remove_checkpoint, write_file
from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig
from ds_stacking.training.ownership import Owner
from ds_stacking.training.run_contents import FOLDERS
from ds_stacking.training.run_directory import (
    CONFIG,
    OURS,
    check_run_directory,
    claim_run_directory,
    give_back,
    is_finished,
    make_run_directory,
    refuse_lost_checkpoints,
    remove_stop_files,
    set_umask,
)

RECORD = json.dumps({"data_fingerprint": "a", "versions": {"torch": "2"}, "stages": [{"layers": 1, "steps": 2}]})
"""As much of a run's config.json as nothing else has."""


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
    if name in FOLDERS:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(RECORD)
    with pytest.raises(UserError, match="holds another run; give .*--overwrite, or another --output_dir"):
        check_run_directory(config(tmp_path))
    (tmp_path / "config.json").write_text(RECORD)
    check_run_directory(config(tmp_path, overwrite=True))


def foreign(folder: Path, *names: str) -> Path:
    """A folder of somebody who has never started a run."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{"resume": "auto"}, {"overwrite": True}])
@pytest.mark.parametrize(
    "names",
    [
        ("wandb/a", "report/thesis.tex", "export/data.csv", "config.json", "metrics.jsonl"),
        ("config.json", "model.safetensors"),
        ("report/thesis.tex",),
        ("wandb_id.txt", "stop", ".owner/1"),
    ],
)
def test_what_is_no_run_is_not_deleted(tmp_path: Path, options: dict[str, Any], names: tuple[str, ...]) -> None:
    before = contents(foreign(tmp_path / "proj", *names))
    asked = RunConfig(output_dir=str(tmp_path / "proj"), **options)
    with pytest.raises(UserError, match="holds .*no config.json that a run .* wrote; choose another --output_dir, or"):
        check_run_directory(asked)
    with pytest.raises(UserError, match="no config.json that a run"):
        refuse_lost_checkpoints(tmp_path / "proj")
    claim_run_directory(asked, {})  # as if they had come after the look
    assert contents(tmp_path / "proj") == before | {"config.json": b"{}\n"}


def test_a_folder_of_checkpoints_of_others_is_not_overwritten(tmp_path: Path) -> None:
    foreign(tmp_path, "checkpoints/epoch-99.pt")
    with pytest.raises(UserError, match="holds checkpoints/, and no config.json"):
        check_run_directory(config(tmp_path, overwrite=True))


@pytest.mark.parametrize("name", ["metrics.jsonl/mine", "report", "wandb"])
def test_what_stands_in_the_place_of_a_run_s_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(RECORD)
    foreign(tmp_path, name)
    for options in ({"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(UserError, match="holds .*, which is no (file|folder) as a run makes it"):
            check_run_directory(RunConfig(output_dir=str(tmp_path), **options))


@pytest.mark.parametrize("options", [{"resume": "auto"}, {"overwrite": True}])
@pytest.mark.parametrize(
    "names", [(), (".owner/1", "traceback-rank0.txt", "stop", "notes.txt"), ("config.json", "metrics.jsonl")]
)
def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    tmp_path: Path, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    foreign(tmp_path, *names)
    if "config.json" in names:
        (tmp_path / "config.json").write_text(RECORD)
    asked = RunConfig(output_dir=str(tmp_path), **options)
    check_run_directory(asked)
    refuse_lost_checkpoints(tmp_path)
    remove_stop_files(tmp_path)
    claim_run_directory(asked, {"seed": 1})
    left = {name for name in names if name in (".owner/1", "notes.txt")}
    assert contents(tmp_path).keys() == {*left, "config.json"}


def test_what_a_user_keeps_in_a_run_s_folders_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(RECORD)
    mine = ("checkpoints/epoch-99.pt", "export/data.csv", "report/thesis.tex", "report/attention/notes.md")
    made = ("checkpoints/step-8/state.json", "checkpoints/step-8-2/state.json", "checkpoints/.tmp-step-9-1/a")
    made += ("export/stage-1-2L/README.md", "export/.stage-1-2L.0123456789abcdef.tmp/a", "report/report.html")
    made += ("report/curves.png", "report/attention/heads.svg", "report/.growths.png.0123456789abcdef.tmp")
    made += (
        "report/attention/attention.json",
        "wandb/run-1/a",
        "summary.json",
        "saved.json",
        "post_mortem-step-8.json",
    )
    foreign(tmp_path, *mine, *made)
    (tmp_path / "export" / "final").symlink_to("stage-1-2L")
    check_run_directory(config(tmp_path, overwrite=True))
    claim_run_directory(config(tmp_path, overwrite=True), {})
    assert contents(tmp_path).keys() == {*mine, "config.json"}
    assert not os.path.lexists(tmp_path / "export" / "final") and not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("options", [{}, {"resume": "auto"}, {"overwrite": True}])
def test_places_that_are_no_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "project" / ".git").mkdir(parents=True)
    (tmp_path / "link").symlink_to("project")
    said = {"/": "the root of the", tmp_path / "home": "your home folder", tmp_path / "link": "a checkout of git"}
    for path, what in {**said, "//": "the root", tmp_path / "project": "a checkout of git"}.items():
        with pytest.raises(UserError, match=f"is {what}.*name a folder in it as --output_dir"):
            check_run_directory(RunConfig(output_dir=str(path), **options))
    check_run_directory(config(tmp_path / "project" / "runs"))
    check_run_directory(config(tmp_path / "home" / "run"))


def test_only_what_a_start_has_made_is_given_back(tmp_path: Path) -> None:
    asked = RunConfig(output_dir=str(tmp_path), tracking="none")
    made = claim_run_directory(asked, {})
    later = ("stop", "report/report.html", "wandb/a", "checkpoints/mine", "export/final", "summary.json")
    before = contents(foreign(tmp_path, *later))
    (tmp_path / "metrics.jsonl").touch()
    give_back(tmp_path, made)
    assert contents(tmp_path).keys() == before.keys() - {"config.json"}


def test_a_start_gives_back_what_wandb_has_written(tmp_path: Path) -> None:
    made = claim_run_directory(RunConfig(output_dir=str(tmp_path), tracking="wandb"), {})
    foreign(tmp_path, "wandb/run-1/a", "wandb_id.txt", "metrics.jsonl", "traceback-rank1.txt")
    give_back(tmp_path, made)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_called_stop_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "stop").mkdir()
    remove_stop_files(tmp_path)
    before = contents(foreign(tmp_path, "stop/words.txt"))
    with pytest.raises(UserError, match="stop asks a run to stop and cannot be removed .*move it away"):
        remove_stop_files(tmp_path)
    assert contents(tmp_path) == before


def test_a_resumption_from_elsewhere_does_not_go_on_in_the_directory_of_another_run(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "checkpoints" / "step-8").mkdir(parents=True)
    here = str(tmp_path / "one")
    for resume in (f"{here}/checkpoints/step-8", here, "auto"):
        check_run_directory(RunConfig(output_dir=here, resume=resume))
    with pytest.raises(UserError, match="holds another run"):
        check_run_directory(RunConfig(output_dir=here, resume=str(tmp_path / "other")))
    check_run_directory(RunConfig(output_dir=str(tmp_path / "new"), resume=str(tmp_path / "other")))
    (tmp_path / "one").rename(tmp_path / "scratch")
    (tmp_path / "one").symlink_to(tmp_path / "scratch")
    check_run_directory(RunConfig(output_dir=here, resume=f"{tmp_path}/scratch/checkpoints/step-8"))
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
    (tmp_path / "checkpoints").symlink_to(outside)  # which came after the check
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / CONFIG).write_text(RECORD)
    (tmp_path / "traceback-rank3.txt").touch()
    (tmp_path / "post_mortem-step-8.json").touch()
    made = claim_run_directory(config(tmp_path, overwrite=True), {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", CONFIG, "mine.txt"]
    assert (outside / "weights").exists() and list((tmp_path / "checkpoints").iterdir()) == []
    assert json.loads((tmp_path / CONFIG).read_text()) == {"seed": 1}
    give_back(tmp_path, made)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_is_gone_on_with_keeps_all_but_tracebacks(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "traceback-rank0.txt", "post_mortem-step-8.json", "stop"):
        (tmp_path / name).touch()
    remove_stop_files(tmp_path)
    claim_run_directory(config(tmp_path), {}, keep=True)
    kept = ["checkpoints", CONFIG, "metrics.jsonl", "post_mortem-step-8.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(("shared", "folder_mode", "file_mode"), [(False, 0o700, 0o600), (True, 0o2770, 0o660)])
def test_who_may_read_a_run(tmp_path: Path, shared: bool, folder_mode: int, file_mode: int) -> None:
    asked = RunConfig(output_dir=str(tmp_path / "a" / "run"), shared=shared)
    set_umask(asked)
    assert make_run_directory(tmp_path / "a" / "run", shared=shared) == [tmp_path / "a" / "run", tmp_path / "a"]
    claim_run_directory(asked, {})
    folder = Path(asked.run_dir)
    assert stat.S_IMODE(folder.stat().st_mode) == folder_mode
    assert stat.S_IMODE((folder / "checkpoints").stat().st_mode) == folder_mode
    assert stat.S_IMODE((folder / CONFIG).stat().st_mode) == file_mode


def a_run(path: Path) -> Path:
    """What a finished run leaves, as far as names go."""
    for name in ("checkpoints", "export/stage-1-2L", "report", "wandb/run-1", ".owner"):
        (path / name).mkdir(parents=True)
    for name in (*FILES, "wandb/run-1/logs.txt", "export/stage-1-2L/README.md"):
        (path / name).touch()
    (path / "config.json").write_text(RECORD)
    (path / "saved.json").unlink()
    (path / "export" / "final").symlink_to("stage-1-2L")
    (path / "wandb" / "latest-run").symlink_to("run-1")
    return path


FILES = (
    "metrics.jsonl",
    "config.json",
    "saved.json",
    "summary.json",
    "wandb_id.txt",
    "report/report.html",
    ".owner/3",
)


@pytest.mark.parametrize(
    "name",
    [
        *FILES,
        *("checkpoints", "export", "report", "wandb", ".owner", "export/stage-1-2L", "checkpoints/step-3"),
        *("export/stage-1-2L/README.md", "traceback-rank0.txt", "post_mortem-step-3.json"),
    ],
)
def test_a_link_among_a_runs_own_files_is_refused(tmp_path: Path, name: str) -> None:
    run, outside = a_run(tmp_path / "run"), tmp_path / "outside"
    check_run_directory(RunConfig(output_dir=str(run), resume="auto"))
    if (run / name).exists():
        (run / name).rename(outside)
    (run / name).symlink_to(outside)
    for options in ({"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"{name} is a link to .*move the run directory itself") as refused:
            check_run_directory(RunConfig(output_dir=str(run), **options))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("to", ["/etc", "../../outside", "stage-1-2L/../..", ".", "stage-1-2L/x"])
def test_the_last_export_is_beside_its_link(tmp_path: Path, to: str) -> None:
    run = a_run(tmp_path / "run")
    (run / "export" / "final").unlink()
    (run / "export" / "final").symlink_to(to)
    with pytest.raises(UserError, match="final is a link to"):
        check_run_directory(RunConfig(output_dir=str(run), resume="auto"))


def test_the_last_export_is_no_folder(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "export" / "final").unlink()
    (run / "export" / "final").mkdir()
    with pytest.raises(UserError, match="final is no link to the last stage"):
        check_run_directory(RunConfig(output_dir=str(run), resume="auto"))


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    a_run(tmp_path / "scratch")
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    check_run_directory(RunConfig(output_dir=str(tmp_path / "run"), resume="auto"))


def test_a_request_to_stop_may_be_anything(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "stop").symlink_to("/nowhere")
    check_run_directory(RunConfig(output_dir=str(run), resume="auto"))
    remove_stop_files(run)
    assert not os.path.lexists(run / "stop")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"finished": tru', "summary.json is damaged or no such file: it is no JSON"),
        ('{"finished": 1}', "summary.json is damaged .*finished: .*valid boolean, and is 1"),
        ("[]", "summary.json is damaged .*its content"),
        ("[" * 100_000, "summary.json is damaged"),
    ],
)
def test_a_damaged_summary(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        is_finished(config(tmp_path))


@pytest.mark.parametrize("content", ["", '{"newest": 7}', "[]", '{"newest": "step-1"} x'])
def test_a_damaged_note_of_the_newest_checkpoint(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "saved.json").write_text(content)
    with pytest.raises(UserError, match="saved.json is damaged .*delete that file"):
        refuse_lost_checkpoints(tmp_path)


def test_names_that_are_too_long(tmp_path: Path) -> None:
    for path in (tmp_path / ("a" * 256), tmp_path.joinpath(*["b" * 200] * 19)):
        with pytest.raises(UserError, match="is too long: .*choose a shorter --output_dir"):
            check_run_directory(config(path))


OTHERS = 65534, 65533
"""Two users who are not root; this folder's tests run as root, or skip."""


def as_user(number: int, case: Callable[[], object]) -> str:
    """What `case` raises, or "done", in a process of the user `number` whose group is 4242."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(4242)
            os.setuid(number)
            case()
            os.write(writing, b"done")
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as pipe:
        return pipe.read()


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder in which everybody may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")
@pytest.mark.parametrize("shared", [False, True])
def test_two_users_with_one_folder(common: Path, shared: bool) -> None:
    run, (first, second) = common / "run", OTHERS

    def start(shared: bool = shared, resume: str | None = None) -> None:
        asked = RunConfig(output_dir=str(run), shared=shared, resume=resume)
        check_run_directory(asked)
        set_umask(asked)
        owner = Owner(run, shared=shared)
        remove_stop_files(run)
        claim_run_directory(asked, {"seed": 1}, keep=resume is not None)
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write("a line\n")
        save = run / "checkpoints" / "step-1"
        if resume:
            remove_checkpoint(save)
        make_directory(save)
        write_file(save / "state.json", [b"{}"])
        owner.release()

    assert as_user(first, start) == "done"
    refused = as_user(second, lambda: start(False, "auto"))
    assert "belongs to another user (number 65534)" in refused and "--shared" in refused
    again = as_user(second, lambda: start(True, "auto"))
    if shared:
        assert again == "done" and (run / "metrics.jsonl").read_text().count("a line") == 2
        assert (run / "checkpoints" / "step-1").stat().st_uid == second
        assert as_user(first, lambda: start(True, "auto")) == "done"
    else:
        assert "no permission to write" in again
        assert (run / "metrics.jsonl").read_text().count("a line") == 1
