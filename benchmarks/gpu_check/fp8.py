"""Products in 8 bits: the cast to the bit, the errors of a linear layer, and the speed of both beside bf16.

A GPU that does not multiply these formats skips the rows. A CPU does, in a dry run with the cast in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check import peers
from benchmarks.gpu_check.catalogue import Machine, Ours, Row
from benchmarks.gpu_check.correctness import poisoned, same_bits
from benchmarks.gpu_check.peers import modes
from benchmarks.gpu_check.speed import TOKENS, Setting, timed
from benchmarks.gpu_check.tiles import in_all_configurations
from ds_stacking.kernels.fp8_cast import cast_fp8, largest_magnitude, reference
from ds_stacking.models.fp8 import linear
from ds_stacking.models.variants import multiplies_fp8

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LAYERS = {"qkv": (1024, 3072), "out": (1024, 1024), "up": (1024, 4096), "down": (4096, 1024)}
"""Inputs and outputs of the linear layers in a block of BERT-large."""
RMS = {"out": 0.045, "dx": 0.08, "dweight": 0.08}
"""Errors relative to the exact product, in rms. A rounding to e4m3 errs by some 2.6 %, one to e5m2 by twice that;
those of both operands add up as squares, to 3.7 % and 5.8 %."""
SIXTEEN = 0.01
"""No product of 8-bit numbers errs by less, none of 16-bit ones by more."""
COPIES = ("straight", "straight alone", "transposed", "transposed alone", "inverse", "inverse", "inverse")
"""What `forms` returns."""


def refusal(at: Machine) -> str:
    """Why the device cannot run these rows, empty where it can."""
    if at.device == "cuda" and not multiplies_fp8(torch.device("cuda")):
        return "8-bit products need an NVIDIA GPU of compute capability 8.9 or more"
    return ""


def correctness_rows() -> Iterator[Row]:
    """The cast in both formats, and one layer."""
    for width, tiny in ((768, 80), (4096, 144)):
        for name, dtype in FORMATS.items():
            make = partial(_spread, width=width, tiny=tiny)
            yield _row(
                f"correct: cast_fp8 N={width} {name}", 0.5,
                ours=lambda at, make=make, dtype=dtype: _forms_of(make(at), dtype),
                run=lambda at, make=make, dtype=dtype: check_cast(make(at), dtype, at.dry),
            )  # fmt: skip
    yield _row("correct: linear fp8", 1.0, ours=lambda at: (_product, _operands(at)[0]), run=check_linear)


def speed_rows() -> Iterator[Row]:
    """The cast, forward only, and all layers of a block, forward and backward."""
    cases = {f"cast_fp8 N={width}": partial(cast, width=width, tiny=tiny) for width, tiny in ((1024, 80), (4096, 144))}
    cases |= {f"linear fp8 {name} {k} x {n}": partial(layer, k=k, n=n) for name, (k, n) in LAYERS.items()}
    for name, make in cases.items():
        yield _row(
            f"speed: {name}", 8 if "cast" in name else 4,
            ours=lambda at, make=make: _ours(make(at)), run=lambda at, make=make: timed(at, make(at)),
        )  # fmt: skip


def _row(name: str, seconds: float, ours: Callable[[Machine], Ours], run: Callable[[Machine], dict[str, Any]]) -> Row:
    """The cast has one configuration, so that no tiles are chosen."""

    def unless_refused(at: Machine) -> dict[str, Any]:
        reason = refusal(at)
        return {"skipped": reason} if reason else run(at)

    part = "correctness" if name.startswith("correct") else "kernels"
    return Row(name=name, seconds=seconds, part=part, ours=ours, run=unless_refused)


def _spread(at: Machine, width: int, tiny: int) -> Tensor:
    """[4097, width], rows of sizes so different that some lie among the format's subnormal numbers, some below."""
    x = at.random(at.size(4097, 37), at.size(width, tiny)).detach()
    return x * torch.randn(len(x), 1, device=at.device).mul(4).exp2().to(x.dtype)


def _forms_of(x: Tensor, dtype: torch.dtype) -> Ours:
    return lambda x: forms(x, largest_magnitude(x), dtype), [x]


def forms(x: Tensor, amax: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Both copies, one alone, the other alone, as training asks for them: COPIES."""
    straight, transposed, first = cast_fp8(x, amax, dtype)
    straight_alone, _, second = cast_fp8(x, amax, dtype, turned=False)
    _, transposed_alone, third = cast_fp8(x, amax, dtype, straight=False)
    return [straight, straight_alone, transposed, transposed_alone, first, second, third]


def check_cast(x: Tensor, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """Whether all copies are the reference's to the bit, twice, in every configuration."""
    amax = largest_magnitude(x)
    straight, transposed, inverse = reference(x, amax, dtype)
    want = [straight, straight, transposed, transposed, inverse, inverse, inverse]
    with poisoned():
        runs = [found for _ in range(2) for found in in_all_configurations(lambda: forms(x, amax, dtype), dry)]
    wrong = {
        name for found in runs for name, a, b in zip(COPIES, found, want, strict=True)
        if a.shape != b.shape or not same_bits(a, b)
    }  # fmt: skip
    told = {"found": f"not the reference's bits: {', '.join(sorted(wrong))}"} if wrong else {}
    return {"ok": not wrong, "configurations": len(runs) // 2, **told}


def _operands(at: Machine) -> tuple[list[Tensor], Tensor]:
    """x and weight, then the gradient of their product, of the sizes met in training."""
    k, n = at.size(1024, 48), at.size(4096, 80)
    x, weight, dout = (
        at.random(*shape).detach() for shape in ((at.size(4097, 37), k), (n, k), (at.size(4097, 37), n))
    )
    return [x.requires_grad_(), (0.02 * weight).requires_grad_()], 1e-6 * dout


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight, None)


def check_linear(at: Machine) -> dict[str, Any]:
    """Whether the product and both gradients err as 8-bit numbers do, and repeat themselves to the bit."""
    inputs, dout = _operands(at)

    def once() -> list[Tensor]:
        out = _product(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    with poisoned():
        first, second = once(), once()
    x, weight, gradient = (t.detach().double() for t in (*inputs, dout))
    exact = (x @ weight.t(), gradient @ weight, gradient.t() @ x)
    rms = {
        name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(RMS, first, exact, strict=True)
    }  # fmt: skip
    repeats = all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    ok = repeats and all(SIXTEEN < rms[name] < RMS[name] for name in RMS)  # NaN is neither
    return {"ok": ok, "repeats": repeats, "rms": rms, "found": "" if ok else f"rms {rms}, repeats: {repeats}"}


def _ours(setting: Setting) -> Ours:
    return setting.ours, setting.inputs


def cast(at: Machine, width: int, tiny: int) -> Setting:
    """Both copies of activations; of what is read only the cast's own pass is counted, not the maximum before it."""
    x = at.random(at.size(TOKENS, 48), at.size(width, tiny)).detach()
    amax, dtype = largest_magnitude(x), FORMATS["e4m3"]

    def with_maximum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cast_fp8(x, largest_magnitude(x), dtype)

    def by_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference(x, amax, dtype)

    return Setting(
        ours=lambda x: cast_fp8(x, amax, dtype), inputs=[x],
        bytes={"forward": float(x.numel() * (x.element_size() + 2))},
        peers=lambda: {
            "ours with maximum": lambda: modes(with_maximum, x), "eager": lambda: modes(by_torch, x),
            "compile": lambda: modes(peers.compiled(by_torch, at), x),
        },
    )  # fmt: skip


def layer(at: Machine, k: int, n: int) -> Setting:
    """A linear layer with all casts that it takes, beside cuBLAS in bf16; without a bias, which other kernels add."""
    k, n = at.size(k, k // 64), at.size(n, n // 64)
    inputs = [at.random(at.size(TOKENS, 48), k), at.random(n, k)]
    return Setting(
        ours=_product, inputs=inputs, peers=lambda: {"bf16": lambda: modes(F.linear, *inputs)}
    )  # fmt: skip
