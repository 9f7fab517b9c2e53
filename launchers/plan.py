"""Plan a run before it starts: memory, communication, hours and what stacking saves.

python launchers/plan.py --recipe bert_base_stacking --nodes 1 --gpu h100
python launchers/plan.py --recipe bert_large_stacking --nodes 128 --gpu h100 --zero_stage 1 --tokens_per_step 4194304
python launchers/plan.py --recipe quickstart --gpu l4 --gpus_per_node 1 --run runs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_stacking.command_line import parse_run, run_main
from ds_stacking.common.errors import UserError
from ds_stacking.common.explain import EPILOG


def main() -> None:
    """Parse, plan, print."""
    parser = argparse.ArgumentParser(
        description="Every option of pretrain.py is one here too.",
        epilog=EPILOG,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of each node")
    parser.add_argument("--gpu", default="", help="h100, h200, b200, a100, mi300x, l40s, l4, a10, 4090, ...")
    parser.add_argument("--zero_stage", type=int, choices=range(4), default=2, help="where a stage names none")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the bf16 peak assumed for the arithmetic")
    parser.add_argument("--run", type=Path, help="a finished run: how well its stages predict one another")
    try:
        options, rest = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see --help.") from None
    config = parse_run(rest, vars(options))

    from ds_stacking.planning.calibration import calibrate
    from ds_stacking.planning.estimate import plan_run
    from ds_stacking.planning.parts import part_named
    from ds_stacking.planning.text import calibration_table, complete, make_cluster, plan_table

    cluster = make_cluster(
        part_named(options.gpu), nodes=options.nodes, gpus_per_node=options.gpus_per_node, mfu=options.mfu
    )
    config = complete(config)
    print(plan_table(config, plan_run(config, cluster, zero_stage=options.zero_stage), cluster))
    if options.run is not None:
        print("\n".join(map(calibration_table, calibrate(options.run))))


if __name__ == "__main__":
    sys.exit(run_main(main))
