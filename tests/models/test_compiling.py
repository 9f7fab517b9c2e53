"""Compiled parts: the same numbers, and graphs that do not depend on the depth."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.compiling import compilations, compile_parts, keep_compiled_code

CONFIG = ModelConfig(hidden_size=24, num_heads=3, intermediate_size=40, vocab_size=101, max_positions=32)


def inputs(predicted: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 41).view(2, 20)
    positions = torch.arange(predicted) * 3 + 1
    return {"input_ids": ids, "masked_positions": positions, "labels": ids.flatten()[positions]}


def test_a_growth_compiles_nothing() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    start, graphs = compilations().graphs, {}
    for layers in (2, 4, 8):
        model = Bert(CONFIG, layers)
        compiled = copy.deepcopy(model).train()
        compile_parts(compiled, backend="aot_eager")
        for predicted in (5, 6, 7):
            compiled.zero_grad()
            model.zero_grad()
            ours, theirs = (m(**inputs(predicted)).loss_sum for m in (compiled, model))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
            ours.backward(), theirs.backward()
            for (name, a), b in zip(compiled.named_parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
        graphs[layers] = compilations().graphs - start
    # embeddings, a block, the last block, the head; the two that see predicted tokens once more for any number of them
    assert graphs == {2: 6, 4: 6, 8: 6}


def test_evaluation_is_not_compiled() -> None:
    model = Bert(CONFIG, 1)
    compile_parts(model, backend="aot_eager")
    before = compilations().graphs
    model.eval()(**inputs(3))
    with torch.no_grad():
        model.train()(**inputs(3))
    assert compilations().graphs == before


def test_compiled_code_is_kept_in_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_STACKING_CACHE", "/somewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what is set here is taken back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/named")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/named"
