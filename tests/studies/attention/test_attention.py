"""Attention maps: every number beside loops over tokens, real encoders, and runs in which blocks were copied."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn
from transformers import AutoModel, RobertaConfig, RobertaModel

from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig, ModelConfig
from ds_stacking.growth.operators import layer_map
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import save_huggingface
from ds_stacking.studies.attention import maps as attention
from ds_stacking.studies.attention.configuration import AttentionConfig
from ds_stacking.studies.attention.maps import TARGETS, measure
from ds_stacking.studies.attention.run import analyse, copy_blocks, load_with_maps, partings
from tests.studies.glue.glue_files import WORDS, write_encoder

LAYERS, HEADS, BLOCKS, TOKENS = 3, 2, 5, 11


class GivenMaps(nn.Module):
    """Answers with maps that were made beforehand, block by block."""

    def __init__(self, maps: Tensor) -> None:  # [L, B, H, T, T]
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(LAYERS))
        self.maps = maps

    def forward(self, input_ids: Tensor, output_attentions: bool) -> SimpleNamespace:
        assert output_attentions
        return SimpleNamespace(attentions=list(self.maps[:, input_ids[:, 1]]))


def test_every_number_beside_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FARTHEST", 4)
    torch.manual_seed(0)
    maps = torch.randn(LAYERS, BLOCKS, HEADS, TOKENS, TOKENS).mul(2).softmax(-1)
    model = GivenMaps(maps)
    blocks = torch.arange(BLOCKS)[:, None].expand(BLOCKS, TOKENS)
    found = measure(model, blocks, neighbours=2)
    ordinary = range(1, TOKENS - 1)
    mass = np.zeros((len(TARGETS), LAYERS, HEADS))
    profile = {(layer, head, d): [] for layer in range(LAYERS) for head in range(HEADS) for d in range(-4, 5)}
    for layer, block, head, query in np.ndindex(LAYERS, BLOCKS, HEADS, TOKENS):
        if query not in ordinary:
            continue
        for key in range(TOKENS):
            weight = float(maps[layer, block, head, query, key])
            distance = key - query
            if key in ordinary and abs(distance) <= 4:
                profile[layer, head, distance].append(weight)
            near = "self" if distance == 0 else "neighbours" if abs(distance) <= 2 else "others"
            target = {0: "cls", TOKENS - 1: "sep"}.get(key, near)
            mass[TARGETS.index(target), layer, head] += weight / BLOCKS / len(ordinary)
    assert found.mass.numpy() == pytest.approx(mass, abs=1e-6)
    assert found.mass.sum(0).numpy() == pytest.approx(np.ones((LAYERS, HEADS)), abs=1e-6)
    for (layer, head, distance), weights in profile.items():
        index = found.distances.index(distance)
        assert float(found.profile[layer, head, index]) == pytest.approx(np.mean(weights), abs=1e-6)
    rows = maps[:, :, :, 1:-1].double().numpy()  # [L, B, H, Q, T]
    for a, b in np.ndindex(LAYERS, LAYERS):
        means = jensenshannon(rows[a].mean(1), rows[b].mean(1), base=2, axis=-1) ** 2
        assert float(found.divergence[a, b]) == pytest.approx(np.mean(means), abs=1e-6)
        heads = (jensenshannon(rows[a], rows[b], base=2, axis=-1) ** 2).mean((0, 2))
        assert found.head_divergence[a, b].numpy() == pytest.approx(heads, abs=1e-6)
        flat = [model.layers[i].weight.detach().flatten() for i in (a, b)]
        cosine = float(torch.cosine_similarity(*flat, dim=0))
        assert float(found.weight_cosine[a, b]) == pytest.approx(cosine, abs=1e-6)


def test_a_local_head_and_a_head_on_cls_are_counted() -> None:
    maps = torch.zeros(LAYERS, BLOCKS, HEADS, TOKENS, TOKENS)
    maps[:, :, 0] = torch.eye(TOKENS)
    maps[:, :, 1, :, 0] = 1.0
    maps[2, :, 1] = 1 / TOKENS
    share = measure(GivenMaps(maps), torch.zeros(BLOCKS, TOKENS, dtype=torch.long), neighbours=1).share
    assert share == pytest.approx({"local": 3 / 6, "cls": 2 / 6, "sep": 0.0})


def test_a_copied_block_is_what_a_growth_makes(tmp_path: Path) -> None:
    model = load_with_maps(write_encoder(tmp_path / "m", layers=2), 16)
    grown = copy_blocks(model, (0, 1, 0, 1))
    deep = AutoModel.from_config(grown.config, attn_implementation="eager")
    names = {
        f"encoder.layer.{i}.{rest}": value
        for i, source in enumerate((0, 1, 0, 1))
        for name, value in model.state_dict().items()
        for rest in [name.removeprefix(f"encoder.layer.{source}.")]
        if rest != name
    }
    deep.load_state_dict({**model.state_dict(), **names}, strict=True)
    tokens = torch.randint(5, 30, (2, 16))
    for a, b in zip(*(m.eval()(tokens, output_attentions=True).attentions for m in (grown, deep)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    cosine = measure(grown, tokens, neighbours=1).weight_cosine
    assert float(cosine[0, 2]) == pytest.approx(1) and abs(float(cosine[0, 1])) < 0.2
    assert model.config.num_hidden_layers == 2, "the model itself stays as it is"


def test_pairs_are_followed_through_later_growths() -> None:
    """Divergences that name their layers: 10 a + b."""

    def maps(layers: int) -> SimpleNamespace:
        matrix = torch.tensor([[10.0 * a + b for b in range(layers)] for a in range(layers)])
        return SimpleNamespace(head_divergence=matrix[..., None], weight_cosine=matrix)

    growths = [
        {"layer_map": layer_map("stack", 2, 4), "from_layers": 2, "to_layers": 4, "operator": "stack"},
        {"layer_map": layer_map("interleave", 4, 8), "from_layers": 4, "to_layers": 8, "operator": "interleave"},
    ]
    first, second = partings(growths, {"a": maps(2), "b": maps(4), "c": maps(8)}, {"b": maps(4)})
    assert first["pairs"] == [(0, 2), (1, 3)]
    assert [point["name"] for point in first["points"]] == ["as grown", "end of b", "end of c"]
    assert first["points"][1]["js_divergence"] == [2, 13]
    assert first["points"][2]["js_divergence"] == [4, 26]  # interleaved, block i stands at 2 i
    assert first["points"][1]["js_divergence_others"] == pytest.approx(np.mean([1, 3, 12, 23]))
    assert second["pairs"] == [(0, 1), (2, 3), (4, 5), (6, 7)] and len(second["points"]) == 1


def write_run(folder: Path) -> None:
    """A run directory of two stages, 1 and 2 layers, as far as the analysis reads it."""
    tokenizer = write_encoder(folder / "tiny")
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS) for _ in range(40)))
    model = ModelConfig(hidden_size=16, num_heads=2, vocab_size=304, max_positions=32)
    for stage, layers in ((1, 1), (2, 2)):
        torch.manual_seed(stage)
        target = folder / "run" / "export" / f"stage-{stage}-{layers}L"
        save_huggingface(target, dict(Bert(model, layers).named_parameters()), model, layers)
        for file in tokenizer.glob("tokenizer*"):
            (target / file.name).write_bytes(file.read_bytes())
    corpus = vars(CorpusConfig(sequence_length=16))
    (folder / "run" / "config.json").write_text(json.dumps({"data": str(folder / "text.txt"), "corpus": corpus}))
    growth = {"kind": "growth", "stage": 1, "layer_map": [0, 0], "from_layers": 1, "to_layers": 2, "operator": "stack"}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps({"kind": "train"}) + "\n" + json.dumps(growth) + "\n")


def test_a_run_is_analysed_stage_by_stage(tmp_path: Path) -> None:
    write_run(tmp_path)
    folder = analyse(AttentionConfig(model=str(tmp_path / "run"), sequences=6))
    assert folder == tmp_path / "run" / "report" / "attention"
    record = json.loads((folder / "attention.json").read_text())
    assert [(s["name"], s["layers"], s["heads"]) for s in record["stages"]] == [
        ("stage-1-1L", 1, 2),
        ("stage-2-2L", 2, 2),
    ]
    assert record["sequence_length"] == 16 and record["sequences"] == 6
    (growth,) = record["growths"]
    assert [point["name"] for point in growth["points"]] == ["as grown", "end of stage-2-2L"]
    assert growth["points"][0]["weight_cosine"] == [1.0] and growth["points"][1]["weight_cosine"][0] < 0.5
    assert growth["points"][0]["js_divergence_others"] is None


def test_any_encoder_is_analysed_and_bad_input_is_one_sentence(tmp_path: Path) -> None:
    tiny = write_encoder(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS) for _ in range(40)))
    config = RobertaConfig(
        vocab_size=304, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16,
        max_position_embeddings=40,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    options = {"tokenizer": str(tiny), "data": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "out")}
    analyse(AttentionConfig(model=str(tmp_path / "roberta"), sequence_length=24, sequences=2, **options))
    (stage,) = json.loads((tmp_path / "out" / "attention.json").read_text())["stages"]
    total = sum(np.array(stage["mass"][target]) for target in TARGETS)
    assert total == pytest.approx(np.ones((2, 4)), abs=1e-3) and stage["heads"] == 4
    assert stage["distances"] == list(range(-21, 22)) and math.isfinite(np.sum(stage["profile"]))
    for model, extra, message in (
        (tmp_path / "roberta", {"sequence_length": 64}, "knows 40 positions only"),
        (tmp_path / "nowhere", {}, "nowhere does not exist"),
        (tmp_path / "roberta", {"tokenizer": str(tmp_path / "none")}, "tokenizer"),
        (tmp_path / "roberta", {"sequence_length": 4000}, "fewer than 3998 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            analyse(AttentionConfig(model=str(model), **{**options, "sequence_length": 24, **extra}))
    with pytest.raises(UserError, match="neighbours is 0"):
        AttentionConfig(model="m", neighbours=0)
