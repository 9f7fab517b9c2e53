"""Plan a run before it starts: memory, communication, hours and what stacking saves.

python launchers/plan.py --recipe bert_base_stacking --nodes 1 --gpu h100
python launchers/plan.py --recipe bert_large_stacking --nodes 128 --gpu h100 --zero_stage 1 --tokens_per_step 4194304
python launchers/plan.py --recipe quickstart --gpu l4 --gpus_per_node 1 --run runs/quickstart
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

from ds_stacking.command_line import parse_run, run_main
from ds_stacking.config import RunConfig
from ds_stacking.launcher_options import Options, share, whole_number


def main() -> None:
    """Parse, plan, print."""
    parser = Options("Every option of pretrain.py is one here too, and what it refuses is refused here.")
    parser.add_argument("--nodes", type=whole_number(1, 100_000), default=1, help="nodes")
    parser.add_argument("--gpus_per_node", type=whole_number(1, 1024), default=8, help="GPUs of each node")
    parser.add_argument("--gpu", required=True, help="h100, h200, b200, a100, mi300x, l40s, l4, a10, 4090, ...")
    parser.add_argument("--zero_stage", type=whole_number(0, 3), default=2, help="where a stage names none")
    parser.add_argument("--mfu", type=share, default=0.35, help="share of the bf16 peak assumed for the arithmetic")
    parser.add_argument("--run", help="a finished run: how well its stages predict one another")
    options, rest = parser.parse_known_args()
    config = parse_run(rest, vars(options))

    from ds_stacking.planning.calibration import calibrate
    from ds_stacking.planning.estimate import check_sizes, plan_run
    from ds_stacking.planning.gpus import gpu_spec_named
    from ds_stacking.planning.text import calibration_table, make_cluster, plan_table, with_vocabulary

    cluster = make_cluster(
        gpu_spec_named(options.gpu), nodes=options.nodes, gpus_per_node=options.gpus_per_node, mfu=options.mfu
    )
    check_sizes(config)
    found = [] if options.run is None else calibrate(options.run)
    config = _as_pretrain_does(with_vocabulary(config), cluster.gpus, options.zero_stage)
    print(plan_table(config, plan_run(config, cluster, zero_stage=options.zero_stage), cluster))
    for calibration in found:
        print(calibration_table(calibration))


def _as_pretrain_does(config: RunConfig, gpus: int, zero_stage: int) -> RunConfig:
    """Refuse what pretrain.py refuses before it trains, and give the stages the steps of the trigger."""
    logging.disable(logging.WARNING)  # DeepSpeed's words about this machine, which is not the one that is planned for
    from ds_stacking.engine.ds_config import load_ds_config
    from ds_stacking.training.build import check_stages
    from ds_stacking.training.triggering import triggered_stages

    logging.disable(logging.NOTSET)
    ds_config = {"zero_optimization": {"stage": zero_stage}}
    if config.deepspeed_config != RunConfig.deepspeed_config or Path(config.deepspeed_config).is_file():
        ds_config = load_ds_config(config.deepspeed_config)
        ds_config["zero_optimization"]["stage"] = zero_stage
    check_stages(config, ds_config, bf16=True, world_size=gpus)
    return replace(config, stages=triggered_stages(config))


if __name__ == "__main__":
    sys.exit(run_main(main))
