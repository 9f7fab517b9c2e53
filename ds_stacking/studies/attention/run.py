"""Attention maps of a run after every stage, or of any Hugging Face encoder; and how a block and its copy part."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import explain_disk, write_json
from ds_stacking.common.model_folder import check_links, one_sentence
from ds_stacking.common.own_files import make_inside
from ds_stacking.data.sources.corpus import iterate_documents
from ds_stacking.data.tokenizer import load_tokenizer, special_ids
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.models.encoders import load_model, quiet
from ds_stacking.studies.attention.configuration import AttentionConfig
from ds_stacking.studies.attention.maps import TARGETS, AttentionMaps, measure
from ds_stacking.studies.attention.subject import Growth, Subject, layers_of, resolve

DIGITS = 5
Record = dict[str, Any]


def analyse(config: AttentionConfig) -> Path:
    """Write attention.json into the output folder and return that folder. Raises UserError for bad input."""
    quiet()
    subject = resolve(config)
    sequences = read_sequences(subject, config.sequences)
    stages: dict[str, AttentionMaps] = {}
    as_grown: dict[str, AttentionMaps] = {}
    names = list(subject.models)
    for index, name in enumerate(names):
        model = load_with_maps(subject.models[name], subject.length)
        count = find_blocks(model).count
        if len(names) > 1 and layers_of(name) not in (None, count):
            raise UserError(f"{subject.models[name]} has {count} layers; restore the export of that stage.")
        if int(sequences.max()) >= model.config.vocab_size:
            raise UserError(
                f"The tokenizer of {subject.tokenizer} is not that of {name}; give its own with --tokenizer."
            )
        stages[name] = measure(model, sequences, neighbours=config.neighbours)
        print(f"{name}: {describe(stages[name])}", flush=True)
        layers = subject.growths[index]["layer_map"] if index < len(subject.growths) else [None]
        if copied := [layer for layer in layers if layer is not None] if None not in layers else []:
            grown = copy_blocks(model, copied)
            as_grown[names[index + 1]] = measure(grown, sequences, neighbours=config.neighbours)
    record = {
        "model": config.model,
        "data": subject.data,
        "sequences": len(sequences),
        "sequence_length": subject.length,
        "neighbours": config.neighbours,
        "stages": [stage_record(name, maps) for name, maps in stages.items()],
        "growths": partings(subject.growths, stages, as_grown),
    }
    try:
        _write(subject.output_dir, record, Path(config.model))
    except OSError as error:
        raise explain_disk("The numbers", subject.output_dir, error) from error
    return subject.output_dir


def _write(folder: Path, record: Record, root: Path) -> None:
    """Write attention.json; below the run directory `root` through no link."""
    inside = root if folder.is_relative_to(root) and folder != root else None
    if inside:
        make_inside(root, *folder.relative_to(root).parts)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "attention.json", record, inside=inside)


def read_sequences(subject: Subject, number: int) -> Tensor:
    """Sequences [B, T] of token ids from the beginning of the text, [CLS] first and [SEP] last."""
    if Path(subject.tokenizer).is_dir():
        check_links(Path(subject.tokenizer))
    with one_sentence(f"The tokenizer {subject.tokenizer} cannot be loaded"):
        tokenizer = load_tokenizer(subject.tokenizer)
        special = special_ids(tokenizer)
    places = subject.length - 2
    tokens: list[int] = []
    for document in iterate_documents(subject.data, subject.corpus):
        with one_sentence(f"The tokenizer {subject.tokenizer} cannot read this text"):
            tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= number * places:
            break
    number = min(number, len(tokens) // places)
    if not number:
        raise UserError(
            f"{subject.data} has fewer than {places} tokens; give more text, or a smaller sequence_length."
        )
    inner = torch.tensor(tokens[: number * places]).view(number, places)
    edge = torch.ones(number, 1, dtype=torch.long)
    return torch.cat([special.cls * edge, inner, special.sep * edge], 1)


def load_with_maps(source: str | Path, length: int) -> PreTrainedModel:
    """An encoder that gives its attention maps. Raises UserError where there is none or it knows too few positions."""
    # the other implementations never have the maps in memory
    model = load_model(AutoModel, source, attn_implementation="eager")
    positions = getattr(model.config, "max_position_embeddings", None) or length
    if model.config.is_encoder_decoder or length > positions:
        wrong = "is an encoder-decoder" if model.config.is_encoder_decoder else f"knows {positions} positions only"
        raise UserError(f"{source} {wrong}; give an encoder, or a --sequence_length that it can take.")
    return model


def copy_blocks(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """The model as a growth by the layer map `layers` leaves it: its own blocks, copied in that order."""
    names = find_blocks(model)
    parent, _, name = names.prefix.rpartition(".")
    blocks = model.get_submodule(names.prefix)
    assert isinstance(blocks, nn.ModuleList)
    grown = copy.deepcopy(model)
    setattr(grown.get_submodule(parent), name, nn.ModuleList(copy.deepcopy(blocks[source]) for source in layers))
    grown.config.num_hidden_layers = len(layers)
    return grown


def stage_record(name: str, maps: AttentionMaps) -> Record:
    """One model's numbers as JSON values."""
    layers, heads = maps.mass.shape[1:]
    return {
        "name": name,
        "layers": layers,
        "heads": heads,
        "share_of_heads": maps.share,
        "mass": {target: _rounded(mass) for target, mass in zip(TARGETS, maps.mass, strict=True)},
        "distances": maps.distances,
        "profile": _rounded(maps.profile),
        "js_divergence": _rounded(maps.divergence),
        "weight_cosine": _rounded(maps.weight_cosine),
    }


def partings(
    growths: Sequence[Growth], stages: Mapping[str, AttentionMaps], as_grown: Mapping[str, AttentionMaps]
) -> list[Record]:
    """For each growth its pairs of original and copy: how alike they are as grown, and after every stage since.

    Likeness is the Jensen-Shannon divergence of their attention, head by head, and the cosine of their weights;
    beside it, the mean over all pairs of blocks that have no source in common.
    """
    names, records = list(stages), []
    for index, growth in enumerate(growths):
        mapping = growth["layer_map"]
        pairs = [(a, b) for a, b in combinations(range(len(mapping)), 2) if mapping[a] is not None]
        twins = [(a, b) for a, b in pairs if mapping[a] == mapping[b] and a == mapping.index(mapping[a])]
        others = [(a, b) for a, b in pairs if mapping[a] != mapping[b]]
        points = (
            [_point("as grown", as_grown[names[index + 1]], twins, others)] if names[index + 1] in as_grown else []
        )
        place = list(range(len(mapping)))  # where the blocks of this growth stand in later models
        for later, name in enumerate(names[index + 1 :], start=index + 1):
            if later > index + 1:
                onward = growths[later - 1]["layer_map"] if later <= len(growths) else []
                if not set(place) <= set(onward):
                    break  # a growth that is not known, or one that leaves blocks out
                place = [onward.index(position) for position in place]
            now = [[(place[a], place[b]) for a, b in some] for some in (twins, others)]
            points.append(_point(f"end of {name}", stages[name], *now))
        depths = {"from_layers": growth["from_layers"], "to_layers": growth["to_layers"]}
        records.append({**depths, "operator": growth["operator"], "pairs": twins, "points": points})
    return records


def _point(
    name: str, maps: AttentionMaps, twins: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]
) -> Record:
    measures = {"js_divergence": maps.head_divergence.mean(-1), "weight_cosine": maps.weight_cosine}
    record: Record = {"name": name}
    for key, matrix in measures.items():
        record[key] = [round(float(matrix[pair]), DIGITS) for pair in twins]
        rest = [float(matrix[pair]) for pair in others]
        record[f"{key}_others"] = round(sum(rest) / len(rest), DIGITS) if rest else None
    return record


def describe(maps: AttentionMaps) -> str:
    """One line for a person."""
    layers, heads = maps.mass.shape[1:]
    mass = ", ".join(f"{name} {float(values.mean()):.2f}" for name, values in zip(TARGETS, maps.mass, strict=True))
    share = ", ".join(f"{name} {value:.0%}" for name, value in maps.share.items())
    return f"{layers} layers of {heads} heads; mean attention on {mass}; heads mostly {share}"


def _rounded(tensor: Tensor) -> list:
    return (tensor * 10**DIGITS).round().div(10**DIGITS).tolist()
