"""Prepare a corpus once, for any number of runs: documents, cleaned and de-duplicated, as shards of tokens.

python launchers/prepare_data.py --data enwiki-latest-pages-articles.xml.bz2 --output_dir prepared/wikipedia
python launchers/prepare_data.py --data 'books/*.jsonl.zst' --output_dir prepared/books --near_duplicates 0.8
deepspeed launchers/pretrain.py --deepspeed_config ds_configs/zero2.json --data prepared/wikipedia

Stopped or killed, the same command goes on; on a finished folder it compares every byte with its hash and makes
damaged shards again. To compare alone, such as a folder that came from elsewhere:

python launchers/prepare_data.py --verify --output_dir prepared/wikipedia
"""

from __future__ import annotations

import os
import sys

from ds_stacking.command_line import parse_options, run_main
from ds_stacking.data.preparation.configuration import PreparationConfig


def main() -> None:
    """Parse, then prepare; the libraries load only once the options are known to be good."""
    description = "Clean, de-duplicate and tokenise a corpus into shards that pretrain.py takes as --data."
    config = parse_options(PreparationConfig, sys.argv[1:], description)

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from ds_stacking.data.preparation.folder import prepare_folder

    prepare_folder(config, log=lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(run_main(main))
