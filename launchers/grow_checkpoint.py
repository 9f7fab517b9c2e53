"""Grow a Hugging Face folder, or a checkpoint of a run with its optimizer state, on the disk.

python launchers/grow_checkpoint.py IN OUT --operator stack --to-layers 12
python launchers/grow_checkpoint.py runs/quickstart grown --operator "interleave[1:-1]" --to-layers 14
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_stacking.command_line import EPILOG, run_main


def main() -> None:
    """Parse, grow, say what was done."""
    parser = argparse.ArgumentParser(
        description="Grow the model in IN to more layers and write it to the new folder OUT. IN stays as it is.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="Hugging Face folder, run directory or checkpoint")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to be made")
    parser.add_argument("--operator", default="stack", help="stack, interleave, middle, last or a list: 0,1,2,2,1,0")
    parser.add_argument("--to-layers", type=int, required=True, help="blocks of the grown model")
    parser.add_argument("--optimizer_state", default="stack", help="stack, new_reset, reset, second_only or scale:C")
    options = parser.parse_args()

    from ds_stacking.checkpoint.grow import grow_folder

    path, plan = grow_folder(
        options.source,
        options.target,
        operator=options.operator,
        layers=options.to_layers,
        optimizer_state=options.optimizer_state,
    )
    print(plan.describe())
    print(f"{len(plan.entries)} tensors written and verified: {path}")


if __name__ == "__main__":
    sys.exit(run_main(main))
