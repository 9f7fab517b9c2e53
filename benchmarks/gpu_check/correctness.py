"""Errors of every kernel and gradient against fp64, beside those of torch's own operation in the same precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu_check.measure import Machine
from ds_stacking.kernels import (
    add_layer_norm,
    attention_padded,
    bias_gelu,
    embedding_norm,
    gather_rows,
    inverse_index,
    linear_cross_entropy,
    linear_gelu,
    scatter_rows,
)

Function = Callable[..., torch.Tensor]


@dataclass(kw_only=True)
class Subject:
    """A kernel, torch's formula for it, and the inputs of both."""

    name: str
    ours: Function
    formula: Function
    inputs: list[torch.Tensor]


def _attend(causal: bool) -> Function:
    def run(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return run


def subjects(at: Machine) -> Iterator[Subject]:
    """All kernels at sizes that no tile divides."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=at.device, dtype=at.dtype)

    for length in (at.size(127, 19), at.size(1000, 35)):
        for causal in (False, True):
            yield Subject(
                name=f"attention S={length}{' causal' if causal else ''}", formula=_attend(causal),
                ours=lambda qkv, causal=causal: attention_padded(qkv, causal=causal),
                inputs=[random(2, length, 3, at.size(12, 1), 64)],
            )  # fmt: skip
    tokens, width, vocabulary = at.size(4097, 21), at.size(768, 40), at.size(30522, 50)
    x, vector = random(tokens, width), random(width)
    yield Subject(
        name="add_layer_norm", inputs=[x, random(tokens, width), vector, random(width), random(width)],
        ours=lambda x, r, b, w, s: add_layer_norm(x, w, s, residual=r, bias=b),
        formula=lambda x, r, b, w, s: F.layer_norm(r + (x + b), x.shape[-1:], w, s, 1e-12),
    )  # fmt: skip
    yield Subject(name="bias_gelu", inputs=[x, vector], ours=bias_gelu, formula=lambda x, b: F.gelu(x + b))
    linear = [x, random(4 * width, width) * width**-0.5, random(4 * width)]
    yield Subject(name="linear_gelu", inputs=linear, ours=linear_gelu, formula=lambda *a: F.gelu(F.linear(*a)))
    target = torch.randint(vocabulary, (tokens,), device=at.device)
    target[::7] = -100
    yield Subject(
        name="linear_cross_entropy",
        inputs=[x, random(vocabulary, width) * width**-0.5, random(vocabulary)],
        ours=lambda h, w, b: linear_cross_entropy(h, w, b, target) / tokens,
        formula=lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target, reduction="sum") / tokens,
    )
    ids, places = (torch.randint(size, (tokens,), device=at.device) for size in (vocabulary, 16))
    yield Subject(
        name="embedding_norm", inputs=[random(vocabulary, width), random(16, width), vector, random(width)],
        ours=lambda t, p, w, s: embedding_norm(ids, places, None, word=t, position=p, weight=w, shift=s),
        formula=lambda t, p, w, s: F.layer_norm(t[ids] + p[places], t.shape[1:], w, s, 1e-12),
    )  # fmt: skip
    kept = torch.randperm(tokens, device=at.device)[: tokens // 3].sort().values
    inverse = inverse_index(kept, tokens)
    yield Subject(
        name="gather and scatter", inputs=[x],
        ours=lambda x: scatter_rows(gather_rows(x, kept, inverse), kept, inverse, x),
        formula=lambda x: x.index_copy(0, kept, x[kept]),
    )  # fmt: skip


def _evaluate(function: Function, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(inputs[0].dtype).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def compare(at: Machine, subject: Subject) -> dict[str, object]:
    """Root-mean-square errors relative to the largest value, per output and gradient; passes at 1.1 times torch's."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        ours = _evaluate(subject.ours, subject.inputs, at.dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = _evaluate(subject.formula, subject.inputs, torch.float64)
    peer = _evaluate(subject.formula, subject.inputs, at.dtype)

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        got, want = got.detach().double(), want.detach()
        return float((got - want).square().mean().sqrt() / want.abs().max().clamp(min=1e-30))

    pairs = [(error(a, e), error(b, e)) for a, b, e in zip(ours, peer, exact, strict=True)]
    # below a tenth of the type's spacing both are exact but for the order of summation
    floor = torch.finfo(at.dtype).eps * (1 if at.dry else 0.01)
    ok = all(a <= max(1.1 * b, floor) for a, b in pairs)  # NaN is not <= anything
    return {"name": subject.name, "errors": [a for a, _ in pairs], "torch_errors": [b for _, b in pairs], "ok": ok}


def check_compiled(at: Machine) -> str:
    """opcheck of an operator and `torch.compile(fullgraph=True)` of a chain of them, gradients included."""

    def chain(x, vector):
        y = add_layer_norm(bias_gelu(x, vector), vector, vector, residual=x)
        return attention_padded(torch.cat([y, y, y], 1).view(2, -1, 3, 1, y.shape[1]).contiguous()).sum()

    x, vector = (torch.randn(size, device=at.device, dtype=at.dtype) for size in ((32, 64), (64,)))
    x.requires_grad_()
    torch.library.opcheck(torch.ops.ds_stacking.bias_gelu.default, (x.detach(), vector, False))
    want = torch.autograd.grad(chain(x, vector), x)[0]
    got = torch.autograd.grad(torch.compile(chain, fullgraph=True)(x, vector), x)[0]
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    return "ok"
