"""Learning rate as a function of the step: one schedule for the run, or one for each stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.training.state import Position


class Schedule:
    """The learning rate at every optimizer step of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.stages = config.stages
        self.total = sum(stage.steps for stage in self.stages)

    def __call__(self, step: int, stage: int, stage_step: int) -> float:
        """The rate of optimizer step `step` of the run, which is `stage_step` of `stage` (all counted from 0)."""
        own = self.stages[stage]
        return self._run(step) if own.lr is None else self._stage(own, stage_step)

    def newest(self, stage: int, stage_step: int) -> float:
        """Factor on the rate of the blocks born in `stage`: their own warm-up after the growth."""
        rewarm = self.stages[stage].rewarm_steps if stage else 0
        return min(1.0, (stage_step + 1) / rewarm) if rewarm else 1.0

    def set_rates(self, groups: Iterable[dict[str, Any]], position: Position) -> None:
        """Give every parameter group the rate of the next step; the newest blocks may still be warming up."""
        rate = self(position.step, position.stage, position.stage_step)
        newest = self.newest(position.stage, position.stage_step)
        for group in groups:
            group["lr"] = rate * (newest if position.stage and group["birth"] == position.stage else 1.0)

    def _run(self, step: int) -> float:
        """Warm-up, then constant, linear to 0, or warm-up-stable-decay (Hu et al. 2024, section 4)."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return config.lr
        decay = self.total - config.warmup_steps
        if config.schedule == "wsd":
            decay = min(decay, round(self.total * config.decay_percent / 100))
        left = self.total - step
        return config.lr * min(1.0, left / decay) if decay else config.lr

    @staticmethod
    def _stage(stage: StageConfig, step: int) -> float:
        """A stage's own warm-up, then linear from `lr` to `lr_end` over `lr_steps` steps, warm-up included."""
        assert stage.lr is not None
        if step < stage.warmup_steps:
            return stage.lr * (step + 1) / stage.warmup_steps
        end = stage.lr if stage.lr_end is None else stage.lr_end
        steps = (stage.lr_steps or stage.steps) - stage.warmup_steps
        done = min(1.0, (step - stage.warmup_steps) / steps) if steps > 0 else 1.0
        return stage.lr + (end - stage.lr) * done
