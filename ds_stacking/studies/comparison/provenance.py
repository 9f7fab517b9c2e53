"""How a comparison was made, in words: what was tried, with which seeds, rates, code, data and clock.

Whoever reads a gain must know how many arms were tried for it, what tuning cost, and whether the models have learnt
enough for the question to mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_stacking.common.words import plain
from ds_stacking.reports.table import duration, flops
from ds_stacking.studies.comparison.results import UNIT, End, Results
from ds_stacking.studies.comparison.shapes import CLOCKS
from ds_stacking.studies.comparison.statistics import Effect, effect
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
        *_added(results),
        *_rates(results),
        *warmup_sentences(results),
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
    lost = sum("/lr" in name for name in results.failed)
    uncounted = f"; what {lost} of them that failed or diverged spent is not counted" if lost else ""
    return [*found, f"Beside them {finished}{plural(planned, 'run')} for tuning, which took {cost}{uncounted}."]


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


def _added(results: Results) -> list[str]:
    """Arms and budgets that were asked for once results could have been seen."""
    arms, budgets = results.plan.get("added_arms", []), results.plan.get("added_budgets", [])
    found = []
    if arms:
        were = "was" if len(arms) == 1 else "were"
        found.append(f"{listed(arms)} {were} added after first results.")
    if budgets:
        what, were = ("budget", "was") if len(budgets) == 1 else ("budgets", "were")
        found.append(f"Of scratch the {what} {listed(f'{b:g}' for b in budgets)} {were} added after first results.")
    return found


def warmup_sentences(results: Results) -> list[str]:
    """What share of the FLOPs the warm-up takes, whose steps are the same for every run of whatever length.

    Nothing where the plan does not tell, or where a stage of the recipe has a rate of its own.
    """
    recipe, costs = results.plan["recipe"], results.plan["costs"]
    warmup = recipe.get("warmup_steps", 0)
    if not warmup or any(stage.get("lr") is not None for stage in recipe["stages"]):
        return []
    shares: dict[str, list[float]] = {}
    smallest = f"x{min(results.plan['budgets'], default=1.0):g}"
    for path, stages in results.plan["runs"].items():
        arm, label, _ = path.split("/")
        kind = results.arms[arm]["kind"]
        is_scratch = kind == "scratch"
        if (
            kind != "shallow"
            and label in ((UNIT, smallest) if is_scratch else ("flops",))
            and all(str(d) in costs for d, _ in stages)
        ):
            name = f"{arm} at {label[1:]}" if is_scratch else arm
            shares.setdefault(name, []).append(
                _warmup_share(stages, {d: costs[str(d)]["flops"] for d, _ in stages}, warmup)
            )
    told = [f"{100 * float(np.mean(values)):.1f} % of {name}" for name, values in shares.items()]
    return [f"Warm-up is {warmup} steps in every run, in FLOPs {listed(told)}."] if told else []


def _warmup_share(stages: list[list[int]], costs: dict[int, float], warmup: int) -> float:
    """Share of a run's FLOPs that its first `warmup` steps take, given its stages and what a step costs by depth."""
    left, spent = warmup, 0.0
    for layers, steps in stages:
        spent += min(left, steps) * costs[layers]
        left -= min(left, steps)
    total = sum(steps * costs[layers] for layers, steps in stages)
    return spent / total if total else 0.0


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
    later = [plain(commit[:12], 60) for commit in results.plan["later_commits"]]
    others = [f"Later runs may be of other code: the comparison was gone on with at {listed(later)}."] if later else []
    for packages in results.plan.get("later_versions", []):
        others.append(
            f"It was gone on with {', '.join(f'{plain(n, 60)} {plain(v, 60)}' for n, v in packages.items())}."
        )
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
    if later := plan.get("later_parallel"):
        found.append(f"It was gone on with {listed(later)} at a time, and times of such runs may not compare.")
    if machine := plan.get("machine"):
        devices = ", ".join(plain(name, 60) for name in machine["gpus"])
        gpus = f", {devices}" if devices else ""
        found.append(f"Planned on {plain(machine['processor'], 60)}, {plural(machine['cores'], 'core')}{gpus}.")
    if results.foreign:
        others = listed(f"{path} ({data})" for path, data in results.foreign.items())
        found.append(f"Not compared, since on other data: {others}.")
    return found


def context_sentences(results: Results) -> list[str]:
    """Which arms have learnt to use their context: those that at one unit end below a model that knows none."""
    passes = {arm: below for arm in results.arms if (below := below_cache(results, arm)) is not None}
    if not passes:
        return ["The runs do not tell the loss of a cache model, so whether any arm uses its context is not known."]
    passing = [arm for arm, below in passes.items() if below.low is not None and below.low > 0]
    untold = [arm for arm, below in passes.items() if below.low is None]
    ends = {arm: list(results.at_unit(arm).values()) for arm in passes}
    found = []
    if passing:
        whole = "All arms" if len(passing) == len(results.arms) else "All arms that have finished runs"
        who = whole if len(passing) == len(passes) else f"Only {listed(passing)}"
        found.append(f"{who} pass{'es' if who == f'Only {passing[0]}' else ''} the cache line")
    elif len(untold) < len(passes):
        found.append("No arm is shown to pass the cache line, so that it uses its context")
    if untold:
        found.append(f"whether {listed(untold)} pass{'es' if len(untold) == 1 else ''} the cache line cannot be told")
    loss = {arm: float(np.mean([end.loss for end in own])) for arm, own in ends.items() if own}
    if not loss:
        return [f"{_capital('; '.join(found))}."]
    best = min(loss, key=loss.__getitem__)
    caches = [end.cache for end in ends[best] if end.cache is not None]
    unigrams = [end.unigram for own in ends.values() for end in own if end.unigram is not None]
    lines = f", the cache line {number(float(np.mean(caches)))}" if caches else ""
    lines += f", unigram {number(float(np.mean(unigrams)))}" if unigrams else ""
    return [f"{_capital('; '.join(found))} (at one unit, 95 % t-intervals; best {best} {number(loss[best])}{lines})."]


def below_cache(results: Results, arm: str) -> Effect | None:
    """Nats by which an arm's loss at one unit lies below that of the cache model; None where no run tells that."""
    ends = {seed: end for seed, end in results.at_unit(arm).items() if end.cache is not None}
    values = {seed: (end.cache or 0.0) - end.loss for seed, end in ends.items()}
    return effect(values, holes=dict.fromkeys(results.lost_at_unit(arm), "failed")) if ends else None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def cache_loss(results: Results) -> float | None:
    """Mean loss of the cache model over the runs that tell it."""
    known = [end.cache for end in results.ends if end.cache is not None]
    return float(np.mean(known)) if known else None
