"""Attention maps of a run after every stage, or of any Hugging Face encoder: numbers and figures.

python launchers/analyze_attention.py --model runs/quickstart
python launchers/analyze_attention.py --model google-bert/bert-base-uncased --output_dir maps
"""

from __future__ import annotations

import sys

from ds_stacking.command_line import parse_options, run_main
from ds_stacking.studies.attention.configuration import AttentionConfig


def main() -> None:
    """Parse, measure, draw."""
    description = "Attention maps of a run or of a Hugging Face encoder."
    config = parse_options(AttentionConfig, sys.argv[1:], description, renamed={"blocks": "sequences"})

    from ds_stacking.studies.attention.report import draw_attention
    from ds_stacking.studies.attention.run import analyse

    for path in draw_attention(analyse(config)):
        print(path)


if __name__ == "__main__":
    sys.exit(run_main(main))
