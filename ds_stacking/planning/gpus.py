"""GPUs and what their makers promise of them: dense peaks, memory, links.

Peaks are those of matrix products without sparsity, from the data sheets; MFU (Chowdhery et al. 2022, PaLM, section
4.1) is the share of the bf16 peak that model FLOPs reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import nearest, shown


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU in its usual node."""

    words: tuple[str, ...]
    """Words that the driver's name of the device holds, all of them."""
    bf16: float
    """Dense peak of bf16 matrix products with fp32 sums, FLOP/s."""
    memory: float
    """Device memory, bytes."""
    bandwidth: float
    """Of the device memory, bytes/s."""
    link: float
    """To the other GPUs of its node, bytes/s each way."""
    network: float
    """Of a whole node of 8 to other nodes, bytes/s each way, as such nodes are commonly built."""


def _spec(words: str, *, tflops: float, gib: float, tb_s: float, link: float, network: float = 400) -> GpuSpec:
    return GpuSpec(
        words=tuple(words.split()),
        bf16=tflops * 1e12,
        memory=gib * 2**30,
        bandwidth=tb_s * 1e12,
        link=link * 1e9,
        network=network * 1e9,
    )


GPUS = {
    "b200": _spec("B200", tflops=2250, gib=180, tb_s=7.7, link=900),
    "h200": _spec("H200", tflops=989.4, gib=141, tb_s=4.8, link=450),
    "h100-pcie": _spec("H100 PCIe", tflops=756, gib=80, tb_s=2.0, link=64),
    "h100": _spec("H100", tflops=989.4, gib=80, tb_s=3.35, link=450),
    "a100-40gb": _spec("A100 40GB", tflops=312, gib=40, tb_s=1.55, link=300, network=200),
    "a100": _spec("A100", tflops=312, gib=80, tb_s=2.0, link=300, network=200),
    "l40s": _spec("L40S", tflops=362, gib=48, tb_s=0.86, link=32, network=50),
    "l4": _spec("L4", tflops=121, gib=24, tb_s=0.3, link=32, network=25),
    "a10": _spec("A10", tflops=125, gib=24, tb_s=0.6, link=32, network=25),
    "4090": _spec("4090", tflops=165.2, gib=24, tb_s=1.01, link=32, network=25),
    "mi300x": _spec("MI300X", tflops=1307.4, gib=192, tb_s=5.3, link=448),
}
"""By the name that a user gives; where two fit a device, the first."""


def gpu_spec_of(device_name: str) -> GpuSpec | None:
    """The GPU that a driver calls `device_name`, such as NVIDIA H100 80GB HBM3; None for one that is not listed."""
    words = device_name.replace("-", " ").split()
    return next((spec for spec in GPUS.values() if set(spec.words) <= set(words)), None)


def gpu_spec_named(name: str) -> GpuSpec:
    """A GPU by its name here. Raises UserError for one that is not listed."""
    if name in GPUS:
        return GPUS[name]
    raise UserError(f"GPU {shown(name)} is unknown; {nearest(name, GPUS)}")
