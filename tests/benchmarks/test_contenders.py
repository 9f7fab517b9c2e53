"""What the timed training steps compute: ours and transformers' agree, and no step waits for the device by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
WAITS = {"aten.nonzero.default", "aten.masked_select.default"}
"""Operations whose result has a size that the host waits for, as it does with an index by a mask."""


class Waits(TorchDispatchMode):
    """Notes such operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = (
            [x for x in args[1] if x is not None and x.dtype == torch.bool] if "aten.index." in str(function) else []
        )
        if masks or str(function) in WAITS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import contenders

    return contenders


def case(contenders: Any, padded: bool) -> Any:
    """A tiny one without dropout."""
    from ds_stacking.config import ModelConfig

    model = ModelConfig(
        hidden_size=32, num_heads=1, vocab_size=96, norm="post", dropout=0.0, attention_dropout=0.0, max_positions=24
    )
    return contenders.Case(model=model, layers=2, sequences=4, length=24, accumulation=6, padded=padded)


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_mean_the_same_to_both_and_differ(contenders: Any, padded: bool) -> None:
    made = case(contenders, padded)
    numbers = [batch.predicted for batch in made.batches]
    assert len(numbers) == 6 and len(set(numbers)) == contenders.DIFFERENT and made.predicted == sum(numbers)
    ours, theirs = contenders.our_model(made, compiled=False).train(), contenders.their_model(made)
    for batch in made.batches:
        assert batch.predicted == int((batch.theirs["labels"] >= 0).sum())
        loss, peer = contenders.our_loss(ours, batch), contenders.their_loss(theirs, batch)
        torch.testing.assert_close(loss, peer, rtol=1e-5, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_micro_batch_predicts_is_not_sought_while_it_is_timed(contenders: Any, padded: bool) -> None:
    made = case(contenders, padded)
    model = contenders.our_model(made, compiled=False).train()
    with Waits() as waits:
        contenders.our_loss(model, made.batches[0]).backward()
    assert waits.found == []


def test_contenders_whose_losses_part_are_noticed(contenders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import throughput

    made = case(contenders, False)
    found = throughput.compare(made, ["bare", "peer bare"], repeats=6)
    assert found["bare"]["last_loss"] < found["bare"]["loss"]

    def turned(model: Any, batch: Any) -> Any:  # the right loss with its gradient turned round
        loss = model(**batch.ours).loss_sum / batch.predicted
        return 2 * loss.detach() - loss

    monkeypatch.setattr(contenders, "our_loss", turned)
    with pytest.raises(RuntimeError, match="differ in their last loss"):
        throughput.compare(made, ["bare", "peer bare"], repeats=6)


def test_a_contender_in_8_bits_multiplies_so_and_comes_near(contenders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import throughput
    from ds_stacking.models import fp8

    calls = []
    right = fp8.multiply
    monkeypatch.setattr(fp8, "multiply", lambda *args, **how: calls.append(1) or right(*args, **how))
    made = case(contenders, False)
    sixteen = throughput.compare(made, ["bare"], repeats=1)["bare"]
    assert not calls
    eight = throughput.compare(made, ["bare fp8"], repeats=1)["bare fp8"]
    assert calls and eight["loss"] != sixteen["loss"]
    assert eight["last_loss"] == pytest.approx(sixteen["last_loss"], rel=0.02)
