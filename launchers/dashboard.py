"""The dashboard of runs: report/report.html beside each run, without any service, or a workspace on wandb.

python launchers/dashboard.py runs/quickstart runs/mine
python launchers/dashboard.py --project ds-stacking --entity my-team
python launchers/dashboard.py --project ds-stacking --out workspace.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_stacking.command_line import EPILOG, run_main
from ds_stacking.common.errors import UserError


def main() -> None:
    """Parse, write what was asked for."""
    parser = argparse.ArgumentParser(
        description="Write report/report.html of run directories, finished or not, or make the workspace on wandb.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run directories to write the page of")
    parser.add_argument("--project", help="make the workspace of this wandb project")
    parser.add_argument("--entity", help="its user or team; default: that of the key")
    parser.add_argument("--out", type=Path, help="write the workspace as JSON to this file instead of sending it")
    options = parser.parse_args()
    if not options.runs and not options.project:
        raise UserError("Nothing to do; give run directories, or --project for the workspace on wandb.")

    from ds_stacking.reports.run_report import write_report

    for run in options.runs:
        print(write_report(run))
    if options.project:
        print(_workspace(options.project, options.entity, options.out))


def _workspace(project: str, entity: str | None, out: Path | None) -> str | Path:
    """Send the workspace and return its address, or write it to `out`."""
    from ds_stacking.common.files import write_text
    from ds_stacking.reports.workspace import build_workspace, save_workspace, workspace_json

    if out is None:
        return save_workspace(entity, project)
    write_text(out, workspace_json(build_workspace(entity or "entity", project)))
    return out


if __name__ == "__main__":
    sys.exit(run_main(main))
