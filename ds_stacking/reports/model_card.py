"""The model card of an exported model: the README.md beside its weights, with metadata that the Hub understands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_text
from ds_stacking.common.json_files import read_json
from ds_stacking.reports.closing import CLOSING, verdict
from ds_stacking.reports.table import count, duration, flops, loss, stage_markdown

PAPER = "Gong et al., *Efficient Training of BERT by Progressively Stacking*, ICML 2019"


def write_model_card(
    folder: str | Path,
    *,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    licence: str | None = None,
) -> Path:
    """Write `folder`/README.md for the model whose config.json and weights lie in `folder`.

    `summary` is the content of summary.json, `config` that of the run's config.json. `licence` is a Hub licence
    identifier such as apache-2.0; without one the card says that the publisher must choose. Raises UserError where
    `folder` holds no exported model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of an exported model.")
    model = read_json(path, dict[str, Any], mend="export the model again", inside=path.parent)
    name = f"{config['name']}-{model['num_hidden_layers']}L"
    sections = (
        f"# {name}",
        _about(model, summary),
        "## How to load it",
        _loading(model),
        "## How it was trained",
        _training(summary, config),
        "## Results",
        _results(summary),
        "## Limitations",
        _limitations(config),
        "## Licence",
        _licence(licence, config),
    )
    metadata = _metadata(name, model, summary, config, licence)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    write_text(path.with_name("README.md"), str(card), inside=path.parent)
    return path.with_name("README.md")


def _metadata(
    name: str, model: Mapping[str, Any], summary: Mapping[str, Any], config: Mapping[str, Any], licence: str | None
) -> ModelCardData:
    figures = {"Held-out MLM loss": "eval_loss", "Held-out MLM loss, [MASK] positions only": "eval_loss_masked"}
    results = [
        EvalResult(
            task_type="fill-mask",
            dataset_type=config["data"],
            dataset_name=f"{config['data']} (held-out documents)",
            metric_type="loss",
            metric_name=title,
            metric_value=round(summary[field], 4),
        )
        for title, field in figures.items()
        if summary.get(field) is not None
    ]
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="fill-mask",
        license=licence,
        tags=[*["progressive-stacking"] * _is_grown(summary), "masked-language-modelling", model["model_type"]],
        eval_results=results or None,
    )


def _about(model: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    return (
        f"A bidirectional Transformer encoder ({model['architectures'][0]}) with {model['num_hidden_layers']} layers, "
        f"width {model['hidden_size']}, {model['num_attention_heads']} attention heads, a vocabulary of "
        f"{model['vocab_size']} and {count(summary['parameters'])} parameters. It was pre-trained by masked language "
        f"modelling{_growing(summary)}."
    )


def _is_grown(summary: Mapping[str, Any]) -> bool:
    return any(growth["to_layers"] > growth["from_layers"] for growth in summary["growths"])


def _growing(summary: Mapping[str, Any]) -> str:
    grown = [growth for growth in summary["growths"] if growth["to_layers"] > growth["from_layers"]]
    if not grown:
        return ", at one depth from the first step to the last"
    is_new = any(None in growth["layer_map"] for growth in grown)
    is_copied = any(len(set(known)) < len(known) for known in map(_sources, grown))
    how = {(True, False): "its blocks are copied", (False, True): "new blocks are added"}.get(
        (is_copied, is_new), "blocks are copied and new ones added"
    )
    name = f"with progressive stacking ({PAPER})" if is_copied and not is_new else "with growth in depth"
    return f" {name}: a shallow model is trained first, {how} to make a deeper one, and training goes on"


def _sources(growth: Mapping[str, Any]) -> list[int]:
    """The blocks that those of the grown model come from, but for new ones."""
    return [layer for layer in growth["layer_map"] if layer is not None]


def _loading(model: Mapping[str, Any]) -> str:
    auto = (
        "AutoModelForPreTraining" if model["architectures"][0].endswith("ForPreTraining") else "AutoModelForMaskedLM"
    )
    remote = ", trust_remote_code=True" if "auto_map" in model else ""
    note = "\n\nIts modelling code lies beside the weights; read it before you trust it." if remote else ""
    return (
        f"```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        f'model = {auto}.from_pretrained("path/to/this/folder"{remote})\n```{note}'
    )


def _training(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    growths = "\n".join(
        f"* {growth['from_layers']} → {growth['to_layers']} layers by `{growth['operator']}`, optimizer state "
        f"`{growth['optimizer_state']}`, in {duration(growth['seconds'])}; "
        f"held-out loss {loss(growth['eval_loss_before'])} before and "
        f"{loss(growth['eval_loss_after'])} after."
        for growth in summary["growths"]
    )
    return (
        f"* Text: {_source(config)}, sequences of {config['corpus']['sequence_length']} tokens, "
        f"{config['corpus']['masking_rate']:.0%} of the tokens predicted.\n"
        f"* Spent: {count(summary['tokens'])} tokens, {flops(summary['flops'])} (model FLOPs) and "
        f"{duration(summary['seconds'])} on {summary['world_size']} rank(s) with ZeRO stage {summary['zero_stage']}.\n"
        f"* Optimizer: AdamW, {_rates(config)}, seed {config['seed']}.\n\n"
        f"{stage_markdown(summary['stages'])}\n\n"
        f"Losses are in nats per predicted token.\n\n{growths or 'The model was not grown.'}"
    )


def _rates(config: Mapping[str, Any]) -> str:
    """The learning rate: the run's schedule, but for stages with a rate of their own."""
    run = f"peak learning rate {config['lr']:g}, schedule `{config['schedule']}`"
    if all(stage["lr"] is None for stage in config["stages"]):
        return run
    rates = []
    for stage in config["stages"]:
        end = "" if stage["lr_end"] is None else f" falling to {stage['lr_end']:g}"
        own = run if stage["lr"] is None else f"{stage['lr']:g}{end}"
        rates.append(f"{stage['layers']} layers {own}")
    return f"learning rate by stage: {'; '.join(rates)}"


def _results(summary: Mapping[str, Any]) -> str:
    rows = [("eval_loss", "held-out loss on all predicted positions"), *CLOSING]
    table = "\n".join(f"| {title} | {loss(summary.get(field))} |" for field, title in rows)
    return f"| figure | nats |\n| --- | ---: |\n{table}\n\n{verdict(summary)}".rstrip()


def _limitations(config: Mapping[str, Any]) -> str:
    return (
        f"* It has read {_source(config)} and nothing else: its language, its subjects and its biases are those of "
        "that text.\n"
        "* It fills masks and gives features for fine-tuning; it does not generate text or follow instructions.\n"
        f"* Inputs longer than {config['corpus']['sequence_length']} tokens were never seen in training.\n"
        "* The losses above are the only evaluation; they say nothing about a particular task."
    )


def _source(config: Mapping[str, Any]) -> str:
    meaning = " (the documentation of installed Python packages)" if config["data"] == "docs" else ""
    return f"`{config['data']}`{meaning}"


def _licence(licence: str | None, config: Mapping[str, Any]) -> str:
    terms = f"The weights are under `{licence}`." if licence else "No licence has been chosen for the weights."
    return f"{terms} The text that they were trained on (`{config['data']}`) has terms of its own; check them too."
