"""The comparisons: shapes of BERT-base at 32,768 tokens, with the ratios to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu_check import peers
from benchmarks.gpu_check.measure import Machine, Row, Run, Target
from benchmarks.gpu_check.peers import collect, modes
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
)

Candidates = dict[str, Callable[[], dict[str, Run]]]


def _split(case: str, candidates: Candidates, wanted: dict[str, dict]) -> Iterator[Row]:
    """One row per mode; `wanted` gives each mode its bytes, flops and targets."""
    found, absent = collect(candidates)
    for mode, options in wanted.items():
        yield Row(
            case=f"{case} {mode}", runs={name: runs[mode] for name, runs in found.items()}, absent=absent, **options
        )


def _random(at: Machine, *shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=at.device, dtype=at.dtype).requires_grad_(grad)


def _attention(at: Machine, length: int, causal: bool, wanted: dict[str, list[Target]]) -> Iterator[Row]:
    length, heads, size = at.size(length, 32), at.size(12, 1), 64
    batch = at.size(32768, 64) // length
    qkv = _random(at, batch, length, 3, heads, size)
    candidates: Candidates = {"ours": lambda: modes(lambda x: attention_padded(x, causal=causal), qkv)}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        candidates[backend] = lambda backend=backend: modes(peers.sdpa(backend, causal), qkv)
    if not at.dry:
        candidates["flex"] = lambda: modes(peers.flex(causal), qkv)
    flops = 4.0 * batch * heads * length**2 * size * (0.5 if causal else 1.0)
    one = batch * length * heads * size * qkv.element_size()
    work = {"forward": (4 * one, flops), "backward": (7 * one, 2.5 * flops), "both": (11 * one, 3.5 * flops)}
    options = {mode: {"bytes": work[mode][0], "flops": work[mode][1], "targets": wanted[mode]} for mode in wanted}
    yield from _split(f"attention S={length}{' causal' if causal else ''}", candidates, options)


def _unpadded(at: Machine) -> Iterator[Row]:
    longest, heads = at.size(512, 32), at.size(12, 1)
    batch = at.size(64, 2)
    lengths = torch.linspace(1, longest - 1, batch).int()  # mean half of the longest
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(at.device)
    full, packed = _random(at, batch, longest, 3, heads, 64), _random(at, int(lengths.sum()), 3, heads, 64)
    candidates: Candidates = {
        "ours": lambda: modes(lambda x: attention(x, starts, longest), packed),
        "ours padded": lambda: modes(attention_padded, full),
        "varlen_attn": lambda: modes(peers.varlen(starts, longest), packed),
    }
    targets = [Target(peer="ours padded", must=1.8, goal=1.95)]
    yield from _split(
        "attention unpadded", candidates, {mode: {"targets": targets} for mode in ("forward", "backward")}
    )


def _norm(at: Machine, width: int) -> Iterator[Row]:
    tokens, width = at.size(32768, 24), at.size(width, 32)
    x, residual = _random(at, tokens, width), _random(at, tokens, width)
    bias, weight, shift = (_random(at, width) for _ in range(3))
    chain = peers.norm_chain(0.1)

    def ours(x, residual, bias, weight, shift):
        return add_layer_norm(x, weight, shift, residual=residual, bias=bias, dropout=0.1)

    inputs = (x, residual, bias, weight, shift)
    candidates: Candidates = {"ours": lambda: modes(ours, *inputs), "eager": lambda: modes(chain, *inputs)}
    if not at.dry:
        candidates["compile"] = lambda: modes(torch.compile(chain), *inputs)
    one = tokens * width * x.element_size()
    yield from _split(
        f"add_layer_norm N={width}", candidates,
        {
            # the timed forward pass keeps nothing: two rows in, one out
            "forward": {"bytes": 3 * one, "targets": [Target(peer="copy", must=0.85, goal=0.92)]},
            "backward": {
                "bytes": 4 * one,
                "targets": [Target(peer="copy", must=0.75, goal=0.85), Target(peer="compile", must=1.5, goal=2.0)],
            },
        },
    )  # fmt: skip
    plain: Candidates = {
        "ours": lambda: modes(lambda x, w, s: add_layer_norm(x, w, s), x, weight, shift),
        "eager": lambda: modes(lambda x, w, s: F.layer_norm(x, x.shape[-1:], w, s), x, weight, shift),
        "liger": lambda: modes(peers.liger_norm(), x, weight, shift),
    }
    options = {"bytes": 3 * one, "targets": [Target(peer="liger", must=2.0, goal=3.0)]}
    yield from _split(f"layer norm N={width}", plain, {"backward": options})


def _head(at: Machine) -> Iterator[Row]:
    rows, width, vocabulary = at.size(4915, 24), at.size(768, 32), at.size(30522, 130)
    h, weight, bias = _random(at, rows, width), _random(at, vocabulary, width), _random(at, vocabulary)
    target = torch.randint(vocabulary, (rows,), device=at.device)
    inputs = (h, weight, bias, target)
    candidates: Candidates = {
        "ours": lambda: modes(linear_cross_entropy, *inputs),
        "eager": lambda: modes(peers.eager_head, *inputs),
        "liger": lambda: modes(peers.liger_head(), *inputs),
        "cut_cross_entropy": lambda: modes(peers.cut_head(), *inputs),
        "torch fused": lambda: modes(peers.torch_head(), *inputs),
    }
    targets = [Target(peer="liger", must=1.5, goal=2.0), Target(peer="eager", must=1.2, goal=1.5)]
    flops = 6.0 * rows * width * vocabulary
    yield from _split("linear_cross_entropy", candidates, {"both": {"flops": flops, "targets": targets}})


def _gelu(at: Machine) -> Iterator[Row]:
    tokens, width, inner = at.size(32768, 48), at.size(3072, 64), at.size(768, 32)
    x, weight, bias = _random(at, tokens, inner), _random(at, width, inner), _random(at, width)
    u = _random(at, tokens, width)
    candidates: Candidates = {
        "ours": lambda: modes(bias_gelu, u, bias),
        "eager": lambda: modes(lambda u, b: F.gelu(u + b), u, bias),
    }
    one = tokens * width * u.element_size()
    targets = [Target(peer="copy", must=0.8, goal=0.9)]
    yield from _split(
        "bias_gelu", candidates,
        {"forward": {"bytes": 2 * one, "targets": targets}, "backward": {"bytes": 3 * one, "targets": targets}},
    )  # fmt: skip
    products: Candidates = {
        "ours": lambda: modes(linear_gelu, x, weight, bias),
        "cuBLAS + bias_gelu": lambda: modes(lambda x, w, b: bias_gelu(F.linear(x, w), b), x, weight, bias),
    }
    options = {
        "flops": 2.0 * tokens * width * inner,
        "targets": [Target(peer="cuBLAS + bias_gelu", must=1.05, goal=1.15)],
    }
    yield from _split("linear_gelu", products, {"forward": options})


def _lookups(at: Machine) -> Iterator[Row]:
    tokens, width, vocabulary = at.size(32768, 48), at.size(768, 64), at.size(30522, 50)
    word, position = _random(at, vocabulary, width), _random(at, 512, width)
    weight, shift = _random(at, width), _random(at, width)
    ids = torch.randint(vocabulary, (tokens,), device=at.device)
    places = torch.arange(tokens, device=at.device) % 512

    def ours(word, position, weight, shift):
        return embedding_norm(ids, places, None, word=word, position=position, weight=weight, shift=shift)

    def eager(word, position, weight, shift):
        z = F.embedding(ids, word) + F.embedding(places, position)
        return F.layer_norm(z, z.shape[-1:], weight, shift)

    tables = (word, position, weight, shift)
    candidates: Candidates = {"ours": lambda: modes(ours, *tables), "eager": lambda: modes(eager, *tables)}
    one = tokens * width * word.element_size()
    yield from _split(
        "embedding_norm", candidates,
        {
            "forward": {"bytes": 2 * one, "targets": [Target(peer="eager", must=2.0, goal=3.0)]},
            "both": {"targets": [Target(peer="eager", must=1.1, goal=1.5)]},
        },
    )  # fmt: skip
    x = _random(at, tokens, width)
    kept = torch.randperm(tokens, device=at.device)[: tokens * 3 // 20].sort().values
    inverse = inverse_index(kept, tokens)
    rows: Candidates = {
        "ours": lambda: modes(lambda x: gather_rows(x, kept, inverse), x),
        "eager": lambda: modes(lambda x: x[kept], x),
    }
    targets = [Target(peer="eager", must=1.0, goal=1.5)]
    yield from _split("gather_rows 15 %", rows, {mode: {"targets": targets} for mode in ("forward", "backward")})


def _ratio(peer: str, must: float, goal: float) -> Target:
    return Target(peer=peer, must=must, goal=goal)


FLASH, CUDNN = "FLASH_ATTENTION", "CUDNN_ATTENTION"
SECTIONS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "attention 128": lambda at: _attention(at, 128, False, {"both": [_ratio("best", 1.3, 2.0)]}),
    "attention 512": lambda at: _attention(
        at, 512, False,
        {
            "forward": [_ratio(FLASH, 1.15, 1.3), _ratio(CUDNN, 0.95, 1.05), _ratio("flex", 1.1, 1.2)],
            "backward": [_ratio(FLASH, 1.0, 1.25), _ratio(CUDNN, 0.75, 1.0), _ratio("flex", 1.2, 1.3)],
        },
    ),
    "attention 2048": lambda at: _attention(
        at, 2048, False,
        {
            "forward": [_ratio(FLASH, 1.2, 1.3), _ratio(CUDNN, 0.95, 1.05)],
            "backward": [_ratio(FLASH, 1.0, 1.25), _ratio(CUDNN, 0.75, 1.0)],
        },
    ),
    "attention 512 causal": lambda at: _attention(
        at, 512, True, {"forward": [_ratio(FLASH, 1.1, 1.2)], "backward": [_ratio(FLASH, 1.0, 1.1)]}
    ),
    "unpadded": _unpadded,
    "norm 768": lambda at: _norm(at, 768),
    "norm 1024": lambda at: _norm(at, 1024),
    "head": _head,
    "gelu": _gelu,
    "lookups": _lookups,
}  # fmt: skip
"""In the order of their weight in a training step, for the case that time runs out."""
