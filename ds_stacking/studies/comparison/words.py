"""Words for the figures of a comparison: amounts of nats and shares with their intervals, names of arms, lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_stacking.studies.comparison.results import Results
from ds_stacking.studies.comparison.statistics import Effect

LISTED = 6
"""Values of seeds that a cell lists one by one where there is no mean; of more, only how many there are."""


def number(value: float) -> str:
    """Nats: two decimals, three of small ones."""
    return f"{value:.2f}" if abs(value) >= 0.095 else f"{value:.3f}"


def percent(value: float) -> str:
    """A share in percent, without the sign."""
    return f"{100 * value:.0f}"


def plural(count: int, word: str) -> str:
    """`1 seed`, `5 seeds`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def listed(names: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last


def seeds_of(seeds: Sequence[int]) -> str:
    """`seed 2`, `seeds 2 and 4`."""
    return f"seed{'s' * (len(seeds) != 1)} {listed(seeds)}"


def depth_of(results: Results, arm: str) -> tuple[str, str]:
    """An arm of one depth in words, and the ending of its verb: `2 layers throughout` end, `1 layer ...` ends."""
    plan = results.arms[arm]
    layers = plan["depths"][-1]
    how = "from scratch" if plan["kind"] == "scratch" else "throughout"
    name = "" if arm == "scratch" else f" ({arm})"
    return f"{layers} layer{'s' * (layers != 1)} {how}{name}", "s" * (layers == 1)


def evidence(effect: Effect) -> str:
    """Seeds and interval of an effect, in the direction of its mean: `5 seeds, 95 % interval 0.25 to 0.33`."""
    seeds = plural(effect.n, "seed")
    if effect.mean is None or effect.low is None or effect.high is None:
        return f"{seeds}, no interval"
    low, high = (effect.low, effect.high) if effect.mean >= 0 else (-effect.high, -effect.low)
    return f"{seeds}, 95 % interval {number(low)} to {number(high)}"


def nats_cell(effect: Effect) -> str:
    """A difference of losses with its interval."""
    return _cell(effect, 1.0, "{:+.3f}")


def saving_cell(effect: Effect, least: float | None) -> str:
    """A saving in percent with its interval, or what it is at the least."""
    if least is not None:
        return f"> {100 * least:.0f} %"
    return _cell(effect, 100.0, "{:+.1f}") + (" %" if any(v is not None for v in effect.values.values()) else "")


def _cell(effect: Effect, scale: float, form: str) -> str:
    values = list(effect.values.values())
    if effect.mean is None:
        why = [effect.holes.get(seed, "outside") for seed, value in effect.values.items() if value is None]
        if len(why) == len(values) and len(set(why)) < 2:
            return why[0] if why else "-"
        if len(values) > LISTED:
            counts = listed(f"{word} in {why.count(word)}" for word in dict.fromkeys(why))
            return f"{counts} of {len(values)} seeds"
        texts = [
            effect.holes.get(s, "outside") if v is None else form.format(scale * v) for s, v in effect.values.items()
        ]
        return ", ".join(texts)
    text = form.format(scale * effect.mean)
    if effect.low is not None and effect.high is not None:
        text = f"{text} [{form.format(scale * effect.low)}, {form.format(scale * effect.high)}]"
    return f"{text} (n={effect.n})" if effect.left_out else text
