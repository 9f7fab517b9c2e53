"""Grow a Hugging Face folder, or a checkpoint of a run with its optimizer state, on the disk.

python launchers/grow_checkpoint.py IN OUT --operator stack --to_layers 12
python launchers/grow_checkpoint.py runs/quickstart grown --operator "interleave[1:-1]" --to_layers 14
"""

from __future__ import annotations

import sys
from pathlib import Path

from ds_stacking.command_line import run_main
from ds_stacking.common.errors import require
from ds_stacking.common.model_folder import MOST_BLOCKS
from ds_stacking.launcher_options import Options, whole_number


def main() -> None:
    """Parse, grow, say what was done."""
    parser = Options(
        "Grow the model in IN to more layers and write it to the new folder OUT. IN stays as it is.",
        renamed={"to-layers": "to_layers"},
    )
    parser.add_argument("source", metavar="IN", help="Hugging Face folder, run directory or checkpoint")
    parser.add_argument("target", metavar="OUT", help="folder to be made")
    parser.add_argument("--operator", default="stack", help="stack (default), interleave, ... or a list: 0,1,2,2,1,0")
    parser.add_argument(
        "--to_layers", type=whole_number(1, MOST_BLOCKS), required=True, help="blocks of the grown model"
    )
    parser.add_argument("--optimizer_state", default="stack", help="stack (default), reset, ..., or scale:C")
    options = parser.parse_args()
    require(options.source, "IN is empty; give a Hugging Face folder, a run directory or a checkpoint.")
    require(options.target, "OUT is empty; give the folder to be made.")

    from ds_stacking.checkpoint.grow import grow_folder
    from ds_stacking.checkpoint.huggingface import left_behind, other_files

    source = Path(options.source)
    path, plan = grow_folder(
        source,
        Path(options.target),
        operator=options.operator,
        layers=options.to_layers,
        optimizer_state=options.optimizer_state,
    )
    print(plan.describe())
    print(f"{len(plan.entries)} tensors written and verified: {path}")
    if (path / "config.json").is_file():
        print(f"taken over as they are: {', '.join(other_files(source)) or 'no other files'}")
        if left := left_behind(source):
            print(f"not taken over: {', '.join(map(ascii, left[:20]))}{' ...' if len(left) > 20 else ''}")


if __name__ == "__main__":
    sys.exit(run_main(main))
