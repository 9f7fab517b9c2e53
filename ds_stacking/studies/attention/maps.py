"""Attention maps of an encoder: where its heads look, and how alike its layers are.

Gong et al. 2019 (section 3) started from such maps: the distributions of neighbouring layers resemble each other, and
heads attend to near tokens or to [CLS]. Shapes: L layers, H heads, B sequences of T tokens, Q = T - 2 of them
ordinary, D = 2R + 1 distances. A sequence is [CLS], Q ordinary tokens, [SEP]; only ordinary tokens are looked *from*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_stacking.common.errors import UserError
from ds_stacking.growth.blocks import find_blocks

FARTHEST = 32
"""Largest distance R in the profile."""
BATCH = 4
"""Sequences of one forward pass: the maps of all layers are held at once."""
TARGETS = ("cls", "sep", "self", "neighbours", "others")
"""Where attention goes; every token is one of these, so the masses sum to 1."""
THRESHOLD = 0.5
"""A head is local, or on [CLS] or [SEP], where more than this share of its attention is."""


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """What was measured of one model, averaged over sequences and ordinary tokens; fp64 on the CPU."""

    mass: Tensor
    """Share of a head's attention on each of TARGETS [5, L, H]."""
    profile: Tensor
    """Mean attention to the ordinary token at each distance -R..R, where there is one [L, H, D]."""
    divergence: Tensor
    """Jensen-Shannon divergence in bits, 0 to 1, of every pair of layers, each the mean of its heads [L, L]."""
    head_divergence: Tensor
    """The same, head by head of the same number [L, L, H]."""
    weight_cosine: Tensor
    """Cosine of every pair of blocks' weight matrices, as one vector each [L, L]."""

    @property
    def distances(self) -> list[int]:
        """The distances of `profile`: key position minus query position."""
        reach = self.profile.shape[-1] // 2
        return list(range(-reach, reach + 1))

    @property
    def share(self) -> dict[str, float]:
        """Share of the heads that are local (itself and neighbours), on [CLS] and on [SEP]."""
        cls, sep, own, near, _ = self.mass
        return {
            name: float((mass > THRESHOLD).double().mean())
            for name, mass in (("local", own + near), ("cls", cls), ("sep", sep))
        }


@torch.no_grad()
def measure(model: nn.Module, sequences: Tensor, *, neighbours: int) -> AttentionMaps:
    """Measure `model`, which gives its attentions when asked, on `sequences` [B, T] of token ids.

    Raises UserError where its attentions are not [B, H, T, T] for every layer.
    """
    model.eval()
    sums: tuple[Tensor, ...] = ()
    for batch in sequences.split(BATCH):
        maps = _maps(model, batch)  # [L, B, H, T, T]
        measured = (_mass(maps, neighbours), _profile(maps), _divergence(maps))
        sums = tuple(a + b for a, b in zip(sums, measured, strict=True)) if sums else measured
    mass, profile, divergence = (total / len(sequences) for total in sums)
    return AttentionMaps(
        mass=mass,
        profile=profile,
        divergence=divergence[..., -1],
        head_divergence=divergence[..., :-1],
        weight_cosine=weight_cosine(model),
    )


def _maps(model: nn.Module, batch: Tensor) -> Tensor:
    """Attention from ordinary tokens [L, B, H, Q, T]."""
    length = batch.shape[1]
    attentions: Sequence[Tensor] | None = model(input_ids=batch, output_attentions=True).attentions
    if not attentions or any(a.shape[-2:] != (length, length) or a.ndim != 4 for a in attentions):
        raise UserError(f"{type(model).__name__} does not give attention from every token to every token.")
    return torch.stack([attention[:, :, 1:-1].float() for attention in attentions])


def _mass(maps: Tensor, neighbours: int) -> Tensor:  # [L, B, H, Q, T] -> [5, L, H], summed over B
    inner = maps[..., 1:-1]
    own = inner.diagonal(dim1=-2, dim2=-1)
    band = inner.tril(neighbours).triu(-neighbours).sum(-1)
    cls, sep = maps[..., 0], maps[..., -1]
    targets = torch.stack([cls, sep, own, band - own, inner.sum(-1) - band])
    return targets.mean(-1).sum(2).double()


def _profile(maps: Tensor) -> Tensor:  # [L, B, H, Q, T] -> [L, H, D], summed over B
    inner = maps[..., 1:-1]
    reach = min(FARTHEST, inner.shape[-1] - 1)
    means = [inner.diagonal(distance, -2, -1).mean(-1) for distance in range(-reach, reach + 1)]
    return torch.stack(means, -1).sum(1).double()


def _divergence(maps: Tensor) -> Tensor:
    """[L, B, H, Q, T] -> [L, L, H + 1], summed over B: head by head, then the mean of the heads."""
    maps = torch.cat([maps, maps.mean(2, keepdim=True)], 2)
    layers, _, heads = maps.shape[:3]
    entropies = _entropy(maps)
    divergence = torch.zeros(layers, layers, heads, dtype=torch.float64)
    for a in range(layers):
        for b in range(a):
            mixed = _entropy((maps[a] + maps[b]) / 2)
            pair = (mixed - (entropies[a] + entropies[b]) / 2).clamp(min=0)  # [B, H + 1, Q]
            divergence[a, b] = divergence[b, a] = pair.mean(-1).sum(0).double()
    return divergence


def _entropy(distribution: Tensor) -> Tensor:
    """In bits, over the last dimension."""
    return torch.special.entr(distribution).sum(-1) / math.log(2)


def weight_cosine(model: nn.Module) -> Tensor:
    """Cosine of every pair of blocks' weight matrices, as one vector each [L, L] fp64."""
    blocks = model.get_submodule(find_blocks(model).prefix)
    assert isinstance(blocks, nn.ModuleList)
    gram = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    for weights in zip(*([p for p in block.parameters() if p.ndim > 1] for block in blocks), strict=True):
        flat = torch.stack([weight.detach().float().flatten() for weight in weights])
        gram += (flat @ flat.T).double()
    norms = gram.diagonal().sqrt()
    return gram / norms.outer(norms)
