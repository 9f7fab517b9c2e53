"""Engines of others that cannot be grown are refused in a sentence, and train on as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ds_stacking.common.errors import UserError
from ds_stacking.engine.factory import load_cpu_adam
from ds_stacking.engine.grow import grow_engine
from ds_stacking.engine.growable import check_growable
from ds_stacking.engine.parameter_groups import make_groups
from ds_stacking.engine.release import release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.models.bert import Bert
from tests.engine import tiny
from tests.engine.test_grow import config, gpt2, loss, train
from tests.engine.tiny import SEED, factory, model_config, spec
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def qwen3(layers: int) -> Qwen3ForCausalLM:
    """Blocks from the third on have a sliding window."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, vocab_size=50, head_dim=8, **sizes, **sliding))


def refused(
    make_model: Callable[[int], torch.nn.Module],
    make_optimizer: Callable[..., Any] | None,
    later: Callable[..., Any] | None = None,
    **changes: Any,
) -> tuple[str, bool]:
    """What a growth says, and whether the engine trains on as one that was never asked."""

    def build(layers: int, groups: Any = lambda model: model.parameters()) -> Any:
        model = make_model(layers)
        chosen = later if later and layers > 2 else make_optimizer
        optimizer = chosen(groups(model)) if chosen else None
        settings = {**config(0), **changes}
        return deepspeed.initialize(model=model, model_parameters=groups(model), optimizer=optimizer, config=settings)[
            0
        ]

    curves, message = [], ""
    for ask in (False, True):
        engine = build(2)
        train(engine)
        if ask:
            try:
                engine, _ = grow_engine(engine, build, 4)
                message = "grown"
            except UserError as error:
                message = str(error)
        train(engine)
        curves.append(loss(engine).item())
        release(engine)
    return message, curves[0] == curves[1]


def cases() -> dict[str, tuple[str, bool]]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    load_cpu_adam()
    found = {
        name: refused(gpt2, lambda groups, make=make: make(groups, lr=1e-3))
        for name, make in vars(torch.optim).items()
        if name in ("SGD", "RMSprop", "RAdam", "NAdam", "Adagrad", "Adamax")
    }
    for name in ("Adam", "AdamW"):
        found[f"{name} amsgrad"] = refused(gpt2, lambda g, n=name: getattr(torch.optim, n)(g, lr=1e-3, amsgrad=True))
    adamw = lambda groups: torch.optim.AdamW(groups, lr=1e-3)  # noqa: E731 - one line, used thrice
    found["then RAdam"] = refused(gpt2, adamw, lambda groups: torch.optim.RAdam(groups, lr=1e-3))
    found["qwen3"] = refused(qwen3, adamw, zero_optimization={"stage": 2})
    found["scheduler"] = refused(
        gpt2, adamw, scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 9}}
    )
    found["ratio"] = refused(
        gpt2,
        lambda groups: DeepSpeedCPUAdam(groups, lr=1e-3),
        zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    )
    return found


def numbered(layers: int, initialize: bool) -> Bert:
    """A model whose last block knows that it is the last."""
    model = Bert(model_config(), layers, initialize=initialize)
    for block in model.blocks:
        block.last = block is model.blocks[-1]
    return model


def managed() -> list[tuple[str, list[float]]]:
    """What a growth of our own engines says where copies would do something else, and losses after it."""
    found = []
    for growth_memory in ("normal", "low"):
        engines = replace(factory(2), build_model=numbered)
        manager = StageManager(engines, seed=SEED, growth_memory=growth_memory)
        manager.start(spec(2))
        tiny.train(manager, 0, 2)
        try:
            manager.grow(spec(4))
        except UserError as error:
            found.append((str(error), tiny.train(manager, 2, 2)))
    return found


def test_our_own_engines_ask_the_same_of_their_blocks() -> None:
    (message, losses), (low_message, low_losses) = run_ranks(1, managed)[0]
    assert message == low_message and "Block 1 of the grown model cannot take the weights of block 1" in message
    assert "last is False there and True in its source" in message
    assert losses == low_losses


def test_what_growth_would_lose_is_refused_before_anything_is_touched() -> None:
    found = run_ranks(1, cases)[0]
    for name, (message, as_before) in found.items():
        assert as_before, name
        assert message.endswith(".") and "\n" not in message, name
    for name in ("SGD", "RMSprop", "RAdam", "NAdam", "Adagrad", "Adamax"):
        assert f"The engine has the optimizer {name}, whose state growth does not know" in found[name][0]
    assert "The engine has an optimizer with amsgrad" in found["Adam amsgrad"][0]
    assert "The engine has an optimizer with amsgrad" in found["AdamW amsgrad"][0]
    assert "The engine that `build` made has the optimizer RAdam" in found["then RAdam"][0]
    assert "Block 2 of the grown model cannot take the weights of block 0" in found["qwen3"][0]
    assert "a scheduler in its DeepSpeed configuration, which would start anew" in found["scheduler"][0]
    assert "zero_optimization.offload_optimizer.ratio" in found["ratio"][0]


def engine_with(content: dict[str, Any], optimizer: Any = None) -> Any:
    """As much of an engine as the check looks at."""
    optimizer = optimizer or torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    return SimpleNamespace(
        _config=SimpleNamespace(_param_dict=content, scheduler_name=None),
        optimizer=SimpleNamespace(optimizer=optimizer),
    )


@pytest.mark.parametrize(
    "content",
    [
        {"fp16": {"enabled": True}},
        {"compile": {"deepcompile": True}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"sequence_parallel_size": 2},
        {"managed_gradient_accumulation": False},
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.0}}},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
    ],
    ids=str,
)
def test_settings_that_spoil_a_growth(content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^It has .*\.$"):
        check_growable(engine_with(content), "It")


@pytest.mark.parametrize(
    "content",
    [
        {"fp16": {"enabled": False, "loss_scale": 0}, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}},
        {"compile": {"deepcompile": False}, "tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1},
        {"managed_gradient_accumulation": True, "unknown": 3, "gradient_clipping": "auto"},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}, "zenflow": None}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": None, "offload_param": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    ],
    ids=str,
)
def test_settings_without_effect_on_a_growth_pass(content: dict[str, Any]) -> None:
    check_growable(engine_with(content), "It")


def test_a_subclass_may_keep_more_than_adam() -> None:
    class More(torch.optim.AdamW):
        """Another optimizer."""

    with pytest.raises(UserError, match="has the optimizer More"):
        check_growable(engine_with({}, More([torch.nn.Parameter(torch.ones(1))])), "It")


def test_groups_of_another_model_are_refused() -> None:
    description = [{"params": ["weight", "bias"], "lr": 0.1}]
    assert make_groups(torch.nn.Linear(2, 2), description)[0]["lr"] == 0.1
    with pytest.raises(UserError, match="differ in 1 parameters, such as bias"):
        make_groups(torch.nn.Linear(2, 2, bias=False), description)
