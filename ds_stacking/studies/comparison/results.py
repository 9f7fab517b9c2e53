"""What a comparison's directory holds: its plan, where its runs ended, which failed, and whose times can be used.

Only ends of runs whose learning rate has fallen to 0 are compared (No Train No Gain: Kaddour et al. 2023, 2307.06440),
and only those on the data of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import read_json
from ds_stacking.common.own_files import read_inside
from ds_stacking.common.words import plain
from ds_stacking.studies.comparison.shapes import (
    CLOCKS,
    SECONDS,
    TUNING,
    ArmPlan,
    EndOfRun,
    Plan,
    read_plan,
)
from ds_stacking.studies.comparison.statistics import TOLERANCE, Frontier, Hole, off_median

UNIT = "x1"
"""Label of scratch's runs that spend as much as the arms."""


@dataclass(frozen=True, kw_only=True)
class End:
    """Where one run ended."""

    arm: str
    """Name of the arm."""
    label: str
    """`flops` or `time`, what it matches; for scratch its budget, such as x0.7; for a tuning run its rate."""
    seed: int
    """Its seed."""
    loss: float
    """Held-out loss on [MASK] positions, in nats."""
    shuffled: float | None = None
    """The same on shuffled sequences."""
    unigram: float | None = None
    """Loss at the same positions of a model that knows word frequencies only."""
    cache: float | None = None
    """The same of one that also knows which words stand in the sequence."""
    steps: int
    """Optimizer steps."""
    tokens: float
    """Tokens trained on."""
    flops: float
    """Model FLOPs."""
    wall_seconds: float
    """Seconds of training by wall clock: without start, evaluations and checkpoints."""
    cpu_seconds: float
    """The same as processor time."""
    seconds: float
    """That of the two which the comparison's clock shows."""
    data: str
    """Fingerprint of the data."""

    @property
    def path(self) -> str:
        """The run's name, which is that of its directory."""
        return f"{self.arm}/{self.label}/seed-{self.seed}"


@dataclass(kw_only=True)
class Results:
    """What a comparison's directory holds."""

    folder: Path
    """The directory."""
    plan: Plan
    """`comparison.json`."""
    ends: list[End] = field(default_factory=list)
    """Ends of all finished runs that count."""
    tuning: list[End] = field(default_factory=list)
    """Ends of those that tune learning rates."""
    failed: dict[str, str] = field(default_factory=dict)
    """Runs that failed, with the reason."""
    missing: list[str] = field(default_factory=list)
    """Planned runs that have not finished."""
    foreign: dict[str, str] = field(default_factory=dict)
    """Finished runs on other data, with its fingerprint; they are not compared."""
    untimed: dict[str, str] = field(default_factory=dict)
    """Finished runs whose times cannot be used, with the reason."""
    without_curve: dict[str, str] = field(default_factory=dict)
    """Runs whose metrics cannot be read, with the reason."""

    @property
    def arms(self) -> Mapping[str, ArmPlan]:
        """The arms by name."""
        return self.plan["arms"]

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the arms of these kinds."""
        return [name for name, arm in self.arms.items() if arm["kind"] in kinds]

    def of(self, arm: str, label: str) -> dict[int, End]:
        """Ends of an arm's runs by seed; where no run of equal time is planned, that of equal FLOPs matches both."""
        found = {end.seed: end for end in self.ends if (end.arm, end.label) == (arm, label)}
        if label == "time":
            both = self.of(arm, "flops").items()
            found |= {seed: end for seed, end in both if f"{arm}/time/seed-{seed}" not in self.plan["runs"]}
        return dict(sorted(found.items()))

    def at_unit(self, arm: str) -> dict[int, End]:
        """Ends by seed of the runs of an arm, scratch too, that spend the recipe's FLOPs."""
        return self.of(arm, UNIT if self.arms[arm]["kind"] == "scratch" else "flops")

    def lost(self, arm: str, label: str) -> list[int]:
        """Seeds whose run failed, so that `of` does not have them."""
        runs = (path.split("/") for path in self.failed)
        found = {int(seed.removeprefix("seed-")) for name, own, seed in runs if (name, own) == (arm, label)}
        if label == "time":
            both = self.lost(arm, "flops")
            found |= {seed for seed in both if f"{arm}/time/seed-{seed}" not in self.plan["runs"]}
        return sorted(found)

    def lost_at_unit(self, arm: str) -> list[int]:
        """Seeds whose run failed, so that `at_unit` does not have them."""
        return self.lost(arm, UNIT if self.arms[arm]["kind"] == "scratch" else "flops")

    def hole(self, arm: str, seed: int) -> Hole | None:
        """What a frontier lacks: a budget that is planned for the seed and failed, or has not finished."""
        own = [path for path in self.plan["runs"] if path.startswith(f"{arm}/x") and path.endswith(f"/seed-{seed}")]
        if any(path in self.failed for path in own):
            return "failed"
        ended = {end.path for end in self.ends if (end.arm, end.seed) == (arm, seed)}
        return None if ended.issuperset(own) else "missing"

    def labels(self, arm: str) -> list[str]:
        """Labels of an arm's finished runs: budgets of scratch by size, `flops` before `time`."""
        found = {end.label for end in self.ends if end.arm == arm}
        return sorted(found, key=lambda label: (float(label[1:]) if label[0] == "x" else 0.0, label))

    def frontier(self, arm: str, seed: int, cost: str) -> Frontier:
        """Ends of a scratch arm with a seed: `cost` (flops, tokens or seconds) and loss, by rising cost."""
        return sorted((getattr(e, cost), e.loss) for e in self.ends if (e.arm, e.seed) == (arm, seed))

    def is_timed(self, arm: str, seed: int) -> bool:
        """Whether the times of all of an arm's runs with a seed can be used."""
        return not any((end.arm, end.seed) == (arm, seed) and end.path in self.untimed for end in self.ends)


def read_comparison(folder: str | Path) -> Results:
    """Read a comparison's directory. Raises UserError where it is none; a run whose files are damaged has failed."""
    folder = Path(folder)
    plan = read_plan(folder)
    if plan is None:
        raise UserError(f"{folder} holds no comparison; give the output_dir of compare.py.")
    results = Results(folder=folder, plan=plan)
    for name in plan["runs"]:
        _read_run(results, name)
    results.untimed = disturbed(results)
    return results


def _read_run(results: Results, name: str) -> None:
    """Note where a run has ended, why it failed, or that it is missing."""
    try:
        summary = read_json(
            results.folder / name / "summary.json", EndOfRun, mend="restore it", inside=results.folder, limit=1 << 26
        )
    except OSError:
        failure = _failure(results.folder, f"{name}.failed")
        if failure is None:
            results.missing.append(name)
        else:
            results.failed[name] = failure
    except UserError as error:
        results.failed[name] = plain(str(error)).rstrip(".")
    else:
        if not summary["finished"]:
            results.missing.append(name)
        elif summary.get("eval_loss_masked") is None:
            results.failed[name] = "it ended with a loss that is not finite"
        elif summary["data_fingerprint"] != results.plan["data_fingerprint"]:
            results.foreign[name] = plain(summary["data_fingerprint"], 60)
        else:
            end = _end(name, summary, SECONDS[results.plan["clock"]])
            (results.tuning if TUNING.fullmatch(end.label) else results.ends).append(end)


def _failure(folder: Path, name: str) -> str | None:
    """What the runner noted of a run that failed."""
    try:
        return plain(read_inside(folder, name, limit=1 << 16).decode(errors="replace"))
    except OSError:
        return None
    except UserError as error:
        return plain(str(error)).rstrip(".")


def _end(path: str, summary: Mapping[str, Any], seconds: str) -> End:
    arm, label, seed = path.split("/")
    return End(
        arm=arm,
        label=label,
        seed=int(seed.removeprefix("seed-")),
        loss=summary["eval_loss_masked"],
        shuffled=summary.get("eval_loss_shuffled"),
        unigram=summary.get("unigram_cross_entropy"),
        cache=summary.get("cache_loss"),
        steps=summary["steps"],
        tokens=summary["tokens"],
        flops=summary["flops"],
        wall_seconds=summary["training_seconds"],
        cpu_seconds=summary["cpu_seconds"],
        seconds=summary[seconds],
        data=summary["data_fingerprint"],
    )


def unchecked(results: Results) -> list[str]:
    """Runs of whose shape fewer than three have finished, so that it cannot be told which was disturbed."""
    return [path for path, peers in _of_one_shape(results).items() if len(peers) < 3]


def _of_one_shape(results: Results) -> dict[str, dict[str, float]]:
    """For every finished run the seconds of those of its shape, itself among them.

    Of one shape are runs with the same stages, and the runs of an arm and label, whose stages may be drawn.
    """
    by_stages: dict[Any, list[End]] = {}
    by_label: dict[Any, list[End]] = {}
    for end in results.ends:
        by_stages.setdefault(_stages(results, end), []).append(end)
        by_label.setdefault((end.arm, end.label), []).append(end)
    return {
        end.path: {e.path: e.seconds for e in by_stages[_stages(results, end)] + by_label[end.arm, end.label]}
        for end in results.ends
    }


def disturbed(results: Results) -> dict[str, str]:
    """Runs whose seconds differ from the median of their shape by more than TOLERANCE, and by how much.

    A run that is the only one of its shape never does; of two that are so far apart, both do.
    """
    found, shapes = {}, _of_one_shape(results)
    for end in results.ends:
        peers = shapes[end.path]
        off = off_median(end.seconds, list(peers.values()))
        if abs(off) > TOLERANCE:
            clock = CLOCKS[results.plan["clock"]]
            found[end.path] = (
                f"its {clock}, {end.seconds:.1f} s, lies {100 * abs(off):.0f} % {'above' if off > 0 else 'below'} "
                f"the median of the {len(peers)} runs of its shape"
            )
    return found


def _stages(results: Results, end: End) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, results.plan["runs"][end.path]))
