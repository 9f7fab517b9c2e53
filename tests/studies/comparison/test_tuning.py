"""The choice of a learning rate: between two others, by seeds of its own, none at which a seed diverges."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.studies.comparison.tuning import (
    FACTOR,
    MOST_RATES,
    chosen,
    first_rates,
    label,
    mean_loss,
    next_rate,
    tuning_seeds,
)
from tests.studies.comparison.fake_runs import comparison, plan, summaries


def search(loss: Callable[[float], float], lr: float) -> dict[float, float]:
    """The rates that a tuning tries, and their losses."""
    losses = {rate: loss(rate) for rate in first_rates(lr)}
    while (rate := next_rate(losses)) is not None:
        assert rate not in losses
        losses[rate] = loss(rate)
    return losses


@pytest.mark.parametrize("best", [1e-4, 1.1e-3, 2e-3, 3.1e-3, 8e-3])
def test_the_best_is_never_at_the_edge(best: float) -> None:
    losses = search(lambda lr: math.log(lr / best) ** 2, 2e-3)
    rates = sorted(losses)
    found = chosen(losses)
    assert found is not None
    if len(rates) < MOST_RATES:
        assert rates[0] < found < rates[-1]
        assert abs(math.log(found / best)) <= math.log(FACTOR) / 2 + 1e-3
    assert all(b / a == pytest.approx(FACTOR, rel=1e-3) for a, b in zip(rates, rates[1:], strict=False))
    assert len({label(rate) for rate in rates}) == len(rates) and all(float(label(rate)[2:]) == rate for rate in rates)


def test_a_rate_at_which_one_seed_diverges_is_none_to_choose() -> None:
    assert mean_loss([1.0, 3.0]) == 2.0
    assert mean_loss([1.0, None]) == mean_loss([]) == math.inf
    losses = search(lambda lr: math.inf if lr > 2e-3 else -lr, 2e-3)
    assert chosen(losses) == 2e-3 and len(losses) == 3
    losses = search(lambda lr: math.inf if lr > 1e-3 else math.log(lr / 5e-4) ** 2, 2e-3)
    assert abs(math.log((chosen(losses) or 0) / 5e-4)) <= math.log(FACTOR) / 2


def test_where_all_diverge_it_ends() -> None:
    losses = search(lambda lr: math.inf, 2e-3)
    assert chosen(losses) is None and len(losses) == MOST_RATES


def test_its_seeds_are_none_that_count() -> None:
    assert not set(tuning_seeds(1, 5)) & set(range(1, 1001))
    assert tuning_seeds(1, 0) == []


def test_every_arm_is_tuned_on_seeds_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEST", "0.0063")
    own = ["mine=1:10,4:90,lr=0.01"]
    assert comparison(tmp_path, tune=2, own=own, seeds=1).run() == []
    saved = plan(tmp_path)
    assert saved["tuning"]["seeds"] == [100_001, 100_002]
    for arm in ("scratch", "shallow_1", "shallow_2", "stack"):
        assert saved["tuning"]["arms"][arm] == {
            "rates": [0.001333, 0.002, 0.003, 0.0045, 0.00675, 0.01013], "chosen": 0.00675,
        }  # fmt: skip
        assert saved["arms"][arm]["lr"] == 0.00675
    assert "mine" not in saved["tuning"]["arms"] and saved["arms"]["mine"]["lr"] == 0.01
    ends = summaries(tmp_path)
    assert {path for path in ends if path.startswith("stack/lr")} == {
        f"stack/lr{lr:g}/seed-{seed}"
        for lr in saved["tuning"]["arms"]["stack"]["rates"]
        for seed in (100_001, 100_002)
    }
    assert set(ends) == set(saved["runs"])
    rates = {
        path: json.loads((tmp_path / "compare" / path / "config.json").read_text())["lr"]
        for path in ends
        if path.endswith("seed-1")
    }
    assert {lr for path, lr in rates.items() if not path.startswith("mine")} == {0.00675}
    assert rates["mine/flops/seed-1"] == 0.01
    assert comparison(tmp_path, tune=2, own=own, seeds=1).run() == [], "nothing is left to do"
    with pytest.raises(UserError, match="was tuned on 2 seeds, and not on 0; give --tune 2"):
        comparison(tmp_path, own=own, seeds=1).plan()


def test_a_rate_that_diverges_is_not_chosen_and_other_failures_are_no_word_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BEST", "0.003")
    monkeypatch.setenv("FAKE_DIVERGE", "0.0025")
    assert comparison(tmp_path, tune=1, seeds=1, arms=["scratch"]).run() == []
    assert plan(tmp_path)["arms"]["scratch"]["lr"] == 0.002
    shutil.rmtree(tmp_path / "compare")
    monkeypatch.setenv("FAKE_FAIL", "scratch/lr0.003/seed-100001")
    monkeypatch.delenv("FAKE_DIVERGE")
    assert comparison(tmp_path, tune=1, seeds=1, arms=["scratch"]).run() == ["scratch/lr0.003/seed-100001"]
    assert plan(tmp_path)["tuning"]["arms"]["scratch"]["chosen"] is None
    assert not (tmp_path / "compare/scratch/x1").exists(), "no run that counts without a rate"
    monkeypatch.delenv("FAKE_FAIL")
    assert comparison(tmp_path, tune=1, seeds=1, arms=["scratch"]).run() == []
    assert plan(tmp_path)["arms"]["scratch"]["lr"] == 0.003


def test_a_task_tunes_its_own_arm_alone(tmp_path: Path) -> None:
    assert comparison(tmp_path, tune=1, seeds=2).run(task=7) == []
    assert {path.split("/")[0] for path in summaries(tmp_path)} == {"stack"}
    assert "stack/flops/seed-2" in summaries(tmp_path) and "stack/flops/seed-1" not in summaries(tmp_path)


def test_who_waits_for_a_tuning_hears_a_stop(tmp_path: Path) -> None:
    comparison(tmp_path, tune=1).plan()
    waiting = comparison(tmp_path, tune=1)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with FileLock(tmp_path / "compare/.tune-stack"), pytest.raises(RunAgain, match="SIGTERM"):
        timer.start()
        waiting.run(task=6)


def test_a_rate_that_another_task_has_added_is_no_fault(tmp_path: Path) -> None:
    """The task that tuned was stopped after it had planned a fourth rate; one that had counted three takes over."""

    def add(text: str) -> None:
        if text.startswith("4 arms"):
            ours.plan_file.add_rate(ours.resolved["stack"], 0.0045)

    ours = comparison(tmp_path, tune=1, log=add)
    assert ours.run(task=6) == []
    assert "stack/lr0.0045/seed-100001" in summaries(tmp_path)
