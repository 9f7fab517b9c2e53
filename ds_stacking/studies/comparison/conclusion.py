"""What the figures of a comparison say, in words, the most important first.

Where a model that stays shallow is as good as one of the final depth at equal FLOPs, nothing can be saved by coming to
that depth late: what looks like a gain of stacking is then a penalty of depth. So whether depth pays comes before
anything else, and until it is known to pay, no saving is stated.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_stacking.studies.comparison.effects import (
    Shallow,
    adjusted_gains,
    depth_pays,
    gain,
    least_saving,
    pairs,
    places,
    power,
    saving,
    shallow_arms,
)
from ds_stacking.studies.comparison.results import Results, unchecked
from ds_stacking.studies.comparison.statistics import Effect, Place
from ds_stacking.studies.comparison.words import (
    depth_of,
    evidence,
    listed,
    number,
    percent,
    plural,
    seeds_of,
)

LEVEL = 0.05
"""An adjusted p-value below it is a difference."""


def conclusion(results: Results) -> list[str]:
    """Sentences: whether depth pays, what the arms save or gain, what lies outside, what more seeds would bring."""
    if not results.ends:
        counted = sum("/lr" not in path for path in results.plan["runs"])
        return [f"Nothing can be said yet: none of the {plural(counted, 'run')} that count has finished."]
    pays = depth_pays(results)
    depth = depth_sentences(results)
    arms = [sentence for arm in results.of_kind("grown", "own") for sentence in arm_sentences(results, arm, pays)]
    first = [headline(results), *depth] if pays else depth
    return [
        *first,
        *survivor_sentences(results),
        *progress(results),
        *arms,
        *baseline_sentences(results),
        *power_sentences(results),
    ]


def summary_lines(comparisons: Sequence[Results]) -> list[str]:
    """The first line of each of several comparisons, after the name of its folder."""
    return [f"{results.folder.name}: {conclusion(results)[0]}" for results in comparisons]


def progress(results: Results) -> list[str]:
    """How many of the runs have finished, where not all have."""
    planned, lost = len(results.plan["runs"]), len(results.failed)
    finished = len(results.ends) + len(results.tuning) + len(results.foreign)
    if finished == planned:
        return []
    failed = f", {lost} failed" if lost else ""
    return [f"{finished} of {planned} runs have finished{failed}."]


def survivor_sentences(results: Results) -> list[str]:
    """Arms some of whose runs failed: no mean is shown of them, since the seeds that are left may be the better."""
    labels = list(dict.fromkeys(path.split("/")[1] for path in results.plan["runs"] if "/lr" not in path))
    where = {"flops": "at equal FLOPs", "time": "at equal time"}
    failed = {
        (arm, label): [seed for seed in results.lost(arm, label) if f"{arm}/{label}/seed-{seed}" in results.failed]
        for arm in results.arms
        for label in labels
    }
    return [
        f"{arm} failed {where.get(label, f'at a budget of {label[1:]}')} in {seeds_of(lost)}: what needs "
        f"{'that run' if len(lost) == 1 else 'those runs'} has no mean, since the seeds that are left may flatter."
        for (arm, label), lost in failed.items()
        if lost
    ]


def depth_sentences(results: Results) -> list[str]:
    """Whether depth pays; where it does not, beside the shallow arm that shows it best."""
    checks, pays = shallow_arms(results), depth_pays(results)
    if pays is None:
        reasons = [reason for check in checks if check.pays is None for reason in [_doubt(results, check)]]
        if not reasons:
            has_shallow = bool(results.of_kind("shallow"))
            reasons = ["scratch was left out" if has_shallow else "no arm stays shallow"]
        until = "savings are not to be believed until it can"
        return [f"Whether depth pays cannot be told: {listed(reasons)}; {until}."]
    if pays:
        return [f"Depth pays: {'; '.join(_difference(results, check) for check in checks)}."]
    worst = min((c for c in checks if c.pays is False), key=lambda c: c.advantage.mean or 0.0)
    others = [c for c in checks if c is not worst and c.advantage.mean is not None]
    found = [f"Depth does not pay here: {_difference(results, worst)}, so a saving by stacking means nothing."]
    return found + [f"{_difference(results, c)}." for c in others]


def depth_limits(results: Results) -> list[str]:
    """What the check of depth does not cover, where savings of time are shown."""
    layers = sorted({results.arms[check.arm]["depths"][-1] for check in shallow_arms(results)})
    if not layers or not any(saving(results, arm, "seconds").values for arm in results.of_kind("grown", "own")):
        return []
    where = f"{listed(layers)} layer{'s' * (layers != [1])}"
    return [f"Whether depth pays was looked at for equal FLOPs only, not for equal time, and at {where} only."]


def _difference(results: Results, check: Shallow) -> str:
    """A shallow arm and its baseline, the better one first."""
    advantage, mean = check.advantage, check.advantage.mean
    (shallow, its), (deep, theirs) = depth_of(results, check.arm), depth_of(results, check.baseline)
    if mean is None or mean < 0:
        return f"{shallow} end{its} {number(-(mean or 0.0))} nats below {deep} at equal FLOPs ({evidence(advantage)})"
    less = ""
    if check.pays is False and check.spread is not None:
        less = f", less than the spread of the seeds, {number(check.spread)},"
    return f"{deep} end{theirs} {number(mean)} nats below {shallow} at equal FLOPs{less} ({evidence(advantage)})"


def _doubt(results: Results, check: Shallow) -> str:
    """Why it cannot be told whether depth pays against a shallow arm."""
    shallow, deep = depth_of(results, check.arm)[0], depth_of(results, check.baseline)[0]
    if not results.at_unit(check.baseline) and "x1" not in {name.split("/")[1] for name in results.plan["runs"]}:
        return f"{deep} has no budget of 1, which the arms spend"
    if check.advantage.holes:
        lost = {arm: results.lost_at_unit(arm) for arm in (check.arm, check.baseline)}
        return listed(
            f"{depth_of(results, arm)[0]} failed in {seeds_of(seeds)}" for arm, seeds in lost.items() if seeds
        )
    if check.advantage.n == 0:
        return f"{shallow} and {deep} have no finished seed in common"
    if check.advantage.n == 1:
        return f"{shallow} and {deep} have one seed in common, which shows no spread"
    if check.advantage.low is None:
        return f"{shallow} and {deep} differ by the same in every seed, which no chance would give"
    return f"{_difference(results, check)}, which is too close to decide"


def headline(results: Results) -> str:
    """What the arms save or lose where depth pays."""
    adjusted = adjusted_gains(results)
    arms = results.of_kind("grown", "own")
    lost = [arm for arm in arms if "failed" in gain(results, arm, "flops").holes.values()]
    if not adjusted:
        return (
            "No arm can be told from its baseline yet: that needs two seeds of both, none of which failed, and "
            "budgets around 1."
            if arms
            else "No arm grows, so there is nothing to save."
        )
    different = [arm for arm, p in adjusted.items() if p < LEVEL]
    if not different:
        wanted = [need.seeds for arm in adjusted if (need := power(results, arm)) and need.of_saving and need.seeds]
        more = f"; an interval of ±5 points of the saving needs about {plural(max(wanted), 'seed')}" if wanted else ""
        untold = f"; a failed run leaves open whether {listed(lost)} {_do(lost)}" if lost else ""
        return f"No arm is shown to differ from {_baselines(results, list(adjusted))}{more}{untold}."
    same = [arm for arm in adjusted if arm not in different]
    rest = f"; no difference is shown for {listed(same)}" if same else ""
    rest += f"; a failed run leaves open whether {listed(lost)} {_do(lost)}" if lost else ""
    beaten = beaten_baselines(results)
    findings = [
        _finding(results, arm) + (f", a baseline that itself ends {beaten[baseline]}" if baseline in beaten else "")
        for arm in different
        for baseline in [str(results.arms[arm]["baseline"])]
    ]
    return "; ".join(findings) + f"{rest}."


def _do(arms: Sequence[str]) -> str:
    return "does" if len(arms) == 1 else "do"


def _baselines(results: Results, arms: Sequence[str]) -> str:
    return listed(dict.fromkeys(str(results.arms[arm]["baseline"]) for arm in arms))


def _finding(results: Results, arm: str) -> str:
    """What an arm saves, with the interval; where that lies outside the budgets, its gain."""
    saved, gained = saving(results, arm, "flops"), gain(results, arm, "flops")
    baseline = results.arms[arm]["baseline"]
    if saved.mean is None or saved.low is None or saved.high is None:
        low, high = sorted((abs(gained.low or 0.0), abs(gained.high or 0.0)))
        where = "below" if (gained.mean or 0.0) >= 0 else "above"
        share = f"{number(abs(gained.mean or 0.0))} nats [{number(low)}, {number(high)}]"
        return f"{arm} ends {share} {where} {baseline} at equal FLOPs"
    low, high = (saved.low, saved.high) if saved.mean >= 0 else (-saved.high, -saved.low)
    what, more = ("saves", "") if saved.mean >= 0 else ("needs", " more")
    share = f"{percent(abs(saved.mean))} % [{percent(low)}, {percent(high)}]{more}"
    return f"{arm} {what} {share} of {baseline}'s FLOPs at equal loss"


def _gain(gained: Effect, arm: str, baseline: str) -> str:
    mean = gained.mean or 0.0
    where = "below" if mean >= 0 else "above"
    return f"{arm} ends {number(abs(mean))} nats {where} {baseline} at equal FLOPs ({evidence(gained)})"


def arm_sentences(results: Results, arm: str, pays: bool | None) -> list[str]:
    """An arm beside its baseline: gain at equal FLOPs, saving where depth pays, and what lies outside the budgets."""
    baseline, gained = results.arms[arm]["baseline"], gain(results, arm, "flops")
    if baseline is None or not gained.values:
        return []
    found = []
    if gained.mean is not None:
        saved = saving(results, arm, "flops")
        tail = f", {_finding(results, arm).removeprefix(arm + ' ')}" if pays and saved.low is not None else ""
        adjusted = adjusted_gains(results)
        if gained.excludes_zero and adjusted[arm] >= LEVEL:
            tail += f"; after Holm's correction for {plural(len(adjusted), 'arm')} that is no difference"
        found.append(f"{_gain(gained, arm, baseline)}{tail}.")
    return found + outside_sentences(results, arm)


def outside_sentences(results: Results, arm: str) -> list[str]:
    """Why an arm has no saving at equal loss, seed by seed, and what would mend it."""
    found, baseline = places(results, arm), str(results.arms[arm]["baseline"])
    total = sum(map(len, found.values()))
    low, high = (f"{limit(results.plan['budgets'], default=1.0):g} times the FLOPs" for limit in (min, max))
    texts: dict[Place, str] = {
        "below": f"its loss is below that of {baseline} at {high} in {{}}: add larger budgets",
        "above": f"its loss is above that of {baseline} at {low} in {{}}: add smaller budgets",
        "not falling": f"the losses of {baseline} do not fall with its budget in {{}}, so none can be read off",
        "missing": f"{baseline} has fewer than two finished budgets, or lacks one that is planned, in {{}}",
        "failed": f"its run or one of {baseline} failed in {{}}",
    }
    reasons = [
        text.format(f"{len(found[place])} of {plural(total, 'seed')}")
        for place, text in texts.items()
        if place in found
    ]
    if not reasons:
        return []
    least = least_saving(results, arm, "flops")
    bound = f"more than {percent(least)} % in every seed" if least is not None else "not given"
    return [f"The saving of {arm} is {bound}: {listed(reasons)}."]


def beaten_baselines(results: Results) -> dict[str, str]:
    """Scratch arms that another scratch arm beats, and by how much: a gain over the worse is none over the better."""
    found, scratch = {}, results.of_kind("scratch")
    for pair in pairs(results):
        if pair.first in scratch and pair.second in scratch and pair.difference.excludes_zero:
            mean = pair.difference.mean or 0.0
            worse, better = (pair.first, pair.second) if mean > 0 else (pair.second, pair.first)
            found[worse] = f"{number(abs(mean))} nats above {better}"
    return found


def baseline_sentences(results: Results) -> list[str]:
    """Arms whose baseline is a scratch arm that another one beats."""
    return [
        f"{worse}, the baseline of {listed(arms)}, itself ends {how}: a gain over the one is none over the other."
        for worse, how in beaten_baselines(results).items()
        if (arms := [arm for arm, plan in results.arms.items() if plan["baseline"] == worse])
    ]


def power_sentences(results: Results) -> list[str]:
    """How many seeds each arm would need for an interval that tells something."""
    savings, gains = [], []
    for arm in results.of_kind("grown", "own"):
        need = power(results, arm)
        if need is None:
            continue
        seeds = "more than a million" if need.seeds is None else f"{need.seeds:,}"
        if need.of_saving:
            savings.append(f"{seeds} for {arm}")
        else:
            gains.append(f"{seeds} for {arm} (±{number(need.half)} nats)")
    found = []
    if savings:
        found.append(f"Seeds that an interval of ±5 points of the saving needs: about {listed(savings)}.")
    if gains:
        found.append(
            f"Seeds that a gain as exact as 5 % of the baseline's FLOPs are worth needs, where no saving is known: "
            f"about {listed(gains)}."
        )
    return found


def disturbed_sentences(results: Results) -> list[str]:
    """Runs whose times are not used, and which seeds of which arms have no gain or saving of time for it."""
    found = [f"The time of {path} is not used: {why}." for path, why in results.untimed.items()]
    alone = unchecked(results)
    if alone:
        found.append(
            f"Whether the machine was disturbed cannot be checked for {plural(len(alone), 'run')}: fewer than three "
            f"of one shape have finished."
        )
    for arm in results.of_kind("grown", "own", "shallow"):
        left_out = gain(results, arm, "seconds").left_out
        if left_out:
            found.append(f"So {arm} has no gain at equal time and no saving of time in {seeds_of(left_out)}.")
    return found
