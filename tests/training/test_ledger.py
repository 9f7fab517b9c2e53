"""The ledger: sums, phases that add up, rates without pauses, and a clock that goes on after a resume."""

import json

import pytest

from ds_stacking.training.ledger import Ledger


class FakeClock:
    """A clock that moves only when told."""

    def __init__(self, start: float = 0.0) -> None:
        self.time = start

    def __call__(self) -> float:
        return self.time


def run_two_stages(clock: FakeClock) -> Ledger:
    ledger = Ledger(now=clock)
    clock.time += 3  # preparation, before any stage
    for layers in (2, 4):
        ledger.start_stage(layers)
        for _ in range(5):
            with ledger.clock("training"):
                clock.time += 2
                with ledger.clock("data wait"):
                    clock.time += 1
            ledger.add_step(tokens=100, flops=1e6 * layers)
        with ledger.clock("evaluation"):
            clock.time += 4
    return ledger


def test_totals_and_phases_add_up():
    clock = FakeClock(100.0)
    ledger = run_two_stages(clock)
    totals = ledger.totals()
    assert {name: totals[name] for name in ("tokens", "flops", "seconds", "training_seconds")} == {
        "tokens": 1000, "flops": 5 * 2e6 + 5 * 4e6, "seconds": clock.time - 100, "training_seconds": 30,
    }  # fmt: skip
    assert ledger.phases["training"] == 20
    assert ledger.phases["data wait"] == 10
    assert ledger.phases["evaluation"] == 8
    assert ledger.phases["other"] == 3
    assert [row["seconds"] for row in ledger.stage_rows()] == [19, 19]
    assert [(row["layers"], row["steps"], row["tokens"]) for row in ledger.stage_rows()] == [(2, 5, 500), (4, 5, 500)]


def test_time_is_charged_although_the_body_fails():
    clock = FakeClock()
    ledger = Ledger(now=clock)
    with pytest.raises(RuntimeError), ledger.clock("checkpoint"):
        clock.time += 2
        raise RuntimeError
    clock.time += 1
    assert ledger.seconds == 3
    assert (ledger.phases["checkpoint"], ledger.phases["other"]) == (2, 1)


def test_rates_count_since_the_last_call_and_leave_pauses_out():
    clock = FakeClock()
    ledger = Ledger(now=clock)
    assert ledger.rates() == {"tokens_per_second": 0.0, "flops_per_second": 0.0}
    ledger.start_stage(2)
    clock.time += 4
    ledger.add_step(tokens=80, flops=400.0)
    with ledger.clock("growth"):
        clock.time += 50
    assert ledger.rates() == {"tokens_per_second": 20.0, "flops_per_second": 100.0}
    clock.time += 2
    ledger.add_step(tokens=80, flops=400.0)
    assert ledger.rates() == {"tokens_per_second": 40.0, "flops_per_second": 200.0}


def test_resume_goes_on_where_the_checkpoint_stood():
    whole = run_two_stages(FakeClock())
    saved = json.loads(json.dumps(whole.state_dict()))
    clock = FakeClock(9000.0)  # another process, another origin of time
    resumed = Ledger(now=clock)
    resumed.load_state_dict(saved)
    assert resumed.totals() == whole.totals()
    assert resumed.stage_rows() == whole.stage_rows()
    with resumed.clock("training"):
        clock.time += 5
    resumed.add_step(tokens=100, flops=4e6)
    assert resumed.seconds == whole.seconds + 5
    assert resumed.rates() == {"tokens_per_second": 20.0, "flops_per_second": 8e5}
    assert resumed.stage.steps == 6


def test_processor_time_is_charged_to_the_phases_that_make_the_model():
    wall, cpu = FakeClock(), FakeClock(7.0)
    ledger = Ledger(now=wall, cpu_now=cpu)
    ledger.start_stage(2)
    for phase in ("training", "data wait", "growth", "evaluation", "checkpoint"):
        with ledger.clock(phase):
            wall.time += 10
            cpu.time += 3
    cpu.time += 100
    totals = ledger.totals()
    assert (totals["training_seconds"], totals["cpu_seconds"]) == (30, 9)
    resumed = Ledger()
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed.totals()["cpu_seconds"] == 9


def test_a_ledger_keeps_time_by_itself():
    ledger = Ledger()
    first = ledger.seconds
    assert 0 <= first <= ledger.seconds


def test_mfu_is_the_share_of_the_peak_in_training_steps_alone():
    clock = FakeClock()
    ledger = Ledger(now=clock, peak=200.0)
    ledger.start_stage(2)
    with ledger.clock("training"):
        clock.time += 4
        with ledger.clock("data wait"):
            clock.time += 1
    ledger.add_step(tokens=80, flops=500.0)
    with ledger.clock("evaluation"):
        clock.time += 50
    assert ledger.rates()["mfu"] == 0.5
    (row,) = ledger.stage_rows()
    assert (row["training_seconds"], row["mfu"]) == (5, 0.5)
    resumed = Ledger()
    resumed.load_state_dict(ledger.state_dict())
    assert "mfu" not in resumed.stage_rows()[0]
