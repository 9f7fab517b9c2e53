"""What a comparison's report says in words: the first line, what it refuses to say, and how the runs were made."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from ds_stacking.studies.comparison.conclusion import conclusion, headline, summary_lines
from ds_stacking.studies.comparison.effects import (
    depth_pays,
    gain,
    least_saving,
    pairs,
    places,
    power,
    saving,
    shallow_arms,
)
from ds_stacking.studies.comparison.provenance import (
    below_cache,
    context_sentences,
    provenance,
    tuned_rates,
    warmup_sentences,
)
from ds_stacking.studies.comparison.results import Results, read_comparison
from ds_stacking.studies.comparison.tables import end_rows
from ds_stacking.studies.comparison.words import nats_cell, saving_cell
from tests.studies.comparison.made_up import ARMS, arm, change, plan, write

MORE = ARMS | {
    "reset": arm("grown", [1, 2, 4], "scratch"),
    "scratch_wsd": arm("scratch", [4], None),
    "late": arm("grown", [1, 4], "scratch_wsd"),
}


def read(folder: Path, made: Mapping[str, Any] | None = None, noise: float = 0.01, **above: float) -> Results:
    """A comparison whose arms end `above` scratch by so many nats, 0.2 for shallow ones."""
    rng = random.Random(11)
    losses = {"shallow_1": 0.2, "shallow_2": 0.2} | above

    def loss(name: str, units: float, seed: int) -> float:
        return 5.7 + losses.get(name, 0.0) - 0.5 * math.log(units) + 0.02 * seed + rng.gauss(0, noise)

    return read_comparison(write(folder, made, loss))


def test_depth_that_does_not_pay_comes_first(tmp_path: Path) -> None:
    results = read(tmp_path / "c", shallow_1=-0.1, shallow_2=-0.3, stack=-0.1)
    first, second, *others = conclusion(results)
    assert depth_pays(results) is False
    assert first.startswith("Depth does not pay here: 2 layers throughout (shallow_2) end 0.")
    assert "nats below 4 layers from scratch at equal FLOPs (5 seeds, 95 % interval 0." in first
    assert first.endswith("so a saving by stacking means nothing.")
    assert second.startswith("1 layer throughout (shallow_1) ends 0.")
    assert not any("saves" in sentence for sentence in others), "no saving is stated"
    assert any(sentence.startswith("stack ends 0.") for sentence in others)


def test_one_shallow_arm_as_good_is_enough(tmp_path: Path) -> None:
    results = read(tmp_path / "c", shallow_1=0.3, shallow_2=0.0, noise=0.005)
    assert depth_pays(results) is False
    assert "less than the spread of the seeds" in conclusion(results)[0] or "below 4 layers" in conclusion(results)[0]


def test_where_depth_pays_the_arms_come_first(tmp_path: Path) -> None:
    results = read(tmp_path / "c", plan(arms=MORE), stack=-0.1, late=-0.08, noise=0.005)
    first, second, *_ = conclusion(results)
    assert depth_pays(results) is True
    assert first.startswith("stack saves 1") and "of scratch's FLOPs at equal loss; late saves 1" in first
    assert first.endswith("no difference is shown for reset.")
    assert second.startswith("Depth pays: 4 layers from scratch end 0.")


def test_no_difference_says_how_many_seeds_would_be_needed(tmp_path: Path) -> None:
    results = read(tmp_path / "c", noise=0.03)
    need = power(results, "stack")
    assert need is not None and need.of_saving and need.seeds
    seeds = f"an interval of ±5 points of the saving needs about {need.seeds} seeds"
    assert headline(results) == f"No arm is shown to differ from scratch; {seeds}."
    assert f"about {need.seeds} for stack." in " ".join(conclusion(results))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (plan(seeds=[1]), "have one seed in common, which shows no spread"),
        (plan(arms={name: made for name, made in ARMS.items() if "shallow" not in name}), "no arm stays shallow"),
        (plan(budgets=[0.5, 0.9, 1.4]), "has no budget of 1, which the arms spend"),
        (
            plan(arms={n: dict(a, baseline=None) for n, a in ARMS.items() if n != "scratch"}),
            "scratch was left out",
        ),
    ],
    ids=["one seed", "no shallow arm", "no budget of 1", "no scratch"],
)
def test_whether_depth_pays_may_not_be_known(tmp_path: Path, made: dict[str, Any], reason: str) -> None:
    results = read(tmp_path / "c", made, stack=-0.1)
    first, *others = conclusion(results)
    assert depth_pays(results) is None
    assert first.startswith("Whether depth pays cannot be told: ") and reason in first
    assert first.endswith("savings are not to be believed until it can.")
    assert not any("saves" in sentence for sentence in others)


def test_a_shallow_arm_without_runs_leaves_depth_unknown_unless_another_decides(tmp_path: Path) -> None:
    for name, loss, expected in (("a", 0.2, None), ("b", -0.2, False)):
        results = read(tmp_path / name, shallow_1=loss)
        results.ends = [end for end in results.ends if end.arm != "shallow_2"]
        assert depth_pays(results) is expected
    results.ends = [end for end in results.ends if end.arm != "shallow_1"]
    assert "have no finished seed in common" in conclusion(results)[0]


def test_close_calls_are_not_decided(tmp_path: Path) -> None:
    results = read(tmp_path / "c", plan(seeds=[1, 2]), shallow_1=0.05, shallow_2=0.3, noise=0.02)
    assert depth_pays(results) is None and "which is too close to decide" in conclusion(results)[0]


def test_losses_that_no_seed_moves_decide_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", None, lambda name, units, seed: 5.0 + 0.5 * (name != "scratch") - math.log(units))
    assert "differ by the same in every seed, which no chance would give" in conclusion(read_comparison(folder))[0]


def test_arms_without_any_scratch_are_compared_with_each_other(tmp_path: Path) -> None:
    arms = {name: dict(made, baseline=None) for name, made in MORE.items() if made["kind"] != "scratch"}
    results = read(tmp_path / "c", plan(arms=arms), stack=-0.1)
    assert {(pair.first, pair.second) for pair in pairs(results)} >= {("shallow_1", "stack"), ("stack", "reset")}
    assert len(pairs(results)) == 10 and all(pair.difference.low is not None for pair in pairs(results))


def test_what_lies_outside_the_budgets_is_said(tmp_path: Path) -> None:
    for name, loss, sentence in (
        ("a", -0.3, "below that of scratch at 1.4 times the FLOPs in 5 of 5 seeds: add larger budgets."),
        ("b", 0.5, "above that of scratch at 0.5 times the FLOPs in 5 of 5 seeds: add smaller budgets."),
    ):
        assert sentence in " ".join(conclusion(read(tmp_path / name, stack=loss)))
    assert "The saving of stack is more than 2" in " ".join(conclusion(read(tmp_path / "c", stack=-0.3)))
    folder = write(tmp_path / "d")
    change(folder / "scratch/x0.7/seed-3/summary.json", eval_loss_masked=9.0)
    for path in folder.glob("scratch/*/seed-2/summary.json"):
        path.unlink()
    said = " ".join(conclusion(read_comparison(folder)))
    assert "the losses of scratch do not fall with its budget in 1 of 5 seeds" in said
    assert "scratch has fewer than two finished budgets, or lacks one that is planned, in 1 of 5 seeds." in said


def test_a_baseline_that_another_scratch_beats_is_said(tmp_path: Path) -> None:
    results = read(tmp_path / "c", plan(arms=MORE), scratch_wsd=0.15)
    said = conclusion(results)
    assert any("scratch_wsd, the baseline of late, itself ends 0.1" in sentence for sentence in said)
    assert "a baseline that itself ends 0.1" in said[0], "in the first line too"


def test_holms_correction_is_for_the_arms_asked_about(tmp_path: Path) -> None:
    """One of many arms has an interval without 0 now and then; that alone is no difference, and it is said."""
    arms = ARMS | {f"own_{i}": arm("own", [1, 2, 4], "scratch") for i in range(12)}
    results = read(tmp_path / "c", plan(arms=arms), noise=0.03, own_0=-0.06)
    scratch = [end.loss for end in results.of("scratch", "x1").values()]
    names = ["stack", *(f"own_{i}" for i in range(12))]
    p = {n: stats.ttest_rel(scratch, [end.loss for end in results.of(n, "flops").values()]).pvalue for n in names}
    chance = {name for name in names if p[name] < 0.05}
    assert chance and 13 * min(p.values()) >= 0.05, "the numbers of this test"
    assert headline(results).startswith("No arm is shown to differ")
    told = [s for s in conclusion(results) if s.endswith("after Holm's correction for 13 arms that is no difference.")]
    assert {sentence.split()[0] for sentence in told} == chance


def test_the_spread_is_that_of_the_arm_that_spreads_more(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "c", None, lambda name, units, seed: 5.7 - math.log(units) + 0.1 * seed * ("low" in name)
    )
    for check in shallow_arms(read_comparison(folder)):
        assert check.spread == pytest.approx(statistics.stdev([0.1, 0.2, 0.3, 0.4, 0.5]))
        assert check.advantage.mean == pytest.approx(0.3) and check.pays is True


def test_incomplete_comparisons_say_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    for path in folder.glob("*/*/seed-5/summary.json"):
        path.unlink()
    (folder / "stack/flops/seed-5.failed").write_text("out of memory")
    assert "28 of 35 runs have finished, 1 failed." in conclusion(read_comparison(folder))
    for path in folder.glob("*/*/*/summary.json"):
        path.unlink()
    assert conclusion(read_comparison(folder)) == [
        "Nothing can be said yet: none of the 35 runs that count has finished."
    ]
    assert depth_pays(read_comparison(folder)) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "4 arms tried: 1 from scratch, 2 shallow and 1 grown."),
        ({}, "Seeds 1, 2, 3, 4 and 5 fixed before the first run."),
        ({"seeds": [1, 2, 3], "added_seeds": [4, 5]}, "Seeds 4 and 5 were added after first results"),
        ({}, "All arms share one learning rate, 0.002, that was tuned for none of them."),
        (
            {"arms": ARMS | {"stack": arm("grown", [1], "scratch", lr=0.001)}},
            "shallow_2 0.002 and stack 0.001) and tun",
        ),
        ({}, "Commit c7241b8aa012; torch 2.11.0, deepspeed 0.18.2."),
        ({"commit": "c7241b8-dirty"}, "Commit c7241b8 with changes that were not committed"),
        ({"commit": None}, "The commit of the code is not known"),
        ({"later_commits": ["b" * 40]}, "gone on with at bbbbbbbbbbbb."),
        ({"later_versions": [{"torch": "2.12.0"}]}, "deepspeed 0.18.2. It was gone on with torch 2.12.0."),
        ({"later_parallel": [2, 4]}, "It was gone on with 2 and 4 at a time"),
        ({"added_arms": ["stack"]}, "stack was added after first results."),
        ({"added_budgets": [0.7, 1.4]}, "Of scratch the budgets 0.7 and 1.4 were added after first results."),
        ({"added_budgets": [1.4]}, "Of scratch the budget 1.4 was added"),
        ({"machine": {"processor": "Z80", "cores": 8, "gpus": ["A1"]}}, "Planned on Z80, 8 cores, A1."),
        ({}, "Data docs, fingerprint abc."),
        ({}, "Seconds are processor time of training and growth;"),
        ({"parallel": 2}, "training and growth, 2 runs at a time;"),
    ],
)
def test_the_report_says_how_it_was_made(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    folder = write(tmp_path / "c")
    change(folder / "comparison.json", **fields)
    assert words in " ".join(provenance(read_comparison(folder)))


def test_tuning_is_counted_apart_and_rates_at_the_edge_are_flagged(tmp_path: Path) -> None:
    made = plan(tuned={"scratch": [0.001, 0.002, 0.004], "stack": [0.001, 0.002, 0.004]})
    made["tuning"]["arms"]["stack"]["chosen"] = 0.004
    made["tuning"]["seeds"] = [100001, 3]
    said = " ".join(provenance(read_comparison(write(tmp_path / "c", made))))
    # six runs of a unit beside 5 seeds of 3 arms and of scratch's 0.5 + 0.7 + 1 + 1.4 units
    assert f"Beside them 6 runs for tuning, which took 30.0 TFLOP and 12:01 min, {600 / 39:.0f} % of all FLOPs" in said
    assert "It was not tuned for shallow_1 and shallow_2." in said
    assert "lies at the edge of those tried for stack (0.004)" in said
    assert "The chosen rate is not the best of those tried for stack." in said
    assert "Learning rates were tuned on seed 3, which count too" in said


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (
            4.0,
            "No arm is shown to pass the cache line, so that it uses its context (at one unit, 95 % t-",
        ),
        (9.0, "All arms pass the cache line (at one unit"),
        (5.65, "No arm is shown to pass the cache line"),  # scratch does at its budget of 1.4 alone
        (5.735, "No arm is shown to pass the cache line"),  # its mean lies below, the interval does not
        (
            5.76,
            "Only scratch passes the cache line (at one unit, 95 % t-intervals; best scratch 5.73, the cache line",
        ),
        (..., "whether any arm uses its context is not known"),
    ],
)
def test_the_cache_line_tells_whether_context_is_used(tmp_path: Path, cache: Any, words: str) -> None:
    folder = write(tmp_path / "c", None, lambda name, units, seed: worse(name) + 0.01 * seed - 0.5 * math.log(units))
    for path in folder.glob("*/*/*/summary.json"):
        change(path, cache_loss=cache)
    assert words in " ".join(provenance(read_comparison(folder)))


def worse(name: str) -> float:
    return 5.7 + 0.1 * (name != "scratch")


def test_the_cache_line_is_passed_by_a_paired_t_interval(tmp_path: Path) -> None:
    results = read(tmp_path / "c", noise=0.03)
    found = below_cache(results, "stack")
    losses = [end.loss for end in results.of("stack", "flops").values()]
    interval = stats.ttest_rel([5.3] * 5, losses).confidence_interval(0.95)
    assert found is not None and (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_one_seed_or_a_failed_one_does_not_tell_whether_context_is_used(tmp_path: Path) -> None:
    (said,) = context_sentences(read(tmp_path / "a", plan(seeds=[1])))
    assert said.startswith("Whether scratch, shallow_1, shallow_2 and stack pass the cache line cannot be told")
    read(tmp_path / "b", noise=0.01)
    fail(tmp_path / "b/stack/flops/seed-2")
    (said,) = context_sentences(read_comparison(tmp_path / "b"))
    assert "; whether stack passes the cache line cannot be told (" in said


def test_warm_up_is_given_as_a_share_of_the_flops(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", plan(seeds=[1, 2]))
    made = json.loads((folder / "comparison.json").read_text())
    assert "Warm-up" not in " ".join(provenance(read_comparison(folder))), "older plans do not tell"
    flops = {1: 1.0, 2: 1.9, 4: 3.7}
    made["runs"] |= {f"stack/flops/seed-{seed}": [[1, 40], [2, 100], [4, 300]] for seed in (1, 2)}
    costs = {str(layers): {"flops": cost, "seconds": 1.0} for layers, cost in flops.items()}
    recipe = made["recipe"] | {"warmup_steps": 50}
    change(folder / "comparison.json", costs=costs, recipe=recipe, runs=made["runs"])
    stack = (40 * 1.0 + 10 * 1.9) / (40 * 1.0 + 100 * 1.9 + 300 * 3.7)
    shares = f"{50 / 320:.1%} of scratch at 0.5, {50 / 640:.1%} of scratch at 1 and {stack:.1%} of stack."
    assert "Warm-up is 50 steps in every run, in FLOPs " + shares.replace("%", " %") in " ".join(
        provenance(read_comparison(folder))
    )
    recipe["stages"][0]["lr"] = 1e-3
    change(folder / "comparison.json", recipe=recipe)
    assert warmup_sentences(read_comparison(folder)) == [], "a stage of its own rate has its own warm-up"


def test_tuning_runs_that_diverged_are_not_counted_and_it_is_said(tmp_path: Path) -> None:
    write(tmp_path / "c", plan(tuned={"stack": [0.001, 0.002, 0.004]}))
    fail(tmp_path / "c/stack/lr0.004/seed-100001", ends_with_code=False)
    said = " ".join(provenance(read_comparison(tmp_path / "c")))
    assert "of all time; what 1 of them that failed or diverged spent is not counted." in said


def test_several_comparisons_have_a_line_each(tmp_path: Path) -> None:
    both = [read(tmp_path / "a", shallow_1=-0.1), read(tmp_path / "b", noise=0.03)]
    first, second = summary_lines(both)
    assert first.startswith("a: Depth does not pay here: ") and second.startswith("b: No arm is shown to differ")
    assert summary_lines([]) == []


def test_seeds_that_failed_are_no_secret(tmp_path: Path) -> None:
    read(tmp_path / "c", stack=-0.1, noise=0.005)
    run = tmp_path / "c/stack/flops"
    change(run / "seed-2/summary.json", eval_loss_masked=None)
    (run / "seed-4/summary.json").unlink()
    (run / "seed-4.failed").write_text("ended with code 1: error: its loss or gradients are not finite.")
    results = read_comparison(tmp_path / "c")
    assert results.failed.keys() == {"stack/flops/seed-2", "stack/flops/seed-4"} and not results.missing
    said = "stack failed at equal FLOPs in seeds 2 and 4: what needs those runs has no mean"
    assert any(sentence.startswith(said) for sentence in conclusion(results))


@pytest.mark.parametrize("ends_with_code", [True, False], ids=["failed", "not finite"])
def test_a_failed_seed_of_an_arm_leaves_no_mean_anywhere(tmp_path: Path, ends_with_code: bool) -> None:
    read(tmp_path / "c", stack=-0.1, noise=0.005)
    fail(tmp_path / "c/stack/flops/seed-2", ends_with_code)
    results = read_comparison(tmp_path / "c")
    first, *others = conclusion(results)
    assert first.startswith("No arm can be told from its baseline yet") and not any("saves" in s for s in others)
    assert "The saving of stack is not given: its run or one of scratch failed in 1 of 5 seeds." in others
    for cost in ("flops", "tokens", "seconds"):
        for found in (gain(results, "stack", cost), saving(results, "stack", cost)):
            assert found.values[2] is None and found.holes == {2: "failed"} and not found.left_out
            assert found.mean is None and found.low is None and found.p is None
        assert least_saving(results, "stack", cost) is None
    told = {pair.second: pair.difference for pair in pairs(results) if pair.first == "scratch"}
    assert told["stack"].mean is None and told["stack"].n == 4 and told["shallow_1"].mean is not None
    assert nats_cell(told["stack"]).split(", ")[1] == "failed" and "outside" not in nats_cell(told["stack"])
    assert saving_cell(saving(results, "stack", "flops"), None).split(", ")[1] == "failed"
    assert next(row for row in end_rows(results) if row[0] == "stack")[1] == "4 (1 failed)"


def test_an_arm_that_failed_is_told_from_one_that_does_not_differ(tmp_path: Path) -> None:
    read(tmp_path / "c", plan(arms=MORE), stack=-0.1, noise=0.005)
    fail(tmp_path / "c/reset/flops/seed-1")
    said = conclusion(read_comparison(tmp_path / "c"))
    assert said[0].startswith("stack saves 1") and said[0].endswith("a failed run leaves open whether reset does.")
    fail(tmp_path / "c/stack/flops/seed-1")
    said = conclusion(read_comparison(tmp_path / "c"))
    assert said[0].startswith("No arm is shown to differ") and said[0].endswith("whether stack and reset do.")


@pytest.mark.parametrize(
    ("run", "name"), [("scratch/x1", "4 layers from scratch"), ("shallow_2/flops", "2 layers throughout (shallow_2)")]
)
def test_a_failed_seed_leaves_open_whether_depth_pays(tmp_path: Path, run: str, name: str) -> None:
    assert depth_pays(read(tmp_path / "c", stack=-0.1, noise=0.005)) is True
    fail(tmp_path / "c" / run / "seed-3")
    results = read_comparison(tmp_path / "c")
    assert depth_pays(results) is None
    first = conclusion(results)[0]
    assert first.startswith("Whether depth pays cannot be told: ") and f"{name} failed in seed 3" in first


def test_an_unfinished_seed_is_no_failed_one(tmp_path: Path) -> None:
    read(tmp_path / "c", stack=-0.1, noise=0.005)
    (tmp_path / "c/stack/flops/seed-2/summary.json").unlink()
    found = gain(read_comparison(tmp_path / "c"), "stack", "flops")
    assert list(found.values) == [1, 3, 4, 5] and found.mean is not None


@pytest.mark.parametrize("is_failed", [True, False])
@pytest.mark.parametrize("budget", ["0.5", "0.7", "1", "1.4"])
def test_scratch_is_not_interpolated_where_a_planned_budget_has_no_end(
    tmp_path: Path, budget: str, is_failed: bool
) -> None:
    read(tmp_path / "c", stack=-0.1, noise=0.005)
    if is_failed:
        fail(tmp_path / f"c/scratch/x{budget}/seed-4")
    else:
        (tmp_path / f"c/scratch/x{budget}/seed-4/summary.json").unlink()
    results = read_comparison(tmp_path / "c")
    hole = "failed" if is_failed else "missing"
    for found in (gain(results, "stack", "flops"), saving(results, "stack", "flops")):
        assert found.values[4] is None and found.mean is None and found.holes == {4: hole}
        assert nats_cell(found).split(", ")[3] == hole
    assert places(results, "stack")[hole] == [4]
    said = f"scratch failed at a budget of {budget} in seed 4: what needs that run has no mean"
    assert any(s.startswith(said) for s in conclusion(results)) == is_failed


def fail(run: Path, ends_with_code: bool = True) -> None:
    """A run that has finished failed instead."""
    if ends_with_code:
        (run / "summary.json").unlink()
        Path(f"{run}.failed").write_text("ended with code 1")
    else:
        change(run / "summary.json", eval_loss_masked=None)


def test_a_rate_at_which_a_seed_failed_has_no_mean(tmp_path: Path) -> None:
    made = plan(tuned={"stack": [0.001, 0.002, 0.003]})
    made["tuning"]["seeds"].append(100002)
    made["runs"] |= {path.replace("-100001", "-100002"): made["runs"][path] for path in made["runs"] if "/lr" in path}
    read(tmp_path / "c", made)
    (tmp_path / "c/stack/lr0.003/seed-100002/summary.json").unlink()
    change(tmp_path / "c/stack/lr0.003/seed-100001/summary.json", eval_loss_masked=1.0)
    results = read_comparison(tmp_path / "c")
    (tuned,) = tuned_rates(results)
    assert tuned.rates[0.003] is None and tuned.is_best
