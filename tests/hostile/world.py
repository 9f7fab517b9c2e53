"""The world in which launchers meet bad input: one of each kind of file that the program reads, made by itself.

`work` is the working directory, `home` and `tmp` are what the environment says, `outside` is nobody's business. The
world lies at one path for all cases, and is put back after each that changed it.
"""

from __future__ import annotations

import bz2
import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tests.corpus import write_corpus
from tests.hostile.prison import ROOT, Outcome, run
from tests.hostile.rules import SECRET
from tests.hostile.watch import State, changes, files_with, state
from tests.studies.comparison.test_report import write as write_comparison
from tests.studies.glue.glue_files import write_task

SMALL = [
    "--corpus.cache_dir=cache",
    "--corpus.vocab_size=200",
    "--corpus.sequence_length=32",
    "--corpus.eval_percent=10",
    "--corpus.max_leak=100",
    "--model.hidden_size=32",
    "--model.max_positions=32",
    "--tokens_per_step=256",
    "--eval_sequences=8",
    "--eval_every=2",
    "--log_every=1",
    "--warmup_steps=1",
    "--precision=fp32",
    "--stages=1:2,2:2,4:2",
    "--checkpoint_every=1",
    "--tracking=none",
]
"""Options of a run of a second; the quickstart's model and data are too large for thousands of cases."""
PREPARE = ["--corpus.vocab_size=200", "--corpus.eval_percent=10", "--workers=1", "--max_leak=100"]
RECIPE = {
    "name": "mine",
    "data": "corpus",
    "stages": [{"layers": 1, "steps": 2}, {"layers": 2, "steps": 2, "lr": 1e-3}],
    "model": {"hidden_size": 32, "max_positions": 32, "norm": "pre"},
    "corpus": {"cache_dir": "cache", "vocab_size": 200, "sequence_length": 32, "eval_percent": 10, "max_leak": 100},
    "optimizer": {"betas": [0.9, 0.98], "weight_decay": 0.01},
    "tokens_per_step": 256,
    "eval_sequences": 8,
    "precision": "fp32",
    "tracking": "none",
    "seed": 1,
}
MAY_CHANGE = ("work/cache", "home", "tmp", "words")
"""What also a refused command may fill: caches, which are not its user's work."""


class World:
    """The world of the battery, with its pristine copy beside it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.work = folder / "world", folder / "world" / "work"
        self._pristine = folder / "pristine"
        for name in ("work", "home", "tmp", "outside/folder"):
            (self.root / name).mkdir(parents=True)
        (self.root / "outside" / "secret.txt").write_text(SECRET + "\n")
        (self.root / "outside" / "folder" / "secret.txt").write_text(SECRET + "\n")
        _fill(self)
        shutil.copytree(self.root, self._pristine, symlinks=True)
        self._before = self.state()

    def run(
        self,
        script: str,
        *options: str,
        closed: Sequence[int] = (),
        without: Callable[[], None] | None = None,
        **environment: str,
    ) -> Outcome:
        """Run a launcher in `work`."""
        given = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }
        environment = given | environment
        return run(script, options, folder=self.root, environment=environment, closed=closed, without=without)

    def state(self) -> State:
        return state(self.root)

    def restore(self) -> None:
        """Make the world what it was, if it is not."""
        if self.state() == self._before:
            return
        for path in self.root.iterdir():
            shutil.rmtree(path)
            if (self._pristine / path.name).exists():
                shutil.copytree(self._pristine / path.name, path, symlinks=True)

    def mend(self, path: Path) -> None:
        """Make one file or folder what it was."""
        was = self._pristine / path.relative_to(self.root)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if was.is_dir():
            shutil.copytree(was, path, symlinks=True)
        elif was.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(was, path)

    def faults(
        self,
        script: str,
        *options: str,
        mutated: Path | None = None,
        without: Callable[[], None] | None = None,
        **environment: str,
    ) -> list[str]:
        """What is wrong with a launcher's behaviour in the world as it is; `mutated` is what was made bad in it.

        A refused command must leave everything as it was, or else the same command must work once its input is mended.
        """
        before = self.state()
        outcome = self.run(script, *options, without=without, **environment)
        found = outcome.faults()
        after = self.state()
        changed = changes(before, after)
        found += [f"changes {path}" for path in changed if path.startswith("outside")]
        spilt = [path for path in files_with(self.root, SECRET.encode()) if not path.startswith("outside")]
        if spilt or SECRET in outcome.out + outcome.err:
            found.append(f"reads the secret into {', '.join(spilt) or 'its words'}")
        left = [path for path in changed if not path.startswith(MAY_CHANGE)]
        if not found and outcome.code == 2 and left and mutated is not None:
            self.mend(mutated)
            again = self.run(script, *options, **environment)
            if again.code != 0:
                found.append(f"leaves {left[:4]}, and once mended: {again}")
        return [f"{fault}\n  {outcome}" for fault in found]


def _fill(world: World) -> None:
    """One of everything that can be read."""
    work = world.work
    write_corpus(work / "corpus")
    text = (work / "corpus" / "corpus.txt").read_text()
    (work / "recipe.json").write_text(json.dumps(RECIPE, indent=1))
    shutil.copy(ROOT / "ds_configs" / "zero2.json", work / "ds.json")
    shutil.copy(ROOT / "ds_configs" / "zero2.json", work / "default.json")
    _formats(work / "formats", text)
    write_task(work / "glue", "RTE", train=16, dev=8)
    write_comparison(work / "comparison")
    _must(world.run("prepare_data.py", "--data=corpus", "--output_dir=prepared", *PREPARE))
    given = ["--tokenizer=prepared/tokenizer", "--max_leak=100", "--workers=1"]
    _must(world.run("prepare_data.py", "--data=formats/a.jsonl", "--output_dir=other", *given))
    (work / "mixture.json").write_text(json.dumps({"prepared": 2, "other": 1.5}))
    _must(world.run("pretrain.py", *pretrain("run")))
    shutil.copytree(work / "run", work / "finished", symlinks=True)
    shutil.copytree(work / "run" / "export" / "stage-3-4L", work / "model")
    _unfinish(work / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "tokenizer").mkdir(exist_ok=True)
        shutil.copy(work / "model" / name, work / "tokenizer" / name)


def pretrain(output: str, data: str = "corpus", *options: str) -> list[str]:
    """Options of a small run."""
    return [f"--deepspeed_config={'default.json'}", f"--data={data}", f"--output_dir={output}", *SMALL, *options]


def _unfinish(run_dir: Path) -> None:
    """Make of a finished run one that was killed in its last step: two checkpoints, of which it goes on."""
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "report", ignore_errors=True)
    (run_dir / "export" / "final").unlink()
    newest = json.loads((run_dir / "saved.json").read_text())
    shutil.rmtree(run_dir / "checkpoints" / newest["newest"])
    left = sorted((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (run_dir / "saved.json").write_text(json.dumps(newest | {"newest": left[-1].name}))


def _formats(folder: Path, text: str) -> None:
    """The corpus in every format that is read."""
    folder.mkdir()
    documents = text.strip().split("\n\n")
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    pages = "".join(
        f"<page><title>Page {n}</title><ns>0</ns><id>{n}</id><revision><id>{n}</id><model>wikitext</model>"
        f'<format>text/x-wiki</format><text xml:space="preserve">{document}</text></revision></page>\n'
        for n, document in enumerate(documents)
    )
    (folder / "a.txt").write_text(text)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.xml").write_text(
        f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">\n{pages}</mediawiki>\n'
    )
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "b.txt.bz2").write_bytes(bz2.compress(text.encode()))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "a.parquet")


def _must(outcome: Outcome) -> None:
    assert outcome.code == 0, str(outcome)
