"""The end of a run: the last evaluation, the report with its figures, and summary.json as the last thing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ds_stacking.checkpoint.share import side_by_side
from ds_stacking.common.environment import rank, world_size
from ds_stacking.common.files import write_json
from ds_stacking.common.own_files import make_inside
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.training.checkpointing import log_failed_saves
from ds_stacking.training.controls import measure_controls
from ds_stacking.training.export import finish_export
from ds_stacking.training.loop import Pretraining
from ds_stacking.training.precision import precision_name
from ds_stacking.training.run_directory import EXPORT, SUMMARY
from ds_stacking.training.state import HeldOutLoss


def finish(run: Pretraining) -> None:
    """The last evaluation, the exported model's card, the figure, and summary.json as the last thing."""
    known, first = run.state.evaluated, rank() == 0
    loss, shuffled = run.evaluation.evaluate(), run.evaluation.held_out_loss(shuffled=True)
    exchange = make_exchange(run.device)
    run.writer.wait()
    log_failed_saves(run.writer, run.metrics.log)  # a last save that failed must not go unsaid
    stages = run.config.stages
    exported = f"stage-{len(stages)}-{stages[-1].layers}L"
    missing = exchange.all_reduce_sum(int(first and not (run.run_dir / EXPORT / exported).is_dir()))
    if missing:  # resumed at the very end, into a new directory
        if run.state.evaluated is known:
            run.metrics.log_evaluation(loss)
        if fault := run.export(stages[-1]):
            raise fault

    def report() -> None:
        if first:
            _write_reports(run, exported, _summary(run, loss, shuffled))

    side_by_side(report, exchange)


def _summary(run: Pretraining, loss: HeldOutLoss, shuffled: HeldOutLoss) -> dict[str, Any]:
    ledger = run.ledger
    return {
        "finished": True,
        "name": run.config.name,
        "world_size": world_size(),
        "zero_stage": int(run.engine.zero_optimization_stage()),
        "precision": precision_name(run.config, bf16=run.manager.factory.bf16),
        "parameters": sum(info.numel for info in run.manager.parameters.values()),
        "steps": run.state.position.step,
        **ledger.totals(),
        "seconds_by_phase": dict(ledger.phases),
        "eval_loss": loss.all_positions,
        "eval_loss_masked": loss.masked,
        "eval_loss_shuffled": shuffled.masked,
        "unigram_entropy": run.data.unigram_entropy,
        **asdict(measure_controls(run.held_out, run.training_text, run.data.unigram)),
        "data_fingerprint": run.data.fingerprint,
        "eval_fingerprint": run.held_out.fingerprint(),
        "stages": ledger.stage_rows(),
        "growths": [asdict(record) for record in run.state.growths],
    }


def _write_reports(run: Pretraining, exported: str, summary: dict[str, Any]) -> None:
    # matplotlib takes a second to import
    from ds_stacking.reports.curves import draw_curves
    from ds_stacking.reports.growth_figure import draw_growths
    from ds_stacking.reports.run_report import write_report

    make_inside(run.run_dir, "report")  # which refuses a link
    finish_export(run.run_dir, exported, summary=summary, config=run.config.to_dict())
    figures = [draw_curves(run.run_dir), draw_growths(run.run_dir, summary["growths"])]
    figures.append(write_report(run.run_dir, summary))
    write_json(run.run_dir / SUMMARY, summary, inside=run.run_dir)
    run.metrics.console.closing(summary)
    run.metrics.log(f"model   {run.run_dir / 'export' / 'final'}")
    for figure in filter(None, figures):
        run.metrics.log(f"{figure.stem:<7} {figure}")
