"""Speed of the kernels beside their peers, at the shapes of training: 32,768 tokens, with dropout and without.

A row times forward (with what it keeps for the backward pass), backward and both. Its bytes are those that the
operator has to read and write once, saved activations and dropped gradients included; small vectors are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_check import peers
from benchmarks.gpu_check.catalogue import Function, Machine, Ours, Row
from benchmarks.gpu_check.peers import Candidates, modes
from ds_stacking.kernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    embedding_norm,
    gather_rows,
    inverse_index,
    linear_cross_entropy,
    linear_gelu,
)

TOKENS = 32_768


@dataclass(kw_only=True)
class Setting:
    """A comparison that can be run: our function, its inputs, the peers, and the work of each mode."""

    ours: Function
    inputs: list[torch.Tensor]
    peers: Callable[[], Candidates] = dict
    bytes: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    memory: bool = False
    """Whether the memory that each takes is of interest beside its time."""


DRY_ABSENT = frozenset({"CUDNN", "varlen", "liger", "cut_cross_entropy", "torch fused", "flex", "FLASH", "EFFICIENT"})
"""Peers that a CPU need not have; whatever else is missing in a dry run is an error of this program."""


def timed(at: Machine, setting: Setting) -> dict[str, Any]:
    """Times per mode, the work, and why peers are absent."""
    assert at.timer is not None
    ours = {"ours": lambda: modes(setting.ours, *setting.inputs)}
    found, absent = peers.collect({**ours, **setting.peers()}, at)
    if at.dry and not DRY_ABSENT.issuperset(absent):
        raise RuntimeError(f"peers that a CPU has did not run: {absent}")
    times = {}
    for mode in found["ours"]:
        times[mode] = at.timer.compare({name: runs[mode] for name, runs in found.items()})
    peaks = {name: peak_bytes(at, runs["both"]) for name, runs in found.items()} if setting.memory else None
    memory = {"peak_bytes": peaks} if peaks else {}
    return {"modes": times, "bytes": setting.bytes, "flops": setting.flops, "absent": absent, **memory}


def peak_bytes(at: Machine, gradients: Callable[[], Any]) -> int:
    """What a forward and backward pass takes at its peak beside its inputs and gradients; not counted on a CPU."""
    if at.dry:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.numel() * x.element_size() for x in gradients())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept


def _sum(work: dict[str, float]) -> dict[str, float]:
    return {**work, "both": sum(work.values())}


def _attention_peers(at: Machine, batch: int, length: int, heads: int, causal: bool, p: float) -> Candidates:
    q, k, v = (at.random(batch, heads, length, 64) for _ in range(3))
    candidates: dict[str, Callable[[], peers.Modes]] = {}
    for backend in ("FLASH", "CUDNN", "EFFICIENT"):
        candidates[backend] = lambda name=backend: modes(peers.sdpa(f"{name}_ATTENTION", causal, p), q, k, v)
    if not p:  # FlexAttention has no dropout
        candidates["flex"] = lambda: modes(peers.flex(length, causal, at), q, k, v)
    return candidates


def rectangle(at: Machine, length: int, causal: bool, p: float) -> Setting:
    """Sequences of equal length, as training hands them to the kernel."""
    length, heads = at.size(length, 32), at.size(12, 1)
    batch = at.size(TOKENS, 64) // length
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=at.device)
    seed = at.seed()
    qkv = at.random(batch * length, 3, heads, 64)
    return Setting(
        ours=lambda x: attention(x, starts, length, causal=causal, dropout=p, seed=seed), inputs=[qkv],
        peers=lambda: _attention_peers(at, batch, length, heads, causal, p),
        **_attention_work(qkv, [length] * batch, causal),
    )  # fmt: skip


def _attention_work(qkv: torch.Tensor, lengths: list[int], causal: bool) -> dict[str, Any]:
    """Q, K, V in, O out; backward dO and, where a head is not held whole, O in too, and dQ, dK, dV out."""
    tokens, _, heads, size = qkv.shape
    one = tokens * heads * size * qkv.element_size()
    statistics = 4.0 * tokens * heads
    flops = 4.0 * heads * size * sum(n * n for n in lengths) * (0.5 if causal else 1.0)
    whole = max(lengths) <= 128
    moved = {"forward": 4.0 * one + statistics, "backward": (7.0 if whole else 8.0) * one + statistics}
    return {"bytes": _sum(moved), "flops": _sum({"forward": flops, "backward": 2.5 * flops})}


def documents(total: int, longest: int) -> list[int]:
    """Lengths of real documents, cut at `longest`: log-normal around 200 tokens, as in web text and encyclopedias."""
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.empty(total).log_normal_(5.3, 1.0, generator=generator).clamp(min(8, longest), longest).int().tolist()
    )
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(drawn[len(lengths)], total - sum(lengths)))
    return lengths


def unpadded(at: Machine, p: float) -> Setting:
    """Documents one after the other, beside torch's attention over them and ours over one padded row for each."""
    longest, heads = at.size(512, 32), at.size(12, 1)
    lengths = documents(at.size(TOKENS, 80), longest)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    seed = at.seed()
    starts = bounds.to(at.device)
    qkv = at.random(sum(lengths), 3, heads, 64)
    padded = [longest] * len(lengths)

    def make() -> Candidates:
        rows = torch.tensor(padded).cumsum(0).int()
        edges = torch.cat([torch.zeros(1, dtype=torch.int32), rows]).to(at.device)
        full = at.random(sum(padded), 3, heads, 64)
        q, k, v = (at.random(sum(lengths), heads, 64) for _ in range(3))
        found = {"ours padded": lambda: modes(lambda x: attention(x, edges, longest, dropout=p, seed=seed), full)}
        found["jagged"] = lambda: modes(peers.jagged(starts, min(lengths), longest, p), q, k, v)
        return found if p else {**found, "varlen": lambda: modes(peers.varlen(starts, longest), q, k, v)}

    return Setting(
        ours=lambda x: attention(x, starts, longest, dropout=p, seed=seed), inputs=[qkv], peers=make,
        **_attention_work(qkv, lengths, False),
    )  # fmt: skip


def norm(at: Machine, width: int, p: float, pre: bool) -> Setting:
    """Bias, dropout, residual sum and norm. Backward: dy, z (pre-LN: dz too) in; dz out, with dropout dx too."""
    tokens, width = at.size(TOKENS, 24), at.size(width, 32)
    seed = at.seed()
    inputs = [at.random(tokens, width), at.random(tokens, width), *(at.random(width) for _ in range(3))]

    def ours(x, residual, bias, weight, shift):
        return add_layer_norm(x, weight, shift, residual=residual, bias=bias, dropout=p, seed=seed, return_sum=pre)

    chain = peers.norm_chain(p, pre)
    one = inputs[0].numel() * inputs[0].element_size()
    return Setting(
        ours=ours, inputs=inputs, bytes=_sum({"forward": 4.0 * one, "backward": (3.0 + (p > 0) + pre) * one}),
        peers=lambda: {
            "eager": lambda: modes(chain, *inputs), "compile": lambda: modes(peers.compiled(chain, at), *inputs)
        },
    )  # fmt: skip


def plain_norm(at: Machine, width: int) -> Setting:
    """LayerNorm alone."""
    tokens, width = at.size(TOKENS, 24), at.size(width, 32)
    inputs = [at.random(tokens, width), at.random(width), at.random(width)]

    def eager(x, weight, shift):
        return F.layer_norm(x, x.shape[-1:], weight, shift, 1e-12)

    one = inputs[0].numel() * inputs[0].element_size()
    return Setting(
        ours=add_layer_norm, inputs=inputs, bytes=_sum({"forward": 2.0 * one, "backward": 3.0 * one}),
        peers=lambda: {
            "eager": lambda: modes(eager, *inputs), "compile": lambda: modes(peers.compiled(eager, at), *inputs),
            "liger": lambda: modes(peers.liger_norm(), *inputs),
        },
    )  # fmt: skip


def head(at: Machine, width: int) -> Setting:
    """The loss of the predicted tokens."""
    rows, width, vocabulary = at.size(4915, 24), at.size(width, 32), at.size(30522, 130)
    target = torch.randint(vocabulary, (rows,), device=at.device)
    inputs = [at.random(rows, width), at.random(vocabulary, width), at.random(vocabulary)]
    functions: dict[str, Callable[[], Function]] = {
        "eager": lambda: peers.eager_head, "compile": lambda: peers.compiled(peers.eager_head, at),
        "liger": peers.liger_head, "cut_cross_entropy": peers.cut_head, "torch fused": peers.torch_head,
    }  # fmt: skip
    flops = 2.0 * rows * width * vocabulary

    def make() -> Candidates:
        return {name: lambda get=get: modes(get(), *inputs, target) for name, get in functions.items()}

    return Setting(
        ours=lambda h, w, b: linear_cross_entropy(h, w, b, target), inputs=inputs, peers=make, memory=True,
        flops=_sum({"forward": flops, "backward": 2 * flops}),
    )  # fmt: skip


def gelu(at: Machine, width: int) -> Setting:
    """GELU after a bias."""
    inputs = [at.random(at.size(TOKENS, 48), at.size(width, 64)), at.random(at.size(width, 64))]

    def eager(x, bias):
        return F.gelu(x + bias)

    one = inputs[0].numel() * inputs[0].element_size()
    return Setting(
        ours=bias_gelu, inputs=inputs, bytes=_sum({"forward": 2.0 * one, "backward": 3.0 * one}),
        peers=lambda: {
            "eager": lambda: modes(eager, *inputs), "compile": lambda: modes(peers.compiled(eager, at), *inputs)
        },
    )  # fmt: skip


def up(at: Machine, width: int) -> Setting:
    """The feed-forward layer's first product with its GELU, in one kernel and in two."""
    width = at.size(width, 32)
    inputs = [at.random(at.size(TOKENS, 48), width), at.random(4 * width, width), at.random(4 * width)]
    flops = 2.0 * inputs[0].numel() * 4 * width
    return Setting(
        ours=linear_gelu, inputs=inputs, flops=_sum({"forward": flops, "backward": 2 * flops}),
        peers=lambda: {
            "cuBLAS + bias_gelu": lambda: modes(lambda x, w, b: bias_gelu(F.linear(x, w), b), *inputs),
            "eager": lambda: modes(lambda x, w, b: F.gelu(F.linear(x, w, b)), *inputs),
        },
    )  # fmt: skip


def embedding(at: Machine, width: int, p: float) -> Setting:
    """BERT's embedding layer, all tokens of one kind as in training without sentence pairs."""
    tokens, width, vocabulary = at.size(TOKENS, 48), at.size(width, 64), at.size(30522, 50)
    seed = at.seed()
    ids = torch.randint(vocabulary, (tokens,), device=at.device)
    places = torch.arange(tokens, device=at.device) % at.size(512, 16)
    kinds = torch.zeros_like(ids)
    tables = [at.random(n, width) for n in (vocabulary, at.size(512, 16), 2)]
    inputs = [*tables, at.random(width), at.random(width)]

    def ours(word, position, segment, weight, shift):
        return embedding_norm(
            ids, places, kinds, word=word, position=position, segment=segment, weight=weight, shift=shift, dropout=p,
            seed=seed,
        )  # fmt: skip

    def eager(word, position, segment, weight, shift):
        z = F.embedding(ids, word) + F.embedding(places, position) + F.embedding(kinds, segment)
        return F.dropout(F.layer_norm(z, z.shape[-1:], weight, shift, 1e-12), p)

    one = tokens * width * tables[0].element_size()
    return Setting(
        ours=ours, inputs=inputs, bytes={"forward": 2.0 * one},
        peers=lambda: {
            "eager": lambda: modes(eager, *inputs), "compile": lambda: modes(peers.compiled(eager, at), *inputs)
        },
    )  # fmt: skip


def gather(at: Machine, width: int) -> Setting:
    """The predicted tokens, picked."""
    tokens = at.size(TOKENS, 48)
    kept = torch.arange(0, tokens, 7, device=at.device)
    inverse = inverse_index(kept, tokens)
    x = at.random(tokens, at.size(width, 64))
    row = x.shape[1] * x.element_size()
    moved = {"forward": 2.0 * len(kept) * row, "backward": float((len(kept) + tokens) * row)}
    return Setting(
        ours=lambda x: gather_rows(x, kept, inverse), inputs=[x], bytes=_sum(moved),
        peers=lambda: {"index_select": lambda: modes(lambda x: x.index_select(0, kept), x)},
    )  # fmt: skip


CASES: dict[str, tuple[float, Callable[[Machine], Setting]]] = {
    "attention S=128 p=0.1": (4, lambda at: rectangle(at, 128, False, 0.1)),
    "attention S=512 p=0.1": (4, lambda at: rectangle(at, 512, False, 0.1)),
    "add_layer_norm N=768 pre-LN p=0.1": (12, lambda at: norm(at, 768, 0.1, True)),
    "add_layer_norm N=768 post-LN p=0.1": (12, lambda at: norm(at, 768, 0.1, False)),
    "bias_gelu N=3072": (12, lambda at: gelu(at, 3072)),
    "head N=768": (15, lambda at: head(at, 768)),
    "attention documents p=0.1": (4, lambda at: unpadded(at, 0.1)),
    "linear_gelu N=768": (4, lambda at: up(at, 768)),
    "layer_norm N=768": (12, lambda at: plain_norm(at, 768)),
    "embedding_norm N=768 p=0.1": (12, lambda at: embedding(at, 768, 0.1)),
    "gather_rows N=768": (3, lambda at: gather(at, 768)),
    "attention S=512": (15, lambda at: rectangle(at, 512, False, 0.0)),
    "attention S=128": (15, lambda at: rectangle(at, 128, False, 0.0)),
    "attention documents": (4, lambda at: unpadded(at, 0.0)),
    "add_layer_norm N=1024 pre-LN p=0.1": (12, lambda at: norm(at, 1024, 0.1, True)),
    "add_layer_norm N=1024 post-LN p=0.1": (12, lambda at: norm(at, 1024, 0.1, False)),
    "bias_gelu N=4096": (12, lambda at: gelu(at, 4096)),
    "head N=1024": (15, lambda at: head(at, 1024)),
    "layer_norm N=1024": (12, lambda at: plain_norm(at, 1024)),
    "add_layer_norm N=768 post-LN": (12, lambda at: norm(at, 768, 0.0, False)),
    "attention S=2048": (15, lambda at: rectangle(at, 2048, False, 0.0)),
    "attention S=512 causal": (15, lambda at: rectangle(at, 512, True, 0.0)),
}
"""Seconds and setting, by what decides most of a training step."""


def rows() -> list[Row]:
    """A row for every case."""
    return [_row(name, seconds, make) for name, (seconds, make) in CASES.items()]


def _row(name: str, seconds: float, make: Callable[[Machine], Setting]) -> Row:
    def ours(at: Machine) -> Ours:
        setting = make(at)
        return setting.ours, setting.inputs

    return Row(
        name=f"speed: {name}",
        seconds=seconds,
        part="kernels",
        ours=ours,
        choose_tiles=True,
        run=lambda at: timed(at, make(at)),
    )
