"""Clocks, power and temperature of the GPU, by NVML, else by nvidia-smi, else named absent."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

Reading = dict[str, float | str]
QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
ABSENT: Reading = {"source": "absent"}
FIELDS = ("sm_mhz", "memory_mhz", "watts", "celsius")


def telemetry(uuid: str) -> Callable[[], Reading]:
    """A function that reads the GPU of this UUID, with or without "GPU-"; `source` in what it returns says how."""
    for make in (_nvml, _nvidia_smi):
        try:
            read = make(f"GPU-{uuid.removeprefix('GPU-')}")
            read()
        except Exception:  # no module, no driver, no such program: the next way
            continue
        return lambda read=read: _or_absent(read)
    return lambda: dict(ABSENT)


def _or_absent(read: Callable[[], Reading]) -> Reading:
    """A reading that fails later, by a time-out of nvidia-smi for instance, must not cost the row."""
    try:
        return read()
    except Exception:
        return dict(ABSENT)


def _nvml(uuid: str) -> Callable[[], Reading]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def read() -> Reading:
        return {
            "source": "nvml",
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }

    return read


def _nvidia_smi(uuid: str) -> Callable[[], Reading]:
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]

    def read() -> Reading:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
        return {"source": "nvidia-smi", **dict(zip(FIELDS, map(float, text.split(",")), strict=True))}

    return read
