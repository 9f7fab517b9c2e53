"""When a model grows, and into what: the notation of `--trigger`, and the arithmetic of each kind.

steps                            after the steps that the stages name
tokens:1e9,3e9                   when the run has seen so many tokens, one number for each growth
flops:1e18,5e18                  when it has spent so many model FLOPs
prop:1                           stage i gets a share i^1 of all steps (MIDAS, Saunshi et al., NeurIPS 2024)
gstack                           the formula of G_stack for the one growth of two stages (Du et al., NeurIPS 2024)
plateau:0.0575                   when the slope of ln held-out loss on ln FLOPs has risen to -0.0575 (Shen et al. 2022)
trial:stack,interleave:20        after the stages' steps; operators are tried for 20 steps each, the best is kept
                                 (LAG, 2406.02469)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import nearest, shown
from ds_stacking.growth.operators import parse_operator

KINDS = ("steps", "tokens", "flops", "prop", "gstack", "plateau", "trial")
MOST_STEPS = 10**12
"""Optimizer steps of a stage, at most: what no run can make must be a slip of the pen."""
STEEPEST = 20.0
"""Exponent of prop, at most: beyond it all steps fall to the last stage anyway."""
WINDOW = 8
"""Evaluations that a slope is measured over at the least."""
EVALUATIONS = 2 * WINDOW - 1
"""Evaluations whose later half is a window: fewer tell nothing."""
SURE = 3.0
"""Standard errors by which a slope must differ from the threshold, since it is asked for after every evaluation."""
SPIKE = 0.01
"""Rise of the loss, as a share of it, that makes a point a spike (remove_loss_spikes of Shen et al.)."""
Point = tuple[float, float]
"""FLOPs of the run so far, and a loss."""


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A trigger as its notation names it."""

    kind: str
    """One of KINDS."""
    numbers: tuple[float, ...] = ()
    """Amounts of tokens or FLOPs, the exponent of prop, the slope of plateau or the steps of a trial."""
    operators: tuple[str, ...] = ()
    """Operators of a trial."""


def parse_trigger(text: str) -> Trigger:
    """Read the notation above; raises UserError for what it does not know."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"trigger {shown(text)} is unknown; {nearest(kind, KINDS)}")
    if kind in ("steps", "gstack"):
        if rest:
            raise UserError(f"trigger {shown(text)}: {kind} takes no number; write {kind} alone.")
        return Trigger(kind=kind)
    if kind == "trial":
        return _trial(text, rest)
    numbers = _numbers(text, rest)
    if kind in ("prop", "plateau") and len(numbers) != 1:
        raise UserError(f"trigger {shown(text)} needs one number, such as {kind}:1.")
    if any(number < 0 or (number == 0 and kind != "prop") for number in numbers):
        raise UserError(f"trigger {shown(text)}: its numbers must be positive.")
    if kind == "prop" and numbers[0] > STEEPEST:
        raise UserError(f"trigger {shown(text)}: the exponent must be at most {STEEPEST:g}.")
    if list(numbers) != sorted(set(numbers)):
        raise UserError(
            f"trigger {shown(text)}: the amounts must rise, since each is counted from the start of the run."
        )
    return Trigger(kind=kind, numbers=numbers)


def _trial(text: str, rest: str) -> Trigger:
    names, _, steps = rest.rpartition(":")
    operators = tuple(names.split(","))
    if (
        not re.fullmatch(r"0*[1-9][0-9]{0,5}", steps)
        or len(set(operators)) != len(operators)
        or not 2 <= len(operators) <= 4
    ):
        raise UserError(
            f"trigger {shown(text)}: write two to four operators and the steps, such as trial:stack,interleave:20."
        )
    for operator in operators:
        parse_operator(operator)
    return Trigger(kind="trial", numbers=(float(steps),), operators=operators)


def _numbers(text: str, rest: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in rest.split(",") if rest.isascii() and "_" not in rest)
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UserError(f"trigger {shown(text)} needs numbers after the colon, such as tokens:1e9,3e9.")
    return numbers


def steps_by_amount(amounts: Sequence[float], per_step: Sequence[float], last: int) -> list[int]:
    """Steps of each stage so that growth i comes once `amounts[i]` is spent; the last stage keeps its `last` steps.

    `per_step` is what a step of each stage spends. Raises UserError where the amounts are not one for each growth,
    or a stage would have more steps than any run makes.
    """
    if len(amounts) != len(per_step) - 1:
        raise UserError(
            f"The trigger names {len(amounts)} amounts, but {len(per_step)} stages have {len(per_step) - 1} growths; "
            f"give one amount for each."
        )
    steps, spent = [], 0.0
    for amount, each in zip(amounts, per_step, strict=False):
        wanted = (amount - spent) / each
        if wanted > MOST_STEPS:
            raise UserError(f"The trigger's amount {amount:g} means {wanted:.3g} steps of a stage; give less.")
        steps.append(max(1, math.ceil(wanted - 1e-9)))
        spent += steps[-1] * each
    return [*steps, last]


def steps_by_prop(total: int, stages: int, exponent: float) -> list[int]:
    """`total` steps over stages in proportion to 1^a, 2^a, 3^a, ... (MIDAS, Prop-a)."""
    weights = [float(i) ** exponent for i in range(1, stages + 1)]
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(stages)]
    return [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]


def gstack_tokens(parameters: float, tokens: float) -> float:
    """Tokens after which G_stack grows a model into one of `parameters` that trains on `tokens` in all.

    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 with C = 6 N tokens FLOPs (Du et al. 2024, 2405.15319, section 4;
    fitted to decoders of 0.4 to 3 billion parameters, an extrapolation elsewhere).
    """
    flops = 6 * parameters * tokens
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def without_spikes(points: Sequence[Point]) -> list[Point]:
    """The points but those whose loss lies more than SPIKE above the last one kept; two in a row are no spike."""
    kept: list[Point] = []
    dropped = False
    for point in points:
        dropped = bool(kept) and not dropped and point[1] > (1 + SPIKE) * kept[-1][1]
        if not dropped:
            kept.append(point)
    return kept


def loss_slope(points: Sequence[Point]) -> tuple[float, float]:
    """Least-squares slope of ln loss on ln FLOPs, the exponent of a power law, and its standard error."""
    places = [math.log(flops) for flops, _ in points]
    heights = [math.log(loss) for _, loss in points]
    middle, level = sum(places) / len(points), sum(heights) / len(points)
    spread = sum((place - middle) ** 2 for place in places)
    slope = sum((x - middle) * (y - level) for x, y in zip(places, heights, strict=True)) / spread
    left = sum((y - level - slope * (x - middle)) ** 2 for x, y in zip(places, heights, strict=True))
    return slope, math.sqrt(left / (len(points) - 2) / spread)


def has_plateaued(points: Sequence[Point], slope: float, *, must_fall: bool) -> bool:
    """Whether the loss surely falls more slowly than FLOPs^-slope over the later half of a stage's evaluations.

    Sure is what holds for the fitted slope less SURE of its standard errors. With `must_fall`, as in a run's first
    stage, the loss must surely have fallen faster before: else it has not begun to fall.
    """
    kept = without_spikes(points)
    later = kept[len(kept) // 2 :]
    if len(later) < WINDOW:
        return False
    found, error = loss_slope(later)
    if found - SURE * error <= -slope:
        return False
    starts = range(len(kept) - WINDOW + 1) if must_fall else ()
    windows = (loss_slope(kept[start : start + WINDOW]) for start in starts)
    return not must_fall or any(steepest + SURE * off < -slope for steepest, off in windows)
