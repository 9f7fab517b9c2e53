"""Errors of every kernel and gradient against fp64, beside those of torch's own operation in the same precision.

An operator runs in every configuration that may be chosen for its kernels, and twice in the present one, where it has
to repeat itself to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.catalogue import Function, Machine, Ours, Row
from benchmarks.gpu_check.subjects import (
    Subject,
    embedding,
    gelu,
    head,
    norm,
    padded,
    plain_norm,
    selected,
    selection,
    sequences,
    small_table,
    up,
)
from benchmarks.gpu_check.tiles import in_all_configurations

DOCUMENTS = [1, 17, 64, 127, 128, 129, 300, 512]
"""Lengths at which kernels and tiles change, in one batch."""


Case = tuple[str, float, Callable[[Machine], Subject]]
"""Name, seconds, subject."""


def _documents(at: Machine) -> list[int]:
    return [at.size(length, min(length, 21)) for length in DOCUMENTS]


def _equal(at: Machine, length: int, many: int) -> list[int]:
    return [at.size(length, min(length, 19))] * at.size(many, min(many, 3))


def _trained_attention() -> Iterator[Case]:
    for p in (0.1, 0.0):
        for length, many in ((128, 2), (512, 3)):
            name = f"attention S={length}" + f" p={p}" * (p > 0)
            yield name, 0.5, lambda at, n=length, m=many, p=p: sequences(at, _equal(at, n, m), False, p)
        yield f"attention documents p={p}", 1.0, lambda at, p=p: sequences(at, _documents(at), False, p)
    for p in (0.1, 0.0):
        name = f"selected_attention documents p={p}"
        yield name, 1.0, lambda at, p=p: selected(at, _documents(at), p)
    # programs that stay take several heads each: 768 heads of 264 programs, 384 of 132
    yield "attention S=128 64 sequences p=0.1", 1.0, lambda at: sequences(at, _equal(at, 128, 64), False, 0.1)
    yield "attention S=512 32 sequences p=0.1", 2.0, lambda at: sequences(at, _equal(at, 512, 32), False, 0.1)
    yield "selected_attention S=512 p=0.1", 0.5, lambda at: selected(at, _equal(at, 512, 3), 0.1)


def _attention_edges() -> Iterator[Case]:
    for length in (1, 17, 64, 127, 129):
        name = f"attention S={length} p=0.1"
        yield name, 0.5, lambda at, n=length: sequences(at, _equal(at, n, 2), False, 0.1)
    for length, many in ((128, 2), (512, 3), (512, 32), (1000, 3)):
        name = f"attention S={length} causal p=0.1" + f" {many} sequences" * (many > 3)
        yield name, 2.0, lambda at, n=length, m=many: sequences(at, _equal(at, n, m), True, 0.1)
    for length, many, p in ((127, 2, 0.1), (512, 32, 0.1), (1000, 3, 0.0)):
        name = f"attention S={length} padded p={p}"

        def make(at: Machine, length: int = length, many: int = many, p: float = p) -> Subject:
            whole = _equal(at, length, many)
            return padded(at, [whole[0], *(n - n // 3 for n in whole[1:])], False, p)

        yield name, 2.0, make


def cases() -> Iterator[Case]:
    """In order of worth: all that is trained, then edges and options."""
    yield from _trained_attention()
    for width in (768, 1024):
        for second, kind in (("again", "post"), ("sum", "pre")):
            name = f"add_layer_norm N={width} {kind}-LN p=0.1"
            yield name, 0.5, lambda at, w=width, s=second: norm(at, _tokens(at), at.size(w, w // 16), 0.1, s)
    yield "layer_norm N=768", 0.5, lambda at: plain_norm(at, _tokens(at), at.size(768, 48))
    yield "bias_gelu N=3072", 0.5, lambda at: gelu(at, _tokens(at), at.size(3072, 80), "none")
    yield "head M=4915 kept", 2.0, lambda at: head(at, at.size(4915, 21), at.size(768, 40), True)
    yield "head M=4915 sliced", 2.0, lambda at: head(at, at.size(4915, 21), at.size(768, 40), False)
    yield "embedding_norm p=0.1", 0.5, lambda at: embedding(at, _equal(at, 128, 33), at.size(768, 40), 0.1)
    name = "embedding_norm documents p=0.1"
    yield name, 0.5, lambda at: embedding(at, _documents(at), at.size(768, 40), 0.1)
    yield "look_up", 0.3, lambda at: small_table(at, _tokens(at), at.size(768, 40))
    yield "gather and scatter", 0.3, lambda at: selection(at, _tokens(at), at.size(768, 40))
    yield from _edges()
    yield from _attention_edges()


def _tokens(at: Machine) -> int:
    return at.size(4097, 21)


def _edges() -> Iterator[Case]:
    yield "linear_gelu", 0.5, lambda at: up(at, _tokens(at), at.size(768, 40))
    yield "bias_gelu N=4096 tanh", 0.5, lambda at: gelu(at, _tokens(at), at.size(4096, 72), "tanh")
    yield "add_layer_norm N=768 alone p=0", 0.5, lambda at: norm(at, _tokens(at), at.size(768, 40), 0.0, "")
    name = "embedding_norm documents, kinds p=0"
    yield name, 0.5, lambda at: embedding(at, _documents(at), at.size(1024, 24), 0.0, True)
    yield "embedding_norm kinds p=0.1", 0.5, lambda at: embedding(at, _equal(at, 128, 3), at.size(768, 40), 0.1, True)
    for kind, keep in (("kept", True), ("sliced", False)):
        yield f"head M=1 {kind}", 0.5, lambda at, keep=keep: head(at, 1, at.size(768, 40), keep)
        yield f"head M=17 N=1024 {kind}", 0.5, lambda at, keep=keep: head(at, 17, at.size(1024, 24), keep)
        name = f"head M=513 ignored, smoothed, z-loss {kind}"
        yield name, 1.0, lambda at, keep=keep: head(at, at.size(513, 21), at.size(768, 40), keep, True)
    yield "add_layer_norm T=1", 0.3, lambda at: norm(at, 1, at.size(768, 40), 0.1, "sum")


def watched() -> Iterator[Case]:
    """What compute-sanitizer watches, in small shapes; the first ones, which share memory most, under racecheck too.

    The forms that take more than 128 tokens are chosen by numbers of heads: 120 keep 132 multiprocessors busy, so that
    each is held whole; 4 do not.
    """

    def split(at: Machine) -> list[int]:
        return [19, 18] if at.dry else [260, 131]

    def whole(at: Machine) -> list[int]:
        return [*split(at), *[3] * (1 if at.dry else 58)]

    yield "attention whole heads p=0.1", 1.0, lambda at: sequences(at, whole(at), False, 0.1)
    yield "attention queries, keys p=0.1", 1.0, lambda at: sequences(at, split(at), False, 0.1)
    yield "attention queries, keys causal", 1.0, lambda at: sequences(at, split(at), True, 0.0)
    yield "attention queries, keys padded p=0.1", 1.0, lambda at: padded(at, split(at), False, 0.1)
    yield "selected_attention p=0.1", 1.0, lambda at: selected(at, split(at), 0.1)
    yield from (case for case in cases() if case[0] in SMALL)


RACES = 2
"""Cases of `watched` under racecheck, which is slow."""
SMALL = ("attention documents p=0.1", "attention S=128 causal p=0.1", "add_layer_norm N=768 pre-LN p=0.1")
SMALL += ("add_layer_norm N=768 post-LN p=0.1", "bias_gelu N=3072", "head M=4915 kept", "head M=4915 sliced")
SMALL += ("embedding_norm p=0.1", "embedding_norm documents p=0.1", "gather and scatter", "linear_gelu")
"""Cases that are watched in their small shapes, where no sequence has more than 21 tokens."""


def rows() -> list[Row]:
    """A row for every case."""
    return [row(f"correct: {name}", seconds, make) for name, seconds, make in cases()]


def row(name: str, seconds: float, make: Callable[[Machine], Subject]) -> Row:
    """A row that compares a subject with its formula."""

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


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch fill what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare(subject: Subject, dtype: torch.dtype, exact_type: bool) -> dict[str, Any]:
    """Root-mean-square errors relative to the largest value, per output and gradient; passes at 1.1 times torch's.

    `exact_type`: fp32 in the interpreter, where both errors are a matter of the order of summation.
    """
    with poisoned():
        every = in_all_configurations(lambda: evaluate(subject.ours, subject.inputs, dtype, dtype), exact_type)
    first, second = (evaluate(subject.ours, subject.inputs, dtype, dtype) for _ in range(2))  # as in training
    exact = evaluate(subject.formula, subject.inputs, torch.float64, dtype)
    peer = evaluate(subject.formula, subject.inputs, dtype, dtype)
    worst = [max(error(ours[i], e) for ours in every) for i, e in enumerate(exact)]
    pairs = [(a, error(b, e)) for a, b, e in zip(worst, peer, exact, strict=True)]
    # below a hundredth of the type's spacing both are exact but for the order of summation
    floor = torch.finfo(dtype).eps * (1 if exact_type else 0.01)
    repeats = all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    close = all(a <= max(1.1 * b, floor) for a, b in pairs)  # NaN is not <= anything
    return {
        "ok": close and repeats, "repeats": repeats, "configurations": len(every), "errors": worst,
        "peer": [b for _, b in pairs],
    }  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    """Root-mean-square difference relative to the largest wanted value."""
    difference = (got.double() - want).square().mean().sqrt()
    return float(difference / want.abs().max().clamp(min=1e-30))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same bits, NaN and the sign of zero included."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
