"""Fine-tune a Hugging Face encoder on GLUE and put its scores beside the published ones.

deepspeed launchers/finetune_glue.py --model runs/quickstart --tasks all
deepspeed launchers/finetune_glue.py --model DIR --tasks SST-2,RTE --data GLUE --seeds 5 --beside untrained
python launchers/finetune_glue.py --help
"""

from __future__ import annotations

import sys

from ds_stacking.command_line import parse_options, run_main
from ds_stacking.studies.glue.configuration import GlueConfig


def main() -> None:
    """Parse, run the jobs, report; jobs that failed are in the report, and the exit code is 1."""
    description = "Fine-tune an encoder on GLUE, one training on each rank at a time. The same command goes on."
    config = parse_options(GlueConfig, sys.argv[1:], description)

    from ds_stacking.studies.glue.report import write_glue_report, write_submission
    from ds_stacking.studies.glue.run import run_glue

    jobs = run_glue(config)
    if jobs is not None:
        report = write_glue_report(config.output_dir, jobs)
        print(report.text)
        print(write_submission(config.output_dir, report))
        if report.failed:
            sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_main(main))
