"""How a comparison was made, in words: what was tried, with which seeds, rates, code, data and clock.

Whoever reads a gain must know how many arms were tried for it, what tuning cost, and whether the models have learnt
enough for the question to mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_stacking.common.words import plain
from ds_stacking.reports.table import duration, flops
from ds_stacking.studies.comparison.results import CLOCKS, End, Results
from ds_stacking.studies.comparison.words import listed, number, plural, seeds_of

KINDS = {"scratch": "from scratch", "shallow": "shallow", "grown": "grown", "own": "as given"}


@dataclass(frozen=True, kw_only=True)
class TunedRate:
    """The learning rates that were tried for an arm."""

    arm: str
    """Name of the arm."""
    rates: dict[float, float | None]
    """Mean loss over the tuning seeds by rate, by rising rate; None where not all of its runs ended with a loss."""
    chosen: float | None
    """What its runs that count were trained with; None where that is not known yet."""
    at_edge: bool
    """Whether the chosen one is the smallest or largest tried, so that a better one may lie beyond."""
    is_best: bool
    """Whether no other rate tried has a lower mean loss."""


def provenance(results: Results) -> list[str]:
    """Sentences for the paragraph under the conclusion."""
    return [
        *_arms(results),
        *_seeds(results),
        *_rates(results),
        *_code(results),
        *_data(results),
        *context_sentences(results),
    ]


def tuned_rates(results: Results) -> list[TunedRate]:
    """The learning rates that were tried, by arm."""
    tuning, found = results.plan["tuning"], []
    for arm, tuned in (tuning["arms"] if tuning else {}).items():
        rates = {rate: _mean_loss(results, arm, f"lr{rate:g}") for rate in sorted(set(tuned["rates"]))}
        chosen, known = tuned["chosen"], [loss for loss in rates.values() if loss is not None]
        near = min(rates, key=lambda rate: abs(rate - chosen)) if rates and chosen is not None else None
        own = rates[near] if near is not None else None
        found.append(
            TunedRate(
                arm=arm,
                rates=rates,
                chosen=chosen,
                at_edge=near is not None and near in (min(rates), max(rates)),
                is_best=own is None or own <= min(known),
            )
        )
    return found


def _mean_loss(results: Results, arm: str, label: str) -> float | None:
    losses = [end.loss for end in results.tuning if (end.arm, end.label) == (arm, label)]
    planned = sum(name.startswith(f"{arm}/{label}/") for name in results.plan["runs"])
    return float(np.mean(losses)) if losses and len(losses) == planned else None


def _arms(results: Results) -> list[str]:
    kinds = {words: len(results.of_kind(kind)) for kind, words in KINDS.items()}
    counts = listed(f"{count} {words}" for words, count in kinds.items() if count)
    found = [f"{plural(len(results.arms), 'arm')} tried: {counts}."] if results.arms else []
    planned = sum("/lr" in name for name in results.plan["runs"])
    if not planned:
        return found
    spent, hours = _sums(results.tuning)
    total, all_hours = _sums(results.tuning + results.ends)
    share = (
        f", {100 * spent / total:.0f} % of all FLOPs and {100 * hours / all_hours:.0f} % of all time" if spent else ""
    )
    finished = f"{len(results.tuning)} finished of " if len(results.tuning) != planned else ""
    cost = f"{flops(spent)} and {duration(hours)}{share}"
    return [*found, f"Beside them {finished}{plural(planned, 'run')} for tuning, which took {cost}."]


def _sums(ends: list[End]) -> tuple[float, float]:
    return sum(end.flops for end in ends), sum(end.seconds for end in ends)


def _seeds(results: Results) -> list[str]:
    seeds, added = results.plan["seeds"], results.plan["added_seeds"]
    found = [f"{seeds_of(seeds).capitalize()} fixed before the first run."] if seeds else []
    if added:
        were = "was" if len(added) == 1 else "were"
        found.append(
            f"{seeds_of(added).capitalize()} {were} added after first results; if because of them, the intervals are "
            f"too narrow."
        )
    tuning = results.plan["tuning"]
    both = sorted({*(tuning["seeds"] if tuning else [])} & {*seeds, *added})
    if both:
        found.append(f"Learning rates were tuned on {seeds_of(both)}, which count too: that flatters what was tuned.")
    return found


def _rates(results: Results) -> list[str]:
    tuned = tuned_rates(results)
    if not tuned:
        rates = {arm: plan.get("lr") for arm, plan in results.arms.items()}
        if len(set(rates.values())) > 1:
            by_arm = listed(f"{arm} {_rate(lr)}" for arm, lr in rates.items())
            return [f"Learning rates were given ({by_arm}) and tuned for no arm."]
        common = next(iter(rates.values()), None)
        return [f"All arms share one learning rate, {_rate(common)}, that was tuned for none of them."]
    found = [f"The learning rate was tuned for {listed(t.arm for t in tuned)}."]
    without = [arm for arm in results.arms if arm not in {t.arm for t in tuned}]
    if without:
        found.append(f"It was not tuned for {listed(without)}.")
    edge = [f"{t.arm} ({_rate(t.chosen)})" for t in tuned if t.at_edge]
    if edge:
        found.append(f"The best rate lies at the edge of those tried for {listed(edge)}: a better one may lie beyond.")
    other = [t.arm for t in tuned if not t.is_best]
    if other:
        found.append(f"The chosen rate is not the best of those tried for {listed(other)}.")
    unknown = [t.arm for t in tuned if t.chosen is None]
    return [*found, *([f"No rate is chosen yet for {listed(unknown)}."] if unknown else [])]


def _rate(rate: float | None) -> str:
    return "that of the recipe" if rate is None else f"{rate:g}"


def _code(results: Results) -> list[str]:
    commit = results.plan["commit"]
    versions = ", ".join(f"{plain(name, 60)} {plain(number, 60)}" for name, number in results.plan["versions"].items())
    if commit is None:
        said = "The commit of the code is not known"
    else:
        changed = commit.endswith("-dirty")
        name = plain(commit.removesuffix("-dirty")[:12], 60)
        said = f"Commit {name}" + (" with changes that were not committed, so nobody can run it again" * changed)
    later = [plain(commit[:12], 60) for commit in results.plan.get("later_commits", [])]
    others = [f"Later runs may be of other code: the comparison was gone on with at {listed(later)}."] if later else []
    return [f"{said}; {versions}." if versions else f"{said}.", *others]


def _data(results: Results) -> list[str]:
    plan = results.plan
    at_once = plan.get("parallel", 1)
    beside = f", {at_once} runs at a time" if at_once > 1 else ""
    found = [
        f"Data {plain(plan['recipe']['data'], 200)}, fingerprint {plain(plan['data_fingerprint'], 60)}.",
        f"Seconds are {CLOCKS[plan['clock']]} of training and growth{beside}; start, evaluations and checkpoints are "
        f"left out.",
    ]
    if results.foreign:
        others = listed(f"{path} ({data})" for path, data in results.foreign.items())
        found.append(f"Not compared, since on other data: {others}.")
    return found


def context_sentences(results: Results) -> list[str]:
    """Whether any arm has learnt to use its context: its best mean loss beside those of models that know none."""
    found = {
        (arm, label): [end for end in results.of(arm, label).values() if end.cache is not None]
        for arm in results.arms
        for label in results.labels(arm)
    }
    known = {key: ends for key, ends in found.items() if ends}
    if not known:
        return ["The runs do not tell the loss of a cache model, so whether any arm uses its context is not known."]
    loss = {key: float(np.mean([end.loss for end in ends])) for key, ends in known.items()}
    cache = {key: float(np.mean([end.cache or 0.0 for end in ends])) for key, ends in known.items()}
    best = min(loss, key=lambda key: loss[key] - cache[key])
    unigrams = [end.unigram for ends in known.values() for end in ends if end.unigram is not None]
    lines = f"the cache line {number(cache[best])}" + (
        f", unigram {number(float(np.mean(unigrams)))}" if unigrams else ""
    )
    passing = list(dict.fromkeys(arm for arm, label in known if loss[arm, label] < cache[arm, label]))
    what = f"best {best[0]} {number(loss[best])}, {lines}"
    if not passing:
        return [f"No arm passes the cache line: none has learnt to use its context ({what})."]
    if set(passing) >= {arm for arm, _ in known}:
        return [f"All arms pass the cache line ({what})."]
    return [f"Only {listed(passing)} pass{'es' if len(passing) == 1 else ''} the cache line ({what})."]


def cache_loss(results: Results) -> float | None:
    """Mean loss of the cache model over the runs that tell it."""
    known = [end.cache for end in results.ends if end.cache is not None]
    return float(np.mean(known)) if known else None
