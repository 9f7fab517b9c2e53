"""What a run tells of itself while it trains: event records for the tracker, lines for the console."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ds_stacking.engine.record import GrowthRecord
from ds_stacking.models.compiling import compilations
from ds_stacking.models.flops import training_flops
from ds_stacking.training.health import Unhealthy, write_post_mortem
from ds_stacking.training.held_out import HeldOutLoss
from ds_stacking.training.progress import growth_line

if TYPE_CHECKING:
    from ds_stacking.training.loop import Pretraining


def make_record(run: Pretraining, kind: str) -> dict[str, Any]:
    """The fields that every record has: where the run stands, and the ledger's totals."""
    charge_flops(run)
    return {
        "kind": kind,
        "step": run.position.step,
        "stage": run.position.stage,
        "layers": len(run.engine.module.blocks),
        **run.ledger.totals(),
    }


def charge_flops(run: Pretraining) -> None:
    """Charge the FLOPs of the steps since the last call; what they masked and attended to is known to the device."""
    steps, run.settled = run.position.step - run.settled, run.position.step
    if steps:
        masked, pairs, masked_pairs = run.work.tolist()
        run.ledger.stage.flops += training_flops(
            run.config.model,
            run.ledger.stage.layers,
            sequences=steps * run.plans[run.position.stage].sequences,
            length=run.plans[run.position.stage].sequence_length,
            masked=masked,
            pairs=pairs,
            masked_pairs=masked_pairs,
        )
        run.work.zero_()


def log_training(run: Pretraining) -> None:
    """Read the losses of the steps since the last line, over all ranks, and log them. Collective."""
    total = run.loss_sum.clone()
    dist.all_reduce(total)
    loss = float(total) / run.steps_in_loss if run.steps_in_loss else math.nan
    run.loss_sum.zero_()
    run.steps_in_loss = 0
    norm = run.engine.get_global_grad_norm()
    position = run.position
    rate = run.schedule(position.step - 1, position.stage, position.stage_step - 1)
    record = make_record(run, "train")
    rates = run.ledger.rates()
    record |= {"loss": loss, "lr": rate, "grad_norm": None if norm is None else float(norm), **rates}
    record["skipped_steps"] = run.health.skipped
    record["seconds_by_phase"] = dict(run.ledger.phases)
    if run.config.compile:
        record |= {f"compiled_{name}": count for name, count in asdict(compilations()).items()}
    run.ledger.stage.train_loss_end = loss
    run.tracker.log(record)
    run.console.update(
        position.stage_step,
        loss=loss,
        lr=rate,
        tokens_per_second=rates["tokens_per_second"],
        mfu=rates.get("mfu"),
    )


def log_evaluation(run: Pretraining, loss: HeldOutLoss) -> None:
    """Log a held-out loss of the current engine."""
    run.tracker.log(make_record(run, "eval") | {"eval_loss": loss.all_positions, "eval_loss_masked": loss.masked})


def log_growth(run: Pretraining, growth: GrowthRecord) -> None:
    """Log a growth, and say it."""
    record = make_record(run, "growth")
    later = ("eval_loss_later", "observations")
    record |= {name: value for name, value in asdict(growth).items() if name not in record and name not in later}
    record["seconds_growth"] = growth.seconds
    run.tracker.log(record)
    run.console.line(growth_line(record))


def check_health(run: Pretraining) -> None:
    """After a skipped step: say so, and end a run that skips step after step. Collective."""
    health, step = run.health, run.position.step
    run.console.line(f"step {step} was skipped: {health.reason}; {health.in_a_row} in a row, {health.skipped} in all")
    if not health.hopeless:
        return
    path = write_post_mortem(run)
    run.writer.wait()
    raise Unhealthy(
        f"{health.in_a_row} optimizer steps in a row were skipped, the last one step {step}: {health.reason}. "
        f"{path} has the losses, batches and norms; lower lr or look at the data, then go on with --resume auto."
    )


def refuse_diverged(run: Pretraining, loss: HeldOutLoss) -> None:
    """Raise Unhealthy where a stage has ended with a model that is worth nothing; all ranks know the same loss."""
    if not math.isfinite(loss.all_positions):
        run.writer.wait()
        raise Unhealthy(
            f"The held-out loss at the end of stage {run.position.stage + 1} (step {run.position.step}) is not "
            f"finite: the run has diverged; lower lr, then go back to a checkpoint with --resume DIR, or "
            f"give --overwrite."
        )
