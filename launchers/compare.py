"""Does stacking pay? Every arm at equal FLOPs and at equal time, fully decayed, over seeds, in one report.

python launchers/compare.py --recipe quickstart --arms scratch,reset,stack --tune
python launchers/compare.py --launch "deepspeed --num_gpus 8" --recipe bert_base_stacking --output_dir runs/compare
python launchers/compare.py --study launchers/studies/documentation.json --parallel 2
sbatch --array 0-24 launchers/slurm/compare.sbatch --recipe quickstart --arms scratch,reset,stack --seeds 5
"""

from __future__ import annotations

import sys
from pathlib import Path

from ds_stacking.command_line import run_main


def main() -> None:
    """Parse, run what is not finished, report."""
    from ds_stacking.studies.comparison.command import compare

    sys.exit(compare(Path(__file__).with_name("pretrain.py")))


if __name__ == "__main__":
    sys.exit(run_main(main))
