"""Does stacking pay? Every arm at equal FLOPs and at equal time, fully decayed, over seeds, in one report.

python launchers/compare.py --recipe quickstart --arms scratch,reset,stack --seeds 3
python launchers/compare.py --launch "deepspeed --num_gpus 8" --recipe bert_base_stacking --output_dir runs/compare
sbatch --array 0-8 launchers/slurm/compare.sbatch --recipe quickstart --arms scratch,reset,stack --seeds 3
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from ds_stacking.command_line import parse_run, run_main
from ds_stacking.common.errors import UserError
from ds_stacking.common.outputs import check_output_folder
from ds_stacking.common.words import shown
from ds_stacking.launcher_options import Options, whole_number

PRETRAIN = Path(__file__).with_name("pretrain.py")


def main() -> None:
    """Parse, run what is not finished, report."""
    parser = Options(
        "Compare arms of a recipe. The same command goes on where it was stopped; arms and seeds may be added. All "
        "other options are those of pretrain.py and hold for every arm."
    )
    parser.add_argument(
        "--arms", default="scratch,reset,stack", help="scratch, reset, stack, interleave, late, random"
    )
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3, metavar="N", help="runs of every arm")
    parser.add_argument("--budgets", default="0.7,1,1.4", help="budgets of scratch, in units of the recipe's FLOPs")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what equal time means")
    parser.add_argument("--launch", default=sys.executable, help="starts pretrain.py; default: Python, one process")
    parser.add_argument("--task", type=whole_number(0, 100_000), help="only this arm and seed, for a job array")
    parser.add_argument("--report_only", action="store_true", help="start nothing, write the report of what there is")
    known, options = parser.parse_known_args()
    config = parse_run(options, vars(known))
    if config.resume or config.overwrite:
        raise UserError("A comparison goes on by itself; leave --resume and --overwrite out, or delete its directory.")
    if config.output_dir is None:
        config = replace(config, output_dir=f"runs/compare-{config.name}")
    folder = check_output_folder(str(config.output_dir), "output_dir")

    from ds_stacking.studies.comparison.report import write_comparison
    from ds_stacking.studies.comparison.running import Comparison

    failed: list[str] = []
    if not known.report_only:
        comparison = Comparison(
            config=config,
            options=options,
            arms=[name.strip() for name in known.arms.split(",")],
            seeds=known.seeds,
            budgets=_numbers(known.budgets),
            clock=known.clock,
            launch=[*_words(known.launch), str(PRETRAIN)],
            say=lambda line: print(line, flush=True),
        )
        failed = comparison.run(known.task)
    print(write_comparison(folder))
    if failed:
        print(f"error: {len(failed)} runs failed, the others are reported: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"budgets {shown(text)} is no list of numbers; write for example 0.7,1,1.4.") from None


def _words(launch: str) -> list[str]:
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"launch {shown(launch)} is no command ({error}); mend its quotes.") from None
    if not words:
        raise UserError(f"launch is {shown(launch)}; give the command that starts pretrain.py, or leave it out.")
    return words


if __name__ == "__main__":
    sys.exit(run_main(main))
