"""What the kernels and the training steps have to reach, and what they should.

Ratios are a peer's seconds divided by ours. "limit" is the share of what this machine's copy and matmul rates allow;
"best" is the fastest peer.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A ratio against one peer."""

    mode: str
    peer: str
    must: float
    goal: float


FP8_LAYERS = ("qkv 1024 x 3072", "up 1024 x 4096", "down 4096 x 1024")
"""With its casts the small one, 1024 x 1024, is predicted to take as long as in bf16."""
TARGETS: dict[str, list[Target]] = {
    "attention S=128 p=0.1": [Target("both", "best", 1.3, 2.0)],
    "attention S=128": [Target("both", "best", 1.3, 2.0)],
    "attention S=512 p=0.1": [Target("forward", "FLASH", 1.15, 1.3), Target("backward", "FLASH", 1.0, 1.25)],
    "attention S=512": [
        Target("forward", "FLASH", 1.15, 1.3),
        Target("forward", "CUDNN", 0.95, 1.05),
        Target("forward", "flex", 1.1, 1.2),
        Target("backward", "FLASH", 1.0, 1.25),
        Target("backward", "CUDNN", 0.75, 1.0),
        Target("backward", "flex", 1.2, 1.3),
    ],
    "attention S=2048": [
        Target("forward", "FLASH", 1.2, 1.3),
        Target("forward", "CUDNN", 0.95, 1.05),
        Target("backward", "FLASH", 1.0, 1.25),
        Target("backward", "CUDNN", 0.75, 1.0),
    ],
    "attention S=512 causal": [Target("forward", "FLASH", 1.1, 1.2), Target("backward", "FLASH", 1.0, 1.1)],
    "attention documents p=0.1": [Target("both", "ours padded", 1.8, 1.95), Target("both", "jagged", 1.0, 1.3)],
    "attention documents": [Target("both", "varlen", 1.0, 1.3)],
    **{
        f"add_layer_norm N={width} {kind}-LN p=0.1": [
            Target("forward", "limit", 0.85, 0.92),
            Target("backward", "limit", 0.75, 0.85),
            Target("backward", "compile", 1.5, 2.0),
        ]
        for width in (768, 1024)
        for kind in ("pre", "post")
    },
    **{f"layer_norm N={width}": [Target("backward", "liger", 2.0, 3.0)] for width in (768, 1024)},
    **{
        f"bias_gelu N={width}": [Target("forward", "limit", 0.8, 0.9), Target("backward", "limit", 0.8, 0.9)]
        for width in (3072, 4096)
    },
    **{
        f"head N={width}": [Target("both", "liger", 1.5, 2.0), Target("both", "eager", 1.2, 1.5)]
        for width in (768, 1024)
    },
    "linear_gelu N=768": [Target("forward", "cuBLAS + bias_gelu", 1.05, 1.15)],
    "embedding_norm N=768 p=0.1": [Target("forward", "eager", 2.0, 3.0), Target("both", "eager", 1.1, 1.5)],
    "gather_rows N=768": [Target("forward", "index_select", 1.0, 1.5), Target("backward", "index_select", 1.0, 1.5)],
    **{f"cast_fp8 N={width}": [Target("forward", "limit", 0.8, 0.9)] for width in (1024, 4096)},
    **{f"linear fp8 {name}": [Target("both", "bf16", 1.0, 1.15)] for name in FP8_LAYERS},
}
"""By the name of a row of speed.py."""


class Goal(NamedTuple):
    """What the better of our training steps has to reach; beneath `must` lies the floor."""

    against: str
    """A contender, "tokens/s", or "memory": our bytes divided by the eager peer's, where less is better."""
    floor: float
    must: float


RATIOS = [Goal("peer", 1.8, 2.5), Goal("peer compiled", 1.2, 1.5), Goal("memory", 0.6, 0.45)]
GOALS: dict[str, list[Goal]] = {
    "base S=128": [Goal("tokens/s", 500e3, 900e3), *RATIOS, Goal("bare", 0.95, 0.95)],
    "base S=512": [Goal("tokens/s", 450e3, 800e3), *RATIOS],
    "large S=128": [Goal("tokens/s", 170e3, 285e3), *RATIOS],
    "large S=512": [Goal("tokens/s", 150e3, 255e3), *RATIOS],
    "base S=512 documents": [Goal("peer", 1.7 * 1.8, 1.9 * 2.5)],
}
"""By the name of a row of model.py."""
GROWTH_SECONDS = 0.2
"""A growth of BERT-base on one GPU takes less."""
