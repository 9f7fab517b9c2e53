"""Pre-train BERT by progressive stacking.

deepspeed launchers/pretrain.py --deepspeed_config ds_configs/zero2.json
deepspeed --num_gpus 8 launchers/pretrain.py --deepspeed_config ds_configs/zero2.json --recipe bert_base_stacking
python launchers/pretrain.py --help
"""

from __future__ import annotations

import sys

from ds_stacking.command_line import parse_run, run_main


def main() -> None:
    """Parse, then run; deepspeed and torch load only once the options are known to be good."""
    config = parse_run(sys.argv[1:])

    from ds_stacking.training.run import pretrain

    pretrain(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
