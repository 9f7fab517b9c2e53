"""Optimizer state policies: what a growth does to Adam's moments and step counts.

A moment without its step count is wrong: Adam divides by 1 - beta**step, so moments at zero with an old step make
the first updates up to 6.6 times too large (betas 0.9/0.999), and copied moments with step 0 make them 0.15 times.
Every policy here therefore names both.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_stacking.config import check_optimizer_state


@dataclass(frozen=True, kw_only=True)
class StateRule:
    """How one target tensor gets its optimizer state from its source."""

    first: float
    """Factor on exp_avg; 0 leaves it at zero."""
    second: float
    """Factor on exp_avg_sq; 0 leaves it at zero."""
    keep_step: bool
    """Take the source's step count, or start at 0."""


INHERIT = StateRule(first=1.0, second=1.0, keep_step=True)
FRESH = StateRule(first=0.0, second=0.0, keep_step=False)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules for the tensors that existed before and for the copies."""

    original: StateRule
    copy: StateRule


def parse_policy(name: str) -> Policy:
    """The policy called `name`; raises UserError for an unknown one.

    stack        a copy inherits its source's moments and step count (default)
    new_reset    originals keep theirs, copies start afresh (SPARKLING, 2602.02472: "keep old, zero new")
    reset        everything starts afresh, as published (Gong et al. 2019, `--reset-optimizer`)
    second_only  copies inherit exp_avg_sq and the step count; their exp_avg starts at zero
    scale:c      as stack, with exp_avg times c and exp_avg_sq times c**2 in the copies: the moments of gradients c
                 times as large (Shen et al. 2022, section 3)
    """
    check_optimizer_state(name)
    if name == "stack":
        return Policy(original=INHERIT, copy=INHERIT)
    if name == "new_reset":
        return Policy(original=INHERIT, copy=FRESH)
    if name == "reset":
        return Policy(original=FRESH, copy=FRESH)
    if name == "second_only":
        return Policy(original=INHERIT, copy=StateRule(first=0.0, second=1.0, keep_step=True))
    factor = float(name.removeprefix("scale:"))
    return Policy(original=INHERIT, copy=StateRule(first=factor, second=factor**2, keep_step=True))
