"""The calls that a plan counts are those that DeepSpeed makes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from ds_stacking.planning.collectives import calls_of_step
from tests.ranks import run_ranks

SMALL = 64
"""Elements of a call that carries no weights or gradients: norms, counts, losses."""
NAMES = {
    **dict.fromkeys(("all_reduce",), "all-reduce"),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_fn", "reduce_scatter_tensor", "reduce"), "reduce-scatter"),
    **dict.fromkeys(("all_gather", "all_gather_into_tensor", "allgather_fn", "all_gather_base"), "all-gather"),
}


def elements(argument: Any) -> int:
    return sum(map(elements, argument)) if isinstance(argument, list) else argument.numel()


def counted(zero_stage: int) -> tuple[int, dict[str, list[int]]]:
    """Parameters of a tiny model, and the elements of each large call of its third step, by kind."""
    import deepspeed.comm

    from ds_stacking.engine.stage_manager import StageManager
    from tests.engine.tiny import SEED, factory, replaced, spec, train

    manager = StageManager(factory(zero_stage), seed=SEED)
    engine = manager.start(spec(2, 3))
    train(manager, 0, 2)
    found: dict[str, list[int]] = {}
    with ExitStack() as stack:
        for name, kind in NAMES.items():
            call = getattr(deepspeed.comm, name, None)
            if call is None:
                continue

            def recorded(tensor: Any, *args: Any, _call: Any = call, _kind: str = kind, **kwargs: Any) -> Any:
                if elements(tensor) > SMALL:
                    found.setdefault(_kind, []).append(elements(tensor))
                return _call(tensor, *args, **kwargs)

            stack.enter_context(replaced(deepspeed.comm, name, recorded))
        train(manager, 2, 1)
    return sum(parameter.numel() for parameter in engine.module.parameters()), found


def cases() -> list[tuple[int, dict[str, list[int]]]]:
    return [counted(zero_stage) for zero_stage in (0, 1, 2)]


@pytest.mark.distributed
def test_deepspeed_makes_the_calls_that_are_planned() -> None:
    """With three micro-batches; under ZeRO 1 and 2 flat groups are padded, which a tiny model feels."""
    for zero_stage, (parameters, found) in enumerate(run_ranks(2, cases)[0]):
        planned = calls_of_step(parameters, zero_stage=zero_stage, accumulation=3, bucket=50_000_000)
        assert found.keys() == {call.kind for call in planned}, zero_stage
        for call in planned:
            assert sum(found[call.kind]) == pytest.approx(call.volume / 2, rel=0.01), (zero_stage, call.kind)
            if call.kind == "all-reduce":
                assert len(found[call.kind]) == call.calls, zero_stage
