"""Errors of every kernel and gradient against fp64, beside those of torch's own operation in the same precision.

The formulas take the kernels' own dropout masks. Every operator is run twice and has to repeat itself to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.catalogue import Function, Machine, Ours, Row
from ds_stacking.kernels import (
    add_layer_norm,
    attention,
    attention_padded,
    bias_gelu,
    embedding_norm,
    gather_rows,
    inverse_index,
    linear_cross_entropy,
    linear_gelu,
    scatter_rows,
)
from ds_stacking.kernels._dropout import keep_mask


@dataclass(kw_only=True)
class Subject:
    """An operator, torch's formula for it, and the inputs of both; functions return a tensor or several."""

    ours: Function
    formula: Function
    inputs: list[Tensor]


def drop(x: Tensor, seed: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Dropout with the kernels' mask for these rows and columns."""
    return torch.where(keep_mask(seed, rows, columns, p), x / (1 - p), 0.0) if p else x


def _index(x: Tensor, dim: int) -> Tensor:
    return torch.arange(x.shape[dim], device=x.device)


def attend(qkv: Tensor, first: int, causal: bool, seed: Tensor, p: float) -> Tensor:
    """Attention of one sequence, qkv [S, 3, H, D], whose first token is number `first` of the batch: [S, H, D]."""
    q, k, v = qkv.permute(1, 2, 0, 3)  # [H, S, D]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(_index(q, 1) > _index(q, 1)[:, None], -torch.inf)
    rows = (first + _index(q, 1)) * len(q) + _index(q, 0)[:, None]
    probabilities = drop(scores.softmax(-1), seed, rows[..., None], _index(q, 1), p)
    return (probabilities @ v).transpose(0, 1)


def sequences(at: Machine, lengths: list[int], causal: bool, p: float, padded: bool) -> Subject:
    """Attention of sequences of these lengths, unpadded as in training, or as rows of equal length."""
    heads, seed = at.size(12, 2), at.seed()
    bounds = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    starts = torch.tensor(bounds, dtype=torch.int32).to(at.device)

    def formula(qkv):
        parts = [
            attend(qkv[first:last], first, causal, seed, p)
            for first, last in zip(bounds, bounds[1:], strict=False)
            if last > first
        ]
        return torch.cat(parts)

    def unpadded(qkv):
        return attention(qkv, starts, max(lengths), causal=causal, dropout=p, seed=seed)

    def rectangular(qkv):
        batch = qkv.unflatten(0, (len(lengths), -1))
        return attention_padded(batch, causal=causal, dropout=p, seed=seed).flatten(0, 1)

    return Subject(
        ours=rectangular if padded else unpadded, formula=formula, inputs=[at.random(bounds[-1], 3, heads, 64)]
    )


def norm(at: Machine, tokens: int, width: int, p: float, pre: bool) -> Subject:
    """The residual sum with its norm; for pre-LN the sum too."""
    seed = at.seed()

    def formula(x, residual, bias, weight, shift):
        z = residual + drop(x + bias, seed, _index(x, 0)[:, None], _index(x, 1), p)
        y = F.layer_norm(z, z.shape[-1:], weight, shift, 1e-12)
        return (y, z) if pre else y

    def ours(x, residual, bias, weight, shift):
        return add_layer_norm(x, weight, shift, residual=residual, bias=bias, dropout=p, seed=seed, return_sum=pre)

    vectors = [at.random(width) for _ in range(3)]
    return Subject(ours=ours, formula=formula, inputs=[at.random(tokens, width), at.random(tokens, width), *vectors])


def plain_norm(at: Machine, tokens: int, width: int) -> Subject:
    """LayerNorm alone, as it begins a pre-LN block."""
    return Subject(
        ours=add_layer_norm, formula=lambda x, w, s: F.layer_norm(x, x.shape[-1:], w, s, 1e-12),
        inputs=[at.random(tokens, width), at.random(width), at.random(width)],
    )  # fmt: skip


def gelu(at: Machine, tokens: int, width: int, form: Any) -> Subject:
    """GELU after a bias."""
    return Subject(
        ours=lambda x, b: bias_gelu(x, b, approximate=form), formula=lambda x, b: F.gelu(x + b, approximate=form),
        inputs=[at.random(tokens, width), at.random(width)],
    )  # fmt: skip


def up(at: Machine, tokens: int, width: int) -> Subject:
    """The feed-forward layer's first product with its GELU."""
    return Subject(
        ours=linear_gelu, formula=lambda *a: F.gelu(F.linear(*a)),
        inputs=[at.random(tokens, width), _matrix(at, 4 * width, width), at.random(4 * width)],
    )  # fmt: skip


def _matrix(at: Machine, *shape: int) -> Tensor:
    return (at.random(*shape).detach() * shape[-1] ** -0.5).requires_grad_()


def head(at: Machine, rows: int, width: int, extras: bool = False) -> Subject:
    """The loss of the masked-LM head, in the mean; `extras`: rows to ignore, label smoothing and z-loss."""
    vocabulary = at.size(30522, 50)
    target = torch.randint(vocabulary, (rows,), device=at.device)
    if extras:
        target[::7] = -100
    smoothing, z_loss = (0.1, 1e-4) if extras else (0.0, 0.0)

    def formula(h, weight, bias):
        logits = F.linear(h, weight, bias)
        loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
        return (loss + z_loss * (logits.logsumexp(1).square() * (target >= 0)).sum()) / rows

    def ours(h, weight, bias):
        return linear_cross_entropy(h, weight, bias, target, label_smoothing=smoothing, z_loss=z_loss) / rows

    inputs = [at.random(rows, width), _matrix(at, vocabulary, width), at.random(vocabulary)]
    return Subject(ours=ours, formula=formula, inputs=inputs)


def embedding(at: Machine, tokens: int, width: int, p: float) -> Subject:
    """BERT's embedding layer."""
    vocabulary, seed = at.size(30522, 50), at.seed()
    ids, places, kinds = (torch.randint(n, (tokens,), device=at.device) for n in (vocabulary, 16, 2))

    def formula(word, position, segment, weight, shift):
        z = word[ids] + position[places] + segment[kinds]
        y = F.layer_norm(z, z.shape[1:], weight, shift, 1e-12)
        return drop(y, seed, _index(y, 0)[:, None], _index(y, 1), p)

    def ours(word, position, segment, weight, shift):
        return embedding_norm(
            ids, places, kinds, word=word, position=position, segment=segment, weight=weight, shift=shift, dropout=p,
            seed=seed,
        )  # fmt: skip

    tables = [at.random(n, width) for n in (vocabulary, 16, 2)]
    return Subject(ours=ours, formula=formula, inputs=[*tables, at.random(width), at.random(width)])


def selection(at: Machine, tokens: int, width: int) -> Subject:
    """Rows picked and put back."""
    kept = torch.arange(0, tokens, 3, device=at.device)
    inverse = inverse_index(kept, tokens)
    return Subject(
        ours=lambda x: scatter_rows(gather_rows(x, kept, inverse), kept, inverse, x),
        formula=lambda x: x.index_copy(0, kept, x[kept]), inputs=[at.random(tokens, width)],
    )  # fmt: skip


DOCUMENTS = [1, 17, 64, 127, 128, 129, 300, 512]
"""Lengths at which kernels and tiles change, in one batch."""


def _attention_cases() -> Iterator[tuple[str, float, Callable[[Machine], Subject]]]:
    def case(length: int, causal: bool, p: float, padded: bool):
        kind = "".join([" causal" * causal, f" p={p}" * (p > 0), " padded" * padded])
        many = 2 if length < 512 else 3
        name = f"attention S={length}{kind}"
        return name, 0.5, lambda at: sequences(at, [at.size(length, min(length, 19))] * many, causal, p, padded)

    for p in (0.1, 0.0):  # what is trained first
        for length in (128, 512):
            yield case(length, False, p, False)
        name = f"attention documents p={p}"
        yield name, 1.0, lambda at, p=p: sequences(at, [at.size(n, min(n, 21)) for n in DOCUMENTS], False, p, False)
    for length in (1, 17, 64, 127, 129):
        yield case(length, False, 0.1, False)
    yield case(127, False, 0.1, True)
    for length in (128, 512, 1000):
        yield case(length, True, 0.1, False)
    yield case(1000, False, 0.0, True)


def cases() -> Iterator[tuple[str, float, Callable[[Machine], Subject]]]:
    """(name, seconds, subject) in order of worth: all that is trained, then edges and options."""
    found = list(_attention_cases())
    yield from found[:6]
    for width in (768, 1024):
        for pre in (False, True):
            name = f"add_layer_norm N={width} {'pre' if pre else 'post'}-LN p=0.1"
            yield name, 0.5, lambda at, w=width, pre=pre: norm(at, at.size(4097, 21), at.size(w, w // 16), 0.1, pre)
    tokens: Callable[[Machine], int] = lambda at: at.size(4097, 21)  # noqa: E731
    yield "layer_norm N=768", 0.5, lambda at: plain_norm(at, tokens(at), at.size(768, 48))
    yield "bias_gelu N=3072", 0.5, lambda at: gelu(at, tokens(at), at.size(3072, 80), "none")
    yield "head M=4915", 2.0, lambda at: head(at, at.size(4915, 21), at.size(768, 40))
    yield "embedding_norm p=0.1", 0.5, lambda at: embedding(at, tokens(at), at.size(768, 40), 0.1)
    yield "gather and scatter", 0.3, lambda at: selection(at, tokens(at), at.size(768, 40))
    yield "linear_gelu", 0.5, lambda at: up(at, tokens(at), at.size(768, 40))
    yield "bias_gelu N=4096 tanh", 0.5, lambda at: gelu(at, tokens(at), at.size(4096, 72), "tanh")
    yield "add_layer_norm N=768 post-LN p=0", 0.5, lambda at: norm(at, tokens(at), at.size(768, 40), 0.0, False)
    yield "embedding_norm p=0", 0.5, lambda at: embedding(at, tokens(at), at.size(1024, 24), 0.0)
    yield "head M=1", 0.5, lambda at: head(at, 1, at.size(768, 40))
    yield "head M=17 N=1024", 0.5, lambda at: head(at, 17, at.size(1024, 24))
    yield "head M=513 ignored, smoothed, z-loss", 1.0, lambda at: head(at, at.size(513, 21), at.size(768, 40), True)
    yield "add_layer_norm T=1", 0.3, lambda at: norm(at, 1, at.size(768, 40), 0.1, True)
    yield from found[6:]


SMALL = ("attention documents p=0.1", "attention S=129 p=0.1", "attention S=128 causal p=0.1")
SMALL += ("add_layer_norm N=768 pre-LN p=0.1", "bias_gelu N=3072", "head M=4915", "embedding_norm p=0.1")
SMALL += ("gather and scatter", "linear_gelu")
"""What compute-sanitizer watches, in small shapes."""


def rows() -> list[Row]:
    """A row for every case."""
    return [_row(f"correct: {name}", seconds, make) for name, seconds, make in cases()]


def _row(name: str, seconds: float, make: Callable[[Machine], Subject]) -> Row:
    def ours(at: Machine) -> Ours:
        subject = make(at)
        return subject.ours, subject.inputs

    return Row(
        name=name, seconds=seconds, part="correctness", ours=ours, run=lambda at: compare(make(at), at.dtype, at.dry)
    )


def evaluate(function: Function, inputs: list[Tensor], dtype: torch.dtype, rounding: torch.dtype) -> list[Tensor]:
    """Outputs and gradients with inputs in `dtype`; the outputs' gradients are numbers of `rounding` in any case."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(x.shape, generator=generator).to(rounding).to(x.device, x.dtype) for x in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, douts))]


def compare(subject: Subject, dtype: torch.dtype, exact_type: bool) -> dict[str, Any]:
    """Root-mean-square errors relative to the largest value, per output and gradient; passes at 1.1 times torch's.

    `exact_type`: fp32 in the interpreter, where both errors are a matter of the order of summation.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        ours, again = (evaluate(subject.ours, subject.inputs, dtype, dtype) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = evaluate(subject.formula, subject.inputs, torch.float64, dtype)
    peer = evaluate(subject.formula, subject.inputs, dtype, dtype)
    pairs = [(error(a, e), error(b, e)) for a, b, e in zip(ours, peer, exact, strict=True)]
    # below a hundredth of the type's spacing both are exact but for the order of summation
    floor = torch.finfo(dtype).eps * (1 if exact_type else 0.01)
    repeats = all(same_bits(a, b) for a, b in zip(ours, again, strict=True))
    close = all(a <= max(1.1 * b, floor) for a, b in pairs)  # NaN is not <= anything
    return {
        "ok": close and repeats,
        "repeats": repeats,
        "errors": [a for a, _ in pairs],
        "peer": [b for _, b in pairs],
    }


def error(got: Tensor, want: Tensor) -> float:
    """Root-mean-square difference relative to the largest wanted value."""
    difference = (got.double() - want).square().mean().sqrt()
    return float(difference / want.abs().max().clamp(min=1e-30))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same bits, NaN and the sign of zero included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
