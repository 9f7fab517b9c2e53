"""The launcher on Hugging Face folders and on our checkpoints: beside growth by hand and growth in live engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ds_stacking.checkpoint.grow import grow_folder
from ds_stacking.checkpoint.huggingface import HuggingFaceReader, HuggingFaceWriter
from ds_stacking.checkpoint.select import newest_valid
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import UserError
from ds_stacking.common.files import whole_folder
from ds_stacking.engine.factory import device
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.exchange import OneRank, make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.state import KINDS
from tests.engine.tiny import SEED, factory, spec, train
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def llama(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "10KB") -> dict[str, torch.Tensor]:
    """A Llama of two blocks in several files; its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=18, intermediate_size=30, num_attention_heads=3, vocab_size=50
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.state_dict()


def launch(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launchers" / "grow_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_hugging_face_folder_in_shards_is_grown(tmp_path) -> None:
    weights = llama(tmp_path / "small")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    (tmp_path / "small/README.md").write_text("What the small model lost.")
    done = launch(tmp_path / "small", tmp_path / "big", "--operator", "interleave", "--to_layers", 4)
    assert done.returncode == 0, done.stderr
    assert "0 0' 1 1'" in done.stdout and "not taken over: 'README.md'" in done.stdout
    assert not (tmp_path / "big/README.md").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "big", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(model.model.layers) == 4
    for name, values in model.state_dict().items():
        source = name
        for target, block in ((0, 0), (1, 0), (2, 1), (3, 1)):
            if name.startswith(f"model.layers.{target}."):
                source = name.replace(f"layers.{target}.", f"layers.{block}.", 1)
        assert torch.equal(values, weights[source]), name


def test_bf16_weights_stay_as_they_are_and_zero_output_changes_nothing(tmp_path) -> None:
    llama(tmp_path / "small", dtype=torch.bfloat16)
    tokens = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)(tokens).logits
    grow_folder(tmp_path / "small", tmp_path / "big", operator="stack+zero_output", layers=4)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "big", dtype=torch.float32)
    assert torch.allclose(grown(tokens).logits, expected, atol=1e-5)
    assert {t.dtype for t in HuggingFaceReader(tmp_path / "big").tensors.values()} == {"BF16"}


def test_large_models_are_written_in_shards(tmp_path) -> None:
    llama(tmp_path / "small", shard="1GB")
    _, plan = grow_folder(tmp_path / "small", tmp_path / "one", operator="middle", layers=3)
    reader = HuggingFaceReader(tmp_path / "small")
    with whole_folder(tmp_path / "many") as unfinished:
        writer = HuggingFaceWriter(unfinished, plan, reader, shard_bytes=9000)
        execute(plan, reader, writer, OneRank(), kinds=("master",))
        writer.finish()
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    together = {name: values for file in files for name, values in load_file(file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == whole.keys() and all(torch.equal(together[name], whole[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path) -> None:
    llama(tmp_path / "small", shard="1GB")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    before = (tmp_path / "small" / "model.safetensors").read_bytes()
    done = launch(tmp_path / "small", tmp_path / "big", "--to_layers", 3)
    assert done.returncode == 2 and "3 is not a multiple of 2" in done.stderr and "Traceback" not in done.stderr
    cases = [
        ({"operator": "fresh", "layers": 3}, "only a model can initialise"),
        ({"operator": "x", "layers": 4}, "unknown"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            grow_folder(tmp_path / "small", tmp_path / "big", **options)
    with pytest.raises(UserError, match="exists"):
        grow_folder(tmp_path / "small", tmp_path / "small", operator="stack", layers=4)
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == before

    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "small" / "model.safetensors")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight"):
        grow_folder(tmp_path / "small", tmp_path / "big", operator="stack", layers=4)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match="names no depth of 2|NaN"):
        grow_folder(tmp_path / "small", tmp_path / "big", operator="stack", layers=4)
    with pytest.raises(UserError, match="no folder"):
        grow_folder(tmp_path / "nowhere", tmp_path / "big", operator="stack", layers=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def online_and_saved(folder: Path) -> None:
    """Save, grow, save again; for a ZeRO-1 and a ZeRO-3 engine."""
    for zero_stage in (1, 3):
        manager = StageManager(factory(zero_stage), seed=SEED)
        manager.start(spec(2))
        train(manager, 0, 3)
        for name in ("small", "big"):
            exchange = make_exchange(device())
            writer = CheckpointWriter(folder / f"{name}-{zero_stage}", exchange, identity={})
            writer.save(3, LiveState(manager.engine), manager.current_parameters(), extra={})
            writer.close()
            if name == "small":
                manager.grow(spec(6), operator="middle+noise:0.1", optimizer_state="scale:0.3")


@pytest.mark.distributed
def test_growth_on_the_disk_equals_growth_in_engines_to_the_bit(tmp_path) -> None:
    run_ranks(2, online_and_saved, tmp_path)
    for zero_stage in (1, 3):
        written, _ = grow_folder(
            tmp_path / f"small-{zero_stage}",
            tmp_path / f"grown-{zero_stage}",
            operator="middle+noise:0.1",
            layers=6,
            optimizer_state="scale:0.3",
        )
        found = newest_valid(tmp_path / f"big-{zero_stage}")
        assert found is not None
        online, offline = CheckpointReader(found.path), CheckpointReader(written)
        assert online.parameters == offline.parameters
        for piece in online.slices():
            for kind in KINDS:
                assert torch.equal(online.read(piece, kind), offline.read(piece, kind)), (piece, kind)
