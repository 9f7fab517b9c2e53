"""compare.py: its options, one comparison or a study of several, the report, the exit code."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.failures import LOST
from ds_stacking.common.outputs import check_output_folder
from ds_stacking.common.words import shown
from ds_stacking.config import RunConfig
from ds_stacking.launcher_options import Options, one_of, positive, whole_number
from ds_stacking.studies.comparison.report import write_comparison
from ds_stacking.studies.comparison.running import Comparison
from ds_stacking.studies.comparison.shapes import PLAN
from ds_stacking.studies.comparison.starting import Slot, slots
from ds_stacking.studies.comparison.study import read_study, write_study


def compare(pretrain: Path) -> int:
    """What compare.py does, with `pretrain` as the program that trains: parse, run what is not finished, report.

    Returns the exit code: 1 where runs failed, LOST where all that failed may succeed next time. Raises UserError,
    RunFailed where a pilot fails, and RunAgain when asked to stop.
    """
    known, options = make_parser().parse_known_args()
    lost: set[str] = set()
    if known.study is not None:
        failed = run_study(known, _study_options(sys.argv[1:]), pretrain)
    else:
        failed, lost = run_one(known, options, pretrain)
    if not failed:
        return 0
    print(f"error: {len(failed)} runs failed, the others are reported: {', '.join(failed)}", file=sys.stderr)
    return LOST if lost.issuperset(failed) else RunFailed.exit_code


def make_parser() -> Options:
    """The options of a comparison."""
    parser = Options(
        "Compare arms of a recipe. The same command goes on where it was stopped; arms and seeds may be added. All "
        "other options are those of pretrain.py and hold for every arm."
    )
    add = parser.add_argument
    add(
        "--arms",
        default="scratch,reset,stack",
        help="scratch, reset, stack, interleave, late, random, gong2019; every depth throughout comes by itself",
    )
    add(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=STAGES",
        help="an arm of your own, such as slow=1:80,4:560,lr=1e-3; may be given often. Settings: operator, "
        "optimizer_state, lr, schedule",
    )
    add("--seeds", type=whole_number(1, 1000), default=5, metavar="N", help="runs of every arm")
    add("--budgets", default="0.5,0.7,1,1.4", help="budgets of scratch, in units of the recipe's FLOPs")
    add(
        "--tune",
        type=whole_number(1, 100),
        nargs="?",
        const=1,
        default=0,
        metavar="SEEDS",
        help="tune each arm's learning rate first, on this many other seeds (1)",
    )
    add("--minutes", type=positive, help="scale the recipe's steps so that all runs together take about so long")
    add(
        "--clock",
        type=one_of("wall", "cpu"),
        default="wall",
        help="what equal time means; cpu: a core for each run",
    )
    add("--parallel", type=whole_number(1, 256), default=1, metavar="N", help="runs at a time, each on its own core")
    add("--launch", help="starts pretrain.py; default: Python, one process")
    add("--task", type=whole_number(0, 100_000), help="only this arm and seed, for a job array")
    add("--study", metavar="FILE", help="run a list of comparisons as one plan (docs/comparison.md)")
    add("--report_only", action="store_true", help="start nothing, write the report of what there is")
    return parser


def run_one(known: Namespace, options: list[str], pretrain: Path) -> tuple[list[str], set[str]]:
    """Run one comparison and print its report; returns the runs that failed, and those that may not fail again."""

    failed: list[str] = []
    lost: set[str] = set()
    if known.report_only:
        folder = check_output_folder(_config(known, options).run_dir, "output_dir")
    else:
        comparison = make_comparison(known, options, pretrain)
        folder = comparison.folder
        failed, lost = comparison.run(known.task), comparison.lost
    print(write_comparison(folder))
    return failed, lost


def run_study(known: Namespace, options: list[str], pretrain: Path) -> list[str]:
    """Run the comparisons of a study one after another; returns the runs that failed."""

    if known.task is not None:
        raise UserError("--task is one arm and seed of one comparison; leave --study or --task out.")
    path = Path(known.study)
    folder, rest = _study_folder(path, options)
    entries = {name: [*own, *rest] for name, own in read_study(path).items()}
    parsed = {}
    for name, own in entries.items():  # all, before any begins
        its, more = make_parser().parse_known_args(own)
        its.parallel, its.launch = known.parallel, known.launch
        parsed[name] = (its, [*more, f"--output_dir={folder / name}"])
        if not known.report_only:
            make_comparison(*parsed[name], pretrain)
    failed: list[str] = []
    for number, (name, (its, more)) in enumerate(parsed.items(), 1):
        if not known.report_only:
            print(f"comparison {number} of {len(parsed)}: {name}", flush=True)
            try:
                failed += [f"{name}/{path}" for path in make_comparison(its, more, pretrain).run()]
            except (RunFailed, UserError) as error:  # such as of its pilot: the others shall not wait for it
                print(f"error: {name}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
        if (folder / name / PLAN).exists():
            print(write_comparison(folder / name), flush=True)
    print(write_study(folder, list(parsed)))
    return failed


def _study_options(arguments: Sequence[str]) -> list[str]:
    """What of the command line holds for every comparison, such as --seeds: all but what is one for the study."""
    shared = Options("")
    for name in ("--study", "--parallel", "--launch", "--task"):
        shared.add_argument(name)
    shared.add_argument("--report_only", action="store_true")
    return shared.parse_known_args(arguments)[1]


def _study_folder(path: Path, options: list[str]) -> tuple[Path, list[str]]:
    """The study's folder, and the options that hold for all of its comparisons."""
    own = Options("")
    own.add_argument("--output_dir", default=f"runs/{path.stem}")
    found, rest = own.parse_known_args(options)
    return check_output_folder(found.output_dir, "output_dir"), rest


def make_comparison(known: Namespace, options: list[str], pretrain: Path) -> Comparison:
    """The comparison that the options ask for. Raises UserError."""

    return Comparison(
        config=_config(known, options),
        options=options,
        arms=[name.strip() for name in known.arms.split(",") if name.strip()],
        own=known.arm,
        seeds=known.seeds,
        budgets=_numbers(known.budgets),
        tune=known.tune,
        minutes=known.minutes,
        clock=known.clock,
        launch=[*_words(known.launch), str(pretrain)],
        slots=_slots(known),
        log=partial(print, flush=True),
    )


def _config(known: Namespace, options: list[str]) -> RunConfig:
    config = parse_run(options, vars(known))
    if config.resume or config.overwrite:
        raise UserError("A comparison goes on by itself; leave --resume and --overwrite out, or delete its directory.")
    return config if config.output_dir is not None else replace(config, output_dir=f"runs/compare-{config.name}")


def _slots(known: Namespace) -> Sequence[Slot]:
    """Where runs run. Several at a time, and processor time, are for one process each."""

    alone = known.parallel == 1 and known.clock == "wall"
    if known.launch is not None and not alone:
        what = "--clock cpu" if known.clock == "cpu" else f"--parallel {known.parallel}"
        raise UserError(f"{what} is for runs of one process each; leave --launch out, or {what}.")
    gpus = [] if alone else _gpus()
    if gpus and known.clock == "cpu":
        raise UserError("--clock cpu means nothing where GPUs train; leave it out.")
    return slots(known.parallel, pinned=not alone, gpus=gpus)


def _gpus() -> list[str]:
    """Names of the visible GPUs, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"budgets {shown(text)} is no list of numbers; write for example 0.5,0.7,1,1.4.") from None


def _words(launch: str | None) -> list[str]:
    if launch is None:
        return [sys.executable]
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"launch {shown(launch)} is no command ({error}); mend its quotes.") from None
    if not words:
        raise UserError(f"launch is {shown(launch)}; give the command that starts pretrain.py, or leave it out.")
    return words
