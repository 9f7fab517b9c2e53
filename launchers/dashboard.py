"""The dashboard of runs: report/report.html beside each run, without any service, or a workspace on wandb.

python launchers/dashboard.py runs/quickstart runs/mine
python launchers/dashboard.py --project ds-stacking --entity my-team
python launchers/dashboard.py --project ds-stacking --out workspace.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from ds_stacking.command_line import run_main
from ds_stacking.common.errors import UserError
from ds_stacking.common.outputs import check_output_file, writing
from ds_stacking.launcher_options import Options, wandb_name


def main() -> None:
    """Parse, write what was asked for."""
    parser = Options("Write report/report.html of run directories, finished or not, or make the workspace on wandb.")
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run directories to write the page of")
    parser.add_argument("--project", type=wandb_name, help="make the workspace of this wandb project")
    parser.add_argument("--entity", type=wandb_name, help="its user or team; default: that of the key")
    parser.add_argument("--out", help="write the workspace as JSON to this file instead of sending it")
    options = parser.parse_args()
    if not options.runs and not options.project:
        raise UserError("Nothing to do; give run directories, or --project for the workspace on wandb.")
    if not options.project and (options.entity is not None or options.out is not None):
        raise UserError("--entity and --out are for the workspace on wandb; give its --project too.")
    out = None if options.out is None else check_output_file(options.out, "--out")

    from ds_stacking.reports.run_report import write_report

    for run in options.runs:
        print(write_report(run))
    if options.project:
        print(_workspace(options.project, options.entity, out))


def _workspace(project: str, entity: str | None, out: Path | None) -> str | Path:
    """Send the workspace and return its address, or write it to `out`."""
    from ds_stacking.common.files import write_text
    from ds_stacking.reports.workspace import build_workspace, save_workspace, workspace_json

    if out is None:
        return save_workspace(entity, project)
    content = workspace_json(build_workspace(entity or "entity", project))
    with writing(out):
        write_text(out, content)
    return out


if __name__ == "__main__":
    sys.exit(run_main(main))
