"""The project's dashboard on wandb: a workspace whose panels show what every run of this library logs.

Runs are grouped by their name, so that the seeds of an arm become one line with a band. Metric names are those that
training/tracking.py gives to the records of metrics.jsonl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import plain

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

SECONDS = 15
"""Longest wait for an answer of wandb's server."""
AXES = {"tokens": "tokens", "flops": "model FLOPs", "seconds": "seconds", "training_seconds": "seconds of training"}


def build_workspace(entity: str, project: str) -> Workspace:
    """The workspace as an object; `save()` sends it, which needs a key and a network."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name="Progressive stacking",
        sections=[_losses(), _growths(), _blocks(), _speed(), _comparison()],
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("name")]),
    )


def workspace_json(workspace: Workspace) -> str:
    """The workspace as wandb's server gets it."""
    return workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"


def save_workspace(entity: str | None, project: str) -> str:
    """Send the workspace to wandb; returns its address. Raises UserError where wandb does not take it."""
    try:
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled"):
            raise UserError("wandb is offline here; give --out FILE to write the workspace to a file.")
        if not wandb.login(prompt=False, timeout=SECONDS):
            raise UserError("wandb knows no key; log in (wandb login), or give --out FILE.")
        workspace = build_workspace(entity or str(wandb.Api(timeout=SECONDS).default_entity), project)
        workspace.save()
    except UserError:
        raise
    except Exception as error:  # no network, no permission, a bad setting: each a class of its own, some private
        reason = plain(str(error) or type(error).__name__, 200)
        raise UserError(f"wandb did not take the workspace ({reason}); log in, or give --out FILE.") from error
    return workspace.url


def _section(name: str, *panels: Any) -> Section:
    import wandb_workspaces.workspaces as ws

    return ws.Section(name=name, panels=list(panels), is_open=True)


def _losses() -> Section:
    import wandb_workspaces.reports.v2 as wr

    return _section(
        "Loss",
        *(
            wr.LinePlot(
                title=f"Loss against {name}", x=axis, y=["eval/loss", "eval/loss_masked", "train/loss"], title_x=name
            )
            for axis, name in AXES.items()
        ),
    )


def _growths() -> Section:
    import wandb_workspaces.reports.v2 as wr

    return _section(
        "Growths",
        wr.LinePlot(title="Layers", x="tokens", y=["layers"]),
        wr.LinePlot(
            title="Held-out loss before and after", x="tokens", y=["growth/eval_loss_before", "growth/eval_loss_after"]
        ),
        wr.LinePlot(title="Seconds of a growth", x="tokens", y=["growth/seconds_growth"]),
    )


def _blocks() -> Section:
    import wandb_workspaces.reports.v2 as wr

    names = {
        "weight_norm": "Norm of the weights by block",
        "gradient_norm": "Norm of the gradient by block",
        "copy_cosine_master": "Cosine of a copy and its original",
    }
    return _section(
        "Blocks after a growth",
        *(
            wr.LinePlot(title=title, metric_regex=f"after_growth/{field}/.*", x="tokens")
            for field, title in names.items()
        ),
    )


def _speed() -> Section:
    import wandb_workspaces.reports.v2 as wr

    rates = {
        "tokens_per_second": "Tokens per second, by stage",
        "mfu": "Model FLOPs utilisation, by stage",
        "lr": "Learning rate",
        "grad_norm": "Gradient norm before clipping",
    }
    return _section(
        "Speed and optimisation",
        *(wr.LinePlot(title=title, x="tokens", y=[f"train/{field}"]) for field, title in rates.items()),
    )


def _comparison() -> Section:
    import wandb_workspaces.reports.v2 as wr

    return _section(
        "Comparison of arms",
        *(
            wr.LinePlot(
                title=f"Arms against {name}",
                x=axis,
                y=["eval/loss_masked"],
                groupby=wr.Config("name"),
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
                title_x=name,
            )
            for axis, name in AXES.items()
        ),
        wr.BarPlot(
            title="Last held-out loss on [MASK]", metrics=["eval/loss_masked"], groupby=wr.Config("name"),
            groupby_aggfunc="mean", groupby_rangefunc="minmax",
        ),
    )  # fmt: skip
