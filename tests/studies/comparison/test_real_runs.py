"""A comparison with the real pretrain.py: the corpus changes in the middle of it, and its runs do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.studies.comparison.report import write_comparison
from ds_stacking.studies.comparison.running import Comparison
from ds_stacking.studies.comparison.starting import slots
from tests.corpus import small_options, write_corpus

PRETRAIN = Path(__file__).parents[3] / "launchers" / "pretrain.py"


def compare(folder: Path) -> Comparison:
    options = [*small_options(folder), "--stages=1:12,2:24", "--tracking=none", f"--output_dir={folder / 'compare'}"]
    return Comparison(
        config=parse_run(options),
        options=options,
        arms=["scratch", "stack", "gong2019"],
        seeds=1,
        clock="cpu",
        launch=[sys.executable, str(PRETRAIN)],
        slots=slots(2, pinned=True),
        log=lambda line: None,
    )


@pytest.mark.slow
def test_a_corpus_that_changes_changes_no_run(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    compare(tmp_path).plan()
    write_corpus(tmp_path / "corpus", documents=300)
    assert compare(tmp_path).run() == []
    plan = json.loads((tmp_path / "compare/comparison.json").read_text())
    ends = [json.loads(path.read_text()) for path in (tmp_path / "compare").glob("*/*/*/summary.json")]
    assert len(ends) == len(plan["runs"]) >= 11
    assert {end["data_fingerprint"] for end in ends} == {plan["data_fingerprint"]}
    assert len({end["cache_loss"] for end in ends}) == len({end["unigram_cross_entropy"] for end in ends}) == 1
    pilot = json.loads((tmp_path / "compare/pilot/summary.json").read_text())
    assert pilot["data_fingerprint"] == plan["data_fingerprint"]
    spent = {
        "/".join(path.parts[-4:-2]): json.loads(path.read_text())["flops"]
        for path in (tmp_path / "compare").glob("*/*/*/summary.json")
    }
    unit = spent["scratch/x1"]
    assert spent["shallow_1/flops"] == pytest.approx(unit, rel=0.05)
    assert spent["stack/flops"] == pytest.approx(unit, rel=0.05)
    assert "cannot be told" in write_comparison(tmp_path / "compare").splitlines()[0], "one seed tells nothing"


@pytest.mark.slow
def test_without_the_pin_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the test above is to find: runs that read their source anew."""
    write_corpus(tmp_path / "corpus")
    begun = compare(tmp_path)
    begun.plan()
    write_corpus(tmp_path / "corpus", documents=300)
    start = begun.starter.start
    monkeypatch.setattr(
        begun.starter,
        "start",
        lambda path, options, watch=None: start(path, [o for o in options if "fingerprint" not in o], watch),
    )
    assert begun.run(task=2) == [], "one run of shallow_1"
    plan = json.loads((tmp_path / "compare/comparison.json").read_text())
    (end,) = [json.loads(path.read_text()) for path in (tmp_path / "compare").glob("*/*/*/summary.json")]
    assert end["data_fingerprint"] != plan["data_fingerprint"]
