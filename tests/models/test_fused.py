"""The model on the kernels: one draw of random numbers per pass, how often it launches, one graph for all blocks."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_stacking.config import ModelConfig
from ds_stacking.kernels._launch import Executor, Launch, executing
from ds_stacking.models.bert import Bert
from ds_stacking.models.compiling import compilations, compile_parts
from ds_stacking.models.fused import FusedBert
from tests.engine import tiny
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    hidden_size=32, num_heads=2, intermediate_size=48, vocab_size=61, max_positions=16, initializer_range=0.2,
    dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


class Operations(TorchDispatchMode, Executor):
    """Counts what is computed, by name; views, memory and what checks targets on a CPU apart.

    As the executor of kernels it counts these too and runs none.
    """

    everywhere = True

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __call__(self, launch: Launch) -> None:
        self.found["triton"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        free = func.is_view or func.namespace == "ds_stacking" or name.startswith("empty")
        if not free and name not in ("_unsafe_view", "_local_scalar_dense", "min", "max", "ne", "index"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def inputs(predicted: int = 5) -> dict[str, Tensor]:
    positions = torch.arange(predicted) * 3 + 1
    return {"input_ids": torch.arange(1, 25).view(2, 12), "masked_positions": positions, "labels": positions + 3}


def gradients(model: FusedBert, seed: int = 0) -> list[Tensor]:
    """The loss and every gradient of a training pass."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs()).loss_sum
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def draws(model: FusedBert) -> int:
    """How often a forward and a backward pass ask for random numbers."""
    with Operations() as operations:
        gradients(model)
    return sum(
        operations.found[name] for name in ("randint", "random_", "bernoulli_", "native_dropout", "rand", "randn")
    )


@NORMS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_draws_random_numbers_once(norm: str, checkpointing: bool) -> None:
    config = replace(CONFIG, norm=norm, gradient_checkpointing=checkpointing)
    for layers in (1, 4):
        assert draws(FusedBert(config, layers).train()) == 1
    assert draws(FusedBert(config, 2).eval()) == 0
    assert draws(FusedBert(replace(config, dropout=0.0, attention_dropout=0.0), 2).train()) == 0


@NORMS
def test_a_block_that_is_computed_again_drops_the_same(norm: str) -> None:
    model = FusedBert(replace(CONFIG, norm=norm), 3).train()
    kept = gradients(model)
    model.config = replace(model.config, gradient_checkpointing=True)
    again = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert not torch.equal(gradients(model, seed=1)[0], kept[0])


@NORMS
def test_every_dropout_has_a_seed_of_its_own(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_stacking import kernels

    seen: list[Tensor] = []
    for name in ("attention", "selected_attention", "add_layer_norm", "embedding_norm"):
        real = getattr(kernels, name)

        def spy(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            if kwargs.get("dropout"):
                seen.append(kwargs["seed"])
            return real(*args, **kwargs)

        monkeypatch.setattr(kernels, name, spy)
    gradients(FusedBert(replace(CONFIG, norm=norm), 3).train())
    assert len({int(seed) for seed in seen}) == len(seen) == 10
    # Triton compiles a kernel once more for a pointer that is not aligned to 16 bytes
    assert all((seed.data_ptr() - seen[0].data_ptr()) % 16 == 0 and seed.shape == (1,) for seed in seen)


@pytest.mark.parametrize("norm, most, again", [("post", 340, 494), ("pre", 345, 499)])
def test_a_pass_launches_as_few_kernels_as_docs_say(
    norm: str, most: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 12 layers, the first and an accumulating micro-batch; docs/kernels.md has the table."""
    selected = sys.modules["ds_stacking.kernels.selected_attention"]
    monkeypatch.setattr(selected, "readable", lambda _: False)  # on a GPU nobody looks at indices
    model = FusedBert(replace(CONFIG, norm=norm), 12).train().half()
    batch, counts = inputs(), []
    for _ in range(2):
        with Operations() as operations, executing(operations):
            model(**batch).loss_sum.backward()
        counts.append(operations.found.total())
    assert counts[0] <= most and counts[1] <= again, operations.found
    assert operations.found["triton"] == 157 and operations.found["add"] <= 6 and operations.found["randint"] == 1
    assert operations.found["embedding_dense_backward"] == 1


def test_the_gradient_of_the_bias_of_qkv_is_no_pass_of_its_own() -> None:
    """[N, 3 * D] is summed over tokens in the last block alone, for queries and for keys and values."""
    found = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.sum.dim_IntList and args[0].shape[-1] in (32, 64, 96):
                found.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    model = FusedBert(CONFIG, 3).train().half()
    with executing(Operations()), Sums():
        model(**inputs()).loss_sum.backward()
    assert found.count((24, 96)) == 0 and found.count((24, 64)) == 1, found


def differences_under_zero_3() -> dict[str, float]:
    """Largest difference of each gradient from that of the plain model on one process, as a part of its largest."""
    from deepspeed.utils import safe_get_full_grad

    from ds_stacking.engine.stage_manager import StageManager

    config = tiny.model_config()
    torch.manual_seed(tiny.SEED)
    plain = Bert(config, 3)
    tokens, predicted = tiny.batch(0)
    tiny.part_loss(plain, tokens, predicted, int(predicted.sum())).backward()

    build = replace(
        tiny.factory(3), build_model=lambda layers, initialize: FusedBert(config, layers, initialize=initialize)
    )
    manager = StageManager(build, seed=tiny.SEED)
    manager.start(tiny.spec(3))
    share = len(tokens) // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    loss = tiny.part_loss(manager.engine, tokens[mine], predicted[mine], int(predicted.sum()))
    manager.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
    found = {}
    for name, parameter in manager.engine.module.named_parameters():
        want = plain.get_parameter(name).grad
        assert want is not None
        found[name] = float((safe_get_full_grad(parameter) - want).abs().max() / want.abs().max())
    manager.close()
    return found


@pytest.mark.distributed
def test_gradients_under_zero_3_are_those_of_the_plain_model() -> None:
    """Biases that are read outside their modules are gathered once more: the same tensors, the same gradients."""
    for found in run_ranks(2, differences_under_zero_3):
        assert "blocks.0.attention.qkv.bias" in found
        assert max(found.values()) <= 1e-4, {name: value for name, value in found.items() if value > 1e-4}


@NORMS
def test_all_blocks_share_one_graph(norm: str) -> None:
    torch.compiler.reset()
    start, graphs = compilations().graphs, {}
    for layers in (2, 4, 8):
        model = FusedBert(replace(CONFIG, norm=norm), layers).train()
        want = gradients(model)
        compile_parts(model, backend="aot_eager")
        for got, expected in zip(gradients(model), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        graphs[layers] = compilations().graphs - start
    assert graphs == {2: 4, 4: 4, 8: 4}  # embeddings, a block, the last block, the head


@NORMS
def test_the_number_of_predicted_tokens_compiles_nothing_anew(norm: str) -> None:
    """Almost every batch has another; the last block and the head see it."""
    torch.compiler.reset()
    model = FusedBert(replace(CONFIG, norm=norm), 2).train()
    compile_parts(model, backend="aot_eager")
    graphs = []
    for predicted in (5, 7, 6, 4, 8, 3):
        model(**inputs(predicted)).loss_sum.backward()
        graphs.append(compilations().graphs)
    assert graphs[1] - graphs[0] <= 2, "the last block and the head, once for any number"
    assert len(set(graphs[1:])) == 1
