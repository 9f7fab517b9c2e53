"""How the GPU check times, with stand-ins for events, NVML and nvidia-smi."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Device:
    """Notes what it is asked for, in order; `mhz` are its clocks, one per reading."""

    def __init__(self, mhz: Iterator[float]) -> None:
        self.calls: list[str] = []
        self.mhz = mhz
        self.times = iter(range(10**6))

    def event(self) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                device.calls.append("record")
                self.time = next(device.times)

            def synchronize(self) -> None:
                device.calls.append("synchronize")

            def elapsed_time(self, end: Any) -> float:
                return 1000.0 * (end.time - self.time)

        return Event()

    def flush(self) -> None:
        self.calls.append("flush")

    def spin(self, seconds: float) -> None:
        self.calls.append(f"spin {seconds:.3f}")

    def wait(self) -> None:
        self.calls.append("wait")

    def clocks(self) -> dict[str, float]:
        self.calls.append("clocks")
        return {"sm_mhz": next(self.mhz), "celsius": 50.0}


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import measure

    return measure


def steady() -> Iterator[float]:
    while True:
        yield 1980.0


def test_a_sample_is_flush_spin_record_run_record(measure: Any) -> None:
    device = Device(steady())
    timer = measure.Timer(device=device, rounds=1)
    assert timer.sample(lambda: device.calls.append("run")) == 1.0
    assert device.calls == ["flush", "spin 0.001", "record", "run", "record", "synchronize"]


def test_runs_take_turns_and_clocks_are_read_under_load(measure: Any) -> None:
    device = Device(steady())
    timer = measure.Timer(device=device, rounds=2, warm_up=1)
    found = timer.compare({name: lambda name=name: device.calls.append(name) for name in ("ours", "peer")})
    runs = [call for call in device.calls if call in ("ours", "peer")]
    # warm-up and host time, a reading of the clocks, two rounds, a reading
    assert runs == ["ours", "ours", "peer", "peer"] + ["ours", "peer"] * 4
    for index, call in enumerate(device.calls):
        if call == "clocks":
            assert device.calls[index - 3 : index] == ["spin 0.001", "ours", "peer"]
            assert device.calls[index + 1] == "wait"
    assert found["times"] == {"ours": [1.0] * 3, "peer": [1.0] * 3} and len(found["clocks"]) == 2
    assert "repeated_after" not in found


def test_the_spin_outlasts_a_slow_host(measure: Any) -> None:
    device = Device(steady())

    def slow() -> None:
        time.sleep(0.01)

    measure.Timer(device=device, rounds=1, warm_up=0).compare({"ours": slow})
    (spin,) = (
        call
        for call, after in zip(device.calls, device.calls[1:], strict=False)
        if "spin" in call and after == "record"
    )
    assert float(spin.split()[1]) >= 0.02


@pytest.mark.parametrize("later", [[1950.0, 1950.0], [1950.0, 1900.0]])
def test_a_row_whose_clock_fell_is_repeated_once(measure: Any, later: list[float]) -> None:
    device = Device(iter([1980.0, 1890.0, *later]))
    found = measure.Timer(device=device, rounds=1, warm_up=0).compare({"ours": lambda: None})
    assert [reading["sm_mhz"] for reading in found["repeated_after"]] == [1980.0, 1890.0]
    assert found["clock_fell"] is (later[1] < 0.97 * 1980)
    assert device.calls.count("clocks") == 4


def test_quartiles(measure: Any) -> None:
    device = Device(steady())
    device.times = iter([0, 1, 10, 12, 20, 23, 30, 34, 40, 45])
    found = measure.Timer(device=device, rounds=5, warm_up=0).compare({"ours": lambda: None})
    assert found["times"]["ours"] == [2.0, 3.0, 4.0]


def test_nvml_then_nvidia_smi_then_absent(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check.telemetry import telemetry

    nvml = types.ModuleType("pynvml")
    asked = []
    vars(nvml).update(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid), NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980 if kind == 1 else 2619,
        nvmlDeviceGetPowerUsage=lambda handle: 650_000, nvmlDeviceGetTemperature=lambda handle, kind: 61,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    wanted = {"sm_mhz": 1980, "memory_mhz": 2619, "watts": 650.0, "celsius": 61}
    assert telemetry("abc")() == {"source": "nvml", **wanted} and asked == ["GPU-abc"]
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def smi(command: list[str], **options: Any) -> Any:
        assert command[0] == "nvidia-smi" and command[1] == "--id=GPU-abc"
        return subprocess.CompletedProcess(command, 0, stdout="1980, 2619, 650.00, 61\n")

    with monkeypatch.context() as there:
        there.setattr(subprocess, "run", smi)
        read = telemetry("abc")
        assert read() == {"source": "nvidia-smi", **wanted}

    def late(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, 5)

    with monkeypatch.context() as there:  # later than the first reading: the row goes on
        there.setattr(subprocess, "run", late)
        assert read() == {"source": "absent"}
    assert telemetry("abc")() == {"source": "absent"}


def test_peak_bytes_are_those_beside_what_was_there_and_the_gradients(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from benchmarks.gpu_check.catalogue import Machine
    from benchmarks.gpu_check.speed import peak_bytes

    held = {"now": 100, "peak": 5000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))

    def gradients() -> list[torch.Tensor]:
        held["peak"] += 900
        return [torch.empty(10), torch.empty(5, dtype=torch.float64)]

    at = Machine(device="cuda", dtype=torch.bfloat16)
    assert peak_bytes(at, gradients) == 900 - 40 - 40
